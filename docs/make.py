"""Make the documents' tables and pictures: every number in them is printed by a command that is run here.

    python docs/make.py [--seeds FOLDER ...]            (about ten minutes on two cores)

Writes docs/clip-mini.md between its markers, and the pictures in docs/images/. The folders are fine-tunes with other
seeds, which the zoo does not hold: `python -m fusionbench_zoo.build clip-mini --stage seeds` makes them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FUSIONBENCH = str(Path(sys.executable).with_name("fusionbench"))
POOLS = ("modelpool=clip-mini", "taskpool=clip-mini")
METHODS = "pretrained,simple_average,task_arithmetic,ties_merging,simple_ensemble,individual"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", default=[], help="folders of more fine-tunes")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        demo = run("run", f"method={METHODS}", *POOLS, f"report={work}/reports", columns=80)
        picture(
            demo, DOCS / "images" / "demo.svg", f"fusionbench run method={METHODS.split(',')[0]},... {' '.join(POOLS)}"
        )
        reports = {name: json.loads((work / "reports" / f"{name}.json").read_text()) for name in METHODS.split(",")}
        run("eval", "clip-mini", "taskpool=clip-mini", f"report={work}/cross.json")
        cross = json.loads((work / "cross.json").read_text())
    cosine = run("similarity", "modelpool=clip-mini", f"out={DOCS}/images/clip-mini-cosine.png")
    insert(DOCS / "clip-mini.md", "methods", markdown(reports, "method"))
    insert(DOCS / "clip-mini.md", "cross", markdown(cross, "model"))
    insert(DOCS / "clip-mini.md", "cosine", f"```\n{plain(cosine).strip()}\n```\n")
    regime = [sys.executable, str(ROOT / "benchmarks" / "clip_mini_regime.py"), "--pictures", str(DOCS / "images")]
    done = subprocess.run([*regime, "--seeds", *seeds], stdout=subprocess.PIPE, text=True, check=True)
    insert(DOCS / "clip-mini.md", "regime", f"```\n{done.stdout.strip()}\n```\n")


def run(*words: str, columns: int = 132) -> str:
    """What a command prints, in colour."""
    environment = {**os.environ, "COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    print("fusionbench", *words, flush=True)
    done = subprocess.run(
        [FUSIONBENCH, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    print(done.stdout, flush=True)
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith("The "))


def markdown(reports: dict[str, dict[str, dict[str, float]]], first: str) -> str:
    """Accuracies in percent, the best of each column of methods and models in bold."""
    tasks = [name for name in next(iter(reports.values())) if name not in ("model_info", "run")]
    lines = [f"| {first} | {' | '.join(tasks)} |", f"|---|{'--:|' * len(tasks)}"]
    best = {task: max(report[task]["accuracy"] for report in reports.values()) for task in tasks}
    for label, report in reports.items():
        numbers = [f"{100 * report[task]['accuracy']:.1f}" for task in tasks]
        bold = [f"**{n}**" if report[t]["accuracy"] == best[t] else n for n, t in zip(numbers, tasks, strict=True)]
        lines.append(f"| {label} | {' | '.join(bold)} |")
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
