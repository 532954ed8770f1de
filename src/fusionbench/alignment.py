"""Models of one architecture but different initialisations: their units permuted to the order of a reference's.

A network computes the same when hidden units change places, with all the weights that lead to them and from them.
Networks trained from different seeds differ by such permutations, among else, and their mean is worth little before
these are undone: by weight matching, which is one of the three ways of Ainsworth et al. (2023, Git Re-Basin).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import as_float64
from fusionbench.errors import InputError, did_you_mean
from fusionbench.formats import DTYPES, Spec
from fusionbench.fuse import is_statistic
from fusionbench.passes import Block, Bytes
from fusionbench.progress import track
from fusionbench.sources import BLOCK, Source, as_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from fusionbench.pool import ModelPool

    Indices = NDArray[np.int64]
    Permutations = Mapping[str, Indices]
    """Of an axis, what comes to each of its places: the element at `permutation[i]` comes to i."""
    Gains = Mapping[str, NDArray[np.float64]]
    """Of an axis, `(size, size)`: the inner product of what the reference has at i and the model at j."""

SWEEPS = 100  # at most; a few are enough
NEGLIGIBLE = 1e-9  # relative to an inner product: less is rounding, and no reason to change places


@dataclass(frozen=True)
class Group:
    """A group of permutations: of items that may change places, such as hidden units or attention heads.

    Attributes:
        places: of every axis concerned, the indices of each item: `(items, indices of an item)`.
        within: groups of an item's own parts, whose places count the item's indices from 0.
    """

    places: Mapping[str, Indices]
    within: tuple[Group, ...] = ()

    @property
    def items(self) -> int:
        return len(next(iter(self.places.values())))


@dataclass(frozen=True)
class Symmetries:
    """The permutations that leave what a model computes unchanged.

    Attributes:
        axes: of every tensor, the name of each dimension's axis, None for one that stays as it is. Dimensions of one
            name are permuted alike (a permutation spec, as the paper calls it); of one tensor they have different ones.
        groups: how each axis may be permuted. Axes that only change together are in one group.
    """

    axes: Mapping[str, tuple[str | None, ...]]
    groups: tuple[Group, ...]


def aligned(pool: ModelPool, how: str = "weight_matching", *, seed: int = 0) -> dict[str, Checkpoint]:
    """The pool's models, each with its units in the order of the reference's. See `ModelPool.aligned`."""
    if how not in METHODS:
        raise InputError(f"No alignment is called '{how}'. {did_you_mean(how, METHODS)}")
    symmetries = symmetries_of(pool)
    pool.check_finite()
    found: dict[str, Checkpoint] = {}
    for name, model in track(pool.items(), "aligning", len(pool)):
        found[name] = model
        if model is not pool.reference:
            permutations = METHODS[how](pool.reference, model, symmetries, seed=seed)
            recipe = {"align": how, "seed": seed, "permutations": digest(permutations)}
            inputs = {"reference": pool.reference, "model": model}
            found[name] = permuted(model, symmetries, permutations, recipe=recipe, inputs=inputs)
    return found


def symmetries_of(pool: ModelPool) -> Symmetries:
    """The symmetries of a pool's models; an error for a family whose symmetries are not known."""
    from fusionbench.architectures import architecture_of, get_architecture, list_architectures

    families = [name for name in list_architectures() if getattr(get_architecture(name), "symmetries", None)]
    known = f"They are known of: {', '.join(families)}; and of torch's Sequential."
    try:
        architecture = pool.architecture or architecture_of(pool.reference)
    except InputError:
        kind = pool.reference.config.get("model_type")
        what = f"the model type '{kind}'" if kind else "a model without a config.json"
        raise InputError(f"align: the symmetries of {what} are not known. {known}") from None
    find: Callable[[Checkpoint], Symmetries | None] | None = getattr(architecture, "symmetries", None)
    found = find(pool.reference) if find is not None else None
    if found is None or not found.groups:
        raise InputError(f"align: no symmetries of this model are known. {known}")
    return found


def weight_matching(
    reference: Checkpoint, model: Checkpoint, symmetries: Symmetries, *, seed: int = 0
) -> dict[str, Indices]:
    """The permutations under which a model's weights are nearest to the reference's (Ainsworth et al., 2023, 3.2).

    `||theta_ref - pi(theta)||` is least where the inner product is greatest. That is a linear assignment for each
    group of permutations while the others stay: they are solved in turns, in random order, until none gives more.
    Within attention heads, an assignment of their units is solved for every pair of heads.

    What is found is a local optimum. Two beginnings are tried: as the models are, and from what is never permuted
    (inputs, vocabularies, outputs) inwards, each group by those weights alone whose other ends are settled, which
    recovers any exact permutation of the reference.

    Args:
        seed: of the order of the turns.
    """
    matching = _Matching(reference, model, symmetries)
    best = max((matching.ascended(start, seed) for start in (matching.as_they_are(), matching.from_outside())), key=_of)
    return best[1]


def _of(scored: tuple[float, Any]) -> float:
    return scored[0]


