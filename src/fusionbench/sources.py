"""Where a checkpoint's tensors come from: files, memory, other sources; and their bytes, as tensors and as hashes."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

from fusionbench.dtypes import from_torch, to_torch
from fusionbench.formats import DTYPES, SafetensorsFile
from fusionbench.passes import Block, Bytes

if TYPE_CHECKING:
    from torch import Tensor

    from fusionbench.checkpoint import Checkpoint

BLOCK = 2**18  # elements that are hashed at once: a promise, of which manifests are made
PART = 2 * BLOCK  # elements read or computed at once: few enough for the cache, and worth what a call costs in Python
Pieces = Generator[tuple[int, Block], None, None]
"""The number of each block's first element in its tensor, and the block."""


class Source(Protocol):
    """Where a checkpoint's tensors come from. What comes from files needs no torch to be read as bytes."""

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        """The elements `start` to `stop` of a tensor, flattened in C order: bytes, in `out` if they must be copied."""
        ...

    def pieces(self, name: str, start: int, stop: int, out: Bytes) -> Pieces:
        """The same in pieces of whole blocks, with their first elements; `out` may be used again for each."""
        yield start, self.block(name, start, stop, out)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The same as a tensor."""
        ...

    def unit(self, name: str, memory: int) -> int:
        """How many elements of this tensor are best had together, within so many bytes; all where it must be."""
        ...

    def known(self, name: str) -> dict[int, bytes] | None:
        """Hashes of a tensor's blocks, by their first elements, to be added to; None where none are kept."""
        ...

    def working_set(self, name: str) -> int:
        """Bytes in flight per element while a part of a tensor is read."""
        ...


class Files(Source):
    """Tensors in one safetensors file, or in several shards."""

    def __init__(self, shards: list[SafetensorsFile]) -> None:
        self._shard_of = {name: shard for shard in shards for name in shard.specs}
        self._known: dict[str, dict[int, bytes]] = {}

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        shard = self._shard_of[name]
        spec = shard.specs[name]
        size = DTYPES[spec.dtype]
        data = np.empty((stop - start) * size, np.uint8) if out is None else out[: (stop - start) * size]
        shard.read_into(name, start, data)
        known = self.known(name)
        if start not in known and start % BLOCK == 0 and (stop % BLOCK == 0 or stop == spec.numel):
            known.update(hashes(start, data, BLOCK * size))
        return data, spec.dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return as_tensor(self.block(name, start, stop))

    def unit(self, name: str, memory: int) -> int:
        return BLOCK

    def known(self, name: str) -> dict[int, bytes]:
        return self._known.setdefault(name, {})

    def working_set(self, name: str) -> int:
        return 8


class InMemory(Source):
    """Tensors held in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        return as_block(self.read(name, start, stop))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop]

    def unit(self, name: str, memory: int) -> int:
        return BLOCK if self._tensors[name].is_contiguous() else self._tensors[name].numel()

    def known(self, name: str) -> None:
        return None

    def working_set(self, name: str) -> int:
        return 8


class Renamed(Source):
    """Another source's tensors under new names: `{new name: old name}`."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        return self._source.block(self._names[name], start, stop, out)

    def pieces(self, name: str, start: int, stop: int, out: Bytes) -> Pieces:
        return self._source.pieces(self._names[name], start, stop, out)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read(self._names[name], start, stop)

    def unit(self, name: str, memory: int) -> int:
        return self._source.unit(self._names[name], memory)

    def known(self, name: str) -> dict[int, bytes] | None:
        return self._source.known(self._names[name])

    def working_set(self, name: str) -> int:
        return self._source.working_set(self._names[name])


class Assembled(Source):
    """Tensors of several checkpoints: `{name: (checkpoint, its name there)}`."""

    def __init__(self, parts: Mapping[str, tuple[Checkpoint, str]]) -> None:
        self._parts = dict(parts)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        part, old = self._parts[name]
        return part.source.block(old, start, stop, out)

    def pieces(self, name: str, start: int, stop: int, out: Bytes) -> Pieces:
        part, old = self._parts[name]
        return part.source.pieces(old, start, stop, out)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        part, old = self._parts[name]
        return part.source.read(old, start, stop)

    def unit(self, name: str, memory: int) -> int:
        part, old = self._parts[name]
        return part.source.unit(old, memory)

    def known(self, name: str) -> dict[int, bytes] | None:
        part, old = self._parts[name]
        return part.source.known(old)

    def working_set(self, name: str) -> int:
        part, old = self._parts[name]
        return part.source.working_set(old)


class Replaced(Source):
    """Another source's tensors, but for some that are held in memory."""

    def __init__(self, source: Source, tensors: Mapping[str, Tensor]) -> None:
        self._source, self._held = source, InMemory(tensors)
        self._names = frozenset(tensors)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        return self._of(name).block(name, start, stop, out)

    def pieces(self, name: str, start: int, stop: int, out: Bytes) -> Pieces:
        return self._of(name).pieces(name, start, stop, out)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._of(name).read(name, start, stop)

    def unit(self, name: str, memory: int) -> int:
        return self._of(name).unit(name, memory)

    def known(self, name: str) -> dict[int, bytes] | None:
        return self._of(name).known(name)

    def working_set(self, name: str) -> int:
        return self._of(name).working_set(name)

    def _of(self, name: str) -> Source:
        return self._held if name in self._names else self._source


def as_block(tensor: Tensor) -> Block:
    """The bytes of a tensor, as a file holds them."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), from_torch(tensor.dtype)


def as_tensor(block: Block) -> Tensor:
    """The flat tensor that shares these bytes."""
    import torch

    data, dtype = block
    return torch.frombuffer(data.data, dtype=to_torch(dtype)) if len(data) else torch.empty(0, dtype=to_torch(dtype))


def hashes(start: int, data: Bytes, size: int) -> dict[int, bytes]:
    """Hashes of the blocks of `size` bytes of a tensor's elements from `start`, by their first elements."""
    return {
        start + i * BLOCK: xxhash.xxh3_128_digest(data[at : at + size].data)
        for i, at in enumerate(range(0, len(data), size))
    }


def hash_of(blocks: Mapping[int, bytes]) -> str:
    """The hash of a tensor with blocks of these hashes."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks[start] for start in sorted(blocks)))
