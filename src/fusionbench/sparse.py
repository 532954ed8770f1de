"""Dense language models as the experts of a sparse one of transformers' classes. Nothing is read before it is saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import to_torch
from fusionbench.errors import InputError
from fusionbench.fuse import Models
from fusionbench.param import Param, keyed_generator
from fusionbench.pool import ModelPool
from fusionbench.sources import BLOCK

SLIDING = "sliding_attention"
MLP = re.compile(r"(model\.layers\.(\d+)\.)mlp\.((\w+_proj)\.weight)")
Routers = Callable[[int, Tensor], Tensor]
"""Of a layer's number and a matrix to fill, `(experts, hidden size)`, the layer's router."""


@dataclass(frozen=True)
class Layout:
    """A class of mixtures of experts, and how it calls what a dense model has.

    Attributes:
        name: for users.
        model_type, architecture: transformers' names.
        dense: model types that it can be made of.
        config: of the dense config, the number of experts, how many a token gets, and whether there is one that all
            tokens get: the entries that are new.
        shared: how the expert that every token gets is weighted: by a gate of its own, not at all, or there is none.
        block: what it calls the MLP.
        names: of a dense MLP's matrices, where they are others.
        biased: which biases have a place in it.
        biased_router: whether a router has a bias, for choosing alone; it is given zeros.
        windows: which layers may attend to a window only: all or none, as in Mistral, none at all, or some.
        least: number of experts.
    """

    name: str
    model_type: str
    architecture: str
    dense: tuple[str, ...]
    config: Callable[[dict[str, Any], int, int, bool], dict[str, Any]]
    shared: Literal["gated", "plain", "none"] = "none"
    block: str = "mlp"
    names: Mapping[str, str] = field(default_factory=dict)
    biased: str = "$^"
    biased_router: bool = False
    windows: Literal["all", "none", "some"] = "all"
    least: int = 1


def _mixtral(config: dict[str, Any], experts: int, per_token: int, shared: bool) -> dict[str, Any]:
    return {"num_local_experts": experts, "num_experts_per_tok": per_token}


def _experts(config: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3(config: dict[str, Any], experts: int, per_token: int, shared: bool) -> dict[str, Any]:
    new = _experts(config, experts, per_token)
    if SLIDING not in config["layer_types"]:
        new.update(use_sliding_window=False, sliding_window=None)  # which this class has for all layers, or none
    return new


def _qwen(config: dict[str, Any], experts: int, per_token: int, shared: bool) -> dict[str, Any]:
    new = _experts(config, experts, per_token)
    new["shared_expert_intermediate_size"] = config["intermediate_size"] if shared else 1
    if config["model_type"] != "qwen2":
        new["qkv_bias"] = False
        if config.get("sliding_window"):  # Mistral has it in every layer
            new.update(use_sliding_window=True, layer_types=[SLIDING] * config["num_hidden_layers"])
    return new


def _deepseek(config: dict[str, Any], experts: int, per_token: int, shared: bool) -> dict[str, Any]:
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "n_shared_experts": int(shared),
        "moe_intermediate_size": config["intermediate_size"],
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {"partial_rotary_factor": 1.0, **(config.get("rope_parameters") or {})},
    }


# DeepSeek's own classes have attention of low rank with a norm in it, which no Llama can become; GLM-4's has DeepSeek's
# experts, by the same names, beside Llama's attention. Of several that fit, the first is meant.
LAYOUTS = (
    Layout(
        "mixtral",
        "mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        _mixtral,
        block="block_sparse_moe",
        names={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    Layout(
        "deepseek",
        "glm4_moe",
        "Glm4MoeForCausalLM",
        ("llama", "mistral"),
        _deepseek,
        shared="plain",
        biased_router=True,
        windows="none",
        least=2,
    ),
    Layout(
        "qwen",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ("qwen2", "llama", "mistral"),
        _qwen,
        shared="gated",
        biased=r"[qkv]_proj\.bias$",
        windows="some",
    ),
    Layout("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), _qwen3, biased=r"self_attn\.\w+_proj\.bias$"),
)


def mixture(
    others: Checkpoint,
    experts: Sequence[Checkpoint],
    routers: Routers,
    *,
    per_token: int,
    inputs: Mapping[str, Checkpoint],
    shared: Checkpoint | None = None,
    layout: Layout | None = None,
) -> Checkpoint:
    """The sparse model whose experts are the MLPs of dense ones.

    Args:
        others: a dense model, or a merged one: what is no MLP is taken from it.
        experts: dense models.
        routers: of a layer; with a gated expert for all tokens they have a row more, its gate.
        per_token: how many experts a token gets.
        inputs: what it is made from.
        shared: a dense model whose MLPs every token gets, where the layout has such an expert.
        layout: of the result; the first that fits by default.

    Raises:
        InputError: where transformers has no sparse class for such models.
    """
    layout = layout or fitting_layout(str(others.config.get("model_type")), shared=shared is not None)
    config = dense_config(others)
    check_dense(others, layout, config)
    least = max(layout.least, per_token)
    if not 1 <= per_token or len(experts) < least:
        raise InputError(f"experts_per_token is {per_token}, but there are {len(experts)} experts.")
    parts: dict[str, tuple[Checkpoint, str]] = {}
    layers: dict[str, int] = {}
    for name in others.specs:
        match = MLP.fullmatch(name)
        if match is None:
            parts[name] = (others, name)
            continue
        prefix, number, end, matrix = match.groups()
        block = f"{prefix}{layout.block}."
        layers[block] = int(number)
        for i, expert in enumerate(experts):
            parts[f"{block}experts.{i}.{layout.names.get(matrix, matrix)}.weight"] = (expert, name)
        if shared is not None:
            parts[f"{block}{_SHARED[layout.shared]}.{end}"] = (shared, name)
    hidden, dtype = config["hidden_size"], to_torch(next(iter(others.specs.values())).dtype)
    gated = shared is not None and layout.shared == "gated"
    made: dict[str, Tensor] = {}
    for block, number in layers.items():
        rows = routers(number, torch.empty(len(experts) + gated, hidden)).to(dtype)
        made[f"{block}gate.weight"] = rows[: len(experts)].clone()
        if layout.biased_router:
            made[f"{block}gate.e_score_correction_bias"] = torch.zeros(len(experts))
        if layout.shared == "gated":
            made[f"{block}shared_expert_gate.weight"] = rows[-1:].clone() if gated else rows.new_zeros(1, hidden)
        if shared is None and layout.shared != "none":
            made.update(_silent(f"{block}{_SHARED[layout.shared]}", hidden, int(layout.shared == "gated"), dtype))
    new = Checkpoint.of(made)
    parts.update({name: (new, name) for name in made})
    changed = {"model_type": layout.model_type, "architectures": [layout.architecture]}
    changed.update(layout.config(config, len(experts), per_token, shared is not None))
    return Checkpoint.assemble(parts, like=others, inputs=inputs, config={**config, **changed})


_SHARED = {"gated": "shared_expert", "plain": "shared_experts"}


def _silent(prefix: str, hidden: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """An expert of so many units that has nothing to say."""
    shapes = {"gate_proj": (size, hidden), "up_proj": (size, hidden), "down_proj": (hidden, size)}
    return {f"{prefix}.{matrix}.weight": torch.zeros(shape, dtype=dtype) for matrix, shape in shapes.items()}


def fitting_layout(model_type: str, *, shared: bool = False, gated: bool = False, name: str = "") -> Layout:
    """The layout for dense models of a type.

    Args:
        model_type: of the models' config.
        shared: whether there is an expert that every token gets.
        gated: whether that expert has a gate, made from its prompts.
        name: of the layout, or how it begins; any by default.

    Raises:
        InputError: where there is none.
    """
    of_type = [layout for layout in LAYOUTS if model_type in layout.dense]
    if not of_type:
        known = dict.fromkeys(dense for layout in LAYOUTS for dense in layout.dense)
        raise InputError(
            f"For models of the type '{model_type}' there is no sparse class. There is one for: {', '.join(known)}."
        )
    named = [layout for layout in of_type if layout.name.startswith(name)]
    if not named:
        raise InputError(
            f"'{name}' cannot be made of models of the type '{model_type}'. "
            f"There is: {', '.join(layout.name for layout in of_type)}."
        )
    wanted = ("gated",) if gated else ("plain", "gated") if shared else ("none", "plain", "gated")
    for layout in named:
        if layout.shared in wanted:
            return layout
    what = "an expert that every token gets, with a gate" if gated else "an expert that every token gets"
    others = ", ".join(layout.name for layout in of_type if layout.shared in wanted)
    raise InputError(f"'{named[0].name}' has no place for {what}. {f'There is: {others}.' if others else ''}".rstrip())


def check_dense(model: Checkpoint, layout: Layout, config: Mapping[str, Any]) -> None:
    """An error where a dense model has what has no place in the layout, or no MLPs."""
    if not any(map(MLP.fullmatch, model.specs)):
        found = next(iter(model.specs), "nothing")
        raise InputError(
            f"'{model.location or 'The model'}' has no MLPs under model.layers.N.mlp, but '{found}': give a whole "
            "language model, as AutoModelForCausalLM saves it."
        )
    for name in model.specs:
        if name.endswith("_proj.bias") and not re.search(layout.biased, name):
            raise InputError(f"'{name}' has no place in a {layout.architecture}: its layers have no such bias.")
    window = config.get("sliding_window")
    short = window and window < config.get("max_position_embeddings", window + 1)
    if short and layout.windows == "none":
        raise InputError(
            f"'{model.location or 'The model'}' attends to {window} tokens (sliding_window), which has no place in a "
            f"{layout.architecture}: use another architecture."
        )
    if short and layout.windows == "all" and len(set(config.get("layer_types") or ())) > 1:
        raise InputError(
            f"'{model.location or 'The model'}' attends to {window} tokens (sliding_window) in some layers only, which "
            f"has no place in a {layout.architecture}: leave it as it is."
        )


def dense_config(model: Checkpoint) -> dict[str, Any]:
    """A model's config with all its defaults, which the sparse class may have others of."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**model.config).to_dict()
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config


