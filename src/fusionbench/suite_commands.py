"""The verbs on results that are kept: bench, results, compare."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from fusionbench.console import quiet, shown_progress, terminal
from fusionbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from fusionbench.cli import Add
    from fusionbench.results import Result
    from fusionbench.suites import Cell, Suite

WRAPPED = {"method": 30, "models": 20}  # what may be broken into lines of a terminal, and how wide it is at least
FORMATS = ("table", "csv", "markdown", "latex", "json")

BENCH = """examples:
  fusionbench bench multi-task
  fusionbench bench multi-task --pools clip-mini --methods ties_merging regmean
  fusionbench bench multi-task adaptation minilm        (all there is, in one table for each pool)
  fusionbench bench my_suite.yaml --results my_results --workers 1

What is kept in the folder of results is not run again, and what was interrupted goes on. fusionbench list suites says
which there are; fusionbench describe SUITE shows one."""

RESULTS = """examples:
  fusionbench results
  fusionbench results my_results --suite multi-task --format csv > results.csv"""

COMPARE = """examples:
  fusionbench compare task_arithmetic ties_merging
  fusionbench compare 1f0a 77c2        (keys of two results, or how they begin: fusionbench results shows them)"""


def add_verbs(add: Add) -> None:
    """Put these verbs into the command line's parser."""
    bench = add("bench", "run a suite of methods, pools and tasks; go on where it was", BENCH)
    bench.add_argument("suites", nargs="+", metavar="SUITE", help="a suite's name, or its .yaml file; one or more")
    bench.add_argument("--results", default="results", help="folder to keep results in (default: results)")
    bench.add_argument("--pools", nargs="+", metavar="POOL", help="run only these pools")
    bench.add_argument("--methods", nargs="+", metavar="METHOD", help="run only these methods")
    bench.add_argument("--executor", default="processes", help="processes | ray: where runs are done")
    bench.add_argument("--workers", type=int, help="runs at once (default: one per core)")
    bench.add_argument("--device", default="cpu", help="where to evaluate (default: cpu)")
    results = add("results", "show kept results, or write them for other programs", RESULTS)
    results.add_argument(
        "folder", nargs="?", default="results", metavar="FOLDER", help="of kept results (default: results)"
    )
    results.add_argument("--suite", help="only those of a suite")
    results.add_argument("--format", choices=FORMATS, default="table", help="how to print them (default: table)")
    compare = add("compare", "compare two results, with intervals", COMPARE)
    for name in ("A", "B"):
        about = "key, the beginning of one, or a method that has one result"
        compare.add_argument(name.lower(), metavar=name, help=about)
    compare.add_argument("--results", default="results", help="folder that they are in (default: results)")
    compare.add_argument("--samples", type=int, default=10_000, help="bootstrap samples (default: 10000)")
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")


def bench(arguments: argparse.Namespace) -> int:
    """Run what of a suite is not kept yet, and print all of it; the exit status is 1 where a run has failed."""
    from fusionbench.suites import bench as run
    from fusionbench.suites import load_suites

    suite = load_suites(arguments.suites)
    cells = _chosen(suite, arguments.pools, arguments.methods)
    quiet()
    from fusionbench.progress import track
    from fusionbench.results import Results
    from fusionbench.runner import parse_device

    parse_device(arguments.device)
    results = Results(arguments.results)
    with shown_progress():
        options = {"executor": arguments.executor, "workers": arguments.workers, "device": arguments.device}
        found = list(track(run(cells, results, **options), suite.name, len(cells)))
    _show(found)
    failed = [result for result in found if result.failed]
    for result in failed:
        print(f"{result.label} on {result.cell['modelpool']} failed: {result.failed}")
    ending = f", {len(failed)} of them failed" if failed else ""
    print(f"{suite.what}: {len(found)} runs{ending}. They are in {arguments.results}")
    return 1 if failed else 0


def results(arguments: argparse.Namespace) -> None:
    """Print kept results as a table, or in a format for other programs."""
    from fusionbench import results as kept
    from fusionbench.report.runs import newest_of

    found = kept.Results(arguments.folder).all()
    if arguments.suite is not None:
        from fusionbench.suites import load_suite

        asked = [cell.asked for cell in load_suite(arguments.suite).cells]
        found = [result for result in found if result.cell in asked]
    for_people = arguments.format not in ("csv", "json")
    found, older = newest_of(found) if for_people else (found, [])
    if arguments.format == "table":
        _show(found, keys=True)
        if older:
            print(f"Of these runs there are {len(older)} older results, too: of other models, data, code or versions.")
    elif arguments.format == "csv":
        print(kept.as_csv(kept.rows(found)), end="")
    elif arguments.format == "json":
        print(json.dumps(kept.rows(found), indent=2))
    else:
        from fusionbench.report.lines import score_table

        write = kept.as_markdown if arguments.format == "markdown" else kept.as_latex
        print("\n\n".join(write(*score_table(of_pool)) for of_pool in _by_pool(found).values()))


