"""Dense language models as the experts of a sparse one of transformers' classes. Nothing is read before it is saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import to_torch
from fusionbench.errors import InputError
from fusionbench.pool import ModelPool

MLP = re.compile(r"(model\.layers\.(\d+)\.)mlp\.((\w+_proj)\.weight)")


@dataclass(frozen=True)
class Sparse:
    """A class of mixtures of experts, and how it calls what a dense model has."""

    model_type: str
    architecture: str
    block: str = "mlp"
    names: Mapping[str, str] = field(default_factory=dict)  # of a dense MLP's matrices, where they are others
    config: Callable[[dict[str, Any], int, int], dict[str, Any]] = lambda config, experts, per_token: {}
    shared: bool = False  # whether there is an expert that every token gets, too: it is given nothing to say


def _mixtral(config: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    return {"num_local_experts": experts, "num_experts_per_tok": per_token}


def _qwen(config: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_MIXTRAL = Sparse(
    "mixtral",
    "MixtralForCausalLM",
    block="block_sparse_moe",
    names={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    config=_mixtral,
)
SPARSE = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": Sparse(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        config=lambda *given: {**_qwen(*given), "shared_expert_intermediate_size": 1},
        shared=True,
    ),
    "qwen3": Sparse("qwen3_moe", "Qwen3MoeForCausalLM", config=_qwen),
}


def mixture(
    others: Checkpoint,
    experts: Sequence[Checkpoint],
    routers: Callable[[int, Tensor], Tensor],
    *,
    per_token: int,
    inputs: Mapping[str, Checkpoint],
) -> Checkpoint:
    """The sparse model whose experts are the MLPs of dense ones.

    Args:
        others: a dense model, or a merged one: what is no MLP is taken from it.
        experts: dense models.
        routers: of a layer's number and a matrix to fill, `(experts, hidden size)`, the layer's router.
        per_token: how many experts a token gets.
        inputs: what it is made from.

    Raises:
        InputError: where transformers has no sparse class for such models.
    """
    sparse, config = sparse_class(others), dense_config(others)
    if not 1 <= per_token <= len(experts):
        raise InputError(f"experts_per_token is {per_token}, but there are {len(experts)} experts.")
    parts: dict[str, tuple[Checkpoint, str]] = {}
    layers: dict[str, int] = {}
    for name in others.specs:
        match = MLP.fullmatch(name)
        if match is None:
            parts[name] = (others, name)
            continue
        prefix, number, _, matrix = match.groups()
        layers[f"{prefix}{sparse.block}."] = int(number)
        for i, expert in enumerate(experts):
            new = f"{prefix}{sparse.block}.experts.{i}.{sparse.names.get(matrix, matrix)}.weight"
            parts[new] = (expert, name)
    hidden, dtype = config["hidden_size"], to_torch(next(iter(others.specs.values())).dtype)
    made: dict[str, Tensor] = {}
    for prefix, number in layers.items():
        made[f"{prefix}gate.weight"] = routers(number, torch.empty(len(experts), hidden)).to(dtype)
        if sparse.shared:
            made[f"{prefix}shared_expert_gate.weight"] = torch.zeros(1, hidden, dtype=dtype)
            for matrix, shape in (("gate_proj", (1, hidden)), ("up_proj", (1, hidden)), ("down_proj", (hidden, 1))):
                made[f"{prefix}shared_expert.{matrix}.weight"] = torch.zeros(shape, dtype=dtype)
    new = Checkpoint.of(made)
    parts.update({name: (new, name) for name in made})
    changed = {"model_type": sparse.model_type, "architectures": [sparse.architecture]}
    changed.update(sparse.config(config, len(experts), per_token))
    return Checkpoint.assemble(parts, like=others, inputs=inputs, config={**config, **changed})


def sparse_class(model: Checkpoint) -> Sparse:
    """The sparse class for a dense model."""
    model_type = model.config.get("model_type")
    known = SPARSE.get(str(model_type))
    if known is None:
        raise InputError(
            f"'{model.location or 'The model'}' has the model type '{model_type}', for which there is no sparse class. "
            f"There is one for: {', '.join(SPARSE)}."
        )
    biased = next((name for name in model.specs if re.search(r"\.mlp\.\w+\.bias$", name)), None)
    if biased is None and known is _MIXTRAL:
        biased = next((name for name in model.specs if name.endswith("_proj.bias")), None)
    if biased is not None:
        raise InputError(f"'{biased}' has no place in a {known.architecture}: its layers have no such bias.")
    return known


def dense_config(model: Checkpoint) -> dict[str, Any]:
    """A model's config with all its defaults, which the sparse class may have others of."""
    from transformers import AutoConfig

    config = model.config
    return AutoConfig.for_model(**config).to_dict()


def random_routers(seed: int, std: float) -> Callable[[int, Tensor], Tensor]:
    """Routers of normally distributed numbers, keyed by the seed and the layer."""

    def routers(layer: int, empty: Tensor) -> Tensor:
        return empty.normal_(std=std, generator=torch.Generator().manual_seed(seed * 2**20 + layer))

    return routers


@torch.no_grad()
def routers_of_prompts(
    pool: ModelPool, model: Checkpoint, prompts: Sequence[Sequence[str]]
) -> Callable[[int, Tensor], Tensor]:
    """Routers that prefer an expert where a token's state is like those of the expert's prompts.

    Args:
        pool: builds the model.
        model: runs on the prompts; its folder has the tokenizer.
        prompts: of each expert.
    """
    from fusionbench.tasks._tokens import Tokens

    if model.folder is None:
        raise InputError("Routers from prompts need a tokenizer, and the base model is not from a folder that has one.")
    tokens, module = Tokens(model.folder, 512), pool.build(model)
    mlps = {int(m[1]): mlp for n, mlp in module.named_modules() if (m := re.search(r"layers\.(\d+)\.mlp$", n))}
    means: dict[int, list[Tensor]] = {number: [] for number in mlps}
    for texts in prompts:
        seen: dict[int, list[Tensor]] = {number: [] for number in mlps}
        handles = [
            mlp.register_forward_pre_hook(lambda _, args, found=seen[number]: found.append(args[0][0]))
            for number, mlp in mlps.items()
        ]
        for text in texts:  # one at a time: nothing is filled up
            module(**tokens.encode([text]))
        for handle in handles:
            handle.remove()
        for number, states in seen.items():
            means[number].append(torch.cat(states).mean(0))

    def routers(layer: int, empty: Tensor) -> Tensor:
        rows = torch.stack(means[layer])
        return torch.nn.functional.normalize(rows - rows.mean(0), dim=1)

    return routers
