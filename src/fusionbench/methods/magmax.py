from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, method
from fusionbench.fuse import Masked, Selection, combination
from fusionbench.registry import SCALING


@method("merging", paper="2407.06322", ordered=True, base=True)
def magmax(
    pool: ModelPool,
    *,
    scaling_factor: Annotated[float, SCALING, "what the merged task vector is multiplied by"] = 0.5,
) -> Checkpoint:
    """Add, element by element, the task vector's value of largest magnitude to the base (Marczak et al., 2024).

        θ = θ₀ + λ τₘ,   m = argmaxᵢ |τᵢ| for each element

    The default is that of the authors' script for eight data sets. Where magnitudes are equal, the first model's value
    is taken (theirs takes the last): the models' order matters where their signs differ.
    """
    return pool.fuse(Masked(Selection(), combination(len(pool), combine="max", scaling=scaling_factor)))
