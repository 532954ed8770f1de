"""Make the documents' tables and pictures: every number in them is printed by a command that is run here.

    python docs/make.py [FAMILY ...] [--seeds FOLDER ...]      (about ten minutes a family on two cores)
    python docs/make.py FAMILY --all-methods FOLDER            (an hour; goes on from what the folder holds)

Writes docs/FAMILY.md between its markers, and the pictures in docs/images/. The folders are fine-tunes of clip-mini
with other seeds, which the zoo does not hold: `python -m fusionbench_zoo.build clip-mini --stage seeds` makes them.
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

import method_pages
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FUSIONBENCH = str(Path(sys.executable).with_name("fusionbench"))
METHODS = "pretrained,simple_average,task_arithmetic,ties_merging,simple_ensemble,max_model_predictor,individual"
DEMO = METHODS.replace("max_model_predictor,", "")
FACTORS = ",".join(str(i / 10) for i in range(11))
FAMILIES = ["clip-mini", "gpt2-mini", "t5-mini", "t5-mini-lora", "minilm", "resnet-mini"]
PRIMARY = ("accuracy", "spearman_rho", "miou", "within_1.25", "within_11.25")  # of which a report of a task has one
Report = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--all-methods", metavar="FOLDER", help="only the table of all methods, of results kept there")
    parser.add_argument("--seeds", nargs="*", default=[], help="folders of more fine-tunes of clip-mini")
    arguments = parser.parse_args()
    unknown = [family for family in arguments.families if family not in FAMILIES]
    if unknown:
        parser.error(f"no family is called {unknown[0]!r}; there is: {', '.join(FAMILIES)}")
    for family in arguments.families or FAMILIES:
        page = DOCS / f"{family}.md"
        if arguments.all_methods:
            study = [sys.executable, str(ROOT / "benchmarks" / "all_methods.py"), family]
            words = [*study, "--results", arguments.all_methods]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            insert(page, "all", done.stdout[done.stdout.index("| method") :])
            if family == "clip-mini":
                insert(DOCS / "concepts.md", "choice", method_pages.choice())
            continue
        with tempfile.TemporaryDirectory() as folder:
            tables(family, page, Path(folder))
        if family == "clip-mini":
            clip_mini(page, arguments.seeds)
        if family == "resnet-mini":
            done = subprocess.run([sys.executable, str(DOCS / "scenes.py"), str(DOCS / "images" / "scenes.png")])
            done.check_returncode()


def tables(family: str, page: Path, work: Path) -> None:
    """What all pages have: methods, each model on each task, task arithmetic's factor."""
    pools = (f"modelpool={family}", f"taskpool={family}")
    run("run", f"method={METHODS}", *pools, f"report={work}/methods")
    methods = reports_in(work / "methods", lambda report: report["run"]["method"])
    methods = {name: methods[name] for name in METHODS.split(",")}
    insert(page, "methods", markdown(methods, "method", gains=True))
    run("eval", family, f"taskpool={family}", f"report={work}/cross.json")
    insert(page, "cross", markdown(json.loads((work / "cross.json").read_text()), "model"))
    sweep(page, "sweep", work, *pools)
    if family in ("gpt2-mini", "minilm"):
        insert(page, "heads", heads(family))
    if family == "resnet-mini":
        merging = "simple_average,task_arithmetic,ties_merging"
        run("run", f"method={merging}", *pools, "batch_norm=calibrate", f"report={work}/calibrated")
        found = reports_in(work / "calibrated", lambda report: report["run"]["method"])
        both = {f"{name}, {how}": r[name] for name in found for how, r in (("merged", methods), ("calibrated", found))}
        insert(page, "batch_norm", markdown(both, "method, statistics"))
        insert(page, "scores", all_scores(methods))
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


def markdown(reports: dict[str, Report], first: str, *, gains: bool = False) -> str:
    """Scores in percent, the best of each column in bold; and g, where the base and the individual models are rows."""
    rows = {label: headline(report) for label, report in reports.items()}
    columns = list(next(iter(rows.values())))
    lines = [
        f"| {' | '.join([first, *columns, *(['g'] if gains else [])])} |",
        f"|---|{'--:|' * (len(columns) + gains)}",
    ]
    best = {column: max(row[column] for row in rows.values()) for column in columns}
    for label, row in rows.items():
        cells = [f"**{row[c]:.1f}**" if row[c] == best[c] else f"{row[c]:.1f}" for c in columns]
        if gains:
            base, individual = rows["pretrained"]["average"], rows["individual"]["average"]
            cells.append(f"{(row['average'] - base) / (individual - base):.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def all_scores(reports: dict[str, Report]) -> str:
    """Every score of every task: shares in percent, errors and angles as they are."""
    some = next(iter(reports.values()))
    columns = [(t, s) for t in some if t not in ("model_info", "run", "average") for s in some[t]]
    lines = [f"| method | {' | '.join(f'{t}: {s}' for t, s in columns)} |", f"|---|{'--:|' * len(columns)}"]
    for label, report in reports.items():
        numbers = [report[t][s] if "error" in s or "angle" in s else 100 * report[t][s] for t, s in columns]
        cells = [f"{n:.2f}" if "error" in s else f"{n:.1f}" for n, (_, s) in zip(numbers, columns, strict=True)]
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
