"""breadcrumbs, sce, ram, arcee_fusion, magmax, nearswap, passthrough, linear: what is taken of each model, and why."""

import numpy as np
import pytest
import torch
from conftest import is_each, pool_of, random_pool

import fusionbench as fb

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def agreeing(values: np.ndarray) -> np.ndarray:
    return np.where(values * np.sign(values.sum(0)) > 0, values, 0)


def test_breadcrumbs_by_hand() -> None:
    pool = pool_of([0] * 5, [1, -2, 3, -4, 5], [5, -4, -3, -2, 1])
    one = pool_of([0] * 5, [1, -2, 3, -4, 5])
    options = {"gamma": 0.2, "scaling_factor": 1.0}
    assert fb.methods.breadcrumbs(one, density=0.4, **options)["w"].tolist() == [0, 0, 3, -4, 0]
    assert fb.methods.breadcrumbs(one, density=0.9, **options)["w"].tolist() == [1, -2, 3, -4, 0]
    assert fb.methods.breadcrumbs(one, density=1.0, **options)["w"].tolist() == [1, -2, 3, -4, 5]
    assert fb.methods.breadcrumbs(one, density=0.01, **options)["w"].tolist() == [0, 0, 0, -4, 0]
    assert fb.methods.breadcrumbs(pool, density=0.6, **options)["w"].tolist() == [0, -6, 0, -6, 0]
    options = {"gamma": 0.2, "scaling_factor": 0.5, "over": "ties", "merge": "mean"}
    assert fb.methods.breadcrumbs(pool, density=0.6, **options)["w"].tolist() == [0, -1.5, 0, -1.5, 0]


def test_breadcrumbs_keep_all_that_equal_the_largest_or_smallest_they_keep() -> None:
    pool = pool_of([0] * 6, [3, -3, 2, 1, -1, 0])
    options = {"density": 0.5, "gamma": 1 / 6, "scaling_factor": 1.0}  # ranks 2 to 4: 3, 2, 1
    assert fb.methods.breadcrumbs(pool, **options)["w"].tolist() == [3, -3, 2, 1, -1, 0]


