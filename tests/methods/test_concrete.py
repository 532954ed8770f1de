import pytest
import torch
from conftest import random_tasks
from torch import nn
from torch.func import functional_call

import fusionbench as fb
from fusionbench import ops
from fusionbench.adapt import entropy


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def pool() -> fb.ModelPool:
    base = network(0)
    base[0].weight.requires_grad_(False)  # type: ignore[index]  (frozen parameters and buffers are no hindrance)
    return fb.ModelPool({name: network(i) for i, name in enumerate("abc", 1)}, base=base)


def test_masks_by_hand() -> None:
    even = ops.relaxed_mask(torch.zeros(2, 3), 0.5)
    assert even.equal(torch.ones(2, 3))
    leaning = ops.relaxed_mask(torch.tensor([0.0, 1e9]), 0.5)  # probabilities 1/2 and 1, over their mean
    torch.testing.assert_close(leaning, torch.tensor([0.5, 1.0]) / 0.75)
    assert ops.relaxed_mask(torch.zeros(1), 0.5, "any").equal(torch.ones(1))  # one element is always all there is


def test_sampled_masks_are_near_zero_and_one_at_a_low_temperature_and_keyed() -> None:
    for i in range(50):  # of one element, at a temperature at which its probability may underflow
        logit = torch.zeros(1, requires_grad=True)
        mask = ops.relaxed_mask(logit, 0.01, f"{i}")
        (1e6 * mask).backward()
        assert logit.grad is not None and (mask.isfinite() & logit.grad.isfinite()).all()
    sampled = ops.relaxed_mask(torch.zeros(10_000), 0.01, "a")
    kept = sampled > sampled.mean()
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(sampled[kept].std()) < 0.1 and float(sampled[~kept].mean()) < 0.05
    assert sampled.equal(ops.relaxed_mask(torch.zeros(10_000), 0.01, "a"))
    assert not sampled.equal(ops.relaxed_mask(torch.zeros(10_000), 0.01, "b"))


@pytest.mark.parametrize("method", ["concrete_task_arithmetic", "concrete_adamerging"])
def test_without_a_step_it_is_task_arithmetic(pool: fb.ModelPool, method: str) -> None:
    none = {"mask_steps": 0} if method == "concrete_adamerging" else {}
    merged = fb.algorithm(method, steps=0, scaling_factor=0.4, **none).run(pool, random_tasks(pool))
    wanted = fb.methods.task_arithmetic(pool, scaling_factor=0.4)
    for name, _ in network(0).named_parameters():
        torch.testing.assert_close(merged[name], wanted[name])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("concrete_task_arithmetic", {"steps": 150, "learning_rate": 0.1}),
        ("concrete_adamerging", {"mask_steps": 150, "steps": 0, "mask_learning_rate": 0.1, "base_learning_rate": 0.1}),
        ("concrete_adamerging", {"mask_steps": 5, "steps": 100, "learning_rate": 0.05, "by": "task"}),
    ],
)
def test_entropy_falls(pool: fb.ModelPool, method: str, options: dict) -> None:
    tasks = random_tasks(pool)

    def mean_entropy(checkpoint: fb.Checkpoint) -> float:
        model = pool.build(checkpoint)
        return sum(entropy(task.predict(model, task.inputs)).item() for task in tasks.values())  # type: ignore[attr-defined]

    before = mean_entropy(fb.methods.adamerging(pool, tasks, steps=0))
    assert mean_entropy(fb.algorithm(method, **options).run(pool, tasks)) < before - 0.03


def test_with_no_step_of_the_coefficients_the_mask_is_that_of_concrete_task_arithmetic(pool: fb.ModelPool) -> None:
    """It is tried where the coefficients begin."""
    tasks, common = random_tasks(pool), {"scaling_factor": 0.3, "batch_size": 8}
    a = fb.algorithm("concrete_task_arithmetic", steps=6, learning_rate=0.1, **common).run(pool, tasks)
    b = fb.algorithm(
        "concrete_adamerging", mask_steps=6, steps=0, base_learning_rate=0.0, mask_learning_rate=0.1, **common
    ).run(pool, tasks)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_a_mask_is_learned_at_coefficients_that_went_one_step_from_where_they_begin(pool: fb.ModelPool) -> None:
    """Both levels by hand, in every step from `scaling_factor` anew, with Adam's steps of the mask."""
    tasks, temperature, begin, long, small = random_tasks(pool), 0.5, 0.3, 2.0, 0.1
    base, names = pool.require_base(), [name for name, _ in network(0).named_parameters()]
    module = pool.build(fb.methods.simple_average(pool))
    vectors = {name: torch.stack([model[name] - base[name] for model in pool.values()]) for name in names}

    def loss(coefficients: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        merged = {
            name: base[name] + mask * torch.einsum("m,m...->...", row, vectors[name])
            for name, mask, row in zip(names, masks, coefficients, strict=True)
        }
        outputs = [functional_call(module, merged, task.inputs) for task in tasks.values()]  # type: ignore[attr-defined]
        return sum((entropy(output) for output in outputs), torch.tensor(0.0)) / len(tasks)

    logits = [torch.zeros(base[name].shape, requires_grad=True) for name in names]
    adam, moved = torch.optim.Adam(logits, small), 0.0
    for step in range(3):
        coefficients = torch.full((len(names), len(pool)), begin, requires_grad=True)
        masks = [ops.relaxed_mask(z, temperature, f"0/{step}/{n}") for n, z in zip(names, logits, strict=True)]
        (gradient,) = torch.autograd.grad(loss(coefficients, [mask.detach() for mask in masks]), coefficients)
        adam.zero_grad()
        loss((coefficients - long * gradient).detach(), masks).backward()
        adam.step()
        moved = max(moved, float(long * gradient.abs().max()))
    assert moved > 0.1  # that where a step begins makes a difference

    options = {"mask_steps": 3, "steps": 0, "batch_size": 24, "scaling_factor": begin, "temperature": temperature}
    options |= {"base_learning_rate": long, "mask_learning_rate": small}
    found = fb.algorithm("concrete_adamerging", **options).run(pool, tasks)
    with torch.no_grad():
        for name, z in zip(names, logits, strict=True):
            wanted = base[name] + begin * ops.relaxed_mask(z, temperature) * vectors[name].sum(0)
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_in_the_cache(pool: fb.ModelPool, cache) -> None:
    fb.algorithm("concrete_adamerging", mask_steps=2, steps=2).run(pool, random_tasks(pool))
    assert not list(cache.rglob("*.pt"))
