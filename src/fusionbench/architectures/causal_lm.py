"""Dense language models that write token by token, through transformers: Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench.architectures._building import MIXED, config_of, filled, new_model
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import nn

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MODEL_TYPES = tuple(CLASSES)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def backbone(checkpoint: Checkpoint) -> Checkpoint:
    """All of it."""
    return checkpoint


def build(checkpoint: Checkpoint) -> nn.Module:
    """A model of the class that transformers has for such a config; its output has `logits`."""
    import transformers

    config = config_of(checkpoint)
    family = str(config.get("model_type")).removeprefix(MIXED)
    if family not in CLASSES:
        raise InputError(
            f"A model of the type '{family}' is not built here: save it, and open the folder with transformers."
        )
    model: nn.Module = new_model(getattr(transformers, CLASSES[family]), config)
    tensors = dict(checkpoint)
    if OUTPUT not in tensors and EMBEDDING in tensors and model.get_parameter(OUTPUT) is model.get_parameter(EMBEDDING):
        tensors[OUTPUT] = tensors[EMBEDDING]
    return filled(model, tensors, checkpoint)
