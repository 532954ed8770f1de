from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from fusionbench import Checkpoint, ModelPool, Param, Range, method
from fusionbench.fuse import Masked, Merge, Over, Selection, chances_of, combined, is_statistic, restoring, threshold
from fusionbench.registry import DENSITY, SCALING


@method("merging", paper="2311.03099", base=True)
def dare(
    pool: ModelPool,
    *,
    over: Annotated[Over, "how what is left is merged: average, task_arithmetic, or ties"] = "task_arithmetic",
    density: Annotated[float, DENSITY, "chance of every element of a task vector to be kept"] = 0.5,
    rescale: Annotated[
        Literal["paper", "l1", "none"], "what is kept is divided by density, or to its old sum"
    ] = "paper",
    seed: Annotated[int, "of the random choice"] = 0,
    scaling_factor: Annotated[
        float | None,
        SCALING,
        "what the merged task vector is multiplied by; by default 0.3, and 1 over an average",
    ] = None,
    merge: Annotated[Merge, "over ties, what is done with the values that agree with the sign"] = "sum",
    trim_density: Annotated[
        float | None, Range(0, 1, open_low=True), "fraction of each task vector that is trimmed to after the drop"
    ] = None,
) -> Checkpoint:
    """Drop elements of each task vector at random and rescale the others, then merge (Yu et al., 2024).

        mᵢ ~ Bernoulli(d) for each element
        θ  = θ₀ + λ Σᵢ mᵢ τᵢ / d

    That is over=task_arithmetic. An average has λ/N for λ, and ties elects a sign among mᵢ τᵢ / d, as `ties_merging`
    does.

    The paper divides by the density, so that the expectation stays; `l1`, mergekit's way, restores each tensor's sum
    of magnitudes. mergekit's dare_ties is merge=sum without a trim; the paper's code merges by merge=mean after one
    more trim over the whole model (trim_density=0.2: of all its elements, dropped ones included).

    Running statistics of batch norms are not dropped from. What is dropped depends on the seed and the names of
    parameter and model alone: not on order, blocks or workers.
    """
    pool.require_base()
    chances = chances_of(density, len(pool))
    scaling = scaling_factor if scaling_factor is not None else 1.0 if over == "average" else 0.3

    def kept(p: Param) -> Selection:
        return Selection() if is_statistic(p.name) else Selection(keys=p.keys(seed), chances=chances)

    trimmed = Selection().low if trim_density is None else threshold(pool, trim_density, kept)

    def dropped(p: Param) -> Masked:
        selection = kept(p)
        factors = np.full(len(pool), 1 / density if rescale == "paper" and not is_statistic(p.name) else 1.0)
        if rescale == "l1":
            factors = restoring(p, selection)
        return Masked(replace(selection, low=trimmed), combined(over, merge, len(pool), scaling, factors))

    return pool.fuse(dropped)
