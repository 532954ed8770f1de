"""The documents' tables of kept results: rows in the order of a suite, and what is not there, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from fusionbench.compare import compare
from fusionbench.published import get_table, matches
from fusionbench.report.boards import mean_of
from fusionbench.report.lines import score_table
from fusionbench.report.runs import Run, gain, reference
from fusionbench.results import NOT_RUN, Result, Results, as_markdown
from fusionbench.suites import kept, load_suite

CLAIMED = ("task_arithmetic", "regmean", "regmean_plus_plus", "adamerging", "smile_upscaling", "we_moe")
SUITES = ("multi-task", "adaptation", "minilm")  # of which a family's table is


def all_methods(family: str, results: Results, before: Sequence[Sequence[str]] = ()) -> str:
    """Every method on a family, with its defaults and with what was chosen, and why.

    Rows of the table `before`, its header first, stay where a run is not among the results.
    """
    every = _of_family(family, results)
    found = [result for result in every if result.failed != NOT_RUN]
    header, lines = score_table(found)
    header = ["parameters" if title == "added" else title for title in header]
    rows = {row[0]: list(row) for row in before[1:] if list(before[0]) == header} | {line[0]: line for line in lines}
    shown = [result for result in every if result.label in rows]
    chosen = [f"- `{run.label}`: {run.why}" for run in map(_run, shown) if run.why and "failed" not in rows[run.label]]
    left = ", ".join(f"`{result.label}`" for result in every if result.label not in rows)
    not_run = ["", f"Not run: {left}."] if left else []
    table = as_markdown(header, [rows[label] for label in _labels(shown)])
    return "\n".join([table, *_listed(chosen), *_failures(found), *not_run, ""])


def all_scores(family: str, results: Results, before: Sequence[Sequence[str]] = ()) -> str:
    """Every score of every task: shares in percent, errors and angles as they are; rows of `before` as above."""
    found = kept([cell for cell in load_suite("multi-task").cells if cell.pool == family], results)
    done = [result for result in found if result.scores]
    columns = [(task, score) for task in done[0].primary for score in done[0].report[task]] if done else []
    header = ["method", *(f"{task}: {score}" for task, score in columns)]
    known = {row[0]: row for row in before[1:] if list(before[0]) == header}
    lines = []
    for result in found:
        if result.failed == NOT_RUN and result.label in known:
            lines.append(known[result.label])
            continue
        numbers = [result.report[task][score] for task, score in columns] if result.scores else []
        is_share = [not ("error" in score or "angle" in score) for _, score in columns]
        cells = [_percent(n) if share else f"{n:.2f}" for n, share in zip(numbers, is_share, strict=bool(numbers))]
        lines.append([result.label, *(cells or ["" for _ in columns])])
    return "\n".join([as_markdown(header, lines), ""])


def _of_family(family: str, results: Results) -> list[Result]:
    return [r for suite in SUITES for r in kept([c for c in load_suite(suite).cells if c.pool == family], results)]


def claims(results: Results, before: Sequence[Sequence[str]] = ()) -> str:
    """How much of the gap methods close in the paper and on clip-mini, and how much more than task arithmetic.

    Rows of `before` as above.
    """
    known = {row[0]: row for row in before[1:]}
    found = _of_family("clip-mini", results)
    runs = [run for run in map(_run, found) if run.scores]
    plain = next(result for result in found if result.label == "task_arithmetic")
    theirs = get_table("clip-vit-b32-8tasks")
    low, high = (float(matches(theirs, name, {})[0]["Average"]) for name in ("pretrained", "individual"))
    lines = []
    for result in found:
        if result.cell["method"] not in CLAIMED or {"by", "density"} & set(result.cell["hyperparameters"]):
            continue  # the task-wise AdaMerging, and AdaMerging++, are other claims
        if result.failed == NOT_RUN and result.label in known:
            lines.append(known[result.label])
            continue
        run = _run(result)
        published = matches(theirs, run.method, run.settings)[-1:]  # of AdaMerging, the layer-wise
        there = "".join(f"{(float(line['Average']) - low) / (high - low):.2f}" for line in published)
        here = gain(run, runs) if run.scores else None
        more = ""
        if run.scores and plain.scores and result is not plain:
            one = next(one for one in compare(plain, result) if one.task == "average")
            more = f"{100 * one.difference:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        lines.append([run.label, there, run.missing if here is None else f"{here:.2f}", more])
    header = ["method", "g in the paper", "g here", "points above task arithmetic (95 % interval)"]
    return as_markdown(header, lines) + "\n"


def generalization(results: Results) -> str:
    """Tasks that were merged, and those that were not, with the change of these; a table for each choice of models."""
    found = kept(load_suite("generalization").cells, results)
    parts = []
    for models in dict.fromkeys(tuple(result.cell["models"]) for result in found):
        mine = [result for result in found if tuple(result.cell["models"]) == models]
        runs = [run for run in map(_run, mine) if run.scores]
        unseen = [name for name in (runs[0].tasks if runs else ()) if name not in models]
        lines = []
        for run in map(_run, mine):
            base = reference("pretrained", run, runs) if run.scores else None
            if base is None:
                lines.append([run.label, "", "", *("" for _ in unseen), run.missing])
                continue
            change = mean_of(run, unseen) - fmean(base[name] for name in unseen)
            seen = mean_of(run, models)
            numbers = [seen, *(run.scores[name] for name in unseen), mean_of(run, unseen)]
            cells = [*map(_percent, numbers), "" if run.method == "pretrained" else f"{100 * change:+.1f}"]
            lines.append([run.label, *cells])
        header = ["method", "mean of the six", *unseen, "mean unseen", "change"]
        parts += [f"Merged: {', '.join(models)}.", "", as_markdown(header, lines), *_failures(mine), ""]
    return "\n".join(parts)


def robustness(results: Results) -> str:
    """Averages on clean and on corrupted test images, at the severity that all methods have."""
    found = kept(load_suite("robustness").cells, results)
    severities = [{r.cell["severity"] for r in found if r.label == label} - {None} for label in _labels(found)]
    severity = min(set.intersection(*severities))
    mine = [result for result in found if result.cell["severity"] in (None, severity)]
    names = dict.fromkeys(str(result.cell["corruption"] or "clean") for result in mine)
    table = {
        label: {str(r.cell["corruption"] or "clean"): r for r in mine if r.label == label} for label in _labels(mine)
    }
    means = {}
    for label, row in table.items():
        scores = [r.scores["average"] for name, r in row.items() if name != "clean" and r.scores]
        means[label] = _percent(fmean(scores)) if len(scores) == len(names) - 1 else ""
    header = ["method", "clean", "mean", *(name.replace("_", " ") for name in names if name != "clean")]
    lines = [
        [
            label,
            _average(row.get("clean")),
            means[label],
            *(_average(row.get(name)) for name in names if name != "clean"),
        ]
        for label, row in table.items()
    ]
    about = f"Averages of {', '.join(found[0].cell['models'])}, at severity {severity}; `mean` is that of the seven."
    return "\n".join([about, "", as_markdown(header, lines), *_failures(mine), ""])


def scaling(results: Results) -> str:
    """Averages by the number of merged models."""
    found = kept(load_suite("scaling").cells, results)
    rows = {label: {len(r.cell["models"]): r for r in found if r.label == label} for label in _labels(found)}
    counts = sorted({count for row in rows.values() for count in row})
    lines = [[label, *(_average(row.get(count)) for count in counts)] for label, row in rows.items()]
    return "\n".join([as_markdown(["merged models", *map(str, counts)], lines), *_failures(found), ""])


def sweep(results: Results) -> str:
    """Averages by a hyperparameter: a table of factors, and one of densities, means over seeds."""
    parts = []
    for name, title in (("scaling_factor", "factor"), ("density", "density")):
        found = [r for r in kept(load_suite("sweep").cells, results) if name in r.cell["hyperparameters"]]
        rows: dict[str, dict[str, list[Result]]] = {}
        for result in found:
            row = rows.setdefault(f"{result.cell['method']} on {result.cell['modelpool']}", {})
            row.setdefault(str(result.cell["hyperparameters"][name]), []).append(result)
        values = list(dict.fromkeys(value for row in rows.values() for value in row))
        lines = [[label, *(_mean(row.get(value, [])) for value in values)] for label, row in rows.items()]
        parts += [as_markdown([title, *values], lines), *_failures(found), ""]
    return "\n".join(parts)


def upscaling(results: Results) -> str:
    """A base, experts alone, and what is made of them, on all tasks, with the number of parameters."""
    found = [r for r in kept(load_suite("upscaling").cells, results) if r.cell["method"] != "individual"]
    tasks = list(next((result.primary for result in found if result.scores), ()))
    lines = []
    for result in found:
        of_base = result.cell["method"] in ("pretrained", "depth_upscaling")
        models, size = ["base"] if of_base else result.cell["models"], _run(result).parameters
        scores = [_percent(result.scores[name]) for name in tasks] if result.scores else [""] * len(tasks)
        label = "alone" if result.cell["method"] in ("pretrained", "passthrough") else result.label
        count = "" if size is None else f"{size / 1e6:.2f}M"
        lines.append([", ".join(models), label, count, *scores, _average(result)])
    return "\n".join([as_markdown(["models", "how", "parameters", *tasks, "average"], lines), *_failures(found), ""])


TABLES: dict[str, Callable[[Results], str]] = {
    "generalization": generalization, "robustness": robustness, "scaling": scaling, "sweep": sweep,
    "upscaling": upscaling,
}  # fmt: skip


def _labels(found: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.label for result in found))


def _run(result: Result) -> Run:
    return Run(0, (result,))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _average(result: Result | None) -> str:
    return "" if result is None else _percent(result.scores["average"]) if result.scores else _run(result).missing


def _mean(found: Sequence[Result]) -> str:
    """The mean of seeds, with the standard deviation where there are several."""
    if len(found) < 2 or not all(result.scores for result in found):
        return _average(found[0]) if len(found) == 1 else "" if not found else NOT_RUN
    run = Run(0, tuple(found))
    return f"{_percent(run.average)} ± {100 * (run.deviation or 0):.1f}"


def _listed(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []


def _failures(found: Sequence[Result]) -> list[str]:
    """Why there are no scores, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for result in found:
        if result.failed and result.failed != NOT_RUN:
            reasons.setdefault(result.failed, []).append(f"`{result.label}`")
    return _listed([f"- {', '.join(dict.fromkeys(labels))} failed: {why}" for why, labels in reasons.items()])
