"""The paper's models and tasks by name: consistent offline, and run on local folders laid out as the hub's cache."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pytest
import test_scenes
import tiny_clip
import tiny_text
from datasets import Dataset, Features, Image, Value
from transformers import GPT2ForSequenceClassification, GPT2Model, T5ForConditionalGeneration

import fusionbench as fb
from fusionbench import cli
from fusionbench.config import list_configs, read_config_file
from fusionbench.locations import locate

CLIP = ["clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14"]
POOLS = {  # task pool and number of fine-tuned models
    **dict.fromkeys(CLIP, (None, 8)),
    "clip-vit-base-patch16-lora": ("clip-vit-base-patch16", 8),
    "clip-vit-base-patch16-l-lora": ("clip-vit-base-patch16", 8),
    "gpt2": ("gpt2-glue", 7),
    "flan-t5-base": ("flan-t5-glue", 8),
    "flan-t5-base-lora": ("flan-t5-glue", 8),
    "flan-t5-large-lora": ("flan-t5-glue", 8),
    "resnet50-nyuv2": (None, 3),
}
CLASSES_AND_TEMPLATES = {
    "sun397": (397, 2),
    "stanford-cars": (196, 8),
    "resisc45": (45, 18),
    "eurosat": (10, 3),
    "svhn": (10, 1),
    "gtsrb": (43, 3),
    "mnist": (10, 1),
    "dtd": (47, 8),
}


def test_the_papers_models_are_there_by_name_each_once() -> None:
    ids = []
    for name, (_, count) in POOLS.items():
        pool, _ = read_config_file("modelpool", name)
        assert len(pool["models"]) == count and pool["base"] not in pool["models"].values()
        ids += pool["models"].values()
    assert len(set(ids)) == len(ids) == 74
    assert all(place.startswith(("hf:tanganke/", "nyuv2/")) for place in ids)


@pytest.mark.parametrize("name", POOLS)
def test_tasks_and_models_have_the_same_names(name: str) -> None:
    pool, _ = read_config_file("modelpool", name)
    tasks, _ = read_config_file("taskpool", POOLS[name][0] or name)
    assert list(tasks["tasks"]) == list(pool["models"])
    for task, model in pool["models"].items():
        assert task.removeprefix("glue-") in model


@pytest.mark.parametrize("name", list_configs("task"))
def test_a_task_says_all_that_its_kind_needs(name: str) -> None:
    task, _ = read_config_file("task", name)
    assert task["data"]["dataset"].count("/") == 1 and set(task["data"]["splits"]) == {"test", "calibration"}
    if name in CLASSES_AND_TEMPLATES:
        assert (len(task["classes"]), len(task["templates"])) == CLASSES_AND_TEMPLATES[name]
        assert len(set(task["classes"])) == len(task["classes"])
        assert all(template.count("{}") == 1 for template in task["templates"])
    else:
        assert "{" in task["prompt"] and isinstance(task["answers"], str | dict)
    assert {*CLASSES_AND_TEMPLATES} <= {*list_configs("task")}


def in_cache(cache: Path, place: str, write: Callable[[Path], Any]) -> None:
    """A model as the hub's client keeps it: a snapshot that `refs/main` names."""
    folder = cache / f"models--{place.removeprefix('hf:').replace('/', '--')}"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    write(folder / "snapshots" / "0")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, an empty cache of the hub, and a working folder whose sub-folders are the data sets."""
    import huggingface_hub.constants as constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("FUSIONBENCH_CACHE", str(tmp_path / "heads"))
    return tmp_path


def write_images(folder: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    features = Features({"image": Image(), "label": Value("int64")})
    for split in ("train", "test"):
        images = [random.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
        data = Dataset.from_dict({"image": images, "label": [0, 1, classes - 1, 2]}, features=features)
        folder.mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def write_glue(folder: Path, name: str, columns: list[str], splits: Iterable[str], labels: list[float]) -> None:
    """One configuration of GLUE, which the data set's card lists, as on the hub."""
    glue = folder / "nyu-mll" / "glue"
    (glue / name).mkdir(parents=True)
    rows = {column: ["good film", "is it bad ?"] for column in columns} | {"label": labels}
    for split in splits:
        Dataset.from_dict(rows).to_parquet(glue / name / f"{split}-0.parquet")
    files = "".join(f"\n  - {{split: {split}, path: {name}/{split}-*}}" for split in splits)
    card = glue / "README.md"
    before = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    card.write_text(f"{before}- config_name: {name}\n  data_files:{files}\n---\n")


