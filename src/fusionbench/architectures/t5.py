"""T5 and Flan-T5 (Raffel et al., 2020; Chung et al., 2022), of any size, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._hugging_face import config_of
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
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**config_of(checkpoint))).float()
    missing, unexpected = model.load_state_dict(dict(checkpoint), strict=False)
    missing = [name for name in missing if name not in IGNORED and not _tied(model, name)]
    if missing or unexpected:
        raise InputError(f"'{checkpoint.location}' does not fit its config.json: {[*missing, *unexpected][0]}.")
    return model


def _tied(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the shared embedding under another name."""
    return model.get_parameter(name) is model.get_parameter("shared.weight")
