"""The magnitude of a rank among all of a parameter or a model: exact, in blocks, without sorting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fusionbench.param import Param
from fusionbench.passes import LOW_BITS, Selection

if TYPE_CHECKING:
    from fusionbench.pool import ModelPool

Selected = Selection | Callable[[Param], Selection] | None
"""What is looked at: the same of every parameter, or chosen for each, or everything."""
Bits = NDArray[np.uint32]

ALL = 2**31 - 1  # no magnitude has more bits
WHOLE = 2**17  # elements whose magnitudes are all had at once
FEW = 2**12  # values that are sorted sooner than counted
MOST = 2**25  # elements: of more, those near a rank would take too much memory
RUNS = 16, 256  # of which a sample of a parameter and of a model is made, evenly spaced
SHARE = 8  # more than one in so many are not collected
DEVIATIONS = 5  # of a sample's share from that of all: where it is more, elements are counted


def chosen_for(p: Param, selection: Selected) -> Selection:
    return selection(p) if callable(selection) else selection or Selection()


def largest(
    of: Param | ModelPool, ranks: Sequence[int], selection: Selected = None, *, variance: bool = False
) -> NDArray[np.float32]:
    """The magnitudes of these ranks, from 1 for the largest, in each model's task vector: `(len(ranks), models)`.

    Exact: `>=` the k-th largest are k elements, and all that equal the k-th. A sample says which two magnitudes the
    k-th is probably between: in one pass over blocks those between are collected, and those above counted. Where they
    are too many, or it is not between them, bit patterns are counted in two passes.

    With `variance`, of the variances over the models, in one column. What a selection drops at random is not counted;
    its thresholds are not looked at. Where there are fewer elements than a rank, the magnitude is 0.
    """
    found = None if variance else _collected(of, ranks, selection)
    return _counted(of, ranks, selection, variance) if found is None else found


def _collected(of: Param | ModelPool, ranks: Sequence[int], selection: Selected) -> NDArray[np.float32] | None:
    """The magnitudes of these ranks, found among those that are near them; None where they are not."""
    if of.numel > MOST:
        return None
    whole = of.numel <= WHOLE
    bounds = np.array([[[0] * of.count], [[ALL] * of.count]], np.uint32) if whole else _bounds(of, ranks, selection)
    if bounds is None:
        return None

    def look(p: Param) -> list[tuple[list[list[Bits]] | None, NDArray[np.int64]]]:
        room = p.numel if whole else p.numel // SHARE
        near, above, finite = p.passes.between(
            p.blocks(base=True), *bounds, chosen_for(p, selection), p.start, room=room
        )
        p.check(finite)
        return [(near, above)]

    looked = of.reduce(look)
    if any(near is None for near, _ in looked):
        return None
    above = np.sum([above for _, above in looked], axis=0)
    values = np.zeros((len(ranks), of.count), np.uint32)
    for i, rank in enumerate(ranks):
        k = 0 if whole else i
        for m in range(of.count):
            parts = [near[k][m] for near, _ in looked if near is not None]
            near = parts[0] if len(parts) == 1 else np.concatenate(parts)
            place = rank - above[k, m]
            if place < 1 or (place > len(near) and bounds[0, k, m] > 1):
                return None
            if place <= len(near):
                values[i, m] = _of_rank(near, int(place), int(bounds[0, k, m]), int(bounds[1, k, m]))
    return values.view(np.float32)


def _bounds(of: Param | ModelPool, ranks: Sequence[int], selection: Selected) -> Bits | None:
    """Two magnitudes for every rank and model that it is probably between, by a sample: `(2, ranks, models)`."""
    every = np.array([[[0] * of.count], [[ALL] * of.count]], np.uint32)
    count = RUNS[not isinstance(of, Param)]
    parts = list(of.sample(count, max(2**10, of.numel // (128 * count))))
    runs: list[list[Bits]] = []
    for p in parts:
        chosen = chosen_for(p, selection)
        if chosen.chances.ndim == 2:
            return None  # of whole rows only
        near, _, _ = p.passes.between(p.blocks(base=True), *every, chosen, p.start, room=p.numel)
        assert near is not None
        runs.append(near[0])
    sizes = [p.numel for p in parts]
    size = sum(sizes)
    bounds = np.empty((2, len(ranks), of.count), np.uint32)
    for m in range(of.count):
        of_runs = [near[m] for near in runs]
        values = np.sort(np.concatenate(of_runs))

        def of_place(place: float, values: Bits = values) -> int:
            return ALL if place < 1 else int(values[-int(place)]) if place <= len(values) else 0

        for i, rank in enumerate(ranks):
            share = rank / of.numel
            guess = of_place(max(share * size, 1))
            shares = np.array([np.count_nonzero(run > guess) for run in of_runs]) / sizes
            deviation = np.average((shares - share) ** 2, weights=sizes) ** 0.5
            apart = DEVIATIONS * deviation / count**0.5 * size + 2
            first, last = max(of_place(share * size + apart), 1), of_place(share * size - apart)
            low, high = np.searchsorted(values, first, "left"), np.searchsorted(values, last, "right")
            if high - low > size / SHARE:
                return None
            bounds[:, i, m] = first, last
    return bounds


def _of_rank(values: Bits, rank: int, low: int, high: int) -> int:
    """The value of a rank, from 1 for the largest, of values from `low` to `high`: counted in ever finer bins."""
    if len(values) <= FEW:
        return int(np.sort(values)[-rank])
    while low < high:
        shift = max((high - low).bit_length() - 11, 0)
        bins = (values - np.uint32(low)) >> np.uint32(shift)
        reached = np.bincount(bins)[::-1].cumsum()
        place = int(np.searchsorted(reached, rank))
        if place:
            rank -= int(reached[place - 1])
        found = len(reached) - 1 - place
        values, low = values[bins == found], low + (found << shift)
        high = low + (1 << shift) - 1
    return low


def _counted(of: Param | ModelPool, ranks: Sequence[int], selection: Selected, variance: bool) -> NDArray[np.float32]:
    """The magnitudes of these ranks, by counting bit patterns in two passes."""
    counted: dict[bytes, NDArray[np.int64]] = {}

    def count(prefixes: NDArray[np.int64] | None) -> NDArray[np.int64]:
        own = threading.local()  # counts are large: every thread has its own, and adds to them
        found: list[NDArray[np.int64]] = []

        def look(p: Param) -> int:
            given = getattr(own, "counts", None)
            how = {"variance": variance, "counts": given}
            own.counts, finite = p.passes.histogram(
                p.blocks(base=True), prefixes, chosen_for(p, selection), p.start, **how
            )
            if given is None:
                found.append(own.counts)
            p.check(finite)
            return 0

        key = b"" if prefixes is None else prefixes.tobytes()
        if key not in counted:
            of.reduce(look)
            counted[key] = sum(found[1:], start=found[0])
        return counted[key]

    rows = 1 if variance else of.count
    return np.stack([value_of_rank(count, np.full(rows, rank)) for rank in ranks])


def value_of_rank(
    count: Callable[[NDArray[np.int64] | None], NDArray[np.int64]], ranks: NDArray[np.int64]
) -> NDArray[np.float32]:
    """For every row of what is counted, the value of this rank, from 1 for the largest.

    `count(None)` counts the values of every row by the 15 high bits of float32 (their sign is not looked at), and
    `count(prefixes)` those with these high bits by the 16 low ones.
    """
    high, above = _bin_of(count(None), ranks)
    low, _ = _bin_of(count(high), ranks - above)
    return (high << LOW_BITS | low).astype(np.uint32).view(np.float32)


def _bin_of(counts: NDArray[np.int64], rank: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every row of counts, the bin that holds the value of this rank, and how many values are in higher bins."""
    found, above = np.zeros((2, len(counts)), np.int64)
    for i, row in enumerate(counts):
        reached = row[::-1].cumsum()  # values in this bin or higher ones, from the highest bin down
        place = min(np.searchsorted(reached, rank[i]), len(row) - 1)
        found[i], above[i] = len(row) - 1 - place, reached[place] - row[len(row) - 1 - place]
    return found, above
