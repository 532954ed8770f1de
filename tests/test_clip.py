import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import CLASSES, write_clip, write_fine_tune, write_task, write_zoo
from torch import nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPVisionModel

import fusionbench as fb
from fusionbench.architectures import architecture_of, clip_vision, get_architecture
from fusionbench.config import build_modelpool, build_taskpool
from fusionbench.tasks._clip import Clip
from fusionbench.tasks.zero_shot_classification import ArrayFile, ZeroShotClassification, build


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write_zoo(folder)
    return folder


@pytest.fixture
def pool(zoo: Path) -> fb.ModelPool:
    return build_modelpool({"base": "base", "models": {"colours": "colours", "greys": "greys"}}, relative_to=zoo)


@pytest.fixture
def task(zoo: Path) -> ZeroShotClassification:
    images = ArrayFile(zoo / "tasks" / "colours.npz")
    return ZeroShotClassification(Clip(zoo / "base"), images, CLASSES, ["a photo of a {}", "the {}"])


def test_a_pool_takes_full_models_and_towers_of_any_transformers(pool: fb.ModelPool, zoo: Path, tmp_path: Path) -> None:
    assert all(name.startswith("vision_model.") for name in pool.reference)
    # As transformers 4 and the hub's files have it: with a prefix, and a buffer of positions.
    old = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in load_file(_weights(zoo / "greys")).items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((zoo / "greys" / "config.json").read_text())
    same = fb.ModelPool({"new": zoo / "greys", "old": tmp_path}, base=zoo / "base", architecture=clip_vision)
    assert same["new"].digest == same["old"].digest


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_a_built_tower_gives_what_transformers_gives(pool: fb.ModelPool, zoo: Path) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    expected = CLIPVisionModel.from_pretrained(zoo / "greys").eval()(pixels).pooler_output
    torch.testing.assert_close(pool.build("greys")(pixels).pooler_output, expected)


def test_a_file_of_weights_alone_is_built_as_its_base(pool: fb.ModelPool, zoo: Path, tmp_path: Path) -> None:
    save_file(load_file(_weights(zoo / "greys")), tmp_path / "greys.safetensors")
    alone = fb.ModelPool({"greys": tmp_path / "greys.safetensors"}, base=zoo / "base", architecture=clip_vision)
    pixels = torch.randn(2, 3, 16, 16)
    expected = pool.build("greys")(pixels).pooler_output
    assert torch.equal(alone.build("greys")(pixels).pooler_output, expected)
    assert torch.equal(alone.load().build("greys")(pixels).pooler_output, expected)


def test_a_merged_tower_loads_with_from_pretrained(pool: fb.ModelPool, tmp_path: Path) -> None:
    merged = fb.methods.simple_average(pool)
    fb.save(merged, tmp_path / "merged")
    pixels = torch.randn(2, 3, 16, 16)
    loaded = CLIPVisionModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(pixels).pooler_output, pool.build(merged)(pixels).pooler_output)
    opened = fb.Checkpoint.open(tmp_path / "merged")
    assert architecture_of(opened) is get_architecture("clip_vision")


def test_a_merged_tower_has_its_own_config_and_no_tokenizer(pool: fb.ModelPool, zoo: Path, tmp_path: Path) -> None:
    for name, result in {"merged": fb.methods.simple_average(pool), "base": pool.require_base()}.items():
        fb.save(result, tmp_path / name)
        own, theirs = (fb.Checkpoint.open(place).config for place in (tmp_path / name, zoo / "greys"))
        assert own == {key: value for key, value in theirs.items() if key != "transformers_version"}
        assert (tmp_path / name / "preprocessor_config.json").is_file()
        assert not list((tmp_path / name).glob("tokenizer*"))


def test_towers_are_known_by_their_own_configs(pool: fb.ModelPool, zoo: Path) -> None:
    towers = fb.ModelPool({"greys": zoo / "greys"}, architecture=clip_vision)
    assert pool.identity("base")["built"] == pool.identity("greys")["built"] == towers.identity("greys")["built"]
    assert pool.load().identity("base") == pool.identity("base")


