"""Layers of models, found by the names of their tensors; and configs of models with more of them, or fewer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

DECODER = "num_decoder_layers"  # of a decoder beside an encoder, which has the other number
# What configs call the number of layers: of one of two stacks, by a part of its name, and of any.
SIDES = {"decoder": (DECODER, "decoder_layers"), "encoder": ("encoder_layers", "num_hidden_layers")}
ANY = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
COUNTS = (*ANY, DECODER, "encoder_layers", "decoder_layers")
NUMBERS = ("mlp_only_layers", "moe_layers")  # lists of a config: of layers without experts, and of those with some
OTHER_LISTS = re.compile(rf"^(architectures|{'|'.join(NUMBERS)})$|_token_id$")  # never of one entry a layer
# Of configs without layer_types: which have one kind of attention with a window; and what of others tells that some
# layers differ.
ALIKE = ("mistral", "mixtral", "phi3", "starcoder2", "qwen3_moe")
EVERY = ("global_attn_every_n_layers", "full_attention_interval", "attention_chunk_size")
NUMBERED = re.compile(r"(.*?\b)(\d+)\.")


def stacks(names: Iterable[str]) -> dict[str, int]:
    """What the names of each stack's layers begin with, and how many there are: `{"model.layers.": 32}`."""
    found: dict[str, set[int]] = {}
    for name in names:
        numbered = NUMBERED.match(name)
        if numbered:
            found.setdefault(numbered[1], set()).add(int(numbered[2]))
    return {prefix: len(numbers) for prefix, numbers in found.items() if numbers == set(range(len(numbers)))}


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Of a name, what stands before its first number, this, and what stands behind it; None where there is none."""
    numbered = NUMBERED.match(name)
    return (numbered[1], int(numbered[2]), name[numbered.end() :]) if numbered else None


def layer_name(name: str) -> str:
    """What a tensor's layer is called: `encoder.layers.3` of `encoder.layers.3.mlp.weight`; `head` of `head.weight`."""
    numbered = NUMBERED.match(name)
    return f"{numbered[1]}{numbered[2]}" if numbered else name.rpartition(".")[0] or name


def find_stack(model: Checkpoint, stack: str) -> tuple[str, int]:
    """What the names of a stack's layers begin with, and how many there are."""
    own = {layer[0] for layer in map(layer_of, model.specs) if layer is not None}
    # Tied names count, where a layer stands twice; a stack of which every name is tied is another one's.
    found = {prefix: count for prefix, count in stacks(model).items() if prefix in own}
    chosen = [prefix for prefix in found if not stack or prefix.rstrip(".").endswith(stack.rstrip("."))]
    if len(chosen) != 1:
        known = ", ".join(prefix.rstrip(".") for prefix in found) or "none"
        asked = f"stack={stack!r} fits {len(chosen)}" if stack else "Choose one by stack=,"
        raise InputError(f"{asked} of the model's stacks of layers ({known}).")
    return chosen[0], found[chosen[0]]


