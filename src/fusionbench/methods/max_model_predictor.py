from __future__ import annotations

from fusionbench import ModelPool, method


@method("ensemble")
def max_model_predictor(pool: ModelPool):
    """Take the largest output of all models.

        f(x) = maxᵢ fᵢ(x)

    That is for every element of the output by itself.
    """
    from fusionbench.ensemble import Ensemble

    return Ensemble([pool.build(name) for name in pool], lambda outputs: outputs.amax(0))
