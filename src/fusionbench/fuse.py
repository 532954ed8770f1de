"""What static merges are made of: one pass over every parameter, and before it, where numbers are needed, a reduction.

A merge is `pool.fuse(...)` of a pass, or of a function that looks at a parameter and says which pass it is:

    pool.fuse(TaskVectors([0.3] * len(pool)))
    pool.fuse(lambda p: Models(slerp_weights(products(p))))

Nothing here needs torch; everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusionbench.dtypes import as_float64
from fusionbench.errors import InputError
from fusionbench.formats import DTYPES
from fusionbench.param import Param
from fusionbench.passes import ALWAYS, Bytes, Combination, Numbers, Selection
from fusionbench.passes.reference import write
from fusionbench.ranks import Selected, chosen_for, largest, value_of_rank

if TYPE_CHECKING:
    from fusionbench.pool import ModelPool

T = TypeVar("T")

__all__ = ["Combination", "Selection", "largest", "value_of_rank"]
Over = Literal["average", "task_arithmetic", "ties"]
Merge = Literal["sum", "mean", "max"]
MOST = 10**6  # whole numbers up to here, times elements of float32, are exact in float64
Weights = list[float] | dict[str, float] | None


class Pass(Protocol):
    """A merge of blocks, each element of the same elements of the inputs, or of their rows."""

    @property
    def base(self) -> bool:
        """Whether it needs the base model."""
        ...

    @property
    def columns(self) -> int:
        """The length of the rows that its blocks are made of: 1, where they may begin and end anywhere."""
        ...

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        """Write the merge of a block; whether inputs and result are finite."""
        ...


@dataclass(frozen=True)
class Models:
    """The models' weighted sum: `sum_i weights[i] * model_i / divisor`; copies of a model give that model."""

    weights: Sequence[float]
    divisor: float = 1.0
    base: bool = field(default=False, init=False)
    columns: int = field(default=1, init=False)

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        weights, divisor = as_decimals(tuple(self.weights), self.divisor)
        scale = math.fsum(weights) / divisor
        scale = 1.0 if abs(scale - 1) < 1e-14 else scale  # one, not one but for rounding
        return p.passes.weighted_sum(p.blocks(base=False), scale, np.array(weights[1:]), divisor, out, dtype)


@dataclass(frozen=True)
class TaskVectors:
    """The base and the weighted sum of the task vectors: `base + sum_i weights[i] * (model_i - base) / divisor`."""

    weights: Sequence[float]
    divisor: float = 1.0
    base: bool = field(default=True, init=False)
    columns: int = field(default=1, init=False)

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        weights, divisor = as_decimals(tuple(self.weights), self.divisor)
        return p.passes.weighted_sum(p.blocks(base=True), 1.0, np.array(weights), divisor, out, dtype)


@dataclass(frozen=True)
class Masked:
    """The base and a combination of what is selected of the task vectors: see `Selection` and `Combination`."""

    selection: Selection
    combination: Combination
    base: bool = field(default=True, init=False)

    @property
    def columns(self) -> int:
        return columns_of(self.selection)

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        return p.passes.masked_merge(p.blocks(base=True), self.selection, p.start, self.combination, out, dtype)


@dataclass(frozen=True)
class Elementwise:
    """Any function of the base and the models, `(1 + models, elements)` or `(models, elements)`, in numpy.

    With `columns`, of whole rows of so many elements.
    """

    function: Callable[[Numbers], Numbers]
    base: bool = True
    columns: int = 1

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        return by_parts(self._run, p, out, dtype, self.columns)

    def _run(self, p: Param, out: Bytes, dtype: str) -> bool:
        values = np.stack([as_float64(block) for block in p.blocks(base=self.base)])
        return write(self.function(values), out, dtype) and bool(np.isfinite(values).all())


@lru_cache(maxsize=16)  # blocks of one parameter ask for the same
def as_decimals(weights: tuple[float, ...], divisor: float) -> tuple[list[float], float]:
    """The same weights as whole numbers, and a divisor, where they are short decimals: 0.3 is 3 / 10.

    A weight of 0.3 means three tenths, which float64 has not. Sums of whole multiples are exact, and there is then one
    division: what is half-way between two numbers of a dtype is rounded as such.
    """
    numbers = [float(number) for number in (*weights, divisor)]
    fractions = [Fraction(repr(weight)) for weight in numbers[:-1]] if np.isfinite(numbers).all() else []
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    if not fractions or common > MOST or divisor != int(divisor) or math.isinf(common * max(map(abs, numbers))):
        return [float(weight) for weight in weights], float(divisor)
    return [float(fraction * common) for fraction in fractions], float(divisor * common)


def products(of: Param | ModelPool, selection: Selected = None, *, differences: bool = True) -> Numbers:
    """Dot products of every two task vectors: `(models, models)`.

    Args:
        of: a parameter, or a pool for all its parameters together.
        selection: what is looked at; all by default.
        differences: of the models themselves, where this is false.
    """

    def look(p: Param) -> Numbers:
        chosen = chosen_for(p, selection) if differences else None
        gram, finite = p.passes.products(p.blocks(base=differences), chosen, p.start)
        p.check(finite)
        return gram

    return of.reduce(look)


