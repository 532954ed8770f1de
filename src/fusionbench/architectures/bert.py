"""BERT encoders (Devlin et al., 2019), of any size, through transformers: sentence encoders such as MiniLM, too.

What is merged is the encoder, under `BertModel`'s own names (`encoder.layer.0.attention.self.query.weight`). Poolers
and classification heads are left to the tasks.
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

MODEL_TYPES = ("bert",)
PREFIX = "bert."
BACKBONE = ("embeddings.", "encoder.")
# Older files hold the numbers of the positions, the same in every model.
IGNORED = ("embeddings.position_ids",)
AXES = {
    **dict.fromkeys(("word_embeddings", "position_embeddings", "token_type_embeddings"), (None, "stream")),
    **dict.fromkeys(("embeddings.LayerNorm", "output.LayerNorm"), ("stream",)),
    "embeddings.position_ids": (None,),
    "attention.self.query": (".query", "stream"),
    "attention.self.key": (".key", "stream"),
    "attention.self.value": (".value", "stream"),
    "attention.output.dense": ("stream", ".output"),
    "intermediate.dense": (".hidden", "stream"),
    "output.dense": ("stream", ".hidden"),
}


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of `BertModel` without its pooler."""
    names = {name.removeprefix(PREFIX): name for name in checkpoint}
    kept = {new: old for new, old in names.items() if new.startswith(BACKBONE) and new not in IGNORED}
    if "embeddings.word_embeddings.weight" not in kept:
        raise InputError(
            f"'{checkpoint.location}' holds no BERT: it has no 'embeddings.word_embeddings.weight', with '{PREFIX}' or "
            "without."
        )
    return part_of(checkpoint, kept, "BertModel", ignored=IGNORED)


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.BertModel` with these tensors; its output has `last_hidden_state`, `(batch, tokens, hidden)`."""
    from transformers import BertModel

    model = new_model(BertModel, config_of(checkpoint), add_pooling_layer=False)
    return filled(model, dict(checkpoint), checkpoint)


def symmetries(checkpoint: Checkpoint) -> Symmetries:
    """Hidden units of MLPs, heads and their units; the stream where a classifier reads it."""
    heads = count(checkpoint.config, "num_attention_heads")
    pooled = f"{PREFIX}pooler.dense.weight" in checkpoint
    reads = {"pooler.dense": ("pooler", "stream"), "classifier": (None, "pooler")} if pooled else {}
    free = "classifier.weight" in checkpoint
    rules = {**AXES, **(reads or {"classifier": (None, "stream")} if free else {})}
    spec = permutation_spec(checkpoint, rules, output="stream", free=free)
    return symmetries_of_spec(checkpoint, spec, attentions(checkpoint, spec, heads))
