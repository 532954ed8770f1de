"""Tensors with a row for each token of a vocabulary: which they are, and the same with rows of other models."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import as_float64
from fusionbench.errors import InputError
from fusionbench.formats import DTYPES, Spec
from fusionbench.passes import Block, Bytes
from fusionbench.passes.reference import encode
from fusionbench.sources import BLOCK, Source, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

PADDING = -1  # of a plan: a row that no token has
# Only where a size is that of other things too, names are looked at.
NAMED = re.compile(
    r"embed_tokens|embed_in\b|embed_out|\bwte\b|word_emb|tok_emb|token_emb|\bshared\.|lm_head|^output\.|logits|vocab|"
    r"predictions\.(bias|decoder)"
)


@dataclass(frozen=True)
class Plan:
    """Where each row of a model's new tensors comes from.

    Attributes:
        own: `(rows,)`: the model's own row; `PADDING`; or `-2 - i` for the i-th of `made`.
        made: rows that are the mean of some rows of models, given by name and number; zeros where there are none.
    """

    own: NDArray[np.int64]
    made: Sequence[Sequence[tuple[str, int]]] = ()

    def unchanged(self, rows: int) -> bool:
        """Whether it gives the `rows` rows that there are."""
        return len(self.own) == rows and bool((self.own == np.arange(rows)).all())


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of tokens that a config says a model has rows for; of its text model, where it is made of several."""
    size = config.get("vocab_size")
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    parts = sorted((key for key in config if isinstance(config[key], dict)), key=lambda key: key != "text_config")
    return next((found for key in parts if (found := vocabulary_size(config[key])) is not None), None)