METHODS: dict[str, Callable[..., dict[str, Indices]]] = {"weight_matching": weight_matching}


class _Matching:
    """The assignments of one model to a reference. Tensors are read one at a time, each whole."""

    def __init__(self, reference: Checkpoint, model: Checkpoint, symmetries: Symmetries) -> None:
        self._solve = _linear_sum_assignment()
        self._reference, self._model = reference, model
        # Statistics are permuted as all else, but are no weights to match.
        self._axes = {name: axes for name, axes in symmetries.axes.items() if not is_statistic(name)}
        self._groups = symmetries.groups
        self._sizes = {axis: reference.specs[n].shape[i] for n, axes in self._axes.items() for i, axis in _named(axes)}

    def as_they_are(self) -> dict[str, Indices]:
        return {axis: np.arange(size) for axis, size in self._sizes.items()}

    def from_outside(self) -> dict[str, Indices]:
        """Permutations settled one after the other, the one with most settled weights per item next."""
        found, left, settled = self.as_they_are(), list(self._groups), set[str]()
        while left:
            group = max(left, key=lambda g: sum(self._weights(n) for n in self._between(g, settled)) / g.items)
            self._improve(group, found, self._between(group, settled))
            left.remove(group)
            settled |= group.places.keys()
        return found

    def ascended(self, found: dict[str, Indices], seed: int) -> tuple[float, dict[str, Indices]]:
        """The local optimum that is reached from there, and its inner product with the reference."""
        random = np.random.default_rng(seed)
        for _ in range(SWEEPS):
            order = random.permutation(len(self._groups))
            if not sum([self._improve(self._groups[i], found, self._concerned(self._groups[i])) for i in order]):
                break
        return sum(float((self._of_reference(n) * self._of_model(n, found)).sum()) for n in self._axes), found

    def _improve(self, group: Group, found: dict[str, Indices], names: Iterable[str]) -> bool:
        """Give the group's items their best places, as these tensors see it; whether any has moved."""
        gains = {axis: np.zeros((self._sizes[axis],) * 2) for axis in group.places}
        for name in names:
            ours, theirs = self._of_reference(name), self._of_model(name, found)
            for i, axis in _named(self._axes[name]):
                if axis in gains:
                    gains[axis] += _rows(ours, i) @ _rows(theirs, i).T
        if not all(np.isfinite(gain).all() for gain in gains.values()):
            raise InputError("align: a model contains NaN or Inf, which no permutation brings nearer to another.")
        moved, change = self._best(group, gains)
        if moved:
            found.update({axis: found[axis][places] for axis, places in change.items()})
        return moved

    def _best(self, group: Group, gains: Gains) -> tuple[bool, dict[str, Indices]]:
        """Whether another assignment gives more than the present one, and the best one: what comes to each place."""
        pairs = np.zeros((group.items, group.items))
        inside: dict[tuple[int, int], dict[str, Indices]] = {}
        if group.within:
            for i, j in np.ndindex(*pairs.shape):
                part = {axis: gains[axis][np.ix_(p[i], p[j])] for axis, p in group.places.items()}
                inside[i, j] = self._ascended_within(group.within, part)
                pairs[i, j] = _gained(part, inside[i, j])
        else:
            for axis, places in group.places.items():
                for column in places.T:
                    pairs += gains[axis][np.ix_(column, column)]
        chosen = self._solve(pairs, maximize=True)[1]
        present, reached = _gained(gains, {a: p.reshape(-1) for a, p in group.places.items()}, group.places), 0.0
        reached = float(pairs[np.arange(len(chosen)), chosen].sum())
        change = {axis: np.arange(len(gains[axis])) for axis in group.places}
        if not reached - present > NEGLIGIBLE * abs(reached):
            return False, change
        for axis, places in group.places.items():
            for i, j in enumerate(chosen):
                change[axis][places[i]] = places[j][inside[i, j][axis]] if group.within else places[j]
        return True, change

    def _ascended_within(self, groups: tuple[Group, ...], gains: Gains) -> dict[str, Indices]:
        found = {axis: np.arange(len(gain)) for axis, gain in gains.items()}
        for _ in range(SWEEPS):
            any_moved = False
            for group in groups:
                moved, change = self._best(group, {axis: gains[axis][:, found[axis]] for axis in group.places})
                if moved:
                    found.update({axis: found[axis][places] for axis, places in change.items()})
                any_moved |= moved
            if not any_moved or len(groups) == 1:
                break
        return found

    def _concerned(self, group: Group) -> list[str]:
        return [name for name, axes in self._axes.items() if not group.places.keys().isdisjoint(axes)]

    def _between(self, group: Group, settled: set[str]) -> list[str]:
        """The tensors of the group whose other axes are settled, or stay."""
        return [n for n in self._concerned(group) if settled.issuperset({*self._axes[n]} - {None, *group.places})]

    def _weights(self, name: str) -> int:
        return self._reference.specs[name].numel

    def _of_reference(self, name: str) -> NDArray[np.float64]:
        return _numbers(self._reference, name)

    def _of_model(self, name: str, found: Permutations) -> NDArray[np.float64]:
        tensor = _numbers(self._model, name)
        for i, axis in _named(self._axes[name]):
            tensor = tensor.take(found[axis], i)
        return tensor


