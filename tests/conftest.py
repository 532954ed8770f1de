"""Small pools and models that tests share. Everything is seeded, and nothing is downloaded."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fusionbench as fb
from fusionbench.registry import Method, registered

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Small(nn.ModuleDict):
    """Tokens, `(batch,)`, to logits, `(batch, 11)`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self["head"](self["hidden"](self["norm"](self["embed"](tokens))))


def small_model(seed: int, *, width: int = 6) -> nn.Module:
    """Linear layers, a batch norm with its integer buffer, and an embedding tied to the output layer."""
    torch.manual_seed(seed)
    model = Small(
        {
            "embed": nn.Embedding(11, width),
            "norm": nn.BatchNorm1d(width),
            "hidden": nn.Linear(width, width),
            "column": nn.Linear(1, width, bias=False),
            "head": nn.Linear(width, 11, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    model["norm"].num_batches_tracked.fill_(seed)
    model["norm"].running_var.uniform_(0.5, 2.0)
    model.register_buffer("scalar", torch.randn(()))
    model.register_buffer("nothing", torch.empty(0, 3))
    model.register_buffer("mask", torch.rand(4) > 0.5)
    return model


@pytest.fixture
def base() -> nn.Module:
    return small_model(0)


@pytest.fixture
def pool(base: nn.Module) -> fb.ModelPool:
    return fb.ModelPool({name: small_model(seed) for seed, name in enumerate("abc", 1)}, base=base)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FUSIONBENCH_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def plugins() -> Iterator[None]:
    """Methods of one's own are those of one test: several have plugins of one name."""
    yield
    for name in [name for name, found in registered().items() if found.function.__module__.startswith(PLUGIN)]:
        sys.modules.pop(registered().pop(name).function.__module__, None)


PLUGIN = "fusionbench_plugin_"
EXAMPLES = 120


@pytest.fixture
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of the zoo have 120 examples in each split, evenly spread, in place of some 600."""
    from fusionbench.tasks._data import LinesFile
    from fusionbench.tasks.zero_shot_classification import ArrayFile

    def spread(examples: Any) -> Any:
        chosen = [i * len(examples) // EXAMPLES for i in range(EXAMPLES)]
        return examples[chosen] if isinstance(examples, np.ndarray) else [examples[i] for i in chosen]

    rows, split = LinesFile.rows, ArrayFile.split
    monkeypatch.setattr(LinesFile, "rows", lambda *words: spread(rows(*words)))
    monkeypatch.setattr(ArrayFile, "split", lambda *words: tuple(map(spread, split(*words))))


# Methods that take just so many models, or at least so many.
MODELS = {"slerp": 2, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}
LEAST = {**MODELS, "model_stock": 2}


def fitting(method: Method, pool: fb.ModelPool) -> fb.ModelPool:
    """The pool, or its last models where the method takes fewer."""
    names = list(pool)[-MODELS.get(method.name, len(pool)) :]
    return pool if len(names) == len(pool) else pool.of({name: pool[name] for name in names}, pool.base)


def quick(method: Method) -> dict[str, int]:
    """Hyperparameters with which a method that learns takes a few steps only."""
    return {name: 3 for name in ("steps", "mask_steps") if name in method.hyperparameters}


class Random:
    """A task on random inputs of a model's size: tokens for what begins with an embedding, else numbers."""

    primary = "accuracy"

    def __init__(self, name: str, reference: fb.Checkpoint, count: int = 24) -> None:
        torch.manual_seed(sum(map(ord, name)))
        sizes = [tensor.shape for name, tensor in reference.items() if name.endswith("weight")]
        tokens = "embed.weight" in reference
        self.inputs = torch.randint(11, (count,)) if tokens else torch.randn(count, sizes[0][1])
        self.labels = torch.randint(2, (count,))

    def batches(self, split: str, size: int, *, seed: int | None = None):
        yield from zip(self.inputs.split(size), self.labels.split(size), strict=True)

    def predict(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs)

    def score(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        with torch.no_grad():
            return {"accuracy": float((self.predict(model, self.inputs).argmax(-1) == self.labels).float().mean())}

    def describe(self) -> dict[str, object]:
        return {"kind": "random", "count": len(self.inputs)}


def random_tasks(pool: fb.ModelPool, count: int = 24) -> fb.TaskPool:
    """A task for each of a pool's models."""
    return fb.TaskPool({name: Random(name, pool.reference, count) for name in pool})


def tensors_of(*rows: list[float]) -> list[dict[str, torch.Tensor]]:
    """State dicts with one parameter 'w' each."""
    return [{"w": torch.tensor(row, dtype=torch.float32)} for row in rows]


def pool_of(base: list[float], *models: list[float]) -> fb.ModelPool:
    """A pool of models with one parameter 'w' each."""
    first, *others = tensors_of(base, *models)
    return fb.ModelPool({f"m{i}": model for i, model in enumerate(others)}, base=first)


SHAPES = {"matrix": (40, 30), "vector": (17,), "kernel": (5, 4, 3, 3), "column": (6, 1), "scalar": (), "none": (0, 3)}


def random_pool(
    count: int, dtype: torch.dtype = torch.float64, *, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0
) -> fb.ModelPool:
    """Models whose tensors of these shapes are not far from their base's; of no two models equally far."""
    torch.manual_seed(seed)
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    models = {
        f"m{i}": {n: (t + 0.3 * (i + 1) * torch.randn(t.shape, dtype=torch.float64)).to(dtype) for n, t in base.items()}
        for i in range(count)
    }
    return fb.ModelPool(models, base={name: tensor.to(dtype) for name, tensor in base.items()})


def is_each(merged: fb.Checkpoint, pool: fb.ModelPool, formula: Callable[..., np.ndarray]) -> None:
    """Check that every tensor is `formula(base, models)`, of `(*shape)` and `(models, *shape)` in float64, rounded."""
    for name, base in pool.require_base().items():
        if not base.numel():
            assert merged[name].equal(base)
            continue
        expected = formula(base.double().numpy(), np.stack([model[name].double().numpy() for model in pool.values()]))
        eps = 1e-12 if base.dtype == torch.float64 else torch.finfo(base.dtype).eps
        expected = torch.from_numpy(np.asarray(expected)).to(base.dtype)
        assert merged[name].dtype == base.dtype
        torch.testing.assert_close(merged[name], expected, rtol=eps, atol=eps, msg=lambda text, n=name: f"{n}: {text}")
