"""Residual networks (He et al., 2016) for dense prediction: the last stages dilated, under torchvision's names.

A `config.json` beside the tensors may say `{"model_type": "dilated_resnet", "layers": [3, 4, 6, 3], "width": 64}`, as
for a ResNet-50, the default. A pool may mix bare encoders and models with decoders (`encoder.*` beside `decoder.*`):
what is merged is the encoder; decoders are the tasks'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.formats import read_config

if TYPE_CHECKING:
    from torch import nn

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

    config = {**DEFAULTS, **read_config(checkpoint.folder)}
    model = DilatedResNet(layers=config["layers"], width=config["width"], stem_stride=config["stem_stride"])
    model.load_state_dict(dict(checkpoint))
    return model
