"""GPT-2 backbones (Radford et al., 2019), of any size, through transformers.

A pool may mix language models, classifiers and bare backbones: what is merged is the backbone, under `GPT2Model`'s own
names (`h.0.attn.c_attn.weight`). Output layers and classification heads are left to the tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model, part_of
from fusionbench.architectures._symmetries import attentions, count, permutation_spec, symmetries_of_spec
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
BACKBONE = ("wte.", "wpe.", "h.", "ln_f.")
# Older files hold the causal mask, the same in every model.
IGNORED = (".attn.bias", ".attn.masked_bias")
AXES = {
    **dict.fromkeys(("wte", "wpe", "lm_head", "score"), (None, "stream")),
    **dict.fromkeys(("ln_1", "ln_2", "ln_f"), ("stream",)),
    **dict.fromkeys(("attn", "attn.masked_bias"), (None,)),
    "attn.c_attn": (".qkv", "stream"),
    "attn.c_proj": ("stream", ".output"),
    "mlp.c_fc": (".hidden", "stream"),
    "mlp.c_proj": ("stream", ".hidden"),
}
TRANSPOSED = ("c_attn", "c_proj", "c_fc")


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of `GPT2Model` in a GPT-2 checkpoint."""
    names = {name.removeprefix(PREFIX): name for name in checkpoint}
    kept = {new: old for new, old in names.items() if new.startswith(BACKBONE) and not new.endswith(IGNORED)}
    if "wte.weight" not in kept:
        raise InputError(f"'{checkpoint.location}' holds no GPT-2: it has no 'wte.weight', with '{PREFIX}' or without.")
    return part_of(checkpoint, kept, "GPT2Model", ignored=IGNORED)


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.GPT2Model` with these tensors; its output has `last_hidden_state`, `(batch, tokens, hidden)`."""
    from transformers import GPT2Model

    model = new_model(GPT2Model, config_of(checkpoint))
    return filled(model, dict(checkpoint), checkpoint)


def symmetries(checkpoint: Checkpoint) -> Symmetries:
    """Hidden units of MLPs, heads and their units; the stream where a head is there, too, not the backbone alone."""
    heads = count(checkpoint.config, "n_head")
    free = f"{PREFIX}wte.weight" in checkpoint  # of a model with a head, which may be the embedding itself
    spec = permutation_spec(checkpoint, AXES, output="stream", free=free, transposed=TRANSPOSED)
    return symmetries_of_spec(checkpoint, spec, attentions(checkpoint, spec, heads))
