"""Suites: tables of methods, on pools of models, on tasks; run in parallel, kept, and gone on with after a stop."""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.algorithms import Algorithm, algorithm
from fusionbench.config import list_configs, load_modelpool, load_plugin, load_taskpool, read_config_file
from fusionbench.errors import InputError, check_keys, did_you_mean, is_count
from fusionbench.registry import Hyperparameter, Method, get_method
from fusionbench.results import NOT_RUN, Result, Results, key_of

if TYPE_CHECKING:
    from fusionbench.pool import ModelPool
    from fusionbench.task import TaskPool

GROUP = ("pools", "methods", "models", "tasks", "corruptions", "seeds")


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        pool: name of the model pool, or its .yaml file.
        method: its name.
        hyperparameters: those that are given.
        models: which of the pool's are merged; all by default.
        tasks: on which the result is scored: those of these models, or all of the pool.
        corruption: name and severity of what is done to the test images.
        seed: of a method that has one.
        tune: trials that the other hyperparameters are chosen by, on calibration data.
        why: why these hyperparameters.
        taskpool: name of the task pool, or its .yaml file, where it is not that of the model pool.
    """

    pool: str
    method: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] | None = None
    tasks: str = "models"
    corruption: tuple[str, int] | None = None
    seed: int | None = None
    tune: int | None = None
    why: str = ""
    taskpool: str = ""

    @property
    def asked(self) -> dict[str, Any]:
        """What it is, as data: equal for equal runs of any suite."""
        name, severity = self.corruption or (None, None)
        return {
            "modelpool": self.pool,
            "method": self.method,
            "hyperparameters": self.hyperparameters,
            "models": None if self.models is None else list(self.models),
            "tasks": self.tasks,
            "corruption": name,
            "severity": severity,
            "seed": self.seed,
            "tune": self.tune,
            **({"taskpool": self.taskpool} if self.taskpool else {}),
        }

    @property
    def algorithm(self) -> Algorithm:
        """The method with its hyperparameters, checked."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return algorithm(self.method, **self.hyperparameters, **seed)

    def opened(self) -> tuple[ModelPool, TaskPool, TaskPool]:
        """The models, the tasks that the method may look at, and those that the result is scored on."""
        pool, tasks = _opened(self.pool, self.taskpool or self.pool)
        if self.corruption is not None:
            tasks = tasks.corrupted(*self.corruption)
        if self.models is not None:
            pool = pool.of({name: pool[name] for name in self.models}, pool.base)
        seen = tasks.of_models(pool)
        return pool, seen, tasks if self.tasks == "all" else seen

    def key(self) -> str:
        """A hash of everything that the scores depend on: method, contents of models and data, version."""
        from fusionbench.runner import versions

        pool, seen, tasks = self.opened()
        chosen = self.algorithm
        content = {
            "fusionbench": versions()["fusionbench"],
            "method": [
                chosen.method.name,
                chosen.hyperparameters,
                self.tune,
                *_own_code(chosen.method),
                *_read_by(chosen),
            ],
            "models": [[name, pool.identity(name)] for name in pool.inputs],
            "seen": seen.seen() if chosen.method.needs_tasks else None,
            "tasks": {name: task.describe() for name, task in tasks.items()},
        }
        return key_of(content)


@dataclass(frozen=True)
class Suite:
    """A suite: what it is about, and its runs."""

    name: str
    what: str
    cells: list[Cell]


def load_suites(names: Sequence[str]) -> Suite:
    """The runs of one or more suites as those of one, each once."""
    suites = [load_suite(name) for name in names]
    cells: dict[str, Cell] = {}
    for cell in chain.from_iterable(suite.cells for suite in suites):
        cells.setdefault(key_of(cell.asked), cell)
    name, what = (" + ".join(texts) for texts in zip(*((s.name, s.what) for s in suites), strict=True))
    return Suite(name, what, list(cells.values()))


def load_suite(name: str) -> Suite:
    """The suite called `name`, or that of a .yaml file."""
    content, _ = read_config_file("suite", name)
    check_keys(f"suite '{name}'", content, ("what", "groups", "plugins"), required=("what", "groups"))
    plugins, groups = content.get("plugins") or [], content["groups"]
    if not isinstance(plugins, list):
        raise InputError(f"suite '{name}': plugins must be a list of .py files or modules; got {plugins!r}.")
    for plugin in plugins:
        load_plugin(str(plugin))
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise InputError(f"suite '{name}': groups must be a list of tables, one or more.")
    cells: dict[str, Cell] = {}  # each once
    for i, group in enumerate(groups, 1):
        for cell in _cells(name, i, group):
            cells.setdefault(key_of(cell.asked), cell)
    return Suite(name, str(content["what"]), list(cells.values()))


