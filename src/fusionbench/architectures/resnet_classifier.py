"""Residual networks (He et al., 2016) that classify images, of any size, through transformers.

What is merged is all of the model, its classifier too: models that were trained apart on the same classes.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model
from fusionbench.architectures._symmetries import permutation_spec, residual_block, symmetries_of_spec
from fusionbench.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

MODEL_TYPES = ("resnet",)
CONV, NORM = "convolution", "normalization"


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """All of it."""
    return checkpoint


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.ResNetForImageClassification` with these tensors; its output has `logits`."""
    from transformers import ResNetForImageClassification

    return filled(new_model(ResNetForImageClassification, config_of(checkpoint)), dict(checkpoint), checkpoint)


def symmetries(checkpoint: Checkpoint) -> Symmetries:
    """Channels within blocks, and those of each stage's stream."""
    stream = "stem"
    prefix = "resnet." if f"resnet.embedder.embedder.{CONV}.weight" in checkpoint else ""
    first = f"{prefix}embedder.embedder"
    rules: dict[str, tuple[str | None, ...]] = {f"{first}.{CONV}": (stream, None), f"{first}.{NORM}": (stream,)}
    for stage in count():
        if f"{prefix}encoder.stages.{stage}.layers.0.layer.0.{CONV}.weight" not in checkpoint:
            break
        for number in count():
            block = f"{prefix}encoder.stages.{stage}.layers.{number}"
            if f"{block}.layer.0.{CONV}.weight" not in checkpoint:
                break
            layers = [(f"{block}.layer.{i}.{CONV}", f"{block}.layer.{i}.{NORM}") for i in range(3)]
            shortcut = (f"{block}.shortcut.{CONV}", f"{block}.shortcut.{NORM}")
            more, stream = residual_block(checkpoint, block, layers, shortcut, stream)
            rules |= more
    rules["classifier.1"] = (None, stream)
    spec = permutation_spec(
        checkpoint, rules, output=stream, whole_names=True, free="classifier.1.weight" in checkpoint
    )
    return symmetries_of_spec(checkpoint, spec)
