"""The operations that merging methods are made of, on tensors whose dimension 0 runs over models.

Everything a static merge does is one of two passes: a reduction that yields a few numbers (`magnitude_threshold`), then
a pass over blocks (`trim`, `elect_sign`, `disjoint_*`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fusionbench.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fusionbench.pool import ModelPool, Param

_LOW_BITS = 16  # a float32 magnitude has 31 bits: 15 counted in the first pass, 16 in the second


def weighted_sum(models: Tensor, weights: Tensor) -> Tensor:
    """Sum over models, each times its weight; `weights` is `(number of models,)`, float64.

    Computed as the first model and the weighted differences from it. Fine-tuned models lie close together, so that
    this is more precise than adding them up; and copies of one model, with weights of sum one, give just that model.
    """
    total = round(float(weights.sum()), 12)  # one, not one but for rounding
    weights = weights.to(models.dtype).reshape(-1, *[1] * (models.dim() - 1))
    return total * models[0] + (weights * (models - models[0])).sum(0)


def mean(models: Tensor) -> Tensor:
    """The mean over models; exact for copies of one model."""
    return models[0] + (models - models[0]).mean(0)


def trim(task_vectors: Tensor, threshold: Tensor) -> Tensor:
    """Set to zero what is smaller than the model's threshold; `threshold` is `(number of models,)`."""
    threshold = threshold.reshape(-1, *[1] * (task_vectors.dim() - 1))
    # Compared in the threshold's float32: a float64 magnitude may lie below its own rounding.
    return task_vectors.where(task_vectors.abs().to(threshold.dtype) >= threshold, 0.0)


def elect_sign(task_vectors: Tensor, by: Literal["mass", "count"] = "mass") -> Tensor:
    """Let the models vote on the sign of every element: -1, 0 or 1, without dimension 0.

    A vote weighs its magnitude (`mass`) or one (`count`); zeros do not vote. A tie by count is settled by mass; a tie
    by mass elects 0, with which nobody agrees.
    """
    mass = task_vectors.sum(0).sign()
    if by == "mass":
        return mass
    count = task_vectors.sign().sum(0).sign()
    return count.where(count != 0, mass)


def trimmed_and_elected(pool: ModelPool, density: float) -> Callable[[Param], Tensor]:
    """What TIES leaves of the task vectors: the largest, where they agree with the elected sign; all at density 1."""
    if density == 1:
        return lambda p: p.task_vectors
    threshold = magnitude_threshold(pool, density)

    def vectors(p: Param) -> Tensor:
        trimmed = trim(p.task_vectors, threshold)
        return _agreeing(trimmed, elect_sign(trimmed))

    return vectors


def combine(coefficients: Tensor, task_vectors: Tensor) -> Tensor:
    """The sum of task vectors, `(models, *shape)`, each times its coefficient."""
    return (coefficients.to(task_vectors) @ task_vectors.flatten(1)).reshape(task_vectors.shape[1:])


def relaxed_mask(logits: Tensor, temperature: float, key: str = "") -> Tensor:
    """A mask of mean 1, shared by all models: relaxed Bernoulli variables (Maddison et al., 2017) over their mean.

    Args:
        logits: of the probabilities that elements are kept.
        temperature: near 0, what is sampled is nearly 0 or 1.
        key: of the random numbers; without it, the probabilities themselves are the mask.
    """
    import torch

    from fusionbench.pool import keyed_generator

    if key:
        uniform = torch.empty(logits.shape).uniform_(1e-6, 1 - 1e-6, generator=keyed_generator(key))
        mask = ((logits + uniform.logit()) / temperature).sigmoid()
    else:
        mask = logits.sigmoid()
    return mask / mask.mean()


def disjoint_sum(task_vectors: Tensor, sign: Tensor) -> Tensor:
    """Sum, for every element, the models that agree with its sign."""
    return _agreeing(task_vectors, sign).sum(0)


def disjoint_mean(task_vectors: Tensor, sign: Tensor) -> Tensor:
    """Average, for every element, the models that agree with its sign; 0 where none does."""
    agreeing = _agreeing(task_vectors, sign)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def disjoint_max(task_vectors: Tensor, sign: Tensor) -> Tensor:
    """Of the models that agree with an element's sign, the largest magnitude, with that sign."""
    return _agreeing(task_vectors, sign).abs().amax(0) * sign


def _agreeing(task_vectors: Tensor, sign: Tensor) -> Tensor:
    return task_vectors.where(task_vectors * sign > 0, 0.0)