def sums(p: Param, selection: Selection) -> Numbers:
    """Sums of the magnitudes of each model's task vector, and of what is selected of it: `(2, models)`."""

    def look(part: Param) -> Numbers:
        found, finite = part.passes.sums(part.blocks(base=True), selection, part.start)
        part.check(finite)
        return found

    return p.reduce(look, columns_of(selection))


def restoring(p: Param, selection: Selection) -> Numbers:
    """What to multiply the selected of each task vector by, that its sum of magnitudes is that of all: `(models,)`."""
    before, after = sums(p, selection)
    with np.errstate(all="ignore"):
        return np.where(after > 0, before / after, 1.0)


STATISTICS = ("running_mean", "running_var")
AT_ONCE = 2**16  # elements: passes in numpy make many arrays of what they are given


def by_parts(run: Callable[[Param, Bytes, str], bool], p: Param, out: Bytes, dtype: str, columns: int = 1) -> bool:
    """A pass over some elements at a time, of whole rows of so many; whether all is finite."""
    size, finite = DTYPES[dtype], True
    for part in p.parts(p.start, p.stop, columns, AT_ONCE):
        finite &= run(part, out[(part.start - p.start) * size : (part.stop - p.start) * size], dtype)
    return finite


def is_statistic(name: str) -> bool:
    """Whether a tensor has a batch norm's running statistics: nothing is dropped of a mean, or of a variance."""
    return name.rpartition(".")[2] in STATISTICS


def columns_of(selection: Selection) -> int:
    """The length of the rows that a selection looks at: 1, where each element is chosen by itself."""
    return selection.chances.shape[1] if selection.chances.ndim == 2 else 1


def threshold(of: Param | ModelPool, density: float, selection: Selected = None) -> NDArray[np.float32]:
    """The magnitude that the largest `density` of each model's task vector reaches: `(models,)`.

    Of n elements, k = round(density * n), at least 1, are to be kept; the threshold is the k-th largest magnitude, so
    that `>= threshold` keeps k elements, and all those equal to the k-th.
    """
    require_fraction("density", density)
    if density == 1 or not of.numel:
        return np.zeros(of.count, np.float32)
    return largest(of, [max(1, round(density * of.numel))], selection)[0]


def require_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} must be in (0, 1], the fraction that is kept; got {value}.")


def require_models(pool: ModelPool, count: int, what: str, advice: str) -> None:
    """An error where a pool has not just so many models."""
    if len(pool) != count:
        models = f"{count} model" if count == 1 else f"{count} models"
        raise InputError(f"{what} {models}, and the pool has {len(pool)} ({', '.join(pool)}): {advice}.")


def chances_of(density: float, models: int) -> NDArray[np.uint64]:
    """For every model, the chance, of 2**32, that an element is kept."""
    require_fraction("density", density)
    return np.full(models, round(density * ALWAYS), np.uint64)


def model_weights(
    pool: ModelPool, weights: Weights, normalize: bool, *, advice: str = "give others"
) -> tuple[list[float], float]:
    """A weight per model, as given in the pool's order or by name, or all equal; and what to divide them by.

    `advice` is for weights that cannot be normalised.
    """
    if weights is None:
        weights = [1.0] * len(pool) if normalize else [1 / len(pool)] * len(pool)
    if isinstance(weights, dict):
        for name in weights:
            pool[name]  # an unknown name is an error
        missing = [name for name in pool if name not in weights]
        if missing:
            raise InputError(f"weights has no number for '{missing[0]}': give one for every model of the pool.")
        weights = [weights[name] for name in pool]
    if len(weights) != len(pool):
        numbers = f"{len(weights)} number{'' if len(weights) == 1 else 's'}"
        models = f"{len(pool)} model{'' if len(pool) == 1 else 's'}"
        raise InputError(f"weights has {numbers}, but the pool has {models}.")
    if not math.isfinite(size := sum(map(abs, weights))):
        raise InputError(f"The magnitudes of weights sum to {size:g}: give finite numbers, and smaller ones.")
    total = sum(weights) if normalize else 1.0
    if abs(total) < 1e-8:
        raise InputError(f"weights sum to {total:g} and cannot be normalised: {advice}.")
    return [float(weight) for weight in weights], float(total)


def combination(models: int, **more: Any) -> Combination:
    """A `Combination` of so many models, whose factors and weights are ones where they are not given."""
    ones = np.ones(models)
    return Combination(**{"factors": ones, "weights": ones, **more})


def combined(over: Over, merge: Merge, models: int, scaling: float, factors: Numbers | None = None) -> Combination:
    """How a method that thins task vectors out merges what is left: as an average does, task arithmetic, or TIES.

    Args:
        over: which of them; only TIES elects signs.
        merge: what TIES does with the values that agree with the sign.
        models: how many there are.
        scaling: of the result.
        factors: what each model's task vector is multiplied by first.
    """
    how: dict[str, Any] = {} if factors is None else {"factors": factors}
    if over == "ties":
        return combination(models, elect="mass", combine=merge, scaling=scaling, **how)
    return combination(models, scaling=scaling / models if over == "average" else scaling, **how)
