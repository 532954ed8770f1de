"""The passes on a device of torch: the same bits, of blocks that are copied there and back.

Sums of products stay with the processor: their order is part of the result, and a device has one of its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionbench import passes
from fusionbench.dtypes import to_torch
from fusionbench.passes.reference import ALWAYS, FEWEST, LOW_BITS, Block, Bytes, Combination, Numbers, Selection

_MAGNITUDE = 0x7FFFFFFF


class OnDevice:
    """The passes of `fusionbench.passes`, on a device or, of "cuda", on all GPUs by turns: one for each thread."""

    def __init__(self, device: str | torch.device) -> None:
        given = torch.device(device)
        several = given.type == "cuda" and given.index is None
        self._devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if several else [given]
        self._turns = itertools.cycle(self._devices)
        self._own = threading.local()

    products = staticmethod(passes.products)
    sums = staticmethod(passes.sums)
    between = staticmethod(passes.between)

    def weighted_sum(
        self, blocks: Sequence[Block], scale: float, coefficients: Numbers, divisor: float, out: Bytes, dtype: str
    ) -> bool:
        first, *others = self._decoded(blocks)
        total = torch.zeros_like(first)
        for coefficient, other in zip(coefficients.tolist(), others, strict=True):
            total += coefficient * (other - first)
        if divisor != 1:
            total /= divisor
        return self._write(scale * first + total, out, dtype) and _finite([first, *others])

    def masked_merge(
        self,
        blocks: Sequence[Block],
        selection: Selection,
        offset: int,
        combination: Combination,
        out: Bytes,
        dtype: str,
    ) -> bool:
        c = combination
        decoded = self._decoded(blocks)
        first = decoded[0]
        values = torch.stack([x - first for x in decoded[1:]])
        bits = _magnitudes(decoded, blocks)
        size = bits.view(torch.float32)
        kept = (size >= self._here(selection.low)[:, None]) & (size <= self._here(selection.high)[:, None])
        kept &= self._kept_at_random(selection, offset, bits)
        if selection.least_variance > 0:
            kept &= _variance(values) >= np.float32(selection.least_variance).item()
        values = self._here(c.factors)[:, None] * values
        if c.divide and selection.chances.ndim == 2:
            values = values * (ALWAYS / self._chances_by_rank(selection, bits).clamp(min=1).double())
        values = values.where(kept, 0.0)
        if c.elect != "none":
            sign = _sum(values).sign()
            sign = sign.where(sign != 0, c.on_tie)
            if c.elect == "count":
                votes = _sum(values.sign()).sign()
                sign = votes.where(votes != 0, sign)
            values = values.where(values * sign > 0, 0.0)
        merged = _largest(values) if c.combine == "max" else _sum(values)
        if c.combine == "mean":
            weights = self._here(c.weights)[:, None].expand_as(values)
            divisor = _sum(weights.where(values != 0, 0.0))
            merged = merged / divisor.where(divisor.abs() >= FEWEST, 1.0)
        return self._write(first + c.scaling * merged, out, dtype) and _finite(decoded)

    def histogram(
        self,
        blocks: Sequence[Block],
        prefixes: NDArray[np.int64] | None,
        selection: Selection,
        offset: int = 0,
        *,
        variance: bool = False,
        counts: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.int64], bool]:
        decoded = self._decoded(blocks)
        if variance:
            bits = _variance(torch.stack([x - decoded[0] for x in decoded[1:]]))[None].view(torch.int32)
            kept = torch.ones_like(bits, dtype=torch.bool)
        else:
            bits = _magnitudes(decoded, blocks)
            kept = self._kept_at_random(selection, offset, bits).expand_as(bits)
        rows = []
        for i, (row, keep) in enumerate(zip(bits, kept, strict=True)):
            row = row[keep]
            if prefixes is None:
                rows.append(torch.bincount(row >> LOW_BITS, minlength=2 ** (31 - LOW_BITS)))
            else:
                low = row[row >> LOW_BITS == int(prefixes[i])] & (2**LOW_BITS - 1)
                rows.append(torch.bincount(low, minlength=2**LOW_BITS))
        found = torch.stack(rows).cpu().numpy()
        if counts is None:
            return found, _finite(decoded)
        counts += found
        return counts, _finite(decoded)

    @property
    def _device(self) -> torch.device:
        """This thread's own."""
        if not hasattr(self._own, "device"):
            self._own.device = next(self._turns)
            if self._own.device.type == "cuda":  # copies and work of several threads overlap
                torch.cuda.set_device(self._own.device)
                torch.cuda.set_stream(torch.cuda.Stream(self._own.device))
        return self._own.device

    def _decoded(self, blocks: Sequence[Block]) -> list[Tensor]:
        """The numbers in blocks, in float64."""
        return [self._here(data).view(to_torch(dtype)).double() for data, dtype in blocks]

    def _here(self, values: NDArray) -> Tensor:
        device = self._device
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()

    def _kept_at_random(self, selection: Selection, offset: int, bits: Tensor) -> Tensor:
        chances, count = selection.chances, bits.shape[1]
        if chances.ndim == 1 and (chances >= ALWAYS).all():
            return torch.ones(1, count, dtype=torch.bool, device=self._device)
        index = torch.arange(offset + 1, offset + count + 1, device=self._device)
        random = torch.stack([_random_bits(key, index) for key in selection.keys.view(np.int64).tolist()])
        if chances.ndim == 2:
            return random < self._chances_by_rank(selection, bits)
        return random < self._here(chances.astype(np.int64))[:, None]

    def _chances_by_rank(self, selection: Selection, bits: Tensor) -> Tensor:
        rows = bits.view(len(bits), -1, selection.chances.shape[1])
        chances = self._here(selection.chances.astype(np.int64))[:, None].expand_as(rows)
        return torch.empty_like(chances).scatter(2, rows.argsort(dim=2, stable=True), chances).view_as(bits)

    def _write(self, values: Tensor, out: Bytes, dtype: str) -> bool:
        encoded = _encoded(values, dtype)
        out[:] = encoded.view(torch.uint8).cpu().numpy()
        return _finite([encoded])