def test_clip_by_name_runs_on_the_hubs_own_layout(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_clip.write_zoo(offline / "tiny")
    pool, _ = read_config_file("modelpool", "clip-vit-base-patch32")
    in_cache(offline / "hub", pool["base"], lambda at: _copy(offline / "tiny" / "base", at))
    names = [path.name for path in (offline / "tiny").iterdir() if (path / "config.json").exists()]
    tuned = [name for name in names if name != "base"]
    for i, place in enumerate(pool["models"].values()):
        in_cache(offline / "hub", place, lambda at, i=i: _copy(offline / "tiny" / tuned[i % len(tuned)], at))
    for name, (classes, _) in CLASSES_AND_TEMPLATES.items():
        data, _ = read_config_file("task", name)
        write_images(offline / data["data"]["dataset"] / data["data"].get("name", ""), classes)
    # A folder on disk has its configurations by name only where a card lists them, as the hub's data sets do.
    svhn = offline / "ufldl-stanford" / "svhn"
    card = "\n".join(f"  - {{split: {s}, path: cropped_digits/{s}-*}}" for s in ("train", "test"))
    (svhn / "README.md").write_text(f"---\nconfigs:\n- config_name: cropped_digits\n  data_files:\n{card}\n---\n")
    words = ["method=simple_average", "modelpool=clip-vit-base-patch32", "taskpool=clip-vit-base-patch32"]
    assert cli.main(["run", *words, "report=report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert set(CLASSES_AND_TEMPLATES) < set(report)
    capsys.readouterr()
    assert cli.main(["report", "report.json"]) == 0
    printed = capsys.readouterr().out
    assert "66.5" in printed and "Simple Averaging" in printed and "Ties" not in printed


def test_gpt2_by_name_runs_on_the_hubs_own_layout(offline: Path) -> None:
    tasks, _ = read_config_file("taskpool", "gpt2-glue")
    pool, _ = read_config_file("modelpool", "gpt2")
    config = tiny_text.gpt2_config()

    def write_base(at: Path) -> None:
        GPT2Model(config).save_pretrained(at)
        tiny_text.write_tokenizer(at)

    in_cache(offline / "hub", pool["base"], write_base)
    for name, place in pool["models"].items():
        task = tasks["tasks"][name]
        labels = tiny_text.gpt2_config(len(task["classes"]))
        in_cache(offline / "hub", place, lambda at, c=labels: GPT2ForSequenceClassification(c).save_pretrained(at))
        columns = [task["text"]] if isinstance(task["text"], str) else task["text"]
        write_glue(offline, name, columns, task["data"]["splits"].values(), [0, 1])
    assert cli.main(["run", "method=ties_merging", "modelpool=gpt2", "taskpool=gpt2-glue", "report=r.json"]) == 0
    assert 0 <= json.loads(Path("r.json").read_text())["average"]["accuracy"] <= 1


def test_flan_t5_adapters_by_name_run_on_the_hubs_own_layout(offline: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tasks, _ = read_config_file("taskpool", "flan-t5-glue")
    pool, _ = read_config_file("modelpool", "flan-t5-base-lora")
    tiny_text.write_t5_zoo(offline / "tiny")
    in_cache(offline / "hub", pool["base"], lambda at: _copy(offline / "tiny" / "base", at))
    for place in pool["models"].values():
        base = T5ForConditionalGeneration.from_pretrained(offline / "tiny" / "base")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"]))
        in_cache(offline / "hub", place, adapted.save_pretrained)
    for name in tasks["tasks"]:
        task, _ = read_config_file("task", name)
        columns = [field for _, field, _, _ in Formatter().parse(task["prompt"]) if field]
        labels = [2.04, 5.0] if "metric" in task else [0, 1]
        write_glue(offline, task["data"]["name"], columns, task["data"]["splits"].values(), labels)
    words = ["method=task_arithmetic", "modelpool=flan-t5-base-lora", "taskpool=flan-t5-glue", "report=r.json"]
    assert cli.main(["run", *words]) == 0
    report = json.loads(Path("r.json").read_text())
    assert set(report["glue-stsb"]) == {"spearman_rho", "unparsable"} and set(report["glue-cola"]) == {"accuracy"}


def test_nyuv2_by_name_runs_on_local_folders(offline: Path) -> None:
    test_scenes.write_zoo(offline / "nyuv2")
    (offline / "nyuv2" / "base").rename(offline / "nyuv2" / "resnet50")
    (offline / "nyuv2" / "scenes").rename(offline / "nyuv2" / "data")
    words = ["method=simple_average", "modelpool=resnet50-nyuv2", "taskpool=resnet50-nyuv2", "report=r.json"]
    assert cli.main(["run", *words]) == 0
    assert {"segmentation", "depth", "normals"} < set(json.loads(Path("r.json").read_text()))


@pytest.mark.parametrize(
    "there",
    [
        ["model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.bin"],
        ["adapter_model.safetensors", "adapter_model.bin"],
        ["weights.safetensors", "pytorch_model.bin"],
        ["pytorch_model-00001-of-00002.bin"],
    ],
)
def test_weights_are_fetched_once_of_formats_that_hold_the_same(
    there: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in (*there, "config.json", "original/params.json"):
            wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file, pattern) for pattern in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = locate("hf:owner/model")
    assert {path.name for path in folder.iterdir()} == {"config.json", there[0]}


@pytest.mark.parametrize("name", [n for n in (*POOLS, "mistral-7b") if n != "resnet50-nyuv2"])
def test_what_cannot_be_reached_is_one_line_that_says_what_to_do(
    name: str, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "method=simple_average", f"modelpool={name}"]) == 2
    error = capsys.readouterr().err.strip()
    base = read_config_file("modelpool", name)[0]["base"]
    assert "\n" not in error and base in error and "local folder" in error


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


# The reference implementation's own YAML.


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Their tree of configs in small, over local folders."""
    tiny_clip.write_zoo(tmp_path)
    group = tmp_path / "config" / "modelpool" / "CLIPVisionModelPool"
    models = tmp_path / "config" / "model" / "clip-vit"
    for folder in (group, models):
        folder.mkdir(parents=True)
    tuned = [p.name for p in tmp_path.iterdir() if (p / "config.json").exists() and p.name != "base"]
    (group / "_template.yaml").write_text(
        "_target_: fusion_bench.modelpool.CLIPVisionModelPool\n_recursive_: False\nmodels: ???\ntrain_datasets: null\n"
    )
    (models / "base.yaml").write_text(
        f"_pretrained_:\n  _target_: transformers.CLIPVisionModel.from_pretrained\n"
        f"  pretrained_model_name_or_path: {tmp_path}/base\n"
    )
    for name in tuned:
        (models / f"{name}.yaml").write_text(f"{name}: {tmp_path}/{name}\n")
    (models / "all.yaml").write_text("defaults:\n" + "".join(f"  - {name}\n" for name in ("base", *tuned)))
    (group / "all.yaml").write_text(
        "defaults:\n  - CLIPVisionModelPool@: _template\n  - /model/clip-vit@models: all\n"
        "  - /dataset/image_classification/train@train_datasets: the_eight_tasks\n"
    )
    (group / "written_out.yaml").write_text(
        f"_target_: fusion_bench.modelpool.CLIPVisionModelPool\nprocessor: x/y\nbase_model: {tmp_path}/base\nmodels:\n"
        "  _pretrained_:\n    _target_: transformers.CLIPVisionModel.from_pretrained\n"
        "    pretrained_model_name_or_path: ${...base_model}\n"
        + "".join(f"  {name}: {tmp_path}/{name}\n" for name in tuned)
        + "  _special_: nothing/of-interest\nplatform: hf\n"
    )
    (group / "old.yaml").write_text(
        f"type: huggingface_clip_vision\nmodels:\n  - name: _pretrained_\n    path: {tmp_path}/base\n"
        + "".join(f"  - name: {name}\n    path: {tmp_path}/{name}\n" for name in tuned)
    )
    return group


@pytest.mark.parametrize("shape", ["all", "written_out", "old"])
def test_their_pools_are_read_as_they_are(shape: str, theirs: Path, tmp_path: Path) -> None:
    pool = fb.load_modelpool(str(theirs / f"{shape}.yaml"))
    ours = fb.load_modelpool(str(tmp_path / "pool.yaml"))
    assert sorted(pool) == sorted(ours) and pool.base is not None
    assert pool.base.digest == ours.require_base().digest
    assert all(pool[name].digest == ours[name].digest for name in ours)
    out = tmp_path / f"merged-{shape}"
    assert cli.main(["run", "method=task_arithmetic", f"modelpool={theirs / shape}.yaml", f"out={out}"]) == 0


def test_ids_in_their_pools_are_the_hubs(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(
        "_target_: fusion_bench.modelpool.Seq2SeqLMPool\nbase_model: google/flan-t5-base\nmodels:\n"
        "  _pretrained_:\n    _target_: x\n    pretrained_model_name_or_path: ${...base_model}\n"
        "  glue-cola:\n    _target_: load_lora_model\n    base_model_path: ${...base_model}\n"
        "    peft_model_path: tanganke/flan-t5-base_glue-cola_lora-16\n"
    )
    assert read_config_file("modelpool", str(file))[0] == {
        "base": "hf:google/flan-t5-base",
        "models": {"glue-cola": "hf:tanganke/flan-t5-base_glue-cola_lora-16"},
        "architecture": "t5",
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("_target_: x\nmodels: {_pretrained_: a/b, one: {revision: main}}\n", "'one' names no hub id or folder"),
        ("_target_: x\nmodels: {_pretrained_: a/b, one: 3}\n", "'one' is 3"),
        ("_target_: x\nplatform: modelscope\nmodels: {_pretrained_: a/b}\n", "platform is modelscope"),
        ("_target_: x\nmodels: ???\n", "names no models"),
        ("defaults:\n- /model/none@models: all\n", "builds on 'model/none/all.yaml'"),
        ("defaults:\n- pool\n", "builds on itself"),
        ("defaults: 3\nmodels: {one: a/b}\n", "defaults must be a list of names"),
        ("defaults:\n- {}\n", "defaults must be a list of names"),
        ("defaults:\n- [a]\n", "defaults must be a list of names"),
        ("models: 5\n", "'models' must be a table of paths by name"),
        ("_target_: x\nmodels: 5\n", "models must be a table by name, or a list of names and paths"),
        ("_target_: x\nmodels: [1, 2]\n", "a model of a list needs a name and a path; got 1"),
        ("_target_: x\nmodels: [{path: a}]\n", "a model of a list needs a name and a path; got {'path': 'a'}"),
        ("_target_: x\nmodels: {_pretrained_: '${nope}'}\n", "Interpolation key 'nope' not found"),
    ],
)
def test_a_mistake_in_their_pools_is_one_line(
    content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pool.yaml").write_text(content)
    assert cli.main(["run", "method=simple_average", f"modelpool={tmp_path}/pool.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error
