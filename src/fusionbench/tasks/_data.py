"""Where the examples of a task come from: a file, or the `datasets` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fusionbench.errors import InputError, check_keys, did_you_mean
from fusionbench.locations import find
from fusionbench.task import SPLITS, TaskPool

Rows = list[dict[str, Any]]


def hash_of_files(folder: Path) -> str:
    """A hash of the names and contents of all files in a folder."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    states = ((name, (folder / name).stat()) for name in files)
    return _hash_of_files(folder, tuple((name, state.st_size, state.st_mtime_ns) for name, state in states))


@cache
def _hash_of_files(folder: Path, states: tuple[tuple[str, int, int], ...]) -> str:
    """Files that stay as they are are read once: a task is described again and again."""
    sha = hashlib.sha256()
    for name, size, _ in states:
        sha.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def check_split(name: str) -> None:
    """An error for what is no split."""
    if name not in SPLITS:
        raise InputError(f"No split is called '{name}'. {did_you_mean(name, SPLITS)}")


class HubData:
    """A data set that the `datasets` library loads: a local folder, or one on the hub.

    Args:
        dataset: the folder or hub id.
        name: which configuration of it, as `sst2` of `glue`.
        splits: the data set's own name for `test`, and for `calibration` where there is one.
    """

    def __init__(self, dataset: str, name: str | None, splits: Mapping[str, str]) -> None:
        self.dataset, self.name, self.splits = dataset, name, dict(splits)

    def columns(self, split: str, columns: Sequence[str]) -> Any:
        """The data set of a split, which has these columns."""
        try:
            from datasets import load_dataset
        except ModuleNotFoundError:
            raise InputError(f"The data set '{self.dataset}' needs datasets: pip install 'fusionbench[hf]'.") from None
        if split not in self.splits:
            raise InputError(f"'{self.dataset}': splits does not say which one is '{split}'.")
        try:
            data = load_dataset(self.dataset, self.name, split=self.splits[split])
        except Exception as error:  # the library raises many unrelated types for "cannot be had"
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            raise InputError(
                f"The data set '{self.dataset}' cannot be loaded ({reason}). Is it a local folder?"
            ) from error
        for column in columns:
            if column not in data.column_names:
                raise InputError(
                    f"'{self.dataset}' has no column '{column}'. {did_you_mean(column, data.column_names)}"
                )
        return data

    def digest(self) -> str:
        """A hash of a local folder's files; of a data set on the hub, its name."""
        named = json.dumps([self.dataset, self.name, self.splits])
        folder = Path(self.dataset)
        return f"{named} {hash_of_files(folder)}" if folder.is_dir() else named


class LinesFile:
    """Examples in a `.jsonl` file: one JSON object a line, with its `split` and whatever the task asks for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self, split: str, columns: Sequence[str]) -> Rows:
        """The examples of a split."""
        rows: Rows = []
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"'{self._path}' cannot be read as lines of JSON: {str(error).splitlines()[0]}") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found = row["split"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"'{self._path}', line {number}: not a JSON object with a 'split'.") from None
            if found not in SPLITS:
                wanted = " or ".join(f"'{name}'" for name in SPLITS)
                raise InputError(f"'{self._path}', line {number}: the split must be {wanted}; got {found!r}.")
            if found == split:
                for column in columns:
                    if column not in row:
                        raise InputError(f"'{self._path}', line {number}: no '{column}'. {did_you_mean(column, row)}")
                rows.append(row)
        return rows

    def digest(self) -> str:
        return hashlib.sha256(self._path.read_bytes()).hexdigest()


class HubRows:
    """Examples of a data set that the `datasets` library loads."""

    def __init__(self, data: HubData) -> None:
        self._data = data
        self.digest = data.digest

    def rows(self, split: str, columns: Sequence[str]) -> Rows:
        """The examples of a split."""
        data = self._data.columns(split, columns)
        return [{column: row[column] for column in columns} for row in data]


def open_rows(task: str, data: Any, relative_to: Path | None) -> LinesFile | HubRows:
    """The examples that a task's `data` names: a `.jsonl` file, or `{dataset, name, splits}`."""
    if isinstance(data, str):
        return LinesFile(find(data, relative_to=relative_to))
    return HubRows(hub_data(task, data, ()))


def with_card(data: Any, entry: Mapping[str, Any], relative_to: Path | None) -> dict[str, Any]:
    """A task's entry, and what it leaves to the `.json` beside its data file, where there is one."""
    card: Any = {}
    if isinstance(data, str):
        file = find(data, relative_to=relative_to)
        beside = file.parent / f"{file.stem}.json"
        try:
            card = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except (OSError, ValueError) as error:
            raise InputError(f"'{beside}' cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(card, dict):
            raise InputError(f"'{beside}' is not a table of keys and values.")
    return {**card, **entry}


def hub_data(task: str, data: Any, more: Sequence[str]) -> HubData:
    """The data set that a task's `data` names; `more` are keys that it may also have."""
    if not isinstance(data, Mapping):
        raise InputError(f"Task '{task}': data is neither a file nor a table with a 'dataset'.")
    check_keys(f"Task '{task}': data", data, ("dataset", "name", "splits", *more), required=("dataset",))
    return HubData(str(data["dataset"]), data.get("name"), data.get("splits") or {"test": "test"})


def check_tasks(tasks: Any) -> None:
    """An error unless `tasks` is a table of tables."""
    if not isinstance(tasks, Mapping) or not all(isinstance(entry, Mapping) for entry in tasks.values()):
        raise InputError("taskpool: 'tasks' must be a table of tasks by name, each with its 'data'.")


def with_corruption(tasks: TaskPool, corruption: Any) -> TaskPool:
    """The tasks, with their test images corrupted where a YAML's `corruption` says how."""
    if corruption is None:
        return tasks
    if not isinstance(corruption, Mapping):
        raise InputError(f"taskpool: corruption is a table of name, severity and seed; got {corruption!r}.")
    check_keys("taskpool: corruption", corruption, ("name", "severity", "seed"), required=("name", "severity"))
    return tasks.corrupted(**corruption)
