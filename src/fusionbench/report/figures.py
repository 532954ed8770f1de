"""The pictures of a page, each with its numbers beside it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from fusionbench.report import beside, draw
from fusionbench.report.boards import described, said, seconds
from fusionbench.report.draw import SHOWN, Point, Series, Styles
from fusionbench.report.elements import Html, column, element, joined, number, percent, percents, row, table
from fusionbench.report.runs import REFERENCES, Group, Run, Sweep, front, gain, looks_at_tests, reference, sweeps
from fusionbench.results import key_of

COSTS = {
    "added_parameters": ("added parameters", said),
    "fusion_seconds": ("CPU seconds of the fusion", seconds),
    "peak_memory_mb": ("peak memory, MB", said),
}


def figure(svg: Html, title: str, note: str = "", numbers: Html | None = None) -> Html:
    """A chart with its title, what to know, and its numbers as a table."""
    caption = element("figcaption", element("strong", title), *([element("span", note)] if note else []))
    more = [element("details", element("summary", "numbers"), numbers)] if numbers is not None else []
    return element("figure", caption, element("div", svg, class_="picture"), *more)


def legend(series: Sequence[Series]) -> Html:
    """Names and signs of series; each can be shown or left away."""
    keys = []
    for i, one in enumerate(series):
        box = element("input", type="checkbox", checked=one.shown, data_series=i)
        keys.append(element("label", box, draw.swatch(one.style), one.label))
    return element("div", *keys, class_="legend", role="group", aria_label="shown methods")


def overview(pools: dict[str, list[Run]], everything: Sequence[Run], styles: Styles) -> Html | None:
    """How much of the gap between the pre-trained and the individual models each method closes, by pool."""
    rows, lines = [], []
    for pool, runs in pools.items():
        gains = [(gain(run, everything), run) for run in runs if run.method not in REFERENCES]
        found = [(value, run) for value, run in gains if value is not None]
        if found:
            rows.append((pool, [(value, f"{run.label}: {value:.2f}", styles[run.label]) for value, run in found]))
            best, top = max(found, key=lambda pair: pair[0])
            low, high = (reference(method, top, everything) for method in REFERENCES)
            assert low is not None and high is not None  # there is no gain without
            cells = [percent(low["average"]), percent(top.average), percent(high["average"])]
            cells += [number(best, f"{best:.2f}"), element("td", top.label, class_="words")]
            lines.append(row(element("a", pool, href=f"#{anchor(pool, pools)}"), *cells))
    if not rows:
        return None
    note = "Each mark is a method: 0 is the pre-trained model, 1 what a model for each task reaches."
    header = [column(name) for name in ("pool", "pre-trained", "best", "individual", "g")]
    numbers = table([*header, column("best method", class_="words")], [lines], label="best of each pool")
    svg = draw.strips(rows, title="Share of the gap that is closed, by pool")
    return figure(svg, "How much of the gap is closed", note, numbers)


def anchor(pool: str, pools: dict[str, list[Run]]) -> str:
    """The id of a pool's section."""
    return f"pool-{list(pools).index(pool) + 1}"


def radars(runs: Sequence[Run], everything: Sequence[Run], styles: Styles) -> Html | None:
    """Scores of every task relative to its individual model, as in Figure 4 of the FusionBench paper."""
    tasks = next((run.tasks for run in runs), [])
    same = [run for run in runs if run.tasks == tasks and run.method != "individual"]
    high = reference("individual", same[0], everything) if same else None
    if len(tasks) < 3 or high is None or not all(high[name] > 0 for name in tasks):
        return None
    order = sorted(same, key=lambda run: -run.average)
    order = [run for run in order if run.method == "pretrained"] + [run for run in order if run.method != "pretrained"]
    shown = _first(order, 5)
    series = []
    for run in order:
        values = [(name, run.scores[name] / high[name]) for name in tasks]
        dots = [Point(i, value, f"{run.label}, {name}: {value:.2f}") for i, (name, value) in enumerate(values)]
        series.append(Series(run.label, dots, styles[run.label], run in shown))
    every = [p.y for s in series for p in s.points]
    lowest, highest = max(0.0, math.floor(10 * min(every) - 0.5) / 10), max(1.0, *every)
    svg = draw.radar(tasks, series, title="Scores relative to the individual models", lowest=lowest, highest=highest)
    header = [column("method"), *(column(name) for name in tasks)]
    numbers = table(header, [[_plain(one.label, [p.y for p in one.points]) for one in series]], label="relative scores")
    note = f"The strong ring, 1, is the individual model of each task; the middle is {lowest:g}."
    drawn = figure(svg, "Relative to a model for each task", note, numbers)
    return element("div", drawn, legend(series), class_="toggled beside")


