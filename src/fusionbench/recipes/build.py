"""From a recipe to a lazy checkpoint: tensors with the same models and values are merged together, in one pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionbench.algorithms import Algorithm
from fusionbench.alike import check_config, check_tokens
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.fuse import Models
from fusionbench.pool import ModelPool
from fusionbench.recipes.chat_templates import chat_template
from fusionbench.recipes.methods import METHODS
from fusionbench.recipes.models import open_models, opened
from fusionbench.recipes.parameters import resolved
from fusionbench.recipes.reader import DTYPES, read_recipes
from fusionbench.recipes.schema import Inputs, Recipe, inputs_of
from fusionbench.recipes.tensors import Tensor, Work, config_of, tensors_of
from fusionbench.recipes.vocabulary import aligned, resized
from fusionbench.registry import get_method
from fusionbench.sources import Assembled

FIT = ("tokenizer", "tokenizer_source", "vocabulary")  # the keys that make models' tokens fit


@dataclass(frozen=True)
class Group:
    """Tensors that are merged in the same way.

    Attributes:
        recipe: the document that they are of.
        inputs: what they are merged from, the base, where the method has one, first; under the result's names.
        merge: makes the result of such inputs.
        checkpoint: the result.
    """

    recipe: Recipe
    inputs: Sequence[Checkpoint]
    merge: Callable[[Sequence[Checkpoint]], Checkpoint]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return self.merge(self.inputs)


@dataclass(frozen=True)
class Built:
    """What a recipe makes, not computed yet.

    Attributes:
        checkpoint: the result.
        groups: of tensors, of all documents.
        recipes: the documents.
    """

    checkpoint: Checkpoint
    groups: Sequence[Group]
    recipes: Sequence[Recipe]

    def described(self) -> tuple[str, list[str], dict[str, object]]:
        """For a model card: the recipe's text, its methods, and the weights of models that have one number each."""
        *before, last = self.recipes
        weights: dict[str, object] = {}
        for source in last.slices[0].sources if last.whole and not before else ():
            found = source.parameters.get("weight", ())
            if len(found) == 1 and found[0].filter in ("", "*") and len(found[0].values) == 1:
                weights[source.model.name] = found[0].values[0]
        return last.problems.text, list(dict.fromkeys(recipe.method for recipe in self.recipes)), weights


def build(
    path: str | Path, *, text: str | None = None, models: Mapping[str, Checkpoint] | None = None, **options: Any
) -> Built:
    """The checkpoint that a recipe makes; headers and configs of its models are read, and no weights.

    Args:
        path: of the recipe.
        text: its content, where it is not to be read.
        models: those that are open already, by the name that the recipe has for them.
        options: of the pools: nan, workers, device; and vocabulary, for recipes that ask for nothing.

    Raises:
        InputError: with everything that is wrong, one a line.
    """
    recipes = read_recipes(path, text=text, known=models or ())
    folder = Path(path).parent
    files = open_models(recipes, folder, models or {})
    made: dict[str, Checkpoint] = {}
    groups: list[Group] = []
    for recipe in recipes:
        named = {}
        for name, reference in recipe.references.items():
            named[name] = made[reference.place] if reference.place in made else files[name]
            if reference.place in made and reference.adapter:
                named[name] = opened(reference.adapter, folder, made[reference.place])
        made[recipe.name], own = of_document(recipe, named, **options)
        groups += own
    said = {"text": recipes[-1].problems.text, "vocabulary": options.get("vocabulary")}
    result = made[recipes[-1].name].made_by("recipe", {key: value for key, value in said.items() if value is not None})
    result.inputs = files
    return Built(result, groups, recipes)


def of_document(
    recipe: Recipe, models: dict[str, Checkpoint], *, vocabulary: str | None = None, **options: Any
) -> tuple[Checkpoint, list[Group]]:
    """What one document makes of its models, and the groups that it consists of."""
    first = inputs_of(recipe, recipe.slices[0]).sources[0].name
    base = first if recipe.base is None else recipe.base.name
    given, files = models, {}
    named = None if recipe.base is None else base
    try:
        if recipe.tokenizer is not None:
            models, files = aligned(models, named, recipe.tokenizer)
        elif how := recipe.vocabulary or vocabulary:
            models, files = resized(models, how, named)
    except InputError as error:
        recipe.problems.add(next((line for key, line in recipe.lines.items() if key in FIT), recipe.line), str(error))
        recipe.problems.stop()
    work = Work(recipe, models, base)
    check_alike(work, tokens=models is given)
    if recipe.convention == "paper":
        work.problems.stop()
        groups = [_of_our_method(work, options)]
        result = groups[0].checkpoint
    else:
        tensors, config = tensors_of(work), config_of(work)
        merges = grouped(work, tensors)
        work.problems.stop()
        groups = [_group(work, options, *merge) for merge in merges]
        where = {name: group.checkpoint for group in groups for name in group.checkpoint.specs}
        parts = {tensor.name: (where[tensor.name], tensor.name) for tensor in tensors}
        changed = config if config != work.reference.config else None
        result = Checkpoint.assemble(parts, like=work.reference, inputs={}, config=changed)
    if recipe.dtype is not None:
        if any(recipe.written(spec) != spec for spec in result.specs.values()):  # what our method took as it is
            result = ModelPool({"result": result}, dtype=recipe.dtype, **options).fuse(Models([1.0]))
        result.new_config = with_dtype(result.config, recipe.dtype) if result.config else None
    result = result.with_files(files)
    if recipe.chat_template:
        result = result.with_files(chat_template(recipe.chat_template, given, result))
    return result, groups


