"""The passes that every static merge is made of: weighted sum, masked merge, products, sums, magnitudes.

They work on blocks of bytes, as files hold them, without torch and without the interpreter's lock. The compiled core
and `fusionbench.passes.reference`, which runs where the core is missing, give the same bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusionbench.passes import reference
from fusionbench.passes.reference import ALWAYS, LOW_BITS, Block, Bytes, Combination, Numbers, Selection

try:
    from fusionbench import _core  # pyright: ignore[reportMissingModuleSource] (it is compiled)
except ImportError:
    _core = None
else:
    _core.choose(os.environ.get("FUSIONBENCH_CORE_ARCH", ""))

__all__ = [
    "ALWAYS",
    "LOW_BITS",
    "Block",
    "Combination",
    "Selection",
    "between",
    "histogram",
    "masked_merge",
    "products",
    "sums",
    "weighted_sum",
]

ELECT = {"none": 0, "mass": 1, "count": 2}
COMBINE = {"sum": 0, "mean": 1, "max": 2}
RARE = {"F8_E4M3", "F8_E5M2"}  # the reference is enough for them


def weighted_sum(
    blocks: Sequence[Block], scale: float, coefficients: Numbers, divisor: float, out: Bytes, dtype: str
) -> bool:
    core = _core_for(blocks, dtype)
    if core is None:
        return reference.weighted_sum(blocks, scale, coefficients, divisor, out, dtype)
    return core.weighted_sum(blocks, scale, coefficients, divisor, out, dtype)


def masked_merge(
    blocks: Sequence[Block], selection: Selection, offset: int, combination: Combination, out: Bytes, dtype: str
) -> bool:
    core = _core_for(blocks, dtype)
    if core is None:
        return reference.masked_merge(blocks, selection, offset, combination, out, dtype)
    c = combination
    numbers = (c.factors, c.weights, c.divide, ELECT[c.elect], c.on_tie, COMBINE[c.combine], c.scaling)
    return core.masked_merge(blocks, *_arrays(selection), offset, *numbers, out, dtype)


def products(blocks: Sequence[Block], selection: Selection | None, offset: int = 0) -> tuple[Numbers, bool]:
    core = _core_for(blocks)
    if core is None:
        return reference.products(blocks, selection, offset)
    models = len(blocks) - (selection is not None)
    gram = np.empty((models, models))
    return gram, core.products(blocks, selection is not None, *_arrays(selection or Selection()), offset, gram)


def sums(blocks: Sequence[Block], selection: Selection, offset: int = 0) -> tuple[Numbers, bool]:
    core = _core_for(blocks)
    if core is None:
        return reference.sums(blocks, selection, offset)
    found = np.empty((2, len(blocks) - 1))
    return found, core.sums(blocks, *_arrays(selection), offset, *found)


def histogram(
    blocks: Sequence[Block],
    prefixes: NDArray[np.int64] | None,
    selection: Selection,
    offset: int = 0,
    *,
    variance: bool = False,
    counts: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], bool]:
    if counts is None:
        high = prefixes is None
        counts = np.zeros((1 if variance else len(blocks) - 1, 2 ** (31 - LOW_BITS if high else LOW_BITS)), np.int64)
    core = _core_for(blocks)
    if core is None:
        found, finite = reference.histogram(blocks, prefixes, selection, offset, variance=variance)
        counts += found
        return counts, finite
    return counts, core.histogram(blocks, prefixes, selection.keys, selection.chances, offset, variance, counts)


def between(
    blocks: Sequence[Block],
    first: NDArray[np.uint32],
    last: NDArray[np.uint32],
    selection: Selection,
    offset: int = 0,
    *,
    room: int,
) -> tuple[list[list[NDArray[np.uint32]]] | None, NDArray[np.int64], bool]:
    core = _core_for(blocks)
    if core is None:
        return reference.between(blocks, first, last, selection, offset, room=room)
    rows = np.empty((first.size, room), np.uint32)
    within, above = np.empty(first.shape, np.int64), np.empty(first.shape, np.int64)
    finite = core.between(blocks, first, last, selection.keys, selection.chances, offset, rows, within, above)
    if within.max(initial=0) > room:
        return None, above, finite
    found = [row[:count].copy() for row, count in zip(rows, within.flat, strict=True)]
    models = len(blocks) - 1
    return [found[i : i + models] for i in range(0, len(found), models)], above, finite


for _name in ("weighted_sum", "masked_merge", "products", "sums", "histogram", "between"):
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
histogram.__doc__ = f"{histogram.__doc__}        counts: are added to, where they are given.\n    "


def _core_for(blocks: Sequence[Block], out: str = "") -> Any:
    if _core is None:
        _warn()
        return None
    return None if out in RARE or any(dtype in RARE for _, dtype in blocks) else _core


@cache
def _warn() -> None:
    logging.getLogger(__name__).warning(
        "The compiled core is missing: merges give the same results, more slowly. Install the package with a compiler "
        "at hand, or a wheel of it."
    )


def _arrays(selection: Selection) -> tuple[NDArray, NDArray, NDArray, NDArray, float]:
    return selection.low, selection.high, selection.keys, selection.chances, selection.least_variance
