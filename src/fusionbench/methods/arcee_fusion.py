from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fusionbench import Checkpoint, ModelPool, Param, method
from fusionbench.dtypes import as_float64
from fusionbench.fuse import AT_ONCE, by_parts, require_models, value_of_rank
from fusionbench.param import summed
from fusionbench.passes import LOW_BITS, Bytes, Numbers
from fusionbench.passes.reference import write


@dataclass(frozen=True)
class Important:
    """The model's elements whose importance reaches a threshold, and else the base's."""

    columns: int
    threshold: float
    base: bool = field(default=True, init=False)

    def run(self, p: Param, out: Bytes, dtype: str) -> bool:
        return by_parts(self._run, p, out, dtype, self.columns)

    @np.errstate(all="ignore")
    def _run(self, p: Param, out: Bytes, dtype: str) -> bool:
        base, model = (as_float64(block) for block in p.blocks(base=True))
        merged = np.where(importance(base, model, self.columns) >= self.threshold, model, base)
        return write(merged, out, dtype) and bool(np.isfinite(base).all() and np.isfinite(model).all())


@method("merging", base=True, example="zoo:t5-mini/base zoo:t5-mini/spam")
def arcee_fusion(pool: ModelPool) -> Checkpoint:
    """Take the model's elements where the change is important, and the base's elsewhere (Arcee AI, 2025).

        I = |θ₁ - θ₀| KL(softmax of row of θ₁, softmax of row of θ₀)
        θ = θ₁ where I ≥ Q₂ + 1.5 (Q₃ - Q₁), else θ₀

    I is the importance of an element, whose row is along the last dimension; Q₁, Q₂ and Q₃ are the quartiles of I in
    its tensor. These are exact, of importances rounded to float32, and found by counting; mergekit's are those of a
    random million elements where there are more.
    """
    pool.require_base()
    require_models(pool, 1, "arcee_fusion takes, beside the base,", "leave the others out")

    def important(p: Param) -> Important:
        columns = p.shape[-1] if p.shape else 1
        lower, median, upper = quartiles(p, columns)
        return Important(columns, median + 1.5 * (upper - lower))

    return pool.fuse(important)


def importance(base: Numbers, model: Numbers, columns: int) -> NDArray[np.float32]:
    rows, others = base.reshape(-1, columns), model.reshape(-1, columns)
    log_p, log_q = log_softmax(others), log_softmax(rows)
    divergence = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1, keepdims=True), 0)
    return (np.abs(others - rows) * divergence).reshape(-1).astype(np.float32)


def log_softmax(rows: Numbers) -> Numbers:
    rows = rows - rows.max(1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def quartiles(p: Param, columns: int) -> list[float]:
    """Those of importance: of the elements in ascending order, the last that is not beyond each quarter of the way."""
    ascending = np.array([p.numel - 1, 2 * (p.numel - 1), 3 * (p.numel - 1)]) // 4

    def count(prefixes: NDArray[np.int64] | None) -> NDArray[np.int64]:
        @np.errstate(all="ignore")
        def look(part: Param) -> NDArray[np.int64]:
            base, model = (as_float64(block) for block in part.blocks(base=True))
            part.check(bool(np.isfinite(base).all() and np.isfinite(model).all()))
            bits = importance(base, model, columns).view(np.uint32) & np.uint32(2**31 - 1)
            high, low = bits >> LOW_BITS, bits & np.uint32(2**LOW_BITS - 1)
            if prefixes is None:
                return np.stack([np.bincount(high, minlength=2 ** (31 - LOW_BITS))] * 3)
            return np.stack([np.bincount(low[high == prefix], minlength=2**LOW_BITS) for prefix in prefixes])

        return p.reduce(lambda q: summed(map(look, q.parts(q.start, q.stop, columns, AT_ONCE))), columns)

    return value_of_rank(count, p.numel - ascending).tolist()
