"""What is embedded is what its manifest says, in the regime the benchmark needs."""

import hashlib
import json
from pathlib import Path

import fusionbench_zoo
import numpy as np
import pytest
from fusionbench_zoo.recipes.clip_mini.partition import part_of, picture_hashes, shared_pictures, unique_pictures

import fusionbench as fb
from fusionbench.analysis import task_vector_cosine

ZOO = fusionbench_zoo.path("clip-mini")
TASKS = ["mnist", "fashion-mnist", "animals", "climate", "icons", "emoji", "letters", "house-numbers"]


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
        assert proof["groups in two parts"] == 0 and proof["pictures in two parts"] == 0
        assert proof["pictures used"]["test"] >= 500 and proof["pictures used"]["train"] >= 1000
    assert sum(partition["proof"]["pre-training pairs"].values()) > 100_000


def test_a_picture_of_two_sources_is_kept_in_the_part_that_must_be_clean() -> None:
    """The recipe's own check, on a planted leak: pre-training would see a test picture that another source has too."""
    parts = {"icons": ["test", "train", "pretrain"], "other-icons": ["pretrain", "pretrain"]}
    images = {name: np.zeros((len(rows), 2, 2, 4), np.uint8) for name, rows in parts.items()}
    for number, image in enumerate([*images["icons"], images["other-icons"][0]]):
        image[:] = number + 1
    images["other-icons"][1] = images["icons"][0]  # the leak
    hashes = {name: picture_hashes(drawn) for name, drawn in images.items()}
    with pytest.raises(AssertionError, match="1 pictures are in two of: pretrain, test"):
        shared_pictures({"pretrain": hashes["other-icons"], "test": hashes["icons"][:1]})
    unique = unique_pictures(hashes, parts)
    assert [mask.tolist() for mask in unique.values()] == [[True, True, True], [True, False]]
    assert shared_pictures({"pretrain": hashes["other-icons"][:1], "test": hashes["icons"][:1]}) == 0


@pytest.mark.parametrize("task", TASKS)
def test_every_picture_is_in_the_part_its_group_is_hashed_to(task: str) -> None:
    """So that no group of a test picture was seen before: the recipe gives pre-training the part `pretrain` alone."""
    with np.load(ZOO / "tasks" / f"{task}.npz", allow_pickle=False) as arrays:
        groups = {part: set(arrays[f"{part}_groups"].tolist()) for part in ("test", "calibration")}
    for part, found in groups.items():
        assert {part_of(task, group) for group in found} == {part}
    assert not groups["test"] & groups["calibration"]


def test_fine_tunes_are_better_than_the_base_and_merge_as_in_the_paper() -> None:
    pool, tasks = fb.load_modelpool("clip-mini"), fb.load_taskpool("clip-mini")
    assert list(pool) == list(tasks) == TASKS
    base = tasks.headline(tasks.evaluate(pool.build(pool.require_base())))
    individual = tasks.headline(tasks.evaluate(pool.build))
    assert all(individual[task] > base[task] for task in TASKS)
    average = tasks.headline(tasks.evaluate(pool.build(fb.methods.simple_average(pool))))
    kept = (average["average"] - base["average"]) / (individual["average"] - base["average"])
    assert base["average"] >= 0.30 and individual["average"] >= 0.78 and kept >= 0.3
    cosine = task_vector_cosine(pool)
    assert cosine.fill_diagonal_(0).abs().max() < 0.2


def test_the_zoo_knows_its_folder() -> None:
    assert Path(fusionbench_zoo.path("clip-mini", "base")).is_dir()
    assert fb.Checkpoint.open("zoo:clip-mini/base").location == "zoo:clip-mini/base"
