"""A page of kept results: what it says at its head, and a section for each pool."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template

from fusionbench.report import beside, boards, figures
from fusionbench.report.draw import Styles
from fusionbench.report.elements import Html, element, joined
from fusionbench.report.known import suites_of
from fusionbench.report.runs import REFERENCES, Run, by_group, collect, of_experts
from fusionbench.results import Result

HERE = Path(__file__).parent
Cosine = tuple[Sequence[str], Sequence[Sequence[float]]]
Cosines = Mapping[str, Cosine]


def write_page(results: Sequence[Result], file: Path, *, cosines: Cosines | None = None) -> None:
    """Write the page of some results, all of it or nothing."""
    text = page(results, cosines=cosines)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def page(results: Sequence[Result], *, cosines: Cosines | None = None) -> str:
    """The page of some results, equal for equal results.

    Args:
        results: at least one.
        cosines: names of models and the cosine matrix of their task vectors, by pool.
    """
    runs, failed, older = collect(results)
    pools: dict[str, list[Run]] = {run.group.pool: [] for run in (*runs, *failed)}
    for pool in pools:
        groups = by_group(run for run in runs if run.group.pool == pool and not run.group.corruption)
        first = next((found for group, found in groups.items() if group.models is None), [])
        pools[pool] = boards.listed(first)[0]
    styles = Styles()
    drawn = [run for run in runs if run.is_default and (run.group.corruption or run.group.models)]
    for mine in (drawn, *pools.values()):  # what is in most charts comes first: there are few colours
        for run in sorted(mine, key=lambda run: -run.average):
            _ = styles[run.label]
    sections = [_section(pool, pools, runs, failed, styles, (cosines or {}).get(pool)) for pool in pools]
    over = figures.overview(pools, runs, styles) if len(runs) > 1 else None
    body = [
        _head(results, runs, failed, older, pools),
        *([element("section", over, class_="overview")] if over else []),
    ]
    links = [element("a", pool, href=f"#{figures.anchor(pool, pools)}") for pool in pools]
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        links=joined(*links),
        body=joined(*body, *sections),
    )


def _head(
    results: Sequence[Result], runs: Sequence[Run], failed: Sequence[Run], older: Sequence[Result], pools: Mapping
) -> Html:
    methods = {run.method for run in (*runs, *failed)}
    counts = [
        (len(results) - len(older), "run", "runs"),
        (len(methods), "method", "methods"),
        (len(pools), "pool", "pools"),
    ]
    said = [f"{count:,} {one if count == 1 else several}" for count, one, several in counts]
    text = f"{said[0]} of {said[1]} on {said[2]} of models."
    if failed:
        text += f" {len(failed)} failed; the reasons are with their pools."
    if older:
        text += f" {len(older)} older {'result' if len(older) == 1 else 'results'} of the same runs are left out."
    versions: dict[str, dict[str, None]] = defaultdict(dict)
    for run in runs:
        for result in run.results:
            for name, version in result.report.get("run", {}).get("versions", {}).items():
                versions[name][str(version)] = None
    facts = [("suites", ", ".join(suites_of(results)) or "none of the package's")]
    facts.append(("results", _days(results)))
    facts.append(("versions", ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())))
    pairs = [part for name, about in facts if about for part in (element("dt", name), element("dd", about))]
    how = (
        "Scores are of the test data, in percent; the higher, the better. The best of a column is bold; what is below "
        "the pre-trained model has a ▾. Choose a row to see what its numbers were made from."
    )
    intro = element("p", text, class_="lead")
    return element(
        "header",
        element("h1", "Model fusion, measured"),
        intro,
        element("dl", *pairs),
        element("p", how, class_="note"),
    )


def _section(
    pool: str,
    pools: dict[str, list[Run]],
    everything: Sequence[Run],
    failed: Sequence[Run],
    styles: Styles,
    cosines: Cosine | None,
) -> Html:
    runs = [run for run in everything if run.group.pool == pool]
    groups = by_group(run for run in runs if not run.group.corruption)
    parts: list[Html] = []

    def add(title: str, *found: Html | None) -> None:
        shown = [part for part in found if part is not None]
        if shown:
            parts.append(element("section", element("h3", title), *shown))

    subsets, unseen, experts, swept = [], [], [], []
    for group, mine in groups.items():
        shown, left = boards.listed(mine)
        if group in of_experts(groups):
            experts += shown
            swept += left
        elif group.models is not None and group.tasks == "all":
            table = boards.generalization(mine, runs, styles)
            about = element(
                "p", f"Merged: {', '.join(group.models)}. Nothing in the merge has seen the other tasks.", class_="note"
            )
            known = [about, table, *beside.of_unseen_tasks(mine, styles)] if table else []
            unseen += known or [boards.leaderboard(mine, runs, styles)]
        elif group.models is None:
            add("Leaderboard", boards.leaderboard(shown, runs, styles) if shown else None, _left(left))
        elif shown:
            title = element("h4", f"{len(group.models)} models: {', '.join(group.models)}")
            subsets += [title, boards.leaderboard(shown, runs, styles)]
    mine = pools[pool]
    if len(mine) > 1:
        add("Where each method is strong", figures.radars(mine, runs, styles))
        add("What it costs", *_charts(figures.costs(mine, styles), "charts wide"))
    curves = [curve for group in groups.values() for curve in figures.sweep_curves(group, runs, styles)]
    add("Hyperparameters", *_charts(curves))
    every = [element("details", element("summary", "every choice of models"), *subsets)] if subsets else []
    add("Some of the models", figures.scaling(runs, styles), *every)
    add("Experts and upscaling", *([boards.experts(experts, runs, styles), _left(swept)] if experts else []))
    add("Unseen tasks", *unseen)
    add("Robustness", *figures.robustness(runs, styles))
    compared = [run for run in mine if run.method not in REFERENCES] and mine
    add("Published numbers", *beside.of_all_tasks(compared, styles))
    add("Task vectors", figures.cosines(*cosines) if cosines else None)
    bad = [run for run in failed if run.group.pool == pool]
    add("Failed", boards.failures(bad) if bad else None)
    add("Where the numbers come from", boards.all_runs(runs) if runs else None)
    return element("section", element("h2", pool), *parts, id=figures.anchor(pool, pools), class_="pool")


def _charts(drawn: Sequence[Html], names: str = "charts") -> list[Html]:
    return [element("div", *drawn, class_=names)] if drawn else []


def _left(left: Sequence[Run]) -> Html | None:
    """What a leaderboard does not show."""
    methods = ", ".join(dict.fromkeys(run.method for run in left))
    text = (
        f"{len(left)} more runs, of {methods}, are curves under Hyperparameters: to pick the best of them here "
        "would be tuning on test data."
    )
    return element("p", text, class_="note") if left else None


def _days(results: Sequence[Result]) -> str:
    """When the results were written."""
    times = sorted((result.folder / f"{result.key}.json").stat().st_mtime for result in results)
    first, last = (datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d") for time in (times[0], times[-1]))
    return f"written {first}" if first == last else f"written {first} to {last}"
