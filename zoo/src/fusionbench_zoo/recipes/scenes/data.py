"""The data stage: render the scenes of every part, each with textures that no other part has."""

import logging
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.clip_mini.split import load_task
from fusionbench_zoo.recipes.scenes.raycast import Array, render
from fusionbench_zoo.recipes.scenes.rooms import room

log = logging.getLogger(__name__)

PARTS = {"train": 1500, "calibration": 64, "test": 160}


def build_data(work: Path, seed: int) -> None:
    """Write `work/data/<part>.npz`: `image`, `label`, `depth` and `normal` of every scene."""
    textures = load_task(work.parent / "clip-mini", "climate")  # satellite photographs, parted by place
    partial = work / "data.partial"
    partial.mkdir(parents=True, exist_ok=True)
    for number, (part, count) in enumerate(PARTS.items()):
        mine = textures[f"{part}_images"].astype(float) / 255
        scenes = [render(room([seed, number, i], mine)) for i in range(count)]
        arrays = {kind: np.stack([scene[kind] for scene in scenes]) for kind in scenes[0]}
        np.savez_compressed(partial / f"{part}.npz", **arrays)
        log.info("rendered %d scenes of %s", count, part)
    partial.rename(work / "data")


def load_scenes(work: Path, part: str) -> dict[str, Array]:
    """The arrays of a part."""
    with np.load(work / "data" / f"{part}.npz") as arrays:
        return dict(arrays)
