"""What a page is about: runs, each of one seed or several, and how they belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from fusionbench.errors import InputError
from fusionbench.report.known import reason
from fusionbench.results import NOT_RUN, Result, key_of, label_of

if TYPE_CHECKING:
    from fusionbench.registry import Method

SWEPT = 4
"""So many values of a hyperparameter make a curve."""
REFERENCES = ("pretrained", "individual")


class Group(NamedTuple):
    """What runs must share for their scores to be compared."""

    pool: str
    models: tuple[str, ...] | None
    tasks: str
    corruption: str | None
    severity: int | None


@dataclass(frozen=True)
class Run:
    """A cell's results: one, or one for each seed, of which scores and costs are the mean."""

    number: int
    results: tuple[Result, ...]

    @property
    def cell(self) -> dict[str, Any]:
        return self.results[0].cell

    @property
    def method(self) -> str:
        return self.cell["method"]

    @property
    def failed(self) -> str:
        return self.results[0].failed

    @property
    def facts(self) -> dict[str, Any]:
        """What its scores depend on, and what it cost."""
        return self.results[0].report.get("run", {})

    @property
    def given(self) -> str:
        """The hyperparameters that were given, and whether others were tuned, as text."""
        return label_of({**self.cell, "method": ""}).strip()

    @property
    def label(self) -> str:
        return f"{self.method} {self.given}".strip()

    @property
    def tuned(self) -> bool:
        """Whether hyperparameters were searched on calibration data."""
        return bool(self.cell.get("tune"))

    @cached_property
    def why(self) -> str:
        """Why these hyperparameters were chosen, where it is told."""
        if self.tuned:
            told = self.facts.get("tuned", {})
            return f"the best of {told.get('trials', self.cell['tune'])} trials on {told.get('on', 'calibration')} data"
        return str(self.facts.get("why") or reason(self.cell))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All hyperparameters but the seed."""
        every = self.facts.get("hyperparameters", self.cell.get("hyperparameters", {}))
        return {name: value for name, value in every.items() if name != "seed"}

    @cached_property
    def group(self) -> Group:
        cell = self.cell
        models = cell.get("models")
        pool, tasks = str(cell.get("modelpool")), str(cell.get("tasks", "models"))
        return Group(
            pool, None if models is None else tuple(models), tasks, cell.get("corruption"), cell.get("severity")
        )

    @cached_property
    def scores(self) -> dict[str, float]:
        """The primary score of every task, and their "average"."""
        every = [result.scores for result in self.results]
        return {name: fmean(scores[name] for scores in every) for name in every[0]} if not self.failed else {}

    @property
    def tasks(self) -> list[str]:
        return [name for name in self.scores if name != "average"]

    @property
    def average(self) -> float:
        return self.scores["average"]

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the average over seeds, where there are several."""
        return stdev(result.scores["average"] for result in self.results) if len(self.results) > 1 else None

    @property
    def missing(self) -> str:
        """What stands where its scores would: "failed", or "not run"; empty where there are some."""
        return self.failed if self.failed in ("", NOT_RUN) else "failed"

    @property
    def parameters(self) -> int | None:
        """How many the result has, where it is told."""
        return self.results[0].report.get("model_info", {}).get("all_params")

    def cost(self, what: str) -> float | None:
        """CPU seconds of the fusion ("fusion_seconds"), "added_parameters" or "peak_memory_mb"."""
        runs = [result.report.get("run", {}) for result in self.results]
        is_time = what == "fusion_seconds"
        found = [run.get("cpu_seconds", {}).get("fusion") if is_time else run.get(what) for run in runs]
        known = [value for value in found if value is not None]
        return None if len(known) < len(runs) else known[0] if len(known) == 1 else fmean(known)

    @cached_property
    def is_default(self) -> bool:
        """Whether all hyperparameters are the method's defaults."""
        return not self.tuned and (not self.cell.get("hyperparameters") or not self.changed)

    @cached_property
    def changed(self) -> dict[str, Any]:
        """The hyperparameters that are not the method's defaults."""
        method = _registered(self.method)
        if method is None:
            return self.settings
        known = method.hyperparameters
        return {k: value for k, value in self.settings.items() if k not in known or known[k].default != value}


def looks_at_tests(run: Run) -> bool:
    """Whether the method looks at the test inputs."""
    method = _registered(run.method)
    return method is not None and method.data == "test inputs"


def _registered(name: str) -> Method | None:
    """The method of that name; none where it is of one's own, and not here now."""
    from fusionbench.registry import get_method

    try:
        return get_method(name)
    except InputError:
        return None


@dataclass(frozen=True)
class Sweep:
    """Runs of a method that differ in one hyperparameter only, by its value."""

    method: str
    hyperparameter: str
    others: str
    runs: list[tuple[float, Run]]


