"""The tensors of a recipe's result, and what each is merged from: of names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError, did_you_mean
from fusionbench.formats import Spec
from fusionbench.layers import COUNTS, layer_of, stacks, with_layers
from fusionbench.recipes.document import Problems
from fusionbench.recipes.parameters import position, unmatched
from fusionbench.recipes.rows import vocabulary_size
from fusionbench.recipes.schema import Inputs, Recipe, Reference, Settings, Slice, inputs_of

# Of what is in no layer, what goes before the layers is the first slice's, and all else the last's.
BEFORE = re.compile(r"emb|\bwte\b|\bwpe\b|\bshared\b|\bpatch|\bstem\b|\bconv1\b|pre_layrnorm|project_in")
AFTER = re.compile(r"embed_out|unembed")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the result.

    Attributes:
        name: its name.
        part: the slice that it is of.
        sources: its names in the slice's inputs, in their order.
        t: where its layer is in the slice, from 0 to 1.
    """

    name: str
    part: Slice
    sources: tuple[str, ...]
    t: float


@dataclass(frozen=True)
class Work:
    """A document with its models.

    Attributes:
        recipe: the document.
        models: checkpoints by name.
        first: the name of the model whose names, config and tied tensors the result has: the base, or the first.
    """

    recipe: Recipe
    models: Mapping[str, Checkpoint]
    first: str

    @property
    def reference(self) -> Checkpoint:
        return self.models[self.first]

    @property
    def problems(self) -> Problems:
        return self.recipe.problems

    @cached_property
    def _inputs(self) -> dict[int, Inputs]:
        return {id(part): inputs_of(self.recipe, part) for part in self.recipe.slices}

    def inputs(self, part: Slice) -> Inputs:
        """What a slice of the recipe is merged from."""
        return self._inputs[id(part)]

    def stored(self, model: Checkpoint, name: str) -> str:
        """A model's own name of a tensor, which may be that of one that the reference ties to it."""
        if name in model:
            return model.resolve(name)
        return model.resolve(next(alias for alias in self._tied_to.get(name, ()) if alias in model))

    def spec(self, model: Reference, name: str) -> Spec:
        """Dtype and shape of a tensor in a model."""
        checkpoint = self.models[model.name]
        return checkpoint.specs[self.stored(checkpoint, name)]

    @cached_property
    def _tied_to(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for alias, name in self.reference.aliases.items():
            found.setdefault(name, []).append(alias)
        return found

    def check_names(self, source: Reference, own: Collection[str], wanted: Collection[str], where: str = "") -> None:
        """Problems where a model lacks tensors that others have, or has others."""
        model, tied = self.models[source.name], self.reference.aliases
        aliases = set() if where else {alias for alias, to in model.aliases.items() if to in own}
        names = aliases | set(own)
        missing = [n for n in wanted if n not in names and not any(a in names for a in self._tied_to.get(n, ()))]
        extra = [n for n in own if n not in wanted and (n not in tied or tied[n] in names)]
        for found, verb, others in ((missing, "lacks", "which others have"), (extra, "has", "which others lack")):
            if found:
                more = f" and {len(found) - 1} other tensors" if len(found) > 1 else ""
                self.problems.add(source.line, f"'{source.name}' {verb} {where}'{found[0]}'{more}, {others}.")


def tensors_of(work: Work) -> list[Tensor]:
    """The tensors of the result. An error, with all lines, where models do not fit each other, or what is asked."""
    tensors = of_all_layers(work) if work.recipe.whole else of_slices(work)
    work.problems.stop()
    check_shapes(work, tensors)
    check_filters(work, tensors)
    work.problems.stop()
    return tensors


def of_all_layers(work: Work) -> list[Tensor]:
    """Of a recipe that lists models: all tensors of the reference, which every model must have."""
    part = work.recipe.slices[0]
    inputs, counts = work.inputs(part), stacks(work.reference.specs)
    wanted = dict.fromkeys(work.reference.specs)
    for source in inputs.sources:
        own = stacks(work.models[source.name].specs)
        other = [prefix for prefix, count in own.items() if counts.get(prefix, count) != count]
        for prefix in other:
            said = f"'{source.name}' has {own[prefix]} layers in {prefix.rstrip('.')}, and the first {counts[prefix]}"
            work.problems.add(source.line, f"{said}: give slices of as many layers each.")
        if not other:
            work.check_names(source, work.models[source.name].specs, wanted)
    tensors = []
    for name in wanted:
        layer = layer_of(name)
        t = position(layer[1], counts[layer[0]]) if layer and layer[0] in counts else 0.0
        tensors.append(Tensor(name, part, (name,) * len(inputs.sources), t))
    return tensors


def of_slices(work: Work) -> list[Tensor]:
    """Of a recipe of slices: layers one after the other, and what is in no layer."""
    recipe = work.recipe
    found = {name: one_stack(work.models[name]) for name in recipe.references}
    for name, reference in recipe.references.items():
        if isinstance(stack := found[name], str):
            work.problems.add(reference.line, f"slices need a model with one stack of layers; '{name}' has {stack}.")
    work.problems.stop()
    prefixes = {name: stack[0] for name, stack in found.items() if not isinstance(stack, str)}
    counts = {name: stack[1] for name, stack in found.items() if not isinstance(stack, str)}
    for part in recipe.slices:
        for source in part.sources:
            name, asked = source.model.name, source.layers or (0, 0)
            if asked[1] > counts[name]:
                said = f"layer_range {list(asked)} is outside '{name}', which has {counts[name]} layers."
                work.problems.add(source.line, said)
    work.problems.stop()
    rests = {name: _rests(work.models[name], prefix) for name, prefix in prefixes.items()}
    outside = {name: _outside(work.models[name], prefix) for name, prefix in prefixes.items()}
    prefix = prefixes[work.first]
    tensors = []
    for name in outside[work.first]:
        part = recipe.slices[0 if BEFORE.search(name) and not AFTER.search(name) else -1]
        tensors.append(Tensor(name, part, (name,) * len(work.inputs(part).sources), 0.0))
    for part in (recipe.slices[0], recipe.slices[-1]):
        for source in work.inputs(part).sources:
            work.check_names(source, outside[source.name], outside[work.first])
    new = 0
    for part in recipe.slices:
        sources, first = work.inputs(part).sources, _first_layers(part)
        for offset in range(_depth(part)):
            names = rests[sources[0].name][first[sources[0].name] + offset]
            for source in sources[1:]:
                layer = first[source.name] + offset
                work.check_names(source, rests[source.name][layer], names, f"in layer {layer} ")
            t = position(offset, _depth(part))
            for rest in names:
                olds = tuple(f"{prefixes[s.name]}{first[s.name] + offset}.{rest}" for s in sources)
                tensors.append(Tensor(f"{prefix}{new}.{rest}", part, olds, t))
            new += 1
    return tensors


def config_of(work: Work) -> dict[str, Any]:
    """The config of the result: the reference's, with the number of layers that slices make."""
    config, stack = work.reference.config, one_stack(work.reference)
    if work.recipe.whole or not config or isinstance(stack, str):
        return config
    heads = [
        (part.sources[0], layer) for part in work.recipe.slices for layer in range(*(part.sources[0].layers or (0,)))
    ]
    configs = [work.models[source.model.name].config for source, _ in heads]
    try:
        return with_layers(config, stack[1], [layer for _, layer in heads], configs, stack=stack[0])
    except InputError as error:
        work.problems.add(work.recipe.slices[0].line, str(error))
        return config


def check_shapes(work: Work, tensors: Sequence[Tensor]) -> None:
    """Problems where tensors that are merged, or stand for each other, differ in shape: for each model the first."""
    told: set[str] = set()
    for tensor in tensors:
        sources = work.inputs(tensor.part).sources
        specs = [(source, work.spec(source, name)) for source, name in zip(sources, tensor.sources, strict=True)]
        head, wanted = specs[0][0].name, specs[0][1]
        if tensor.name in work.reference.specs and layer_of(tensor.name) is None:
            head, wanted = work.first, work.reference.specs[tensor.name]
        for source, spec in specs:
            if source.name in told or (spec.shape, spec.floating) == (wanted.shape, wanted.floating):
                continue
            told.add(source.name)
            said = f"'{source.name}': '{tensor.name}' is {_shown(spec, wanted)}, but {_shown(wanted, spec)} in '{head}'"
            if spec.shape[0] == vocabulary_size(work.models[source.name].config) != wanted.shape[0]:
                said += ": give tokenizer: {source: union}, or vocabulary: truncate, pad or union"
            work.problems.add(source.line, f"{said}.")


def check_filters(work: Work, tensors: Sequence[Tensor]) -> None:
    """Problems for every filter that is in the name of no tensor that it could be for."""
    tied = list(work.reference.aliases)
    everything = set(tied)

    def check(settings: Settings, names: set[str]) -> None:
        for name, setting in unmatched(settings, names):
            said = f"{name}: the filter '{setting.filter}' is in no tensor's name."
            work.problems.add(setting.line, f"{said}{_near(setting.filter, names)}")

    for part in work.recipe.slices:
        mine, inputs = [tensor for tensor in tensors if tensor.part is part], work.inputs(part)
        within = {*tied, *(tensor.name for tensor in mine)}
        for i, source in enumerate(inputs.models, inputs.base is not None):
            own = {*tied, *(tensor.sources[i] for tensor in mine)}
            within |= own
            check(source.parameters, own)
        check(part.parameters, within)
        everything |= within
    check(work.recipe.parameters, everything)


def one_stack(model: Checkpoint) -> tuple[str, int] | str:
    """What the names of a model's layers begin with, and how many there are; or, as a text, which stacks it has."""
    found = stacks(model.specs)
    if len(found) > 1:
        counts = [model.config.get(key) for key in COUNTS]
        found = {prefix: count for prefix, count in found.items() if count in counts} or found
    if len(found) == 1:
        return next(iter(found.items()))
    return ", ".join(f"{prefix.rstrip('.')} ({count})" for prefix, count in found.items()) or "none"


def _depth(part: Slice) -> int:
    first, end = part.sources[0].layers or (0, 0)
    return end - first


def _first_layers(part: Slice) -> dict[str, int]:
    return {source.model.name: (source.layers or (0, 0))[0] for source in part.sources}


def _rests(model: Checkpoint, prefix: str) -> dict[int, dict[str, None]]:
    """What the names of every layer's tensors end with, in order."""
    found: dict[int, dict[str, None]] = {}
    for name in model.specs:
        layer = layer_of(name)
        if layer and layer[0] == prefix:
            found.setdefault(layer[1], {})[layer[2]] = None
    return found


def _outside(model: Checkpoint, prefix: str) -> dict[str, None]:
    """The names of what is in no layer."""
    layers = ((name, layer_of(name)) for name in model.specs)
    return {name: None for name, layer in layers if layer is None or layer[0] != prefix}


def _shown(spec: Spec, other: Spec) -> str:
    return str(spec.shape) if spec.shape != other.shape else spec.dtype


def _near(word: str, names: Iterable[str]) -> str:
    """A hint at a part of a name that is nearly the word."""
    hint = did_you_mean(word, {part for name in names for part in name.split(".") if not part.isdigit()})
    return f" {hint}" if hint.startswith("Did") and "." not in word else ""