def test_architectures_that_are_none_are_refused(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(fb.InputError, match=r"Did you mean 'clip_vision'\?"):
        get_architecture("clip_visoin")
    fb.save(fb.Checkpoint.of({"w": torch.ones(1)}), tmp_path / "other")
    with pytest.raises(fb.InputError, match="has the model type 'None'"):
        architecture_of(fb.Checkpoint.open(tmp_path / "other"))
    with pytest.raises(fb.InputError, match="holds no CLIP vision tower"):
        fb.ModelPool({"a": tmp_path / "other"}, architecture=clip_vision)


def test_the_head_is_the_normalised_mean_of_normalised_text_embeddings(task: ZeroShotClassification) -> None:
    model = CLIPModel.from_pretrained(task.clip.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(task.clip.folder)
    rows = []
    for name in CLASSES:
        embeddings = []
        for template in ("a photo of a {}", "the {}"):  # one by one: no padding, no late binding (pitfall B10)
            tokens = tokenizer(template.format(name), return_tensors="pt")
            pooled = model.text_model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).pooler_output
            embeddings.append(nn.functional.normalize(model.text_projection(pooled), dim=-1))
        rows.append(nn.functional.normalize(torch.cat(embeddings).mean(0), dim=-1))
    torch.testing.assert_close(task.head, torch.stack(rows).detach())


def test_the_head_is_kept_by_content(task: ZeroShotClassification, cache: Path, tmp_path: Path) -> None:
    head = task.head
    kept = list((cache / "heads").iterdir())
    assert len(kept) == 1
    save_file({"head": head + 1}, kept[0])
    assert task.clip.head(CLASSES, task.templates).equal(head + 1)  # the kept one was read
    task.clip.head(CLASSES, ["a {}"])
    task.clip.head([*CLASSES, "dark"], task.templates)
    assert len(list((cache / "heads").iterdir())) == 3
    # Pitfall C15: other text weights under the same names must not meet an old head.
    write_clip(tmp_path / "other", seed=5)
    assert not Clip(tmp_path / "other").head(CLASSES, task.templates).allclose(head + 1)
    assert len(list((cache / "heads").iterdir())) == 4


def test_a_description_tells_the_order_of_classes_and_the_text_tower(
    task: ZeroShotClassification, zoo: Path, tmp_path: Path
) -> None:
    backwards = copy.copy(task)
    backwards.classes = task.classes[::-1]
    folder = tmp_path / "other"
    shutil.copytree(task.clip.folder, folder)
    weights = {name: tensor.clone() for name, tensor in fb.Checkpoint.open(folder).items()}
    weights["logit_scale"] += 1
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(weights, folder / "model.safetensors")
    other = copy.copy(task)
    other.clip = Clip(folder)
    assert len({json.dumps(one.describe()) for one in (task, backwards, other)}) == 3


def test_logits_are_those_of_the_whole_clip_model(task: ZeroShotClassification, pool: fb.ModelPool) -> None:
    clip = CLIPModel.from_pretrained(task.clip.folder).eval()
    pixels, _ = next(task.batches("test", 4))
    features = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    expected = clip.logit_scale.exp() * nn.functional.normalize(features, dim=-1) @ task.head.T
    torch.testing.assert_close(task.predict(pool.build(pool.require_base()), pixels), expected)


def test_preprocessing_equals_transformers(zoo: Path) -> None:
    clip = Clip(zoo / "base")
    processor = CLIPImageProcessor.from_pretrained(zoo / "base")
    random = np.random.default_rng(0)
    for shape in ((3, 16, 16), (3, 16, 16, 3), (2, 24, 40, 3)):  # grey, colour, and to be resized and cropped
        images = random.integers(0, 255, shape).astype(np.uint8)
        expected = processor([Image.fromarray(image).convert("RGB") for image in images], return_tensors="pt")
        torch.testing.assert_close(clip.preprocess(images), expected["pixel_values"], rtol=1e-5, atol=1e-5)


def test_scores_by_hand(task: ZeroShotClassification) -> None:
    class Fixed(nn.Module):
        """A tower that sees every image as the first class."""

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            wanted = torch.linalg.pinv(task.clip.visual_projection) @ task.head[0]
            return wanted.expand(len(pixels), -1)

    scores = task.score(Fixed())
    _, labels = task.images.split("test")
    assert scores["accuracy"] == pytest.approx((labels == 0).mean())
    logits = task.clip.logit_scale * task.head[0] @ task.head.T
    expected = np.mean([-logits.log_softmax(0)[int(label)].item() for label in labels])
    assert scores["loss"] == pytest.approx(expected, rel=1e-4)


def test_scores_do_not_depend_on_batches_or_on_training_mode(task: ZeroShotClassification, pool: fb.ModelPool) -> None:
    """Pitfall B14: a model that was left in training mode is scored without dropout."""
    model = pool.build("colours")
    model = nn.Sequential(nn.Dropout(0.9), _Pooled(model)).train()
    scores = task.score(model)
    task.batch_size = 7
    assert task.score(model.train())["loss"] == pytest.approx(scores["loss"], rel=1e-5)


class _Pooled(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tower(pixels).pooler_output


def test_batches_are_shuffled_by_seed_and_splits_are_apart(task: ZeroShotClassification) -> None:
    def labels(**options: object) -> list[int]:
        return [int(i) for _, batch in task.batches("test", 8, **options) for i in batch]  # type: ignore[arg-type]

    assert labels(seed=1) == labels(seed=1) != labels(seed=2)
    assert sorted(labels(seed=1)) == sorted(labels())
    assert sum(len(batch) for _, batch in task.batches("calibration", 5)) == 12
    with pytest.raises(fb.InputError, match=r"Did you mean 'test'\?"):
        next(task.batches("tset", 8))


def test_the_report_has_the_papers_shape(zoo: Path, pool: fb.ModelPool) -> None:
    tasks = build_taskpool(_tasks_yaml(zoo), relative_to=zoo)
    report = tasks.evaluate(pool.build(fb.methods.simple_average(pool)))
    assert list(report) == ["model_info", "colours", "greys", "average"]
    assert set(report["model_info"]) == {"trainable_params", "all_params", "trainable_percentage"}
    for score in ("accuracy", "loss"):
        assert report["average"][score] == pytest.approx((report["colours"][score] + report["greys"][score]) / 2)
    assert tasks.headline(report)["average"] == report["average"]["accuracy"]
    json.dumps(report)


def test_an_ensemble_and_individual_models_are_evaluated_too(zoo: Path, pool: fb.ModelPool) -> None:
    from fusionbench.runner import evaluate

    tasks = build_taskpool(_tasks_yaml(zoo), relative_to=zoo)
    both = evaluate(fb.methods.simple_ensemble(pool), pool, tasks)
    assert both["model_info"]["all_params"] == 2 * tasks.evaluate(pool.build("greys"))["model_info"]["all_params"]
    each = evaluate(fb.methods.individual(pool), pool, tasks)
    assert each["greys"] == tasks["greys"].score(pool.build("greys"))
    assert each["colours"] == tasks["colours"].score(pool.build("colours"))


def _tasks_yaml(zoo: Path) -> dict[str, object]:
    entries = {name: {"data": f"tasks/{name}.npz"} for name in ("colours", "greys")}
    return {"kind": "zero_shot_classification", "clip": "base", "tasks": entries}


def test_images_come_from_a_local_folder_through_datasets(zoo: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = random.integers(0, 255, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    data = {"dataset": str(tmp_path), "splits": {"test": "test", "calibration": "train"}}
    entry = {"data": data, "classes": ["red", "blue"], "templates": ["a {}"]}
    other = {**entry, "data": {**data, "label": "fine_label"}}
    pets = build(clip=str(zoo / "base"), tasks={"pets": entry})["pets"]
    (pixels, labels), *rest = pets.batches("test", 8)
    assert pixels.shape == (6, 3, 16, 16) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1] and not rest
    before = pets.describe()
    assert before == pets.describe() != build(clip=str(zoo / "base"), tasks={"pets": other})["pets"].describe()
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "test" / "cat" / "0.png")
    assert before != pets.describe()  # what was kept of the old pictures is not of these
    with pytest.raises(fb.InputError, match=r"has no column 'lable'"):
        wrong = {**entry, "data": {**data, "label": "lable"}}
        next(build(clip=str(zoo / "base"), tasks={"pets": wrong})["pets"].batches("test", 8))
    with pytest.raises(fb.InputError, match="cannot be loaded"):
        missing = {**entry, "data": {**data, "dataset": str(tmp_path / "nowhere")}}
        next(build(clip=str(zoo / "base"), tasks={"pets": missing})["pets"].batches("test", 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "tasks/colors.npz"}, r"Did you mean 'colours.npz'\?"),
        ({"date": "x"}, r"Task 'colours' takes no 'date'. Did you mean 'data'\?"),
        ({"templates": ["a photo"]}, "has no place for the class name"),
        ({"classes": ["red"]}, "Labels run from 0 to 2, but 1 classes are named"),
        ({"data": {"path": "x"}}, "data takes no 'path'"),
        ({"data": {"splits": {}}}, "has no 'dataset'"),
        ({"data": "base/config.json"}, "cannot be read as images"),
    ],
)
def test_mistakes_in_a_task_are_one_line(
    zoo: Path, pool: fb.ModelPool, change: dict[str, object], message: str
) -> None:
    entry = {"data": "tasks/colours.npz", **change}
    if change.get("data") == "base/config.json":
        entry.update(classes=CLASSES, templates=["a {}"])
    with pytest.raises(fb.InputError, match=message):
        tasks = build(clip="base", tasks={"colours": entry}, relative_to=zoo)
        tasks["colours"].score(pool.build("colours"))