def magnitude_threshold(pool: ModelPool, density: float, names: list[str] | None = None) -> Tensor:
    """The magnitude that the largest `density` of each model's task vector reaches: `(number of models,)`, float32.

    Of n elements, k = round(density * n), at least 1, are to be kept; the threshold is the k-th largest magnitude, so
    that `>= threshold` keeps k elements, and all those equal to the k-th. It is exact, found by counting bit patterns
    in two passes over blocks: memory does not grow with the models. Tied weights count once, integers not at all.

    Args:
        pool: the models and their base.
        density: the fraction to keep, in (0, 1].
        names: the parameters to look at together; all by default.
    """
    import torch

    if not 0 < density <= 1:
        raise InputError(f"density must be in (0, 1], the fraction that is kept; got {density}.")
    specs = pool.reference.specs
    names = [name for name, spec in specs.items() if spec.floating] if names is None else names
    numel = sum(specs[name].numel for name in names)
    keep = torch.full((len(pool), 1), max(1, round(density * numel)))
    if density == 1 or numel == 0:
        return torch.zeros(len(pool))

    # Magnitudes in float32, read as integers, are in the same order.
    high_counts = pool.reduce(lambda p: _histogram(_bits(p) >> _LOW_BITS, 2 ** (31 - _LOW_BITS)), names)
    high, above = _bin_of_kth_largest(high_counts, keep)

    def count_low_bits(p: Param) -> Tensor:
        bits = _bits(p)
        low = (bits & (2**_LOW_BITS - 1)).where(bits >> _LOW_BITS == high, 2**_LOW_BITS)  # the last bin is for others
        return _histogram(low, 2**_LOW_BITS + 1)[:, :-1]

    low, _ = _bin_of_kth_largest(pool.reduce(count_low_bits, names), keep - above)
    return (high << _LOW_BITS | low).to(torch.int32).view(torch.float32).reshape(-1)


def _bits(p: Param) -> Tensor:
    import torch

    return p.task_vectors.abs().float().reshape(len(p.task_vectors), -1).view(torch.int32)


def _histogram(values: Tensor, bins: int) -> Tensor:
    """Count the values of every row: `(rows, bins)`."""
    import torch

    rows = torch.arange(len(values), dtype=torch.int32).reshape(-1, 1)
    return torch.bincount((values + rows * bins).reshape(-1), minlength=len(values) * bins).reshape(-1, bins)


def _bin_of_kth_largest(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """For every row of counts, the bin that holds the k-th largest value, and how many values are above that bin."""
    reached = counts.flip(1).cumsum(1)  # values in this bin or higher ones, from the highest bin down
    place = (reached < k).sum(1, keepdim=True)
    found = counts.shape[1] - 1 - place
    return found, reached.gather(1, place) - counts.gather(1, found)


def model_weights(pool: ModelPool, weights: list[float] | dict[str, float] | None, normalize: bool) -> Tensor:
    """A weight per model, `(number of models,)`, float64: as given in the pool's order or by name, or all equal."""
    import torch

    if weights is None:
        weights = [1.0] * len(pool) if normalize else [1 / len(pool)] * len(pool)
    if isinstance(weights, dict):
        for name in weights:
            pool[name]  # an unknown name is an error
        missing = [name for name in pool if name not in weights]
        if missing:
            raise InputError(f"weights has no number for '{missing[0]}': give one for every model of the pool.")
        weights = [weights[name] for name in pool]
    if len(weights) != len(pool):
        raise InputError(f"weights has {len(weights)} numbers, but the pool has {len(pool)} models.")
    result = torch.tensor(weights, dtype=torch.float64)
    total = result.sum()
    if normalize and abs(total) < 1e-8:
        raise InputError(f"weights sum to {float(total):g} and cannot be normalised: set normalize=false.")
    return result / total if normalize else result


def least_squares_mean(matrices: Tensor, grams: Tensor, *, off_diagonal: float, damping: float) -> Tensor:
    """The matrix whose outputs are nearest, in squares, to those that each model has on inputs of its own.

    That is `(sum_i W_i G_i) (sum_i G_i)^-1`. What no model has inputs for is averaged: the damping pulls towards the
    mean, so that features that are always zero do no harm.

    Args:
        matrices: `(models, out, in)`.
        grams: `X^T X / n` of each model's inputs, `(models, in, in)`.
        off_diagonal: what the Gram matrices' elements off the diagonal are multiplied by, from 0 to 1.
        damping: strength of the pull towards the mean, in units of the mean of the diagonal.
    """
    import torch

    grams = off_diagonal * grams.double() + (1 - off_diagonal) * torch.diag_embed(
        grams.diagonal(dim1=1, dim2=2).double()
    )
    changes = (matrices - matrices[0]).double()  # solved for these, copies of one matrix give just that matrix
    total, wanted, mean = grams.sum(0), (changes @ grams).sum(0), changes.mean(0)
    scale = float(total.diagonal().mean()) or 1.0
    while True:
        strength = damping * scale
        factor, failed = torch.linalg.cholesky_ex(total + strength * torch.eye(len(total), dtype=total.dtype))
        if not failed:
            return matrices[0] + torch.cholesky_solve((wanted + strength * mean).mT, factor).mT.to(matrices.dtype)
        damping *= 10  # rounding has made the sum indefinite
