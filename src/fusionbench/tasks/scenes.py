"""Scene understanding as on NYUv2 (Silberman et al., 2012): segmentation, depth and surface normals of every pixel."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from fusionbench.architectures._dilated_resnet import DEEP_LAB_RATES, deep_lab_head
from fusionbench.checkpoint import Checkpoint
from fusionbench.corruptions import CORRUPTIONS, Corrupt
from fusionbench.errors import InputError, check_keys, did_you_mean
from fusionbench.formats import read_config
from fusionbench.locations import find
from fusionbench.task import Outcomes, Scores, TaskPool
from fusionbench.tasks._batches import check_family, device_of, numbers, other_family
from fusionbench.tasks._data import check_split, check_tasks, with_corruption

PREFIXES = ("decoder.", "decoders.{}.", "")
FIRST = "0.convs.0.0.weight"  # a decoder's first tensor: (width, channels of the features, 1, 1)


class Folder:
    """Scenes as `.npy` files: `<split>/image/0.npy`, `(H, W, 3)` in 0 to 1, and beside it `label`, `depth`, `normal`.

    A label is `(H, W)`, -1 where there is none; depth `(H, W)` or `(H, W, 1)`, 0 where it is unknown; normals
    `(H, W, 3)`, 0 where they are unknown.

    Args:
        path: the folder.
        splits: the folder's own names for `test` and `calibration`.
    """

    def __init__(self, path: Path, splits: Mapping[str, str]) -> None:
        self._path, self._splits = path, dict(splits)

    def numbers(self, split: str) -> list[int]:
        """The numbers of a split's scenes, in order."""
        if split not in self._splits:
            raise InputError(f"'{self._path}': splits does not say which folder is '{split}'.")
        folder = self._path / self._splits[split] / "image"
        found = sorted(int(file.stem) for file in folder.glob("*.npy") if re.fullmatch(r"\d+", file.stem))
        if not found:
            raise InputError(f"'{folder}' has no scenes: files 0.npy, 1.npy ... are expected.")
        return found

    def stack(self, split: str, kind: str, numbers: list[int]) -> Tensor:
        """Scenes of a split, stacked: `(batch, channels, H, W)`, labels without the channels."""
        arrays = []
        for number in numbers:
            file = self._path / self._splits[split] / kind / f"{number}.npy"
            try:
                arrays.append(np.load(file, allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"'{file}' cannot be read: {str(error).splitlines()[0]}") from None
        if len({(array.shape, array.dtype.kind) for array in arrays}) > 1 or arrays[0].ndim not in (2, 3):
            shapes = ", ".join(sorted({str(array.shape) for array in arrays}))
            raise InputError(
                f"'{self._path / self._splits[split] / kind}': scenes of one shape are expected: {shapes}."
            )
        return _tensor(np.stack(arrays), kind)

    def digest(self) -> str:
        names = sorted(p.relative_to(self._path).as_posix() for p in self._path.rglob("*.npy"))
        sha = hashlib.sha256(str(self._splits).encode())
        for name in names:
            sha.update(name.encode() + (self._path / name).read_bytes())
        return sha.hexdigest()


class Arrays:
    """Scenes in one `.npz` file: `<split>_image` (bytes), `<split>_label`, `<split>_depth`, `<split>_normal`.

    The arrays are as those of a `Folder`, stacked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"'{self._path}' cannot be read: {str(error).splitlines()[0]}") from None

    def _array(self, split: str, kind: str) -> np.ndarray:
        name = f"{split}_{kind}"
        if name not in self._arrays:
            raise InputError(f"'{self._path}' has no '{name}'. {did_you_mean(name, self._arrays)}")
        return self._arrays[name]

    def numbers(self, split: str) -> list[int]:
        """The numbers of a split's scenes, in order."""
        return list(range(len(self._array(split, "image"))))

    def stack(self, split: str, kind: str, numbers: list[int]) -> Tensor:
        """As of a `Folder`."""
        array = self._array(split, kind)[numbers]
        return _tensor(array.astype(np.float32) / 255 if array.dtype == np.uint8 else array, kind)

    def digest(self) -> str:
        return hashlib.sha256(self._path.read_bytes()).hexdigest()


def _tensor(stacked: np.ndarray, kind: str) -> Tensor:
    """Pixels last to pixels first: `(batch, channels, H, W)`, labels `(batch, H, W)`."""
    tensor = torch.from_numpy(stacked)
    if kind == "label":
        return tensor.long().reshape(tensor.shape[:3])
    return (tensor[..., None] if tensor.dim() == 3 else tensor).permute(0, 3, 1, 2).float()


class _Counts:
    """Of every image, how many pixels are known, and how many of them are near enough to the truth."""

    def __init__(self) -> None:
        self._near: list[Tensor] = []
        self._known: list[Tensor] = []

    def add(self, known: Tensor, near: Tensor) -> None:
        """Which pixels of a batch are known, `(batch, ..., H, W)`, and which of those are near, in one row."""
        image = known.nonzero()[:, 0]
        self._near.append(torch.bincount(image[near], minlength=len(known)).int().cpu())
        self._known.append(torch.bincount(image, minlength=len(known)).int().cpu())

    def outcomes(self) -> Outcomes:
        return {"near": torch.cat(self._near).numpy(), "known": torch.cat(self._known).numpy()}


class Segmentation:
    """Mean intersection over union of the classes that occur, and the share of right pixels (0 to 1)."""

    kind, primary, outputs = "label", "miou", 13

    def __init__(self) -> None:
        self._confusions: list[Tensor] = []  # of every image: (batch, classes, classes)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        known = truth >= 0
        if int(truth.max()) >= self.outputs:
            raise InputError(f"A label is {int(truth.max())}, but there are {self.outputs} classes.")
        images = torch.arange(len(truth), device=truth.device)[:, None, None].expand_as(truth)
        triples = (images[known] * self.outputs + truth[known]) * self.outputs + predicted.argmax(1)[known]
        counts = torch.bincount(triples.cpu(), minlength=len(truth) * self.outputs**2)
        self._confusions.append(counts.reshape(len(truth), self.outputs, self.outputs))

    def outcomes(self) -> Outcomes:
        return {"confusion": torch.cat(self._confusions).int().numpy()}

    def scores(self) -> Scores:
        confusion = torch.cat(self._confusions).sum(0)
        right, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        union = truth + predicted - right
        return {
            "miou": float((right[union > 0] / union[union > 0]).mean()),
            "pixel_accuracy": float(right.sum() / truth.sum()),
        }


class Depth:
    """Mean absolute and relative error where the depth is known, and how often it is right within a quarter.

    `within_1.25` (Eigen et al., 2014) is the share of pixels whose ratio to the truth, or its inverse, is below 1.25.
    """

    kind, primary, outputs = "depth", "within_1.25", 1

    def __init__(self) -> None:
        self._sums, self._count = torch.zeros(3, dtype=torch.double), 0
        self._counts = _Counts()

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        known = truth > 0
        p, t = predicted[known].double(), truth[known].double()
        ratio = torch.maximum(p / t, t / p.clamp(min=1e-6))
        error = (p - t).abs()
        self._sums += torch.stack([error.sum(), (error / t).sum(), (ratio < 1.25).sum()]).cpu()
        self._count += int(known.sum())
        self._counts.add(known, ratio < 1.25)

    def outcomes(self) -> Outcomes:
        return self._counts.outcomes()

    def scores(self) -> Scores:
        absolute, relative, near = (self._sums / self._count).tolist()
        return {"absolute_error": absolute, "relative_error": relative, "within_1.25": near}


class Normals:
    """Mean and median angle to the true normal, in degrees, and the share within 11.25, 22.5 and 30 degrees."""

    kind, primary, outputs = "normal", "within_11.25", 3

    def __init__(self) -> None:
        self._angles: list[Tensor] = []
        self._counts = _Counts()

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        known = truth.abs().sum(1) > 0
        cosine = cosine_similarity(normalize(predicted, dim=1), truth, dim=1)[known].clamp(-1, 1)
        angles = torch.rad2deg(torch.acos(cosine))
        self._angles.append(angles.cpu())
        self._counts.add(known, angles < 11.25)

    def outcomes(self) -> Outcomes:
        return self._counts.outcomes()

    def scores(self) -> Scores:
        angles = torch.cat(self._angles)
        within = {f"within_{limit:g}": float((angles < limit).float().mean()) for limit in (11.25, 22.5, 30)}
        return {"mean_angle": float(angles.mean()), "median_angle": float(angles.median()), **within}


METRICS = {"segmentation": Segmentation, "depth": Depth, "normals": Normals}


class Scenes:
    """What an encoder and one task's decoder make of every pixel.

    Args:
        scenes: the data.
        metric: `segmentation`, `depth` or `normals`.
        head: checkpoint with the decoder's tensors, as `decoder.*` or `decoders.<task>.*`.
        batch_size: scenes evaluated at once.
        version: changes whenever scores of the task are no longer comparable.
    """

    def __init__(
        self, scenes: Folder | Arrays, metric: str, head: Checkpoint, *, batch_size: int = 8, version: int = 1
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"No metric of scenes is called '{metric}'. {did_you_mean(metric, METRICS)}")
        self.scenes, self.name, self.metric, self._head = scenes, metric, METRICS[metric], head
        self.primary = self.metric.primary
        self.batch_size, self.version = batch_size, version
        self.corruption: Corrupt | None = None

    def corrupted(self, name: str, severity: int, seed: int = 0) -> Scenes:
        """The same task, its test images corrupted (`fusionbench.corruptions`), and in no other way than this.

        Raises:
            InputError: also for a corruption that moves things, of whose pixels the truth is no longer true.
        """
        task = copy(self)
        task.corruption = Corrupt(name, severity, seed)
        if CORRUPTIONS[name].moves:
            raise InputError(f"{name} moves what is seen, but not what is true of each pixel: scenes cannot have it.")
        return task

    @property
    def _rates(self) -> Sequence[int]:
        """How far the decoder is dilated, which tensors do not tell: its config does, or it is DeepLab's."""
        return read_config(self._head.folder).get("rates", DEEP_LAB_RATES)

    @cached_property
    def head(self) -> nn.Module:
        """The decoder: features to one channel per class, depth, or three for a normal."""
        prefixes = [prefix.format(self.name) for prefix in PREFIXES]
        prefix = next((prefix for prefix in prefixes if f"{prefix}{FIRST}" in self._head), None)
        if prefix is None:
            raise InputError(f"'{self._head.location}' has no decoder: no tensor is called 'decoder.{FIRST}'.")
        # By name: the encoder in the same file is not read.
        tensors = {n.removeprefix(prefix): self._head[n].float() for n in self._head if n.startswith(prefix)}
        width, into = tensors[FIRST].shape[:2]
        head = deep_lab_head(into, self.metric.outputs, width=width, rates=self._rates)
        wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        for name, shape in wanted.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "missing"
                raise InputError(f"'{self._head.location}': the decoder's '{name}' is {found}, {shape} is expected.")
        head.load_state_dict({name: tensors[name] for name in wanted})
        return head.eval()

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, `(batch, 3, H, W)`, and what is true of every pixel: `(batch, H, W)` or `(batch, channels, H, W)`."""
        check_split(split)
        known = self.scenes.numbers(split)
        for chosen in numbers(len(known), size, seed):
            part = [known[i] for i in chosen]
            images = self.scenes.stack(split, "image", part)
            if self.corruption is not None and split == "test":
                pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
                images = _tensor(self.corruption(pixels, part).astype(np.float32) / 255, "image")
            yield images, self.scenes.stack(split, self.metric.kind, part)

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The decoder's output at the images' size: `(batch, channels, H, W)`."""
        first = check_family(model, "pixel_values")
        if hasattr(first, "config"):  # a model of transformers
            raise other_family(first, "an image and give a map of features", "gives none")
        features = model(inputs)
        return interpolate(self.head.to(features.device)(features), size=inputs.shape[-2:], mode="bilinear")

    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """The metric's scores on a split; the model is put in evaluation mode."""
        return self.scored(model, split)[0]

    @torch.no_grad()
    def scored(self, model: nn.Module, split: str = "test") -> tuple[Scores, Outcomes]:
        """The same, and of every image its `confusion` matrix, or how many `known` pixels there are and `near` ones."""
        model.eval()
        device, metric = device_of(model), self.metric()
        for inputs, truth in self.batches(split, self.batch_size):
            metric.add(self.predict(model, inputs.to(device)), truth.to(device))
        return metric.scores(), metric.outcomes()

    def describe(self) -> dict[str, Any]:
        corruption = {"corruption": self.corruption.describe()} if self.corruption is not None else {}
        return {
            "kind": "scenes",
            "version": self.version,
            "metric": self.name,
            "head": [Checkpoint.of(self.head.state_dict()).digest, list(self._rates)],
            "data": self.scenes.digest(),
            **corruption,
        }


def build(
    *,
    data: str,
    tasks: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, str] | None = None,
    batch_size: int = 8,
    corruption: Mapping[str, Any] | None = None,
    relative_to: Path | None = None,
) -> TaskPool:
    """A pool of tasks on the same scenes.

    Args:
        data: folder of the scenes, or a `.npz` file: see `Folder` and `Arrays`.
        tasks: by name, `head` (the model whose decoder it is) and, where the name does not say it, `metric`.
        splits: a folder's own names for `test` (default: val) and `calibration` (default: calibration).
        batch_size: scenes evaluated at once.
        corruption: of the test images: `{name: gaussian_noise, severity: 3, seed: 0}`.
        relative_to: where local paths start that do not exist from here.
    """
    check_tasks(tasks)
    path = find(data, relative_to=relative_to)
    if path.suffix == ".npz":
        scenes = Arrays(path)
    else:
        scenes = Folder(path, {"test": "val", "calibration": "calibration", **(splits or {})})
    found = {}
    for name, entry in tasks.items():
        check_keys(f"Task '{name}'", entry, ("head", "metric", "version"), required=("head",))
        head = Checkpoint.open(find(entry["head"], relative_to=relative_to))
        found[name] = Scenes(
            scenes, entry.get("metric", name), head, batch_size=batch_size, version=entry.get("version", 1)
        )
    return with_corruption(TaskPool(found), corruption)
