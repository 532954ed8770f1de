"""The tables of a page: leaderboards, generalisation, and where every number comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fusionbench.report.draw import Styles, swatch
from fusionbench.report.elements import Html, column, element, joined, number, percent, percents, row, scrolling, table
from fusionbench.report.runs import REFERENCES, Group, Run, distinct, gain, reference, sweeps
from fusionbench.results import key_of

COSTS = {
    "fusion_seconds": ("seconds", "CPU seconds that the fusion took: other work on the machine does not count"),
    "added_parameters": ("added", "Parameters that the result has more than one model"),
}

SPENT = ("seconds", "cpu_seconds", "peak_memory_mb", "added_parameters", "seconds_per_sample", "threads")


def listed(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of a group that a leaderboard shows, and those that are left to the pictures of sweeps.

    Of a sweep it shows what was run with the method's defaults, or was chosen for a reason that is told, and never what
    came out best: that would be a choice by test labels.
    """
    swept = {run.number for sweep in sweeps(runs) for _, run in sweep.runs}
    shown = [run for run in runs if run.number not in swept or run.is_default or run.why]
    return shown, [run for run in runs if run not in shown]


def leaderboard(runs: Sequence[Run], everything: Sequence[Run], styles: Styles) -> Html:
    """Methods by tasks, the best of each column marked; first what they are compared with."""
    tasks = list(dict.fromkeys(name for run in runs for name in run.tasks))
    names = ["average", *tasks]
    order = sorted(runs, key=lambda run: -run.average)
    compared = [run for name in REFERENCES for run in order if run.method == name]
    others = [run for run in order if run not in compared]
    gains = {run.number: gain(run, everything) for run in runs}
    costs = [what for what in COSTS if any(run.cost(what) is not None for run in runs)]
    best = {name: max((run.scores[name] for run in others if name in run.scores), default=None) for name in names}
    has_gain = any(value is not None for value in gains.values())
    header = [column("method"), column("average", data_sort="descending")]
    if has_gain:
        header.append(
            column(element("abbr", "g", title="share of the gap that is closed: 0 pre-trained, 1 individual"))
        )
    header += [column(name) for name in tasks]
    header += [column(element("abbr", COSTS[what][0], title=COSTS[what][1])) for what in costs]

    def line(run: Run, *, is_compared: bool) -> Html:
        low, high = (reference(method, run, everything) for method in REFERENCES)
        cells = [_score(run, name, None if is_compared else best[name], low, high) for name in ("average",)]
        if has_gain:
            value = gains[run.number]
            shown = None if value is None or is_compared else f"{value:.2f}".replace("-", "−")
            cells.append(element("td", class_="none") if shown is None else number(value, shown))
        cells += [_score(run, name, None if is_compared else best[name], low, high) for name in tasks]
        cells += [_cost(run, what) for what in costs]
        return row(named(run, styles, runs), *cells, data_run=run.number)

    bodies = [[line(run, is_compared=True) for run in compared], [line(run, is_compared=False) for run in others]]
    return table(header, bodies, label="leaderboard", sortable=True)


def named(run: Run, styles: Styles, others: Sequence[Run] = ()) -> Html:
    """A run's name in a table: it leads to where its numbers come from."""
    words = run.method.split("_")
    name = joined(*(part for word in words[:-1] for part in (f"{word}_", element("wbr"))), words[-1])
    parts: list[Html] = [swatch(styles[run.label], line=False)]
    parts.append(element("a", name, href=f"#run-{run.number}", class_="run"))
    if run.why:
        parts.append(element("span", "tuned" if run.tuned else "chosen", class_="badge", title=run.why))
    elif run.is_default and run.settings and any(o.method == run.method and o is not run for o in others):
        parts.append(element("span", "default", class_="badge quiet"))
    given = " ".join(f"{k}={_rounded(value)}" for k, value in run.changed.items()) if run.tuned else run.given
    if given:
        parts.append(element("small", given))
    if run.why:
        parts.append(element("small", run.why, class_="why"))
    return joined(*parts)


