from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, method
from fusionbench.ops import model_weights

Weights = list[float] | dict[str, float] | None


@method("merging")
def weighted_average(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, "a number per model, in the pool's order or by name; equal by default"] = None,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
) -> Checkpoint:
    """Sum the models' parameters, each model times its weight (Matena & Raffel, 2022, with equal importance)."""
    w = model_weights(pool, weights, normalize)

    def merge(p):
        return (w.to(p.models.dtype).reshape(-1, *[1] * (p.models.dim() - 1)) * p.models).sum(0)

    return pool.map(merge, elementwise=True)