def distance(a: Checkpoint, b: Checkpoint) -> float:
    """The Euclidean distance of two models' weights, which matching makes small; no statistics of batch norms."""
    names = [name for name, spec in a.specs.items() if spec.floating and not is_statistic(name)]
    total = 0.0
    for name in names:
        for start, stop in a.blocks(name):
            total += float(
                ((as_float64(a.block(name, start, stop)) - as_float64(b.block(name, start, stop))) ** 2).sum()
            )
    return total**0.5


def permuted(
    model: Checkpoint,
    symmetries: Symmetries,
    permutations: Permutations,
    *,
    recipe: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Checkpoint] | None = None,
) -> Checkpoint:
    """The model with its axes permuted, each tensor when it is read."""
    orders: dict[str, tuple[Indices | None, ...]] = {}
    for name, axes in symmetries.axes.items():
        if any(axes):
            orders[name] = tuple(None if axis is None else permutations[axis] for axis in axes)
    return Checkpoint(
        model.specs,
        Permuted(model.source, model.specs, orders),
        aliases=model.aliases,
        folder=model.folder,
        location=model.location,
        recipe=recipe,
        inputs=inputs,
        config=model.new_config,
        files=model.files,
    )


def digest(permutations: Permutations) -> str:
    """A hash of permutations, whatever the order of their axes (XXH3, 128 bits)."""
    hashed = xxhash.xxh3_128()
    for axis in sorted(permutations):
        hashed.update(f"{axis}:{len(permutations[axis])}:".encode())
        hashed.update(np.ascontiguousarray(permutations[axis], "<i8").tobytes())
    return hashed.hexdigest()


class Permuted(Source):
    """Another source's tensors, permuted along their axes: of each dimension what comes to its places, or None."""

    def __init__(
        self, source: Source, specs: Mapping[str, Spec], orders: Mapping[str, tuple[Indices | None, ...]]
    ) -> None:
        self._source, self._specs, self._orders = source, dict(specs), dict(orders)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        if name not in self._orders or start == stop:
            return self._source.block(name, start, stop, out)
        rest, (order, *others) = self._specs[name].shape[1:], self._orders[name]
        columns = int(np.prod(rest))
        first, last = start // columns, -(-stop // columns)
        rows, dtype = self._rows(name, np.arange(first, last) if order is None else order[first:last], columns)
        table = rows.view(f"u{DTYPES[dtype]}").reshape(last - first, *rest)
        for i, other in enumerate(others, 1):
            table = table if other is None else table.take(other, i)
        wanted = np.ascontiguousarray(table).reshape(-1)[start - first * columns : stop - first * columns]
        return wanted.view(np.uint8), dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return as_tensor(self.block(name, start, stop))

    def unit(self, name: str, memory: int) -> int:
        return self._source.unit(name, memory)

    def known(self, name: str) -> dict[int, bytes] | None:
        return None if name in self._orders else self._source.known(name)

    def working_set(self, name: str) -> int:
        return self._source.working_set(name) + 24

    def _rows(self, name: str, rows: Indices, columns: int) -> Block:
        """Rows of a tensor as they are asked for, each read alone where the tensor is large and can be divided."""
        numel = self._specs[name].numel
        if len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all():
            return self._source.block(name, int(rows[0]) * columns, (int(rows[-1]) + 1) * columns)
        if numel <= BLOCK or self._source.unit(name, 0) >= numel:
            data, dtype = self._source.block(name, 0, numel)
            return data.reshape(-1, columns * DTYPES[dtype])[rows].reshape(-1), dtype
        blocks = [self._source.block(name, int(row) * columns, (int(row) + 1) * columns) for row in rows]
        return np.concatenate([data for data, _ in blocks]), blocks[0][1]


def _named(axes: tuple[str | None, ...]) -> list[tuple[int, str]]:
    return [(i, axis) for i, axis in enumerate(axes) if axis is not None]


def _numbers(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    spec = checkpoint.specs[name]
    return as_float64(checkpoint.block(name, 0, spec.numel)).reshape(spec.shape)


def _rows(tensor: NDArray[np.float64], dimension: int) -> NDArray[np.float64]:
    return np.moveaxis(tensor, dimension, 0).reshape(tensor.shape[dimension], -1)


def _gained(gains: Gains, places: Permutations, at: Permutations | None = None) -> float:
    """The inner product where the elements of `places` come to the places `at`; to all, in order, by default."""
    return sum(
        float(gains[axis][np.arange(len(p)) if at is None else at[axis].reshape(-1), p].sum())
        for axis, p in places.items()
    )


def _linear_sum_assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise InputError("align=weight_matching needs scipy: pip install 'fusionbench[align]'") from None
    return linear_sum_assignment
