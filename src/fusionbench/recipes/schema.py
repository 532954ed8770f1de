"""What a recipe says, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusionbench.formats import Spec
from fusionbench.recipes.document import Problems
from fusionbench.recipes.methods import METHODS
from fusionbench.recipes.vocabulary import TokenizerSettings


@dataclass(frozen=True)
class Reference:
    """A model: a place, an adapter on it, or another document's result.

    Attributes:
        place: path, zoo:NAME, hf:OWNER/NAME, or the name of another document.
        adapter: of an adapter that stands on it; empty where there is none.
    """

    place: str
    adapter: str = ""
    line: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        return f"{self.place}+{self.adapter}" if self.adapter else self.place


@dataclass(frozen=True)
class Setting:
    """A value, or a gradient over the layers, for the tensors whose name has `filter` in it; empty for all."""

    filter: str
    values: tuple[float | bool, ...]
    line: int = 0


Settings = Mapping[str, tuple[Setting, ...]]
"""Of parameters by name: the first whose filter fits holds."""


@dataclass(frozen=True)
class Source:
    """A model of a slice, and which of its layers: first, and last but one; None for all."""

    model: Reference
    layers: tuple[int, int] | None
    parameters: Settings
    line: int = 0


@dataclass(frozen=True)
class Slice:
    """Layers that are merged with each other."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Settings
    line: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a slice is merged from: `models`, and the base where the method has one and it is none of them."""

    base: Reference | None
    models: tuple[Source, ...]

    @property
    def sources(self) -> list[Reference]:
        """All of them, the base first."""
        return [*([] if self.base is None else [self.base]), *(source.model for source in self.models)]


@dataclass(frozen=True)
class Recipe:
    """One document.

    Attributes:
        method: mergekit's name; ours where the convention is the paper's.
        convention: whose.
        slices: what is merged; one, with all layers, where the recipe lists `models`.
        whole: whether it does.
        base: the base model.
        parameters: of all slices.
        hyperparameters: of our method, by the paper's convention.
        dtype: of what is written, under safetensors' name; None for that of the base or the first model.
        tokenizer: what is asked for of it; None where nothing is.
        vocabulary: truncate to the fewest rows or pad to the most, where models have other numbers of tokens, or make
            the union of the tokens; empty where nothing is asked for.
        chat_template: auto, a name, or the template itself; empty for the tokenizer's.
        name: by which other documents know it; empty for the result.
        seed: of random methods.
        problems: of the file, where what is found later is noted.
        line: of its first word.
        lines: of its keys.
    """

    method: str
    convention: Literal["mergekit", "paper"]
    slices: tuple[Slice, ...]
    whole: bool
    base: Reference | None
    parameters: Settings
    hyperparameters: Mapping[str, Any]
    dtype: str | None
    tokenizer: TokenizerSettings | None
    vocabulary: str
    chat_template: str
    name: str
    seed: int
    problems: Problems
    line: int = 0
    lines: Mapping[str, int] = field(default_factory=dict)

    def written(self, spec: Spec) -> Spec:
        """Dtype and shape of what is written for a tensor."""
        return spec if self.dtype is None or not spec.floating else Spec(self.dtype, spec.shape)

    @property
    def references(self) -> dict[str, Reference]:
        """All models, by name, in the order in which they are named; the base first where there is one."""
        found = [] if self.base is None else [self.base]
        for part in self.slices:
            found += [source.model for source in part.sources] + ([] if part.base is None else [part.base])
        first: dict[str, Reference] = {}
        for reference in found:
            first.setdefault(reference.name, reference)
        return first


def inputs_of(recipe: Recipe, part: Slice) -> Inputs:
    """The inputs of a slice, as the method sees them: with the base, where a recipe that lists models leaves it out."""
    base = part.base or recipe.base
    kind = METHODS[recipe.method].base if recipe.convention == "mergekit" else "base"
    others = tuple(source for source in part.sources if source.model != base)
    if kind == "base" or (kind == "optional" and base is not None):
        return Inputs(base, others)
    if kind == "first" and base is not None:
        return Inputs(None, (_source_of(base, part), *others))
    if recipe.whole and base is not None and len(others) == len(part.sources):
        return Inputs(None, (*part.sources, _source_of(base, part)))
    return Inputs(None, part.sources)


def _source_of(model: Reference, part: Slice) -> Source:
    return next((source for source in part.sources if source.model == model), Source(model, None, {}, part.line))
