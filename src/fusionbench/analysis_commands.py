"""The verb analyze: what merging does inside models, as tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.console import quiet, shown_progress, terminal
from fusionbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from fusionbench.cli import Add
    from fusionbench.pool import ModelPool
    from fusionbench.task import TaskPool

ANALYZE = """what there is:
  layers         how large task vectors are, how far their signs agree, and their effective rank, by layer
  interpolation  scores and loss on the line between two models (of the pool, or base)
  landscape      loss on the plane of two task vectors
  interference   how far each task's features move when models are merged, by layer

examples:
  fusionbench analyze layers modelpool=clip-mini out=layers.png
  fusionbench analyze interpolation modelpool=clip-mini taskpool=clip-mini models=mnist,letters points=11 out=line.png
  fusionbench analyze landscape modelpool=clip-mini taskpool=clip-mini models=mnist,letters points=7 out=plane.png
  fusionbench analyze interference method=task_arithmetic modelpool=clip-mini taskpool=clip-mini out=moved.png

Scores are those of the two models' tasks, on calibration data, unless split=test says otherwise."""


def add_verbs(add: Add) -> None:
    """Put the verb into the command line's parser."""
    analyze = add("analyze", "look inside: layers, interpolation, landscape, interference", ANALYZE)
    analyze.add_argument("what", metavar="WHAT", help=" | ".join(ANALYSES))
    analyze.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="modelpool=, taskpool=, out=; models=A,B points=N split= (interpolation, landscape); method= samples=N "
        "(interference)",
    )


@dataclass(frozen=True)
class Analysis:
    """One kind of analysis: what does it, and which words it takes besides modelpool= and out=."""

    function: Callable[[Mapping[str, str], ModelPool, TaskPool | None], None]
    words: tuple[str, ...] = ()
    tasks: bool = True


def analyze(arguments: argparse.Namespace) -> None:
    """Look inside models, print what is found, and draw it where asked."""
    from fusionbench import config
    from fusionbench.plots import check_picture

    found = ANALYSES.get(arguments.what)
    if found is None:
        raise InputError(f"There is no analysis '{arguments.what}'. {did_you_mean(arguments.what, ANALYSES)}")
    needed = ("modelpool", "taskpool") if found.tasks else ("modelpool",)
    settings = config.settings(arguments.words, (*needed, *found.words, "out"), needed)
    if "out" in settings:
        check_picture(Path(settings["out"]))
    quiet()
    pool = config.load_modelpool(settings["modelpool"])
    tasks = config.load_taskpool(settings["taskpool"]) if found.tasks else None
    with shown_progress():
        found.function(settings, pool, tasks)
    if "out" in settings:
        terminal().print(f"The picture is in {settings['out']}", highlight=False)


def _layers(settings: Mapping[str, str], pool: ModelPool, tasks: TaskPool | None) -> None:
    from fusionbench import tables
    from fusionbench.analysis import layers
    from fusionbench.plots import heat_map

    found = layers(pool)
    names, models = [layer.name for layer in found], list(pool)
    columns = ["agreement", *models]
    magnitudes = [[layer.agreement, *layer.magnitudes] for layer in found]
    ranks = [[rank or None for rank in layer.ranks] for layer in found]  # 0 where no matrix has changed
    console = terminal()
    same = commonprefix(names).rpartition(".")[0]
    short, of = [name.removeprefix(f"{same}.") for name in names], f", in {same}" if same else ""
    title = f"sign agreement; |task vector| / |base|{of}"
    console.print(tables.matrix(short, columns, magnitudes, title, console.width))
    console.print(tables.matrix(short, models, ranks, f"effective rank of matrices that changed{of}", console.width))
    if "out" in settings:
        highest = max(max(layer.magnitudes) for layer in found)
        values, title = [layer.magnitudes for layer in found], "|task vector| / |base|"
        heat_map(names, models, values, Path(settings["out"]), title=title, highest=highest)