def _first(runs: Sequence[Run], count: int) -> list[Run]:
    """The first run of each method, for so many methods."""
    found = {}
    for run in runs:
        found.setdefault(run.method, run)
    return list(found.values())[:count]


def _plain(label: str, values: Sequence[float]) -> Html:
    return row(label, *(number(value, f"{value:.2f}") for value in values))


def costs(runs: Sequence[Run], styles: Styles) -> list[Html]:
    """Averages against costs, with the Pareto front."""
    found = []
    for what, (label, say) in COSTS.items():
        pairs = [(value, run) for run in runs if (value := run.cost(what)) is not None and value >= 0]
        if len({value for value, _ in pairs}) < 2:
            continue
        places = [(value, run.average) for value, run in pairs]
        methods = [i for i, (_, run) in enumerate(pairs) if run.method not in REFERENCES]
        best = [methods[i] for i in front([places[i] for i in methods])]
        twice = _repeated(run for _, run in pairs)
        series = [
            Series(
                run.label if run.method in twice else run.method,
                [Point(value, run.average, f"{run.label}: {percents(run.average)}, {say(value)}")],
                styles[run.label],
            )
            for value, run in pairs
        ]
        svg = draw.points(
            series, title=f"Average against {label}", x_label=label, y_label="average, %",
            front=[places[i] for i in best],
        )  # fmt: skip
        header = [column("method"), column(label), column("average"), column("front", class_="words")]
        lines = []
        for i in sorted(range(len(pairs)), key=lambda i: (places[i][0], -places[i][1])):
            value, run = pairs[i]
            on = element("td", "on the front" if i in best else "", class_="words")
            lines.append(row(run.label, number(value, say(value)), percent(run.average), on, data_run=run.number))
        numbers = table(header, [lines], label=f"averages and {label}")
        found.append(figure(svg, f"Average and {label}", "", numbers))
    return found


def _repeated(runs: Iterable[Run]) -> set[str]:
    """The methods that come up more than once."""
    seen, twice = set(), set()
    for run in runs:
        (twice if run.method in seen else seen).add(run.method)
    return twice


def sweep_curves(runs: Sequence[Run], everything: Sequence[Run], styles: Styles) -> list[Html]:
    """Averages against a hyperparameter, a chart for each hyperparameter."""
    by_name: dict[str, list[Sweep]] = defaultdict(list)
    for sweep in sweeps(runs):
        by_name[sweep.hyperparameter].append(sweep)
    found = []
    for name, curves in by_name.items():
        several = {s.method for s in curves if [t.method for t in curves].count(s.method) > 1}
        series, lines = [], []
        for sweep in curves:
            label = f"{sweep.method} {sweep.others}".strip() if sweep.method in several else sweep.method
            dots = [Point(value, run.average, f"{run.label}: {percents(run.average)}") for value, run in sweep.runs]
            series.append(Series(label, dots, styles[label], len(series) < SHOWN))
            lines += [
                row(run.label, number(value, f"{value:g}"), percent(run.average), data_run=run.number)
                for value, run in sweep.runs
            ]
        first = curves[0].runs[0][1]
        kept = [(method, reference(method, first, everything)) for method in REFERENCES]
        references = [(method, scores["average"]) for method, scores in kept if scores is not None]
        values = sorted({value for sweep in curves for value, _ in sweep.runs})
        wide = values[0] > 0 and values[-1] / values[0] > 50
        named, series = _fit(series), draw.apart(series)
        svg = draw.lines(
            series, title=f"Average against {name}", x_label=name, y_label="average, %", references=references,
            logarithmic=wide, named=named,
        )  # fmt: skip
        header = [column("run"), column(name), column("average")]
        about = described(first.group).capitalize()
        drawn = figure(svg, f"Average and {name}", about, table(header, [lines], label=f"averages by {name}"))
        found.append(drawn if named else element("div", drawn, legend(series), class_="toggled"))
    return found


