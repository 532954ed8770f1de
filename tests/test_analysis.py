"""Analyses, by numbers that one can check by hand."""

from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
from torch import nn

import fusionbench as fb
from fusionbench import cli
from fusionbench.analysis import effective_rank, layers
from fusionbench.layers import layer_name
from fusionbench.probing import barrier, interference, interpolation, landscape
from fusionbench.task import TaskPool


class Chain(nn.Module):
    """Two linear layers without biases, in a list."""

    def __init__(self, checkpoint: fb.Checkpoint) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        self.load_state_dict(dict(checkpoint))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Chains:
    @staticmethod
    def backbone(checkpoint: fb.Checkpoint) -> fb.Checkpoint:
        return checkpoint

    @staticmethod
    def build(checkpoint: fb.Checkpoint) -> nn.Module:
        return Chain(checkpoint)


class Sum:
    """The loss is the squared distance of the sum of the output for (1, 0) to a target."""

    primary = "score"

    def __init__(self, target: float) -> None:
        self.target = target

    def batches(self, split, size, *, seed=None):
        yield torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.long)

    def predict(self, model, inputs):
        return model(inputs)

    @torch.no_grad()
    def score(self, model, split="test"):
        found = float(self.predict(model, torch.tensor([[1.0, 0.0]])).sum())
        return {"score": -((found - self.target) ** 2), "loss": (found - self.target) ** 2}

    def describe(self):
        return {}


def model(first: float, second: float) -> dict[str, torch.Tensor]:
    return {"layers.0.weight": first * torch.eye(2), "layers.1.weight": second * torch.eye(2)}


@pytest.fixture
def pool() -> fb.ModelPool:
    models = {"a": model(2, 1), "b": model(1, 3)}
    return fb.ModelPool(models, base=model(1, 1), architecture=Chains)  # type: ignore[arg-type]


def test_layers(pool: fb.ModelPool) -> None:
    first, second = layers(pool)
    assert (first.name, second.name) == ("layers.0", "layers.1")
    assert first.magnitudes == [1.0, 0.0] and second.magnitudes == [0.0, 2.0]
    assert first.ranks == [pytest.approx(2.0), 0.0]
    assert first.agreement == 1.0  # where one alone has changed, it agrees


def test_signs_that_cancel_do_not_agree() -> None:
    base = {"w": torch.zeros(4)}
    tuned = {"a": {"w": torch.tensor([1.0, 1.0, -1.0, 0.0])}, "b": {"w": torch.tensor([1.0, -2.0, 0.0, 0.0])}}
    assert layers(fb.ModelPool(tuned, base=base))[0].agreement == pytest.approx((1 + 0 + 1) / 3)


