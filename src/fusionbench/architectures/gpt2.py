"""GPT-2 backbones (Radford et al., 2019), of any size, through transformers.

A pool may mix language models, classifiers and bare backbones: what is merged is the backbone, under `GPT2Model`'s own
names (`h.0.attn.c_attn.weight`). Output layers and classification heads are left to the tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
BACKBONE = ("wte.", "wpe.", "h.", "ln_f.")
# Older files hold the causal mask, the same in every model.
IGNORED = (".attn.bias", ".attn.masked_bias")


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of `GPT2Model` in a GPT-2 checkpoint."""
    names = {name.removeprefix(PREFIX): name for name in checkpoint}
    kept = {new: old for new, old in names.items() if new.startswith(BACKBONE) and not new.endswith(IGNORED)}
    if "wte.weight" not in kept:
        raise InputError(f"'{checkpoint.location}' holds no GPT-2: it has no 'wte.weight', with '{PREFIX}' or without.")
    return checkpoint.rename(kept)


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.GPT2Model` with these tensors; its output has `last_hidden_state`, `(batch, tokens, hidden)`."""
    from transformers import GPT2Model

    model = new_model(GPT2Model, config_of(checkpoint))
    return filled(model, dict(checkpoint), checkpoint)
