"""What each verb of the command line does."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.analysis_commands import analyze
from fusionbench.console import quiet, shown_progress, terminal
from fusionbench.errors import InputError, did_you_mean
from fusionbench.evolve_commands import evolve
from fusionbench.file_commands import diff, is_setting, merge, moe, verify
from fusionbench.lora_commands import lora
from fusionbench.suite_commands import bench, compare, results, write_page

if TYPE_CHECKING:
    from rich.console import Console

    from fusionbench import published
    from fusionbench.task import Report, TaskPool


def run(arguments: argparse.Namespace) -> None:
    """Fuse, save, evaluate; print a table with a row for every run."""
    from fusionbench import config, tables

    words = [*arguments.words, *([f"nan={arguments.nan}"] if arguments.nan else [])]
    runs = config.compose(words)
    _check_own_files(runs)
    quiet()
    from fusionbench import runner
    from fusionbench.algorithms import algorithm

    pool, tasks = runs[0].pool(), runs[0].tasks()
    reference = runs[0].options["reference"]
    compared = None if reference is None else algorithm(str(reference))  # a wrong name is found before any work
    console = terminal()
    rows: list[tables.Row] = []
    alignment: dict[str, Any] = {}
    with shown_progress():
        if runs[0].options["align"] is not None:
            for work in _own_places(runs):
                runner.check(work, tasks)
            pool, alignment = runner.align(runs[0], pool, tasks)
            for line in tables.alignment(alignment):
                console.print(line, highlight=False)
        for work in _own_places(runner.with_tuned(runs, pool, tasks)):
            report = runner.run(work, pool, tasks, alignment)
            if tasks is not None:
                rows.append(tables.Row(work.label, work.algorithm.method.kind, tasks.headline(report)))
        if tasks is not None and compared is not None and all(task in pool for task in tasks):
            if compared.label not in [row.label for row in rows]:
                report = runner.evaluate(compared.run(pool, tasks), pool, tasks, runs[0].options["device"])
                rows.append(tables.Row(compared.label, compared.method.kind, tasks.headline(report)))
    if tasks is not None:
        console.print(tables.scores(rows, tasks, reference=reference, width=console.width))
    one = len(runs) == 1 and runs[0].options["tune"] is None
    for option, what in (
        ("report", "report is" if one else "reports are"),
        ("out", "model is" if one else "models are"),
    ):
        if runs[0].options[option] is not None:
            console.print(f"The {what} in {runs[0].options[option]}", highlight=False)


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate models, or all models of a pool; print a row for each."""
    from fusionbench import config, tables

    words = [word for word in arguments.models if is_setting(word)]
    models = [word for word in arguments.models if word not in words]
    settings = config.settings(words, ("taskpool", "corruption", "report"), ("taskpool",))
    if not models:
        raise InputError("No model is named: fusionbench eval MODEL taskpool=NAME.")
    quiet()
    from fusionbench import runner
    from fusionbench.writer import check_file, write_json

    report_file = Path(settings["report"]) if "report" in settings else None
    if report_file is not None:
        check_file(report_file, "report")
    tasks = config.corrupted(config.load_taskpool(settings["taskpool"]), settings.get("corruption"))
    device = runner.parse_device(arguments.device)
    reports: dict[str, Report] = {}
    rows: list[tables.Row] = []
    with shown_progress():
        for label, module in _modules(models):
            reports[label] = {**tasks.evaluate(module.to(device)), "run": {"model": label, **_described(tasks)}}
            rows.append(tables.Row(label, "model", tasks.headline(reports[label])))
            if report_file is not None:  # after every model: what is done is not lost
                write_json(report_file, reports[label] if len(reports) == 1 else reports)
    console = terminal()
    console.print(tables.scores(rows, tasks, reference=None, width=console.width))


def similarity(arguments: argparse.Namespace) -> None:
    """Print, and draw where asked, the cosine matrix of a pool's task vectors."""
    from fusionbench import config, tables
    from fusionbench.plots import check_picture, heat_map

    settings = config.settings(arguments.words, ("modelpool", "out"), ("modelpool",))
    if "out" in settings:
        check_picture(Path(settings["out"]))
    pool = config.load_modelpool(settings["modelpool"])
    from fusionbench.analysis import task_vector_cosine

    cosine = task_vector_cosine(pool).tolist()
    console = terminal()
    names = list(pool)
    console.print(tables.matrix(names, names, cosine, "cosine of task vectors", console.width))
    if "out" in settings:
        heat_map(names, names, cosine, Path(settings["out"]), title="Cosine similarity of task vectors")
        console.print(f"The heat map is in {settings['out']}", highlight=False)


def coefficients(arguments: argparse.Namespace) -> None:
    """Print learned coefficients, and draw them where asked."""
    from fusionbench import tables
    from fusionbench.coefficients import read_coefficients
    from fusionbench.plots import check_picture, heat_map

    if arguments.out is not None:
        check_picture(Path(arguments.out))
    found = read_coefficients(arguments.file)
    values = list(found.rows.values())
    console = terminal()
    by_model = [[sum(column) / len(column), min(column), max(column)] for column in zip(*values, strict=True)]
    title = f"coefficients over {len(values)} tensors, at density {found.density:g}"
    shown = tables.matrix(found.models, ["mean", "lowest", "highest"], by_model, title, console.width)
    console.print(shown)
    if arguments.out is not None:
        highest = max(1.0, *map(max, values))
        heat_map(list(found.rows), found.models, values, Path(arguments.out), title="Coefficients", highest=highest)
        console.print(f"The heat map is in {arguments.out}", highlight=False)