def _rounded(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def _score(
    run: Run, name: str, best: float | None, low: Mapping[str, float] | None, high: Mapping[str, float] | None
) -> Html:
    value = run.scores.get(name)
    if value is None:
        return element("td", class_="none")
    text: Html | str = percents(value)
    if name == "average" and run.deviation is not None:
        seeds = f"standard deviation over {len(run.results)} seeds"
        text = joined(text, " ", element("small", f"± {100 * run.deviation:.1f}", title=seeds))
    style = None
    worse = low is not None and run.method not in REFERENCES and value < low[name]
    if low is not None and high is not None and high[name] > low[name]:
        share = (value - low[name]) / (high[name] - low[name])
        style = f"--g:{min(max(share, 0), 1):.2f}"
    names = " ".join(c for c, yes in (("best", best is not None and value == best), ("worse", worse)) if yes)
    title = "worse than the pre-trained model" if worse else None
    return element("td", text, data_v=repr(value), style=style, class_=names or None, title=title)


def _cost(run: Run, what: str) -> Html:
    value = run.cost(what)
    if value is None:
        return element("td", class_="none")
    return number(
        value, said(value) if what == "added_parameters" else seconds(value), class_="cost", title=f"{value:g}"
    )


def said(value: float) -> str:
    """A count in few characters: 12.3k, 1.8M."""
    for power, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g}{unit}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def seconds(value: float) -> str:
    """Seconds, with as many decimals as say something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def failures(runs: Sequence[Run]) -> Html:
    """What has failed, and why."""
    lines = []
    for run in runs:
        about = described(run.group, run.cell.get("seed"))
        name = joined(element("code", run.label), f" {about}" if about else "")
        lines.append(element("li", name, ": ", element("span", run.failed, class_="reason")))
    return element("ul", *lines, class_="failed")


def described(group: Group, seed: object = None) -> str:
    """What of a pool a group is about, in words; nothing where it is all of it."""
    parts = [f"of {', '.join(group.models)}"] if group.models is not None else []
    parts += ["on all tasks"] if group.tasks == "all" and group.models is not None else []
    parts += [f"under {group.corruption}, severity {group.severity}"] if group.corruption else []
    return ", ".join([*parts, *([f"seed {seed}"] if seed is not None else [])])


def generalization(runs: Sequence[Run], everything: Sequence[Run], styles: Styles) -> Html | None:
    """Tasks whose models were merged, and those that nothing in the merge has seen, with the change they underwent."""
    merged = runs[0].group.models or ()
    tasks = list(dict.fromkeys(name for run in runs for name in run.tasks))
    seen = [name for name in tasks if name in merged]
    unseen = [name for name in tasks if name not in merged]
    if not seen or not unseen:
        return None
    header = [column("method"), column("seen"), column("unseen", data_sort="descending"), column("Δ unseen")]
    header += [column(joined(name, element("small", "unseen"))) for name in unseen]
    header += [column(joined(name, element("small", "seen"))) for name in seen]
    lines: dict[bool, list[Html]] = {True: [], False: []}
    for run in sorted(runs, key=lambda run: -mean_of(run, unseen)):
        base = reference("pretrained", run, everything)
        is_base = run.method == "pretrained"
        before = None if base is None or is_base else fmean(base[name] for name in unseen)
        change = None if before is None else mean_of(run, unseen) - before
        cells = [percent(mean_of(run, seen)), percent(mean_of(run, unseen)), difference(change)]
        cells += [_changed(run.scores.get(name), None if base is None or is_base else base[name]) for name in unseen]
        cells += [percent(run.scores.get(name)) for name in seen]
        lines[is_base].append(row(named(run, styles), *cells, data_run=run.number))
    return table(header, [lines[True], lines[False]], label="seen and unseen tasks", sortable=True)


def experts(runs: Sequence[Run], everything: Sequence[Run], styles: Styles) -> Html:
    """Base and experts, each alone on every task, and what is made of them, from the smallest to the largest."""
    base = [run for run in everything if run.method == "pretrained" and set(run.tasks) >= set(runs[0].tasks)][:1]
    own = list(dict.fromkeys(name for run in runs for name in run.group.models or ()))
    every = list(dict.fromkeys(name for run in runs for name in run.tasks))
    tasks = [*(name for name in own if name in every), *(name for name in every if name not in own)]
    alone = [run for run in runs if len(run.group.models or ()) == 1 and not run.cost("added_parameters")]
    made = [run for run in runs if run not in alone]
    made.sort(key=lambda run: (run.parameters or 0, len(run.group.models or ()), run.label))
    best = {name: max(run.scores[name] for run in runs if name in run.scores) for name in ("average", *tasks)}
    header = [column("method"), column("models", class_="words"), column("parameters"), column("average")]
    header += [column(joined(name, element("small", "expert"))) if name in own else column(name) for name in tasks]

    def line(run: Run) -> Html:
        low, high = (reference(method, run, everything) for method in REFERENCES)
        models = ", ".join(run.group.models or ["base"]) if run not in base else "base"
        count = run.parameters
        size = element("td", class_="none") if count is None else number(count, said(count), title=f"{count:,}")
        top = None if run in base else best
        cells = [_score(run, name, None if top is None else top[name], low, high) for name in ("average", *tasks)]
        return row(named(run, styles), element("td", models, class_="words"), size, *cells, data_run=run.number)

    bodies = [[line(run) for run in (*base, *alone)], [line(run) for run in made]]
    return table(header, bodies, label="experts and what is made of them", sortable=True)


def mean_of(run: Run, tasks: Sequence[str]) -> float:
    """The mean score on some tasks."""
    return fmean(run.scores[name] for name in tasks if name in run.scores)


def difference(value: float | None) -> Html:
    """A cell with what a score is above the pre-trained model's."""
    if value is None:
        return element("td", class_="none")
    worse = value < 0
    title = "negative transfer: worse than the pre-trained model" if worse else None
    return percent(value, sign=True, class_="worse" if worse else "better", title=title)


