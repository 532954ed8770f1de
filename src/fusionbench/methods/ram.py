from __future__ import annotations

from typing import Annotated

import numpy as np

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.fuse import Masked, Selection, combination


@method("merging", paper="2601.13572", base=True)
def ram(
    pool: ModelPool, *, epsilon: Annotated[float, Range(0), "an element has changed if by more than this"] = 1e-5
) -> Checkpoint:
    """Keep what one model alone has changed whole, and average what several have (Yuan et al., 2026).

        mᵢ = [|τᵢ| > ε]
        θ  = θ₀ + Σᵢ mᵢ τᵢ / Σᵢ mᵢ

    Where no model has changed an element, the base stays. The paper's RAM+, which makes more of what is unique the more
    is shared, is not in here.
    """
    least = np.nextafter(np.array([epsilon], np.float32), np.float32(np.inf))
    return pool.fuse(Masked(Selection(low=least), combination(len(pool), combine="mean")))
