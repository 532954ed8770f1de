"""Copy what is published into the package, and write its manifest."""

import json
import platform
import shutil
from importlib.metadata import version
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
from fusionbench_zoo.recipes.fetch import SOURCES, sha256

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


def vendor(work: Path, target: Path, seed: int) -> None:
    """Replace `target` by the base, the fine-tuned towers, the tasks and a manifest."""
    fresh = target.with_name(target.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    vendor_tasks(work, fresh / "tasks")
    vendor_models(work, fresh)
    (fresh / "ATTRIBUTION.md").write_text(attribution(work))
    _write_json(fresh / "manifest.json", _manifest(work, fresh, seed))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


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
        _write_json(folder / f"{task.name}.json", card)


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


def _manifest(work: Path, folder: Path, seed: int) -> dict:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stages = sorted(work.glob("*.done"))
    return {
        "version": 1,
        "seed": seed,
        "files": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
        "partition": {
            "shares": PARTS,
            "salts": SALTS,
            "rules": RULES,
            "groups": {task.name: task.group for task in TASKS},
            "proof": json.loads((work / "data" / "partition.json").read_text()),
        },
        "pre-training": json.loads((work / "pretrain" / "facts.json").read_text()),
        "fine-tuning": json.loads((work / "models" / "facts.json").read_text()),
        "stages": {stage.stem: stage.read_text().strip() for stage in stages},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in BUILT_WITH},
        "sources": {f"{s['registry']} {s['name']} {s['version']}": s["sha256"] for s in SOURCES},
    }


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
