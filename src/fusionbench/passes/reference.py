"""The passes in numpy: what they mean, bit for bit. Where the compiled core is missing, they run like this.

Values are read exactly, differences and sums are float64, and a result is rounded once, to nearest even. A difference
is compared in float32: its magnitude, read as an integer of 31 bits, is in the order of its size. Numbers that are not
finite give no warnings: every pass says whether it met any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float64]
Block = tuple[Bytes, str]
"""Elements of a tensor: bytes as a file holds them, and the dtype under safetensors' name."""

LANES = 16  # sums run over the elements i, i + 16, i + 32 ... apart, as the vectors of the compiled core
LOW_BITS = 16  # of a magnitude's 31: they are counted in two passes, first the 15 high ones
ALWAYS = 2**32  # the chance of what is kept in any case
FEWEST = 1e-8  # weights that sum to less are not divided by
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def _each(value: float, dtype: type) -> NDArray:
    return np.array([value], dtype)


@dataclass(frozen=True)
class Selection:
    """What is left of the models' differences from the base; everything by default.

    Attributes:
        low, high: magnitudes below or above are dropped: float32, one for each model, or one for all.
        keys, chances: an element is kept if 32 random bits, from a stream with this key, are below its chance, of
            2**32: uint64, one for each model or one for all. Chances may be by rank, `(models or 1, columns)`: the
            first is that of the smallest magnitude in each row of so many elements (of equals, the first is smaller),
            and none is below the one before it. Blocks are then made of whole rows.
        least_variance: elements are dropped whose variance over the models is below; 0 drops none.
    """

    low: NDArray[np.float32] = field(default_factory=lambda: _each(0, np.float32))
    high: NDArray[np.float32] = field(default_factory=lambda: _each(np.inf, np.float32))
    keys: NDArray[np.uint64] = field(default_factory=lambda: _each(0, np.uint64))
    chances: NDArray[np.uint64] = field(default_factory=lambda: _each(ALWAYS, np.uint64))
    least_variance: float = 0.0


@dataclass(frozen=True)
class Combination:
    """How what is selected becomes one.

    Attributes:
        factors: what each model's differences are multiplied by.
        divide: whether they are divided by their chances, where these are by rank.
        weights: of each model, in the divisor of a mean.
        elect: whose signs count: all; that of the sum (mass); or that of most models (count), and of the sum where as
            many are against it.
        on_tie: the sign where the sum is zero: 0, with which nobody agrees, or 1.
        combine: the sum; the sum divided by the weights of what is in it; or the largest, the first of equals.
        scaling: of the combination.
    """

    factors: Numbers
    weights: Numbers
    divide: bool = True
    elect: Literal["none", "mass", "count"] = "none"
    on_tie: float = 0.0
    combine: Literal["sum", "mean", "max"] = "sum"
    scaling: float = 1.0


@np.errstate(all="ignore")
def weighted_sum(
    blocks: Sequence[Block], scale: float, coefficients: Numbers, divisor: float, out: Bytes, dtype: str
) -> bool:
    """Write `scale * first + (sum_i coefficients[i] * (other_i - first)) / divisor`; whether all is finite.

    As differences from the first: copies of one model give just that model, in every dtype.
    """
    first, *others = (decode(*block) for block in blocks)
    total = np.zeros(len(first))
    for coefficient, other in zip(coefficients, others, strict=True):
        total += coefficient * (other - first)
    if divisor != 1:
        total /= divisor
    return write(scale * first + total, out, dtype) and _finite(blocks)


@np.errstate(all="ignore")
def masked_merge(
    blocks: Sequence[Block], selection: Selection, offset: int, combination: Combination, out: Bytes, dtype: str
) -> bool:
    """Write `first + scaling * combined`, of what is selected of the others' differences; whether all is finite.

    Args:
        blocks: the base, then the models.
        selection: of the differences.
        offset: number of the blocks' first element in its tensor, from which random bits are counted.
        combination: of what is selected.
        out: bytes to write to.
        dtype: of what is written.
    """
    c = combination
    kept, values = selected(blocks, selection, offset)
    values = c.factors[:, None] * values
    if c.divide and selection.chances.ndim == 2:
        chances = chances_by_rank(selection, magnitudes(blocks))
        values = values * (ALWAYS / np.maximum(chances, 1).astype(np.float64))
    values = np.where(kept, values, 0.0)
    if c.elect != "none":
        sign = _sign(_sum(values))
        sign = np.where(sign == 0, c.on_tie, sign)
        if c.elect == "count":
            votes = _sign(_sum(_sign(values)))
            sign = np.where(votes == 0, sign, votes)
        values = np.where(values * sign > 0, values, 0.0)
    if c.combine == "max":
        largest = np.abs(values).argmax(0)
        merged = np.take_along_axis(values, largest[None], 0)[0]
    else:
        merged = _sum(values)
    if c.combine == "mean":
        divisor = _sum(np.where(values != 0, c.weights[:, None], 0.0))
        merged = merged / np.where(np.abs(divisor) < FEWEST, 1.0, divisor)
    return write(decode(*blocks[0]) + c.scaling * merged, out, dtype) and _finite(blocks)


