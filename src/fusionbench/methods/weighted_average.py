from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, method, ops

Weights = list[float] | dict[str, float] | None


@method("merging")
def weighted_average(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, "a number per model, in the pool's order or by name; equal by default"] = None,
    normalize: Annotated[bool, "divide the weights by their sum"] = True,
) -> Checkpoint:
    """Sum the models' parameters, each model times its weight."""
    checked = ops.model_weights(pool, weights, normalize)
    return pool.map(lambda p: ops.weighted_sum(p.models, checked), elementwise=True)