def test_models_saved_in_half_precision_run_in_float32(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "single")
    write_clip(tmp_path / "half")  # for its tokenizer
    for config in (clip.config.text_config, clip.config.vision_config):
        config.dtype = torch.float16
    clip.half().save_pretrained(tmp_path / "half")
    single, half = Clip(tmp_path / "single"), Clip(tmp_path / "half")
    assert half.head(CLASSES, ["a {}"]).dtype == torch.float32
    torch.testing.assert_close(half.head(CLASSES, ["a {}"]), single.head(CLASSES, ["a {}"]), rtol=0, atol=5e-3)
    pool = fb.ModelPool({"half": tmp_path / "half"}, architecture=clip_vision)
    exact = pool["half"]["vision_model.post_layernorm.weight"].double() + 2**-14  # float16 cannot hold it
    merged = fb.Checkpoint.of({**pool["half"], "vision_model.post_layernorm.weight": exact.float()})
    merged.folder = pool["half"].folder
    assert pool.build(merged).state_dict()["post_layernorm.weight"].equal(exact.float())


def test_a_pool_of_two_architectures_is_refused(zoo: Path, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "other")
    other.config.vision_config.intermediate_size = 48
    write_wide = CLIPVisionModel(other.config.vision_config)
    write_wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(fb.InputError, match=r"Model 'wide': 'vision_model.encoder.* but .* in the base model"):
        fb.ModelPool({"wide": tmp_path / "wide"}, base=zoo / "base", architecture=clip_vision)


def test_writing_a_tiny_zoo_again_gives_the_same_models(zoo: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "base")
    write_fine_tune(tmp_path / "greys", clip, 2)
    write_task(tmp_path / "greys.npz", 2, grey=True)
    assert fb.Checkpoint.open(tmp_path / "greys").digest == fb.Checkpoint.open(zoo / "greys").digest


def test_few_calibration_examples_are_of_several_classes(tmp_path: Path) -> None:
    """Pitfall B6: of data in the order of its classes, the first examples are all of one."""
    write_zoo(tmp_path)
    file = tmp_path / "tasks" / "colours.npz"
    arrays = dict(np.load(file))
    arrays["calibration_labels"] = np.sort(arrays["calibration_labels"])
    np.savez_compressed(file, **arrays)
    tasks = fb.load_taskpool(str(tmp_path / "tasks.yaml")).calibrated_on("calibration:5")
    labels = [label for _, batch in tasks.calibration_batches("colours", 2) for label in batch.tolist()]
    assert len(labels) == 5 and len(set(labels)) > 1
    assert len(set(arrays["calibration_labels"][:3].tolist())) == 1
