from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from fusionbench import Checkpoint, InputError, ModelPool, method
from fusionbench.fuse import require_models
from fusionbench.layers import find_stack, layer_of, with_layers


@method("mixing", paper="2312.15166", example="zoo:gpt2-mini/base layers=0:4+2:6")
def depth_upscaling(
    pool: ModelPool,
    *,
    layers: Annotated[str | int, "those to stack, counted from 0, ends left out: 0:24+8:32 is SOLAR's, of 32 layers"],
    stack: Annotated[str, "name of the stack, where a model has several: decoder.block"] = "",
) -> Checkpoint:
    """Stack layers of a model, some of them twice, to a deeper one of the same kind (Kim et al., 2023).

        f = head ∘ L₃₁ ∘ … ∘ L₈ ∘ L₂₃ ∘ … ∘ L₀ ∘ embedding

    That is layers=0:24+8:32, of a model of 32 layers L. The model is the pool's base or, without one, its only one.
    Layers are found by their names, and their number in the config is changed, as are lists in it of one entry a layer.
    What only layer 0 has, as T5's biases of positions, the new layer 0 has. Nothing is read before the result is saved
    or built.
    """
    if pool.base is None:
        require_models(pool, 1, "depth_upscaling takes, without a base,", "leave the others out")
    model = pool.reference
    prefix, count = find_stack(model, stack)
    order = chosen_layers(layers, count)
    outside = model.rename({name: name for name in model if (layer_of(name) or (None,))[0] != prefix})
    parts = {name: (model, name) for name in outside.specs} | stacked(model, prefix, order)
    config = with_layers(model.config, count, order, stack=prefix) if model.config else None
    return Checkpoint.assemble(parts, like=outside, inputs={"base": model}, config=config)


def stacked(model: Checkpoint, prefix: str, order: Sequence[int]) -> dict[str, tuple[Checkpoint, str]]:
    """The tensors of layers of a model in a new order, as `Checkpoint.assemble` takes them."""
    layers: dict[int, dict[str, str]] = {}  # of a layer, its names by what they end with
    for name in model:  # tied ones, too: what they are tied to may be no part of the new layer
        layer = layer_of(name)
        if layer is not None and layer[0] == prefix:
            layers.setdefault(layer[1], {})[layer[2]] = name
    first = of_first_alone(layers)
    parts: dict[str, tuple[Checkpoint, str]] = {}
    for new, old in enumerate(order):
        names = layers[old] | first
        if new:
            names = {rest: name for rest, name in names.items() if rest not in first}
        parts |= {f"{prefix}{new}.{rest}": (model, name) for rest, name in names.items()}
    return parts


def of_first_alone(layers: dict[int, dict[str, str]]) -> dict[str, str]:
    """What layer 0 has beside all that the others have: T5's biases of positions, which stand for all layers."""
    others = {rest for number, names in layers.items() if number for rest in names}
    alike = others and others <= layers[0].keys()  # else layers are of several kinds
    return {rest: name for rest, name in layers[0].items() if rest not in others} if alike else {}


def chosen_layers(layers: str | int, count: int) -> list[int]:
    """The numbers that `0:24+8:32` stands for."""
    order: list[int] = []
    for part in str(layers).split("+"):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part)
        first, end = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
        if not first < end <= count:
            raise InputError(f"layers: '{part}' is no part of {count} layers; write FIRST:END, as 0:{count}.")
        order += range(first, end)
    return order