def _fit(series: Sequence[Series]) -> bool:
    """Whether names can stand at the ends of the lines; else there is a legend."""
    return len(series) <= SHOWN and all(len(one.label) <= 19 for one in series)


def _toggled(drawn: Sequence[Html], series: Sequence[Series]) -> Html:
    return element("div", legend(series), element("div", *drawn, class_="charts"), class_="toggled")


def scaling(runs: Sequence[Run], styles: Styles) -> Html | None:
    """Averages against the number of merged models, where there are at least three numbers."""
    by_label: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.group.corruption is None and (run.group.models is None or run.group.tasks == "models"):
            by_label[run.label][len(run.group.models or run.tasks)].append(run)
    by_label = {label: counts for label, counts in by_label.items() if len(counts) >= 3}  # type: ignore[assignment]
    if not by_label:
        return None
    series, lines = [], []
    numbers = sorted({count for counts in by_label.values() for count in counts})
    last = sorted(by_label, key=lambda label: -fmean(run.average for run in by_label[label][max(by_label[label])]))
    for label in last:
        counts = by_label[label]
        means = {count: fmean(run.average for run in counts[count]) for count in sorted(counts)}
        dots = [Point(n, mean, f"{label}, {n} models: {percents(mean)}") for n, mean in means.items()]
        spread = [
            Point(n, run.average, f"{run.label} {', '.join(run.group.models or ['all'])}: {percents(run.average)}")
            for n, several in counts.items() if len(several) > 1 for run in several
        ]  # fmt: skip
        series.append(Series(label, dots, styles[label], len(series) < SHOWN, spread))
        lines.append(row(label, *(percent(means.get(n)) for n in numbers)))
    svg = draw.lines(
        series, title="Average against the number of merged models", x_label="merged models", y_label="average, %",
        x_ticks=numbers, named=_fit(series),
    )  # fmt: skip
    header = [column("method"), *(column(str(n)) for n in numbers)]
    several = any(one.spread for one in series)
    note = "On the tasks of the merged models." + (
        " Lines are means over choices of models; dots are those." if several else ""
    )
    drawn = figure(svg, "Average and number of merged models", note, table(header, [lines], label="averages by number"))
    return element("div", drawn, class_="charts") if _fit(series) else _toggled([drawn], series)


def robustness(runs: Sequence[Run], styles: Styles) -> list[Html]:
    """Averages by severity of what was done to the test images: a table, and a chart for each corruption."""
    found = []
    bases = {run.group._replace(corruption=None, severity=None) for run in runs if run.group.corruption}
    for base in sorted(bases, key=str):
        mine = [run for run in runs if run.group._replace(corruption=None, severity=None) == base]
        found.append(_robustness(base, mine, styles))
    return found


