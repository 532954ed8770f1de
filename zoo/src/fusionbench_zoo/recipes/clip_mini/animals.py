"""Animal silhouettes from PyPI's animal-mnist."""

import gzip
import hashlib
import io
import pickle
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.clip_mini.drawings import Drawings, coverage
from fusionbench_zoo.recipes.fetch import folder_of

CLASSES = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]


class _ArraysOnly(pickle.Unpickler):
    """Unpickle NumPy arrays and nothing else: a pickle may otherwise run any code."""

    allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] != "numpy" or name not in self.allowed:
            raise pickle.UnpicklingError(f"A pickle of arrays asks for {module}.{name}.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def animals(work: Path) -> Drawings:
    """Read the silhouettes; equal pictures are one group, since the source has no other."""
    folder = folder_of(work, "animal-mnist") / "animal_mnist/data/Animal_MNIST"
    images, labels = (
        _ArraysOnly(io.BytesIO(gzip.decompress((folder / f"animal_{kind}_version_3.gz").read_bytes()))).load()
        for kind in ("data", "label")
    )
    images = np.asarray(images, np.uint8).reshape(-1, 28, 28)
    groups = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return Drawings(coverage(images), groups, [[] for _ in groups], np.asarray(labels, np.int64).ravel())