def _changed(value: float | None, before: float | None) -> Html:
    if value is None:
        return element("td", class_="none")
    if before is None:
        return percent(value)
    worse = value < before
    change = element("small", percents(value - before, sign=True))
    title = "negative transfer: worse than the pre-trained model" if worse else None
    return element(
        "td", percents(value), " ", change, data_v=repr(value), class_="worse" if worse else None, title=title
    )


def all_runs(runs: Sequence[Run]) -> Html:
    """Where every number comes from: an entry for each run, then the models and the data."""
    entries = [_provenance(run) for run in runs]
    count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    return element("details", element("summary", f"{count}, models and data"), *entries, *_inputs(runs), class_="runs")


def _provenance(run: Run) -> Html:
    facts = run.facts
    lines: list[tuple[str, str]] = [("method", run.method), ("hyperparameters", _values(run.settings) or "none")]
    lines += [("tuned" if run.tuned else "chosen", run.why)] if run.why else []
    lines += [("search", _values(facts["tuned"]))] if "tuned" in facts else []
    about = described(run.group)
    lines += [("merged", about)] if about else []
    inputs = facts.get("modelpool", {})
    found = [f"{name} · {model.get('location', '')} · {_digest(model)}" for name, model in inputs.items()]
    lines.append(("models", _items(found)))
    lines.append(("data", _items(f"{name} · {_digest(task)}" for name, task in facts.get("taskpool", {}).items())))
    for result in run.results:
        run_facts = result.report.get("run", {})
        seed = result.cell.get("seed")
        lines.append(("result" if seed is None else f"seed {seed}", f"{result.key}.json"))
        lines.append(("scores", _items(f"{name} · {_values(result.report[name])}" for name in result.primary)))
        lines.append(("cost", _values({name: run_facts[name] for name in SPENT if name in run_facts})))
        lines.append(("versions", _values(run_facts.get("versions", {}))))
    pairs = [part for name, text in lines if text for part in (element("dt", name), element("dd", text))]
    title = joined(element("code", run.label), f" {described(run.group)} · ", percents(run.average))
    body = element("dl", *pairs, id=f"run-{run.number}", tabindex="-1")
    return element("details", element("summary", title), body, class_="provenance")


def _items(lines: Iterable[str]) -> Html:
    return joined(*(element("span", line) for line in lines))


def _inputs(runs: Sequence[Run]) -> list[Html]:
    parts = []
    for what, title in (("modelpool", "Models"), ("taskpool", "Data")):
        lines = []
        for (name, _), about in distinct(runs, what).items():
            lines.append(row(name, element("td", element("code", _values(about)), class_="words")))
        if lines:
            shown = element("table", element("tbody", *lines), class_="facts")
            parts += [element("h4", title), scrolling(shown, title)]
    return parts


def _digest(about: Mapping[str, Any]) -> str:
    """The beginning of a hash of contents, where one is told, or of what is told."""
    found = next((about[name] for name in ("xxh3", "data", "sha256") if isinstance(about.get(name), str)), None)
    return (found or key_of(about))[:12]


def _values(table: Any) -> str:
    """Data in one line."""
    if isinstance(table, Mapping):
        return ", ".join(f"{name} {_inner(value)}" for name, value in table.items())
    return _inner(table)


def _inner(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_values(value)})"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
