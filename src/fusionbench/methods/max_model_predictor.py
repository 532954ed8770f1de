from __future__ import annotations

from fusionbench import ModelPool, method


@method("ensemble")
def max_model_predictor(pool: ModelPool):
    """Take, for every element of the output, the largest that any model gives."""
    from fusionbench.ensemble import Ensemble

    return Ensemble([pool.build(name) for name in pool], lambda outputs: outputs.amax(0))
