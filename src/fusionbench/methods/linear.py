from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.fuse import Weights
from fusionbench.methods.weighted_average import weighted_average


@method("merging", paper="2203.05482")
def linear(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, Range(), "a number per model, in the pool's order or by name; equal by default"] = None,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
) -> Checkpoint:
    """Sum the models' parameters, each model times its weight.

        θ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ

    It is practitioners' name of `weighted_average`.
    """
    return weighted_average(pool, weights=weights, normalize=normalize)
