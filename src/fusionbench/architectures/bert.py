"""BERT encoders (Devlin et al., 2019), of any size, through transformers: sentence encoders such as MiniLM, too.

What is merged is the encoder, under `BertModel`'s own names (`encoder.layer.0.attention.self.query.weight`). Poolers
and classification heads are left to the tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

MODEL_TYPES = ("bert",)
PREFIX = "bert."
BACKBONE = ("embeddings.", "encoder.")
# Older files hold the numbers of the positions, the same in every model.
IGNORED = ("embeddings.position_ids",)


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of `BertModel` without its pooler."""
    names = {name.removeprefix(PREFIX): name for name in checkpoint}
    kept = {new: old for new, old in names.items() if new.startswith(BACKBONE) and new not in IGNORED}
    if "embeddings.word_embeddings.weight" not in kept:
        raise InputError(
            f"'{checkpoint.location}' holds no BERT: it has no 'embeddings.word_embeddings.weight', with '{PREFIX}' or "
            "without."
        )
    return checkpoint.rename(kept)


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.BertModel` with these tensors; its output has `last_hidden_state`, `(batch, tokens, hidden)`."""
    from transformers import BertModel

    model = new_model(BertModel, config_of(checkpoint), add_pooling_layer=False)
    return filled(model, dict(checkpoint), checkpoint)
