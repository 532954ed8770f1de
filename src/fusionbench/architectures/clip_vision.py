"""CLIP's vision tower (Radford et al., 2021), of any size, through transformers.

A pool may mix full CLIP models and vision towers: what is merged is the tower, under CLIP's own names
(`vision_model.*`), whichever version of transformers wrote the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import config_of, filled, new_model, part_of
from fusionbench.architectures._symmetries import attentions, count, permutation_spec, symmetries_of_spec
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.recipes.tokenizer import PATTERNS, files_of

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

MODEL_TYPES = ("clip", "clip_vision_model")
CLASS = "CLIPVisionModel"
PREFIX = "vision_model."
TOWER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # as transformers 5 saves a tower alone
# Older files hold this buffer of consecutive integers; newer ones do not.
IGNORED = ("embeddings.position_ids",)
AXES = {
    **dict.fromkeys(("position_embedding", "token_embedding"), (None, "stream")),
    **dict.fromkeys(("pre_layrnorm", "post_layernorm", "final_layer_norm", "layer_norm1", "layer_norm2"), ("stream",)),
    **dict.fromkeys(("visual_projection", "text_projection"), (None, "stream")),
    "embeddings.position_ids": (None,),
    "class_embedding": ("stream",),
    "patch_embedding": ("stream", None),
    "self_attn.q_proj": (".query", "stream"),
    "self_attn.k_proj": (".key", "stream"),
    "self_attn.v_proj": (".value", "stream"),
    "self_attn.out_proj": ("stream", ".output"),
    "mlp.fc1": (".hidden", "stream"),
    "mlp.fc2": ("stream", ".hidden"),
}


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """The vision tower of a CLIP checkpoint; of a whole model without the tokenizer's files."""
    names = {name: name for name in checkpoint if name.startswith(PREFIX)}
    if not names:
        names = {PREFIX + name: name for name in checkpoint if name.startswith(TOWER)}
    if not any(name.startswith(f"{PREFIX}encoder.") for name in names):
        raise InputError(f"'{checkpoint.location}' holds no CLIP vision tower: none of its tensors is in '{PREFIX}'.")
    kept = {new: old for new, old in names.items() if not new.endswith(IGNORED)}
    vision = checkpoint.config.get("vision_config")
    if vision is None:
        return part_of(checkpoint, kept, CLASS, ignored=IGNORED)
    dtype = {key: checkpoint.config[key] for key in ("dtype", "torch_dtype") if key in checkpoint.config}
    config = {**vision, **dtype, "model_type": "clip_vision_model"}
    part = part_of(checkpoint, kept, CLASS, config=config, ignored=IGNORED)
    return part.with_files(dict.fromkeys(files_of(part, PATTERNS)))  # a tower reads no text


def build(checkpoint: Checkpoint) -> nn.Module:
    """A `transformers.CLIPVisionModel` with these tensors; its output has `pooler_output`, `(batch, hidden size)`."""
    from transformers import CLIPVisionModel

    config = config_of(checkpoint)
    model = new_model(CLIPVisionModel, config.get("vision_config", config))
    own = next(iter(model.state_dict()))
    prefix = "" if own.startswith(PREFIX) else PREFIX
    return filled(model, {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()}, checkpoint)


def symmetries(checkpoint: Checkpoint) -> Symmetries:
    """Hidden units of the tower's MLPs, heads and their units; the stream where its projection is there.

    Of a whole CLIP model the text tower stays as it is.
    """
    config = checkpoint.config.get("vision_config", checkpoint.config)
    heads = count(config, "num_attention_heads")
    text = ("text_model.", "text_projection.", "logit_scale")
    tower = checkpoint.rename({name: name for name in checkpoint if not name.startswith(text)})
    free = "visual_projection.weight" in checkpoint
    spec = permutation_spec(tower, AXES, output="stream", free=free)
    return symmetries_of_spec(checkpoint, spec, attentions(checkpoint, spec, heads))
