"""Numbers that the paper's authors published, beside those of a run: facts to compare with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fusionbench.config import CONFIGS
from fusionbench.errors import InputError, did_you_mean

FOLDER = CONFIGS / "published"
NO_SCORES = ("category", "method", "hyperparameter", "Model", "corruption", "scaling_coef")
"""Columns that say what a row is about; all others are scores."""


@dataclass(frozen=True)
class Table:
    """One published table: what it is about, its rows as they were published, and what to know before comparing."""

    name: str
    what: str
    caveat: str
    rows: list[dict[str, str]]


def list_tables() -> dict[str, str]:
    """What each table is about, by name, in the paper's order."""
    return {name: facts["what"] for name, facts in _index()["tables"].items()}


def get_table(name: str) -> Table:
    """The table called `name`."""
    if name not in _index()["tables"]:
        raise InputError(f"No published table is called '{name}'. {did_you_mean(name, list_tables())}")
    facts = _index()["tables"][name]
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scale = facts.get("scale", 1)
    if scale != 1:
        rows = [{k: v if k in NO_SCORES or not v else f"{scale * float(v):.1f}" for k, v in r.items()} for r in rows]
    return Table(name, facts["what"], facts.get("caveat", ""), rows)


def tables_for(base: str, about: str = "all tasks", merged: Iterable[str] = ()) -> list[tuple[Table, bool]]:
    """The tables about models made from `base`, each with whether it is about that very model or one like it.

    Args:
        base: where the base model is.
        about: what was measured: all models merged ("all tasks"), or some of them, on "unseen tasks" or "corruptions".
        merged: the names of those that were merged.
    """
    found = []
    for name, facts in _index()["tables"].items():
        bases, some = facts.get("bases", ()), facts.get("merged", {}).get(base, ())
        is_asked = facts.get("about", "all tasks") == about and set(some) == set(merged)
        if is_asked and base in (*bases, *facts.get("like", ())):
            found.append((get_table(name), base in bases))
    return found


def matches(table: Table, method: str, hyperparameters: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a table that are about a method: those with a run's hyperparameters, or all where none has."""
    names = _index()["methods"].get(method, ())
    found = [row for row in table.rows if row.get("method") in names]
    return [row for row in found if _same(row, hyperparameters)] or found


def _same(row: Mapping[str, str], hyperparameters: Mapping[str, Any]) -> bool:
    name, equals, value = (row.get("hyperparameter") or "").partition("=")
    if not equals:
        return True
    mine = hyperparameters.get(_index()["hyperparameters"].get(name, name))
    return isinstance(mine, int | float) and abs(mine - float(value)) < 1e-9


@cache
def _index() -> dict[str, Any]:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(FOLDER / "index.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
