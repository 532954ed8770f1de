from __future__ import annotations

from fusionbench import Checkpoint, ModelPool, method


@method("merging", paper="2203.05482")
def simple_average(pool: ModelPool) -> Checkpoint:
    """Average the parameters of all models (Wortsman et al., 2022)."""
    return pool.map(lambda p: p.models.mean(0), elementwise=True)
