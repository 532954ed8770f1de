from __future__ import annotations

from typing import Annotated

import numpy as np

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.fuse import Elementwise, require_models


@method("merging", base=True, example="zoo:t5-mini/base zoo:t5-mini/spam")
def nearswap(
    pool: ModelPool, *, t: Annotated[float, Range(0), "the furthest that an element moves from the base"] = 1e-4
) -> Checkpoint:
    """Take the model's elements where they are within `t` of the base's, and go `t` towards them elsewhere.

        θ = θ₀ + clip(θ₁ - θ₀, -t, t)

    It is alchemonaut's, of QuartetAnemoi (2024). Others write it as a weight, t / |model - base|, of at most 1;
    mergekit's divides by no less than 1e-6, so that a smaller t acts as less.
    """
    pool.require_base()
    require_models(pool, 1, "nearswap takes, beside the base,", "leave the others out")

    def near(values: np.ndarray) -> np.ndarray:
        base, model = values
        change = model - base
        return np.where(np.abs(change) <= t, model, base + np.clip(change, -t, t))

    return pool.fuse(Elementwise(near))
