from __future__ import annotations

from fusionbench import Checkpoint, ModelPool, method


@method("reference", base=True)
def pretrained(pool: ModelPool) -> Checkpoint:
    """Return the base model as it is.

        θ = θ₀

    That is what every task starts from.
    """
    return pool.require_base()
