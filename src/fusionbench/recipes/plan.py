"""What a recipe will do, before it does it: tensors, bytes, memory, seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from fusionbench.checkpoint import Checkpoint
from fusionbench.formats import Spec
from fusionbench.parallel import cores
from fusionbench.passes import Block, Bytes
from fusionbench.passes.reference import encode
from fusionbench.recipes.build import Built, Group
from fusionbench.sources import BLOCK, Source, as_tensor
from fusionbench.writer import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

DISK = 1e9  # bytes a second, read or written: assumed, since to measure it would be to write
SIDE = 512  # of a matrix of one block


def plan(built: Built, memory: str | int = "96MB", workers: int | None = None) -> list[str]:
    """What will be read, computed and written, in lines. No weights are read for it."""
    lines = []
    result, at_once = built.checkpoint, workers or cores()
    for recipe in built.recipes:
        groups = [group for group in built.groups if group.recipe is recipe]
        tensors = sum(len(group.checkpoint.specs) for group in groups)
        alike = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        named = f" '{recipe.name}'" if recipe.name else ""
        of = ", ".join(recipe.references)
        lines.append(f"{recipe.method}{named}: {tensors:,} tensors in {alike} of the same values, of {of}")
    read, again = 0, 0
    for group in built.groups:
        for name, spec in group.checkpoint.specs.items():
            read += sum(model.specs[name].nbytes for model in group.inputs)
            again += group.checkpoint.source.unit(name, parse_bytes(memory) // at_once) < spec.numel > BLOCK
    written = sum(spec.nbytes for spec in result.specs.values())
    lines.append(f"reads:   {read:,} bytes{f', of {again} large tensors more than once' if again else ''}")
    lines.append(f"writes:  {written:,} bytes in {len(result.specs):,} tensors")
    lines.append(
        f"memory:  {parse_bytes(memory) / 1e6:,.0f} MB for blocks in flight, in {at_once} threads or processes"
    )
    elements: dict[str, int] = {}
    largest: dict[str, Group] = {}
    for group in built.groups:
        count = sum(spec.numel for spec in group.checkpoint.specs.values())
        elements[group.recipe.method] = elements.get(group.recipe.method, 0) + count
        largest[group.recipe.method] = max(largest.get(group.recipe.method, group), group, key=lambda g: len(g.inputs))
    rates = {method: rate(group) for method, group in largest.items()}
    computing = sum(elements[method] / rates[method] for method in elements) / at_once
    moving = (read + written) / DISK
    measured = ", ".join(f"{rates[method] / 1e6:,.0f} million ({method})" for method in rates)
    lines.append(
        f"seconds: about {computing + moving:,.1f}: {computing:,.1f} of computing, at {measured} elements a second, as "
        f"measured now on one thread and random numbers; {moving:,.1f} of reading and writing, at {DISK / 1e9:g} GB/s"
    )
    return lines


def rate(group: Group) -> float:
    """Elements a second that the group's method makes, on one thread, of random numbers in a matrix of one block."""
    dtypes = [next(iter(model.specs.values())).dtype for model in group.inputs]
    models = [Checkpoint({"weight": Spec(dtype, (SIDE, SIDE))}, Noise(i, dtype)) for i, dtype in enumerate(dtypes)]
    fastest = float("inf")
    for _ in range(3):
        made = group.merge(models)  # another one, which has looked at nothing yet
        start = time.perf_counter()
        made.block("weight", 0, SIDE * SIDE)
        fastest = min(fastest, time.perf_counter() - start)
    return SIDE * SIDE / fastest


class Noise(Source):
    """A source of one matrix of random numbers, which stands for a model's."""

    def __init__(self, seed: int, dtype: str) -> None:
        values = np.random.default_rng(seed).standard_normal(SIDE * SIDE)
        self._block = encode(values, dtype), dtype

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        data, dtype = self._block
        size = len(data) // (SIDE * SIDE)
        return data[start * size : stop * size], dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return as_tensor(self.block(name, start, stop))

    def unit(self, name: str, memory: int) -> int:
        return BLOCK

    def known(self, name: str) -> None:
        return None

    def working_set(self, name: str) -> int:
        return 8
