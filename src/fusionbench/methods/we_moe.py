from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from fusionbench import InputError, ModelPool, Range, TaskPool, method
from fusionbench.methods.adamerging import BatchSize, Patience, Split, Steps
from fusionbench.methods.task_arithmetic import task_arithmetic

if TYPE_CHECKING:
    from torch import nn

# CLIP's and GPT-2's, T5's, DistilBERT's; and BERT's layers as a whole, where an MLP is two modules, and one router is
# to serve both. A decoder is left out: it is given a token at a time, and a router needs them all.
BLOCKS = r"(?!decoder\.).*\b(mlp|DenseReluDense|ffn|encoder\.layer\.\d+)"


@method("mixing", paper="2402.00433", data="test inputs", gradients=True, base=True)
def we_moe(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    blocks: Annotated[
        str, "regular expression of the names of the blocks to mix; MLPs, and BERT's whole layers"
    ] = BLOCKS,
    scaling_factor: Annotated[float, Range(), "of all task vectors elsewhere, and in the blocks to begin with"] = 0.3,
    router_layers: Annotated[int, Range(1, 4), "of the network from a state to coefficients"] = 2,
    routing: Annotated[
        Literal["sample", "batch"], "coefficients for each input by itself, or for a batch together: its mean"
    ] = "sample",
    steps: Steps = 1000,
    learning_rate: Annotated[float, Range(0, open_low=True), "Adam's"] = 1e-4,
    patience: Patience = 0,
    batch_size: BatchSize = 16,
    split: Split = "test",
    seed: Annotated[int, Range(0, 2**64 - 1), "of the routers, and of the order of the inputs"] = 0,
) -> nn.Module:
    """Merge the weights of MLPs anew for every input, with coefficients from trained routers (Tang et al., 2024).

        W(x) = W₀ + Σᵢ rᵢ(x) (Wᵢ - W₀)   in the blocks
        θ    = θ₀ + λ Σᵢ τᵢ              elsewhere
        r    = argmin of the mean of H(f(x)) over inputs x of all tasks

    A router r sees the mean over the tokens of what enters its block, and gives a coefficient for each model's task
    vector; in BERT, whose MLPs are no modules of their own, whole layers are blocks. That is for what is read whole,
    and not for causal language models and decoders, which write token by token: each would depend on those after it.
    Routers learn by the entropy of predictions on test inputs. All other parameters, and those of blocks that no model
    changed, are task arithmetic's.
    """
    import torch

    from fusionbench.adapt import Adaptation, descend, step
    from fusionbench.mixed import fill, is_causal_lm, mix

    model = pool.build(task_arithmetic(pool, scaling_factor=scaling_factor)).requires_grad_(False)
    names = pool.names_in(model)
    found = {
        block: layers
        for block, layers in linear_layers_of(model, blocks).items()
        if any(pool.param(names[f"{block}.{inner}.weight"]).task_vectors.any() for inner in layers)
    }
    if not found:
        raise InputError(
            f"we_moe.blocks: no model changed anything in the blocks that '{blocks}' names. Name others, as "
            r"'.*(self_attn|attn|attention\.self|SelfAttention)' where adapters changed the attention."
        )
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if written := [block for block in found if is_causal_lm(model) or (two and block.startswith("decoder."))]:
        raise InputError(
            f"we_moe chooses weights by the mean of all tokens, and '{written[0]}' writes them one after the other: "
            "each would depend on those after it. Use smile_upscaling, which chooses for each token by itself."
        )
    plan = {"kind": "we_moe", "blocks": list(found), "experts": len(pool)}
    mixed = mix(model, {**plan, "router_layers": router_layers, "routing": routing}).requires_grad_(False).eval()
    for block, layers in found.items():
        for inner, layer in layers.items():
            fill(mixed, f"{block}.block.{inner}", layer, pool, names, f"{block}.{inner}")
    generator = torch.Generator().manual_seed(seed)
    learned: list[torch.Tensor] = []
    for block in found:
        router = mixed.get_submodule(f"{block}.router")
        for name, tensor in router.requires_grad_(True).named_parameters():
            last = name == f"{len(list(router.children())) - 1}.bias"
            with torch.no_grad():
                if tensor.dim() > 1:
                    tensor.copy_(torch.empty(tensor.shape).normal_(std=0.01, generator=generator))
                else:
                    tensor.fill_(scaling_factor if last else 0.0)
            learned.append(tensor)
    adaptation = Adaptation(pool, tasks, mixed, split=split, batch_size=batch_size, seed=seed)
    optimizer = torch.optim.Adam(learned, learning_rate)
    numbers = [scaling_factor, router_layers, routing, learning_rate, patience, batch_size, seed]
    facts = {"method": ["we_moe", list(found), split, steps, *numbers]}
    descend(adaptation, step(optimizer), [optimizer], steps=steps, patience=patience, facts=facts)
    adaptation.finish()
    return mixed.requires_grad_(True)


def linear_layers_of(model: nn.Module, blocks: str) -> dict[str, dict[str, nn.Module]]:
    """The linear layers, by their paths within, of the outermost blocks whose whole name the expression matches."""
    from fusionbench.calibrate import is_matrix

    try:
        pattern = re.compile(blocks)
    except re.error as error:
        raise InputError(f"we_moe.blocks: '{blocks}' is no regular expression: {error}.") from None
    found: dict[str, dict[str, nn.Module]] = {}
    for path, block in model.named_modules():
        if path and pattern.fullmatch(path) and not path.startswith(tuple(f"{outer}." for outer in found)):
            layers = {inner: layer for inner, layer in block.named_modules() if inner and is_matrix(layer)}
            if layers:
                found[path] = layers
    if not found:
        groups = [path for path, block in model.named_modules() if path and any(map(is_matrix, block.children()))]
        raise InputError(
            f"we_moe.blocks: '{blocks}' is the whole name of no block with linear layers in it. "
            f"There is: {', '.join(groups[:4]) or 'none'}{' ...' if len(groups) > 4 else ''}."
        )
    return found
