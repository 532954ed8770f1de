"""Copy what is published of resnet-mini into the package."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fusionbench_zoo.recipes.scenes.data import PARTS, load_scenes
from fusionbench_zoo.recipes.scenes.rooms import CLASSES
from fusionbench_zoo.recipes.scenes.train import DECODER, ENCODER, TASKS
from fusionbench_zoo.recipes.vendoring import made_with, publish, write_json


def vendor(work: Path, seed: int) -> None:
    """Write the encoder, the fine-tuned models with their decoders, and the scenes to test and calibrate with."""

    def fill(folder: Path) -> None:
        config = {"model_type": "dilated_resnet", **ENCODER}
        _write(folder / "base", load_file(work / "base" / "model.safetensors"), config)
        for task in TASKS:
            _write(
                folder / task, load_file(work / "models" / f"{task}.safetensors"), {**config, "rates": DECODER["rates"]}
            )
        parts = {part: load_scenes(work, part) for part in PARTS if part != "train"}
        arrays = {f"{part}_{kind}": array for part, kinds in parts.items() for kind, array in kinds.items()}
        np.savez_compressed(folder / "scenes.npz", **arrays)

    partition = {"scenes": PARTS, "classes": CLASSES, "rule": "A part has seeds and textures of its own."}
    packages = ["torch", "numpy", "pillow"]
    publish(work.name, fill, {"partition": partition, **made_with(work, seed, "clip-mini", packages)})


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir(parents=True)
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
