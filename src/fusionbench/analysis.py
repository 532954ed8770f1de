"""What pools and checkpoints look like inside: similarity of task vectors, differences between two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import as_float64

if TYPE_CHECKING:
    from torch import Tensor

    from fusionbench.pool import ModelPool


def task_vector_cosine(pool: ModelPool) -> Tensor:
    """Cosine of every two models' task vectors over all parameters: `(models, models)`, float64.

    A task vector of zero has cosine 0 with everything, itself included.
    """
    pool.require_base()

    def products(p) -> Tensor:
        vectors = p.task_vectors.double()
        return vectors @ vectors.T

    gram = pool.reduce(products)
    norms = gram.diagonal().sqrt()
    return (gram / (norms[:, None] * norms)).nan_to_num(0.0)


@dataclass(frozen=True)
class Difference:
    """Two tensors compared: norms, norm of the difference, cosine, the largest change of an element."""

    name: str
    norm_a: float
    norm_b: float
    norm_difference: float
    cosine: float
    largest: float

    @property
    def relative(self) -> float:
        """The norm of the difference against A's."""
        return self.norm_difference / self.norm_a if self.norm_a else float("inf") if self.norm_difference else 0.0


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Compare all tensors that both have in one shape, block by block in float64, then "all" of them together."""
    import numpy as np

    total, total_largest = np.zeros(4), 0.0
    for name, spec in a.specs.items():
        if name not in b or b.specs[b.resolve(name)].shape != spec.shape:
            continue
        sums, largest = np.zeros(4), 0.0
        for start, stop in a.blocks(name):
            x, y = (as_float64(model.block(name, start, stop)) for model in (a, b))
            sums += [x @ x, y @ y, (x - y) @ (x - y), x @ y]
            largest = max(largest, float(np.abs(x - y).max()))
        total, total_largest = total + sums, max(total_largest, largest)
        yield _difference(name, sums.tolist(), largest)
    yield _difference("all", total.tolist(), total_largest)


def _difference(name: str, sums: list[float], largest: float) -> Difference:
    aa, bb, dd, ab = sums
    scale = (aa * bb) ** 0.5
    return Difference(name, aa**0.5, bb**0.5, dd**0.5, ab / scale if scale else float(aa == bb), largest)