def bench(
    cells: Sequence[Cell],
    results: Results,
    *,
    executor: str = "processes",
    workers: int | None = None,
    device: str = "cpu",
) -> Iterator[Result]:
    """Run what is not kept yet, and yield the result of every cell, kept or new, in order.

    A run that fails does not stop the others: its result says why. What is done is kept at once.

    Args:
        cells: what to run.
        results: where to keep it.
        executor: where runs are done: in "processes", or by the nodes of a cluster ("ray").
        workers: how many at once; one per core by default. One worker is this process.
        device: where models are evaluated.
    """
    from fusionbench.executors import in_processes, on_ray
    from fusionbench.parallel import check_workers, cores

    check_workers(workers)
    executors = {"processes": in_processes, "ray": on_ray}
    if executor not in executors:
        raise InputError(f"Suites run in processes, or by ray; got '{executor}'.")
    workers = workers or cores()
    keys = [cell.key() for cell in cells]  # also says what is wrong with a cell, before any work
    left = {key: cell for key, cell in zip(keys, cells, strict=True) if not results.has(key)}
    alone = workers == 1 or len(left) == 1
    work, todo = partial(_run, results=results, device=device, alone=alone), list(left.items())
    done = map(work, todo) if alone else executors[executor](work, todo, workers, long=True)
    for key in keys:
        if left.pop(key, None) is not None:
            next(done)
        yield results.read(key)


def kept(cells: Sequence[Cell], results: Results) -> list[Result]:
    """The results of cells, in their order and their words; where nothing is kept, one that failed: it was not run."""
    found = []
    for cell in cells:
        try:
            key, reason = cell.key(), NOT_RUN
        except InputError as error:  # its models or data are not here
            key, reason = "", str(error)
        there = bool(key) and (results.folder / f"{key}.json").is_file()
        missing = Result(key, cell.asked, {}, {}, reason, results.folder)
        found.append(replace(results.read(key), cell=cell.asked) if there else missing)
    return found


