"""The operations that merging methods are made of, on tensors whose dimension 0 runs over models.

They are for methods that are written, or learn, in torch; static merges are made of the passes of `fusionbench.fuse`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionbench import fuse
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fusionbench.param import Param
    from fusionbench.pool import ModelPool


def weighted_sum(models: Tensor, weights: Tensor) -> Tensor:
    """Sum over models, each times its weight; `weights` is `(number of models,)`, float64.

    Computed as the first model and the weighted differences from it. Fine-tuned models lie close together, so that
    this is more precise than adding them up; and copies of one model, with weights of sum one, give just that model.
    """
    total = round(float(weights.sum()), 12)  # one, not one but for rounding
    weights = weights.to(models).reshape(-1, *[1] * (models.dim() - 1))
    return total * models[0] + (weights * (models - models[0])).sum(0)


def mean(models: Tensor) -> Tensor:
    """The mean over models; exact for copies of one model."""
    return models[0] + (models - models[0]).mean(0)


def trim(task_vectors: Tensor, threshold: Tensor) -> Tensor:
    """Set to zero what is smaller than the model's threshold; `threshold` is `(number of models,)`."""
    threshold = threshold.reshape(-1, *[1] * (task_vectors.dim() - 1))
    # Compared in the threshold's float32: a float64 magnitude may lie below its own rounding.
    return task_vectors.where(task_vectors.abs().to(threshold.dtype) >= threshold, 0.0)


def elect_sign(task_vectors: Tensor) -> Tensor:
    """Let the models vote on the sign of every element, by its magnitude: -1, 0 or 1, without dimension 0.

    Zeros do not vote; a tie elects 0, with which nobody agrees.
    """
    return task_vectors.sum(0).sign()


def trimmed_and_elected(pool: ModelPool, density: float) -> Callable[[Param], Tensor]:
    """What TIES leaves of the task vectors: the largest, where they agree with the elected sign; all at density 1."""
    if density == 1:
        return lambda p: p.task_vectors
    import torch

    threshold = torch.from_numpy(fuse.threshold(pool, density))

    def vectors(p: Param) -> Tensor:
        trimmed = trim(p.task_vectors, threshold)
        return _agreeing(trimmed, elect_sign(trimmed))

    return vectors


def combine(coefficients: Tensor, task_vectors: Tensor) -> Tensor:
    """The sum of task vectors, `(models, *shape)`, each times its coefficient."""
    flat = task_vectors.reshape(len(task_vectors), -1)
    return (coefficients.to(task_vectors) @ flat).reshape(task_vectors.shape[1:])


def relaxed_mask(logits: Tensor, temperature: float, key: str = "") -> Tensor:
    """A mask of mean 1, shared by all models: relaxed Bernoulli variables (Maddison et al., 2017) over their mean.

    Args:
        logits: of the probabilities that elements are kept.
        temperature: near 0, what is sampled is nearly 0 or 1.
        key: of the random numbers; without it, the probabilities themselves are the mask.
    """
    import torch

    from fusionbench.param import keyed_generator

    if key:
        uniform = torch.empty(logits.shape).uniform_(1e-6, 1 - 1e-6, generator=keyed_generator(key))
        mask = ((logits + uniform.logit()) / temperature).sigmoid()
    else:
        mask = logits.sigmoid()
    return mask / mask.mean().clamp(min=1e-20)  # few elements may all be 0; the gradient stays finite, too


def _agreeing(task_vectors: Tensor, sign: Tensor) -> Tensor:
    return task_vectors.where(task_vectors * sign > 0, 0.0)


def least_squares_mean(matrices: Tensor, grams: Tensor, *, off_diagonal: float, damping: float) -> Tensor:
    """The matrix whose outputs are nearest, in squares, to those that each model has on inputs of its own.

    That is `(sum_i W_i G_i) (sum_i G_i)^-1`. What no model has inputs for is averaged: the damping pulls towards the
    mean, so that features that are always zero do no harm.

    Args:
        matrices: `(models, out, in)`.
        grams: `X^T X / n` of each model's inputs, `(models, in, in)`.
        off_diagonal: what the Gram matrices' elements off the diagonal are multiplied by, from 0 to 1.
        damping: strength of the pull towards the mean, in units of the mean of the diagonal.

    Raises:
        InputError: where a matrix or a Gram matrix has a number that is not finite.
    """
    import torch

    if not (matrices.isfinite().all() and grams.isfinite().all()):
        raise InputError(
            "There is no mean by least squares where weights, or the inputs of a linear layer on calibration data, are "
            "NaN, infinite or too large. Mend the model or its data, or use a method that needs none."
        )
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