@np.errstate(all="ignore")
def products(blocks: Sequence[Block], selection: Selection | None, offset: int) -> tuple[Numbers, bool]:
    """Dot products of every two, `(models, models)`, and whether all is finite.

    With a selection, of the others' differences from the first block; without one, of the blocks themselves, which are
    then all models.
    """
    if selection is None:
        values = np.stack([decode(*block) for block in blocks])
    else:
        kept, values = selected(blocks, selection, offset)
        values = np.where(kept, values, 0.0)
    gram = np.array([[_lane_sum(a * b) for b in values] for a in values])
    return gram, _finite(blocks)


@np.errstate(all="ignore")
def sums(blocks: Sequence[Block], selection: Selection, offset: int) -> tuple[Numbers, bool]:
    """Sums of the magnitudes of all differences from the first, and of those selected: `(2, models)`.

    And whether all is finite.
    """
    kept, values = selected(blocks, selection, offset)
    found = [[_lane_sum(np.abs(row)) for row in rows] for rows in (values, np.where(kept, values, 0.0))]
    return np.array(found), _finite(blocks)


@np.errstate(all="ignore")
def histogram(
    blocks: Sequence[Block], prefixes: NDArray[np.int64] | None, selection: Selection, offset: int, *, variance: bool
) -> tuple[NDArray[np.int64], bool]:
    """Count the magnitudes of what is selected at random of the differences from the first; whether all is finite.

    Args:
        blocks: the base, then the models.
        prefixes: None, to count the 15 high bits, `(models, 2**15)`; or the high bits of each model whose 16 low ones
            are to be counted, `(models, 2**16)`.
        selection: of which thresholds are not looked at.
        offset: number of the blocks' first element in its tensor.
        variance: count the variances over the models instead, in one row.
    """
    if variance:
        bits = _variance(blocks)[None].view(np.uint32)
        kept = np.ones(bits.shape, bool)
    else:
        bits = magnitudes(blocks)
        kept = np.broadcast_to(_kept_at_random(selection, offset, bits), bits.shape)
    counts = []
    for i, (row, keep) in enumerate(zip(bits, kept, strict=True)):
        row = row[keep]
        if prefixes is None:
            counts.append(np.bincount(row >> LOW_BITS, minlength=2 ** (31 - LOW_BITS)))
        else:
            low = row[row >> LOW_BITS == prefixes[i]] & (2**LOW_BITS - 1)
            counts.append(np.bincount(low, minlength=2**LOW_BITS))
    return np.stack(counts), _finite(blocks)


@np.errstate(all="ignore")
def between(
    blocks: Sequence[Block],
    first: NDArray[np.uint32],
    last: NDArray[np.uint32],
    selection: Selection,
    offset: int,
    *,
    room: int,
) -> tuple[list[list[NDArray[np.uint32]]] | None, NDArray[np.int64], bool]:
    """Magnitudes between bounds, as integers, of what is selected at random of the differences from the first.

    Args:
        blocks: the base, then the models.
        first, last: the bounds, which are included: `(pairs of bounds, models)`.
        selection: of which thresholds are not looked at.
        offset: number of the blocks' first element in its tensor.
        room: the most that may be found of one model between two bounds.

    Returns:
        For each pair of bounds and each model what was found, in order, or None if there are too many; how many are
        above the bounds, of the shape of these; and whether all is finite.
    """
    bits = magnitudes(blocks)
    kept = np.broadcast_to(_kept_at_random(selection, offset, bits), bits.shape)
    rows = [row[keep] for row, keep in zip(bits, kept, strict=True)]
    found = [
        [row[(row >= a) & (row <= b)] for row, a, b in zip(rows, *ends, strict=True)]
        for ends in zip(first, last, strict=True)
    ]
    above = np.array([[np.count_nonzero(row > b) for row, b in zip(rows, end, strict=True)] for end in last])
    fits = all(len(row) <= room for of_bounds in found for row in of_bounds)
    return found if fits else None, above.reshape(last.shape), _finite(blocks)


