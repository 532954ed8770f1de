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


# Ours, and theirs.
ONE_TO_ONE = [
    (
        ("linear", {"weights": [1.0, 2.0, 4.0], "normalize": False}),
        ("linear", {"weight": [1, 2, 4], "normalize": False}),
    ),
    (("passthrough", {"scale": 0.5}), ("passthrough", {"scale": 0.5})),
    (("slerp", {"t": 0.3, "convention": "mergekit"}), ("slerp", {"t": 0.3})),
    (("nuslerp", {"weights": [1.0, 3.0], "convention": "mergekit"}), ("nuslerp", {"weight": [1, 3]})),
    (("nuslerp", {"on": "models", "convention": "mergekit"}), ("nuslerp", {"weight": [1, 1]})),
    # Their length of a vector is 1e-8 more than it is, unless told otherwise.
    (
        ("multislerp", {"weights": [1.0, 3.0, 2.5], "convention": "mergekit"}),
        ("multislerp", {"weight": [1, 3, 2.5], "eps": 0.0}),
    ),
    (("karcher_mean", {}), ("karcher", {"max_iter": 1000, "tol": 1e-15})),
    (("model_stock", {}), ("model_stock", {})),
    (("nearswap", {"t": 0.05}), ("nearswap", {"t": 0.05})),
    (("arcee_fusion", {}), ("arcee_fusion", {})),
    (
        ("breadcrumbs", {"density": 0.5, "gamma": 0.25, "scaling_factor": 1.0}),
        ("breadcrumbs", {"weight": [1, 1, 1], "density": 0.5, "gamma": 0.25}),
    ),
    (
        ("breadcrumbs", {"over": "ties", "merge": "mean", "density": 0.5, "gamma": 0.25, "scaling_factor": 1.0}),
        ("breadcrumbs_ties", {"weight": [1, 1, 1], "density": 0.5, "gamma": 0.25, "normalize": True}),
    ),
    (("sce", {"density": 1.0}), ("sce", {})),
    (("sce", {"density": 0.25}), ("sce", {"select_topk": 0.25})),
    (("ram", {"epsilon": 0.1}), ("ram", {"epsilon": 0.1})),
    (("dare", {"density": 1.0, "scaling_factor": 0.4}), ("dare_linear", {"weight": [0.4] * 3, "density": 1.0})),
    (
        ("della", {"density": 1.0, "merge": "mean"}),
        ("della", {"weight": [1, 1, 1], "density": 1.0, "normalize": True}),
    ),
]
WITHOUT_BASE = ("linear", "passthrough", "karcher_mean")
COUNT = {"slerp": 1, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize(("ours", "theirs"), ONE_TO_ONE, ids=lambda case: f"{case[0]}-{len(case[1])}")
def test_under_their_convention_our_merge_is_theirs(
    models: list[dict[str, torch.Tensor]], ours: tuple, theirs: tuple, far: bool
) -> None:
    merge_state_dicts = pytest.importorskip("mergekit.merge_methods.api").merge_state_dicts
    base, *tuned = models
    tuned = tuned[: COUNT.get(ours[0], 3)]
    if far:
        tuned = [{name: torch.randn_like(tensor) for name, tensor in base.items()} for _ in tuned]
    named = {f"m{i}": model for i, model in enumerate(tuned)}
    if ours[0] in WITHOUT_BASE or ours[1].get("on") == "models":
        expected = merge_state_dicts(named, theirs[0], parameters=theirs[1])
    else:
        expected = merge_state_dicts({"base": base, **named}, theirs[0], parameters=theirs[1], base="base")
    if ours[0] == "slerp":  # their base is the first of two
        named = {"first": base, **named}
    merged = fb.algorithm(ours[0], **ours[1]).run(fb.ModelPool(named, base=base))
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=1e-12)
