"""The matrix of a rank that is nearest to a difference of two weights, found by random projections.

Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 53, 2011, arXiv 0909.4061): a Gaussian
sketch of a few more columns than the rank, power iterations with a QR decomposition after every product, and an exact
singular value decomposition of what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import compute_dtype
from fusionbench.errors import InputError
from fusionbench.param import keyed_generator
from fusionbench.sources import BLOCK

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OVERSAMPLING = 10
POWER = 2
EXACT = 256  # matrices with a side up to this are decomposed exactly
PROBES = 32  # random vectors that measure what the sketch has missed ...
CERTAIN = 0.2  # ... by at most five times: their mean is less than this part of what it estimates in 3 cases of 10^6


class Difference:
    """One weight of a fine-tuned model less that of its base, as a matrix: of a kernel, its first side to all others.

    Args:
        tuned, base: the models.
        names: the weight's names in them.
        held: whether it is kept in memory, or read again for every product.
    """

    def __init__(self, tuned: Checkpoint, base: Checkpoint, names: tuple[str, str], *, held: bool) -> None:
        self._models, self._names = (tuned, base), names
        spec = tuned.specs[names[0]]
        self.shape = spec.shape[0], spec.numel // max(spec.shape[0], 1)
        self._dtype = compute_dtype(spec.dtype)
        self._held = None
        self.norm = 0.0
        kept = []
        for part in self._read():
            self.norm += float(part.double().square().sum())
            if held:
                kept.append(part)
        self.norm **= 0.5
        if self.norm != self.norm or self.norm == float("inf"):
            raise InputError(f"'{names[0]}' has NaN or Inf in one of the models, or is too large: nothing is written.")
        self._held = kept if held else None

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after others, in float64: `(rows, columns)`."""
        first = 0
        for part in self._read() if self._held is None else self._held:
            yield slice(first, first + len(part)), part.double()
            first += len(part)

    def times(self, right: Tensor) -> Tensor:
        """`D @ right`, `(rows, any)`."""
        out = right.new_empty(self.shape[0], right.shape[1])
        for rows, part in self.parts():
            out[rows] = part @ right
        return out

    def transposed_times(self, left: Tensor) -> Tensor:
        """`D.T @ left`, `(columns, any)`."""
        out = left.new_zeros(self.shape[1], left.shape[1])
        for rows, part in self.parts():
            out += part.T @ left[rows]
        return out

    def dense(self) -> Tensor:
        """All of it, in float64."""
        import torch

        return torch.cat([part for _, part in self.parts()])

    def _read(self) -> Iterator[Tensor]:
        rows, columns = self.shape
        step = max(4 * BLOCK // columns, 1) if columns else 1
        for first in range(0, rows, step):
            last = min(first + step, rows)
            new, old = (
                model.read(name, first * columns, last * columns).to(self._dtype)
                for model, name in zip(self._models, self._names, strict=True)
            )
            yield (new - old).reshape(last - first, columns)


@dataclass(frozen=True)
class Factors:
    """`left @ right.T`, near a difference D of the shape (rows, columns).

    Attributes:
        left, right: `(rows, rank)` and `(columns, rank)`, of equal column norms, in the dtype they are stored in.
        error: the Frobenius norm of `D - left @ right.T` over that of D, computed from these numbers as they are.
        least: no matrix of this rank has an error below it: a bound that fails with a probability below 3e-6.
    """

    left: Tensor
    right: Tensor
    error: float
    least: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def factorise(change: Difference, key: str, *, rank: int, energy: float | None = None, dtype: torch.dtype) -> Factors:
    """The matrix of a rank that is nearest to a difference in the Frobenius norm, as far as random projections find it.

    Args:
        change: the difference, which is not zero.
        key: of the random numbers.
        rank: of the result; at most that, where there is an energy.
        energy: the part of the squared norm to keep, 0 to 1, by the smallest rank that does.
        dtype: of the factors.
    """
    import torch

    rank = min(rank, *change.shape)
    sketch = min(rank + OVERSAMPLING, *change.shape)
    generator = keyed_generator(key)
    total = change.norm**2
    if min(change.shape) <= max(EXACT, 2 * sketch):
        left, values, right = torch.linalg.svd(change.dense(), full_matrices=False)
        right, missed = right.T, 0.0
    else:
        found = torch.randn(change.shape[1], sketch, generator=generator, dtype=torch.float64)
        range_ = torch.linalg.qr(change.times(found)).Q
        for _ in range(POWER):
            found = torch.linalg.qr(change.transposed_times(range_)).Q
            range_ = torch.linalg.qr(change.times(found)).Q
        right, values, core = torch.linalg.svd(change.transposed_times(range_), full_matrices=False)
        left = range_ @ core.T
        missed = _missed(change, range_, rank, max(total - float(values.square().sum()), 0.0), generator)
    if energy is not None:
        kept = values.square().cumsum(0) >= energy * total * (1 - 1e-12)
        rank = min(int((~kept).sum()) + 1, rank)
    root = values[:rank].sqrt()
    left, right = (left[:, :rank] * root).to(dtype), (right[:, :rank] * root).to(dtype)
    # Squares are known to some 1e-16 of the whole: what is less is rounding.
    least = max(total - float(values[:rank].square().sum()) - missed - 1e-13 * total, 0.0)
    across = right.double().T
    squares = sum(float((part - left[rows].double() @ across).square().sum()) for rows, part in change.parts())
    return Factors(left, right, squares**0.5 / change.norm, least**0.5 / change.norm)


def _missed(change: Difference, range_: Tensor, rank: int, left_out: float, generator: torch.Generator) -> float:
    """How much more of the squared norm any matrix of this rank can hold than the best within the sketch's range.

    With R what the range leaves out of D, the squared singular values of D are the eigenvalues of two terms: those of
    the part within, and of R.T R. The sum of the `rank` largest is at most the sum of each term's (Fan, 1949). Those of
    the second are at most its trace, `left_out`, and at most rank^(3/4) (tr (R.T R)^4)^(1/4), which is the mean of
    |(R.T R)^2 x|^2 over normal x. A mean of n such squares is less than c times what it estimates with a probability of
    at most (c e^(1 - c))^(n/2), whatever the matrix.
    """
    import torch

    x = torch.randn(change.shape[1], PROBES, generator=generator, dtype=torch.float64)
    for _ in range(2):
        y = change.times(x)
        x = change.transposed_times(y - range_ @ (range_.T @ y))
    moment = float(x.square().sum()) / PROBES / CERTAIN
    return min(left_out, rank**0.75 * moment**0.25)
