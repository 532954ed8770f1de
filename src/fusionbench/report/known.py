"""What the package's suites say of runs: which suite they are of, and why their hyperparameters were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from fusionbench.errors import InputError
from fusionbench.results import Result, key_of


def suites_of(results: Iterable[Result]) -> list[str]:
    """The suites that runs are of, with how much of them is there."""
    results = list(results)
    merged = {}
    for result in results:  # the names of all models of a pool, where all are merged
        names = [name for name in result.report.get("run", {}).get("modelpool", {}) if name != "base"]
        if result.cell.get("models") is None and names:
            merged[str(result.cell.get("modelpool"))] = names
    there = {_identity(result.cell, merged) for result in results}
    found = []
    for name, cells in _suites().items():
        asked = {_identity(cell, merged) for cell in cells}
        if asked & there:
            found.append(f"{name} ({len(asked & there):,} of {len(asked):,} runs)")
    return found


def reason(cell: Mapping[str, Any]) -> str:
    """Why a suite has these hyperparameters for this pool."""
    return "" if cell.get("tune") else _reasons().get(_choice(cell), "")


def _identity(cell: Mapping[str, Any], merged: Mapping[str, Sequence[str]]) -> str:
    """A name for a run: equal for cells that ask for the same in other words."""
    pool = str(cell.get("modelpool"))
    models, every = cell.get("models"), merged.get(pool)
    models = every if models is None else models
    tasks = "models" if models == every else cell.get("tasks")
    return key_of([_choice(cell), models, tasks, [cell.get(name) for name in ("corruption", "severity", "tune")]])


def _choice(cell: Mapping[str, Any]) -> str:
    return key_of([str(cell.get("modelpool")), cell["method"], _complete(cell), cell.get("tune")])


def _complete(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """The hyperparameters with the defaults of those that were not given."""
    from fusionbench.registry import get_method

    given = dict(cell.get("hyperparameters", {}))
    if cell.get("seed") is not None:
        given["seed"] = cell["seed"]
    try:
        known = get_method(cell["method"]).hyperparameters
    except InputError:  # a method of one's own, that is not here now
        return given
    return {name: h.default for name, h in known.items() if not h.required} | given


@cache
def _suites() -> dict[str, list[dict[str, Any]]]:
    from fusionbench.config import list_configs
    from fusionbench.suites import load_suite

    return {
        name: [{**cell.asked, "why": cell.why} for cell in load_suite(name).cells] for name in list_configs("suite")
    }


@cache
def _reasons() -> dict[str, str]:
    return {_choice(cell): cell["why"] for cells in _suites().values() for cell in cells if cell["why"]}
