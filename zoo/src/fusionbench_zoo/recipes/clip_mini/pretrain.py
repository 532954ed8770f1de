"""Contrastive pre-training of the base model on pictures and their captions (Radford et al., 2021)."""

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, CLIPModel

from fusionbench_zoo.recipes.clip_mini import model as clip
from fusionbench_zoo.recipes.clip_mini.augment import augment
from fusionbench_zoo.recipes.clip_mini.split import load_task
from fusionbench_zoo.recipes.clip_mini.tasks import LATER_SHARES, SHARES, TASKS
from fusionbench_zoo.recipes.clip_mini.tokenizer import encode

log = logging.getLogger(__name__)

# Two cycles of (steps, rate), each with its warm-up and its fall to zero; the second shows more of what is rare.
CYCLES = [(3500, 1e-3), (3200, 8e-4)]  # an hour on two idle cores
STEPS = sum(steps for steps, _ in CYCLES)
WARM_UP, BATCH, WEIGHT_DECAY = 300, 512, 0.1
LARGEST_SCALE = math.log(100)
SECONDS_BETWEEN_CHECKPOINTS, SECONDS_BETWEEN_EVALUATIONS = 120, 240


def pretrain(work: Path, seed: int) -> None:
    """Train, from the last checkpoint if there is one, and write `work/base`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)
    pairs = Pairs(work / "data" / "pretrain", tokenizer)
    model = clip.new_model(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    # On CPU, PyTorch 2.13's fused attention is 8 times slower backward in bfloat16 than in float32: 1.3 s a step
    # with it, 0.54 s without; all in float32 it is 0.95 s.
    model.set_attn_implementation("eager")
    optimizer = _optimizer(model)
    checkpoint = work / "pretrain" / "checkpoint.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    first, spent = _resume(checkpoint, model, optimizer)
    start = saved = evaluated = time.monotonic()
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        # Seeded by the step: a resumed run sees what an unbroken one would have seen.
        loss = _step(model, optimizer, *pairs.batch(torch.Generator().manual_seed(seed * 10**6 + step), step))
        now = time.monotonic()
        if step % 50 == 0:
            log.info("step %d of %d, loss %.3f, %.2f s a step", step, STEPS, loss, (now - start) / (step - first + 1))
        if now - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save(checkpoint, model, optimizer, step + 1, spent + now - start)
            saved = now
        if now - evaluated > SECONDS_BETWEEN_EVALUATIONS:
            log.info("step %d: %s", step, _in_words(zero_shot(work, model, tokenizer, "calibration")))
            evaluated = time.monotonic()
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    accuracies = zero_shot(work, model, tokenizer, "calibration")
    log.info("base: %s", _in_words(accuracies))
    facts = {
        "cycles of steps and rate": CYCLES,
        "batch": BATCH,
        "seed": seed,
        "pairs": len(pairs),
        "seconds": round(spent + time.monotonic() - start),
        "calibration accuracy": accuracies,
    }
    (work / "pretrain" / "facts.json").write_text(json.dumps(facts))


def rate(step: int) -> float:
    """Return the learning rate of a step: in each cycle up in a line, then down along a cosine."""
    for steps, highest in CYCLES:
        if step < steps:
            return highest * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        step -= steps
    raise ValueError("The cycles have fewer steps.")


def zero_shot(work: Path, model: CLIPModel, tokenizer, part: str) -> dict[str, float]:
    """Return the accuracy on one part of every task."""
    model.eval()
    found = {}
    for task in TASKS:
        arrays = load_task(work, task.name)
        head = clip.zero_shot_head(model, tokenizer, task.classes, task.templates)
        found[task.name] = clip.accuracy(model, head, arrays[f"{part}_images"], arrays[f"{part}_labels"])
    model.train()
    return found


class Pairs:
    """The pre-training set, from which each source gives its share of a batch."""

    def __init__(self, folder: Path, tokenizer) -> None:
        index, texts = np.load(folder / "index.npz"), json.loads((folder / "texts.json").read_text())
        self.images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))
        self.captions = torch.from_numpy(index["captions"]).long()  # (N, captions of one picture)
        self.kinds = torch.from_numpy(index["kinds"])
        self.tokens = encode(tokenizer, texts["captions"])
        sources = torch.from_numpy(index["sources"])
        self.weights = [
            (torch.tensor([shares[name] for name in texts["sources"]]) / torch.bincount(sources))[sources]
            for shares in (SHARES, LATER_SHARES)
        ]
        self.lengths = (self.tokens != tokenizer.eos_token_id).sum(1) + 1

    def __len__(self) -> int:
        return len(self.kinds)

    def batch(
        self, random: torch.Generator, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return pictures, the different captions as tokens, which of them is whose, and which pairs match."""
        weights = self.weights[step >= CYCLES[0][0]]
        rows = torch.multinomial(weights, BATCH, replacement=True, generator=random)
        mine = torch.randint(self.captions.shape[1], (BATCH, 1), generator=random)
        chosen = self.captions[rows].gather(1, mine)[:, 0]
        different, whose = chosen.unique(return_inverse=True)
        tokens = self.tokens[different][:, : self.lengths[different].max()]
        thing = self.captions[rows, 0]
        # Equal captions match, and so do other captions of the same thing.
        match = (chosen[:, None] == chosen) | (thing[:, None] == thing)
        return augment(self.images[rows], self.kinds[rows], random), tokens, whose, match.float()


def _step(model: CLIPModel, optimizer, images, tokens, whose, match) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        seen, read = clip.image_features(model, images), clip.text_features(model, tokens)[whose]
    logits = model.logit_scale.exp() * seen @ read.T
    target = match / match.sum(1, keepdim=True)  # symmetric matches: the same rows serve both directions
    loss = -(target * (log_softmax(logits, 1) + log_softmax(logits.T, 1))).sum(1).mean() / 2
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=LARGEST_SCALE)
    return loss.item()


def _optimizer(model: CLIPModel) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _save(file: Path, model: CLIPModel, optimizer, step: int, seconds: float) -> None:
    """Write a checkpoint that is whole even when the machine stops meanwhile."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)


def _resume(file: Path, model: CLIPModel, optimizer) -> tuple[int, float]:
    """Return the step to go on with and the seconds spent before."""
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("going on at step %d", state["step"])
    return state["step"], state["seconds"]


def _in_words(accuracies: dict[str, float]) -> str:
    mean = sum(accuracies.values()) / len(accuracies)
    return f"mean {mean:.3f}, " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
