"""The data stage: write every task's sentences by part, and what pre-training reads."""

import json
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.text.corpus import corpus
from fusionbench_zoo.recipes.text.partition import PARTS
from fusionbench_zoo.recipes.text.tasks import TASKS, Row, Task

log = logging.getLogger(__name__)

MOST = {"pretrain": 12000, "train": 6000, "calibration": 256, "test": 600}
CLEANEST_FIRST = ("test", "calibration", "train", "pretrain")


def build_data(work: Path, seed: int) -> None:
    """Write `work/data`: a `.jsonl` file of each task, `corpus.jsonl` of each document, and what proves the split."""
    partial = work / "data.partial"
    (partial / "tasks").mkdir(parents=True, exist_ok=True)
    seen: dict[str, str] = {}  # texts and their parts; of a pair the first, for the second may stand for a class
    proof = {}
    for task in TASKS:
        parts = _drawn(work.parent, task, np.random.default_rng(seed))
        for part in CLEANEST_FIRST:
            kept = [row for row in parts[part] if seen.setdefault(str(row[task.text[0]]), part) == part]
            proof[f"{task.name}, {part}"] = {
                "rows": len(kept),
                "left out: their text is in another part": len(parts[part]) - len(kept),
            }
            parts[part] = kept
        lines = [json.dumps({"split": part, **row}, ensure_ascii=False) for part in PARTS for row in parts[part]]
        (partial / "tasks" / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n")
        log.info("%s: %s", task.name, {part: len(rows) for part, rows in parts.items()})
    documents = [d for d in corpus(work.parent) if all(seen.get(text, "pretrain") == "pretrain" for text in d)]
    proof["documents of pre-training"] = len(documents)
    (partial / "corpus.jsonl").write_text("\n".join(json.dumps(d, ensure_ascii=False) for d in documents) + "\n")
    (partial / "partition.json").write_text(json.dumps(proof, indent=1))
    partial.rename(work / "data")


def load_task(work: Path, name: str, part: str) -> list[Row]:
    """The rows of one part of a task."""
    lines = (work / "data" / "tasks" / f"{name}.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.pop("split") == part]


def load_corpus(work: Path) -> list[list[str]]:
    """Documents of pre-training: each of one text, or of two that belong together."""
    return [json.loads(line) for line in (work / "data" / "corpus.jsonl").read_text().splitlines()]


def _drawn(work: Path, task: Task, random: np.random.Generator) -> dict[str, list[Row]]:
    """Rows of each part in random order, as many of each class, and as many as are wanted."""
    found: dict[str, dict[object, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for part, row in task.rows(work, random):
        found[part][row["label"] if task.classes else ""].append(row)
    drawn = {}
    for part, most in MOST.items():
        each = min(len(rows) for rows in found[part].values())
        each = min(each, most // max(1, len(task.classes)))
        chosen = [rows[i] for rows in found[part].values() for i in random.permutation(len(rows))[:each]]
        drawn[part] = [chosen[i] for i in random.permutation(len(chosen))]
    return drawn
