from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, method


@method("merging", paper="2212.04089")
def task_arithmetic(
    pool: ModelPool,
    *,
    scaling_factor: Annotated[float, Range(), "what the sum of the task vectors is multiplied by"] = 0.3,
) -> Checkpoint:
    """Add the scaled sum of all task vectors to the base model (Ilharco et al., 2023)."""
    pool.require_base()
    return pool.map(lambda p: p.base + scaling_factor * p.task_vectors.sum(0), elementwise=True)
