"""CLIP's vision tower (Radford et al., 2021), of any size, through transformers.

A pool may mix full CLIP models and vision towers: what is merged is the tower, under CLIP's own names
(`vision_model.*`), whichever version of transformers wrote the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

MODEL_TYPES = ("clip", "clip_vision_model")
PREFIX = "vision_model."
TOWER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # as transformers 5 saves a tower alone
# Older files hold this buffer of consecutive integers; newer ones do not.
IGNORED = ("embeddings.position_ids",)


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The vision tower of a CLIP checkpoint."""
    names = {name: name for name in checkpoint if name.startswith(PREFIX)}
    if not names:
        names = {PREFIX + name: name for name in checkpoint if name.startswith(TOWER)}
    if not any(name.startswith(f"{PREFIX}encoder.") for name in names):
        raise InputError(f"'{checkpoint.location}' holds no CLIP vision tower: none of its tensors is in '{PREFIX}'.")
    return checkpoint.rename({new: old for new, old in names.items() if not new.endswith(IGNORED)})


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.CLIPVisionModel` with these tensors; its output has `pooler_output`, `(batch, hidden size)`."""
    from transformers import CLIPVisionModel

    config = config_of(checkpoint)
    model = new_model(CLIPVisionModel, config.get("vision_config", config))
    own = next(iter(model.state_dict()))
    prefix = "" if own.startswith(PREFIX) else PREFIX
    return filled(model, {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()}, checkpoint)
