"""Kinds of task, one file each. A file's `build` makes a task pool: its arguments are the keys of the YAML."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fusionbench.errors import InputError, did_you_mean


def list_kinds() -> list[str]:
    """The kinds of task there are."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get_kind(name: str) -> Any:
    """The module of the kind called `name`."""
    if name not in list_kinds():
        raise InputError(f"No kind of task is called '{name}'. {did_you_mean(name, list_kinds())}")
    return import_module(f"{__name__}.{name}")
