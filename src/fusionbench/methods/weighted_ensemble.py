from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fusionbench import ModelPool, Range, method, ops
from fusionbench.fuse import Weights, model_weights

if TYPE_CHECKING:
    from torch import nn


@method("ensemble")
def weighted_ensemble(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, Range(), "a number per model, in the pool's order or by name; equal by default"] = None,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
) -> nn.Module:
    """Sum the outputs of all models, each times its weight.

        f(x) = Σᵢ wᵢ fᵢ(x) / Σᵢ wᵢ

    Without `normalize` nothing is divided; the weights are then 1/N by default.
    """
    import torch

    from fusionbench.ensemble import Ensemble

    numbers, divisor = model_weights(pool, weights, normalize, advice="set normalize=false")
    checked = torch.tensor(numbers, dtype=torch.float64) / divisor
    return Ensemble([pool.build(name) for name in pool], lambda outputs: ops.weighted_sum(outputs, checked))
