import json
from pathlib import Path

import pytest
import torch
from conftest import Random, random_tasks
from torch import nn

import fusionbench as fb
from fusionbench.calibrate import fisher_diagonal


def softmax_regression(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


@pytest.fixture
def pool() -> fb.ModelPool:
    return fb.ModelPool({name: softmax_regression(i) for i, name in enumerate("ab", 1)}, base=softmax_regression(0))


def exact(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of softmax regression the Fisher information of `W[c, k]` is the mean of `p_c (1 - p_c) x_k^2`."""
    p = model(x).softmax(-1).detach()
    return {"weight": (p * (1 - p)).T @ x.square() / len(x), "bias": (p * (1 - p)).mean(0)}


@pytest.mark.parametrize("size", [1, 7, 24])
def test_it_is_exact_for_softmax_regression_at_any_batch_size(pool: fb.ModelPool, size: int) -> None:
    task, model = Random("a", pool.reference), pool.build("a")
    found = fisher_diagonal(model, task, task.batches("calibration", size), labels="expected")
    for name, wanted in exact(model, task.inputs).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-8)


def test_sampled_labels_give_the_same_on_average(pool: fb.ModelPool) -> None:
    task, model = Random("a", pool.reference, count=4000), pool.build("a")
    found = fisher_diagonal(model, task, task.batches("calibration", 100), labels="sampled")
    for name, wanted in exact(model, task.inputs).items():
        assert torch.cosine_similarity(found[name].flatten(), wanted.flatten(), dim=0) > 0.999
        torch.testing.assert_close(found[name], wanted, rtol=0.2, atol=0)


def test_given_labels_are_those_of_the_data(pool: fb.ModelPool) -> None:
    task, model = Random("a", pool.reference, count=3), pool.build("a")
    found = fisher_diagonal(model, task, task.batches("calibration", 2), labels="given")
    errors = model(task.inputs).softmax(-1).detach() - nn.functional.one_hot(task.labels, 3)
    torch.testing.assert_close(found["bias"], errors.square().mean(0))


def test_the_merge_by_hand() -> None:
    """One weight, x = 1: p = 1/2 has information 1/4, p = sigmoid(2) has 0.105; the average leans to the first."""
    models = {}
    for name, w in (("even", 0.0), ("sure", 2.0)):
        models[name] = nn.Linear(1, 2, bias=False)
        models[name].weight.data = torch.tensor([[w], [0.0]])
    pool = fb.ModelPool(models, base=models["even"])
    tasks = random_tasks(pool)
    for task in tasks.values():
        task.inputs = torch.ones(24, 1)  # type: ignore[attr-defined]
    s = torch.tensor(2.0).sigmoid()
    a, b = 0.25, float(s * (1 - s))
    merged = fb.methods.fisher_merging(pool, tasks, labels="expected", normalize=False)["weight"]
    torch.testing.assert_close(merged, torch.tensor([[2 * b / (a + b)], [0.0]]), rtol=1e-4, atol=1e-6)
    merged = fb.methods.fisher_merging(pool, tasks, labels="expected")["weight"]  # one weight: only its scale is gone
    torch.testing.assert_close(merged, torch.tensor([[1.0], [0.0]]), rtol=1e-4, atol=1e-6)


def test_statistics_are_kept_and_read_again_and_those_of_others_refused(pool: fb.ModelPool, tmp_path: Path) -> None:
    kept, tasks = str(tmp_path / "fisher"), random_tasks(pool)
    first = dict(fb.methods.fisher_merging(pool, tasks, statistics=kept))
    recipe = json.loads((tmp_path / "fisher" / "a" / "recipe.json").read_text())
    assert recipe["statistic"]["data"] == tasks["a"].describe()
    file = tmp_path / "fisher" / "a" / "model.safetensors"
    before = file.stat().st_mtime_ns
    again = dict(fb.methods.fisher_merging(pool, tasks, statistics=kept))
    assert all(first[name].equal(again[name]) for name in first) and file.stat().st_mtime_ns == before
    with pytest.raises(fb.InputError, match="are of another labels"):
        fb.methods.fisher_merging(pool, tasks, labels="expected", statistics=kept)
    with pytest.raises(fb.InputError, match="are of another data"):
        fb.methods.fisher_merging(pool, random_tasks(pool, 30), statistics=kept)
    with pytest.raises(fb.InputError, match="are of another calibration"):
        fb.methods.fisher_merging(pool, tasks.calibrated_on("test:3"), statistics=kept)
    (tmp_path / "fisher" / "a" / "recipe.json").write_text("{")
    with pytest.raises(fb.InputError, match="holds no statistics"):
        fb.methods.fisher_merging(pool, tasks, statistics=kept)


def test_what_is_no_classification_is_refused(pool: fb.ModelPool) -> None:
    tasks = random_tasks(pool)
    for task in tasks.values():
        task.predict = lambda model, x: model(x)[..., None]  # type: ignore[method-assign]
    with pytest.raises(fb.InputError, match="needs tasks that classify"):
        fb.methods.fisher_merging(pool, tasks)


def test_frozen_and_unused_parameters_and_buffers(tmp_path) -> None:
    """A frozen one has its information as others do; what no prediction depends on, and buffers, are averaged."""

    def network(seed: int, frozen: bool = True) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        model.unused = nn.Parameter(torch.randn(2))
        model[1].running_mean.normal_()
        model[0].requires_grad_(not frozen)
        return model

    def merged(frozen: bool) -> fb.Checkpoint:
        pool = fb.ModelPool({name: network(i, frozen) for i, name in enumerate("ab", 1)}, base=network(0, frozen))
        return fb.methods.fisher_merging(pool, random_tasks(pool))

    found, free = merged(frozen=True), merged(frozen=False)
    for name in found:
        assert found[name].equal(free[name])
    models = [network(1), network(2)]
    for name in ("unused", "1.running_mean"):
        torch.testing.assert_close(found[name], (models[0].state_dict()[name] + models[1].state_dict()[name]) / 2)
    average = (models[0][0].weight + models[1][0].weight) / 2
    assert (found["0.weight"] - average).abs().max() > 0.01


@pytest.mark.parametrize("method", ["fisher_merging", "we_moe"])
def test_a_seed_of_torch_has_64_bits(method: str) -> None:
    assert fb.algorithm(method, seed=2**64 - 1).hyperparameters["seed"] == 2**64 - 1
    with pytest.raises(fb.InputError, match=f"{method}.seed must be in .*; got 18446744073709551616"):
        fb.algorithm(method, seed=2**64)
