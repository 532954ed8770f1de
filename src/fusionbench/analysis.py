"""What pools and checkpoints look like inside: similarity of task vectors, their layers, differences of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import as_float64
from fusionbench.layers import layer_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from fusionbench.param import Param
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
class Layer:
    """What fine-tuning changed in one layer.

    Attributes:
        name: what its tensors' names begin with.
        magnitudes: of each model, the norm of its task vector against that of the base's parameters.
        agreement: how far the models agree on signs, 0 to 1: of every element that any has changed, the surplus of one
            sign over the other, against the number of models that have changed it; the mean over elements.
        ranks: of each model, the mean effective rank of its task vector's matrices (Roy & Vetterli, 2007): the
            exponential of the entropy of the singular values, from 1 to the smaller side of the matrix; 0 where it has
            no matrix that changed.
    """

    name: str
    magnitudes: list[float]
    agreement: float
    ranks: list[float]


def layers(pool: ModelPool) -> list[Layer]:
    """Every layer of a pool's task vectors, in the order of the checkpoint, read tensor by tensor.

    A layer is what a number stands for in the tensors' names, as `encoder.layers.3`; the other tensors are by module.
    """
    pool.require_base()
    members: dict[str, list[str]] = {}
    for name in pool.floating:
        members.setdefault(layer_name(name), []).append(name)
    return [_layer(pool, layer, names) for layer, names in members.items()]


def effective_rank(matrix: NDArray[np.float64]) -> float:
    """The exponential of the entropy of a matrix's singular values, these divided by their sum; 0 of a zero matrix."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(small @ small.T), 0, None))
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _layer(pool: ModelPool, layer: str, names: list[str]) -> Layer:
    squares, base, votes, changed = np.zeros(len(pool)), 0.0, 0.0, 0

    def look(p: Param) -> NDArray[np.float64]:
        first, *others = (as_float64(block) for block in p.blocks(base=True))
        vectors = np.stack(others) - first
        signs = np.sign(vectors)
        cast = np.abs(signs).sum(0)
        surplus = np.abs(signs.sum(0))[cast > 0] / cast[cast > 0]
        return np.array([*(vectors**2).sum(1), first @ first, surplus.sum(), len(surplus)])

    *squares, base, votes, changed = pool.reduce(look, names).tolist()
    found: list[list[float]] = []
    for name in names:
        shape = pool.reference.specs[name].shape
        if len(shape) > 1 and min(shape[0], pool.reference.specs[name].numel // max(shape[0], 1)) > 1:
            first, *others = (as_float64(block) for block in pool.param(name).blocks(base=True))
            found.append([effective_rank((other - first).reshape(shape[0], -1)) for other in others])
    ranks = [float(np.mean([rank for rank in column if rank] or [0.0])) for column in zip(*found, strict=True)]
    scale = base**0.5
    magnitudes = [square**0.5 / scale if scale else float(square > 0) for square in squares]
    return Layer(layer, magnitudes, votes / changed if changed else 0.0, ranks or [0.0] * len(pool))


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
