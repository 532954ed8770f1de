import numpy as np
import pytest
import torch
from conftest import pool_of, small_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fusionbench as fb


def test_simple_average_by_hand() -> None:
    merged = fb.methods.simple_average(pool_of([9, 9, 9], [1, 2, 3], [3, 4, -3]))
    assert merged["w"].tolist() == [2, 3, 0]


def test_simple_average_needs_no_base() -> None:
    pool = fb.ModelPool({"a": {"w": torch.tensor([1.0, 3.0])}, "b": {"w": torch.tensor([3.0, 5.0])}})
    assert fb.methods.simple_average(pool)["w"].tolist() == [2, 4]


def test_weighted_average_by_hand_normalised_or_not_by_order_or_by_name() -> None:
    pool = pool_of([0, 0], [1, 2], [5, 6])
    assert fb.methods.weighted_average(pool, weights=[1, 3])["w"].tolist() == [4, 5]
    assert fb.methods.weighted_average(pool, weights=[1, 3], normalize=False)["w"].tolist() == [16, 20]
    assert fb.methods.weighted_average(pool, weights={"m1": 3, "m0": 1})["w"].tolist() == [4, 5]
    assert fb.methods.weighted_average(pool)["w"].tolist() == [3, 4]
    assert fb.methods.weighted_average(pool, weights=[0, 1])["w"].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], "cannot be normalised: set normalize=false"),  # pitfalls C15: others give inf
        ([1e308, 1e308], "magnitudes of weights sum to inf: give finite numbers, and smaller ones"),
        ([1e308, -1e308], "magnitudes of weights sum to inf"),
        ([float("nan"), 1], r"weights must be in \(-inf, inf\); got nan"),
        ([1], "has 1 number, but the pool has 2 models"),
        ({"m0": 1, "m2": 1}, "has no model 'm2'"),
        ({"m0": 1}, "no number for 'm1'"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: object, message: str) -> None:
    with pytest.raises(fb.InputError, match=message):
        fb.methods.weighted_average(pool_of([0, 0], [1, 2], [5, 6]), weights=weights)


def test_weights_may_be_as_large_as_numbers_are() -> None:
    pool = pool_of([0, 0], [1, 2], [5, 6])
    assert fb.methods.weighted_average(pool, weights=[1e308, 0.5])["w"].tolist() == [1, 2]
    assert fb.methods.weighted_average(pool, weights=[1e307, 1e307])["w"].tolist() == [3, 4]


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_averages_equal_float64(models: list[list[float]]) -> None:
    pool = pool_of([0.0] * 5, *models)
    expected = np.array(models, np.float64).mean(0)
    scale = np.abs(models).max() + 1e-30
    np.testing.assert_allclose(fb.methods.simple_average(pool)["w"].double(), expected, rtol=0, atol=4e-7 * scale)
    weights = list(range(1, len(models) + 1))
    expected = np.average(np.array(models, np.float64), axis=0, weights=weights)
    merged = fb.methods.weighted_average(pool, weights=weights)["w"]
    np.testing.assert_allclose(merged.double(), expected, rtol=0, atol=1e-6 * scale)


def test_half_precision_is_rounded_once() -> None:
    """Pitfall B16: averaging in bfloat16 is off in most elements; here each is the nearest to the exact mean."""
    torch.manual_seed(0)
    models = {f"m{i}": {"w": (1 + 0.01 * torch.randn(4096)).bfloat16()} for i in range(8)}
    merged = fb.methods.simple_average(fb.ModelPool(models))["w"]
    exact = torch.stack([model["w"].double() for model in models.values()]).mean(0)
    assert merged.dtype == torch.bfloat16
    assert merged.equal(exact.bfloat16())


def test_batch_norm_counters_pass_and_statistics_are_averaged() -> None:
    """Pitfall C1: integer buffers must neither crash a merge nor become floats."""
    base = small_model(0)
    merged = fb.methods.simple_average(fb.ModelPool({"a": small_model(1), "b": small_model(3)}, base=base))
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    assert merged["norm.num_batches_tracked"] == 0
    models: list[nn.Module] = [small_model(1), small_model(3)]
    expected = sum(m.state_dict()["norm.running_var"].double() for m in models) / 2
    torch.testing.assert_close(merged["norm.running_var"].double(), expected)