def converted(model: Checkpoint, dtype: str) -> Checkpoint:
    """A model with its floating-point tensors in another dtype (a name as in safetensors), rounded when it is read."""
    if all(spec.dtype == dtype or not spec.floating for spec in model.specs.values()):
        return model
    made = ModelPool({"model": model}, dtype=dtype).fuse(Models([1.0]))
    if model.config:
        name = str(to_torch(dtype)).removeprefix("torch.")
        made.new_config = {**{key: v for key, v in model.config.items() if key != "torch_dtype"}, "dtype": name}
    return made


def as_expert(
    model: Checkpoint, dtype: str, *, residual_scale: float = 1.0, noise_scale: float = 0.0, key: str = ""
) -> Checkpoint:
    """The MLPs of a model in a dtype, with noise added, and what they add to the residual stream scaled; lazily.

    Args:
        model: a dense one.
        dtype: a name as in safetensors.
        residual_scale: what the last matrix is multiplied by, noise and all.
        noise_scale: standard deviation of normally distributed noise on all matrices.
        key: what the noise depends on, beside the tensor's name.
    """
    mlps = model.rename({name: name for name in model.specs if MLP.fullmatch(name)})
    if noise_scale:

        def noisy(p: Param) -> Tensor:
            scale = residual_scale if p.name.endswith("down_proj.weight") else 1.0
            return (p.models[0] + noise_scale * _noise(f"{key}/{p.name}", p.start, p.stop)) * scale

        return ModelPool({"model": mlps}, dtype=dtype).map(noisy, elementwise=True)
    if residual_scale == 1:
        return converted(mlps, dtype)
    last = {name: name for name in mlps.specs if name.endswith("down_proj.weight")}
    scaled = ModelPool({"model": mlps.rename(last)}, dtype=dtype).fuse(Models([residual_scale]))
    rest = converted(mlps, dtype)
    parts = {name: (scaled if name in last else rest, name) for name in mlps.specs}
    return Checkpoint.assemble(parts, like=mlps, inputs={"model": model})


def _noise(key: str, start: int, stop: int) -> Tensor:
    """Elements of an endless row of normally distributed numbers, in whichever blocks it is asked for."""
    first, last = start // BLOCK, -(-stop // BLOCK)
    blocks = [torch.randn(BLOCK, generator=keyed_generator(f"{key}/{i}")) for i in range(first, last)]
    return torch.cat(blocks)[start - first * BLOCK : stop - first * BLOCK]
