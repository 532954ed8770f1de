from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench import ModelPool, method

if TYPE_CHECKING:
    from torch import nn


@method("ensemble")
def max_model_predictor(pool: ModelPool) -> nn.Module:
    """Take the largest output of all models.

        f(x) = maxᵢ fᵢ(x)

    That is for every element of the output by itself.
    """
    from fusionbench.ensemble import Ensemble

    return Ensemble([pool.build(name) for name in pool], lambda outputs: outputs.amax(0))
