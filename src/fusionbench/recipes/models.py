"""The models that recipes name, opened: of weights, headers alone are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.formats import Spec
from fusionbench.locations import find
from fusionbench.recipes.schema import Recipe

QUANTISED = re.compile(r"\.(?:qweight|qzeros|weight_scale|weight_scale_inv|absmax|quant_map|SCB|quant_state.*)$")


def open_models(recipes: Sequence[Recipe], folder: Path, given: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models in files that recipes name, by name, and those that adapters stand on.

    Args:
        recipes: the documents, which may name each other's results.
        folder: of the recipe, where paths begin; what it has not is looked for here.
        given: models that are open already.

    Raises:
        InputError: with a line for every model that cannot be opened, or is quantised.
    """
    documents = {recipe.name for recipe in recipes}
    found: dict[str, Checkpoint] = {}
    problems = recipes[-1].problems
    for reference in (reference for recipe in recipes for reference in recipe.references.values()):
        if reference.name in found or (reference.place in documents and not reference.adapter):
            continue
        try:
            if reference.place in documents:  # what it is to stand on is not made yet
                found[reference.name] = given.get(reference.name) or adapter(reference.adapter, folder)
                continue
            for name in dict.fromkeys((reference.place, reference.name)):
                if name not in found:
                    adapted = name != reference.place
                    base, place = (found[reference.place], reference.adapter) if adapted else (None, name)
                    found[name] = given[name] if name in given else opened(place, folder, base)
                check_numbers(name, found[name])
        except InputError as error:
            problems.add(reference.line, str(error))
    problems.stop()
    return found


def adapter(place: str, folder: Path) -> Checkpoint:
    """The tensors of an adapter by itself."""
    from fusionbench.lora import Adapter

    location = find(place, relative_to=folder)
    return Adapter.open(location, str(location)).checkpoint


def opened(place: str, folder: Path, base: Checkpoint | None) -> Checkpoint:
    """The model at a place; an adapter stands on `base`."""
    remote = place.startswith(("zoo:", "hf:"))
    return Checkpoint.open(place if remote else find(place, relative_to=folder), base=base)


def check_numbers(name: str, model: Checkpoint) -> None:
    """An error where a model's weights are codes of numbers, and not the numbers."""
    if reason := _quantised(model):
        raise InputError(
            f"'{name}' is quantised ({reason}), and such numbers cannot be merged: name the model that it "
            "was made of, or de-quantise it (transformers: model.dequantize(), then save_pretrained)."
        )


def _quantised(model: Checkpoint) -> str:
    """What says so; empty where nothing does."""
    how = model.config.get("quantization_config")
    if how is not None:
        return str(how.get("quant_method", "quantization_config")) if isinstance(how, dict) else "quantization_config"
    names = (name for name, spec in model.specs.items() if QUANTISED.search(name) or _is_code(name, spec))
    return next((f"'{name}' is {model.specs[name]}" for name in names), "")


def _is_code(name: str, spec: Spec) -> bool:
    """Whether small integers stand for a weight; unsigned ones may be a mask."""
    return spec.dtype == "I8" or spec.dtype == "U8" and name.endswith("weight")