def report(arguments: argparse.Namespace) -> None:
    """Show reports of runs in one table, and under it what was published of the same methods; or write a page."""
    if arguments.out is not None:
        return write_page(arguments.reports, Path(arguments.out), cosines=arguments.cosines)
    if arguments.cosines:
        raise InputError("--cosines is of a page: name it with -o.")
    from fusionbench import published, tables
    from fusionbench.runner import read_reports

    reports = read_reports([Path(name) for name in arguments.reports])
    console = terminal()
    console.print(tables.reports(reports, console.width))
    runs = [content["run"] for content in reports.values() if "method" in content["run"]]
    bases = dict.fromkeys(run["modelpool"].get("base", {}).get("location", "") for run in runs)
    shown = [found for base in bases for found in published.tables_for(base)]
    for table, same in shown:
        rows = [row for run in runs for row in published.matches(table, run["method"], run["hyperparameters"])]
        others = "" if same else " Other models and other data: the order of the methods compares, not the numbers."
        _show_published(console, table, [row for i, row in enumerate(rows) if row not in rows[:i]], others)
    if runs and not shown:
        console.print(f"Nothing is published of models made from {', '.join(map(str, bases))}.", highlight=False)


def _show_published(console: Console, table: published.Table, rows: list[Any] | None = None, others: str = "") -> None:
    from fusionbench import tables

    rows = table.rows if rows is None else rows
    none = f"{table.name} has none of these methods."
    console.print(tables.published(table.name, rows, console.width) if rows else none)
    console.print(f"Published: {table.what}. {table.caveat}{others}", highlight=False)


def list_names(arguments: argparse.Namespace) -> None:
    """List what there is."""
    from fusionbench import tables

    console = terminal()
    if arguments.what is not None and arguments.what not in LISTED:
        raise InputError(f"There are no '{arguments.what}' to list. {did_you_mean(arguments.what, LISTED)}")
    for what in LISTED[:-1] if arguments.what is None else (arguments.what,):
        console.print(tables.listing(what, console.width))


def describe(arguments: argparse.Namespace) -> None:
    """Show a method's documentation and hyperparameters, or a pool's YAML."""
    from fusionbench import config, published, tables
    from fusionbench.registry import get_method, list_methods

    console = terminal()
    methods = [method.name for method in list_methods()]
    if arguments.name in methods:
        console.print(tables.method_page(get_method(arguments.name)))
        return
    if arguments.name in published.list_tables():
        _show_published(console, published.get_table(arguments.name))
        return
    configs = {group: config.list_configs(group) for group in ("modelpool", "taskpool", "task", "suite")}
    groups = [group for group, names in configs.items() if arguments.name in names]
    if not groups:
        known = {*methods, *published.list_tables(), *(name for names in configs.values() for name in names)}
        raise InputError(f"Nothing is called '{arguments.name}'. {did_you_mean(arguments.name, known)}")
    for group in groups:
        console.print(f"[bold]{group}={arguments.name}[/bold]")
        console.print((config.CONFIGS / group / f"{arguments.name}.yaml").read_text(), markup=False)


LISTED = (
    "methods",
    "modelpools",
    "taskpools",
    "architectures",
    "suites",
    "published",
)  # the last only when it is asked for
VERBS = {
    "run": run,
    "eval": evaluate,
    "evolve": evolve,
    "list": list_names,
    "describe": describe,
    "merge": merge,
    "moe": moe,
    "diff": diff,
    "verify": verify,
    "similarity": similarity,
    "analyze": analyze,
    "coefficients": coefficients,
    "lora": lora,
    "report": report,
    "bench": bench,
    "results": results,
    "compare": compare,
}


def _check_own_files(runs: list[Any]) -> None:
    """An error where several runs would write one file, one over the other."""
    named = [(f"method.{name}={file}", Path(file)) for work in runs for name, file in work.algorithm.writes.items()]
    files = [file for _, file in named]
    for setting, file in named:
        if files.count(file) > 1 or runs[0].options["tune"] is not None:
            raise InputError(f"{setting} names one file for several runs: leave it out, or do one run for each file.")


def _own_places(runs: list[Any]) -> list[Any]:
    """With several runs, `out` and `report` are folders, and each run has its own place in them."""
    from dataclasses import replace

    if len(runs) == 1:
        return runs
    placed = []
    for work in runs:
        name = work.label.replace(" ", "-").replace("/", "_")
        options = dict(work.options)
        if options["out"] is not None:
            options["out"] = str(Path(options["out"]) / name)
        if options["report"] is not None:
            options["report"] = str(Path(options["report"]) / f"{name}.json")
        placed.append(replace(work, options=options))
    return placed


def _modules(models: list[str]) -> Iterator[tuple[str, Any]]:
    """Modules to evaluate, by label: of a checkpoint, or of every model of a pool."""
    from fusionbench import config
    from fusionbench.architectures import architecture_of
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.pool import ModelPool

    for name in models:
        if name in config.list_configs("modelpool") or name.endswith((".yaml", ".yml")):
            pool = config.load_modelpool(name)
            if pool.base is not None:
                yield "base", pool.build(pool.base)
            yield from ((model, pool.build(model)) for model in pool)
        else:
            checkpoint = Checkpoint.open(name)
            pool = ModelPool({name: checkpoint}, architecture=architecture_of(checkpoint))
            yield name, pool.build(name)


def _described(tasks: TaskPool) -> dict[str, Any]:
    from fusionbench.runner import versions

    return {"taskpool": {name: task.describe() for name, task in tasks.items()}, "versions": versions()}
