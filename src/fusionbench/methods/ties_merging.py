from __future__ import annotations

from typing import Annotated, Literal

from fusionbench import Checkpoint, ModelPool, Range, method, ops


@method("merging", paper="2306.01708")
def ties_merging(
    pool: ModelPool,
    *,
    scaling_factor: Annotated[float, Range(), "what the merged task vector is multiplied by"] = 0.3,
    density: Annotated[float, Range(0, 1, open_low=True), "fraction of each task vector that is kept"] = 0.2,
    trim: Annotated[
        Literal["model", "tensor"], "look for the largest values in the whole model, or per tensor"
    ] = "model",
    elect: Annotated[Literal["mass", "count"], "votes on a sign weigh their magnitude, or one each"] = "mass",
    merge: Annotated[Literal["sum", "mean", "max"], "what is done with the values that agree with the sign"] = "sum",
) -> Checkpoint:
    """Trim the task vectors, elect a sign, and merge what agrees with it (Yadav et al., 2023).

    Defaults are those of the paper's benchmark: the largest 20 % of each whole task vector, summed, times 0.3. The TIES
    paper itself averages (merge=mean) and suggests a scaling factor of 1; mergekit trims per tensor.

    Of n values, round(density * n) are kept, and all that equal the smallest of them. A tie by count is settled by
    mass; where the votes cancel exactly, the base stays as it is.
    """
    base = pool.require_base()
    combine = {"sum": ops.disjoint_sum, "mean": ops.disjoint_mean, "max": ops.disjoint_max}[merge]
    if trim == "model":
        thresholds = dict.fromkeys(base.specs, ops.magnitude_threshold(pool, density))
    else:
        floating = [name for name, spec in base.specs.items() if spec.floating]
        thresholds = {name: ops.magnitude_threshold(pool, density, [name]) for name in floating}

    def ties(p):
        trimmed = ops.trim(p.task_vectors, thresholds[p.name])
        return p.base + scaling_factor * combine(trimmed, ops.elect_sign(trimmed, elect))

    return pool.map(ties, elementwise=True)
