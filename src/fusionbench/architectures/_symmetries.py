"""From small tables of rules to `Symmetries`: which axes of a family's tensors share a permutation.

A rule names a module by the end of its name, and the axes of its outputs and inputs:
`{"mlp.up_proj": (".hidden", "stream")}`. An axis that begins with a dot is the block's own (of everything before the
end that the rule names); others are the whole model's. None stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusionbench.alignment import Group, Symmetries
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

Rules = Mapping[str, tuple[str | None, ...]]
Spec = dict[str, tuple[str | None, ...]]
PARAMETERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def permutation_spec(
    checkpoint: Checkpoint,
    rules: Rules,
    *,
    output: str,
    free: bool,
    whole_names: bool = False,
    transposed: Iterable[str] = (),
) -> Spec:
    """Of every tensor, the axis of each of its dimensions.

    Args:
        rules: by the end of a module's name; of several that fit, the longest counts.
        output: the axis of what the model gives, such as the residual stream.
        free: whether it may be permuted: a head that reads it is among the tensors. Tensors that no rule knows may
            read it as well, so that it stays as it is where there are any, with all that is in a block with them.
        whole_names: whether rules name modules in full, not by their ends.
        transposed: ends of modules that keep their weight as (inputs, outputs).
    """
    found: Spec = {}
    unknown = []
    for name, spec in checkpoint.specs.items():
        module, _, parameter = name.rpartition(".")
        module = module if parameter in PARAMETERS else name
        fits = [end for end in rules if module == end or not whole_names and module.endswith(f".{end}")]
        if not fits:
            unknown.append(name)
            continue
        end = max(fits, key=len)
        block = module.removesuffix(end)
        axes = [block + axis[1:] if axis is not None and axis.startswith(".") else axis for axis in rules[end]]
        if len(spec.shape) == 1 or parameter in PARAMETERS[1:]:
            axes = axes[:1]
        elif f".{module}".endswith(tuple(f".{t}" for t in transposed)):
            axes = axes[::-1]
        found[name] = (*axes, *[None] * len(spec.shape))[: len(spec.shape)]
    every = {axis for axes in found.values() for axis in axes if axis is not None}
    fixed = set() if free and not unknown else {output}
    for block in {axis.rpartition(".")[0] + "." for axis in every if "." in axis}:
        if any(name.startswith(block) for name in unknown):
            fixed |= {axis for axis in every if "." not in axis or axis.startswith(block)}
    return {name: tuple(None if axis in fixed else axis for axis in axes) for name, axes in found.items()}


def sizes(checkpoint: Checkpoint, spec: Spec) -> dict[str, int]:
    """The size of every axis."""
    return {a: checkpoint.specs[n].shape[i] for n, axes in spec.items() for i, a in enumerate(axes) if a is not None}


def symmetries_of_spec(checkpoint: Checkpoint, spec: Spec, groups: Iterable[Group] = ()) -> Symmetries:
    """The symmetries of a permutation spec; an axis in none of the groups may be permuted in every way."""
    groups = tuple(groups)
    grouped = {axis for group in groups for axis in group.places}
    plain = [Group({a: np.arange(n)[:, None]}) for a, n in sizes(checkpoint, spec).items() if a not in grouped]
    return Symmetries(spec, (*plain, *groups))


def attentions(checkpoint: Checkpoint, spec: Spec, heads: int, **kinds: Any) -> list[Group]:
    """The heads of every attention block, each block's for itself. More arguments are those of `attention`."""
    return [attention(checkpoint, spec, [block], heads, **kinds) for block in blocks_of(spec, "output")]


