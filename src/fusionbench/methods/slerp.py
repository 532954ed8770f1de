from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Param, Range, method
from fusionbench.fuse import Models, require_models
from fusionbench.methods._sphere import Convention, gram_of, slerp_weights


@method("merging", ordered=True, example="zoo:clip-mini/mnist zoo:clip-mini/emoji")
def slerp(
    pool: ModelPool,
    *,
    t: Annotated[float, Range(0, 1, search=(0.0, 1.0)), "0 for the first model, 1 for the second"] = 0.5,
    convention: Annotated[Convention, "of lengths: on the sphere, then interpolated; or as mergekit"] = "sphere",
) -> Checkpoint:
    """Interpolate between two models on the sphere, every tensor as one vector (Shoemake, 1985).

        u = (sin((1 - t) φ) θ₁/‖θ₁‖ + sin(t φ) θ₂/‖θ₂‖) / sin φ
        θ = ((1 - t) ‖θ₁‖ + t ‖θ₂‖) u

    φ is the angle between the tensors: u follows the arc between their directions, and lengths change linearly. Where a
    tensor is zero, or the two are parallel or opposite, the way is a straight line. mergekit multiplies the tensors
    themselves by the coefficients for unit vectors, sin((1 - t) φ) / sin φ and sin(t φ) / sin φ,
    which is the same for equal lengths only, and takes a straight line from cosines of 0.9995.
    """
    require_models(pool, 2, "slerp goes between", "leave some out, or use multislerp for several")
    options = {"keep_lengths": False, "straight": 0.9995} if convention == "mergekit" else {}

    def interpolated(p: Param) -> Models:
        return Models(slerp_weights(gram_of(p, task_vectors=False), t, **options).tolist())

    return pool.fuse(interpolated)
