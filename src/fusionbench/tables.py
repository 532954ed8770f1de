"""Tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
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


def differences(found: list[Difference], limit: int | None, width: int) -> Group:
    """Tensors that differ most first, and all together at the end."""
    *tensors, total = found
    shown = [*sorted(tensors, key=lambda d: -d.relative)[:limit], total]
    columns = {
        "|A|": [f"{d.norm_a:.4g}" for d in shown],
        "|B|": [f"{d.norm_b:.4g}" for d in shown],
        "|A-B|": [f"{d.norm_difference:.4g}" for d in shown],
        "|A-B|/|A|": [f"{d.relative:.4g}" for d in shown],
        "cosine": [f"{d.cosine:.6f}" for d in shown],
        "largest change": [f"{d.largest:.3g}" for d in shown],
    }
    names = [*(d.name for d in shown[:-1]), f"all {len(tensors)} tensors"]
    return _fitting({"tensor": names}, list(columns.items()), width, total=True)


def extraction(found: Extracted, width: int) -> Group:
    """Modules of an extracted adapter in their order, and all together at the end."""
    modules = found.modules.values()
    total = sum(m.norm**2 for m in modules) ** 0.5
    least = sum((m.norm * m.least) ** 2 for m in modules) ** 0.5 / total
    columns = {
        "shape": [*(" x ".join(map(str, m.shape)) for m in modules), ""],
        "rank": [*(str(m.rank) for m in modules), str(found.config["r"])],
        "|change|": [*(f"{m.norm:.4g}" for m in modules), f"{total:.4g}"],
        "error": [*(f"{m.error:.3g}" for m in modules), f"{found.error:.3g}"],
        "no adapter below": [*(f"{m.least:.3g}" for m in modules), f"{least:.3g}"],
    }
    names = [*found.modules, f"all {len(found.modules)} modules"]
    return _fitting({"module": names}, list(columns.items()), width, total=True)


def truncations(combined: Combined, width: int) -> Group:
    """What the rank of merged adapters left out of each module's exact merge."""
    ranks = [str(combined.ranks[name]) for name in combined.errors]
    left_out = [f"{error:.3g}" for error in combined.errors.values()]
    return _fitting({"module": list(combined.errors)}, [("rank", ranks), ("left out", left_out)], width)


def matrix(
    rows: list[str], columns: list[str], values: Sequence[Sequence[float | None]], title: str, width: int
) -> Group:
    """A table of numbers; a dash stands for None."""
    cells = [["-" if value is None else f"{value:.3f}" for value in row] for row in values]
    by_column = [(name, [row[i] for row in cells]) for i, name in enumerate(columns)]
    return _fitting({"": rows}, by_column, width, title)


def reports(found: Mapping[str, Report], width: int) -> Group:
    """Every score of every report: errors and angles as they are, shares in percent."""
    names = list(dict.fromkeys(key for report in found.values() for key in report if key not in ("model_info", "run")))
    wanted = list(dict.fromkeys((n, score) for n in names for report in found.values() for score in report.get(n, ())))
    columns = []
    for name, score in wanted:
        if score not in ("loss", "unparsable"):
            cells = [report.get(name, {}).get(score) for report in found.values()]
            numbers = ["" if cell is None else _score(cell, score) for cell in cells]
            columns.append((name if score == "accuracy" else f"{name}\n{score}", numbers))
    return _fitting({"report": list(found)}, columns, width, "scores, shares in percent")


def _score(value: float, score: str) -> str:
    return f"{value:.2f}" if "error" in score or "angle" in score else f"{100 * value:.1f}"


def published(name: str, rows: list[dict[str, str]], width: int) -> Group:
    """Rows of a published table, as they were published."""
    cells = {column: [row[column] or "" for row in rows] for column in rows[0] if column != "category"}
    words = ("method", "Model", "corruption", "hyperparameter")
    labels = {column: cells[column] for column in cells if column in words}
    numbers = [
        (column.replace(" \\uparrow", "").replace(" \\downarrow", ""), cells[column])
        for column in cells
        if column not in words
    ]
    return _fitting(labels, numbers, width, name)


