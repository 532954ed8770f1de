"""T5 and Flan-T5 (Raffel et al., 2020; Chung et al., 2022), of any size, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model
from fusionbench.architectures._symmetries import attention, blocks_of, count, permutation_spec, symmetries_of_spec
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

MODEL_TYPES = ("t5",)
# Copies of the shared embedding that older files hold.
IGNORED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
AXES = {
    **dict.fromkeys(("shared", "embed_tokens", "lm_head"), (None, "stream")),
    **dict.fromkeys(("layer_norm", "final_layer_norm"), ("stream",)),
    **{
        f"{kind}.{which}": (f".{axis}", "stream")
        for kind in ("SelfAttention", "EncDecAttention")
        for which, axis in (("q", "query"), ("k", "key"), ("v", "value"))
    },
    **dict.fromkeys(("SelfAttention.o", "EncDecAttention.o"), ("stream", ".output")),
    "SelfAttention.relative_attention_bias": (None, ".heads"),
    **dict.fromkeys(("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1"), (".hidden", "stream")),
    "DenseReluDense.wo": ("stream", ".hidden"),
}


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


def symmetries(checkpoint: Checkpoint) -> Symmetries | None:
    """The stream, one for encoder and decoder; hidden units of MLPs; heads and their units.

    The heads of all layers that share biases of positions are permuted alike.
    """
    heads = count(checkpoint.config, "num_heads")
    spec = permutation_spec(checkpoint, AXES, output="stream", free=any(n.startswith("decoder.") for n in checkpoint))
    if spec.keys() != checkpoint.specs.keys():
        return None  # what no rule knows may depend on heads of one layer, and so on those of all
    groups, left = [], blocks_of(spec, "output")  # as encoder.block.0.layer.0.
    for first in blocks_of(spec, "heads"):  # the layer that has the biases of its stack
        stack, _, _, _, place, _ = first.split(".")
        alike = [block for block in left if block.split(".")[::4][:2] == [stack, place]]
        groups.append(attention(checkpoint, spec, alike, heads, biases=[f"{first}heads"]))
        left = [block for block in left if block not in alike]
    groups += [attention(checkpoint, spec, [block], heads) for block in left]
    return symmetries_of_spec(checkpoint, spec, groups)
