"""What the paper's authors published, beside runs of the same methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from fusionbench import published
from fusionbench.report.boards import difference, mean_of, named
from fusionbench.report.draw import Styles
from fusionbench.report.elements import Html, column, element, joined, number, percent, percents, row, table
from fusionbench.report.runs import Run, reference


def of_all_tasks(runs: Sequence[Run], styles: Styles) -> list[Html]:
    """What was published of the same methods, beside these runs: a block for each table."""
    blocks = []
    for found, same in published.tables_for(_base_of(runs)):
        mean = next((name for name in ("Average", "Avg.") if found.rows and name in found.rows[0]), None)
        pairs = [(run, line) for run, line in _matched(found, runs) if mean is None or line.get(mean)]
        if not pairs:
            continue
        scores = [name for name in found.rows[0] if name not in (*published.NO_SCORES, mean)]
        header = [column("method"), column("here", data_sort="descending")]
        header += [column("published")] if mean else []
        header += [column("published as", class_="words"), *(column(_plain(name)) for name in scores)]
        lines = []
        for run, line in sorted(pairs, key=lambda pair: -pair[0].average):
            cells = [percent(run.average)]
            cells += [_published(line[mean], class_="strong")] if mean else []
            cells += [_published_as(line), *(_published(line.get(name) or "") for name in scores)]
            lines.append(row(named(run, styles), *cells, data_run=run.number))
        shown = table(header, [lines], label=f"published: {found.what}", sortable=True)
        blocks.append(joined(_about_published(found, same), shown))
    return blocks


def of_unseen_tasks(runs: Sequence[Run], styles: Styles) -> list[Html]:
    """What was published of unseen tasks, beside the runs of one choice of models."""
    merged = runs[0].group.models or ()
    blocks = []
    for found, same in published.tables_for(_base_of(runs), "unseen tasks", merged):
        means = ["Seen Tasks: Avg.", "Unseen Tasks: Avg."]
        before = next(float(line[means[1]]) for line in found.rows if line["method"] == "Pre-trained")
        header = [column("method")]
        for name in ("seen", "unseen", "Δ unseen"):
            header += [column(name, data_sort="descending" if name == "unseen" else None), column("published")]
        lines = []
        for run, line in sorted(_matched(found, runs), key=lambda pair: -mean_of(pair[0], _unseen(pair[0]))):
            base = reference("pretrained", run, runs)
            unseen, is_base = mean_of(run, _unseen(run)), run.method == "pretrained"
            change = None if base is None or is_base else unseen - fmean(base[name] for name in _unseen(run))
            theirs = None if is_base else (float(line[means[1]]) - before) / 100
            cells = [percent(mean_of(run, merged)), _published(line[means[0]])]
            cells += [percent(unseen), _published(line[means[1]]), difference(change), difference(theirs)]
            cells.append(_published_as(line))
            lines.append(row(named(run, styles), *cells, data_run=run.number))
        header.append(column("published as", class_="words"))
        shown = table(header, [lines], label=f"published: {found.what}", sortable=True)
        blocks += [joined(_about_published(found, same), shown)] if lines else []
    return blocks


def _unseen(run: Run) -> list[str]:
    return [name for name in run.tasks if name not in (run.group.models or ())]


def of_corruptions(here: Sequence[tuple[Run, Mapping[str, float | None]]], styles: Styles) -> list[Html]:
    """What was published of corrupted images, small, beside averages here: runs, each with its averages by column."""
    blocks = []
    runs = [run for run, _ in here]
    for found, same in published.tables_for(_base_of(runs), "corruptions", runs[0].group.models or ()):
        theirs: dict[str, dict[str, float]] = {}
        for line in found.rows:
            name = "clean" if line["corruption"].startswith("Clean") else line["corruption"].lower().replace(" ", "_")
            theirs.setdefault(line["method"], {})[name] = float(line["Average"]) / 100
        for scores in theirs.values():
            scores["mean"] = fmean(value for name, value in scores.items() if name != "clean")
        names = [name for name in here[0][1] if any(name in scores for scores in theirs.values())]
        header = [column("method"), *(column(joined(name, element("small", "published"))) for name in names)]
        lines = []
        for run, scores in here:
            for called in dict.fromkeys(line["method"] for line in published.matches(found, run.method, run.settings)):
                cells = [_beside(scores[name], theirs[called].get(name)) for name in names]
                label = joined(named(run, styles), element("small", f"published as {called}"))
                lines.append(row(label, *cells))
        shown = table(header, [lines], label=f"published: {found.what}", sortable=True)
        blocks += [joined(_about_published(found, same), shown)] if lines else []
    return blocks


def _beside(value: float | None, theirs: float | None) -> Html:
    shown = [percents(value)] if value is not None else []
    small = [element("small", percents(theirs), class_="published")] if theirs is not None else []
    return element("td", *shown, " ", *small, data_v=None if value is None else repr(value))


def _base_of(runs: Sequence[Run]) -> str:
    """Where the base model of runs is."""
    base = next((run.facts["modelpool"]["base"] for run in runs if "base" in run.facts.get("modelpool", {})), {})
    return str(base.get("location", ""))


def _matched(found: published.Table, runs: Iterable[Run]) -> list[tuple[Run, dict[str, str]]]:
    """Runs, each with a line of a published table about its method."""
    return [(run, line) for run in runs for line in published.matches(found, run.method, run.settings)]


def _about_published(found: published.Table, same: bool) -> Html:
    """What a published table is about, and what to know before comparing."""
    caveat = "" if same else "Other models and other data: the order of the methods compares, not the numbers. "
    return element("p", f"Published: {found.what}. ", element("strong", caveat), found.caveat, class_="note")


def _published_as(line: Mapping[str, str]) -> Html:
    return element("td", " ".join(filter(None, (line.get("method"), line.get("hyperparameter")))), class_="words")


def _plain(name: str) -> str:
    return name.replace(" \\uparrow", " ↑").replace(" \\downarrow", " ↓")


def _published(value: str, **attributes: object) -> Html:
    return number(float(value), value, **attributes) if value else element("td", class_="none")
