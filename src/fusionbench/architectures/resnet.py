"""Residual networks (He et al., 2016) for dense prediction: the last stages dilated, under torchvision's names.

A `config.json` beside the tensors may say `{"model_type": "dilated_resnet", "layers": [3, 4, 6, 3], "width": 64}`, as
for a ResNet-50, the default. A pool may mix bare encoders and models with decoders (`encoder.*` beside `decoder.*`):
what is merged is the encoder; decoders are the tasks'.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from fusionbench.architectures._building import filled
from fusionbench.architectures._symmetries import permutation_spec, residual_block, symmetries_of_spec
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError, is_count

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

MODEL_TYPES = ("dilated_resnet",)
PREFIX = "encoder."
ENCODER = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
DEFAULTS: dict[str, Any] = {"layers": [3, 4, 6, 3], "width": 64, "stem_stride": 2}


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The encoder's tensors."""
    names = {name.removeprefix(PREFIX): name for name in checkpoint if name.startswith((PREFIX, *ENCODER))}
    if "conv1.weight" not in names:
        raise InputError(
            f"'{checkpoint.location}' holds no ResNet: it has no 'conv1.weight', with '{PREFIX}' or without."
        )
    return checkpoint.rename(names)


def build(checkpoint: Checkpoint) -> nn.Module:
    """An encoder with these tensors; its output is `(batch, 32 * width, height / stride, width / stride)`."""
    from fusionbench.architectures._dilated_resnet import DilatedResNet

    config = {**DEFAULTS, **checkpoint.config}
    blocks, sizes = config["layers"], (config["width"], config["stem_stride"])
    if not isinstance(blocks, list) or len(blocks) != 4 or not all(is_count(n) for n in (*blocks, *sizes)):
        raise InputError(
            f"'{checkpoint.folder}/config.json': layers must be four numbers of blocks, width and stem_stride numbers "
            f"of 1 or more; got {blocks}, {sizes[0]} and {sizes[1]}."
        )
    model = DilatedResNet(layers=config["layers"], width=config["width"], stem_stride=config["stem_stride"])
    return filled(model, dict(checkpoint), checkpoint)


def symmetries(checkpoint: Checkpoint) -> Symmetries:
    """Channels within blocks, and those of each stage's stream but the last, which decoders read."""
    prefix = PREFIX if f"{PREFIX}conv1.weight" in checkpoint else ""
    stream = "stem"
    rules: dict[str, tuple[str | None, ...]] = {f"{prefix}conv1": (stream, None), f"{prefix}bn1": (stream,)}
    for stage in range(1, 5):
        for number in count():
            block = f"{prefix}layer{stage}.{number}"
            if f"{block}.conv1.weight" not in checkpoint:
                break
            layers = [(f"{block}.conv{i}", f"{block}.bn{i}") for i in (1, 2, 3)]
            shortcut = (f"{block}.downsample.0", f"{block}.downsample.1")
            more, stream = residual_block(checkpoint, block, layers, shortcut, stream)
            rules |= more
    rules["fc"] = (None, stream)
    spec = permutation_spec(checkpoint, rules, output=stream, whole_names=True, free="fc.weight" in checkpoint)
    return symmetries_of_spec(checkpoint, spec)
