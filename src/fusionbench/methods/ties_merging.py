from __future__ import annotations

from typing import Annotated, Literal

from fusionbench import Checkpoint, ModelPool, Param, method
from fusionbench.fuse import Masked, Selection, combination, threshold
from fusionbench.registry import DENSITY, SCALING


@method("merging", paper="2306.01708", base=True)
def ties_merging(
    pool: ModelPool,
    *,
    scaling_factor: Annotated[float, SCALING, "what the merged task vector is multiplied by"] = 0.3,
    density: Annotated[float, DENSITY, "fraction of each task vector that is kept"] = 0.2,
    trim: Annotated[
        Literal["model", "tensor"], "look for the largest values in the whole model, or per tensor"
    ] = "model",
    elect: Annotated[Literal["mass", "count"], "votes on a sign weigh their magnitude, or one each"] = "mass",
    merge: Annotated[Literal["sum", "mean", "max"], "what is done with the values that agree with the sign"] = "sum",
) -> Checkpoint:
    """Trim the task vectors, elect a sign, and merge what agrees with it (Yadav et al., 2023).

        tᵢ = τᵢ [|τᵢ| ≥ its (1 - d)-quantile in model i]
        s  = sgn Σᵢ tᵢ
        θ  = θ₀ + λ Σᵢ tᵢ [tᵢ s > 0]

    That is elect=mass and merge=sum. With elect=count, s = sgn Σᵢ sgn tᵢ; merge=mean divides by the number of models
    that agree, and merge=max takes the largest of their values.

    Defaults are those of the paper's benchmark: the largest 20 % of each whole task vector, summed, times 0.3. The TIES
    paper itself averages (merge=mean) and suggests a scaling factor of 1; mergekit trims per tensor.

    Of n values, round(density * n) are kept, and all that equal the smallest of them. A tie by count is settled by
    mass; where the votes cancel exactly, the base stays as it is.
    """
    pool.require_base()
    how = combination(len(pool), elect=elect, combine=merge, scaling=scaling_factor)

    def ties(of: ModelPool | Param) -> Masked:
        return Masked(Selection(low=threshold(of, density)), how)

    return pool.fuse(ties(pool) if trim == "model" else ties)
