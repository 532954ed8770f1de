"""slerp, nuslerp, multislerp, karcher_mean, model_stock: what is known from angles between tensors."""

import numpy as np
import pytest
import torch
from conftest import is_each, pool_of, random_pool, tensors_of

import fusionbench as fb

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def no_base(*models: list[float]) -> fb.ModelPool:
    return fb.ModelPool({f"m{i}": model for i, model in enumerate(tensors_of(*models))})


def close(merged: fb.Checkpoint, expected: list[float]) -> None:
    torch.testing.assert_close(merged["w"], torch.tensor(expected, dtype=torch.float32))


def test_slerp_by_hand() -> None:
    third = 3**-0.5  # of a right angle: 30 and 60 degrees
    close(fb.methods.slerp(no_base([1, 0], [0, 1]), t=1 / 3), [1.5 * third, 0.5])
    close(fb.methods.slerp(no_base([2, 0], [0, 4]), t=0.5), [3 / 2**0.5, 3 / 2**0.5])  # half way, of length 3
    close(fb.methods.slerp(no_base([2, 0], [0, 4]), t=0.5, convention="mergekit"), [2**0.5, 8**0.5])


@pytest.mark.parametrize("convention", ["sphere", "mergekit"])
def test_slerp_ends_at_the_models(convention: str) -> None:
    pool = no_base([1, 2, 3], [3, -1, 0.5])
    close(fb.methods.slerp(pool, t=0, convention=convention), [1, 2, 3])
    close(fb.methods.slerp(pool, t=1, convention=convention), [3, -1, 0.5])


@pytest.mark.parametrize("convention", ["sphere", "mergekit"])
def test_slerp_goes_straight_where_there_is_no_arc(convention: str) -> None:
    """Pitfall C15: a tensor of zeros must not multiply the other by 0.707."""
    for first, second in [([0, 0], [4, 8]), ([1, 2], [2, 4]), ([1, 2], [-2, -4]), ([0, 0], [0, 0])]:
        expected = [0.75 * a + 0.25 * b for a, b in zip(first, second, strict=True)]
        close(fb.methods.slerp(no_base(first, second), t=0.25, convention=convention), expected)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """By the rotation that takes one direction to the other, not by Shoemake's formula."""
    shape, a, b = a.shape, a.reshape(-1), b.reshape(-1)
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    u, v = a / length_a, b / length_b
    side = v - (u @ v) * u
    if np.linalg.norm(side) < 1e-9:
        return ((1 - t) * a + t * b).reshape(shape)
    side /= np.linalg.norm(side)
    angle = t * np.arctan2(v @ side, v @ u)
    return (((1 - t) * length_a + t * length_b) * (np.cos(angle) * u + np.sin(angle) * side)).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_is_a_rotation(t: float, dtype: torch.dtype) -> None:
    pool = random_pool(2, dtype)
    is_each(fb.methods.slerp(pool, t=t), pool, lambda base, models: slerp(*models, t))
    weights = {"m0": 3 * (1 - t), "m1": 3 * t}
    is_each(
        fb.methods.nuslerp(pool, weights=weights, on="models"),
        pool,
        lambda base, models: slerp(models[0], models[1], t),
    )
    is_each(fb.methods.nuslerp(pool, weights=weights), pool, lambda base, models: base + slerp(*(models - base), t))


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-8, 1e-12])
def test_slerp_of_models_that_hardly_differ_is_as_exact_as_of_others(size: float) -> None:
    torch.manual_seed(0)
    a = torch.randn(50, dtype=torch.float64)
    b = a + size * torch.randn(50, dtype=torch.float64)
    merged = fb.methods.slerp(fb.ModelPool({"a": {"w": a}, "b": {"w": b}}), t=0.3)["w"]
    first, second = a.numpy().astype(np.longdouble), b.numpy().astype(np.longdouble)
    lengths = np.sqrt(first @ first), np.sqrt(second @ second)
    u, v = first / lengths[0], second / lengths[1]
    angle = 2 * np.arcsin(np.sqrt((u - v) @ (u - v)) / 2)
    expected = (np.sin(0.7 * angle) * u + np.sin(0.3 * angle) * v) / np.sin(angle)
    expected = (0.7 * lengths[0] + 0.3 * lengths[1]) * expected
    np.testing.assert_allclose(merged.numpy(), expected.astype(np.float64), rtol=0, atol=2e-15)


def test_nuslerp_does_not_depend_on_order() -> None:
    pool = random_pool(2)
    turned = fb.ModelPool({"m1": pool["m1"], "m0": pool["m0"]}, base=pool.base)
    here, there = (fb.methods.nuslerp(p, weights={"m0": 1, "m1": 4}) for p in (pool, turned))
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=1e-13, atol=1e-13)


