"""The one form that every source is turned into: small RGBA pictures with captions, groups and perhaps labels."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIZE = 32


@dataclass
class Drawings:
    """Pictures of one source. A one-colour drawing has its coverage in alpha and black elsewhere."""

    images: np.ndarray  # (N, 32, 32, 4) uint8
    groups: list[str]  # what must not be split over two parts
    captions: list[list[str]]  # one to four texts each; empty where the source never feeds pre-training
    labels: np.ndarray  # (N,) int64, -1 where the source is no task

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, indices: np.ndarray) -> "Drawings":
        """Return the drawings at `indices`, in that order."""
        return Drawings(
            self.images[indices],
            [self.groups[i] for i in indices],
            [self.captions[i] for i in indices],
            self.labels[indices],
        )

    def save(self, folder: Path) -> None:
        """Write to a new `folder`; it appears only when complete."""
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        np.save(partial / "images.npy", self.images)
        np.save(partial / "labels.npy", self.labels)
        (partial / "texts.json").write_text(json.dumps({"groups": self.groups, "captions": self.captions}))
        partial.rename(folder)

    @classmethod
    def load(cls, folder: Path) -> "Drawings":
        """Read what `save` wrote; the images stay on disk."""
        texts = json.loads((folder / "texts.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
        return cls(images, texts["groups"], texts["captions"], np.load(folder / "labels.npy"))


def collect(rows: list[tuple[np.ndarray, str, list[str], int]]) -> Drawings:
    """Stack (image, group, captions, label) rows."""
    images, groups, captions, labels = zip(*rows, strict=True)
    return Drawings(np.stack(images), list(groups), list(captions), np.array(labels, np.int64))


def coverage(grey: np.ndarray) -> np.ndarray:
    """Turn grey pictures, white on black, into one-colour drawings, centred on 32 x 32."""
    margin = SIZE - grey.shape[-1]
    images = np.zeros((len(grey), SIZE, SIZE, 4), np.uint8)
    images[..., 3] = np.pad(grey, ((0, 0), *[(margin // 2, margin - margin // 2)] * 2))
    return images


def opaque(rgb: np.ndarray) -> np.ndarray:
    """Add full coverage to photographs."""
    return np.concatenate([rgb, np.full((*rgb.shape[:-1], 1), 255, np.uint8)], axis=-1)


def photograph(images: np.ndarray) -> np.ndarray:
    """Return RGB pictures (N, 32, 32, 3)."""
    return np.ascontiguousarray(images[..., :3])


def white_on_black(images: np.ndarray) -> np.ndarray:
    """Return grey pictures (N, 32, 32)."""
    return np.ascontiguousarray(images[..., 3])


def colour_on_white(images: np.ndarray) -> np.ndarray:
    """Return RGB pictures (N, 32, 32, 3)."""
    alpha = images[..., 3:].astype(np.float32) / 255
    return (images[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
