"""Adapters merged into one: exactly, or to the nearest of a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.lora.adapter import Adapter
from fusionbench.lora.files import config_of, write_adapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Combined:
    """Adapters merged into one.

    Attributes:
        config: an `adapter_config.json`, of scaling 1.
        tensors: `lora_A` and `lora_B` under PEFT's names, in float32.
        ranks: of each module.
        errors: for each module, the part of the exact merge that the rank left out: a ratio of Frobenius norms.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    errors: dict[str, float]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapter in PEFT's format, all of it or nothing."""
        return write_adapter(self.config, Checkpoint.of(self.tensors), folder, overwrite=overwrite)


def combine(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, rank: int | None = None) -> Combined:
    """The adapter whose change is exactly `sum_i weights_i * scaling_i * B_i A_i`, or nearest to it at a rank.

    Without a rank the factors are stacked (PEFT's "cat"): exact, of the ranks' sum. With one the stacked product is cut
    by the singular values of its small core, found by two QR decompositions: the best change of that rank (Eckart and
    Young, 1936), in O((out + in) * ranks^2). Merging A and B apart would add every product B_i A_j of two
    different adapters.

    Args:
        adapters: adapters of one base; a module that one of them does not change counts as unchanged by it.
        weights: one per adapter; 1 / number of adapters each by default, which is the mean.
        rank: the rank of every change in the result, at least 1.

    Raises:
        InputError: for weights that are not finite or not as many as adapters, a rank below 1, an adapter that brings
            tensors whole, and adapters of several bases.
    """
    import torch

    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise InputError(f"{len(weights)} weights are given for {len(adapters)} adapters.")
    for weight in weights:
        if not math.isfinite(weight):
            raise InputError(f"A weight must be a finite number; got {weight}.")
    if rank is not None and rank < 1:
        raise InputError(f"rank must be 1 or more; got {rank}.")
    for adapter in adapters:
        if adapter.replaced:
            name = next(iter(adapter.replaced))
            raise InputError(
                f"'{adapter.location}' also brings '{name}' whole, which has no low-rank form: "
                "merge these adapters as models, on their base: --base BASE."
            )
    for other in adapters[1:]:
        _check_one_base(adapters[0], other)
    tensors, errors, ranks = {}, {}, {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.changes):
        mine = [(w, adapter) for w, adapter in zip(weights, adapters, strict=True) if module in adapter.changes]
        factors = [(w, *adapter.matrices(module)) for w, adapter in mine]
        if (
            len({(b.shape[0], a.shape[1]) for _, b, a in factors}) > 1
            or len({adapter.changes[module].transposed for _, adapter in mine}) > 1
        ):
            raise InputError(
                f"'{module}' has several shapes, or is transposed in some of these adapters: they are not of one base."
            )
        b, a = torch.cat([w * b for w, b, _ in factors], 1), torch.cat([a for *_, a in factors])
        errors[module] = 0.0
        if rank is not None and rank < len(a):
            b, a, errors[module] = _truncated(b, a, rank)
        ranks[module] = len(a)
        change, file = mine[0][1].changes[module], mine[0][1].checkpoint
        for name, factor in ((change.a, a), (change.b, b)):
            shape = file.specs[name].shape
            shape = (len(a), *shape[1:]) if name == change.a else (shape[0], len(a), *shape[2:])
            tensors[_saved_name(name)] = factor.reshape(shape).float().contiguous()
            if not tensors[_saved_name(name)].isfinite().all():
                raise InputError(f"'{module}' has NaN or Inf in an adapter, or is too large with these weights.")
    config = {key: value for key, value in adapters[0].config.items() if key != "use_rslora"} | config_of(ranks)
    return Combined(config, tensors, ranks, errors)


def _check_one_base(first: Adapter, other: Adapter) -> None:
    """An error for two that say they are of different bases, and change no module both."""
    bases = [adapter.config.get("base_model_name_or_path") for adapter in (first, other)]
    if bases[0] != bases[1] and not first.changes.keys() & other.changes.keys():
        raise InputError(
            f"'{first.location}' and '{other.location}' change no module both, and are of the bases '{bases[0]}' and "
            f"'{bases[1]}': adapters of one base are merged."
        )


def _truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """`b @ a` at a lower rank, evenly divided between the factors, and the relative error."""
    import torch

    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T)
    root = s[:rank].sqrt()
    error = s[rank:].norm() / s.norm() if s.any() else torch.zeros(())
    return left @ u[:, :rank] * root, (right @ v[:rank].T * root).T, float(error)


def _saved_name(name: str) -> str:
    """PEFT's name of a factor, which a linearised adapter's file has in a longer form."""
    return name.replace(".model.lora_", ".lora_").replace(".default.", ".")
