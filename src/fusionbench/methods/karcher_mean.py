from __future__ import annotations

from typing import Annotated

import numpy as np

from fusionbench import Checkpoint, ModelPool, Param, Range, method
from fusionbench.fuse import Models, TaskVectors, Weights, model_weights
from fusionbench.methods._sphere import ON, On, gram_of, mean_weights, on_task_vectors, weighted


@method("merging", paper="2603.04972")
def karcher_mean(
    pool: ModelPool,
    *,
    weights: Annotated[
        Weights, Range(0), "a number per model, in the pool's order or by name; equal by default"
    ] = None,
    on: Annotated[On, ON] = "models",
) -> Checkpoint:
    """Average models on the sphere: the point from which the weighted arcs to all cancel (Wang et al., 2026).

        uᵢ = θᵢ/‖θᵢ‖,   Σᵢ wᵢ φᵢ/sin φᵢ (uᵢ - cos φᵢ u) = 0
        θ  = u Σᵢ wᵢ ‖θᵢ‖

    Every tensor as one vector, φᵢ the angle between u and uᵢ: the Karcher mean u of the tensors' directions, at the
    weighted mean of their lengths; weights sum to one. With on=task_vectors, τᵢ stands for θᵢ, and θ₀ is added.
    Every iterate is a weighted sum of the models, so that the iterations run on their dot products, to the end of
    float64, and the models are read twice whatever their number. Two models give `slerp`. A tensor of zeros counts for
    the length only; where the weighted directions cancel, the mean is the linear one. mergekit's takes no weights,
    and runs 10 iterations (until a step is below 1e-5) over the tensors themselves in their own dtype.
    """
    given, total = model_weights(pool, weights, normalize=True)
    shares = np.array(given) / total
    task_vectors = on_task_vectors(pool, on)

    def mean(p: Param) -> Models | TaskVectors:
        return weighted(mean_weights(gram_of(p, task_vectors), shares), task_vectors)

    return pool.fuse(mean)
