"""Contrastive pre-training of the base model on pictures and their captions (Radford et al., 2021)."""

import json
import logging
import math
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
from fusionbench_zoo.recipes.training import train

log = logging.getLogger(__name__)

# Two cycles of (steps, rate), each with its warm-up and its fall to zero; the second shows more of what is rare.
CYCLES = [(3500, 1e-3), (3200, 8e-4)]  # an hour on two idle cores
WARM_UP, BATCH, WEIGHT_DECAY = 300, 512, 0.1
LARGEST_SCALE = math.log(100)


def pretrain(work: Path, seed: int) -> None:
    """Train, from the last checkpoint if there is one, and write `work/base`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)
    pairs = Pairs(work / "data" / "pretrain", tokenizer)
    model = clip.new_model(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    # On CPU, PyTorch 2.13's fused attention is 8 times slower backward in bfloat16 than in float32: 1.3 s a step
    # with it, 0.54 s without; all in float32 it is 0.95 s.
    model.set_attn_implementation("eager")

    def loss_of(step: int) -> torch.Tensor:
        return _loss(model, *pairs.batch(torch.Generator().manual_seed(seed * 10**6 + step), step))

    def limit_scale() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_SCALE)

    file = work / "pretrain" / "checkpoint.pt"
    seconds = train(
        model, loss_of, cycles=CYCLES, warm_up=WARM_UP, file=file, weight_decay=WEIGHT_DECAY, after=limit_scale
    )
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    accuracies = zero_shot(work, model, tokenizer, "calibration")
    log.info("base: %s", _in_words(accuracies))
    facts = {
        "cycles of steps and rate": CYCLES,
        "batch": BATCH,
        "seed": seed,
        "pairs": len(pairs),
        "seconds": seconds,
        "calibration accuracy": accuracies,
    }
    (work / "pretrain" / "facts.json").write_text(json.dumps(facts))


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


def _loss(model: CLIPModel, images, tokens, whose, match) -> torch.Tensor:
    seen, read = clip.image_features(model, images), clip.text_features(model, tokens)[whose]
    with torch.autocast("cpu", enabled=False):
        logits = model.logit_scale.exp() * seen @ read.T
        target = match / match.sum(1, keepdim=True)  # symmetric matches: the same rows serve both directions
        return -(target * (log_softmax(logits, 1) + log_softmax(logits.T, 1))).sum(1).mean() / 2


def _in_words(accuracies: dict[str, float]) -> str:
    mean = sum(accuracies.values()) / len(accuracies)
    return f"mean {mean:.3f}, " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