def _interpolation(settings: Mapping[str, str], pool: ModelPool, tasks: TaskPool | None) -> None:
    from fusionbench import tables
    from fusionbench.plots import curves
    from fusionbench.probing import barrier, between, interpolation

    assert tasks is not None
    ends, points = _two(settings, [*pool.inputs]), between(_count(settings, "points", 11))
    tasks = tasks.only([name for name in tasks if name in ends] or tasks)
    found = interpolation(pool, tasks, ends, points, _split(settings))
    shown = [name for name in ("score", "loss") if name in found[0]]
    values = [[scores[name] for name in shown] for scores in found]
    console = terminal()
    title = f"from {ends[0]} (0) to {ends[1]} (1)"
    console.print(tables.matrix([f"{t:.2f}" for t in points], shown, values, title, console.width))
    if "loss" in shown:
        height = barrier([scores["loss"] for scores in found], points)
        console.print(f"The loss barrier is {height:.3f}.", highlight=False)
    if "out" in settings:
        lines = {name: [scores[name] for scores in found] for name in shown}
        curves(points, lines, Path(settings["out"]), title=title, label="t")


def _landscape(settings: Mapping[str, str], pool: ModelPool, tasks: TaskPool | None) -> None:
    from fusionbench import tables
    from fusionbench.plots import heat_map
    from fusionbench.probing import grid, landscape

    assert tasks is not None
    models, count = _two(settings, list(pool)), _count(settings, "points", 5)
    places = [-0.25 + 1.5 * i / (count - 1) for i in range(count)]
    tasks = tasks.only([name for name in tasks if name in models] or tasks)
    found = landscape(pool, tasks, models, places, places, _split(settings))
    what = "loss" if "loss" in found[0][0] else "score"
    values, names = grid(found, what)[::-1], [f"{place:.2f}" for place in places]
    title = f"{what}: {models[0]} to the right, {models[1]} upwards, the base at (0, 0)"
    console = terminal()
    console.print(tables.matrix(names[::-1], names, values, title, console.width))
    if "out" in settings:
        highest = max(map(max, values))
        heat_map(names[::-1], names, values, Path(settings["out"]), title=title, highest=highest)


def _interference(settings: Mapping[str, str], pool: ModelPool, tasks: TaskPool | None) -> None:
    from fusionbench import config, tables
    from fusionbench.plots import heat_map
    from fusionbench.probing import SAMPLES, interference

    assert tasks is not None
    words = [f"{key}={value}" for key, value in settings.items() if key.partition(".")[0] == "method"]
    chosen = config.compose([*words, f"modelpool={settings['modelpool']}"])
    if len(chosen) > 1:
        raise InputError("analyze interference takes one method with one value of each hyperparameter.")
    algorithm = chosen[0].algorithm
    if not algorithm.method.saves:
        raise InputError(f"{algorithm.method.name} keeps several models: there is no merged one whose features moved.")
    if not any(name in tasks for name in pool):
        raise InputError(f"The task pool has no task of the pool's models: {', '.join(tasks)}, not {', '.join(pool)}.")
    merged = algorithm.run(pool, tasks)
    found = interference(merged, pool, tasks, samples=_count(settings, "samples", SAMPLES))
    names = list(next(iter(found.values())))
    values = [[moved.get(name, 0.0) for moved in found.values()] for name in names]
    title = "how far features move: |merged - own| / |own|"
    console = terminal()
    console.print(tables.matrix(names, list(found), values, title, console.width))
    if "out" in settings:
        highest = max(map(max, values))
        heat_map(names, list(found), values, Path(settings["out"]), title=title, highest=highest)


def _two(settings: Mapping[str, str], known: list[str]) -> tuple[str, str]:
    names = settings.get("models", "").split(",")
    if len(names) != 2:
        raise InputError(f"Name two models, as models={','.join(known[:2])}; there are: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise InputError(f"The pool has no model '{name}'. {did_you_mean(name, known)}")
    return names[0], names[1]


def _count(settings: Mapping[str, str], key: str, default: int) -> int:
    value: Any = settings.get(key, default)
    if not str(value).isdecimal() or int(value) < 2:
        raise InputError(f"{key} must be a whole number of 2 or more; got '{value}'.")
    return int(value)


def _split(settings: Mapping[str, str]) -> str:
    from fusionbench.task import SPLITS

    split = settings.get("split", "calibration")
    if split not in SPLITS:
        raise InputError(f"No split is called '{split}'. {did_you_mean(split, SPLITS)}")
    return split


ANALYSES = {
    "layers": Analysis(_layers, tasks=False),
    "interpolation": Analysis(_interpolation, ("models", "points", "split")),
    "landscape": Analysis(_landscape, ("models", "points", "split")),
    "interference": Analysis(_interference, ("method", "samples")),
}
