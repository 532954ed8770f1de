"""mergekit's methods under its names and conventions: their parameters, and the passes that they are.

Facts are those of mergekit 0.1.5's behaviour. What differs from it on purpose is in docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isclose, prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusionbench.checkpoint import Checkpoint
from fusionbench.fuse import Elementwise, Masked, Models, Selection, TaskVectors, combination, largest, sums
from fusionbench.methods._sphere import gram_of, mean_weights, slerp_weights, weighted
from fusionbench.methods.arcee_fusion import arcee_fusion
from fusionbench.methods.della import chances_by_rank
from fusionbench.methods.model_stock import model_stock
from fusionbench.methods.ram import ram
from fusionbench.methods.sce import sce
from fusionbench.methods.slerp import slerp
from fusionbench.param import Param
from fusionbench.passes import ALWAYS, Combination, Numbers
from fusionbench.pool import ModelPool
from fusionbench.registry import Range

Scope = Literal["merge", "model"]
Base = Literal["base", "optional", "first", "model"]
Values = Mapping[str, Any]
"""Of the parameters of a method by name: one value, or a list with one for each model of the pool; and the seed."""
SMALLEST = 1e-7  # sums of magnitudes below are not restored
ZERO = 1e-8  # weights that sum to less are not divided by
WEIGHT, FRACTION, POSITIVE = Range(), Range(0, 1), Range(0)


@dataclass(frozen=True)
class Parameter:
    """What a method takes under `parameters`.

    Attributes:
        kind: of its values.
        scope: one for the merge of a tensor, or one for each model (not the base, where the method has one).
        default: None where it must be given.
        range: of numbers.
    """

    kind: Literal["number", "whole", "flag"]
    scope: Scope = "merge"
    default: float | bool | None = None
    range: Range | None = None


@dataclass(frozen=True)
class RecipeMethod:
    """A method of mergekit's.

    Attributes:
        merge: of a pool, and the values of its parameters.
        base: whether the base model is the base, may be (optional), is the first of the models, or one like others.
        least, most: models, the base left out where it is one.
        parameters: by name.
        check: what is wrong with values, in one line; empty where nothing is.
    """

    merge: Callable[[ModelPool, Values], Checkpoint]
    base: Base
    least: int
    most: int | None
    parameters: Mapping[str, Parameter]
    check: Callable[[Values], str] = field(default=lambda values: "")


def _flag(default: bool) -> Parameter:
    return Parameter("flag", default=default)


WEIGHTS = {"weight": Parameter("number", "model", None, WEIGHT)}


def linear(pool: ModelPool, values: Values) -> Checkpoint:
    weights = values["weight"]
    return pool.fuse(Models(weights, divisor=sum(weights) if values["normalize"] else 1.0))


def _slerp(pool: ModelPool, values: Values) -> Checkpoint:
    return slerp(pool, t=values["t"], convention="mergekit")


def nuslerp(pool: ModelPool, values: Values) -> Checkpoint:
    first, second = values["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    task_vectors = pool.base is not None

    def interpolated(p: Param) -> Models | TaskVectors | Elementwise:
        if values["nuslerp_flatten"] or len(p.shape) < 2:
            return weighted(slerp_weights(gram_of(p, task_vectors), t, keep_lengths=False), task_vectors)
        if not values["nuslerp_row_wise"]:
            return along(lambda rows: arcs((rows * rows[[1, 0]]).sum(-1), (rows * rows).sum(-1), t), p, task_vectors)

        def dots(part: Param) -> Numbers:
            a, b = vectors(part, task_vectors).reshape(2, -1, columns)
            return np.stack([(a * b).sum(0), (a * a).sum(0), (b * b).sum(0)])

        columns = prod(p.shape[1:])
        ab, aa, bb = p.reduce(dots, columns)
        found = arcs(np.stack([ab, ab]), np.stack([aa, bb]), t)[:, None, :]  # (2, 1, columns)
        return along(lambda rows: found, p, task_vectors, columns)

    return pool.fuse(interpolated)


def multislerp(pool: ModelPool, values: Values) -> Checkpoint:
    weights = np.array(values["weight"], np.float64)
    weights = weights / weights.sum() if values["normalize_weights"] else weights
    task_vectors = pool.base is not None
    if len(weights) == 1:
        return pool.fuse(Models([1.0]))

    def mean(p: Param) -> Models | TaskVectors:
        return weighted(mean_weights(gram_of(p, task_vectors), weights, steps=0), task_vectors)

    return pool.fuse(mean)


def karcher(pool: ModelPool, values: Values) -> Checkpoint:
    shares = np.full(len(pool), 1 / len(pool))

    def mean(p: Param) -> Models:
        gram = gram_of(p, task_vectors=False)
        return Models(mean_weights(gram, shares, steps=values["max_iter"], tolerance=values["tol"]).tolist())

    return pool.fuse(mean)


def _model_stock(pool: ModelPool, values: Values) -> Checkpoint:
    if not values["filter_wise"]:
        return model_stock(pool)
    count = len(pool)

    @np.errstate(all="ignore")
    def stock(rows: Numbers) -> Numbers:  # (models, rows, columns) of the task vectors
        gram = np.einsum("irc,jrc->rij", rows, rows)
        lengths = np.sqrt(np.einsum("rii->ri", gram))
        cosines = gram / np.maximum(lengths[:, :, None] * lengths[:, None, :], np.finfo(np.float64).tiny)
        cosine = cosines[:, *np.triu_indices(count, 1)].mean(1)
        below = 1 + (count - 1) * cosine
        ratio = np.where(below < 1e-12, 0.0, count * cosine / below)
        return np.broadcast_to(ratio / count, (count, len(ratio)))

    return pool.fuse(lambda p: along(stock, p, True))


def nearswap(pool: ModelPool, values: Values) -> Checkpoint:
    def near(blocks: Numbers) -> Numbers:
        base, model = blocks
        weight = np.clip(values["t"] / np.maximum(np.abs(model - base), 1e-6), 0, 1)
        return np.where(weight == 1, model, base + weight * (model - base))

    return pool.fuse(Elementwise(near))


def _sce(pool: ModelPool, values: Values) -> Checkpoint:
    return sce(pool, density=values["select_topk"], convention="mergekit")


def _ram(pool: ModelPool, values: Values) -> Checkpoint:
    return ram(pool, epsilon=values["epsilon"])


def _arcee_fusion(pool: ModelPool, values: Values) -> Checkpoint:
    return arcee_fusion(pool)


def passthrough(pool: ModelPool, values: Values) -> Checkpoint:
    return pool.fuse(Models(values["scale"]))


Thin = Callable[[Param, Values, Combination], Masked]


def _task_arithmetic(thin: Thin | None, elects: bool) -> Callable[[ModelPool, Values], Checkpoint]:
    """A method that thins task vectors out, or not, and sums them times their weights, or elects signs first."""

    def merge(pool: ModelPool, values: Values) -> Checkpoint:
        weights = np.array(values["weight"], np.float64)
        divisor = weights.sum() if values["normalize"] and not elects and weights.any() else 1.0
        whole = thin is None or min(values["density"]) >= 1
        if whole and not elects:
            return pool.fuse(TaskVectors([weight * values["lambda"] for weight in values["weight"]], divisor))
        election: dict[str, Any] = {"elect": "mass", "on_tie": 1.0} if elects else {}
        combine = "mean" if elects and values["normalize"] else "sum"
        scaling = values["lambda"] / divisor
        how = combination(len(pool), factors=weights, weights=weights, combine=combine, scaling=scaling, **election)
        how = replace(how, divide=False)
        if whole or thin is None:
            return pool.fuse(Masked(Selection(), how))
        return pool.fuse(_thinned(thin, values, how))

    return merge


def _thinned(thin: Thin, values: Values, how: Combination) -> Callable[[Param], Masked]:
    return lambda p: thin(p, values, how)


def trimmed(p: Param, values: Values, how: Combination) -> Masked:
    """The largest `density` of each task vector, in each tensor: int(density * n), at least one."""
    ranks = [max(1, int(density * p.numel)) for density in values["density"]]
    low = np.where([density >= 1 for density in values["density"]], np.float32(0), of_ranks(p, ranks))
    low = np.where([density <= 0 for density in values["density"]], np.float32(np.inf), low)
    return restored(p, Selection(low=low.astype(np.float32)), how, values)


def without_outliers(p: Param, values: Values, how: Combination) -> Masked:
    """`density` of each task vector, in each tensor, below the largest `gamma`, which gives way to it.

    Of n elements, int(density * n) and int(gamma * n).
    """
    low, high = np.zeros(len(p.pool), np.float32), np.full(len(p.pool), np.inf, np.float32)
    keep = [int(density * p.numel) for density in values["density"]]
    smallest = [
        max(0, p.numel - kept - int(gamma * p.numel)) for kept, gamma in zip(keep, values["gamma"], strict=True)
    ]
    top = [p.numel - kept - below for kept, below in zip(keep, smallest, strict=True)]
    lows = of_ranks(p, [max(1, dropped + kept) for dropped, kept in zip(top, keep, strict=True)])
    highs = of_ranks(p, [dropped + 1 for dropped in top])
    for i, density in enumerate(values["density"]):
        if density < 1:
            low[i] = lows[i] if keep[i] else np.inf
            high[i] = highs[i] if top[i] else np.inf
    return restored(p, Selection(low=low, high=high), how, values)


def dropped(p: Param, values: Values, how: Combination) -> Masked:
    """Each element of a task vector with the chance `density`."""
    chances = np.array([round(density * ALWAYS) for density in values["density"]], np.uint64)
    return restored(p, Selection(keys=p.keys(values["seed"]), chances=chances), how, values)


def sampled(p: Param, values: Values, how: Combination) -> Masked:
    """Each element with a chance by its rank in its row: `density` -+ `epsilon`, from the smallest to the largest."""
    columns = p.shape[-1] if len(p.shape) > 1 else p.numel
    pairs = zip(values["density"], values["epsilon"], strict=True)
    chances = np.stack([chances_by_rank(columns, density, epsilon) for density, epsilon in pairs])
    return restored(p, Selection(keys=p.keys(values["seed"]), chances=chances), how, values)


@np.errstate(all="ignore")
def restored(p: Param, selection: Selection, how: Combination, values: Values) -> Masked:
    """With `rescale`, every task vector times what restores its sum of magnitudes."""
    if values["rescale"]:
        before, after = sums(p, selection)
        known = (before >= SMALLEST) & (after >= SMALLEST)
        how = replace(how, factors=how.factors * np.where(known, before / after, 1.0))
    return Masked(selection, how)


def of_ranks(p: Param, ranks: Sequence[int]) -> NDArray[np.float32]:
    """For each model, the magnitude of its rank in its task vector, from 1 for the largest: `(models,)`."""
    distinct = sorted(set(ranks))
    found = largest(p, distinct)
    return np.array([found[distinct.index(rank), i] for i, rank in enumerate(ranks)], np.float32)


def along(
    weights: Callable[[Numbers], Numbers], p: Param, task_vectors: bool, columns: int | None = None
) -> Elementwise:
    """A weighted sum of models, or of task vectors added to the base, with weights of every row.

    Args:
        weights: of rows, `(models, rows, columns)`: `(models, rows)`, or what these are multiplied by as it is.
        p: the parameter.
        task_vectors: whether the rows are of task vectors.
        columns: length of a row; by default of the last dimension.
    """
    columns = columns or (p.shape[-1] if p.shape else 1)

    def merged(blocks: Numbers) -> Numbers:
        base = blocks[0] if task_vectors else np.zeros(blocks.shape[1])
        rows = (blocks[1:] - base if task_vectors else blocks).reshape(-1, blocks.shape[1] // columns, columns)
        factors = weights(rows)
        factors = factors[:, :, None] if factors.ndim == 2 else factors
        return base + (factors * rows).sum(0).reshape(-1)

    return Elementwise(merged, base=task_vectors, columns=columns)


def vectors(p: Param, task_vectors: bool) -> Numbers:
    """The task vectors, or the models: `(models, elements)`."""
    from fusionbench.dtypes import as_float64

    blocks = np.stack([as_float64(block) for block in p.blocks(base=task_vectors)])
    return blocks[1:] - blocks[0] if task_vectors else blocks


@np.errstate(all="ignore")
def arcs(dots: Numbers, squares: Numbers, t: float) -> Numbers:
    """Weights of pairs of vectors, `t` of the way on the arc between them: `(2, pairs)`, of dot products like it."""
    lengths = np.sqrt(squares)
    cosine = np.clip(dots[0] / (lengths[0] * lengths[1]), -1, 1)
    straight = ~(1 - cosine * cosine > 1e-16)  # also where there is no direction
    angle = np.arccos(np.where(straight, 0, cosine))
    line = np.array([1 - t, t])[:, None]
    return np.where(straight, line, np.sin(line * angle) / np.sin(angle))


def _no_divisor(values: Values) -> str:
    total = sum(values["weight"])
    if not values.get("normalize", values.get("normalize_weights")) or ZERO <= abs(total) < inf:
        return ""
    return f"the weights {_listed(values['weight'])} sum to {total:g} and cannot be normalised"


def _no_divisor_but_zeros(values: Values) -> str:
    return _no_divisor(values) if any(values["weight"]) else ""  # without any weight the base stays


def _chances(values: Values) -> str:
    for density, epsilon in zip(values["density"], values["epsilon"], strict=True):
        if 0 < density < 1 and not (epsilon < density and density + epsilon < 1 and not isclose(density, epsilon)):
            most = min(density, 1 - density)
            asked = f"with density {density:g}, epsilon must be below {most:g}"
            return f"chances of density ± epsilon must be in (0, 1): {asked}; got {epsilon:g}"
    return ""


def _both(*checks: Callable[[Values], str]) -> Callable[[Values], str]:
    return lambda values: next((found for found in (check(values) for check in checks) if found), "")


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _task_vector_method(
    thin: Thin | None, elects: bool, normalize: bool, rescale: bool, **more: Parameter
) -> RecipeMethod:
    parameters = {
        **WEIGHTS,
        **({} if thin is None else {"density": Parameter("number", "model", 1.0, FRACTION)}),
        **more,
        "lambda": Parameter("number", default=1.0, range=WEIGHT),
        "normalize": _flag(normalize),
        **({} if thin is None else {"rescale": _flag(rescale)}),
        "int8_mask": _flag(False),
    }
    checks = ([] if elects else [_no_divisor_but_zeros]) + ([_chances] if "epsilon" in more else [])
    return RecipeMethod(_task_arithmetic(thin, elects), "base", 1, None, parameters, _both(*checks))


GAMMA = {"gamma": Parameter("number", "model", 0.01, FRACTION)}
EPSILON = {"epsilon": Parameter("number", "model", 0.15, FRACTION)}
METHODS: dict[str, RecipeMethod] = {
    "linear": RecipeMethod(linear, "model", 1, None, {**WEIGHTS, "normalize": _flag(True)}, _no_divisor),
    "slerp": RecipeMethod(_slerp, "first", 2, 2, {"t": Parameter("number", range=FRACTION)}),
    "nuslerp": RecipeMethod(
        nuslerp, "optional", 2, 2, {**WEIGHTS, "nuslerp_flatten": _flag(True), "nuslerp_row_wise": _flag(False)}
    ),
    "multislerp": RecipeMethod(
        multislerp,
        "optional",
        1,
        None,
        {**WEIGHTS, "normalize_weights": _flag(True), "eps": Parameter("number", default=1e-8, range=POSITIVE)},
        _no_divisor,
    ),
    "karcher": RecipeMethod(
        karcher,
        "model",
        1,
        None,
        {
            "max_iter": Parameter("whole", default=10, range=POSITIVE),
            "tol": Parameter("number", default=1e-5, range=POSITIVE),
        },
    ),
    "task_arithmetic": _task_vector_method(None, False, normalize=False, rescale=False),
    "ties": _task_vector_method(trimmed, True, normalize=True, rescale=False),
    "dare_linear": _task_vector_method(dropped, False, normalize=False, rescale=True),
    "dare_ties": _task_vector_method(dropped, True, normalize=False, rescale=True),
    "della": _task_vector_method(sampled, True, normalize=True, rescale=True, **EPSILON),
    "della_linear": _task_vector_method(sampled, False, normalize=False, rescale=True, **EPSILON),
    "breadcrumbs": _task_vector_method(without_outliers, False, normalize=False, rescale=False, **GAMMA),
    "breadcrumbs_ties": _task_vector_method(without_outliers, True, normalize=False, rescale=False, **GAMMA),
    "model_stock": RecipeMethod(_model_stock, "base", 2, None, {"filter_wise": _flag(False)}),
    "nearswap": RecipeMethod(nearswap, "base", 1, 1, {"t": Parameter("number", range=POSITIVE)}),
    "sce": RecipeMethod(
        _sce,
        "base",
        1,
        None,
        {"select_topk": Parameter("number", default=1.0, range=Range(0, 1, open_low=True)), "int8_mask": _flag(False)},
    ),
    "ram": RecipeMethod(_ram, "base", 1, None, {"epsilon": Parameter("number", default=1e-5, range=POSITIVE)}),
    "arcee_fusion": RecipeMethod(_arcee_fusion, "base", 1, 1, {}),
    "passthrough": RecipeMethod(passthrough, "model", 1, 1, {"scale": Parameter("number", "model", 1.0, WEIGHT)}),
}
"""By mergekit's names."""
