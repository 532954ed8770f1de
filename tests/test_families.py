"""Every registered method on a small pool of every family: no method knows what a modality is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import test_scenes
import tiny_clip
import tiny_text

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


@pytest.mark.parametrize("method", fb.list_methods(), ids=lambda m: m.name)
def test_every_method_is_scored_on_every_family(method: Method, family: Path, tmp_path: Path) -> None:
    pool, tasks = fb.load_modelpool(str(family / "pool.yaml")), fb.load_taskpool(str(family / "tasks.yaml"))
    result = fb.algorithm(method.name).run(pool)
    report = runner.evaluate(result, pool, tasks)
    assert set(tasks.headline(report)) == {*tasks, "average"}
    if isinstance(result, fb.Checkpoint):
        fb.save(result, tmp_path / "merged")
        assert fb.Checkpoint.open(tmp_path / "merged").digest == result.digest
