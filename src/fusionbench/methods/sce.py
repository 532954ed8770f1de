from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from fusionbench import Checkpoint, ModelPool, Param, method
from fusionbench.fuse import Selection, largest, products, require_fraction
from fusionbench.passes import Bytes, Numbers
from fusionbench.passes.reference import decode, selected, write
from fusionbench.registry import DENSITY


@dataclass(frozen=True)
class Erased:
    """The base and the weighted mean of what agrees with the sign of the sum of what is selected."""

    selection: Selection
    weights: Numbers
    normalize: bool
    base: bool = field(default=True, init=False)
    columns: int = field(default=1, init=False)

    @np.errstate(all="ignore")
    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        blocks = p.blocks(base=True)
        kept, values = selected(blocks, self.selection, p.start)
        values = np.where(kept, values, 0.0)
        agrees = values * np.sign(values.sum(0)) > 0  # every model's vote is unweighted
        merged = np.tensordot(self.weights, np.where(agrees, values, 0.0), 1)
        if self.normalize:
            divisor = self.weights @ agrees
            merged = merged / np.where(divisor > 0, divisor, 1.0)
        return write(decode(*blocks[0]) + merged, out, dtype) and bool(np.isfinite(values).all())


@method("merging", paper="2408.07990", base=True)
def sce(
    pool: ModelPool,
    *,
    density: Annotated[float, DENSITY, "fraction of elements that is selected"] = 0.1,
    normalize: Annotated[bool, "divide by the weights of the models whose element is left"] = True,
) -> Checkpoint:
    """Select the elements that differ most between models, weigh models by them, erase minorities (Wan et al., 2024).

    Per tensor: the round(density * n) elements of largest variance over the models, at least one, and all that equal
    the last of them; weights in proportion to the sum of squares of what is selected; then the weighted mean of
    what agrees with the sign of the unweighted sum. mergekit calls the density select_topk, rounds down, and has 1 by
    default; the paper's is 0.1.
    """
    pool.require_base()
    require_fraction("density", density)

    @np.errstate(all="ignore")
    def erased(p: Param) -> Erased:
        least = 0.0 if density == 1 else largest(p, [max(1, round(density * p.numel))], variance=True).item()
        selection = Selection(least_variance=least)
        squares = products(p, selection).diagonal()
        weights = squares / squares.sum() if squares.sum() != 0 else np.full(len(pool), 1 / len(pool))
        return Erased(selection, weights, normalize)

    return pool.fuse(erased)
