"""What is embedded is what its manifest says, in the regime the benchmark needs."""

import hashlib
import json
from pathlib import Path

import fusionbench_zoo
import numpy as np
import pytest
from fusionbench_zoo.recipes.partition import part_of

import fusionbench as fb

ZOO = fusionbench_zoo.path("clip-mini")
TASKS = ["mnist", "fashion-mnist", "animals", "climate", "icons", "emoji", "letters", "scripts"]


def test_every_file_is_the_one_of_the_manifest() -> None:
    listed = json.loads((ZOO / "manifest.json").read_text())["files"]
    present = {str(p.relative_to(ZOO)) for p in ZOO.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert set(listed) == present
    for name, sha256 in listed.items():
        assert hashlib.sha256((ZOO / name).read_bytes()).hexdigest() == sha256, name


def test_the_zoo_is_small_enough_to_live_in_git() -> None:
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) < 45_000_000


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_enough_images_and_its_splits_share_none(task: str) -> None:
    facts = json.loads((ZOO / "tasks" / f"{task}.json").read_text())
    with np.load(ZOO / "tasks" / f"{task}.npz", allow_pickle=False) as arrays:
        test, calibration = arrays["test_images"], arrays["calibration_images"]
        for images, labels in ((test, arrays["test_labels"]), (calibration, arrays["calibration_labels"])):
            assert images.dtype == np.uint8 and images.shape[1:3] == (32, 32) and len(images) == len(labels)
            assert set(labels.tolist()) == set(range(len(facts["classes"])))
    assert len(test) >= 500 and len(calibration) >= 400
    hashes = [{image.tobytes() for image in images} for images in (test, calibration)]
    assert not hashes[0] & hashes[1]
    assert facts["licence"] and facts["source"] and all("{}" in template for template in facts["templates"])


def test_the_partition_holds() -> None:
    """No group is in two of: pre-training, training, calibration, test; pre-training has pictures of its own."""
    partition = json.loads((ZOO / "manifest.json").read_text())["partition"]
    for task in TASKS:
        proof = partition["proof"][task]
        assert proof["groups in two parts"] == 0
        assert proof["pictures used"]["test"] >= 500 and proof["pictures used"]["train"] >= 1000
    assert sum(partition["proof"]["pre-training pairs"].values()) > 100_000


@pytest.mark.parametrize("task", TASKS)
def test_every_picture_is_in_the_part_its_group_is_hashed_to(task: str) -> None:
    """So that no group of a test picture was seen before: the recipe gives pre-training the part `pretrain` alone."""
    with np.load(ZOO / "tasks" / f"{task}.npz", allow_pickle=False) as arrays:
        groups = {part: set(arrays[f"{part}_groups"].tolist()) for part in ("test", "calibration")}
    for part, found in groups.items():
        assert {part_of(task, group) for group in found} == {part}
    assert not groups["test"] & groups["calibration"]


def test_fine_tunes_are_better_than_the_base_on_their_tasks() -> None:
    pool, tasks = fb.load_modelpool("clip-mini"), fb.load_taskpool("clip-mini")
    assert list(pool) == list(tasks) == TASKS
    base = tasks.headline(tasks.evaluate(pool.build(pool.require_base())))
    individual = tasks.headline(tasks.evaluate(pool.build))
    assert all(individual[task] > base[task] for task in TASKS)
    assert individual["average"] > base["average"] + 0.1


def test_the_zoo_knows_its_folder() -> None:
    assert Path(fusionbench_zoo.path("clip-mini", "base")).is_dir()
    assert fb.Checkpoint.open("zoo:clip-mini/base").location == "zoo:clip-mini/base"