def _run(asked: tuple[str, Cell], *, results: Results, device: str, alone: bool) -> Result:
    import torch

    key, cell = asked
    if not alone:
        torch.set_num_threads(1)  # the others have a core each, too
    try:
        if results.has(key):  # by a worker that was killed later, or by another command
            return results.read(key)
        return run_cell(cell, results, device)
    except InputError as error:
        return results.add_failed(key, cell.asked, str(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return results.add_failed(key, cell.asked, reason, traceback.format_exc())


def run_cell(cell: Cell, results: Results, device: str = "cpu") -> Result:
    """Fuse, evaluate, and keep the result."""
    from fusionbench.adapt import states_kept
    from fusionbench.cost import cost, forget_peak_memory, stopwatch
    from fusionbench.runner import computed, evaluate, facts, parse_device
    from fusionbench.task import Outcomes
    from fusionbench.tune import tune

    pool, seen, tasks = cell.opened()
    pool.device = parse_device(device)
    forget_peak_memory()
    chosen, found = cell.algorithm, {}
    if cell.tune is not None:
        best = tune(chosen, pool, seen, trials=cell.tune)
        chosen, found = best.algorithm, {"tuned": best.describe()}
    with states_kept():
        with stopwatch() as fusion:
            result = computed(chosen.run(pool, seen), pool)
        outcomes: dict[str, Outcomes] = {}
        with stopwatch() as evaluation:
            report = evaluate(result, pool, tasks, pool.device, outcomes=outcomes)
        spent = cost(result, pool, tasks, pool.device, fusion=fusion, evaluation=evaluation)
        report["run"] = {**facts(chosen, pool, tasks), **found, **spent, **({"why": cell.why} if cell.why else {})}
        primary = {name: task.primary for name, task in tasks.items()}
        return results.add(cell.key(), cell.asked, report, primary, outcomes)


@lru_cache(maxsize=1)
def _opened(pool: str, taskpool: str) -> tuple[ModelPool, TaskPool]:
    """The models and tasks of these names; cells of one pool come one after the other."""
    return load_modelpool(pool), load_taskpool(taskpool)


def _read_by(chosen: Algorithm) -> list[str]:
    """Hashes of the files that hyperparameters name."""
    settings = chosen.method.hyperparameters
    files = [Path(value) for name, value in chosen.hyperparameters.items() if settings[name].is_file]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _own_code(method: Method) -> list[str]:
    """The file of a method that is not the package's: scores depend on what is written there."""
    if method.function.__module__.startswith("fusionbench.methods."):
        return []
    return [Path(inspect.getfile(method.function)).read_text(encoding="utf-8")]


def _cells(suite: str, number: int, group: Mapping[str, Any]) -> Iterator[Cell]:
    where = f"suite '{suite}', group {number}"
    check_keys(where, group, GROUP, required=("pools", "methods"))
    pools = [_pool(where, pool) for pool in _list(where, group, "pools")]
    tasks = group.get("tasks", "models")
    if tasks not in ("models", "all"):
        raise InputError(f"{where}: tasks must be 'models' (those of the merged models) or 'all'; got '{tasks}'.")
    corrupted = group.get("corruptions") or {}
    if not isinstance(corrupted, Mapping):
        raise InputError(f"{where}: corruptions is a table of severities by name; got {corrupted!r}.")
    numbers = group.get("seeds")
    if numbers is not None and (not isinstance(numbers, list) or not all(type(seed) is int for seed in numbers)):
        raise InputError(f"{where}: seeds must be a list of whole numbers; got {numbers!r}.")
    corruptions: list[tuple[str, int] | None] = [
        (name, severity)
        for name, severities in corrupted.items()
        for severity in (severities if isinstance(severities, list) else [severities])
    ] or [None]
    for (pool, taskpool), models, corruption in product(pools, _choices(where, group.get("models")), corruptions):
        for entry in _list(where, group, "methods"):
            for method, settings, more in _settings(where, entry):
                seeds = numbers if "seed" in get_method(method).hyperparameters and "seed" not in settings else None
                for seed in seeds or [None]:
                    yield Cell(pool, method, settings, models, tasks, corruption, seed, **more, taskpool=taskpool)


def _pool(where: str, entry: Any) -> tuple[str, str]:
    """The names, or files, of a model pool and of its task pool, which is "" where it has the same name."""
    if isinstance(entry, Mapping):
        check_keys(f"{where}: pools", entry, ("modelpool", "taskpool"), required=("modelpool", "taskpool"))
        return str(entry["modelpool"]), str(entry["taskpool"])
    known = list_configs("modelpool")
    if str(entry).endswith((".yaml", ".yml")):
        raise InputError(f"{where}: a pool of one's own is two files: {{modelpool: {entry}, taskpool: my_tasks.yaml}}.")
    if entry not in known:
        raise InputError(f"{where}: no pool is called '{entry}'. {did_you_mean(str(entry), known)}")
    return str(entry), ""


def _settings(where: str, entry: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """A method with its hyperparameters, several times where a list of values stands for one that takes no list."""
    from fusionbench.tune import search_space

    if isinstance(entry, str):
        entry = {entry: {}}
    names = [name for name in entry if name not in ("why", "tune")] if isinstance(entry, Mapping) else []
    if len(names) != 1:
        raise InputError(
            f"{where}: a method is its name, or a table of its hyperparameters by its name; got {entry!r}."
        )
    name, more = names[0], {key: entry[key] for key in ("why", "tune") if key in entry}
    method, given = get_method(str(name)), entry[name] or {}
    if "tune" in more:
        search_space(method)
        if not is_count(more["tune"]):
            raise InputError(f"{where}: tune is a number of trials, 1 or more; got {more['tune']!r}.")
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: the hyperparameters of {name} must be a table; got {given!r}.")
    choices = [_values(method.require(str(key)), value) for key, value in given.items()]
    for values in product(*choices):
        settings = dict(zip(map(str, given), values, strict=True))
        method.check(settings)
        for key, file in Algorithm(method, settings).writes.items():
            raise InputError(
                f"{where}: {name}.{key} is the file '{file}' to write, and a result that is kept writes none: "
                "leave it out, or use fusionbench run."
            )
        yield method.name, settings, more


def _values(hyperparameter: Hyperparameter, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    try:
        hyperparameter.check(value, "")
    except InputError:
        if not value:
            raise
        return value  # each is checked for itself
    return [value]


def _choices(where: str, models: Any) -> list[tuple[str, ...] | None]:
    """Which models are merged: all, those of a list, or of one list after the other."""
    if models is None:
        return [None]
    if not isinstance(models, list) or not models:
        raise InputError(f"{where}: models must be a list of names, or of lists of names; got {models!r}.")
    several = models if isinstance(models[0], list) else [models]
    for some in several:
        if not isinstance(some, list) or any(isinstance(name, list) for name in some):
            raise InputError(f"{where}: models must be a list of names, or of lists of names; got {models!r}.")
        if len(set(map(str, some))) < len(some):
            raise InputError(f"{where}: a model is named twice in {some!r}.")
    return [tuple(map(str, some)) for some in several]


def _list(where: str, group: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(group[key], list) or not group[key]:
        raise InputError(f"{where}: {key} must be a list; got {group[key]!r}.")
    return group[key]
