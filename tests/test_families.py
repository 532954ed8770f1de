"""Every registered method on a small pool of every family: no method knows what a modality is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import test_scenes
import tiny_clip
import tiny_text
import transformers
from conftest import fitting, quick

import fusionbench as fb
from fusionbench import runner
from fusionbench.registry import Method

FAMILIES: dict[str, Callable[[Path], None]] = {
    "clip": tiny_clip.write_zoo,
    "bert": tiny_text.write_bert_zoo,
    "gpt2": tiny_text.write_gpt2_zoo,
    "t5": tiny_text.write_t5_zoo,
    "resnet": test_scenes.write_zoo,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    return folder


METHODS = [m for m in fb.list_methods() if not any(h.required for h in m.hyperparameters.values())]
OF_LANGUAGE_MODELS = ("moe_upscaling", "moe_merging")  # and none of these families is one
IN_TRANSFORMERS = ("smile_upscaling", "we_moe")  # of which a ResNet has no layer
CLASSIFIES = ("fisher_merging", "adamerging", "concrete_task_arithmetic", "concrete_adamerging")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_is_scored_on_every_family(method: Method, family: Path, tmp_path: Path) -> None:
    pool, tasks = fb.load_modelpool(str(family / "pool.yaml")), fb.load_taskpool(str(family / "tasks.yaml"))
    pool = fitting(method, pool)
    options = quick(method)
    algorithm = fb.algorithm(method.name, **options)
    if method.name in CLASSIFIES and "depth" in tasks:
        with pytest.raises(fb.InputError, match="predict"):
            algorithm.run(pool, tasks)
        return
    if method.name in OF_LANGUAGE_MODELS:
        with pytest.raises(fb.InputError, match="no sparse class"):
            algorithm.run(pool, tasks)
        return
    if method.name in IN_TRANSFORMERS and "depth" in tasks:
        with pytest.raises(fb.InputError, match="in no linear layer|no block with linear layers"):
            algorithm.run(pool, tasks)
        return
    result = algorithm.run(pool, tasks)
    report = runner.evaluate(result, pool, tasks)
    assert set(tasks.headline(report)) == {*tasks, "average"}
    if isinstance(result, fb.Checkpoint):
        fb.save(result, tmp_path / "merged")
        assert fb.Checkpoint.open(tmp_path / "merged").digest == result.digest


ZOO = ("clip-mini", "gpt2-mini", "t5-mini", "t5-mini-lora", "resnet-mini")
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}  # which no class of transformers for BERT goes without


@pytest.mark.parametrize("base", [True, False], ids=["base", "models alone"])
def test_a_merged_model_is_all_that_its_config_says(family: Path, tmp_path: Path, base: bool) -> None:
    is_all_that_its_config_says(fb.load_modelpool(str(family / "pool.yaml")), base, tmp_path)


@pytest.mark.parametrize("base", [True, False], ids=["base", "models alone"])
@pytest.mark.parametrize("name", ZOO)
def test_a_merged_model_of_the_zoo_is_all_that_its_config_says(name: str, tmp_path: Path, base: bool) -> None:
    is_all_that_its_config_says(fb.load_modelpool(name), base, tmp_path)


def is_all_that_its_config_says(pool: fb.ModelPool, base: bool, folder: Path) -> None:
    pool = pool.of(dict(list(pool.items())[:2]), pool.base if base else None)
    for name, result in {"merged": fb.methods.simple_average(pool), "loaded": next(iter(pool.load().values()))}.items():
        fb.save(result, folder / name)
        config = fb.Checkpoint.open(folder / name).config
        if "architectures" in config:
            loaded = getattr(transformers, config["architectures"][0]).from_pretrained
            _, told = loaded(folder / name, output_loading_info=True)
            assert not told["missing_keys"] - POOLER and not told["unexpected_keys"] and not told["mismatched_keys"]
        else:
            pool.build(fb.Checkpoint.open(folder / name))
