"""T5 and Flan-T5 (Raffel et al., 2020; Chung et al., 2022), of any size, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

MODEL_TYPES = ("t5",)
# Copies of the shared embedding that older files hold.
IGNORED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of `T5ForConditionalGeneration`: all but copies of the embedding."""
    if "shared.weight" not in checkpoint:
        raise InputError(f"'{checkpoint.location}' holds no T5: it has no 'shared.weight'.")
    return checkpoint.rename({name: name for name in checkpoint if name not in IGNORED})


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.T5ForConditionalGeneration` with these tensors; its output has `logits`."""
    from torch import nn
    from transformers import T5ForConditionalGeneration

    model = new_model(T5ForConditionalGeneration, config_of(checkpoint))
    tensors = dict(checkpoint)
    if "lm_head.weight" in checkpoint.specs:
        # Flan-T5's own output layer, which transformers 5 makes the embedding whatever the config says.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    shared = model.get_parameter("shared.weight")
    tied = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is shared]
    return filled(model, {**dict.fromkeys(tied, tensors["shared.weight"]), **tensors}, checkpoint)
