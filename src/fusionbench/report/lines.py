"""Scores as lines of text: what a terminal, Markdown and LaTeX show of kept results."""

from __future__ import annotations

from collections.abc import Sequence

from fusionbench.report.boards import COSTS, said, seconds
from fusionbench.report.runs import Run, gain, with_seeds
from fusionbench.results import Result, plain

ABOUT = ("corruption", "severity", "models", "seed")


def score_table(results: Sequence[Result], *, keys: bool = False) -> tuple[list[str], list[list[str]]]:
    """A header and a line for each run, in their order, perhaps with the keys of its results.

    Scores are in percent; of several seeds they are the mean, the average with its standard deviation. Beside the
    average stand g = (average - pretrained) / (individual - pretrained) where those two are among the results, the CPU
    seconds of the fusion, and the parameters beyond those of one model. A result without scores has "failed" for its
    average, or "not run".
    """
    runs = with_seeds(results)
    done = [run for run in runs if run.scores]
    names = list(dict.fromkeys(name for run in done for name in run.tasks))
    gains = {run.number: gain(run, done) for run in done}
    told = [what for what in ABOUT if any(run.cell.get(what) for run in runs)]
    more = ["g"] if any(value is not None for value in gains.values()) else []
    more += [title for what, (title, _) in COSTS.items() if any(run.cost(what) is not None for run in done)]
    more += ["key"] if keys else []
    lines = []
    for run in runs:
        about = [_told(run, what) for what in told]
        scores = [f"{100 * run.scores[name]:.1f}" if name in run.scores else "" for name in (*names, "average")]
        if run.deviation is not None:
            scores[-1] += f" ± {100 * run.deviation:.1f}"
        if run.failed:
            scores[-1] = run.missing
        value, spent, added = gains.get(run.number), run.cost("fusion_seconds"), run.cost("added_parameters")
        cells = {
            "g": "" if value is None else f"{round(value, 2) + 0:.2f}",
            "seconds": "" if spent is None else seconds(spent),
            "added": "" if added is None else said(added),
            "key": "\n".join(result.key for result in run.results),
        }
        lines.append([run.label, *about, *scores, *(cells[title] for title in more)])
    return ["method", *told, *names, "average", *more], lines


def _told(run: Run, what: str) -> str:
    """What a cell says; of several seeds all."""
    values = [result.cell.get(what) for result in run.results] if what == "seed" else [run.cell.get(what)]
    return ", ".join(str(plain(value)).replace(",", ", ") for value in values if value is not None)
