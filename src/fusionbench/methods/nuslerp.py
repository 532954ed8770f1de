from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Param, Range, method
from fusionbench.fuse import Models, TaskVectors, Weights, model_weights, require_models
from fusionbench.methods._sphere import ON, Convention, On, gram_of, on_task_vectors, slerp_weights, weighted


@method("merging", example="zoo:clip-mini/mnist zoo:clip-mini/emoji")
def nuslerp(
    pool: ModelPool,
    *,
    weights: Annotated[Weights, Range(), "a number per model, in the pool's order or by name; equal by default"] = None,
    on: Annotated[On, ON] = None,
    convention: Annotated[Convention, "of lengths: on the sphere, then interpolated; or as mergekit"] = "sphere",
) -> Checkpoint:
    """Interpolate between two models, or their task vectors, on the sphere, to the second's share of the weights.

        θ = θ₀ + slerp(τ₁, τ₂; t),   t = w₂ / (w₁ + w₂)

    As `slerp`, of task vectors; without a base, or with on=models, θ = slerp(θ₁, θ₂; t). mergekit multiplies the
    vectors themselves by the coefficients for unit vectors, and can also take every row for itself, which is not in
    here.
    """
    require_models(pool, 2, "nuslerp goes between", "leave some out, or use multislerp for several")
    (_, second), total = model_weights(pool, weights, normalize=True)
    task_vectors = on_task_vectors(pool, on)

    def interpolated(p: Param) -> Models | TaskVectors:
        gram = gram_of(p, task_vectors)
        return weighted(slerp_weights(gram, second / total, keep_lengths=convention == "sphere"), task_vectors)

    return pool.fuse(interpolated)
