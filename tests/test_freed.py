"""Nothing keeps a pool, its models or what came of them alive once nobody asks for them: pitfall C15."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tasks, small_model
from tiny_clip import write_zoo

import fusionbench as fb
from fusionbench.config import load_modelpool, load_taskpool

METHODS = ["task_arithmetic", "ties_merging", "regmean", "smile_upscaling", "adamerging", "simple_ensemble"]


def kept(references: list[weakref.ref]) -> list[str]:
    gc.collect()
    return [type(reference()).__name__ for reference in references if reference() is not None]


def evaluated(method: str, pool: fb.ModelPool, tasks: fb.TaskPool, *more: Any) -> list[weakref.ref]:
    """Run the method and evaluate it; then all is seen by weak references only."""
    options = {"steps": 1} if "steps" in fb.get_method(method).hyperparameters else {}
    result = fb.algorithm(method, **options).run(pool, tasks)
    model = pool.build(result) if isinstance(result, fb.Checkpoint) else result
    assert tasks.evaluate(model)["average"]["accuracy"] >= 0
    parts = [pool, tasks, result, model, *pool.values(), *tasks.values(), *model.modules(), *more]
    return [weakref.ref(part) for part in parts]


@pytest.mark.parametrize("method", METHODS)
def test_modules_in_memory_are_freed(method: str) -> None:
    def run() -> list[weakref.ref]:
        models = {name: small_model(i) for i, name in enumerate(("base", "a", "b"))}
        pool = fb.ModelPool({name: models[name] for name in "ab"}, base=models["base"])
        return evaluated(method, pool, random_tasks(pool), *models.values())

    assert kept(run()) == []


@pytest.mark.parametrize("method", METHODS)
def test_models_in_files_and_their_tasks_are_freed(method: str, tmp_path: Path) -> None:
    write_zoo(tmp_path)

    def run() -> list[weakref.ref]:
        pool = load_modelpool(str(tmp_path / "pool.yaml"))
        return evaluated(method, pool, load_taskpool(str(tmp_path / "tasks.yaml")))

    assert kept(run()) == []
