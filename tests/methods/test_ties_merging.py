import numpy as np
import pytest
import torch
from conftest import pool_of, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fusionbench as fb
from fusionbench import fuse, ops

BASE = [10.0, 10.0, 10.0, 10.0, 10.0]
A = [15.0, 6.0, 13.0, 12.0, 11.0]  # task vector  5 -4  3  2  1
B = [14.0, 11.0, 7.0, 12.0, 5.0]  #  task vector  4  1 -3  2 -5


def ties(**hyperparameters: object) -> list[float]:
    return fb.methods.ties_merging(pool_of(BASE, A, B), **hyperparameters)["w"].tolist()


def test_ties_by_hand() -> None:
    # density 0.6 keeps three of five: A 5 -4 3 . .   B 4 . -3 . -5
    # (3 and -3 cancel: nothing is elected there)
    assert ties(density=0.6, scaling_factor=1.0) == [19, 6, 10, 10, 5]
    assert ties(density=0.6, scaling_factor=0.5) == [14.5, 8, 10, 10, 7.5]
    assert ties(density=0.6, scaling_factor=1.0, merge="mean") == [14.5, 6, 10, 10, 5]
    assert ties(density=0.6, scaling_factor=1.0, merge="max") == [15, 6, 10, 10, 5]


def test_density_one_keeps_all() -> None:
    # A 5 -4 3 2 1, B 4 1 -3 2 -5: elected + - 0 + -
    assert ties(density=1.0, scaling_factor=1.0) == [19, 6, 10, 14, 5]


def test_equal_magnitudes_at_the_threshold_are_all_kept() -> None:
    pool = pool_of([0, 0, 0, 0], [2, -2, 2, 1])
    assert fb.methods.ties_merging(pool, density=0.25, scaling_factor=1.0)["w"].tolist() == [2, -2, 2, 0]


def test_election_by_mass_or_count() -> None:
    pool = pool_of([0.0], [5.0], [-1.0], [-2.0])
    assert fb.methods.ties_merging(pool, density=1.0, scaling_factor=1.0)["w"].tolist() == [5]
    assert fb.methods.ties_merging(pool, density=1.0, scaling_factor=1.0, elect="count")["w"].tolist() == [-3]
    tied = pool_of([0.0], [5.0], [-1.0])  # one vote each: settled by mass
    assert fb.methods.ties_merging(tied, density=1.0, scaling_factor=1.0, elect="count")["w"].tolist() == [5]


def test_trimming_the_whole_model_or_each_tensor() -> None:
    base = {"large": torch.zeros(2), "small": torch.zeros(2)}
    model = {"large": torch.tensor([4.0, 3.0]), "small": torch.tensor([0.2, 0.1])}
    pool = fb.ModelPool({"m": model}, base=base)
    whole = fb.methods.ties_merging(pool, density=0.5, scaling_factor=1.0)
    assert (whole["large"].tolist(), whole["small"].tolist()) == ([4, 3], [0, 0])
    each = fb.methods.ties_merging(pool, density=0.5, scaling_factor=1.0, trim="tensor")
    assert each["large"].tolist() == [4, 0]
    torch.testing.assert_close(each["small"], torch.tensor([0.2, 0.0]))


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 20])
def test_a_density_that_is_no_fraction_is_refused(density: float) -> None:
    """Pitfall B18: a density of 20 is not 20 %, and 100 is not everything."""
    with pytest.raises(fb.InputError, match="density must be in"):
        ties(density=density)


def reference(base: np.ndarray, models: np.ndarray, density: float, scaling_factor: float, merge: str) -> np.ndarray:
    """TIES in float64, by sorting: independent of everything in the package."""
    vectors = (models.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
    keep = max(1, round(density * base.size))
    for row in vectors:
        row[np.abs(row) < np.sort(np.abs(row))[-keep]] = 0
    sign = np.sign(vectors.sum(0))
    vectors = np.where(vectors * sign > 0, vectors, 0)
    total = vectors.sum(0)
    if merge == "mean":
        total = total / np.maximum((vectors != 0).sum(0), 1)
    if merge == "max":
        total = np.abs(vectors).max(0) * sign
    return base + scaling_factor * total


@settings(deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(2, 5), st.integers(1, 40)), elements=st.integers(-20, 20).map(np.float32)),
    st.floats(0.01, 1),
    st.sampled_from(["sum", "mean", "max"]),
)
def test_ties_equals_float64(rows: np.ndarray, density: float, merge: str) -> None:
    # Integers: sums are exact, so that an election cannot hang on rounding, and ties at the threshold abound.
    pool = pool_of(*rows.tolist())
    merged = fb.methods.ties_merging(pool, density=density, scaling_factor=0.5, merge=merge)["w"]
    expected = reference(rows[0].astype(np.float64), rows[1:], density, 0.5, merge)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_threshold_counted_in_blocks_is_that_of_sorting(density: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    shapes = {"a": (700, 900), "b": (3,), "c": (1, 5, 7), "d": (0, 4)}  # 'a' is several blocks
    base = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    models = {f"m{i}": {n: t + 0.01 * torch.randn(t.shape).to(dtype) for n, t in base.items()} for i in range(3)}
    pool = fb.ModelPool(models, base=base)
    thresholds = fuse.threshold(pool, density)
    for threshold, model in zip(thresholds.tolist(), models.values(), strict=True):
        magnitudes = torch.cat([(model[n].float() - base[n].float()).abs().flatten() for n in base])
        keep = round(density * len(magnitudes))
        if density == 1:
            assert threshold == 0
        else:
            assert threshold == magnitudes.sort(descending=True).values[keep - 1]
            assert (magnitudes >= threshold).sum() >= keep > (magnitudes > threshold).sum()


def test_trimming_float64_keeps_as_many_as_it_should() -> None:
    torch.manual_seed(0)
    pool = fb.ModelPool(
        {f"m{i}": {"w": torch.randn(1000, dtype=torch.float64)} for i in range(20)},
        base={"w": torch.zeros(1000, dtype=torch.float64)},
    )
    vectors = torch.stack([model["w"] for model in pool.values()])
    kept = (ops.trim(vectors, torch.from_numpy(fuse.threshold(pool, 0.25))) != 0).sum(1)
    assert kept.tolist() == [250] * 20


def test_tied_weights_and_integers_do_not_move_the_threshold() -> None:
    """Pitfalls B17 and B18: counting an embedding twice, or a counter at all, shifts the global percentile."""
    models, base = {"a": small_model(1), "b": small_model(2)}, small_model(0)
    pool = fb.ModelPool(models, base=base)
    parameters = [n for n, spec in pool.reference.specs.items() if spec.floating]
    assert "embed.weight" in parameters and "head.weight" not in parameters
    assert "norm.num_batches_tracked" not in parameters
    thresholds = fuse.threshold(pool, 0.2)
    vector = torch.cat([(pool["a"][n] - pool.require_base()[n]).abs().flatten() for n in parameters])
    assert thresholds.tolist()[0] == vector.sort(descending=True).values[round(0.2 * len(vector)) - 1]
