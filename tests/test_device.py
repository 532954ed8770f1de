"""The passes on a device of torch give the bits of the reference: on the processor, and on a GPU where there is one."""

import numpy as np
import pytest
import torch

import fusionbench as fb
from fusionbench.passes import Block, Combination, Selection, reference
from fusionbench.passes.device import OnDevice

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return request.param


def drawn(numbers: np.random.Generator, count: int, elements: int) -> list[Block]:
    found = []
    for dtype in numbers.choice(list(SIZES), count):
        values = numbers.normal(size=elements) * 10.0 ** numbers.integers(-6, 4, elements)
        found.append((reference.encode(values, str(dtype)), str(dtype)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_pass_gives_the_same_bits(device: str, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    columns, models = (1, 7, 300)[seed // 2 % 3], int(numbers.integers(1, 6))
    elements = columns * int(numbers.integers(0, 3000 // columns))
    blocks, there = drawn(numbers, models + 1, elements), OnDevice(device)
    selection = Selection(
        low=numbers.random(models).astype(np.float32),
        high=(1 + 5 * numbers.random(models)).astype(np.float32),
        keys=numbers.integers(0, 2**64, models, np.uint64),
        chances=np.sort(numbers.random((models, columns) if seed % 2 else models) * 2**32).astype(np.uint64),
        least_variance=float(numbers.choice([0, 0.01])),
    )
    for dtype, size in SIZES.items():
        ours, theirs = np.empty(elements * size, np.uint8), np.empty(elements * size, np.uint8)
        weights = numbers.normal(size=models)
        assert there.weighted_sum(blocks, 0.9, weights, 3.0, ours, dtype) == reference.weighted_sum(
            blocks, 0.9, weights, 3.0, theirs, dtype
        )
        assert np.array_equal(ours, theirs)
        for elect in ("none", "mass", "count"):
            for combine in ("sum", "mean", "max"):
                factors, shares = numbers.normal(size=models), numbers.random(models)
                how = Combination(
                    factors,
                    shares,
                    elect=elect,
                    combine=combine,
                    scaling=0.7,
                    on_tie=float(seed % 2),
                    divide=seed % 3 > 0,
                )
                assert there.masked_merge(blocks, selection, 17, how, ours, dtype) == reference.masked_merge(
                    blocks, selection, 17, how, theirs, dtype
                )
                assert np.array_equal(ours, theirs)
    counts, _ = reference.histogram(blocks, None, selection, 5, variance=False)
    assert np.array_equal(there.histogram(blocks, None, selection, 5)[0], counts)
    high = counts.argmax(1)
    low, _ = reference.histogram(blocks, high, selection, 5, variance=False)
    assert np.array_equal(there.histogram(blocks, high, selection, 5)[0], low)
    variances, _ = reference.histogram(blocks, None, selection, 5, variance=True)
    assert np.array_equal(there.histogram(blocks, None, selection, 5, variance=True)[0], variances)


def test_nan_and_overflow_are_seen(device: str) -> None:
    out = np.empty(8, np.uint8)
    for values, dtype in (([1.0, np.nan], "F32"), ([1.0, np.inf], "F32"), ([1.0, 1e39], "F64")):
        block = (reference.encode(np.array(values), dtype), dtype)
        assert not OnDevice(device).weighted_sum([block], 1.0, np.zeros(0), 1.0, out, "F32")


@pytest.mark.parametrize("method", ["simple_average", "task_arithmetic", "ties_merging"])
def test_a_merge_on_the_device_is_the_merge(device: str, method: str) -> None:
    torch.manual_seed(0)
    states = [{"w": torch.randn(300, 1000).half(), "b": torch.randn(7)} for _ in range(4)]
    pool = fb.ModelPool(dict(zip("abc", states[1:], strict=True)), base=states[0])
    here = dict(getattr(fb.methods, method)(pool))
    pool.device = device if device == "cuda" else torch.device("cpu", 0)  # of the processor, the passes in torch
    there = dict(getattr(fb.methods, method)(pool))
    assert all(here[name].equal(there[name]) for name in here)
