"""Fine-tune the vision tower on each task; all else stays as it was, as in Ilharco et al. (2023)."""

import json
import logging
import time
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import affine_grid, cosine_similarity, cross_entropy, grid_sample
from transformers import CLIPModel

from fusionbench_zoo.recipes.clip_mini import model as clip
from fusionbench_zoo.recipes.clip_mini.split import load_task
from fusionbench_zoo.recipes.clip_mini.tasks import TASKS, Task
from fusionbench_zoo.recipes.training import layered

log = logging.getLogger(__name__)

# Few steps at a high rate, less of it in lower layers, which all tasks share; many at a low one give models that merge
# worse (docs/log.md).
STEPS, BATCH, RATE, WARM_UP = 200, 128, 1.6e-3, 30
LAYER_DECAY = 0.65  # of the rate, from each layer to the one below; the embeddings stay as they are
SHIFT = 0.08  # of half a picture's width
MIRRORED = {"animals", "fashion-mnist", "climate"}
Tensors = dict[str, torch.Tensor]


def finetune_all(work: Path, seed: int, name: str = "models") -> None:
    """Write `work/<name>/<task>.safetensors` for each task, and what is known of all of them to `facts.json`."""
    folder = work / name
    folder.mkdir(exist_ok=True)
    for task in TASKS:
        file = folder / f"{task.name}.safetensors"
        if not file.exists():
            start = time.monotonic()
            tower = finetune(work, task, seed)
            save_file(tower, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
            log.info("%s took %.0f s", task.name, time.monotonic() - start)
    base = vision_tower(clip.load(work / "base")[0])
    towers = {task.name: load_file(folder / f"{task.name}.safetensors") for task in TASKS}
    facts = {
        "steps": STEPS,
        "batch": BATCH,
        "rate": RATE,
        "layer decay": LAYER_DECAY,
        "seed": seed,
        **_geometry(base, towers),
    }
    average = {name: torch.stack([tower[name].float() for tower in towers.values()]).mean(0) for name in base}
    for part in ("calibration", "test"):
        facts[f"{part} accuracy"] = {
            task.name: {
                "base": evaluate(work, base, task, part),
                "fine-tuned": evaluate(work, towers[task.name], task, part),
                "simple average": evaluate(work, average, task, part),
            }
            for task in TASKS
        }
        for name, row in facts[f"{part} accuracy"].items():
            log.info("%s, %s: %s", part, name, ", ".join(f"{model} {value:.3f}" for model, value in row.items()))
    (folder / "facts.json").write_text(json.dumps(facts))


def finetune_seeds(work: Path, seed: int) -> None:
    """Fine-tune with two more seeds, to `models-1` and `models-2`: they measure deviations, and are not vendored."""
    for i in (1, 2):
        finetune_all(work, seed + i, f"models-{i}")


def finetune(work: Path, task: Task, seed: int) -> Tensors:
    """Return the vision tower after training, in float16."""
    torch.manual_seed(seed)
    model, tokenizer = clip.load(work / "base")
    model.set_attn_implementation("eager")  # as in pre-training: in bfloat16 twice as fast
    model.requires_grad_(False).vision_model.requires_grad_(True)
    head = clip.zero_shot_head(model, tokenizer, task.classes, task.templates)
    arrays = load_task(work, task.name)
    images, labels = clip.pixels(arrays["train_images"]), torch.from_numpy(arrays["train_labels"]).long()
    optimizer, schedule = layered(_layers(model), rate=RATE, decay=LAYER_DECAY, steps=STEPS, warm_up=WARM_UP)
    model.train()
    order = torch.cat([torch.randperm(len(labels)) for _ in range(-(-STEPS * BATCH // len(labels)))])
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            features = clip.image_features(model, _jitter(images[rows], task.name in MIRRORED))
        loss = cross_entropy(features @ head.T, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log.info("%s: step %d of %d, loss %.3f", task.name, step, STEPS, loss.item())
    return {name: tensor.half() for name, tensor in vision_tower(model).items()}


def _layers(model: CLIPModel) -> list[nn.Module]:
    """What is trained, from the lowest: all but the embeddings and what normalises them."""
    tower = model.vision_model
    tower.embeddings.requires_grad_(False)
    tower.pre_layrnorm.requires_grad_(False)
    return [*tower.encoder.layers, tower.post_layernorm]


def vision_tower(model: CLIPModel) -> Tensors:
    """Return the tensors that fine-tuning changes, by their names in the whole model."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vision_model.")}


def evaluate(work: Path, tower: Tensors, task: Task, part: str) -> float:
    """Return the accuracy of a vision tower in the base model."""
    model, tokenizer = clip.load(work / "base")
    head = clip.zero_shot_head(model, tokenizer, task.classes, task.templates)
    model.load_state_dict({name: tensor.float() for name, tensor in tower.items()}, strict=False)
    arrays = load_task(work, task.name)
    return clip.accuracy(model, head, arrays[f"{part}_images"], arrays[f"{part}_labels"])


def _jitter(images: torch.Tensor, mirrored: bool) -> torch.Tensor:
    """Shift each picture by about a pixel, and mirror half of them where a mirror image is as good."""
    n = len(images)
    theta = torch.eye(2, 3).repeat(n, 1, 1)
    theta[:, :, 2] = SHIFT * (2 * torch.rand(n, 2) - 1)
    if mirrored:
        theta[:, 0, 0] = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _geometry(base: Tensors, towers: dict[str, Tensors]) -> dict:
    """Measure how far the models went, and whether in the same direction."""
    flat = torch.cat([tensor.float().flatten() for tensor in base.values()])
    task_vectors = {
        name: torch.cat([tower[key].float().flatten() for key in base]) - flat for name, tower in towers.items()
    }
    lengths = {name: (vector.norm() / flat.norm()).item() for name, vector in task_vectors.items()}
    pairs = {
        f"{a}, {b}": cosine_similarity(task_vectors[a], task_vectors[b], 0).item() for a, b in combinations(towers, 2)
    }
    log.info("length of task vectors over length of base: %s", {name: round(x, 4) for name, x in lengths.items()})
    log.info("cosines between task vectors: %.3f to %.3f", min(pairs.values()), max(pairs.values()))
    return {"length of task vector / length of base": lengths, "cosine of task vectors": pairs}