@all_dtypes
@pytest.mark.parametrize(("density", "gamma"), [(0.144, 0.006), (0.5, 0.25), (0.9, 0.3), (0.001, 0.0)])
def test_breadcrumbs_equal_sorting(density: float, gamma: float, dtype: torch.dtype) -> None:
    def thinned(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(len(values), -1).copy()
        count = flat.shape[1]
        keep = max(round(density * count), 1)
        drop = min(round(gamma * count), count - keep)
        for row in flat:
            size = np.abs(row).astype(np.float32)
            ordered = np.sort(size)[::-1]
            row[(size > ordered[drop]) | (size < ordered[drop + keep - 1])] = 0
        return flat.reshape(values.shape)

    pool = random_pool(3, dtype)
    options = {"density": density, "gamma": gamma}
    merged = fb.methods.breadcrumbs(pool, **options)
    is_each(merged, pool, lambda base, models: base + 0.2 * thinned(models - base).sum(0))
    merged = fb.methods.breadcrumbs(pool, **options, over="ties", scaling_factor=0.7)
    is_each(merged, pool, lambda base, models: base + 0.7 * agreeing(thinned(models - base)).sum(0))


def test_sce_by_hand() -> None:
    # Variances 4, 1, 9, 0: of [4 2 3 5] and [0 4 -3 5], half of the elements are the first and the third.
    # Weights 4² + 3² = 25 and 3² = 9; at the third the sum is 0, and nothing is elected.
    pool = pool_of([1, 1, 1, 1], [5, 3, 4, 6], [1, 5, -2, 6])
    assert fb.methods.sce(pool, density=0.5)["w"].tolist() == [5, 1, 1, 1]
    torch.testing.assert_close(
        fb.methods.sce(pool, density=0.5, normalize=False)["w"], torch.tensor([1 + 4 * 25 / 34, 1, 1, 1])
    )
    # Signs are elected before weights are put on: 3 + 3 against -5, though 25 weighs more than 9 + 9.
    pool = pool_of([0, 0], [3, 0], [3, 0], [-5, 0])
    assert fb.methods.sce(pool, density=1.0)["w"].tolist() == [3, 0]


@all_dtypes
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_sce_equals_float64(density: float, normalize: bool, dtype: torch.dtype) -> None:
    def selected(base: np.ndarray, models: np.ndarray) -> np.ndarray:
        values = models - base
        variance = values.var(0).astype(np.float32)
        least = np.sort(variance.reshape(-1))[-max(round(density * variance.size), 1)]
        values = np.where((variance >= least) | (density == 1), values, 0)
        weights = (values**2).reshape(len(values), -1).sum(1)
        weights = (weights / weights.sum()).reshape(-1, *[1] * base.ndim)
        left = agreeing(values)
        divisor = (weights * (left != 0)).sum(0) if normalize else 1
        return base + (weights * left).sum(0) / np.where(divisor == 0, 1, divisor)

    pool = random_pool(4, dtype)
    is_each(fb.methods.sce(pool, density=density, normalize=normalize), pool, selected)


def test_ram_by_hand() -> None:
    pool = pool_of([1, 1, 1, 1], [3, 1, 3, 1.25], [1, 1, 5, 1.25], [1, 1, 0, 1])
    torch.testing.assert_close(fb.methods.ram(pool)["w"], torch.tensor([3, 1, 1 + 5 / 3, 1.25]))
    assert fb.methods.ram(pool, epsilon=0.25)["w"].tolist()[3] == 1  # by more than epsilon, not by just that


@all_dtypes
def test_ram_equals_float64(dtype: torch.dtype) -> None:
    def shared(base: np.ndarray, models: np.ndarray) -> np.ndarray:
        values = models - base
        changed = np.abs(values) > np.float32(0.4)
        return base + np.where(changed, values, 0).sum(0) / np.maximum(changed.sum(0), 1)

    pool = random_pool(3, dtype)
    is_each(fb.methods.ram(pool, epsilon=0.4), pool, shared)


def test_magmax_by_hand() -> None:
    pool = pool_of([1, 1, 1, 1], [3, 1, 0, 5], [0, 2, -1, -3])
    assert fb.methods.magmax(pool)["w"].tolist() == [2, 1.5, 0, 3]  # of equals the first
    assert fb.methods.magmax(pool, scaling_factor=1.0)["w"].tolist() == [3, 2, -1, 5]


@all_dtypes
def test_magmax_equals_float64(dtype: torch.dtype) -> None:
    pool = random_pool(5, dtype)
    is_each(
        fb.methods.magmax(pool),
        pool,
        lambda base, models: (
            base + 0.5 * np.take_along_axis(models - base, np.abs(models - base).argmax(0, keepdims=True), 0)[0]
        ),
    )


def test_nearswap_by_hand() -> None:
    pool = pool_of([0, 0, 0, 0], [0.5, -0.25, 2, -3])
    assert fb.methods.nearswap(pool, t=0.5)["w"].tolist() == [0.5, -0.25, 0.5, -0.5]
    assert fb.methods.nearswap(pool, t=0)["w"].tolist() == [0, 0, 0, 0]


@all_dtypes
def test_nearswap_is_a_weight_of_t_over_the_distance(dtype: torch.dtype) -> None:
    def near(base: np.ndarray, models: np.ndarray) -> np.ndarray:
        weight = np.minimum(0.2 / np.maximum(np.abs(models[0] - base), 1e-300), 1)
        return base + weight * (models[0] - base)

    pool = random_pool(1, dtype)
    is_each(fb.methods.nearswap(pool, t=0.2), pool, near)


def fusion(base: np.ndarray, models: np.ndarray) -> np.ndarray:
    """Arcee Fusion by sorting, and by the definition of the divergence."""
    model = models[0]
    rows, others = np.atleast_1d(base), np.atleast_1d(model)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (others, rows))
    importance = (np.abs(others - rows) * np.maximum((p * np.log(p / q)).sum(-1, keepdims=True), 0)).reshape(base.shape)
    lower, median, upper = np.quantile(importance.astype(np.float32).astype(float), [0.25, 0.5, 0.75], method="lower")
    return np.where(importance.astype(np.float32) >= median + 1.5 * (upper - lower), model, base)