def karcher(models: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """On the tensors themselves, with log and exp maps by arctan2."""
    flat = models.reshape(len(models), -1)
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    mean = weights @ units / np.linalg.norm(weights @ units)
    for _ in range(500):
        step = np.zeros_like(mean)
        for weight, unit in zip(weights, units, strict=True):
            side = unit - (unit @ mean) * mean
            if np.linalg.norm(side) > 0:
                step += weight * np.arctan2(np.linalg.norm(side), unit @ mean) * side / np.linalg.norm(side)
        size = np.linalg.norm(step)
        mean = np.cos(size) * mean + np.sinc(size / np.pi) * step
        mean /= np.linalg.norm(mean)
    return (mean * (weights @ lengths)).reshape(models.shape[1:])


WIDE = {"matrix": (20, 30), "vector": (17,), "kernel": (5, 4, 3, 3)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_mean_on_the_sphere_is_that_of_tensors(count: int, dtype: torch.dtype) -> None:
    pool = random_pool(count, dtype, shapes=WIDE)
    weights = list(range(1, count + 1))
    shares = np.array(weights) / sum(weights)
    is_each(fb.methods.karcher_mean(pool, weights=weights), pool, lambda base, models: karcher(models, shares))
    is_each(
        fb.methods.multislerp(pool, weights=weights), pool, lambda base, models: base + karcher(models - base, shares)
    )


def test_the_mean_of_two_is_slerp() -> None:
    pool = random_pool(2, shapes=WIDE)
    mean, between = fb.methods.karcher_mean(pool, weights=[0.7, 0.3]), fb.methods.slerp(pool, t=0.3)
    for name in WIDE:
        torch.testing.assert_close(mean[name], between[name], rtol=1e-12, atol=1e-12)


def test_the_mean_on_the_sphere_by_hand() -> None:
    corner = 2 / 3**0.5  # of lengths 1, 2 and 3
    close(fb.methods.karcher_mean(no_base([1, 0, 0], [0, 2, 0], [0, 0, 3])), [corner] * 3)
    close(fb.methods.karcher_mean(no_base([1, 0], [0, 0])), [0.5, 0])  # zeros have no direction, but a length
    close(fb.methods.karcher_mean(no_base([4, 0], [-2, 0])), [1, 0])  # opposites cancel: the linear mean
    close(fb.methods.karcher_mean(no_base([1, 0], [0, 1], [5, 5]), weights=[0, 2, 0]), [0, 1])
    close(fb.methods.multislerp(no_base([1, 0], [0, 1]), weights=[1, 2]), [0.5, 3**0.5 / 2])
    nlerp = [1 / 5**0.5, 2 / 5**0.5]  # mergekit's stops at the chord
    close(fb.methods.multislerp(no_base([1, 0], [0, 1]), weights=[1, 2], convention="mergekit"), nlerp)


def test_copies_of_a_model_give_that_model_to_the_bit() -> None:
    model = tensors_of([0.1, 0.7, -3.3])[0]
    pool = fb.ModelPool({name: model for name in "ab"})
    for method in (fb.methods.slerp, fb.methods.nuslerp, fb.methods.multislerp, fb.methods.karcher_mean):
        assert method(pool)["w"].equal(model["w"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_model_stock_is_the_paper_s_ratio(count: int, dtype: torch.dtype) -> None:
    def stock(base: np.ndarray, models: np.ndarray) -> np.ndarray:
        vectors = (models - base).reshape(count, -1)
        pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
        cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
        if abs(1 + (count - 1) * cosine) < 1e-9:
            return base
        t = count * cosine / (1 + (count - 1) * cosine)
        return t * models.mean(0) + (1 - t) * base

    pool = random_pool(count, dtype)
    is_each(fb.methods.model_stock(pool), pool, stock)


def test_model_stock_by_hand() -> None:
    close(fb.methods.model_stock(pool_of([1, 1], [3, 1], [3, 1])), [3, 1])  # one direction: the average
    close(fb.methods.model_stock(pool_of([1, 1], [3, 1], [1, 5])), [1, 1])  # right angles: the base
    close(fb.methods.model_stock(pool_of([1, 1], [3, 1], [-1, 1])), [1, 1])  # opposites: the base
    close(fb.methods.model_stock(pool_of([1, 1], [3, 1], [1, 1])), [1, 1])  # unchanged: as at right angles
    # 60 degrees: cos 1/2, t = 2/3, of the mean of [2, 0] and [1, 3 ** .5]
    close(fb.methods.model_stock(pool_of([0, 0], [2, 0], [1, 3**0.5])), [1, 3**-0.5])


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("slerp", 3, {}, r"slerp goes between 2 models, and the pool has 3 \(m0, m1, m2\): leave some out, or use"),
        ("slerp", 1, {}, r"slerp goes between 2 models, and the pool has 1 \(m0\)"),
        ("slerp", 2, {"t": 2.0}, r"slerp.t must be in \[0, 1\]"),
        ("nuslerp", 3, {}, "nuslerp goes between 2 models"),
        ("nuslerp", 2, {"weights": [1, -1]}, "cannot be normalised: give others"),
        ("nuslerp", 2, {"weights": [0, 0]}, "cannot be normalised: give others"),
        ("multislerp", 2, {"weights": [0, 0]}, "cannot be normalised: give others"),
        ("karcher_mean", 2, {"weights": [0, 0]}, "cannot be normalised: give others"),
        ("multislerp", 2, {"weights": [1.0]}, "weights has 1 number,"),
        ("karcher_mean", 2, {"weights": [1.0, -2.0]}, r"weights must be in \[0, inf\)"),
        ("model_stock", 1, {}, "at least 2 models"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, count: int, options: dict, message: str) -> None:
    with pytest.raises(fb.InputError, match=message):
        fb.algorithm(name, **options).run(random_pool(count))


def test_task_vectors_need_a_base() -> None:
    with pytest.raises(fb.InputError, match="needs the base model"):
        fb.methods.multislerp(no_base([1, 0], [0, 1]), on="task_vectors")
    with pytest.raises(fb.InputError, match="needs the base model"):
        fb.methods.model_stock(no_base([1, 0], [0, 1]))
