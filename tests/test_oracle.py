"""Our merges against mergekit's, where it is installed (make test-oracle): two implementations that share no line."""

import pytest
import torch

import fusionbench as fb

pytestmark = pytest.mark.oracle


@pytest.fixture
def models() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = {"a.weight": (64, 48), "b.weight": (48,), "c.weight": (7, 5, 3)}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tuned = [{n: t + 0.1 * torch.randn(t.shape, dtype=torch.float64) for n, t in base.items()} for _ in range(3)]
    return [base, *tuned]


def merged_by_mergekit(models: list[dict[str, torch.Tensor]], method: str, **parameters: object) -> dict:
    merge_state_dicts = pytest.importorskip("mergekit.merge_methods.api").merge_state_dicts
    base, *tuned = models
    named = {f"m{i}": model for i, model in enumerate(tuned)}
    if method == "linear":
        return merge_state_dicts(named, method, parameters=parameters)
    return merge_state_dicts({"base": base, **named}, method, parameters=parameters, base="base")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("simple_average", {}), ("linear", {"weight": [1, 1, 1]})),
        (("weighted_average", {"weights": [1.0, 2.0, 4.0]}), ("linear", {"weight": [1, 2, 4]})),
        (("task_arithmetic", {"scaling_factor": 0.4}), ("task_arithmetic", {"weight": [0.4] * 3})),
        (
            ("ties_merging", {"trim": "tensor", "merge": "mean", "density": 0.25, "scaling_factor": 1.0}),
            ("ties", {"weight": [1, 1, 1], "density": 0.25}),
        ),
        (
            ("ties_merging", {"trim": "tensor", "density": 0.5, "scaling_factor": 0.3}),
            ("ties", {"weight": [1, 1, 1], "density": 0.5, "lambda": 0.3, "normalize": False}),
        ),
    ],
)
def test_our_merge_is_theirs(models: list[dict[str, torch.Tensor]], ours: tuple, theirs: tuple) -> None:
    expected = merged_by_mergekit(models, theirs[0], **theirs[1])
    base, *tuned = models
    pool = fb.ModelPool({f"m{i}": model for i, model in enumerate(tuned)}, base=base)
    merged = fb.algorithm(ours[0], **ours[1]).run(pool)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=1e-12)
