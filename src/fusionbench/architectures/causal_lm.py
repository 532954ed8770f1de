"""Dense language models that write token by token, through transformers: Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import MIXED, check_fits, config_of, filled, new_model
from fusionbench.architectures._symmetries import attentions, count, permutation_spec, symmetries_of_spec
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MODEL_TYPES = tuple(CLASSES)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
AXES = {
    **dict.fromkeys(("embed_tokens", "lm_head", "score"), (None, "stream")),
    **dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), ("stream",)),
    **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm", "rotary_emb.inv_freq"), (None,)),
    "self_attn.q_proj": (".query", "stream"),
    "self_attn.k_proj": (".key", "stream"),
    "self_attn.v_proj": (".value", "stream"),
    "self_attn.o_proj": ("stream", ".output"),
    "mlp.gate_proj": (".hidden", "stream"),
    "mlp.up_proj": (".hidden", "stream"),
    "mlp.down_proj": ("stream", ".hidden"),
}


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """All of it."""
    return checkpoint


def build(checkpoint: Checkpoint) -> nn.Module:
    """A model of the class that transformers has for such a config; its output has `logits`."""
    model = _new(checkpoint)
    tensors = dict(checkpoint)
    if OUTPUT not in tensors and EMBEDDING in tensors and model.get_parameter(OUTPUT) is model.get_parameter(EMBEDDING):
        tensors[OUTPUT] = tensors[EMBEDDING]
    return filled(model, tensors, checkpoint)


def empty(checkpoint: Checkpoint) -> nn.Module:
    """The stack of layers alone, with neither tensors nor the norm after it: they are put in while it runs."""
    import torch
    from torch import nn

    with torch.device("meta"):
        stack = _new(checkpoint).get_submodule("model").eval()
    stack.norm = nn.Identity()
    stack.rotary_emb = type(stack.get_submodule("rotary_emb"))(stack.config)  # numbers that no checkpoint holds
    layers = {n: tuple(t.shape) for n, t in stack.state_dict(prefix="model.").items() if ".layers." in n}
    check_fits(layers, {n: s.shape for n, s in checkpoint.specs.items() if ".layers." in n}, checkpoint)
    return stack


def _new(checkpoint: Checkpoint) -> nn.Module:
    import transformers

    config = config_of(checkpoint)
    family = str(config.get("model_type")).removeprefix(MIXED)
    if family not in CLASSES:
        raise InputError(
            f"A model of the type '{family}' is not built here: save it, and open the folder with transformers."
        )
    return new_model(getattr(transformers, CLASSES[family]), config)


def symmetries(checkpoint: Checkpoint) -> Symmetries:
    """The stream, between embedding and output layer; hidden units of MLPs; heads, and units of their values."""
    heads = count(checkpoint.config, "num_attention_heads")
    tied = EMBEDDING in checkpoint and bool(checkpoint.config.get("tie_word_embeddings"))
    free = tied or OUTPUT in checkpoint or "score.weight" in checkpoint
    spec = permutation_spec(checkpoint, AXES, output="stream", free=free)
    key_value = checkpoint.config.get("num_key_value_heads")
    groups = attentions(checkpoint, spec, heads, key_value=key_value, rotary=True)
    return symmetries_of_spec(checkpoint, spec, groups)