def with_layers(
    config: Mapping[str, Any],
    count: int,
    order: Sequence[int],
    configs: Sequence[Mapping[str, Any]] | None = None,
    *,
    stack: str = "",
) -> dict[str, Any]:
    """A config with another number of layers, in it or in the parts it has for towers.

    Args:
        config: of a model with `count` layers.
        count: how many.
        order: the numbers of the layers of the new model; lists of one entry a layer follow it.
        configs: of the models that the layers are from; all from this one by default.
        stack: what the layers' names begin with: of towers of as many layers it tells which, as `vision_model.` does.
    """
    if "mixing" in config:
        raise InputError("The config's 'mixing' says which layers are mixed: stack the layers first, and mix then.")
    if "num_layers" in config and config.get("is_encoder_decoder") and config.get(DECODER) is None:
        config = {**config, DECODER: config["num_layers"]}  # T5 takes the one for the other, which stays as it is
    keys = _count_keys(config, count, stack)
    if not keys:
        towers = [n for n, part in config.items() if isinstance(part, dict) and count in map(part.get, COUNTS)]
        if towers:
            name = next((name for name in towers if name.removesuffix("_config") in stack), towers[0])
            parts = None if configs is None else [other.get(name, {}) for other in configs]
            return {**config, name: with_layers(config[name], count, order, parts, stack=stack)}
        raise InputError(f"The config has no number of layers that is {count}: it cannot describe the deeper model.")
    config, *sources = map(_with_attention, [config, *([config] * len(order) if configs is None else configs)])
    whole, moved = config, [*order] != [*range(len(order))]
    if (moved or config.get("layer_types")) and any(map(_has_kinds, [config, *sources])):
        told = {key: _with_kinds(each) for key, each in {id(each): each for each in [config, *sources]}.items()}
        whole, *sources = (told[id(each)] for each in [config, *sources])
    lists = {}
    for name, entries in whole.items():
        if isinstance(entries, list) and len(entries) == count and not OTHER_LISTS.search(name):
            given = [source.get(name) for source in sources]
            if not all(isinstance(each, list) and i < len(each) for i, each in zip(order, given, strict=True)):
                raise InputError(f"The config's '{name}' has an entry for each layer, which other models lack.")
            lists[name] = [each[i] for i, each in zip(order, given, strict=True)]  # type: ignore[index]
    for name in NUMBERS:
        numbers = [
            new for new, (old, its) in enumerate(zip(order, sources, strict=True)) if old in (its.get(name) or ())
        ]
        if numbers or config.get(name):
            lists[name] = numbers
    own = {name: entries for name, entries in lists.items() if config.get(name)}
    new = {**config, **own, **dict.fromkeys(keys, len(order))}
    if config.get("attention_types"):
        new["attention_types"] = [[own["attention_layers"], 1]]
    if own.keys() != lists.keys():  # those that transformers would make of the new numbers stay its own
        known = _with_kinds(new)
        new |= {name: entries for name, entries in lists.items() if known.get(name) != entries}
    for layer, (old, its) in enumerate(zip(order, sources, strict=True)):
        if _is_dense(new, layer) != _is_dense(its, old):
            kinds = ("dense", "sparse") if _is_dense(new, layer) else ("sparse", "dense")
            raise InputError(
                f"By the config's numbers of dense layers, layer {layer} would be {kinds[0]}, but layer {old}, which "
                f"comes there, is {kinds[1]}: stack layers so that all are of their kind."
            )
    return new


def _has_kinds(config: Mapping[str, Any]) -> bool:
    """Whether layers may be of several kinds of attention, and the config leaves it to transformers to tell which."""
    slides = config.get("sliding_window") and config.get("use_sliding_window", True)
    told = config.get("layer_types") or config.get("model_type") in ALIKE
    return not told and bool(slides or any(map(config.get, EVERY)))


def _with_kinds(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with what transformers says of its layers where it says nothing."""
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise InputError(
            "The config has no 'layer_types', but layers of several kinds of attention: transformers knows which "
            "layer is of which, pip install 'fusionbench[hf]'."
        ) from None
    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    full = AutoConfig.for_model(**config).to_dict()
    return {**config, **{name: of for name, of in full.items() if "layer" in name and not config.get(name)}}


def _with_attention(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """GPT-Neo's config, with an entry for each layer beside its lists of kinds and how many times these come."""
    types = config.get("attention_types")
    return {**config, "attention_layers": [k for kinds, times in types for k in [*kinds] * times]} if types else config


def _is_dense(config: Mapping[str, Any], layer: int) -> bool:
    """Whether the config of a sparse model says by a layer's number that it has no experts."""
    if config.get("moe_layers") is not None:
        return layer not in config["moe_layers"]
    return (
        layer in (config.get("mlp_only_layers") or ())
        or any((layer + 1) % (config.get(step) or 1) for step in ("decoder_sparse_step", "interleave_moe_layer_step"))
        or layer < (config.get("first_k_dense_replace") or 0)
    )


def _count_keys(config: Mapping[str, Any], count: int, stack: str) -> list[str]:
    """The config's entries for the number of a stack's layers, which is `count`: two of an encoder like BART's."""
    for side, keys in SIDES.items():
        if side in stack.split(".") and any(key in config for key in keys):
            return [key for key in keys if config.get(key) == count]
    return [key for key in ANY if config.get(key) == count][:1]
