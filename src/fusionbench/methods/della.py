from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from fusionbench import Checkpoint, InputError, ModelPool, Param, Range, method
from fusionbench.fuse import Masked, Merge, Over, Selection, combined, is_statistic, require_fraction, restoring
from fusionbench.passes import ALWAYS
from fusionbench.registry import DENSITY, SCALING

LONGEST = 2**17  # elements of one output's weights: more are a stack of matrices, as of a layer's experts


@lru_cache(maxsize=64)  # tensors of one shape ask for the same
def chances_by_rank(columns: int, density: float, epsilon: float) -> NDArray[np.uint64]:
    """Of the elements of a row, from the smallest to the largest, the chances, of 2**32: `(columns,)`."""
    if not 0 < density < 1:
        return np.full(columns, ALWAYS if density else 0, np.uint64)
    chances = np.linspace(density - epsilon, density + epsilon, columns) if columns > 1 else np.full(1, density)
    return np.minimum(np.round(chances * np.ones(columns) * ALWAYS), ALWAYS).astype(np.uint64)


def row_length(shape: tuple[int, ...]) -> int:
    """How many elements make a row, of which memory holds a whole one."""
    columns = prod(shape[1:]) if len(shape) > 1 else prod(shape)
    return shape[-1] if len(shape) > 2 and columns > LONGEST else columns


@method("merging", paper="2406.11617", base=True)
def della(
    pool: ModelPool,
    *,
    over: Annotated[Over, "how what is left is merged: average, task_arithmetic, or ties"] = "ties",
    density: Annotated[float, DENSITY, "chance of the middle of a row to be kept"] = 0.7,
    epsilon: Annotated[float, Range(0, 1), "how much higher the largest's chance is, and lower the smallest's"] = 0.07,
    rescale: Annotated[
        Literal["paper", "l1", "none"], "what is kept is divided by its chance, or to its old sum"
    ] = "paper",
    seed: Annotated[int, "of the random choice"] = 0,
    scaling_factor: Annotated[float, SCALING, "what the merged task vector is multiplied by"] = 1.0,
    merge: Annotated[Merge, "over ties, what is done with the values that agree with the sign"] = "mean",
) -> Checkpoint:
    """Keep elements of each task vector at random, likelier the larger they are in their row (Deep et al., 2024).

        pᵢ = d - ε + 2 ε rᵢ / (n - 1),   rᵢ = rank of |τᵢ|
        tᵢ = mᵢ τᵢ / pᵢ,   mᵢ ~ Bernoulli(pᵢ)
        s  = sgn Σᵢ tᵢ
        θ  = θ₀ + λ Σᵢ tᵢ [tᵢ s > 0] / Σᵢ [tᵢ s > 0]

    That is over=ties and merge=mean. Ranks are from 0, for the smallest in a row of n; in rows of one the chance is d;
    a density of 1 keeps everything. A row is what makes one output: all elements with the same first index, or of a
    stack of matrices, where these are more than 2**17, the last dimension; and the whole of a vector. mergekit's is
    always the last dimension. Running statistics of batch norms are not dropped from. The rule, and what is kept
    divided by its chance, are those of the authors' code, and defaults those of its example: a drop rate of 0.3, and a
    window of 0.14, from end to end.
    `l1`, mergekit's way, multiplies each tensor by one number that restores its sum of magnitudes, which overstates
    large elements. Without election: over=average or task_arithmetic.

    What is dropped depends on the seed and the names of parameter and model alone: not on order, blocks or workers.
    """
    pool.require_base()
    require_fraction("density", density)
    if density < 1 and (epsilon >= density or density + epsilon > 1 + 1e-9):
        most = min(density, 1 - density)
        raise InputError(
            f"della.epsilon must leave chances of density ± epsilon in (0, 1]: at most {most:g}; got {epsilon}."
        )

    def sampled(p: Param) -> Masked:
        if is_statistic(p.name):
            return Masked(Selection(), combined(over, merge, len(pool), scaling_factor))
        chances = chances_by_rank(row_length(p.shape), density, epsilon)[None]
        selection = Selection(keys=p.keys(seed), chances=chances)
        factors = restoring(p, selection) if rescale == "l1" else None
        how = combined(over, merge, len(pool), scaling_factor, factors)
        return Masked(selection, replace(how, divide=rescale == "paper"))

    return pool.fuse(sampled)
