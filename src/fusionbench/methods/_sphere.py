"""Interpolation on the sphere, of tensors whose dot products are known: every result is a weighted sum of them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fusionbench import ModelPool, Param
from fusionbench.fuse import Models, TaskVectors, products
from fusionbench.passes import Numbers

Convention = Literal["sphere", "mergekit"]
On = Literal["models", "task_vectors"] | None
ON = "what is interpolated; by default the task vectors where the pool has a base, and else the models"


def on_task_vectors(pool: ModelPool, on: On) -> bool:
    """Whether to look at task vectors; an error where there can be none."""
    if on == "task_vectors":
        pool.require_base()
    return pool.base is not None if on is None else on == "task_vectors"


def gram_of(p: Param, task_vectors: bool) -> Numbers:
    """Dot products of the models, or of their task vectors: `(models, models)`."""
    return products(p, differences=task_vectors)


def weighted(weights: Numbers, task_vectors: bool) -> Models | TaskVectors:
    return TaskVectors(weights.tolist()) if task_vectors else Models(weights.tolist())


@np.errstate(all="ignore")
def slerp_weights(gram: Numbers, t: float, *, keep_lengths: bool = True, straight: float = 1 - 1e-15) -> Numbers:
    """Weights of two tensors, `t` of the way from the first to the second.

    Args:
        gram: their dot products.
        t: 0 for the first, 1 for the second.
        keep_lengths: interpolate directions, and lengths linearly; or else weigh the tensors as if both had length 1.
        straight: where the cosine is above, or below minus that, the way is a straight line; so it is where a tensor
            has no direction, because it is zero, and between opposites, which no one arc joins.
    """
    line = np.array([1 - t, t])
    lengths = np.sqrt(gram.diagonal())
    if not lengths.all():
        return line
    cosine = np.clip(gram[0, 1] / (lengths[0] * lengths[1]), -1, 1)
    rescale = line @ lengths / lengths if keep_lengths else np.ones(2)
    if cosine > straight:
        return line * rescale
    if cosine < -min(straight, 1 - 1e-12):  # the angle itself is not known well enough
        return line
    angle = np.arccos(cosine)
    return np.sin(line * angle) / np.sin(angle) * rescale


@np.errstate(all="ignore")
def mean_weights(gram: Numbers, weights: Numbers, *, steps: int = 1000, tolerance: float = 1e-14) -> Numbers:
    """Weights of tensors whose weighted sum is their mean on the sphere, of the mean of their lengths.

    The direction is the Karcher mean of the tensors' directions: where the weighted sum of the arcs to them vanishes.
    It is found by going along that sum, from the direction of the weighted sum. All points on the way are weighted
    sums of the directions, so that their dot products are all one needs.

    Args:
        gram: dot products of every two tensors.
        weights: of the tensors, which sum to one.
        steps: at most; with none, it stops at the direction of the weighted sum.
        tolerance: the length of a step that is not gone any more.
    """
    lengths = np.sqrt(gram.diagonal())
    found = lengths != 0  # a tensor of zeros has no direction
    share = np.where(found, weights, 0)
    cosines = gram / np.where(found, lengths, 1) / np.where(found, lengths, 1)[:, None]
    length = np.sqrt(share @ cosines @ share)
    if length <= 1e-12:  # opposites cancel, or there is nothing but zeros
        return weights
    mean = share / length
    share = share / share.sum()
    for _ in range(steps):
        towards = np.clip(cosines @ mean, -1, 1)
        angle = np.arccos(towards)
        sine = np.sin(angle)
        pull = share * np.where(sine > 1e-8, angle / sine, towards > 0)
        step = pull - (pull @ towards) * mean
        size = np.sqrt(max(step @ cosines @ step, 0))
        if not size > tolerance:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / np.sqrt(mean @ cosines @ mean)
    return mean * (weights @ lengths) / np.where(found, lengths, 1)