def chances_by_rank(selection: Selection, bits: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The chance of every element, by the rank of its magnitude in its row: `(models, elements)`."""
    columns = selection.chances.shape[1]
    rows = bits.reshape(len(bits), -1, columns)
    found = np.empty(rows.shape, np.uint64)
    order = np.argsort(rows, axis=2, kind="stable")
    np.put_along_axis(found, order, np.broadcast_to(selection.chances[:, None], rows.shape), 2)
    return found.reshape(bits.shape)


def random_bits(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """32 random bits for each element from `start`: SplitMix64's, of which any can be had without the others."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.uint64(key) + index * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)


def magnitudes(blocks: Sequence[Block]) -> NDArray[np.uint32]:
    """Magnitudes of the differences from the first block, as integers: `(models, elements)`."""
    first, *others = (decode(*block) for block in blocks)
    return np.stack([(x - first).astype(np.float32) for x in others]).view(np.uint32) & _MAGNITUDE


def selected(blocks: Sequence[Block], selection: Selection, offset: int) -> tuple[NDArray[np.bool_], Numbers]:
    """What of the differences from the first block is selected, and all of them: both `(models, elements)`."""
    first, *others = (decode(*block) for block in blocks)
    bits = magnitudes(blocks)
    size = bits.view(np.float32)
    kept = (size >= selection.low[:, None]) & (size <= selection.high[:, None])
    kept &= _kept_at_random(selection, offset, bits)
    if selection.least_variance > 0:
        kept &= _variance(blocks) >= np.float32(selection.least_variance)
    return kept, np.stack([x - first for x in others])


def decode(data: Bytes, dtype: str) -> Numbers:
    """The numbers in bytes, exactly."""
    if dtype == "BF16":  # the upper half of a float32
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in _LARGEST:
        values = _GRIDS[dtype].copy()
        values[_LARGEST[dtype] + 1 :] = np.nan
        if dtype == "F8_E5M2":
            values[_LARGEST[dtype] + 1] = np.inf
        return np.concatenate([values, -values])[data]
    return data.view(_numpy(dtype)).astype(np.float64)


def encode(values: Numbers, dtype: str) -> Bytes:
    """Numbers as bytes, each rounded once, to nearest even."""
    with np.errstate(all="ignore"):
        if dtype in _LARGEST:
            return _encode_f8(values, dtype)
        if dtype != "BF16":
            return values.astype(_numpy(dtype)).view(np.uint8)
        # Rounded to odd first, so that the second rounding goes where one alone would.
        near = values.astype(np.float32)
        bits = near.view(np.uint32)
        exact = near.astype(np.float64)
        bits = bits - (np.abs(exact) > np.abs(values))
        bits = np.where((exact != values) & ~np.isnan(values), bits | 1, bits).astype(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).view(np.uint8)


def _encode_f8(values: Numbers, dtype: str) -> Bytes:
    codes = _LARGEST[dtype] + 2
    middles = (_GRIDS[dtype][1:codes] + _GRIDS[dtype][: codes - 1]) / 2
    below, above = (np.searchsorted(middles, np.abs(values), side) for side in ("left", "right"))
    code = np.where(below % 2 == 0, below, above)  # they differ in the middle of two, of which one is even
    return (np.where(np.isnan(values), 0x7F, code) | np.signbit(values) << 7).astype(np.uint8)


def _grid(exponent_bits: int, mantissa_bits: int) -> Numbers:
    """Numbers of 8 bits in order, from zero, if all exponents were those of finite numbers."""
    exponent, mantissa = np.divmod(np.arange(128), 2**mantissa_bits)
    mantissa = np.where(exponent > 0, mantissa + 2**mantissa_bits, mantissa)
    smallest = 2 - 2 ** (exponent_bits - 1) - mantissa_bits
    return np.ldexp(mantissa.astype(np.float64), np.maximum(exponent, 1) - 1 + smallest)


_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_GRIDS = {"F8_E4M3": _grid(4, 3), "F8_E5M2": _grid(5, 2)}
_LARGEST = {"F8_E4M3": 126, "F8_E5M2": 123}  # the codes of the largest finite numbers; E4M3 has no infinity


def _numpy(dtype: str) -> type:
    if dtype not in _NUMPY:
        raise ValueError(f"Passes are made over {', '.join([*_NUMPY, 'BF16', *_LARGEST])}, not over {dtype!r}.")
    return _NUMPY[dtype]


def write(values: Numbers, out: Bytes, dtype: str) -> bool:
    """Encode numbers where they belong; whether the result is finite."""
    out[:] = encode(values, dtype)
    return bool(np.isfinite(decode(out, dtype)).all())


def _finite(blocks: Sequence[Block]) -> bool:
    return all(bool(np.isfinite(decode(*block)).all()) for block in blocks)


def _kept_at_random(selection: Selection, offset: int, bits: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Of magnitudes of these bits, which are kept: `(models, elements)`, or one row for all models."""
    chances, count = selection.chances, bits.shape[1]
    if chances.ndim == 1 and (chances >= ALWAYS).all():
        return np.ones((1, count), bool)
    random = np.stack([random_bits(int(key), offset, count) for key in selection.keys])
    return random < (chances_by_rank(selection, bits) if chances.ndim == 2 else chances[:, None])


def _variance(blocks: Sequence[Block]) -> NDArray[np.float32]:
    """Over the models, of the differences from the first block."""
    first, *others = (decode(*block) for block in blocks)
    differences = [x - first for x in others]
    mean = _sum(differences) / len(differences)
    return (_sum([(d - mean) * (d - mean) for d in differences]) / len(differences)).astype(np.float32)


def _sum(values: Sequence[Numbers] | Numbers) -> Numbers:
    """Over models, one after the other."""
    total = np.zeros(len(values[0]))
    for value in values:
        total = total + value
    return total


def _sign(values: Numbers) -> Numbers:
    return (values > 0).astype(np.float64) - (values < 0)


def _lane_sum(values: Numbers) -> float:
    lanes = np.add.reduce(np.pad(values, (0, -len(values) % LANES)).reshape(-1, LANES), axis=0, initial=0.0)
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])
