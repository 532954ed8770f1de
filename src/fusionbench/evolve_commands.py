"""The verb evolve: the free numbers of a recipe, searched against a task pool."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fusionbench.console import quiet, shown_progress, terminal
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from fusionbench.cli import Add
    from fusionbench.evolve import Evolved

EVOLVE = """example:
  fusionbench evolve recipe.yaml search --taskpool clip-mini --generations 5      with a recipe.yaml of

    merge_method: linear
    models:
      - model: zoo:clip-mini/mnist
        parameters: {weight: {search: [0, 1]}}
      - model: zoo:clip-mini/emoji
        parameters: {weight: {search: [0, 1], start: 0.3}}

The search (CMA-ES) merges candidates in memory and scores them on calibration data; the best one alone is scored on
test data, in the end. OUT has the best recipe, for fusionbench merge, the report, a picture, and a journal of what was
tried: the same command goes on where it was, and with more --generations goes further."""


def add_verbs(add: Add) -> None:
    """Put the verb into the command line's parser."""
    evolve = add("evolve", "search the free numbers of a recipe against a task pool", EVOLVE)
    evolve.add_argument("recipe", metavar="RECIPE", help="a .yaml file, with numbers as {search: [low, high]}")
    evolve.add_argument("out", metavar="OUT", help="folder to write; a search that was interrupted goes on there")
    evolve.add_argument("--taskpool", required=True, metavar="NAME", help="a task pool's name, or a .yaml file")
    evolve.add_argument("--generations", type=int, default=10, help="how many generations in all (default: 10)")
    evolve.add_argument("--population", type=int, help="candidates in each (default: 4 + 3 log of how many numbers)")
    evolve.add_argument("--sigma", type=float, default=0.25, help="how wide it begins, of each range (default: 0.25)")
    evolve.add_argument("--seed", type=int, default=0, help="of the candidates (default: 0)")
    evolve.add_argument("--device", default="cpu", help="where to evaluate (default: cpu)")


def evolve(arguments: argparse.Namespace) -> None:
    """Search the free numbers of a recipe; print a line for every generation, and what was found."""
    from fusionbench import config
    from fusionbench.errors import is_count
    from fusionbench.evolve import free_numbers

    for name in ("generations", "population"):
        if getattr(arguments, name) is not None and not is_count(getattr(arguments, name)):
            raise InputError(f"--{name} must be a whole number of 1 or more; got {getattr(arguments, name)}.")
    if arguments.population is not None and arguments.population < 4:
        raise InputError("--population must be 4 or more: the better half of the candidates says where to go on.")
    if not 0 < arguments.sigma <= 1:
        raise InputError(f"--sigma must be in (0, 1]; got {arguments.sigma:g}.")
    if arguments.seed < 0:
        raise InputError(f"--seed must be 0 or more; got {arguments.seed}.")
    out = Path(arguments.out)
    _, free = free_numbers(arguments.recipe)
    quiet()
    from fusionbench import runner
    from fusionbench.evolve import BEST, JOURNAL, PICTURE, Candidate, score_of
    from fusionbench.evolve import evolve as run_search
    from fusionbench.writer import check_file

    check_file(out / JOURNAL, "the journal")
    tasks = config.load_taskpool(arguments.taskpool)
    runner.parse_device(arguments.device)
    console = terminal()
    console.print(f"{len(free)} free: {', '.join(number.name for number in free)}", highlight=False, markup=False)

    def told(generation: list[Candidate]) -> None:
        scores = [score_of(one) for one in generation]
        where = f"generation {generation[0].generation}" if generation[0].generation else "the start"
        mean = f", mean {sum(scores) / len(scores):.4f}" if len(scores) > 1 else ""
        console.print(f"{where}: best {max(scores):.4f}{mean}", highlight=False)

    with shown_progress():
        found = run_search(
            arguments.recipe,
            out,
            tasks,
            generations=arguments.generations,
            population=arguments.population,
            sigma=arguments.sigma,
            seed=arguments.seed,
            device=arguments.device,
            told=told,
        )
    numbers = ", ".join(f"{free.name} = {value:g}" for free, value in zip(found.free, found.best.numbers, strict=True))
    test = tasks.headline(found.report)["average"]
    start, best = score_of(found.candidates[0]), score_of(found.best)
    console.print(f"Best: {numbers}", highlight=False, markup=False)
    console.print(f"On calibration data {best:.4f} (the start {start:.4f}); on test data {test:.4f}", highlight=False)
    console.print(f"The recipe is in {out / BEST}", highlight=False)
    if _drawn(found, out / PICTURE):
        console.print(f"The picture is in {out / PICTURE}", highlight=False)


def _drawn(found: Evolved, file: Path) -> bool:
    """Draw a search, where there is matplotlib."""
    from importlib.util import find_spec

    from fusionbench.evolve import score_of
    from fusionbench.plots import curves

    if find_spec("matplotlib") is None:
        terminal().print("There is no picture of the search without matplotlib: pip install 'fusionbench\\[plot]'")
        return False
    scores = [[score_of(one) for one in generation] for generation in found.generations]
    so_far = [max(max(s) for s in scores[: i + 1]) for i in range(len(scores))]
    lines = {"best so far": so_far, "mean of the generation": [sum(s) / len(s) for s in scores]}
    curves(list(range(len(scores))), lines, file, title="Score on calibration data", label="generation")
    return True