@all_dtypes
def test_arcee_fusion_equals_sorting(dtype: torch.dtype) -> None:
    pool = random_pool(1, dtype, shapes={"matrix": (40, 30), "long": (3, 700), "kernel": (5, 4, 3, 3), "one": (1, 9)})
    merged = fb.methods.arcee_fusion(pool)
    is_each(merged, pool, fusion)
    for name in ("matrix", "long", "kernel"):
        share = (merged[name] != pool.require_base()[name]).float().mean()
        assert 0.01 < share < 0.3  # something, and far from everything


def test_arcee_fusion_by_hand() -> None:
    # One row's softmax moves, the other's does not, though each of its elements does by 8.
    base = {"w": torch.zeros(2, 4)}
    model = {"w": torch.tensor([[0.0, 0.0, 0.0, 1.0], [8.0, 8.0, 8.0, 8.0]])}
    merged = fb.methods.arcee_fusion(fb.ModelPool({"m": model}, base=base))["w"]
    assert merged[0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("shape", [(3, 300_000), (700, 900), (300_001,)], ids=str)
def test_blocks_make_no_difference(shape: tuple[int, ...]) -> None:
    pool = random_pool(2, torch.float32, shapes={"w": shape})
    one = fb.ModelPool({"m": pool["m0"]}, base=pool.base)
    numel = pool.reference.specs["w"].numel
    steps = [*range(0, numel, 2**18), numel]
    for name in ("arcee_fusion", "nearswap", "sce", "breadcrumbs", "ram", "magmax", "model_stock", "karcher_mean"):
        method, given = getattr(fb.methods, name), one if name in ("arcee_fusion", "nearswap") else pool
        whole, pieces = method(given), method(given)
        data, _ = whole.block("w", 0, numel)
        blocks = [pieces.block("w", start, stop)[0].copy() for start, stop in zip(steps, steps[1:], strict=False)]
        assert np.concatenate(blocks).tobytes() == data.tobytes(), name
        if name == "arcee_fusion":
            is_each(whole, given, fusion)


@all_dtypes
def test_passthrough_and_linear(dtype: torch.dtype) -> None:
    one, pool = random_pool(1, dtype), random_pool(3, dtype)
    assert fb.methods.passthrough(one)["matrix"].equal(one["m0"]["matrix"])
    is_each(fb.methods.passthrough(one, scale=-0.3), one, lambda base, models: -0.3 * models[0])
    is_each(fb.methods.linear(pool), pool, lambda base, models: models.mean(0))
    merged = fb.methods.linear(pool, weights={"m2": 0.5, "m0": 2.0, "m1": -1.0}, normalize=False)
    is_each(merged, pool, lambda base, models: 2 * models[0] - models[1] + 0.5 * models[2])


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("passthrough", 2, {}, r"passthrough returns 1 model, and the pool has 2 \(m0, m1\): leave the others out"),
        ("nearswap", 2, {}, "nearswap takes, beside the base, 1 model, and the pool has 2"),
        ("arcee_fusion", 3, {}, "arcee_fusion takes, beside the base, 1 model, and the pool has 3"),
        ("nearswap", 1, {"t": -1.0}, r"nearswap.t must be in \[0, inf\)"),
        ("breadcrumbs", 2, {"density": 0.0}, r"density must be in \(0, 1\]"),
        ("breadcrumbs", 2, {"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ("sce", 2, {"density": 10.0}, r"density must be in \(0, 1\]"),
        ("ram", 2, {"epsilon": -1.0}, r"epsilon must be in \[0, inf\)"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, count: int, options: dict, message: str) -> None:
    with pytest.raises(fb.InputError, match=message):
        fb.algorithm(name, **options).run(random_pool(count))


@pytest.mark.parametrize("name", ["breadcrumbs", "sce", "ram", "magmax", "nearswap", "arcee_fusion", "dare", "della"])
def test_task_vectors_need_a_base(name: str) -> None:
    with pytest.raises(fb.InputError, match="needs the base model"):
        getattr(fb.methods, name)(fb.ModelPool({"m": {"w": torch.ones(3)}}))