def write_page(folders: list[str], out: Path, *, cosines: bool) -> None:
    """Write a page of a folder of kept results."""
    from fusionbench import report
    from fusionbench.results import Results
    from fusionbench.writer import check_file

    if out.suffix != ".html":
        raise InputError(f"The page is an .html file, as {out.with_suffix('.html')}; got '{out}'.")
    if len(folders) != 1:
        raise InputError(f"A page is of one folder of kept results; got {len(folders)}: {', '.join(folders)}.")
    check_file(out, "report")
    found = Results(folders[0]).all()
    report.write_page(found, out, cosines=_cosines(found) if cosines else None)
    print(f"The page is in {out}")


def _cosines(found: list[Result]) -> dict[str, tuple[list[str], list[list[float]]]]:
    from fusionbench.analysis import task_vector_cosine
    from fusionbench.config import load_modelpool

    matrices = {}
    for name in _by_pool(found):
        try:
            pool = load_modelpool(name)
        except InputError as error:  # results may be of another machine, whose models are not here
            print(f"The page has no cosines of {name}. {error}")
            continue
        matrices[name] = list(pool), task_vector_cosine(pool).tolist()
    return matrices


def compare(arguments: argparse.Namespace) -> None:
    """Print how much better one result is than another, with intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fusionbench import compare as comparing
    from fusionbench.results import Results

    if arguments.samples < 100:
        raise InputError(f"--samples is how often examples are drawn: 100 or more; got {arguments.samples}.")
    kept = Results(arguments.results)
    a, b = kept.find(arguments.a), kept.find(arguments.b)
    table = Table(box=SIMPLE_HEAD, title="scores in percent; 95 % intervals of B - A", title_justify="left")
    for column in ("task", "examples", "A", "B", "B - A", "from", "to", ""):
        table.add_column(column, justify="left" if column in ("task", "") else "right")
    found = comparing.compare(a, b, samples=arguments.samples, seed=arguments.seed)
    for one in found:
        numbers = [f"{100 * value:{sign}.1f}" for value, sign in ((one.a, ""), (one.b, ""))]
        numbers += [f"{100 * value:+.1f}" for value in (one.difference, one.low, one.high)]
        said = ("B is better" if one.difference > 0 else "A is better") if one.certain else "may be chance"
        if one.task == "average":
            table.add_section()
        table.add_row(one.task, str(one.examples), *numbers, said)
    console = terminal()
    for name, result in (("A", a), ("B", b)):
        console.print(f"{name}: {result.label}, on {result.cell['modelpool']} ({result.key})", highlight=False)
    console.print(table)
    left = [task for task in a.primary if task in b.primary and task not in {one.task for one in found}]
    if left:
        print(f"Left out, as what came of their examples was not kept: {', '.join(left)}")


def _chosen(suite: Suite, pools: list[str] | None, methods: list[str] | None) -> list[Cell]:
    """The cells of these pools and methods."""
    for given, known in ((pools, {cell.pool for cell in suite.cells}), (methods, {c.method for c in suite.cells})):
        for name in given or []:
            if name not in known:
                raise InputError(f"The suite '{suite.name}' has no '{name}'. {did_you_mean(name, known)}")
    cells = [cell for cell in suite.cells if pools is None or cell.pool in pools]
    return [cell for cell in cells if methods is None or cell.method in methods]


def _by_pool(found: list[Result]) -> dict[str, list[Result]]:
    by_pool = defaultdict(list)
    for result in found:
        by_pool[result.cell["modelpool"]].append(result)
    return by_pool


def _show(found: list[Result], *, keys: bool = False) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from fusionbench.report.lines import score_table

    console, is_narrow = terminal(), False
    for pool, of_pool in _by_pool(found).items():
        header, lines = score_table(of_pool, keys=keys)
        title, tasks = f"{pool}: test scores in percent", {name for result in of_pool for name in result.primary}
        columns = [
            (name, name.replace("-", "-\n").replace("_", "_\n"), cells)
            for name, *cells in zip(header, *lines, strict=True)
        ]
        widths = [
            WRAPPED.get(name) or max(len(line) for text in (words, *cells) for line in text.split("\n")) + 2
            for name, words, cells in columns
        ]
        if sum(widths) > console.width:
            columns = [column for column in columns if column[0] not in tasks]
            title, is_narrow = f"{pool}: averages of test scores in percent", True
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
        for name, words, _ in columns:
            is_text = name in WRAPPED
            table.add_column(
                escape(words), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
            )
        for line in zip(*(cells for _, _, cells in columns), strict=True):
            table.add_row(*map(escape, line))
        console.print(table)
    if is_narrow:
        console.print("The scores of each task need a wider terminal, or fusionbench results --format csv.")