def with_size(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The config with another vocabulary size, wherever it says the old one."""
    changed = {key: with_size(value, old, new) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | ({"vocab_size": new} if config.get("vocab_size") == old else {})


def token_tensors(checkpoint: Checkpoint) -> list[str]:
    """The names of what has a row, or a number, for each token: embeddings, output layers and their biases.

    They have the size of the vocabulary and stand outside the numbered layers. Where other things have that size too,
    they are those that are called as embeddings are. Empty where the config says no size.
    """
    size = vocabulary_size(checkpoint.config)
    specs = checkpoint.specs
    matching = [name for name, spec in specs.items() if size is not None and spec.shape[_axis(spec) :][:1] == (size,)]
    named = {name for name in specs if NAMED.search(name)}
    inside = {name for name in specs if any(part.isdigit() for part in name.split("."))}
    others = {n for name in inside - named for n in specs[name].shape} | _numbers(checkpoint.config)
    return [name for name in matching if name in named or (name not in inside and size not in others)]


def reordered(name: str, models: Mapping[str, Checkpoint], plan: Plan, recipe: Mapping[str, Any]) -> Checkpoint:
    """The model called `name` with the rows that a plan gives its tensors, and with its vocabulary size."""
    model = models[name]
    size = vocabulary_size(model.config)
    rows, names = len(plan.own), token_tensors(model)
    if size is None or not names:
        said = "has no vocab_size" if size is None else f"says vocab_size is {size:,}, but no tensor has that many rows"
        raise InputError(f"Model '{name}': its config.json {said}: what belongs to a token is not known.")
    if plan.unchanged(size):
        return model
    donors = sorted({donor for made in plan.made for donor, _ in made})
    for donor in donors:
        for tensor in names:
            if tensor not in models[donor]:
                raise InputError(
                    f"Model '{name}' has '{tensor}', but model '{donor}', which has tokens to give, lacks it."
                )
            mine, theirs = model.specs[tensor], models[donor].specs[models[donor].resolve(tensor)]
            if _width(mine) != _width(theirs) or mine.floating != theirs.floating:
                raise InputError(f"Model '{name}': '{tensor}' is {mine}, but {theirs} in model '{donor}'.")
    specs = dict(model.specs)
    for tensor in names:
        shape = list(specs[tensor].shape)
        shape[_axis(specs[tensor])] = rows
        specs[tensor] = Spec(specs[tensor].dtype, tuple(shape))
    source = Gathered(model, {donor: models[donor] for donor in donors}, names, plan)
    changed = Checkpoint(
        specs,
        source,
        aliases=model.aliases,
        folder=model.folder,
        location=model.location,
        recipe=recipe,
        inputs=models,
        config=with_size(model.config, size, rows),
        files=model.files,
    )
    return changed


class Gathered(Source):
    """A model's tensors, of which some have the rows that a plan gives them, read when they are asked for."""

    def __init__(self, model: Checkpoint, donors: Mapping[str, Checkpoint], names: Sequence[str], plan: Plan) -> None:
        self._model, self._donors, self._plan = model, dict(donors), plan
        self._dtypes = {name: self._widest(name) for name in names}
        breaks = np.flatnonzero((np.diff(plan.own) != 1) | (plan.own[1:] < 0) | (plan.own[:-1] < 0)) + 1
        self._runs = np.concatenate([[0], breaks, [len(plan.own)]])  # rows that follow each other in the model, too
        self._padding: dict[str, Bytes] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        if name not in self._dtypes:
            return self._model.source.block(name, start, stop, out)
        dtype = self._dtypes[name]
        size, width = DTYPES[dtype], _width(self._model.specs[name])
        needed = (stop - start) * size
        out = np.empty(needed, np.uint8) if out is None or len(out) < needed else out[:needed]
        first = int(np.searchsorted(self._runs, start // width, "right")) - 1
        for begin, end in zip(self._runs[first:-1], self._runs[first + 1 :], strict=True):
            low, high = max(int(begin) * width, start), min(int(end) * width, stop)
            if low >= high:
                break
            own, into = int(self._plan.own[begin]), out[(low - start) * size : (high - start) * size]
            offset = int(begin) * width
            if own >= 0:
                shift = own * width - offset
                found = self._model.block(name, low + shift, high + shift)
                into[:] = found[0] if found[1] == dtype else encode(as_float64(found), dtype)
            else:
                row = self._pad(name) if own == PADDING else self._made(name, -2 - own)
                into[:] = row[(low - offset) * size : (high - offset) * size]
        return out, dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._dtypes:
            return self._model.source.read(name, start, stop)
        return as_tensor(self.block(name, start, stop))

    def unit(self, name: str, memory: int) -> int:
        return BLOCK if name in self._dtypes else self._model.source.unit(name, memory)

    def known(self, name: str) -> dict[int, bytes] | None:
        return None if name in self._dtypes else self._model.source.known(name)

    def working_set(self, name: str) -> int:
        return 16 if name in self._dtypes else self._model.source.working_set(name)

    def _widest(self, name: str) -> str:
        """The dtype that holds the numbers of the model and of all that give it rows."""
        models = (self._model, *self._donors.values())
        found = {model.specs[model.resolve(name)].dtype for model in models}
        return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"

    def _made(self, name: str, number: int) -> Bytes:
        """A row that is the mean of others, in float64 and rounded once."""
        dtype, width = self._dtypes[name], _width(self._model.specs[name])
        places = self._plan.made[number]
        total = np.zeros(width)
        for donor, row in places:
            total += as_float64(self._donors[donor].block(name, row * width, (row + 1) * width))
        return encode(total / max(len(places), 1), dtype)

    def _pad(self, name: str) -> Bytes:
        """The mean of all rows that tokens have: a row that is as likely as any (Hewitt, 2021)."""
        with self._lock:
            if name not in self._padding:
                width = _width(self._model.specs[name])
                total, count = np.zeros(width), 0
                for begin, end in zip(self._runs[:-1], self._runs[1:], strict=True):
                    if self._plan.own[begin] == PADDING:
                        continue
                    count += int(end - begin)
                    step = max(BLOCK // width, 1)
                    for low in range(int(begin), int(end), step):
                        high = min(low + step, int(end))
                        block = self.block(name, low * width, high * width)
                        total += as_float64(block).reshape(high - low, width).sum(0)
                self._padding[name] = encode(total / max(count, 1), self._dtypes[name])
            return self._padding[name]


def _axis(spec: Spec) -> int:
    """The dimension that counts tokens: the first that is not 1."""
    return next((axis for axis, length in enumerate(spec.shape) if length != 1), 0)


def _width(spec: Spec) -> int:
    """How many elements a token has."""
    return math.prod(spec.shape[_axis(spec) + 1 :])


def _numbers(config: Mapping[str, Any]) -> set[int]:
    """All whole numbers in a config but those of vocabularies."""
    found = {v for key, v in config.items() if isinstance(v, int) and not key.startswith("vocab_size")}
    return found.union(*(_numbers(value) for value in config.values() if isinstance(value, dict)))
