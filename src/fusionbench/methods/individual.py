from __future__ import annotations

from fusionbench import ModelPool, method


@method("reference")
def individual(pool: ModelPool) -> ModelPool:
    """Return all models as they are, each for its own task.

        f(x) = fᵢ(x),   x of task i

    That is what a single merged model can hope for.
    """
    return pool
