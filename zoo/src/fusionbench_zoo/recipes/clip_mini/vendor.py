"""Copy what is published into the package, and write its manifest."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from fusionbench_zoo.recipes.clip_mini import model as clip
from fusionbench_zoo.recipes.clip_mini.attribution import attribution
from fusionbench_zoo.recipes.clip_mini.drawings import SIZE
from fusionbench_zoo.recipes.clip_mini.finetune import vision_tower
from fusionbench_zoo.recipes.clip_mini.partition import PARTS, SALTS
from fusionbench_zoo.recipes.clip_mini.split import load_task
from fusionbench_zoo.recipes.clip_mini.tasks import TASKS
from fusionbench_zoo.recipes.vendoring import made_with, publish, write_json

BUILT_WITH = ["torch", "transformers", "tokenizers", "numpy", "pillow", "resvg-py", "fonttools"]
RULES = [
    "A group is hashed into one part. Pre-training sees the pretrain parts of climate, icons, emoji, letters and "
    "scripts; of MNIST, Fashion-MNIST and animals it sees nothing.",
    "House numbers are parted as the letters, by typeface: pre-training sees digits of its own typefaces.",
    "A family of icon sets in another part than pretrain gives pre-training no icon whose name has a word of the 40 "
    "concepts or of their synonyms; its other icons are used.",
    "What an emoji shows is held out over all emoji sets, and countries also over the sets of flags.",
    "A picture that occurs more than once, in any sources, is kept once: in test, calibration, train or pretrain, in "
    "this order.",
]


def vendor(work: Path, seed: int) -> None:
    """Publish the base, the fine-tuned towers, the tasks and a manifest."""

    def fill(folder: Path) -> None:
        vendor_tasks(work, folder / "tasks")
        vendor_models(work, folder)
        (folder / "ATTRIBUTION.md").write_text(attribution(work.parent))

    publish(work.name, fill, _manifest(work, seed))


def vendor_tasks(work: Path, folder: Path) -> None:
    """Write the test and calibration pictures of each task, and what its classes are."""
    folder.mkdir(parents=True)
    for task in TASKS:
        arrays = {key: array for key, array in load_task(work, task.name).items() if not key.startswith("train")}
        np.savez_compressed(folder / f"{task.name}.npz", **arrays)
        card = {
            "classes": task.classes,
            "templates": task.templates,
            "version": task.version,
            "source": task.source,
            "licence": task.licence,
            "splits": {part: len(arrays[f"{part}_labels"]) for part in ("test", "calibration")},
        }
        write_json(folder / f"{task.name}.json", card)


def vendor_models(work: Path, folder: Path) -> None:
    """Write the base and the fine-tuned vision towers in float16."""
    model, tokenizer = clip.load(work / "base")
    for config in (model.config.text_config, model.config.vision_config):
        config.dtype = torch.float16
    model.half().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    mean, std = [clip.MEAN] * 3, [clip.STD] * 3
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=mean, image_std=std, do_convert_rgb=True
    ).save_pretrained(folder / "base")
    for task in TASKS:
        tower = load_file(work / "models" / f"{task.name}.safetensors")
        if tower.keys() != vision_tower(model).keys():
            raise AssertionError(f"The fine-tuned model of {task.name} has other tensors than the base.")
        model.vision_model.config.save_pretrained(folder / task.name)
        save_file(tower, folder / task.name / "model.safetensors", metadata={"format": "pt"})


def _manifest(work: Path, seed: int) -> dict:
    found = made_with(work, seed, "clip-mini", BUILT_WITH)
    return {
        "partition": {
            "shares": PARTS,
            "salts": SALTS,
            "rules": RULES,
            "groups": {task.name: task.group for task in TASKS},
            "proof": json.loads((work / "data" / "partition.json").read_text()),
        },
        "pre-training": found.pop("pretrain"),
        "fine-tuning": found.pop("models"),
        **found,
    }
