"""Free numbers of a recipe, searched by CMA-ES against a task pool's calibration data; goes on after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

import fusionbench
from fusionbench.errors import InputError
from fusionbench.recipes.document import Node, read
from fusionbench.writer import stamps, write_json

if TYPE_CHECKING:
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.task import Report, TaskPool

LARGEST = 1e38  # of a number that is searched: about what float32 holds
JOURNAL, BEST, REPORT, PICTURE = "search.jsonl", "best.yaml", "report.json", "search.png"
WORST = -1e9  # of what has no score


@dataclass(frozen=True)
class Free:
    """A number to be found.

    Attributes:
        name: where in the recipe it stands.
        low, high: between which.
        start: where the search begins.
        first, last: which characters of the recipe it takes the place of.
    """

    name: str
    low: float
    high: float
    start: float
    first: int
    last: int


@dataclass(frozen=True)
class Candidate:
    """Numbers that were tried.

    Attributes:
        generation: 0 for where the search begins.
        numbers: in the order of the recipe.
        score: higher is better; None where there was none.
    """

    generation: int
    numbers: tuple[float, ...]
    score: float | None


@dataclass(frozen=True)
class Evolved:
    """What a search has found.

    Attributes:
        free: the numbers.
        candidates: all, in the order in which they were tried.
        report: of the best one, on the test split.
    """

    free: list[Free]
    candidates: list[Candidate]
    report: Report

    @property
    def generations(self) -> list[list[Candidate]]:
        """The candidates of each, that of the start first."""
        last = self.candidates[-1].generation
        return [[one for one in self.candidates if one.generation == i] for i in range(last + 1)]

    @property
    def best(self) -> Candidate:
        """The first of those with the highest score."""
        return max(self.candidates, key=score_of)


def evolve(
    path: str | Path,
    out: str | Path,
    tasks: TaskPool,
    *,
    generations: int = 10,
    population: int | None = None,
    sigma: float = 0.25,
    seed: int = 0,
    device: str = "cpu",
    told: Callable[[list[Candidate]], None] = lambda _: None,
) -> Evolved:
    """Search the numbers of a recipe that are written as `{search: [low, high]}` or `{search: [low, high], start: x}`.

    A candidate is merged in memory and scored on the tasks' calibration split: the mean of their primary scores. Only
    the best one is scored on the test split, when the search is over. The folder gets a line for every candidate
    (`search.jsonl`), the recipe with the best numbers (`best.yaml`) and the report. Where the journal has lines
    already, the search goes on after them, with the same candidates as if it had not been interrupted. It is CMA-ES
    (Hansen, 2016, arXiv 1604.00772).

    Args:
        path: of the recipe.
        out: folder.
        tasks: to score on.
        generations: how many there are to be, those of the journal counted.
        population: candidates in a generation; by default 4 + 3 log(numbers).
        sigma: standard deviation of the first generation, as a part of the range of each number.
        seed: of the candidates.
        device: to evaluate on.
        told: is told the candidates of every generation that is complete.

    Raises:
        InputError: for what is wrong with the recipe, and where the folder's journal is of another search.
    """
    from fusionbench.architectures import architecture_of
    from fusionbench.pool import ModelPool
    from fusionbench.recipes.build import build
    from fusionbench.runner import evaluate, versions

    text, free = free_numbers(path)
    start = tuple(number.start for number in free)
    built = build(path, text=filled(text, free, start))
    models = built.checkpoint.inputs

    def scored(numbers: Sequence[float], split: str) -> Report:
        checkpoint = build(path, text=filled(text, free, numbers), models=models).checkpoint
        pool = ModelPool({"candidate": checkpoint}, architecture=architecture_of(checkpoint), device=device)
        return evaluate(pool["candidate"], pool, tasks, device, split=split)

    settings = {
        "recipe": text,
        "population": population or 4 + int(3 * math.log(len(free))),
        "sigma": sigma,
        "seed": seed,
        "tasks": {name: task.describe() for name, task in tasks.items()},
        "models": stamps(built.checkpoint),
        "fusionbench": fusionbench.__version__,
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    candidates: list[Candidate] = []
    for generation in search(
        lambda numbers: tasks.headline(scored(numbers, "calibration"))["average"],
        free,
        out / JOURNAL,
        settings,
        generations=generations,
    ):
        candidates += generation
        told(generation)
    best = max(candidates, key=score_of)
    report = scored(best.numbers, "test")
    report["run"] = {
        "recipe": str(path),
        "numbers": {number.name: value for number, value in zip(free, best.numbers, strict=True)},
        "calibration": {"start": candidates[0].score, "best": best.score},
        "candidates": len(candidates),
        **{key: settings[key] for key in ("population", "sigma", "seed")},
        "taskpool": settings["tasks"],
        "versions": versions(),
    }
    here = _found_from_anywhere(filled(text, free, best.numbers), Path(path).parent, models)
    (out / BEST).write_text(here, encoding="utf-8")
    write_json(out / REPORT, report)
    return Evolved(free, candidates, report)


def free_numbers(path: str | Path) -> tuple[str, list[Free]]:
    """A recipe's text, and the numbers in it that are to be searched.

    Raises:
        InputError: a line for each that is not written as it should be, or where there is none.
    """
    roots = read(path)
    problems = roots[0].problems
    found = [free for root in roots for free in _free_in(root, "", {})]
    problems.stop()
    if not found:
        raise InputError(f"'{path}' has no number to search: write one as {{search: [low, high]}}.")
    names = [free.name for free in found]
    for i, free in enumerate(found):  # in several documents
        if names.count(free.name) > 1:
            line = problems.text.count("\n", 0, free.first) + 1
            found[i] = Free(f"{free.name} (line {line})", *list(vars(free).values())[1:])
    return problems.text, found


def filled(text: str, free: Sequence[Free], numbers: Sequence[float]) -> str:
    """The recipe with these numbers; comments and all else stay."""
    for number, value in sorted(zip(free, numbers, strict=True), key=lambda pair: -pair[0].first):
        text = text[: number.first] + np.format_float_positional(value, trim="0") + text[number.last :]
    return text


def search(
    objective: Callable[[tuple[float, ...]], float],
    free: Sequence[Free],
    journal: Path,
    settings: Mapping[str, Any],
    *,
    generations: int,
) -> Iterator[list[Candidate]]:
    """Generations of candidates, the start first, each scored once: what the journal has is not computed again.

    Args:
        objective: the score of numbers; higher is better.
        free: the numbers.
        journal: a file, to be continued or begun.
        settings: what a candidate and its score depend on; has population, sigma and seed.
        generations: after the start.
    """
    try:
        from cmaes import CMA
    except ModuleNotFoundError:
        raise InputError("The search needs cmaes: pip install 'fusionbench[evolve]'.") from None

    known = _begun(journal, settings)

    def candidate(generation: int, place: int, numbers: tuple[float, ...]) -> Candidate:
        if (generation, place) in known:
            found = known[generation, place]
            if found.numbers != numbers:
                raise InputError(
                    f"'{journal}' has other candidates than this search: another version of cmaes or numpy wrote it. "
                    "Choose another folder."
                )
            return found
        score = objective(numbers)
        found = Candidate(generation, numbers, score if math.isfinite(score) else None)
        _append(journal, {"generation": generation, "candidate": place, "numbers": numbers, "score": found.score})
        return found

    yield [candidate(0, 0, tuple(number.start for number in free))]
    low, width = np.array([n.low for n in free]), np.array([n.high - n.low for n in free])
    optimiser = CMA(
        mean=(np.array([n.start for n in free]) - low) / width,
        sigma=settings["sigma"],
        bounds=np.array([[0.0, 1.0]] * len(free)),
        seed=settings["seed"],
        population_size=settings["population"],
    )
    for generation in range(1, generations + 1):
        asked = [optimiser.ask() for _ in range(settings["population"])]
        tried = [candidate(generation, i, _rounded(low + x * width, free)) for i, x in enumerate(asked)]
        optimiser.tell([(x, -score_of(one)) for x, one in zip(asked, tried, strict=True)])
        yield tried


def score_of(candidate: Candidate) -> float:
    """Its score, very low where it has none."""
    return WORST if candidate.score is None else candidate.score


def _rounded(values: np.ndarray, free: Sequence[Free]) -> tuple[float, ...]:
    """As they will stand in a recipe, within their ranges."""
    rounded = (float(f"{value:.6g}") for value in values)
    return tuple(min(max(value, number.low), number.high) for value, number in zip(rounded, free, strict=True))


def _free_in(node: Node, name: str, seen: dict[int, str]) -> Iterator[Free]:
    """The free numbers in a value; one that is used again by an alias is one number."""
    if id(node.yaml) in seen:
        return
    seen[id(node.yaml)] = name
    if isinstance(node.yaml, yaml.MappingNode):
        keys = [key.value for key, _ in node.yaml.value if isinstance(key, yaml.ScalarNode)]
        if "search" in keys:
            yield from _free(Node(name, node.yaml, node.problems))
            return
        for key, value in node.yaml.value:
            yield from _free_in(Node("", value, node.problems), f"{name}.{key.value}".removeprefix("."), seen)
    elif isinstance(node.yaml, yaml.SequenceNode):
        for i, value in enumerate(node.yaml.value):
            yield from _free_in(Node("", value, node.problems), f"{name}[{i}]", seen)


def _free(node: Node) -> Iterator[Free]:
    fields = node.fields(("search", "start"), required=("search",))
    bounds = [item.number() for item in fields["search"].items()] if "search" in fields else []
    assert isinstance(node.yaml, yaml.MappingNode)
    if not node.yaml.flow_style:
        node.wrong(f"{node.name}: write it in braces, as {{search: [low, high]}}.")
    elif len(bounds) != 2 or not bounds[0] < bounds[1]:
        node.wrong(f"{node.name}: search must be [low, high], the lower one first.")
    elif max(map(abs, bounds)) > LARGEST:
        node.wrong(f"{node.name}: search must be between {-LARGEST:g} and {LARGEST:g}.")
    else:
        start = fields["start"].number() if "start" in fields else (bounds[0] + bounds[1]) / 2
        if not bounds[0] <= start <= bounds[1]:
            fields["start"].wrong(f"{node.name}: start must be between {bounds[0]:g} and {bounds[1]:g}; got {start:g}.")
            return
        # Not where the value begins: an anchor may stand there, which stays.
        first = node.problems.text.index("{", node.yaml.start_mark.index)
        yield Free(node.name, bounds[0], bounds[1], start, first, node.yaml.end_mark.index)


def _found_from_anywhere(text: str, folder: Path, models: Mapping[str, Checkpoint]) -> str:
    """The recipe with full paths of models that are found only beside it: it will lie in another folder."""
    spans: list[tuple[int, int, str]] = []

    def visit(node: yaml.Node) -> None:
        if isinstance(node, yaml.ScalarNode):
            places = node.value.split("+")
            full = [
                str((folder / p).absolute()) if not Path(p).exists() and (folder / p).exists() else p for p in places
            ]
            if full != places and any(node.value in (name, *name.split("+")) for name in models):
                first = node.start_mark.index
                spans.append((first, node.end_mark.index, json.dumps("+".join(full))))
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                visit(value)
        elif isinstance(node, yaml.MappingNode):
            for _, value in node.value:
                visit(value)

    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        if document is not None:
            visit(document)
    for first, last, path in sorted(set(spans), reverse=True):
        text = text[:first] + path + text[last:]
    return text


def _begun(journal: Path, settings: Mapping[str, Any]) -> dict[tuple[int, int], Candidate]:
    """What a journal has; it is begun where there is none. A line that was not written to its end is cut off."""
    head = json.dumps(settings, sort_keys=True)
    content = journal.read_bytes() if journal.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        journal.write_text(head + "\n")
        return {}
    if whole != content:
        with open(journal, "r+b") as stream:
            stream.truncate(len(whole))
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found = {
            (line["generation"], line["candidate"]): Candidate(
                line["generation"], tuple(line["numbers"]), line["score"]
            )
            for line in lines
        }
    except (ValueError, KeyError, TypeError):
        raise InputError(f"'{journal}' is no journal of a search: choose another folder.") from None
    for key, value in json.loads(head).items():
        if not isinstance(first, dict) or first.get(key) != value:
            old = first.get(key) if isinstance(first, dict) else None
            what = f"its {key} is {old}, not {value}" if isinstance(value, int | float) else f"not the same {key}"
            raise InputError(f"'{journal}' is of another search ({what}): choose another folder.")
    return found


def _append(journal: Path, line: Mapping[str, Any]) -> None:
    with open(journal, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
