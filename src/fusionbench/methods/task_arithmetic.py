from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, method
from fusionbench.fuse import TaskVectors
from fusionbench.registry import SCALING


@method("merging", paper="2212.04089", base=True)
def task_arithmetic(
    pool: ModelPool,
    *,
    scaling_factor: Annotated[float, SCALING, "what the sum of the task vectors is multiplied by"] = 0.3,
) -> Checkpoint:
    """Add the scaled sum of all task vectors to the base model (Ilharco et al., 2023).

        θ = θ₀ + λ Σᵢ τᵢ

    With λ = 1/N it is the average.
    """
    return pool.fuse(TaskVectors([scaling_factor] * len(pool)))
