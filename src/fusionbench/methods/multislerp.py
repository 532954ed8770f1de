from __future__ import annotations

from typing import Annotated

import numpy as np

from fusionbench import Checkpoint, ModelPool, Param, Range, method
from fusionbench.fuse import Models, TaskVectors, Weights, model_weights
from fusionbench.methods._sphere import ON, Convention, On, gram_of, mean_weights, on_task_vectors, weighted


@method("merging")
def multislerp(
    pool: ModelPool,
    *,
    weights: Annotated[
        Weights, Range(0), "a number per model, in the pool's order or by name; equal by default"
    ] = None,
    on: Annotated[On, ON] = None,
    convention: Annotated[
        Convention, "the mean on the sphere; or as mergekit, of the linear mean's direction"
    ] = "sphere",
) -> Checkpoint:
    """Interpolate between any number of models, or their task vectors, on the sphere, by their weights.

        uᵢ = τᵢ/‖τᵢ‖,   Σᵢ wᵢ φᵢ/sin φᵢ (uᵢ - cos φᵢ u) = 0
        θ  = θ₀ + u Σᵢ wᵢ ‖τᵢ‖

    The weighted mean on the sphere, as `karcher_mean` has it; without a base, or with on=models, of the models.
    mergekit's stops at its first guess, the direction of the weighted sum of unit vectors: it is projected to the
    tangent space at that very point, where it is zero.
    """
    given, total = model_weights(pool, weights, normalize=True)
    shares = np.array(given) / total
    task_vectors = on_task_vectors(pool, on)

    def mean(p: Param) -> Models | TaskVectors:
        gram = gram_of(p, task_vectors)
        return weighted(mean_weights(gram, shares, steps=1000 if convention == "sphere" else 0), task_vectors)

    return pool.fuse(mean)