def _robustness(base: Group, runs: Sequence[Run], styles: Styles) -> Html:
    scores: dict[str, dict[tuple[str | None, int], Run]] = defaultdict(dict)
    labels: dict[str, str] = {}
    for run in runs:
        method = key_of([run.method, run.given if run.tuned else run.settings])
        labels.setdefault(method, run.label)
        scores[method][run.group.corruption, run.group.severity or 0] = run
    scores = {method: mine for method, mine in scores.items() if any(name for name, _ in mine)}  # type: ignore[assignment]
    corruptions = sorted({str(run.group.corruption) for run in runs if run.group.corruption})

    severities = sorted({severity for mine in scores.values() for _, severity in mine})
    common = [s for s in severities if s and all(any(s == at for _, at in mine) for mine in scores.values())]

    def mean(method: str, corruption: str) -> float | None:
        averages = [scores[method][corruption, s].average for s in common if (corruption, s) in scores[method]]
        return fmean(averages) if len(averages) == len(common) > 0 else None

    def overall(method: str) -> float | None:
        means = [value for name in corruptions if (value := mean(method, name)) is not None]
        return fmean(means) if len(means) == len(corruptions) else None

    order = sorted(scores, key=lambda method: overall(method) or 0, reverse=True)
    order = [m for m in order if labels[m] not in REFERENCES] + [m for m in order if labels[m] in REFERENCES]
    header = [
        column("method"),
        column("clean"),
        column(element("abbr", "mean", title="over all corruptions"), data_sort="descending"),
        *map(column, corruptions),
    ]
    summary, lines, here = [], [], []
    for method in order:
        clean = scores[method].get((None, 0))
        averages = {"clean": None if clean is None else clean.average, "mean": overall(method)}
        averages |= {name: mean(method, name) for name in corruptions}
        here.append((clean or next(iter(scores[method].values())), averages))
        cells = map(percent, averages.values())
        summary.append(row(joined(draw.swatch(styles[labels[method]], line=False), labels[method]), *cells))
        for name in corruptions:
            at = [clean if s == 0 else scores[method].get((name, s)) for s in severities]
            cells = [
                percent(None if run is None else run.average, data_run=None if run is None else run.number)
                for run in at
            ]
            lines.append(row(labels[method], element("td", name, class_="words"), *cells))
    every = [run.average for mine in scores.values() for run in mine.values()]
    y_range = (min(every), max(every))
    drawn, series = [], []
    for name in corruptions:
        series = []
        for method in order:
            at = {s: run for (n, s), run in scores[method].items() if n == name or n is None}
            dots = [
                Point(s, at[s].average, f"{labels[method]}, {name} {s}: {percents(at[s].average)}") for s in sorted(at)
            ]
            series.append(Series(labels[method], dots, styles[labels[method]], len(series) < SHOWN))
        svg = draw.lines(
            series, title=f"Average by severity of {name}", x_label="severity",
            y_label="average, %", x_ticks=severities, y_range=y_range, named=False,
        )  # fmt: skip
        drawn.append(figure(svg, name))
    of = f"Of {', '.join(base.models)}. " if base.models else ""
    at = f"severity {common[0]}" if len(common) == 1 else f"the mean of severities {', '.join(map(str, common))}"
    said = f"{of}In the table, {at}, which all methods have. " if common else of
    adapting = ", ".join(dict.fromkeys(run.method for run in runs if run.group.corruption and looks_at_tests(run)))
    seen = f" Of the corrupted test data, {adapting} has seen the inputs, without their labels." if adapting else ""
    note = element("p", f"{said}In the pictures, severity 0 is the clean test data.{seen}", class_="note")
    head = [column("method"), column("corruption", class_="words"), *(column(f"{s}") for s in severities)]
    every_number = table(head, [lines], label="averages by severity")
    numbers = element("details", element("summary", "numbers of every severity"), every_number)
    known = beside.of_corruptions(here, styles)
    return joined(
        note, table(header, [summary], label="robustness", sortable=True), _toggled(drawn, series), numbers, *known
    )


def cosines(names: Sequence[str], values: Sequence[Sequence[float]]) -> Html:
    """Cosines of task vectors, as in Figure 6 of the FusionBench paper."""
    svg = draw.heat_map(names, values, title="Cosine of task vectors")
    note = "Colours go with the square root of the cosine: off the diagonal they are small."
    return element("div", figure(svg, "Cosine of task vectors", note), class_="charts")