def collect(results: Iterable[Result]) -> tuple[list[Run], list[Run], list[Result]]:
    """Runs with scores, failed ones, and results that a newer one of the same cell stands for."""
    newest, older = newest_of(results)
    cells: dict[str, list[Result]] = defaultdict(list)
    for result in newest:
        name = [{**result.cell, "seed": None}, bool(result.failed), result.key if result.failed else ""]
        cells[key_of(name)].append(result)
    groups = [sorted(group, key=lambda r: str(r.cell.get("seed"))) for group in cells.values()]
    groups = sorted(groups, key=lambda g: _place(g[0].cell))
    runs = [Run(i, tuple(same)) for i, same in enumerate(split(groups))]
    return [run for run in runs if not run.failed], [run for run in runs if run.failed], older


def newest_of(results: Iterable[Result]) -> tuple[list[Result], list[Result]]:
    """Of each cell the newest result, and those that it stands for: of other models, data, code or version."""
    results = list(results)
    by_time = sorted(results, key=lambda r: ((r.folder / f"{r.key}.json").stat().st_mtime_ns, r.key))
    newest = {key_of(result.cell): result.key for result in by_time}.values()
    return [r for r in results if r.key in newest], [r for r in results if r.key not in newest]


def with_seeds(results: Iterable[Result]) -> list[Run]:
    """Results as runs, those that differ in their seeds only as one, in the order of the first; failed ones alone."""
    cells: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        cells[key_of([{**result.cell, "seed": None}, result.key if result.failed else ""])].append(result)
    return [Run(i, tuple(same)) for i, same in enumerate(split(cells.values()))]


def _place(cell: Mapping[str, Any]) -> tuple:
    """Where a cell stands in a list: by pool, models, what was done to the data, method, and hyperparameters."""
    models = cell.get("models")
    about = (
        str(cell.get("modelpool")),
        models is not None,
        len(models or ()),
        models or [],
        cell.get("tasks") == "all",
    )
    return (*about, cell.get("corruption") or "", cell.get("severity") or 0, cell["method"], key_of(cell))


def split(groups: Iterable[list[Result]]) -> Iterator[list[Result]]:
    """Seeds that were scored on other tasks than the first are runs of their own."""
    for group in groups:
        by_tasks = defaultdict(list)
        for result in group:
            by_tasks[tuple(result.scores)].append(result)
        yield from by_tasks.values()


def by_group(runs: Iterable[Run]) -> dict[Group, list[Run]]:
    """Runs that can be compared, the whole pool first."""
    found = defaultdict(list)
    for run in runs:
        found[run.group].append(run)
    return dict(
        sorted(found.items(), key=lambda item: (item[0].models is not None, len(item[0].models or ()), str(item[0])))
    )


def of_experts(groups: Iterable[Group]) -> list[Group]:
    """The groups on all tasks whose models are there alone, too: experts, and what is made of several of them."""
    everywhere = [group for group in groups if group.models is not None and group.tasks == "all"]
    alone = {group.models[0] for group in everywhere if group.models is not None and len(group.models) == 1}
    return [group for group in everywhere if alone.issuperset(group.models or ())]


def reference(method: str, run: Run, runs: Sequence[Run]) -> dict[str, float] | None:
    """The scores of "pretrained" or "individual" on a run's tasks: which models are merged does not matter to them."""
    data = run.facts.get("taskpool", {})
    for other in sorted(runs, key=lambda other: other.group != run.group):
        if other.method != method or other.group.pool != run.group.pool:
            continue
        theirs = other.facts.get("taskpool", {})
        if all(name in other.scores and theirs.get(name) == data.get(name) for name in run.tasks):
            scores = {name: other.scores[name] for name in run.tasks}
            return {**scores, "average": fmean(scores.values())}
    return None


def gain(run: Run, runs: Sequence[Run]) -> float | None:
    """How much of the way from the pre-trained model to the individual ones the average has gone."""
    low, high = (reference(method, run, runs) for method in REFERENCES)
    if low is None or high is None or high["average"] == low["average"]:
        return None
    return (run.average - low["average"]) / (high["average"] - low["average"])


def sweeps(runs: Sequence[Run]) -> list[Sweep]:
    """The curves among runs of one group."""
    found = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        for name in dict.fromkeys(name for run in mine for name in run.settings):
            lines: dict[str, list[tuple[float, Run]]] = defaultdict(list)
            for run in mine:
                value = run.settings.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    lines[key_of({k: v for k, v in run.settings.items() if k != name})].append((value, run))
            curves = [sorted(line, key=lambda point: point[0]) for line in lines.values()]
            curves = [curve for curve in curves if len({value for value, _ in curve}) >= SWEPT]
            for curve in curves:
                given = {k: v for _, run in curve for k, v in run.cell["hyperparameters"].items() if k != name}
                others = " ".join(f"{k}={v}" for k, v in given.items())
                found.append(Sweep(method, name, others, curve))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of points, (cost, score), that no other one beats in both, by their cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, found = float("-inf"), []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def distinct(runs: Iterable[Run], what: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The different models ("modelpool") or tasks ("taskpool") of runs, by name and a hash of what is told of them."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for run in runs:
        for result in run.results:
            for name, about in result.report.get("run", {}).get(what, {}).items():
                found.setdefault((name, key_of(about)), about)
    return found
