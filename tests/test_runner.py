"""What the report of one run says of its cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import write_zoo
from tiny_text import write_gpt2_zoo
from torch import nn

import fusionbench as fb
from fusionbench import cost
from fusionbench.cli import main

SLOW = """
import time
from fusionbench import Checkpoint, ModelPool, method, ops


@method("merging")
def slow_mean(pool: ModelPool) -> Checkpoint:
    def merge(p):
        time.sleep(0.01)
        with open("merged.txt", "a") as file:
            print(p.name, file=file)
        return ops.mean(p.models)

    return pool.map(merge)
"""


@pytest.mark.parametrize("out", [[], ["out=merged"]])
def test_a_merge_is_computed_once_and_in_the_time_of_the_fusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_zoo(tmp_path)
    Path("slow.py").write_text(SLOW)
    words = ["run", "plugins=[slow]", "method=slow_mean", "modelpool=pool.yaml", "taskpool=tasks.yaml", "workers=1"]
    assert main([*words, *out, "reference=null", "report=report.json"]) == 0
    merged = Path("merged.txt").read_text().split()
    assert len(merged) == len(set(merged)) > 20
    assert json.loads(Path("report.json").read_text())["run"]["seconds"]["fusion"] > 0.01 * len(merged)


def test_tasks_of_other_models_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (write_zoo, write_gpt2_zoo):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
    Path("slow.py").write_text(SLOW)
    words = ["run", "plugins=[slow]", "method=slow_mean", "modelpool=write_zoo/pool.yaml", "out=merged"]
    assert main([*words, "taskpool=write_gpt2_zoo/tasks.yaml", "reference=null"]) == 2
    assert "The tasks are of models that take input_ids, but a CLIP" in capsys.readouterr().err
    assert not Path("merged").exists() and not Path("merged.txt").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the peak of a process")
def test_a_report_has_the_peak_memory_of_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_zoo(tmp_path)
    large = bytearray(300_000_000)
    high = cost.peak_memory_mb()
    del large
    assert main(["run", "method=simple_average", "modelpool=pool.yaml", "out=merged", "report=report.json"]) == 0
    assert json.loads(Path("report.json").read_text())["run"]["peak_memory_mb"] < high - 200


def test_a_prediction_is_timed_on_texts_of_all_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gpt2_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(f"{tmp_path}/pool.yaml"), fb.load_taskpool(f"{tmp_path}/tasks.yaml")
    task: Any = tasks["pairs"]
    predict, seen = task.predict, []
    monkeypatch.setattr(cost, "SAMPLES", 5)
    monkeypatch.setattr(task, "predict", lambda model, inputs: seen.append(inputs) or predict(model, inputs))
    model = pool.build("pairs")
    cost.inference_seconds(model, model, tasks.only(["pairs"]), "cpu")
    assert len({int(mask.sum()) for mask in seen[0]["attention_mask"]}) == 2


def test_parameters_that_are_more_are_no_buffers() -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    pool = fb.ModelPool({name: network(i) for i, name in enumerate("abc", 1)}, base=network(0))
    for method, more in (("individual", 2), ("simple_ensemble", 2), ("simple_average", 0)):
        assert cost.added_parameters(fb.algorithm(method).run(pool), pool) == more * 63
