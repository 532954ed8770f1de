from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.fuse import Models, Weights, model_weights


@method("merging")
def weighted_average(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, Range(), "a number per model, in the pool's order or by name; equal by default"] = None,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
) -> Checkpoint:
    """Sum the models' parameters, each model times its weight.

        θ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ

    Without `normalize` nothing is divided; the weights are then 1/N by default.
    """
    return pool.fuse(Models(*model_weights(pool, weights, normalize, advice="set normalize=false")))
