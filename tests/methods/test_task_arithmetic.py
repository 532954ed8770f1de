import numpy as np
import pytest
import torch
from conftest import pool_of, small_model
from hypothesis import given
from hypothesis import strategies as st

import fusionbench as fb

numbers = st.floats(-1e3, 1e3, width=32)


def test_task_arithmetic_by_hand() -> None:
    pool = pool_of([1, 2], [2, 2], [1, 6])  # task vectors (1, 0) and (0, 4)
    assert fb.methods.task_arithmetic(pool, scaling_factor=0.5)["w"].tolist() == [1.5, 4]


def test_a_scaling_factor_of_zero_gives_the_base_and_of_one_with_one_model_the_model() -> None:
    pool = pool_of([0.1, 0.7], [0.4, -0.3])
    assert fb.methods.task_arithmetic(pool, scaling_factor=0.0)["w"].equal(pool.require_base()["w"])
    torch.testing.assert_close(fb.methods.task_arithmetic(pool, scaling_factor=1.0)["w"], pool["m0"]["w"])


def test_without_a_base_it_says_so() -> None:
    with pytest.raises(fb.InputError, match="needs the base model"):
        fb.methods.task_arithmetic(fb.ModelPool({"a": {"w": torch.ones(2)}}))


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=2, max_size=5), st.floats(-2, 2))
def test_task_arithmetic_equals_float64(rows: list[list[float]], scaling_factor: float) -> None:
    base, *models = np.array(rows, np.float64)
    expected = base + scaling_factor * sum(model - base for model in models)
    merged = fb.methods.task_arithmetic(pool_of(*rows), scaling_factor=scaling_factor)["w"]
    scale = np.abs(rows).max() + 1e-30
    np.testing.assert_allclose(merged.double(), expected, rtol=0, atol=2e-6 * scale * len(rows))


def test_running_statistics_are_differences_like_any_parameter() -> None:
    """Pitfall B12: others add raw statistics of fine-tuned models, so that a variance of 1 becomes 2.6."""
    models = {name: small_model(0) for name in "ab"}
    for model in models.values():
        model["norm"].running_var.fill_(1.2)
    base = small_model(0)
    base["norm"].running_var.fill_(1.0)
    merged = fb.methods.task_arithmetic(fb.ModelPool(models, base=base), scaling_factor=0.5)
    torch.testing.assert_close(merged["norm.running_var"], torch.full((6,), 1.2))


def test_a_factor_is_the_decimal_that_is_written() -> None:
    """0.3 (346 + 496 + 88) is 279 and no less: half-way between two numbers of bfloat16, and rounded to even."""
    models = {"a": [346, 580, 402], "b": [496, 476, 504], "c": [88, 34, 464]}
    pool = fb.ModelPool(
        {name: {"w": torch.tensor(values).bfloat16()} for name, values in models.items()},
        base={"w": torch.zeros(3, dtype=torch.bfloat16)},
    )
    merged = fb.methods.task_arithmetic(pool, scaling_factor=0.3)["w"].tolist()
    assert merged == [280, 328, 412]  # of 279, 327 and 411
