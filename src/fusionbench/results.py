"""Results of runs, kept in a folder: a JSON file for each, named by a hash of everything that its numbers depend on.

Beside `KEY.json` stands `KEY.npz`, what came of every example of every task, so that two results can be compared
example by example. A file is there whole or not at all: any number of processes may write to one folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fusionbench.errors import InputError, did_you_mean
from fusionbench.writer import write_json

if TYPE_CHECKING:
    from fusionbench.task import Outcomes, Report

SCHEMA = 1
NO_TASKS = ("model_info", "run", "average")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Result:
    """One run's result.

    Attributes:
        key: names its file.
        cell: what was run, as it was asked for: `method`, `hyperparameters`, `modelpool`, `models`, `seed` ...
        report: scores by task, and what they depend on; empty where it failed.
        primary: the score that stands for each task.
        failed: why there are no scores; empty where there are.
        folder: where it is kept.
    """

    key: str
    cell: dict[str, Any]
    report: Report
    primary: dict[str, str]
    failed: str
    folder: Path

    @property
    def label(self) -> str:
        """The method, and what of its hyperparameters was given: `ties_merging density=0.1`."""
        return label_of(self.cell)

    @property
    def scores(self) -> dict[str, float]:
        """The primary score of every task, and their mean under "average"."""
        scores = {task: self.report[task][score] for task, score in self.primary.items()} if self.report else {}
        return {**scores, "average": sum(scores.values()) / len(scores)} if scores else {}

    def outcomes(self) -> dict[str, Outcomes]:
        """What came of every example, by task."""
        file = self.folder / f"{self.key}.npz"
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found: dict[str, Outcomes] = {}
                for name in arrays.files:
                    task, _, what = name.rpartition("/")
                    found.setdefault(task, {})[what] = arrays[name]
                return found
        except FileNotFoundError:
            raise InputError(f"'{file}' is not there: what came of every example was not kept.") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"'{file}' cannot be read: {str(error).splitlines()[0]}") from None


class Results:
    """The results in a folder, which need not be there before the first."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def has(self, key: str) -> bool:
        """Whether a result that has not failed is kept under this key."""
        return (self.folder / f"{key}.json").is_file() and not self.read(key).failed

    def read(self, key: str) -> Result:
        """The result of this key."""
        return _read(self.folder / f"{key}.json")

    def all(self) -> list[Result]:
        """All of them, by name of suite, pool and method."""
        if not self.folder.is_dir():
            raise InputError(f"'{self.folder}' is no folder of results: fusionbench bench SUITE makes one.")
        found = [_read(file) for file in sorted(self.folder.glob("*.json"))]
        if not found:
            raise InputError(f"'{self.folder}' holds no results: fusionbench bench SUITE writes some.")
        return sorted(found, key=lambda r: (str(r.cell.get("modelpool")), str(r.cell.get("method")), r.label, r.key))

    def find(self, start: str) -> Result:
        """The result whose key begins like this, or the only one with this label, as `ties_merging density=0.1`."""
        kept = self.all()
        found = [result for result in kept if result.key.startswith(start)]
        found = found or [result for result in kept if result.label == start]
        if len(found) > 1:
            keys = ", ".join(result.key for result in found)
            raise InputError(f"{len(found)} results are '{start}': say which of {keys}.")
        if not found:
            names = [name for result in kept for name in (result.label, result.key)]
            raise InputError(f"0 results begin with '{start}'. {did_you_mean(start, names)}")
        return found[0]

    def add(
        self,
        key: str,
        cell: Mapping[str, Any],
        report: Report,
        primary: Mapping[str, str],
        outcomes: Mapping[str, Outcomes],
    ) -> Result:
        """Keep a result. What came of every example comes first: where the JSON is, it is, too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{task}/{what}": array for task, found in outcomes.items() for what, array in found.items()}
        _write_arrays(self.folder / f"{key}.npz", arrays)
        content = {"schema": SCHEMA, "cell": dict(cell), "primary": dict(primary), "report": report}
        write_json(self.folder / f"{key}.json", content)
        return self.read(key)

    def add_failed(self, key: str, cell: Mapping[str, Any], reason: str, details: str = "") -> Result:
        """Keep why a run gave no result; the next run of the same tries again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "cell": dict(cell), "failed": reason, "traceback": details}
        write_json(self.folder / f"{key}.json", content)
        return self.read(key)


def key_of(content: Any) -> str:
    """A name for what has this content."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())


def label_of(cell: Mapping[str, Any]) -> str:
    """The method of a cell, and its given hyperparameters."""
    tuned = [f"(tuned, {cell['tune']} trials)"] if cell.get("tune") else []
    return " ".join([cell["method"], *(f"{name}={value}" for name, value in cell["hyperparameters"].items()), *tuned])


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A flat row for each result: what was run, every score in its own unit, and the cost."""
    found = []
    for result in results:
        row: dict[str, Any] = {"key": result.key, **{k: plain(v) for k, v in result.cell.items() if k != "why"}}
        for task, scores in result.report.items():
            if task not in NO_TASKS:
                row.update({f"{task}/{score}": value for score, value in scores.items()})
        if result.scores:
            row["average"] = result.scores["average"]
        run = result.report.get("run", {})
        row["fusion_seconds"] = run.get("seconds", {}).get("fusion")
        row["fusion_cpu_seconds"] = run.get("cpu_seconds", {}).get("fusion")
        row["peak_memory_mb"], row["added_parameters"] = run.get("peak_memory_mb"), run.get("added_parameters")
        row["failed"] = result.failed
        found.append(row)
    return found


def columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of rows, in the order they come up, without those that are empty throughout."""
    names = dict.fromkeys(name for row in table for name in row)
    return [name for name in names if any(row.get(name) not in (None, "") for row in table)]


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated values."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(table), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def as_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    rule = f"|---|{'--:|' * (len(header) - 1)}"
    return "\n".join(["| " + " | ".join(line) + " |" for line in escaped][:1] + [rule]) + "".join(
        "\n| " + " | ".join(line) + " |" for line in escaped[1:]
    )


def as_latex(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in LaTeX, of the booktabs package."""

    def line(cells: Sequence[str]) -> str:
        for sign in ("&", "%", "_", "#"):
            cells = [cell.replace(sign, f"\\{sign}").replace("±", r"$\pm$") for cell in cells]
        return " & ".join(cells) + r" \\"

    body = [r"\toprule", line(header), r"\midrule", *map(line, lines), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", *body, r"\end{tabular}"])


def _read(file: Path) -> Result:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{file}' cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("cell"), dict):
        raise InputError(f"'{file}' is no result of a suite.")
    if content.get("schema") != SCHEMA:
        raise InputError(f"'{file}' is of another version of Fusionbench (schema {content.get('schema')}).")
    report, primary = content.get("report", {}), content.get("primary", {})
    return Result(file.stem, content["cell"], report, primary, content.get("failed", ""), file.parent)


def plain(value: Any) -> Any:
    """What fits one cell of a table."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={plain(inner)}" for name, inner in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
