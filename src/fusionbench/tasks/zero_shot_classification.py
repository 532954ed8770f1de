"""Zero-shot image classification with CLIP: images are compared with the text embeddings of class names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.corruptions import Corrupt
from fusionbench.errors import InputError, check_keys
from fusionbench.locations import find
from fusionbench.task import Outcomes, Scores, TaskPool
from fusionbench.tasks._batches import check_family, classified, numbers, other_family
from fusionbench.tasks._clip import Clip
from fusionbench.tasks._data import HubData, check_split, check_tasks, hub_data, with_card, with_corruption


class Images(Protocol):
    """Labelled images, by split."""

    def split(self, name: str) -> tuple[Any, np.ndarray]:
        """Images (an array or a list of PIL images) and integer labels of a split."""
        ...

    def digest(self) -> str:
        """A hash of the data, or of what names it."""
        ...


class ZeroShotClassification:
    """Accuracy and loss of a CLIP vision tower on labelled images.

    Args:
        clip: brings preprocessing, projections and the text tower.
        images: the data.
        classes: a name per label, as it stands in a prompt.
        templates: prompts with a place for the name: "a photo of a {}".
        batch_size: images evaluated at once.
        version: changes whenever scores of the task are no longer comparable.
    """

    primary = "accuracy"

    def __init__(
        self,
        clip: Clip,
        images: Images,
        classes: Sequence[str],
        templates: Sequence[str],
        *,
        batch_size: int = 128,
        version: int = 1,
    ) -> None:
        for template in templates:
            if "{}" not in template:
                raise InputError(f"The template '{template}' has no place for the class name: write it as {{}}.")
        self.clip, self.images = clip, images
        self.classes, self.templates = list(classes), list(templates)
        self.batch_size, self.version = batch_size, version
        self.corruption: Corrupt | None = None

    def corrupted(self, name: str, severity: int, seed: int = 0) -> ZeroShotClassification:
        """The same task, its test images corrupted (`fusionbench.corruptions`), and in no other way than this."""
        task = copy(self)
        task.corruption = Corrupt(name, severity, seed)
        return task

    @cached_property
    def head(self) -> Tensor:
        """The classifier: `(classes, projection)`."""
        return self.clip.head(self.classes, self.templates)

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Preprocessed images, `(batch, 3, height, width)`, and labels of a split, shuffled when a seed is given."""
        check_split(split)
        images, labels = self.images.split(split)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise InputError(
                f"Labels run from {labels.min()} to {labels.max()}, but {len(self.classes)} classes are named."
            )
        for chosen in numbers(len(labels), size, seed):
            batch = images[chosen] if isinstance(images, np.ndarray) else [images[int(i)] for i in chosen]
            if self.corruption is not None and split == "test":
                batch = self.corruption(batch, chosen)
            yield self.clip.preprocess(batch), torch.from_numpy(labels[chosen].astype(np.int64))

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits of a vision tower, or of anything with its output: `(batch, classes)`."""
        first = check_family(model, "pixel_values")
        size = getattr(getattr(first, "config", None), "image_size", inputs.shape[-1])
        if size != inputs.shape[-1]:
            raise other_family(first, f"images of {inputs.shape[-1]} pixels", f"takes {size}")
        output = model(inputs)
        features = output if isinstance(output, Tensor) else output[min(1, len(output) - 1)]  # not last_hidden_state
        width = self.clip.visual_projection.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            shape = tuple(features.shape[1:])
            raise other_family(first, f"an image and give {width} features", f"gives {shape} of an image")
        embeddings = nn.functional.normalize(features @ self.clip.visual_projection.to(features).T, dim=-1)
        return self.clip.logit_scale * embeddings @ self.head.to(features).T

    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """Accuracy (0 to 1) and mean cross-entropy on a split; the model is put in evaluation mode."""
        return self.scored(model, split)[0]

    def scored(self, model: nn.Module, split: str = "test") -> tuple[Scores, Outcomes]:
        """The same, and of every example whether it is classified right (`correct`), and its cross-entropy (`loss`)."""
        return classified(self, model, split, self.batch_size, "images")

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "zero_shot_classification",
            "version": self.version,
            "classes": len(self.classes),
            "templates": self.templates,
            "clip": self.clip.key(self.classes, self.templates),
            "data": self.images.digest(),
            **({"corruption": self.corruption.describe()} if self.corruption is not None else {}),
        }


class ArrayFile:
    """Images in a `.npz` file: `test_images` (uint8), `test_labels`, `calibration_images`, `calibration_labels`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            with np.load(self._path, allow_pickle=False) as file:
                return file[f"{name}_images"], file[f"{name}_labels"]
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise InputError(f"'{self._path}' cannot be read as images: {str(error).splitlines()[0]}") from None

    def digest(self) -> str:
        return hashlib.sha256(self._path.read_bytes()).hexdigest()


class HubImages:
    """Images of a data set that the `datasets` library loads."""

    def __init__(self, data: HubData, image: str, label: str) -> None:
        self._data, self._image, self._label = data, image, label

    def split(self, name: str) -> tuple[list[Any], np.ndarray]:
        data = self._data.columns(name, (self._image, self._label))
        return data[self._image], np.asarray(data[self._label])

    def digest(self) -> str:
        return f"{self._data.digest()} {self._image} {self._label}"


def build(
    *,
    clip: str,
    tasks: Mapping[str, Mapping[str, Any]],
    batch_size: int = 128,
    corruption: Mapping[str, Any] | None = None,
    relative_to: Path | None = None,
) -> TaskPool:
    """A pool of zero-shot classification tasks that share one CLIP model.

    Args:
        clip: folder of the CLIP model that brings text tower, projections and preprocessing.
        tasks: by name, `data` and, unless a `.json` beside the data has them, `classes` and `templates`. `data` is a
            `.npz` file, or `{dataset, name, splits: {test, calibration}, image, label}` for the `datasets` library.
        batch_size: images evaluated at once.
        corruption: of the test images: `{name: motion_blur, severity: 3, seed: 0}`.
        relative_to: where local paths start that do not exist from here.
    """
    check_tasks(tasks)
    model = Clip(find(clip, relative_to=relative_to))
    pool = TaskPool({name: _task(name, model, entry, batch_size, relative_to) for name, entry in tasks.items()})
    return with_corruption(pool, corruption)


def _task(name: str, clip: Clip, entry: Mapping[str, Any], batch_size: int, relative_to: Path | None) -> Any:
    check_keys(f"Task '{name}'", entry, ("data", "classes", "templates", "version"), required=("data",))
    if isinstance(entry["data"], str):
        images: Images = ArrayFile(find(entry["data"], relative_to=relative_to))
    else:
        data = hub_data(name, entry["data"], ("image", "label"))
        images = HubImages(data, entry["data"].get("image", "image"), entry["data"].get("label", "label"))
    facts = with_card(entry["data"], entry, relative_to)
    for key in ("classes", "templates"):
        if not isinstance(facts.get(key), list) or not facts[key]:
            raise InputError(
                f"Task '{name}' has no list of '{key}': give it in the YAML, or in a .json beside the data."
            )
    return ZeroShotClassification(
        clip, images, facts["classes"], facts["templates"], batch_size=batch_size, version=facts.get("version", 1)
    )
