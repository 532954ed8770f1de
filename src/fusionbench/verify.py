"""Whether a folder still holds what was written to it, and what its recipe gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from fusionbench import formats
from fusionbench.algorithms import Algorithm
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.formats import shown
from fusionbench.parallel import in_order
from fusionbench.pool import pool_of
from fusionbench.progress import track
from fusionbench.registry import get_method, list_methods


def damage(folder: Path) -> tuple[list[str], int]:
    """A line for every tensor that is missing, changed or too many, by `manifest.json`; and how many it lists.

    Raises:
        InputError: where there is no manifest, or the files cannot be read as checkpoints at all.
    """
    wanted, headers = _manifest(folder)
    checkpoint = Checkpoint.open(folder)
    lines = [f"{shown(name)} is missing." for name in wanted if name not in checkpoint.specs]
    lines += [f"{shown(name)} is not in the manifest." for name in checkpoint.specs if name not in wanted]
    names = [name for name in checkpoint.specs if name in wanted]
    found = track(in_order(checkpoint.hash, names), "verifying", len(names))
    for name, digest in zip(names, found, strict=True):
        if digest != wanted[name]:
            hashes = f"{shown(digest)}, not {shown(wanted[name])}"
            lines.append(f"{shown(name)} is not as it was written: its hash is {hashes}.")
    if not lines:  # the same bytes may now have other dtypes, shapes or names that they are tied to
        files = {file.name: file for file in formats.weight_files(folder)}
        same = {name: name in files and _header_hash(files[name]) == digest for name, digest in headers.items()}
        lines = [f"{shown(name)} has not the header that was written." for name in same if not same[name]]
    return lines, len(wanted)


def compare_with_recipe(folder: Path, samples: int) -> list[tuple[str, bool]]:
    """Compute some tensors again by `recipe.json`, from the smallest to the largest: names, and whether they agree."""
    wanted, _ = _manifest(folder)
    try:
        made = remade(_read(folder, "recipe.json"))
    except RecursionError:
        raise InputError(f"'{folder / 'recipe.json'}' is nested too deeply.") from None
    names = sorted(made.specs, key=lambda name: made.specs[name].numel)
    count = min(samples, len(names))
    chosen = [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
    return [(name, made.hash(name) == wanted.get(name)) for name in dict.fromkeys(chosen)]


def remade(recipe: Any, base: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint that a recipe describes, to be computed from the models it names."""
    known = recipe if isinstance(recipe, dict) else {}
    if isinstance(known.get("location"), str):
        if not known["location"]:
            raise InputError("The recipe names a model that was in memory only: it cannot be read again.")
        return Checkpoint.open(known["location"], base=base)
    if isinstance(known.get("vocabulary"), dict):
        return _refitted(known)
    if "align" in known:
        return _realigned(known, base)
    method, given, hyperparameters = (known.get(key) for key in ("method", "inputs", "hyperparameters"))
    if not (isinstance(method, str) and isinstance(given, dict) and given and isinstance(hyperparameters, dict)):
        raise InputError("The recipe has neither a model's location nor a method, its inputs and hyperparameters.")
    if method == "moe":
        return _mixed(given, hyperparameters)
    if method == "recipe":
        return _by_recipe(given, hyperparameters)
    plugin = known.get("plugin")
    if isinstance(plugin, str) and method not in [found.name for found in list_methods()]:
        raise InputError(f"The recipe's {method} is of the plugin {plugin}: give --plugin {plugin}.")
    if get_method(method).needs_tasks:
        raise InputError(f"The recipe's {method} looked at data: it is not run again.")
    base = remade(given["base"]) if "base" in given and len(given) > 1 else None
    models = {name: remade(model, base) for name, model in given.items() if name != "base" or len(given) == 1}
    pool = pool_of(models, base, nan="ignore")  # whoever wrote it was told, or did not want to be
    made = Algorithm(get_method(method), get_method(method).check(hyperparameters)).run(pool)
    if not isinstance(made, Checkpoint):
        raise InputError(f"The recipe's {method} gives no checkpoint.")
    return made


def _mixed(given: dict[str, Any], hyperparameters: dict[str, Any]) -> Checkpoint:
    """A mixture of experts."""
    from fusionbench.recipes.moe import remade as mixture

    return mixture(hyperparameters, _named(given))


def _by_recipe(given: dict[str, Any], hyperparameters: dict[str, Any]) -> Checkpoint:
    """What a recipe makes of the models that it names."""
    from fusionbench.recipes.build import build

    models, text = _named(given), str(hyperparameters.get("text"))
    return build(
        "recipe", text=text, models=models, vocabulary=hyperparameters.get("vocabulary"), nan="ignore"
    ).checkpoint


def _named(given: dict[str, Any]) -> dict[str, Checkpoint]:
    """Models by their names; an adapter stands on the model before its +."""
    models: dict[str, Checkpoint] = {}
    for name in sorted(given, key=len):
        models[name] = remade(given[name], models.get(name.partition("+")[0]))
    return models


def _refitted(recipe: dict[str, Any]) -> Checkpoint:
    """One of several models that were made to fit each other's vocabularies."""
    from fusionbench.recipes.vocabulary import remade as refitted

    inputs, said = recipe.get("inputs"), recipe["vocabulary"]
    known = {"how", "base"} <= said.keys() or isinstance(said.get("settings"), dict)
    if not isinstance(inputs, dict) or not known or recipe.get("model") not in inputs:
        raise InputError("The recipe has a model made to fit others' vocabularies, but not how, or not those models.")
    first = said.get("base")
    if first is not None and first not in inputs:
        raise InputError(f"The recipe's vocabulary names the base '{first}', which is none of its models.")
    base = None if first is None else remade(recipe["inputs"][first])
    models = {n: base if base and n == first else remade(model, base) for n, model in recipe["inputs"].items()}
    return refitted(recipe, models)


def _realigned(recipe: dict[str, Any], base: Checkpoint | None) -> Checkpoint:
    """A model whose units were permuted to the order of a reference's."""
    given = recipe.get("inputs")
    if not isinstance(given, dict) or not {"reference", "model"} <= given.keys():
        raise InputError("The recipe has an aligned model, but not both the model and its reference.")
    reference = remade(given["reference"])
    pool = pool_of({"model": remade(given["model"], base)}, reference, nan="ignore")
    return pool.aligned(str(recipe["align"]), seed=recipe.get("seed", 0))["model"]


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hashes of tensors, and of the files' headers."""
    table = _read(folder, "manifest.json")
    tensors, headers = table.get("tensors"), table.get("headers")
    if not isinstance(tensors, dict) or not isinstance(headers, dict):
        raise InputError(f"'{folder / 'manifest.json'}' is no manifest: it has no tables 'tensors' and 'headers'.")
    return tensors, headers


def _header_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        length = stream.read(8)
        return xxhash.xxh3_128_hexdigest(length + stream.read(int.from_bytes(length, "little")))


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file that was written with a model."""
    if not (folder / name).is_file():
        raise InputError(f"'{folder}' has no {name}: it was not written by fusionbench, or is no model folder.")
    return formats.read_table(folder / name)
