from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fusionbench import Checkpoint, ModelPool, method, ops


@method("merging", base=True, example="file=learned.json")
def apply_coefficients(
    pool: ModelPool, *, file: Annotated[Path, "what `adamerging` wrote with coefficients=FILE"]
) -> Checkpoint:
    """Merge with the coefficients that a file holds, learned before, without data.

        θ = θ₀ + Σᵢ λᵢ τᵢ

    There is a λᵢ for each tensor and model, and τᵢ is trimmed as it was when they were learned. Buffers, and parameters
    that the file does not name, are averaged.
    """
    from fusionbench.coefficients import read_coefficients

    pool.require_base()
    table = read_coefficients(file, pool)
    vectors = ops.trimmed_and_elected(pool, table.density)

    def merge(p):
        row = table.of(p.name)
        return ops.mean(p.models) if row is None else p.base + ops.combine(row, vectors(p))

    merged = pool.map(merge, elementwise=True)
    merged.recipe = {"coefficients": table.digest}  # so that a run that was killed goes on with the same only
    return merged