def _fitting(
    labels: Mapping[str, list[str]],
    columns: list[tuple[str, list[str]]],
    width: int,
    title: str | None = None,
    *,
    total: bool = False,
) -> Group:
    """A table of numbers or, where it is wider than `width` characters, several, each with some of its columns.

    No number is cut, and no label: these are broken into lines, within words only where no column would fit.

    Args:
        labels: what the rows are called, a column or two: the same in each of the tables.
        columns: each with its title.
        width: in characters, as the terminal has it.
        title: of the first table.
        total: whether the last row is of all others together.
    """
    gap, edge = 3, 1
    wide = [_width((name, *cells)) for name, cells in labels.items()]
    across = [_width((name, *cells)) + gap for name, cells in columns]
    if sum(wide) + gap * len(wide) + sum(across) + edge > width:
        words = [" ".join((name, *cells)).split() for name, cells in labels.items()]
        wide = [max(_width(of), min(whole, width // 5)) for of, whole in zip(words, wide, strict=True)]
        columns = [(name.replace(" ", "\n"), cells) for name, cells in columns]
        across = [_width((name, *cells)) + gap for name, cells in columns]
        room = width - edge - max(across, default=0) - gap * len(wide)
        wide[0] = max(8, min(wide[0], room - sum(wide[1:])))
    room = width - edge - sum(wide) - gap * len(wide)
    blocks: list[list[int]] = [[]]
    for i, needed in enumerate(across):
        if blocks[-1] and sum(across[j] for j in blocks[-1]) + needed > room:
            blocks.append([])
        blocks[-1].append(i)
    return Group(*(_block(labels, wide, [columns[i] for i in block], title, total) for block in blocks))


def _block(
    labels: Mapping[str, list[str]],
    wide: list[int],
    columns: list[tuple[str, list[str]]],
    title: str | None,
    total: bool,
) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name, across in zip(labels, wide, strict=True):
        table.add_column(escape(name), width=across, overflow="fold")
    for name, _ in columns:
        table.add_column(escape(name), justify="right", no_wrap=True)
    rows = list(zip(*labels.values(), *(cells for _, cells in columns), strict=True))
    for i, row in enumerate(rows):
        if total and i == len(rows) - 1:
            table.add_section()
        table.add_row(*map(escape, row))
    return table


def _width(cells: Iterable[str]) -> int:
    """Of the widest line, in characters."""
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


def listing(what: str, width: int) -> Table:
    """The names there are of methods, modelpools, taskpools, architectures or published tables, with what each is.

    Of methods, with what each needs: in columns, where the terminal is wide enough for these.
    """
    table = Table(box=SIMPLE_HEAD, title=what, title_justify="left", show_header=False)
    if what != "methods":
        table.add_column(no_wrap=True)
        for name, about in _others(what):
            table.add_row(name, escape(about))
        return table
    methods = sorted(list_methods(), key=lambda m: (m.kind, m.name))
    if width < 130:
        table.add_column(no_wrap=True)
        for kind in dict.fromkeys(method.kind for method in methods):
            table.add_row(f"[bold]{kind}[/]", "")
            for method in methods:
                if method.kind == kind:
                    lines = (escape(method.summary), f"[dim]{needs}[/]" if (needs := _needs(method)) else "")
                    table.add_row(method.name, "\n".join(filter(None, lines)))
            table.add_section()
        return table
    table.show_header = True
    for column in ("", "kind", "looks at", "gradients", "parameters", "arXiv"):
        table.add_column(column, no_wrap=True)
    table.add_column()
    for method in methods:
        more = "more" if method.adds_parameters else ""
        needs = (method.looks_at, "yes" if method.gradients else "", more, method.paper)
        table.add_row(method.name, method.kind, *needs, escape(method.summary))
    return table


def _needs(method: Method) -> str:
    """What a method looks at, whether by gradients, whether it adds parameters, and its paper, in a line."""
    words = (
        method.looks_at and f"looks at {method.looks_at}",
        "gradients" if method.gradients else "",
        "adds parameters" if method.adds_parameters else "",
        method.paper and f"arXiv {method.paper}",
    )
    return ", ".join(filter(None, words))


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
    data = method.looks_at or "no data"
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