def check_alike(work: Work, *, tokens: bool) -> None:
    """Problems where models that are merged compute other things of the same weights; warnings of what matters less.

    And of tokens, where they have not been made to fit.
    """
    seen: set[tuple[str, str]] = set()
    for part in work.recipe.slices:
        inputs = work.inputs(part)
        head = inputs.sources[0].name
        label, reference = f"'{head}'", work.models[head]
        new = {source.model.name: source for source in inputs.models if source.model.name != head}
        new = {name: source for name, source in new.items() if (head, name) not in seen}
        seen |= {(head, name) for name in new}
        for name, source in new.items():
            try:
                check_config(f"'{name}'", work.models[name], label, reference)
            except InputError as error:
                work.problems.add(source.line, str(error))
        if tokens:
            check_tokens({f"'{name}'": work.models[name] for name in new}, label, reference)


def grouped(work: Work, tensors: Sequence[Tensor]) -> list[tuple[Inputs, dict[str, Any], list[Tensor]]]:
    """Tensors that have the same inputs and values, together. Problems are noted."""
    recipe, method = work.recipe, METHODS[work.recipe.method]
    groups: dict[Any, tuple[Inputs, dict[str, Any], list[Tensor]]] = {}
    missing: dict[tuple[str, str, int], list[str]] = {}
    for tensor in tensors:
        inputs, scopes = work.inputs(tensor.part), (tensor.part.parameters, recipe.parameters)
        olds = tensor.sources[inputs.base is not None :]
        values: dict[str, Any] = {"seed": recipe.seed}
        for name, parameter in method.parameters.items():
            if parameter.scope == "merge":
                asked = [("", tensor.name, scopes, recipe.line)]
            else:
                asked = [
                    (source.model.name, old, (source.parameters, *scopes), source.line)
                    for source, old in zip(inputs.models, olds, strict=True)
                ]
            found = []
            for model, old, places, line in asked:
                value = resolved(name, places, old, tensor.t)
                value = parameter.default if value is None else value
                if value is None:
                    missing.setdefault((name, model, line), []).append(old)
                    value = 1.0
                found.append(int(value) if parameter.kind == "whole" else value)
            values[name] = found[0] if parameter.scope == "merge" else found
        key = (tuple(reference.name for reference in inputs.sources), repr(values))
        groups.setdefault(key, (inputs, values, []))[2].append(tensor)
    for (name, model, line), names in missing.items():
        of = f" of '{model}'" if model else ""
        which = "" if len(names) == len(tensors) else f" for '{names[0]}' ({len(names)} tensors that no filter fits)"
        work.problems.add(line, f"{recipe.method} needs '{name}'{of}{which}: give it under parameters.")
    for _, values, members in groups.values() if not missing else ():
        if wrong := method.check(values):
            work.problems.add(members[0].part.line, f"{recipe.method}: {wrong}, as for '{members[0].name}'.")
    return list(groups.values())


def _group(
    work: Work, options: Mapping[str, Any], inputs: Inputs, values: dict[str, Any], members: Sequence[Tensor]
) -> Group:
    models = []
    for i, reference in enumerate(inputs.sources):
        model = work.models[reference.name]
        stored = {tensor.name: (model, work.stored(model, tensor.sources[i])) for tensor in members}
        specs = {name: model.specs[old] for name, (_, old) in stored.items()}
        models.append(Checkpoint(specs, Assembled(stored), folder=model.folder, location=model.location))
    merge = METHODS[work.recipe.method].merge
    return Group(work.recipe, models, lambda models: merge(_pool(work.recipe, inputs, models, options), values))


def _of_our_method(work: Work, options: Mapping[str, Any]) -> Group:
    recipe, inputs = work.recipe, work.inputs(work.recipe.slices[0])
    algorithm = Algorithm(get_method(recipe.method), dict(recipe.hyperparameters))

    def merge(models: Sequence[Checkpoint]) -> Checkpoint:
        made = algorithm.run(_pool(recipe, inputs, models, options))
        if not isinstance(made, Checkpoint):
            raise InputError(f"{recipe.method} gives no checkpoint, but a module: use fusionbench run.")
        return made

    return Group(recipe, [work.models[reference.name] for reference in inputs.sources], merge)


def _pool(recipe: Recipe, inputs: Inputs, models: Sequence[Checkpoint], options: Mapping[str, Any]) -> ModelPool:
    base, others = (None, models) if inputs.base is None else (models[0], models[1:])
    names = [source.model.name for source in inputs.models]
    named = {"./base" if name == "base" else name: model for name, model in zip(names, others, strict=True)}
    return ModelPool(named, base, dtype=recipe.dtype, **options)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says what dtype the weights have, under safetensors' name; also in the parts it has for towers."""
    parts = {
        key: with_dtype(value, dtype)
        for key, value in config.items()
        if isinstance(value, Mapping) and ("dtype" in value or "torch_dtype" in value)
    }
    name = next(name for name, known in DTYPES.items() if known == dtype)
    return {**config, **parts, "torch_dtype" if "torch_dtype" in config else "dtype": name}