def attention(
    checkpoint: Checkpoint,
    spec: Spec,
    blocks: Iterable[str],
    heads: int,
    *,
    key_value: int | None = None,
    rotary: bool = False,
    biases: Iterable[str] = (),
) -> Group:
    """The group of the heads of attention blocks; heads of several blocks change places together.

    Axes of a block are `query`, `key`, `value` (or all in one, `qkv`) and `output`. Heads are permuted as a whole;
    within them the units of values with what reads them and, unless positions are encoded by rotating them, the units
    of queries and keys together. Heads that share a key stay together, and may change places among themselves.

    Args:
        blocks: at least one.
        heads: in a block.
        key_value: heads of keys and values, where there are fewer.
        rotary: whether positions are encoded by rotary embeddings.
        biases: axes with one element per head.
    """
    size = sizes(checkpoint, spec)
    key_value = key_value or heads
    places: dict[str, list[NDArray[np.int64]]] = {}

    def add(axis: str, start: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add `(key_value, ...)` indices to the items; their positions within an item, `(...)`."""
        before = sum(part.shape[1] for part in places.setdefault(axis, []))
        places[axis].append(start + indices.reshape(key_value, -1))
        return before + np.arange(places[axis][-1].shape[1]).reshape(indices.shape[1:])

    within = []
    for block in blocks:
        units = size[f"{block}output"] // heads
        queries = np.arange(heads * units).reshape(key_value, heads // key_value, units)
        keys = np.arange(key_value * units).reshape(key_value, 1, units)
        if f"{block}qkv" in size:
            parts = [(f"{block}qkv", i * heads * units) for i in range(3)]
        else:
            parts = [(f"{block}{which}", 0) for which in ("query", "key", "value")]
        q, k, v = (add(*part, of) for part, of in zip(parts, (queries, keys, keys), strict=True))
        o = add(f"{block}output", 0, queries)
        (to_q, _), (to_k, _), (to_v, _) = parts
        if heads > key_value:
            within.append(_group((to_q, q), (f"{block}output", o)))
        within.append(_group((to_v, v.T), (f"{block}output", o.T)))
        if not rotary:
            within.append(_group((to_q, q.T), (to_k, k.T)))
    for axis in biases:
        add(axis, 0, np.arange(heads)[:, None])
    return Group({axis: np.concatenate(parts, 1) for axis, parts in places.items()}, tuple(within))


def residual_block(
    checkpoint: Checkpoint, block: str, layers: Iterable[tuple[str, str]], shortcut: tuple[str, str], stream: str
) -> tuple[dict[str, tuple[str | None, ...]], str]:
    """Rules for the convolutions of a residual block, each with its norm, and the axis of the stream behind it.

    That is the one before it (`stream`), unless a convolution in the shortcut makes a new one.
    """
    layers = [(conv, norm) for conv, norm in layers if f"{conv}.weight" in checkpoint]
    into = stream
    rules: dict[str, tuple[str | None, ...]] = {}
    if f"{shortcut[0]}.weight" in checkpoint:
        stream = f"stream from {block.replace('.', ' ')}"
        rules = {shortcut[0]: (stream, into), shortcut[1]: (stream,)}
    for i, (conv, norm) in enumerate(layers, 1):
        out = stream if i == len(layers) else f"{block}.channels{i}"
        rules |= {conv: (out, into), norm: (out,)}
        into = out
    return rules, stream


def blocks_of(spec: Spec, axis: str) -> list[str]:
    """The blocks that have an axis of that name, in order."""
    found = [a for axes in spec.values() for a in axes if a is not None and f".{a}".endswith(f".{axis}")]
    return list(dict.fromkeys(a.removesuffix(axis) for a in found))


def count(config: Mapping[str, object], key: str) -> int:
    """A number that a config must have."""
    value = config.get(key)
    if not isinstance(value, int):
        raise InputError(f"align: the config.json does not say '{key}', by which the symmetries are known.")
    return value


def _group(*parts: tuple[str, NDArray[np.int64]]) -> Group:
    axes = dict.fromkeys(axis for axis, _ in parts)
    return Group({axis: np.concatenate([p for a, p in parts if a == axis], 1) for axis in axes})
