"""The data stage: draw everything once, split it by group, and write the tasks and the pre-training set."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.clip_mini.drawings import Drawings
from fusionbench_zoo.recipes.clip_mini.partition import PARTS, part_of, picture_hashes, shared_pictures, unique_pictures
from fusionbench_zoo.recipes.clip_mini.tasks import HELD_OUT, PAIRS, SHARES, TASKS

log = logging.getLogger(__name__)

Show = Callable[[np.ndarray], np.ndarray]
MOST = {"train": 8000, "calibration": 512, "test": 1000}
KINDS = ["photo", "colour", "icon", "glyph", "solid"]
MOST_CAPTIONS = 4


def build_data(work: Path, seed: int) -> None:
    """Write `work/data`: one .npz per task with all its parts, the pre-training set, and what proves the split."""
    parted = [*TASKS, *HELD_OUT]
    drawings = {task.name: _cached(work, task.name, task.drawings) for task in parted}
    drawings |= {name: _cached(work, name, draw) for name, (draw, _) in PAIRS.items()}
    parts = {task.name: [part_of(task.name, group) for group in drawings[task.name].groups] for task in parted}
    parts |= {name: ["pretrain"] * len(drawings[name]) for name in PAIRS}
    hashes = {name: picture_hashes(d.images) for name, d in drawings.items()}
    unique = unique_pictures(hashes, parts)
    kept = {name: (unique[name] & (np.array(parts[name]) == "pretrain")).nonzero()[0] for name in SHARES}
    seen = {hashes[name][row] for name, rows in kept.items() for row in rows}  # by pre-training
    partial = work / "data.partial"
    (partial / "tasks").mkdir(parents=True, exist_ok=True)
    proof = {}
    for task in parted:
        rows = _rows(parts[task.name], unique[task.name], seed)
        _write_task(partial / "tasks" / f"{task.name}.npz", drawings[task.name], rows, task.show)
        used = {part: [hashes[task.name][row] for row in chosen] for part, chosen in rows.items()}
        proof[task.name] = _proof(drawings[task.name], parts[task.name], unique[task.name], rows) | {
            "pictures in two parts": shared_pictures({"pretrain": seen, **used})
        }
    proof["pre-training pairs"] = {name: len(rows) for name, rows in kept.items()}
    _write_pairs(partial / "pretrain", {name: drawings[name].take(rows) for name, rows in kept.items()})
    (partial / "partition.json").write_text(json.dumps(proof, indent=1))
    partial.rename(work / "data")


def load_task(work: Path, task: str) -> dict[str, np.ndarray]:
    """Read all parts of a task: `train_images`, `train_labels`, `calibration_images` and so on."""
    with np.load(work / "data" / "tasks" / f"{task}.npz") as arrays:
        return dict(arrays)


def _cached(work: Path, name: str, draw: Callable[[Path], Drawings]) -> Drawings:
    folder = work / "drawings" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        draw(work.parent).save(folder)  # the packages lie beside all zoos
        log.info("drew %s", name)
    return Drawings.load(folder)


def _rows(parts: list[str], unique: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Choose, in random order, the pictures of each part."""
    random = np.random.default_rng(seed)
    rows = {part: random.permutation((unique & (np.array(parts) == part)).nonzero()[0]) for part in MOST}
    return {part: found[: MOST[part]] for part, found in rows.items()}


def _write_task(file: Path, drawings: Drawings, rows: dict[str, np.ndarray], show: Show) -> None:
    arrays = {}
    for part, chosen in rows.items():
        arrays[f"{part}_images"] = show(drawings.images[chosen])
        arrays[f"{part}_labels"] = drawings.labels[chosen].astype(np.uint8)
        arrays[f"{part}_groups"] = np.array([drawings.groups[row] for row in chosen])  # so that anyone can check them
    np.savez_compressed(file, **arrays)


def _write_pairs(folder: Path, sources: dict[str, Drawings]) -> None:
    """Write one array of all pictures, and for each its kind, its source and its caption numbers."""
    folder.mkdir(exist_ok=True)
    kinds = {name: kind for name, (_, kind) in PAIRS.items()} | {t.name: t.pairs for t in (*TASKS, *HELD_OUT)}
    texts: dict[str, int] = {}
    captions = [
        [texts.setdefault(text, len(texts)) for text in (MOST_CAPTIONS * mine)[:MOST_CAPTIONS]]
        for drawings in sources.values()
        for mine in drawings.captions
    ]
    np.save(folder / "images.npy", np.concatenate([drawings.images for drawings in sources.values()]))
    np.savez(
        folder / "index.npz",
        captions=np.array(captions, np.int32),
        kinds=np.concatenate([_kinds(drawings.images, kinds[name]) for name, drawings in sources.items()]),
        sources=np.repeat(np.arange(len(sources)), [len(d) for d in sources.values()]),
    )
    (folder / "texts.json").write_text(json.dumps({"captions": list(texts), "sources": list(sources)}))


def _kinds(images: np.ndarray, kind: str) -> np.ndarray:
    """Return the kind of each drawing: icon sets may have colours and emoji may have none."""
    if kind not in ("colour", "icon"):
        return np.full(len(images), KINDS.index(kind))
    return np.where(images[..., :3].any(axis=(1, 2, 3)), KINDS.index("colour"), KINDS.index("icon"))


def _proof(drawings: Drawings, parts: list[str], unique: np.ndarray, rows: dict[str, np.ndarray]) -> dict:
    """Tell what shows that no group and no picture is in two parts."""
    groups = {part: {g for g, p in zip(drawings.groups, parts, strict=True) if p == part} for part in PARTS}
    shared = sum(len(groups[a] & groups[b]) for a in PARTS for b in PARTS if a < b)
    if shared:
        raise AssertionError(f"{shared} groups are in two parts.")
    return {
        "groups": {part: len(found) for part, found in groups.items()},
        "groups in two parts": shared,
        "pictures": dict(Counter(parts)),
        "pictures left out because they occur twice": dict(Counter(np.array(parts)[~unique].tolist())),
        "pictures used": {part: len(found) for part, found in rows.items()},
    }
