from __future__ import annotations

from fusionbench import Checkpoint, ModelPool, method, ops


@method("merging", paper="2203.05482")
def simple_average(pool: ModelPool) -> Checkpoint:
    """Average the parameters of all models (Wortsman et al., 2022)."""
    equal = ops.model_weights(pool, None, normalize=True)
    return pool.map(lambda p: ops.weighted_sum(p.models, equal), elementwise=True)
