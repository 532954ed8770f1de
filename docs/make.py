"""Make the documents' tables and pictures: every number in them is of a command that is run here, or kept of a suite.

    python docs/make.py [FAMILY ...] --results FOLDER          (seconds; of what `fusionbench bench SUITE` has kept)
    python docs/make.py [FAMILY ...] [--seeds FOLDER ...]      (all others; about ten minutes a family on two cores)

Writes docs/FAMILY.md between its markers, and the pictures in docs/images/; with results of suites the tables of all
methods, in which rows stay whose runs are not there, and where no family is named those of docs/reproducing.md. The
folders of seeds are fine-tunes of clip-mini with other seeds, which the zoo does not hold: `python -m
fusionbench_zoo.build clip-mini --stage seeds` makes them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import method_pages
from rich.console import Console
from rich.text import Text

from fusionbench.results import Results

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FUSIONBENCH = str(Path(sys.executable).with_name("fusionbench"))
DEMO = "pretrained,simple_average,task_arithmetic,ties_merging,simple_ensemble,individual"
MERGING = "simple_average,task_arithmetic,ties_merging"
FACTORS = ",".join(str(i / 10) for i in range(11))
FAMILIES = ["clip-mini", "gpt2-mini", "t5-mini", "t5-mini-lora", "minilm", "resnet-mini"]
PRIMARY = ("accuracy", "spearman_rho", "miou", "within_1.25", "within_11.25")  # of which a report of a task has one
Report = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--results", metavar="FOLDER", help="only the tables of results of suites, of those kept there")
    parser.add_argument("--seeds", nargs="*", default=[], help="folders of more fine-tunes of clip-mini")
    arguments = parser.parse_args()
    unknown = [family for family in arguments.families if family not in FAMILIES]
    if unknown:
        parser.error(f"no family is called {unknown[0]!r}; there is: {', '.join(FAMILIES)}")
    if arguments.results:
        results = Results(arguments.results)
        results.all()  # there are some: else every row would say that it was not run
        return tables_of_results(arguments.families, results)
    for family in arguments.families or FAMILIES:
        page = DOCS / f"{family}.md"
        with tempfile.TemporaryDirectory() as folder:
            tables(family, page, Path(folder))
        if family == "clip-mini":
            clip_mini(page, arguments.seeds)
        if family == "resnet-mini":
            done = subprocess.run([sys.executable, str(DOCS / "scenes.py"), str(DOCS / "images" / "scenes.png")])
            done.check_returncode()


def tables_of_results(families: list[str], results: Results) -> None:
    """What pages show of suites."""
    for family in families or FAMILIES:
        page = DOCS / f"{family}.md"
        insert(page, "all", measured.all_methods(family, results, method_pages.rows(family, "all")))
        if family == "clip-mini":
            insert(page, "claims", measured.claims(results, method_pages.rows(family, "claims")))
            insert(DOCS / "concepts.md", "choice", method_pages.choice())
        if family == "resnet-mini":
            insert(page, "scores", measured.all_scores(family, results, method_pages.rows(family, "scores")))
    for suite, table in measured.TABLES.items() if not families else ():
        insert(DOCS / "reproducing.md", suite, table(results))


def tables(family: str, page: Path, work: Path) -> None:
    """What all pages have: each model on each task, task arithmetic's factor."""
    pools = (f"modelpool={family}", f"taskpool={family}")
    run("eval", family, f"taskpool={family}", f"report={work}/cross.json")
    insert(page, "cross", markdown(json.loads((work / "cross.json").read_text()), "model"))
    sweep(page, "sweep", work, *pools)
    if family in ("gpt2-mini", "minilm"):
        insert(page, "heads", heads(family))
    if family == "resnet-mini":
        both = {}
        for how in ("merged", "calibrated"):
            words = ["batch_norm=calibrate"] if how == "calibrated" else []
            run("run", f"method={MERGING}", *pools, *words, f"report={work}/{how}")
            found = reports_in(work / how, lambda report: report["run"]["method"])
            both |= {f"{name}, {how}": found[name] for name in found}
        insert(
            page,
            "batch_norm",
            markdown(dict(sorted(both.items(), key=lambda row: row[0].split(",")[0])), "method, statistics"),
        )
        sweep(page, "sweep_calibrated", work, *pools, "batch_norm=calibrate")


