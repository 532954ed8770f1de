from __future__ import annotations

from typing import Annotated, Literal

import numpy as np

from fusionbench import Checkpoint, ModelPool, Param, Range, method
from fusionbench.fuse import Masked, Merge, Selection, combined, largest, require_fraction
from fusionbench.registry import DENSITY, SCALING


@method("merging", paper="2312.06795", base=True)
def breadcrumbs(
    pool: ModelPool,
    *,
    over: Annotated[Literal["task_arithmetic", "ties"], "add what is kept, or elect signs first"] = "task_arithmetic",
    density: Annotated[float, DENSITY, "fraction of each task vector that is kept"] = 0.144,
    gamma: Annotated[float, Range(0, 1), "fraction of the largest values that are dropped"] = 0.006,
    scaling_factor: Annotated[float, SCALING, "what the merged task vector is multiplied by"] = 0.2,
    merge: Annotated[Merge, "over ties, what is done with the values that agree with the sign"] = "sum",
) -> Checkpoint:
    """Drop the largest and the smallest values of each task vector, and add the others (Davari & Belilovsky, 2023).

        tᵢ = τᵢ [γ n < rᵢ ≤ (γ + d) n],   rᵢ = rank of |τᵢ|
        θ  = θ₀ + λ Σᵢ tᵢ

    Ranks are from 1 for the largest. Per tensor of n values: the largest round(gamma * n) are dropped, then the next
    round(density * n), at least one, are kept; all are where gamma + density is over 1 (gamma gives way). Values equal
    to the largest or smallest that is kept are kept, too. With over=ties a sign is elected among tᵢ, as `ties_merging`
    does. Defaults are where the authors' search begins: of the largest 15 %, all but 0.6 % of n. mergekit rounds down,
    and breaks ties by position; its defaults are density=1 and gamma=0.01.
    """
    pool.require_base()
    require_fraction("density", density)
    how = combined(over, merge, len(pool), scaling_factor)

    def thinned(p: Param) -> Masked:
        keep = min(max(round(density * p.numel), 1), p.numel)
        drop = min(round(gamma * p.numel), p.numel - keep)
        if keep == p.numel:
            return Masked(Selection(), how)
        high, low = largest(p, [drop + 1, drop + keep])
        return Masked(Selection(low=low, high=high if drop else np.full_like(high, np.inf)), how)

    return pool.fuse(thinned)
