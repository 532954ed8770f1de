from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.fuse import Models, require_models


@method("merging", example="zoo:clip-mini/mnist")
def passthrough(
    pool: ModelPool, *, scale: Annotated[float, Range(), "what every parameter is multiplied by"] = 1.0
) -> Checkpoint:
    """Return the pool's only model, every parameter times `scale`.

        θ = scale · θ₁

    In a recipe it is what copies layers.
    """
    require_models(pool, 1, "passthrough returns", "leave the others out, or use linear")
    return pool.fuse(Models([scale]))
