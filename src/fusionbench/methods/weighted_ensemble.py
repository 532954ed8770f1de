from __future__ import annotations

from typing import Annotated

from fusionbench import ModelPool, method
from fusionbench.methods.weighted_average import Weights
from fusionbench.ops import model_weights


@method("ensemble")
def weighted_ensemble(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, "a number per model, in the pool's order or by name; equal by default"] = None,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
):
    """Sum the outputs of all models, each times its weight."""
    from fusionbench.ensemble import Ensemble

    w = model_weights(pool, weights, normalize)

    def combine(outputs):
        return (w.to(outputs).reshape(-1, *[1] * (outputs.dim() - 1)) * outputs).sum(0)

    return Ensemble([pool.build(name) for name in pool], combine)
