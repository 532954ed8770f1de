from __future__ import annotations

import re
from typing import Annotated, Any

from fusionbench import Checkpoint, InputError, ModelPool, method

# What configs call the number of layers.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")


@method("mixing", paper="2312.15166")
def depth_upscaling(
    pool: ModelPool,
    *,
    layers: Annotated[str, "those to stack, counted from 0, ends left out: 0:24+8:32 is SOLAR's, of 32 layers"],
    stack: Annotated[str, "name of the stack, where a model has several: decoder.block"] = "",
) -> Checkpoint:
    """Stack layers of a model, some of them twice, to a deeper one of the same kind (Kim et al., 2023).

    The model is the pool's base or, without one, its first. Layers are found by their names, and their number in the
    config is changed, as are lists in it of one entry a layer. Nothing is read before the result is saved or built.
    """
    model = pool.reference
    prefix, count = find_stack(model, stack)
    order = chosen_layers(layers, count)
    outside = {name: (model, name) for name in model.specs if not name.startswith(prefix)}
    inside = [name.removeprefix(prefix).partition(".") for name in model.specs if name.startswith(prefix)]
    stacked = {
        f"{prefix}{new}.{rest}": (model, f"{prefix}{old}.{rest}")
        for new, old in enumerate(order)
        for number, _, rest in inside
        if int(number) == old
    }
    config = with_layers(model.config, count, order) if model.config else None
    return Checkpoint.assemble({**outside, **stacked}, like=model, inputs={"base": model}, config=config)


def find_stack(model: Checkpoint, stack: str) -> tuple[str, int]:
    """What the names of a stack's layers begin with, and how many there are."""
    found: dict[str, set[int]] = {}
    for name in model.specs:
        numbered = re.match(r"(.*?\b)(\d+)\.", name)
        if numbered:
            found.setdefault(numbered[1], set()).add(int(numbered[2]))
    stacks = {prefix: len(numbers) for prefix, numbers in found.items() if numbers == set(range(len(numbers)))}
    chosen = [prefix for prefix in stacks if not stack or prefix.rstrip(".").endswith(stack.rstrip("."))]
    if len(chosen) != 1:
        known = ", ".join(prefix.rstrip(".") for prefix in stacks) or "none"
        raise InputError(
            f"depth_upscaling needs one stack of layers, and stack={stack!r} fits {len(chosen)} of: {known}."
        )
    return chosen[0], stacks[chosen[0]]


def chosen_layers(layers: str, count: int) -> list[int]:
    """The numbers that `0:24+8:32` stands for."""
    order: list[int] = []
    for part in str(layers).split("+"):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part)
        first, end = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
        if not first < end <= count:
            raise InputError(f"layers: '{part}' is no part of {count} layers; write FIRST:END, as 0:{count}.")
        order += range(first, end)
    return order


def with_layers(config: dict[str, Any], count: int, order: list[int]) -> dict[str, Any]:
    """A config with another number of layers, in it or in the parts it has for towers."""
    key = next((key for key in COUNTS if config.get(key) == count), None)
    if key is None:
        for name, part in config.items():
            if isinstance(part, dict) and any(part.get(key) == count for key in COUNTS):
                return {**config, name: with_layers(part, count, order)}
        raise InputError(f"The config has no number of layers that is {count}: it cannot describe the deeper model.")
    lists = {k: [v[i] for i in order] for k, v in config.items() if isinstance(v, list) and len(v) == count}
    return {**config, **lists, key: len(order)}
