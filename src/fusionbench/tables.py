"""Tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fusionbench.registry import INDENT, Method, list_methods

if TYPE_CHECKING:
    from fusionbench.analysis import Difference
    from fusionbench.lora import Combined, Extracted
    from fusionbench.task import Report, TaskPool


def alignment(found: Mapping[str, Any]) -> list[str]:
    """A line for every model of an alignment's report."""
    lines = []
    for name, entry in found.items():
        parts = {"distance": "objective", f"barrier ({entry.get('measure')})": "barrier"}
        said = [
            f"{what} {entry[key]['before']:.4g} -> {entry[key]['after']:.4g}"
            for what, key in parts.items()
            if key in entry
        ]
        lines.append(f"{name}: {entry['how']}, {', '.join(said)}")
    return lines


@dataclass(frozen=True)
class Row:
    """One line of a score table: primary scores by task, and their average."""

    label: str
    kind: str
    scores: dict[str, float]


def scores(rows: list[Row], tasks: TaskPool, *, reference: str | None, width: int) -> Table:
    """Scores in percent, a row for each model; the best of each column among what is no reference has a star.

    Where that is wider than `width` characters, a column for each model.
    """
    names = [*tasks, "average"]
    compared = next((row for row in rows if row.label == reference), None)
    candidates = [row for row in rows if row.kind != "reference"]
    best = {name: max((row.scores[name] for row in candidates), default=None) for name in names}

    def cell(row: Row, name: str) -> str:
        text = f"{100 * row.scores[name]:.1f}"
        marked = len(candidates) > 1 and row in candidates and row.scores[name] == best[name]
        return f"[bold green]{text}*[/]" if marked else f"{text} "

    header = ["model" if rows[0].kind == "model" else "method", *names]
    lines = [[escape(row.label), *(cell(row, name) for name in names)] for row in rows]
    if compared is not None:
        header.append(f"vs {compared.label}")
        for row, line in zip(rows, lines, strict=True):
            difference = 100 * (row.scores["average"] - compared.scores["average"])
            line.append("" if row is compared else f"{difference:+.1f} ")
    wanted = max(len(row.label) for row in rows) + sum(max(len(title), 6) for title in header[1:])
    wanted += 3 * len(header) + 1  # padding
    turned = wanted > width
    if turned:  # and long names of methods on several lines
        columns = [header, *lines]
        header = [columns[0][0], *(column[0].replace("_", "_\n").replace(" ", "\n") for column in columns[1:])]
        lines = [list(cells) for cells in zip(*(column[1:] for column in columns), strict=True)]
    padding = 0 if turned else (0, 1)
    table = Table(box=SIMPLE_HEAD, title="test scores in percent", title_justify="left", padding=padding)
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def differences(found: list[Difference], limit: int | None) -> Table:
    """Tensors that differ most first, and all together at the end."""
    *tensors, total = found
    tensors = sorted(tensors, key=lambda d: -d.relative)[:limit]
    table = Table(box=SIMPLE_HEAD)
    for column in ("tensor", "|A|", "|B|", "|A-B|", "|A-B|/|A|", "cosine", "largest change"):
        table.add_column(column, justify="left" if column == "tensor" else "right", no_wrap=True)
    for d in (*tensors, total):
        label = f"all {len(found) - 1} tensors" if d is total else d.name
        if d is total:
            table.add_section()
        numbers = (d.norm_a, d.norm_b, d.norm_difference, d.relative)
        table.add_row(escape(label), *(f"{n:.4g}" for n in numbers), f"{d.cosine:.6f}", f"{d.largest:.3g}")
    return table


def extraction(found: Extracted) -> Table:
    """Modules of an extracted adapter in their order, and all together at the end."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("module", "shape", "rank", "|change|", "error", "no adapter below"):
        table.add_column(column, justify="left" if column == "module" else "right", no_wrap=True)
    for name, m in found.modules.items():
        shape = " x ".join(map(str, m.shape))
        table.add_row(escape(name), shape, str(m.rank), f"{m.norm:.4g}", f"{m.error:.3g}", f"{m.least:.3g}")
    table.add_section()
    total = sum(m.norm**2 for m in found.modules.values()) ** 0.5
    least = sum((m.norm * m.least) ** 2 for m in found.modules.values()) ** 0.5 / total
    count = f"all {len(found.modules)} modules"
    table.add_row(count, "", str(found.config["r"]), f"{total:.4g}", f"{found.error:.3g}", f"{least:.3g}")
    return table


def truncations(combined: Combined) -> Table:
    """What the rank of merged adapters left out of each module's exact merge."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("module", "rank", "left out"):
        table.add_column(column, justify="left" if column == "module" else "right", no_wrap=True)
    for name, error in combined.errors.items():
        table.add_row(escape(name), str(combined.ranks[name]), f"{error:.3g}")
    return table


