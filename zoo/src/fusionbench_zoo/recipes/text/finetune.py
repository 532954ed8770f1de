"""Fine-tune the text models on each task; one loop serves classifiers, text-to-text models and adapters."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusionbench_zoo.recipes.text.data import load_task
from fusionbench_zoo.recipes.text.tasks import Row, Task
from fusionbench_zoo.recipes.training import layered

log = logging.getLogger(__name__)

Tokens = dict[str, Tensor]
PROBE_STEPS, PROBE_RATE = 600, 0.02


@dataclass(frozen=True)
class Plan:
    """How long and how fast."""

    steps: int
    rate: float
    batch: int = 64
    warm_up: int = 30
    decay: float = 0.65  # of the rate, from each layer to the one below
    longest: int = 128  # tokens that are read
    fitted_head: bool = True  # whether a classifier's head starts as the one that fits the base best, or as any


class Classifier:
    """A backbone, its tokenizer, and how its states at the tokens become one for the text."""

    def __init__(self, backbone: nn.Module, tokenizer, task: Task, text: Path, longest: int, pooling: str) -> None:
        self.backbone, self.tokenizer, self.task, self.text, self.longest = backbone, tokenizer, task, text, longest
        self.pooling = pooling
        self.head = nn.Linear(backbone.config.hidden_size, len(task.classes), bias=False)

    def encode(self, rows: list[Row]) -> tuple[Tokens, Tensor]:
        columns = [[str(row[column]) for row in rows] for column in self.task.text]
        tokens = self.tokenizer(*columns, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return tokens, torch.tensor([self.task.classes.index(str(row["label"])) for row in rows])

    def features(self, tokens: Tokens) -> Tensor:
        states, mask = self.backbone(**tokens)[0].float(), tokens["attention_mask"]
        if self.pooling == "mean":
            return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return states[torch.arange(len(states)), mask.sum(1) - 1]

    def loss(self, rows: list[Row]) -> Tensor:
        tokens, labels = self.encode(rows)
        return cross_entropy(self.head(self.features(tokens)), labels)

    def probe(self) -> None:
        """Fit the head to the backbone as it is, so that fine-tuning need not move the backbone to a random head."""
        found = [self.features_of(rows) for rows in batches(load_task(self.text, self.task.name, "train")[:4000], 128)]
        features, labels = (torch.cat(side) for side in zip(*found, strict=True))
        scale = features.std()
        optimizer = torch.optim.Adam(self.head.parameters(), PROBE_RATE)
        with torch.no_grad():
            self.head.weight.zero_()
        for step in range(PROBE_STEPS):
            optimizer.param_groups[0]["lr"] = PROBE_RATE * 0.5 * (1 + math.cos(math.pi * step / PROBE_STEPS))
            loss = cross_entropy(self.head(features / scale), labels) + 1e-3 * self.head.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            self.head.weight /= scale

    @torch.no_grad()
    def features_of(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        tokens, labels = self.encode(rows)
        return self.features(tokens), labels

    @torch.inference_mode()
    def accuracy(self, part: str) -> float:
        self.backbone.eval()
        rows = load_task(self.text, self.task.name, part)
        right = 0
        for some in batches(rows, 128):
            tokens, labels = self.encode(some)
            right += int((self.head(self.features(tokens)).argmax(1) == labels).sum())
        return right / len(rows)


def tuned_classifier(classifier: Classifier, plan: Plan, layers: list[nn.Module]) -> dict[str, float]:
    """Fit the head, train the layers, and return the accuracies on calibration data before and after."""
    classifier.backbone.eval()  # no dropout
    classifier.probe()
    before = classifier.accuracy("calibration")
    if not plan.fitted_head:
        classifier.head.reset_parameters()
    train(
        plan, classifier.loss, layers, load_task(classifier.text, classifier.task.name, "train"), classifier.task.name
    )
    return {"with a head alone": before, "fine-tuned": classifier.accuracy("calibration")}


def finetune_all(
    work: Path,
    tasks: list[Task],
    tuned: Callable[[Task], tuple[dict[str, Tensor], dict[str, float]]],
    folder: str = "models",
) -> None:
    """Write `<folder>/<task>.safetensors` in float16 for each task that is not there yet, and `facts.json`."""
    (work / folder).mkdir(exist_ok=True)
    facts = work / folder / "facts.json"
    known = json.loads(facts.read_text()) if facts.exists() else {}
    for task in tasks:
        file = work / folder / f"{task.name}.safetensors"
        if not file.exists():
            start = time.monotonic()
            tensors, known[task.name] = tuned(task)
            known[task.name]["seconds"] = round(time.monotonic() - start)
            log.info("%s: %s", task.name, known[task.name])
            facts.write_text(json.dumps(known, indent=1))
            save_file({name: t.half().contiguous() for name, t in tensors.items()}, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)


def batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Rows in order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def train(
    plan: Plan, loss_of: Callable[[list[Row]], Tensor], layers: list[nn.Module], rows: list[Row], name: str
) -> None:
    """Train the layers, the last at the full rate."""
    optimizer, schedule = layered(layers, rate=plan.rate, decay=plan.decay, steps=plan.steps, warm_up=plan.warm_up)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(-(-plan.steps * plan.batch // len(rows)))]).tolist()
    start = time.monotonic()
    for step in range(plan.steps):
        some = [rows[i] for i in order[step * plan.batch : (step + 1) * plan.batch]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(some)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == plan.steps - 1:
            each = (time.monotonic() - start) / (step + 1)
            log.info("%s: step %d of %d, loss %.3f, %.2f s a step", name, step, plan.steps, loss.item(), each)
