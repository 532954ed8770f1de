from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fusionbench.passes.reference import Block, Bytes, Numbers

def choose(architecture: str = "") -> None:
    """Take the passes for baseline, v3 or v4, or the newest the processor can."""

def chosen() -> str: ...
def weighted_sum(
    blocks: Sequence[Block], scale: float, coefficients: Numbers, divisor: float, out: Bytes, dtype: str
) -> bool: ...
def masked_merge(
    blocks: Sequence[Block],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint64],
    least_variance: float,
    offset: int,
    factors: Numbers,
    weights: Numbers,
    divide: bool,
    elect: int,
    on_tie: float,
    combine: int,
    scaling: float,
    out: Bytes,
    dtype: str,
) -> bool: ...
def products(
    blocks: Sequence[Block],
    differences: bool,
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint64],
    least_variance: float,
    offset: int,
    gram: Numbers,
) -> bool: ...
def sums(
    blocks: Sequence[Block],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint64],
    least_variance: float,
    offset: int,
    all: Numbers,
    selected: Numbers,
) -> bool: ...
def histogram(
    blocks: Sequence[Block],
    prefixes: NDArray[np.int64] | None,
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint64],
    offset: int,
    variance: bool,
    counts: NDArray[np.int64],
) -> bool: ...
def between(
    blocks: Sequence[Block],
    first: NDArray[np.uint32],
    last: NDArray[np.uint32],
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint64],
    offset: int,
    found: NDArray[np.uint32],
    within: NDArray[np.int64],
    above: NDArray[np.int64],
) -> bool: ...