def matrix(rows: list[str], columns: list[str], values: list[list[float]], title: str) -> Table:
    """A table of numbers."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in zip(rows, values, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    return table


def reports(found: Mapping[str, Report]) -> Table:
    """Every score of every report: errors and angles as they are, shares in percent."""
    names = list(dict.fromkeys(key for report in found.values() for key in report if key not in ("model_info", "run")))
    columns = list(dict.fromkeys((n, score) for n in names for report in found.values() for score in report.get(n, ())))
    columns = [(name, score) for name, score in columns if score not in ("loss", "unparsable")]
    table = Table(box=SIMPLE_HEAD, title="scores, shares in percent", title_justify="left")
    table.add_column("report", no_wrap=True)
    for name, score in columns:
        table.add_column(name if score == "accuracy" else f"{name}\n{score}", justify="right")
    for label, report in found.items():
        cells = [report.get(name, {}).get(score) for name, score in columns]
        numbers = zip(cells, columns, strict=True)
        table.add_row(escape(label), *("" if c is None else _score(c, score) for c, (_, score) in numbers))
    return table


def _score(value: float, score: str) -> str:
    return f"{value:.2f}" if "error" in score or "angle" in score else f"{100 * value:.1f}"


def published(name: str, rows: list[dict[str, str]]) -> Table:
    """Rows of a published table, as they were published."""
    table = Table(box=SIMPLE_HEAD, title=name, title_justify="left")
    columns = [column for column in rows[0] if column != "category"]
    for column in columns:
        title = column.replace(" \\uparrow", "").replace(" \\downarrow", "")
        words = column in ("method", "Model", "corruption", "hyperparameter")
        table.add_column(title, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(escape(row[column] or "") for column in columns))
    return table


def listing(what: str) -> Table:
    """The names there are of methods, modelpools, taskpools, architectures or published tables, with what each is."""
    table = Table(box=SIMPLE_HEAD, title=what, title_justify="left", show_header=what == "methods")
    if what == "methods":
        for column in ("", "kind", "looks at", "gradients", "parameters", "arXiv", ""):
            table.add_column(column, no_wrap=not table.columns)
        for method in sorted(list_methods(), key=lambda m: (m.kind, m.name)):
            data = "" if method.data == "none" else method.data
            more = "more" if method.adds_parameters else ""
            needs = (data, "yes" if method.gradients else "", more, method.paper)
            table.add_row(method.name, method.kind, *needs, escape(method.summary))
        return table
    table.add_column(no_wrap=True)
    for name, about in _others(what):
        table.add_row(name, escape(about))
    return table


def _others(what: str) -> list[tuple[str, str]]:
    if what == "architectures":
        from importlib.util import find_spec

        from fusionbench.architectures import list_architectures

        return [(name, _first_line(find_spec(f"fusionbench.architectures.{name}"))) for name in list_architectures()]
    if what == "published":
        from fusionbench.published import list_tables

        return list(list_tables().items())
    from fusionbench.config import CONFIGS, list_configs

    group = what.removesuffix("s")
    first_lines = [(CONFIGS / group / f"{name}.yaml").read_text().split("\n", 1)[0] for name in list_configs(group)]
    return [(name, line.lstrip("# ")) for name, line in zip(list_configs(group), first_lines, strict=True)]


def _first_line(spec: Any) -> str:
    """The first line of a module's docstring, without importing it."""
    import ast
    from pathlib import Path

    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return docstring.split("\n", 1)[0]


def method_page(method: Method) -> Group:
    """All there is to know about a method before using it."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("hyperparameter", "type", "range", "default", "meaning"):
        table.add_column(column, no_wrap=column == "hyperparameter")
    for h in method.hyperparameters.values():
        default = "required" if h.required else "null" if h.default is None else str(h.default)
        interval = str(h.range) if h.range else ""
        table.add_row(h.name, escape(str(h)), escape(interval), default, escape(h.meaning))
    paper = f" · https://arxiv.org/abs/{method.paper}" if method.paper else ""
    data = "no data" if method.data == "none" else method.data
    parts: list[Any] = [f"[bold]{method.name}[/bold] · {method.kind} · {data}{paper}"]
    for part in method.paragraphs:
        if part.startswith(INDENT):
            legend = "; ".join(f"{symbol}: {meaning}" for symbol, meaning in method.symbols.items())
            parts += ["", Text(part, style="cyan", no_wrap=True, overflow="ignore")]
            parts += [Padding(Text(legend, style="dim"), (1, 0, 0, len(INDENT)))] if legend else []
        else:
            parts += ["", Text(re.sub(r"\n(?![-*\s])", " ", part))]  # wraps as the terminal is wide
    parts += [table] if method.hyperparameters else ["", "It has no hyperparameters.", ""]
    models, settings = method.shown
    given = [f"{name}={value}" for name, value in settings.items()]
    if models:
        words = ["merge", method.name, *models, "-o", "merged", *given]
    else:
        words = ["run", f"method={method.name}", *(f"method.{word}" for word in given)]
        words += ["modelpool=clip-mini", "taskpool=clip-mini"]
    parts.append(f"  fusionbench {' '.join(words)}")
    return Group(*parts)