def sweep(page: Path, marker: str, work: Path, *words: str) -> None:
    """Scores along task arithmetic's scaling factor."""
    run("run", "method=task_arithmetic", f"method.scaling_factor={FACTORS}", *words, f"report={work}/{marker}")
    found = reports_in(work / marker, lambda report: str(report["run"]["hyperparameters"]["scaling_factor"]))
    insert(page, marker, markdown(found, "scaling factor"))


def heads(family: str) -> str:
    """Calibration accuracy of heads fitted to the base alone, and of the fine-tuned models, as training found them."""
    found = json.loads((ROOT / "zoo" / "src" / "fusionbench_zoo" / family / "manifest.json").read_text())["models"]
    lines = [f"| on calibration data | {' | '.join(found)} | average |", f"|---|{'--:|' * (len(found) + 1)}"]
    for what in ("with a head alone", "fine-tuned"):
        scores = [100 * facts[what] for facts in found.values()]
        cells = [f"{score:.1f}" for score in [*scores, sum(scores) / len(scores)]]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def clip_mini(page: Path, seeds: list[str]) -> None:
    """The demo's picture, cosines, and the regime over several seeds."""
    pools = ("modelpool=clip-mini", "taskpool=clip-mini")
    with tempfile.TemporaryDirectory() as work:
        demo = run("run", f"method={DEMO}", *pools, f"report={work}", columns=80)
    picture(demo, DOCS / "images" / "demo.svg", f"fusionbench run method={DEMO.split(',')[0]},... {' '.join(pools)}")
    start(DOCS / "index.md")
    cosine = run("similarity", "modelpool=clip-mini", f"out={DOCS}/images/clip-mini-cosine.png")
    insert(page, "cosine", f"```\n{plain(cosine).strip()}\n```\n")
    regime = [sys.executable, str(ROOT / "benchmarks" / "clip_mini_regime.py"), "--pictures", str(DOCS / "images")]
    done = subprocess.run([*regime, "--seeds", *seeds], stdout=subprocess.PIPE, text=True, check=True)
    insert(page, "regime", f"```\n{done.stdout.strip()}\n```\n")


def start(page: Path) -> None:
    """What the first page's run prints."""
    words = ("method=pretrained,simple_average,task_arithmetic", "modelpool=clip-mini", "taskpool=clip-mini")
    printed = [line.rstrip() for line in plain(run("run", *words, columns=80)).strip().splitlines()]
    insert(page, "start", "\n".join(["```text", *printed, "```", ""]))


def run(*words: str, columns: int = 132) -> str:
    """What a command prints, in colour."""
    environment = {**os.environ, "COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    print("fusionbench", *words, flush=True)
    done = subprocess.run(
        [FUSIONBENCH, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    print(done.stdout, flush=True)
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith("The "))


def reports_in(folder: Path, name: Callable[[Report], str]) -> dict[str, Report]:
    """The reports of a folder by what `name` makes of each, in that order."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return dict(sorted((name(report), report) for report in found))


def headline(report: Report) -> dict[str, float]:
    """Each task's own score in percent, and their mean."""
    tasks = [name for name in report if name not in ("model_info", "run", "average")]
    scores = {name: 100 * next(report[name][score] for score in PRIMARY if score in report[name]) for name in tasks}
    return {**scores, "average": sum(scores.values()) / len(scores)}


def markdown(reports: dict[str, Report], first: str) -> str:
    """Scores in percent, the best of each column in bold."""
    rows = {label: headline(report) for label, report in reports.items()}
    columns = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([first, *columns])} |", f"|---|{'--:|' * len(columns)}"]
    best = {column: max(row[column] for row in rows.values()) for column in columns}
    for label, row in rows.items():
        cells = [f"**{row[c]:.1f}**" if row[c] == best[c] else f"{row[c]:.1f}" for c in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def insert(file: Path, marker: str, content: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = file.read_text()
    if not pattern.search(text):
        sys.exit(f"{file} has no place for '{marker}'")
    file.write_text(pattern.sub(lambda match: match[1] + content + match[2], text))


def picture(printed: str, file: Path, command: str) -> None:
    """The terminal as a vector picture, with no font fetched from a network."""
    console = Console(record=True, width=84, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(f"\033[1m$ {command}\033[0m\n{printed.rstrip()}"))
    svg = console.export_svg(title="fusionbench")
    file.parent.mkdir(exist_ok=True)
    file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


def plain(printed: str) -> str:
    return Text.from_ansi(printed).plain


if __name__ == "__main__":
    main()
