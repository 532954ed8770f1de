"""One parameter as it stands in every model of a pool."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fusionbench import passes
from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import as_float64, compute_dtype
from fusionbench.formats import DTYPES
from fusionbench.parallel import in_order, once
from fusionbench.passes import Block
from fusionbench.sources import BLOCK, PART

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from fusionbench.pool import ModelPool

T = TypeVar("T")
_own = threading.local()


def key_of(*words: object) -> int:
    """A number of 64 bits that depends on these words alone: the key of a stream of random numbers."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "little")


def keyed_generator(key: str) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    import torch

    return torch.Generator().manual_seed(key_of(key) % 2**56)


class Param:
    """One named parameter, or a block of it, as it stands in every model of a pool.

    Tensors are in float32 (float64 where the checkpoint is); dimension 0 of `models` and `task_vectors` runs over the
    models, in the pool's order. Under `elementwise=True` what is seen is a block of the flattened parameter.

    Attributes:
        name: of the parameter.
        pool: the models.
        start, stop: which of its elements, flattened in C order.
        shape: of the parameter, or `(stop - start,)` of a block.
    """

    def __init__(
        self, pool: ModelPool, name: str, start: int, stop: int, shape: tuple[int, ...], kept: list[Block] | None = None
    ) -> None:
        self.pool, self.name, self.start, self.stop, self.shape = pool, name, start, stop, shape
        self._kept = kept  # of the base and all models, whole

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return self.stop - self.start

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self.pool)

    @property
    def passes(self) -> Any:
        """The passes of `fusionbench.passes`, or those on the pool's device."""
        if str(self.pool.device) == "cpu":
            return passes
        from fusionbench.passes.device import on_device

        return on_device(str(self.pool.device))

    @once
    def base(self) -> Tensor:
        """The base model's, of shape `shape`."""
        values = self._read([self.pool.require_base()], ["the base model"])
        return values[0]

    @once
    def models(self) -> Tensor:
        """The models', stacked: `(number of models, *shape)`."""
        return self._read(list(self.pool.values()), [f"model '{name}'" for name in self.pool])

    @once
    def task_vectors(self) -> Tensor:
        """What fine-tuning changed: `models - base`, `(number of models, *shape)`."""
        return self.models - self.base

    def generator(self, seed: int) -> torch.Generator:
        """A random generator keyed by (seed, name), so that the order of work changes nothing. Not for blocks."""
        return keyed_generator(f"{seed}/{self.name}")

    def keys(self, seed: int) -> NDArray[np.uint64]:
        """For each model, the key of a stream of random bits: of (seed, parameter, model's name)."""
        return np.array([key_of(seed, self.name, model) for model in self.pool], np.uint64)

    def blocks(self, *, base: bool) -> list[Block]:
        """Bytes, as they are stored, without torch: the base's first, where it is wanted, then the models'.

        Those of a block are this thread's own only until it asks for others.
        """
        if self._kept is not None:
            kept = self._kept if base else self._kept[len(self._kept) - len(self.pool) :]
            return [(data[self.start * DTYPES[dtype] : self.stop * DTYPES[dtype]], dtype) for data, dtype in kept]
        models = [self.pool.require_base(), *self.pool.values()] if base else list(self.pool.values())
        with self._read_by(models) as found:
            return found

    @contextmanager
    def kept(self) -> Iterator[Param]:
        """The same, held in memory as it is stored meanwhile: for what looks at it several times."""
        with self._read_by(list(self.pool.inputs.values())) as found:
            yield Param(self.pool, self.name, self.start, self.stop, self.shape, found)

    def parts(self, start: int, stop: int, multiple: int = 1, size: int = PART) -> Iterator[Param]:
        """Blocks of some of the elements, each of so many times `multiple` as make up about this size."""
        step = max(size // multiple, 1) * multiple
        for first in range(start, stop, step):
            end = min(first + step, stop)
            yield Param(self.pool, self.name, first, end, (end - first,), self._kept)

    def sample(self, runs: int, length: int) -> Iterator[Param]:
        """Evenly spaced runs of so many elements, or fewer at the end."""
        for i in range(runs):
            first = self.start + i * self.numel // runs
            end = min(first + length, self.stop)
            yield Param(self.pool, self.name, first, end, (end - first,), self._kept)

    def reduce(self, function: Callable[[Param], T], multiple: int = 1) -> T:
        """The sum of `function(block)` over all blocks (see `parts`), in order: for any number of workers the same."""
        parts = self.parts(self.start, self.stop, multiple, PART if self._kept else BLOCK)
        return summed(map(function, parts) if self._kept else in_order(function, parts, self.pool.workers))

    def check(self, finite: bool, result: Block | None = None) -> None:
        """React to NaN or Inf in the inputs, or in the result, as the pool was told to, where not all is finite."""
        if finite or self.pool.nan == "ignore":
            return
        for name in self.pool.inputs:
            label = "the base model" if name == "base" else f"model '{name}'"
            block = self.pool.inputs[name].block(self.name, self.start, self.stop)
            if not np.isfinite(as_float64(block)).all():
                self.pool.found_nonfinite(label, self.name)
        if result is not None and not np.isfinite(as_float64(result)).all():
            self.pool.found_nonfinite("the merged model", self.name)

    @contextmanager
    def _read_by(self, models: list[Checkpoint]) -> Iterator[list[Block]]:
        """The blocks of these models, in memory that this thread uses again, but not in here."""
        with buffers(len(models), 8 * self.numel) as spare:
            named = zip(models, spare, strict=True)
            yield [model.block(self.name, self.start, self.stop, out) for model, out in named]

    def _read(self, models: list[Checkpoint], labels: list[str]) -> Tensor:
        import torch

        dtype = compute_dtype(self.pool.reference.specs[self.name].dtype)
        values = torch.empty(len(models), self.stop - self.start, dtype=dtype)
        for row, model in zip(values, models, strict=True):
            row.copy_(model.read(self.name, self.start, self.stop))
        # A sum is finite only if all its terms are: one cheap pass, and a look at each model only after it failed.
        if self.pool.nan != "ignore" and not values.sum().isfinite():
            for row, label in zip(values, labels, strict=True):
                if not row.isfinite().all():
                    self.pool.found_nonfinite(label, self.name)
        return values.reshape(len(models), *self.shape)


def summed(results: Iterator[T]) -> T:
    """The sum of results, one after the other; there must be one."""
    total = next(results)
    for result in results:
        total = total + result  # type: ignore[operator]
    return total


@contextmanager
def buffers(count: int, size: int) -> Iterator[list[NDArray[np.uint8]]]:
    """This thread's own, of at least so many bytes each. Pages that are never written take no memory.

    Used again, and not had anew from the system, which would clear them. While they are filled, a model that is itself
    a merge is given others.
    """
    found: list[NDArray[np.uint8]] = _own.__dict__.setdefault("buffers", [])
    first: int = _own.__dict__.setdefault("taken", 0)
    for i in range(first, first + count):
        if i == len(found):
            found.append(np.empty(max(size, 8 * PART), np.uint8))
        elif len(found[i]) < size:
            found[i] = np.empty(size, np.uint8)
    _own.taken = first + count
    try:
        yield found[first : first + count]
    finally:
        _own.taken = first
