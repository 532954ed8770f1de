from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np

from fusionbench import Checkpoint, ModelPool, Param, method
from fusionbench.fuse import Selection, by_parts, largest, products, require_fraction
from fusionbench.passes import Bytes, Numbers
from fusionbench.passes.reference import decode, selected, write
from fusionbench.registry import DENSITY


@dataclass(frozen=True)
class Erased:
    """The base and the weighted mean of what agrees with the sign of the sum of what is selected."""

    selection: Selection
    weights: Numbers
    normalize: bool
    on_tie: float = 0.0
    base: bool = field(default=True, init=False)
    columns: int = field(default=1, init=False)

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        return by_parts(self._run, p, out, dtype)

    @np.errstate(all="ignore")
    def _run(self, p: Param, out: Bytes, dtype: str) -> bool:
        blocks = p.blocks(base=True)
        kept, values = selected(blocks, self.selection, p.start)
        values = np.where(kept, values, 0.0)
        total = values.sum(0)
        agrees = values * np.where(total == 0, self.on_tie, np.sign(total)) > 0  # every model's vote is unweighted
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
    convention: Annotated[Literal["paper", "mergekit"], "of counts, of ties and of small weights"] = "paper",
) -> Checkpoint:
    """Select the elements that differ most between models, weigh models by them, erase minorities (Wan et al., 2024).

        m  = [variance over the models ≥ its (1 - d)-quantile]
        wᵢ = ‖m ⊙ τᵢ‖² / Σⱼ ‖m ⊙ τⱼ‖²
        aᵢ = m [τᵢ s > 0],   s = sgn Σᵢ m τᵢ
        θ  = θ₀ + Σᵢ wᵢ aᵢ τᵢ / Σᵢ wᵢ aᵢ

    Per tensor of n elements, m is 1 for round(density * n), at least one, and all that equal the last of them, and else
    0. mergekit calls the density select_topk, and has 1 by default; the paper's is 0.1. By its convention the density
    is of the elements that vary at all, rounded down, and where that is none the base stays; weights are equal where
    the mean squares sum to less than 1e-6; and of votes that cancel, the positive win.
    """
    pool.require_base()
    require_fraction("density", density)

    @np.errstate(all="ignore")
    def erased(p: Param) -> Erased:
        keep = max(1, round(density * p.numel)) if convention == "paper" else int(density * varying(p))
        least = 0.0 if density == 1 else largest(p, [keep], variance=True).item() if keep else np.inf
        selection = Selection(least_variance=least)
        squares = products(p, selection).diagonal()
        enough = squares.sum() != 0 if convention == "paper" else squares.sum() / p.numel >= 1e-6
        weights = squares / squares.sum() if enough else np.full(len(pool), 1 / len(pool))
        return Erased(selection, weights, normalize, on_tie=0.0 if convention == "paper" else 1.0)

    return pool.fuse(erased)


def varying(p: Param) -> int:
    """How many elements vary over the models."""

    def look(part: Param) -> int:
        counts, finite = part.passes.histogram(part.blocks(base=True), None, Selection(), part.start, variance=True)
        part.check(finite)
        return part.numel - int(counts[0, 0])  # the first counts zeros, and what is nearly zero

    return p.reduce(look)
