from __future__ import annotations

from fusionbench import Checkpoint, ModelPool, method
from fusionbench.fuse import Models


@method("merging", paper="2203.05482")
def simple_average(pool: ModelPool) -> Checkpoint:
    """Average the parameters of all models (Wortsman et al., 2022).

        θ = 1/N Σᵢ θᵢ

    All models count the same; `weighted_average` gives them weights.
    """
    return pool.fuse(Models([1.0] * len(pool), divisor=len(pool)))
