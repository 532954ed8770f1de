"""resnet-mini: an encoder that learned to classify pictures, fine-tuned on each task of the scenes."""

import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from fusionbench.architectures._dilated_resnet import DilatedResNet, deep_lab_head
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate

from fusionbench_zoo.recipes.clip_mini.split import load_task
from fusionbench_zoo.recipes.clip_mini.tasks import TASKS as PICTURES
from fusionbench_zoo.recipes.scenes.data import load_scenes
from fusionbench_zoo.recipes.training import layered, train

log = logging.getLogger(__name__)

ENCODER = {"layers": [2, 2, 2, 2], "width": 8, "stem_stride": 1}
DECODER = {"width": 24, "rates": [2, 4]}
CYCLES, WARM_UP, EACH = [(1500, 4e-3)], 100, 16  # pictures of each task in a batch
TASKS = {"segmentation": ("label", 13), "depth": ("depth", 1), "normals": ("normal", 3)}
BATCH, DECODER_STEPS, STEPS, RATE, DECAY = 16, 400, 900, 1e-3, 0.65


def new_encoder() -> DilatedResNet:
    """An untrained encoder of 0.2M parameters."""
    return DilatedResNet(**ENCODER)


def pretrain(work: Path, seed: int) -> None:
    """Learn to classify the pictures of clip-mini's tasks, their training parts, all at once; write `work/base`."""
    torch.manual_seed(seed)
    arrays = [load_task(work.parent / "clip-mini", task.name) for task in PICTURES]
    images = [torch.from_numpy(_rgb(a["train_images"])) for a in arrays]
    labels = [torch.from_numpy(a["train_labels"].astype(np.int64)) for a in arrays]
    encoder = new_encoder()
    heads = nn.ModuleList([nn.Linear(32 * ENCODER["width"], len(task.classes)) for task in PICTURES])
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss_of(step: int) -> Tensor:
        random = torch.Generator().manual_seed(seed * 10**6 + step)
        rows = [torch.randint(len(mine), (EACH,), generator=random) for mine in labels]
        batch = (
            torch.cat([mine[some] for mine, some in zip(images, rows, strict=True)]).permute(0, 3, 1, 2).float() / 255
        )
        pooled = encoder(batch).mean((2, 3)).split(EACH)
        losses = [
            cross_entropy(head(features).float(), mine[some])
            for head, features, mine, some in zip(heads, pooled, labels, rows, strict=True)
        ]
        return torch.stack(losses).mean()

    seconds = train(model, loss_of, cycles=CYCLES, warm_up=WARM_UP, file=work / "pretrain" / "checkpoint.pt")
    (work / "base").mkdir(exist_ok=True)
    save_file(encoder.state_dict(), work / "base" / "model.safetensors")
    model.eval()
    accuracies = {}
    with torch.no_grad():
        for task, head, a in zip(PICTURES, heads, arrays, strict=True):
            seen = encoder(torch.from_numpy(_rgb(a["calibration_images"])).permute(0, 3, 1, 2).float() / 255)
            right = head(seen.mean((2, 3))).argmax(1).numpy() == a["calibration_labels"]
            accuracies[task.name] = float(right.mean())
    log.info("accuracy of the pictures: %s", {name: round(value, 3) for name, value in accuracies.items()})
    facts = {"cycles of steps and rate": CYCLES, "seed": seed, "seconds": seconds, "calibration accuracy": accuracies}
    (work / "pretrain" / "facts.json").write_text(json.dumps(facts))


def finetune_all(work: Path, seed: int) -> None:
    """Write `work/models/<task>.safetensors`: `encoder.*` and `decoder.*`."""
    (work / "models").mkdir(exist_ok=True)
    for name in TASKS:
        file = work / "models" / f"{name}.safetensors"
        if not file.exists():
            start = time.monotonic()
            save_file(finetune(work, name, seed), file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
            log.info("%s took %.0f s", name, time.monotonic() - start)


def finetune(work: Path, name: str, seed: int) -> dict[str, Tensor]:
    """First the decoder on the base's features, then both: the encoder need not move to a random decoder."""
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    kind, outputs = TASKS[name]
    scenes = load_scenes(work, "train")
    images = torch.from_numpy(scenes["image"]).permute(0, 3, 1, 2)
    truth = torch.from_numpy(scenes[kind])
    encoder = new_encoder()
    encoder.load_state_dict(load_file(work / "base" / "model.safetensors"))
    decoder = deep_lab_head(32 * ENCODER["width"], outputs, **DECODER)
    for steps, layers in (
        (DECODER_STEPS, [decoder]),
        (STEPS, [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4, decoder]),
    ):
        encoder.train(len(layers) > 1)
        optimizer, schedule = layered(layers, rate=RATE, decay=DECAY, steps=steps, warm_up=30)
        for step in range(steps):
            rows = torch.randint(len(images), (BATCH,))
            with torch.autocast("cpu", torch.bfloat16):
                features = encoder(images[rows].float() / 255)
                seen = interpolate(decoder(features), size=images.shape[-2:], mode="bilinear")
            loss = loss_of(name, seen.float(), truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == steps - 1:
                log.info("%s: step %d of %d, loss %.3f", name, step, steps, loss.item())
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    return {n: t.contiguous() for n, t in both.state_dict().items()}


def loss_of(name: str, seen: Tensor, truth: Tensor) -> Tensor:
    """What a task minimises: cross-entropy, the absolute error in metres, or one less the cosine."""
    if name == "segmentation":
        return cross_entropy(seen, truth.long())
    if name == "depth":
        return (seen[:, 0] - truth.float()).abs().mean()
    return 1 - cosine_similarity(seen, truth.permute(0, 3, 1, 2).float(), dim=1).mean()


def _rgb(images: np.ndarray) -> np.ndarray:
    return images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
