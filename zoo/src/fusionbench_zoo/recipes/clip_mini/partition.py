"""Who may see what: groups are hashed into parts, and no picture is in two parts."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fusionbench_zoo.recipes.parts import part_by_hash

PARTS = {"pretrain": 0.30, "train": 0.40, "calibration": 0.12, "test": 0.18}
# Groups differ in size: with these numbers every class has pictures in every part, and the parts have their shares.
SALTS = {"animals": 0, "climate": 1, "icons": 15, "emoji": 10, "letters": 23, "scripts": 46}

PARTED_AS = {"house-numbers": "letters"}  # the same typefaces


def part_of(task: str, group: str) -> str:
    """Return the part that a group belongs to: the same on every machine and in every version of the recipe."""
    task = PARTED_AS.get(task, task)
    if task not in SALTS:  # an official split: the groups are called `<part>/<number>`
        return group.split("/")[0]
    return part_by_hash(f"{task}/{SALTS[task]}/{group}", PARTS)


def picture_hashes(images: np.ndarray) -> list[bytes]:
    """Return one digest per picture; colour under zero coverage does not count."""
    return [hashlib.sha256((image * (image[..., 3:] > 0)).tobytes()).digest()[:16] for image in images]


def unique_pictures(hashes: dict[str, Sequence[bytes]], parts: dict[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return, per source, a mask that keeps each picture once: in the part that needs most to be clean."""
    order = {"test": 0, "calibration": 1, "train": 2, "pretrain": 3}
    places = [(order[part], name, i) for name in hashes for i, part in enumerate(parts[name])]
    keep = {name: np.zeros(len(hashes[name]), bool) for name in hashes}
    seen: set[bytes] = set()
    for _, name, i in sorted(places):
        if hashes[name][i] not in seen:
            seen.add(hashes[name][i])
            keep[name][i] = True
    return keep


def shared_pictures(parts: Mapping[str, Iterable[bytes]]) -> int:
    """Count the pictures that occur in two parts, by their digests; there must be none."""
    sets = [set(hashes) for hashes in parts.values()]
    shared = sum(len(a & b) for i, a in enumerate(sets) for b in sets[:i])
    if shared:
        raise AssertionError(f"{shared} pictures are in two of: {', '.join(parts)}.")
    return shared
