"""Merges, as the sources of checkpoints: of a function on tensors, and of passes on bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionbench.dtypes import to_torch
from fusionbench.errors import InputError
from fusionbench.formats import DTYPES
from fusionbench.param import Param
from fusionbench.passes import Block, Bytes
from fusionbench.sources import BLOCK, PART, Pieces, Source, as_block, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from fusionbench.fuse import Pass
    from fusionbench.pool import ModelPool

FEW = 64  # rows: of as many, those at the ends are little of the work


class Merged(Source):
    """The tensors that a function gives, of a parameter or of blocks of it."""

    def __init__(self, pool: ModelPool, merge: Callable[[Param], Tensor], elementwise: bool) -> None:
        import torch  # noqa: F401  (now, so that threads that share the work find its own threads stopped)

        self._pool, self._merge, self._elementwise = pool, merge, elementwise

    def working_set(self, name: str) -> int:
        # All models and the base in float32, four times over: read, subtracted, masked, combined.
        return 16 * (len(self._pool) + 1)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        return as_block(self.read(name, start, stop))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        spec = self._pool.reference.specs[name]
        if not spec.floating or start == stop:
            return self._pool.reference.read(name, start, stop)
        if self._elementwise:
            return self._compute(name, start, stop, (stop - start,))
        return self._compute(name, 0, spec.numel, spec.shape).reshape(-1)[start:stop]

    def unit(self, name: str, memory: int) -> int:
        spec = self._pool.reference.specs[name]
        return BLOCK if self._elementwise or not spec.floating else spec.numel

    def known(self, name: str) -> None:
        return None

    def _compute(self, name: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        result = self._merge(Param(self._pool, name, start, stop, shape))
        if tuple(result.shape) != shape:
            raise InputError(f"The merge of '{name}' has the shape {tuple(result.shape)}, but {shape} is expected.")
        result = result.to(to_torch(self._pool.spec(name).dtype))
        if self._pool.nan != "ignore" and not result.detach().float().sum().isfinite() and not result.isfinite().all():
            self._pool.found_nonfinite("the merged model", name)
        return result


class Fused(Source):
    """The tensors that a pass gives, the same for all parameters, or one that is chosen by looking at each.

    What is looked at is held in memory meanwhile, where all of it fits, so that it is read once.
    """

    def __init__(self, pool: ModelPool, how: Pass | Callable[[Param], Pass]) -> None:
        self._pool, self._how = pool, how
        self._found: dict[str, Pass] = {}
        self._locks: dict[str, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_locks": {}}

    def working_set(self, name: str) -> int:
        size = max(DTYPES[self._pool.reference.specs[name].dtype], DTYPES[self._pool.spec(name).dtype])
        return (len(self._pool.inputs) + 1) * size  # and what is written

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        reference = self._pool.reference
        spec = self._pool.spec(name)
        if not spec.floating or start == stop:
            return reference.block(name, start, stop, out)
        size = DTYPES[spec.dtype]
        out = np.empty((stop - start) * size, np.uint8) if out is None else out
        with self._ready(name, start, stop) as (how, p):
            self._run(how, p, start, stop, out)
        return out[: (stop - start) * size], spec.dtype

    def pieces(self, name: str, start: int, stop: int, out: Bytes) -> Pieces:
        spec = self._pool.spec(name)
        if not spec.floating or stop - start <= PART:
            yield start, self.block(name, start, stop, out)
            return
        with self._ready(name, start, stop) as (how, p):
            step = PART if FEW * how.columns <= PART else stop - start  # rows at the ends are computed twice
            for first in range(start, stop, step):
                last = min(first + step, stop)
                self._run(how, p, first, last, out)
                yield first, (out[: (last - first) * DTYPES[spec.dtype]], spec.dtype)

    @contextmanager
    def _ready(self, name: str, start: int, stop: int) -> Iterator[tuple[Pass, Param]]:
        """The pass of a parameter, and the parameter, which is held in memory where all of it is asked for."""
        spec = self._pool.spec(name)
        p = Param(self._pool, name, 0, spec.numel, spec.shape)
        if not callable(self._how):
            yield self._how, p
        elif start == 0 and stop == spec.numel:
            with p.kept() as p:
                yield self._chosen(p), p
        else:
            yield self._chosen(p), p

    def _chosen(self, p: Param) -> Pass:
        assert callable(self._how)
        with self._locks.setdefault(p.name, threading.Lock()):  # it may look at much: once is enough
            if p.name not in self._found:
                self._found[p.name] = self._how(p)
        return self._found[p.name]

    def _run(self, how: Pass, p: Param, start: int, stop: int, out: Bytes) -> None:
        dtype = self._pool.spec(p.name).dtype
        size = DTYPES[dtype]
        first, last = start - start % how.columns, stop + -stop % how.columns  # whole rows
        for part in p.parts(first, last, how.columns):
            low, high = max(part.start, start), min(part.stop, stop)
            wanted = out[(low - start) * size : (high - start) * size]
            result = wanted if high - low == part.numel else np.empty(part.numel * size, np.uint8)
            part.check(how.run(part, result, dtype), (result, dtype))
            if result is not wanted:
                wanted[:] = result[(low - part.start) * size : (high - part.start) * size]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return as_tensor(self.block(name, start, stop))

    def unit(self, name: str, memory: int) -> int:
        spec = self._pool.reference.specs[name]
        looks = callable(self._how) and spec.floating
        fitting = memory // self.working_set(name)
        return spec.numel if looks and spec.numel <= fitting else min(max(fitting // BLOCK, 1) * BLOCK, PART)

    def known(self, name: str) -> None:
        return None
