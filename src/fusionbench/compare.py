"""Two results on the same examples: how much of their difference is more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusionbench.errors import InputError
from fusionbench.results import Result

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusionbench.task import Outcomes

SAMPLES = 10_000
LEVEL = 0.95
NUMBERS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Comparison:
    """The primary scores of two results on one task, or their averages.

    Attributes:
        task: its name, or "average".
        a, b: the scores.
        low, high: bounds of the difference `b - a`: 95 % of what other examples of the same kind would give.
        examples: how many there are.
    """

    task: str
    a: float
    b: float
    low: float
    high: float
    examples: int

    @property
    def difference(self) -> float:
        """How much better b is than a."""
        return self.b - self.a

    @property
    def certain(self) -> bool:
        """Whether zero is outside the interval."""
        return not self.low <= 0 <= self.high


def compare(a: Result, b: Result, *, samples: int = SAMPLES, seed: int = 0) -> list[Comparison]:
    """Compare two results task by task, and on average, by a paired bootstrap over examples (Efron, 1979).

    Both are scored on the same examples, drawn with replacement `samples` times; of the differences, the middle 95 %
    (percentiles) are the interval. Tasks are drawn for themselves; the average is over the tasks that both have.

    Raises:
        InputError: where they share no task, or a task's data are not the same.
    """
    mine, others = a.outcomes(), b.outcomes()
    tasks = [task for task in mine if task in others]
    if not tasks:
        raise InputError(f"'{a.key}' and '{b.key}' have no task in common whose examples were kept.")
    found, drawn = [], []
    generator = np.random.default_rng(seed)
    for task in tasks:
        data = [result.report["run"]["taskpool"][task] for result in (a, b)]
        if data[0] != data[1]:
            raise InputError(f"'{task}' is not the same task in both: their data, prompts or versions differ.")
        first, second = a.report[task][a.primary[task]], b.report[task][b.primary[task]]
        differences = bootstrap(mine[task], others[task], samples, generator)
        low, high = _interval(differences)
        found.append(Comparison(task, first, second, low, high, len(next(iter(mine[task].values())))))
        drawn.append(differences)
    low, high = _interval(np.mean(drawn, axis=0))
    a_mean, b_mean = (sum(getattr(one, side) for one in found) / len(found) for side in ("a", "b"))
    return [*found, Comparison("average", a_mean, b_mean, low, high, sum(one.examples for one in found))]


def bootstrap(a: Outcomes, b: Outcomes, samples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """The differences of the primary scores, `b - a`, on `samples` draws of the same examples: `(samples,)`."""
    if set(a) != set(b):
        raise InputError(f"What was kept of every example is {', '.join(a)} in one, {', '.join(b)} in the other.")
    if "correct" in a:
        changes = b["correct"].astype(int) - a["correct"].astype(int)
        values, counts = np.unique(changes, return_counts=True)  # at most three: drawn all at once
        return generator.multinomial(len(changes), counts / len(changes), samples) @ values / len(changes)
    count = len(next(iter(a.values())))
    if "written" in a:
        draws = (generator.integers(count, size=count) for _ in range(samples))
        return np.array([_rho(b, drawn) - _rho(a, drawn) for drawn in draws])
    found = []
    for start in range(0, samples, most := max(1, NUMBERS_AT_ONCE // count)):
        times = generator.multinomial(count, np.full(count, 1 / count), min(most, samples - start)).astype(float)
        found.append(_of_sums(b, times) - _of_sums(a, times))
    return np.concatenate(found)


def score_of(outcomes: Outcomes) -> float:
    """The primary score that what came of every example amounts to."""
    count = len(next(iter(outcomes.values())))
    if "written" in outcomes:
        return _rho(outcomes, np.arange(count))
    return float(_of_sums(outcomes, np.ones((1, count)))[0])


def _of_sums(outcomes: Outcomes, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores that are made of sums over examples, of which each is there so many times, `(samples, examples)`."""
    sums = {name: np.tensordot(times, array.astype(float), 1) for name, array in outcomes.items()}
    if "correct" in sums or "value" in sums:
        return sums["correct" if "correct" in sums else "value"] / times.shape[1]
    if "near" in sums:
        return sums["near"] / sums["known"]
    if "log_probability" in sums:  # the mean probability of a word or a byte: one over the perplexity
        return np.exp(sums["log_probability"] / sums["length"])
    if "confusion" in sums:
        return mean_iou(sums["confusion"])
    raise InputError(f"No score is known that is made of {', '.join(outcomes)}.")


def mean_iou(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean intersection over union of the classes that occur, of matrices `(..., truth, predicted)`."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - right
    return (right / np.maximum(union, 1)).sum(-1) / (union > 0).sum(-1)


def _rho(outcomes: Outcomes, drawn: NDArray[np.int64]) -> float:
    from fusionbench.tasks.text_generation import spearman

    return spearman(np.nan_to_num(outcomes["written"][drawn]), outcomes["right"][drawn])


def _interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