def test_the_effective_rank_counts_equal_singular_values() -> None:
    assert effective_rank(np.diag([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.ones((5, 3))) == pytest.approx(1.0, abs=1e-5)
    assert effective_rank(np.zeros((5, 3))) == 0.0


def test_layers_are_found_by_name() -> None:
    assert layer_name("vision_model.encoder.layers.11.mlp.fc1.weight") == "vision_model.encoder.layers.11"
    assert layer_name("h.3.attn.c_attn.bias") == "h.3"
    assert layer_name("wte.weight") == "wte"
    assert layer_name("lm_head") == "lm_head"


def test_between_models(pool: fb.ModelPool) -> None:
    tasks = TaskPool({"a": Sum(2.0)})
    found = interpolation(pool, tasks, ("a", "b"), [0.0, 0.5, 1.0])
    # (1 - t) * (2, 1) + t * (1, 3): the product is 2, 1.5 * 2, and 3.
    assert [scores["loss"] for scores in found] == [0.0, pytest.approx(1.0), 1.0]
    assert [scores["loss"] for scores in interpolation(pool, tasks, ("base", "a"), [0.0, 1.0])] == [1.0, 0.0]
    with pytest.raises(fb.InputError, match="name two models"):
        interpolation(pool, tasks, ("a", "a"), [0.0, 1.0])


def test_the_plane_of_two_task_vectors(pool: fb.ModelPool) -> None:
    found = landscape(pool, TaskPool({"a": Sum(0.0)}), ("a", "b"), [0.0, 1.0], [0.0, 1.0])
    # The base is 1 * 1, a is 2 * 1, b is 1 * 3, and both task vectors together are 2 * 3.
    assert [[scores["loss"] for scores in row] for row in found] == [[1.0, 4.0], [9.0, 36.0]]


def test_a_barrier_is_above_the_line() -> None:
    assert barrier([1.0, 4.0, 3.0], [0.0, 0.5, 1.0]) == 2.0
    assert barrier([1.0, 0.0, 3.0], [0.0, 0.5, 1.0]) == 0.0


def test_features_that_move(pool: fb.ModelPool) -> None:
    tasks = TaskPool({"a": Sum(0.0), "b": Sum(0.0)})
    found = interference(pool["a"], pool, tasks)
    assert found["a"] == {"layers.0": 0.0, "layers.1": 0.0}
    assert found["b"] == {"layers.0": 1.0, "layers.1": pytest.approx(1 / 3)}  # 2 against 1, then 2 against 3


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_what_fills_a_batch_up_is_no_feature(family: str, tmp_path: Path) -> None:
    getattr(tiny_text, f"write_{family}_zoo")(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    merged = fb.methods.simple_average(pool)
    together = interference(merged, pool, tasks, samples=5)

    class Alone(TaskPool):
        def calibration_batches(self, name, size, *, seed=0):
            return super().calibration_batches(name, 1, seed=seed)

        def calibrated_on(self, calibration):
            return Alone(tasks, calibration=calibration)

    alone = interference(merged, pool, Alone(tasks), samples=5)
    assert together.keys() == alone.keys()
    for name, layers_of in together.items():
        assert layers_of == pytest.approx(alone[name], rel=1e-4) and max(layers_of.values()) > 0


def test_so_many_examples_are_looked_at_as_were_asked_for(pool: fb.ModelPool) -> None:
    class Ten(Sum):
        seen = 0

        def batches(self, split, size, *, seed=None):
            for _ in range(0, 40, size):
                yield torch.ones(size, 2), torch.zeros(size, dtype=torch.long)

        def predict(self, model, inputs):
            self.seen += len(inputs)
            return model(inputs)

    task = Ten(0.0)
    interference(pool["a"], pool, TaskPool({"a": task}), samples=10)
    assert task.seen == 2 * 10  # by two models


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("analyze layer modelpool=clip-mini", "Did you mean 'layers'?"),
        ("analyze layers modelpol=clip-mini", "Did you mean 'modelpool'?"),
        ("analyze layers", "No modelpool is given"),
        ("analyze layers modelpool=clip-mini out=a.txt", "no picture"),
        ("analyze interpolation modelpool=clip-mini taskpool=clip-mini models=mnist", "Name two models"),
        ("analyze interpolation modelpool=clip-mini taskpool=clip-mini models=mnist,leters", "Did you mean 'letters'"),
        ("analyze interpolation modelpool=clip-mini taskpool=clip-mini models=mnist,emoji points=1", "2 or more"),
        (
            "analyze landscape modelpool=clip-mini taskpool=clip-mini models=mnist,emoji split=tst",
            "Did you mean 'test'",
        ),
        ("analyze interference modelpool=clip-mini taskpool=clip-mini", "No method is given"),
        (
            "analyze interference modelpool=clip-mini taskpool=clip-mini method=simple_average points=3",
            "not understood",
        ),
    ],
)
def test_what_is_wrong_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "layers", "modelpool=clip-mini", f"out={tmp_path / 'layers.png'}"]) == 0
    assert "\n  encoder.layers.5 " in capsys.readouterr().out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
