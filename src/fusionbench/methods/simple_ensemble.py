from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench import ModelPool, method

if TYPE_CHECKING:
    from torch import nn


@method("ensemble")
def simple_ensemble(pool: ModelPool) -> nn.Module:
    """Average the outputs of all models (Dietterich, 2000).

        f(x) = 1/N Σᵢ fᵢ(x)

    All models run, on every input.
    """
    from fusionbench.ensemble import Ensemble

    return Ensemble([pool.build(name) for name in pool], lambda outputs: outputs.mean(0))