@cache
def on_device(device: str) -> OnDevice:
    """The passes on a device, of which there is one object each: threads keep their streams."""
    return OnDevice(device)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _sum(values: Tensor) -> Tensor:
    """Over models, one after the other."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = total + value
    return total


def _largest(values: Tensor) -> Tensor:
    """Of the largest magnitude, the first of equals."""
    found = values[0]
    for value in values[1:]:
        found = value.where(value.abs() > found.abs(), found)
    return found


def _variance(differences: Tensor) -> Tensor:
    mean = _sum(differences) / len(differences)
    return (_sum((differences - mean) * (differences - mean)) / len(differences)).float()


def _magnitudes(decoded: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    first, *others = decoded
    if any(dtype == "F64" for _, dtype in blocks):
        differences = torch.stack([(x - first).float() for x in others])
    else:
        differences = torch.stack([x.float() - first.float() for x in others])
    return differences.view(torch.int32) & _MAGNITUDE


def _random_bits(key: int, index: Tensor) -> Tensor:
    """SplitMix64 of unsigned numbers, in int64: products wrap around alike, and shifts are made alike."""
    z = key + index * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z ^ _shifted(z, 31), 32)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _encoded(values: Tensor, dtype: str) -> Tensor:
    """Rounded once: where torch goes by way of float32, that is rounded to odd first."""
    wanted = to_torch(dtype)
    if dtype in ("F64", "F32"):
        return values.to(wanted)
    near = values.float()
    exact = near.double()
    bits = near.view(torch.int32)
    bits = bits - (exact.abs() > values.abs()).int()
    odd = torch.where((exact != values) & ~values.isnan(), bits | 1, bits).to(torch.int32)
    return odd.view(torch.float32).to(wanted)
