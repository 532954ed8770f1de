"""Whether a folder still holds what was written to it, and what its recipe gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusionbench.algorithms import algorithm
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.parallel import in_order
from fusionbench.pool import pool_of
from fusionbench.progress import track
from fusionbench.registry import get_method


def damage(folder: Path) -> tuple[list[str], int]:
    """A line for every tensor that is missing, changed or too many, by `manifest.json`; and how many it lists.

    Raises:
        InputError: where there is no manifest, or the files cannot be read as checkpoints at all.
    """
    wanted = read_table(folder, "manifest.json").get("tensors")
    if not isinstance(wanted, dict):
        raise InputError(f"'{folder / 'manifest.json'}' is no manifest: it has no 'tensors'.")
    checkpoint = Checkpoint.open(folder)
    lines = [f"'{name}' is missing." for name in wanted if name not in checkpoint.specs]
    lines += [f"'{name}' is not in the manifest." for name in checkpoint.specs if name not in wanted]
    names = [name for name in checkpoint.specs if name in wanted]
    found = track(in_order(checkpoint.hash, names), "verifying", len(names))
    for name, digest in zip(names, found, strict=True):
        if digest != wanted[name]:
            lines.append(f"'{name}' is not as it was written: its hash is {digest}, not {wanted[name]}.")
    return lines, len(wanted)


def compare_with_recipe(folder: Path, samples: int) -> list[tuple[str, bool]]:
    """Compute some tensors again by `recipe.json`, from the smallest to the largest: names, and whether they agree."""
    wanted = read_table(folder, "manifest.json")["tensors"]
    made = remade(read_table(folder, "recipe.json"))
    names = sorted(made.specs, key=lambda name: made.specs[name].numel)
    count = max(min(samples, len(names)), 1)
    chosen = [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
    return [(name, made.hash(name) == wanted.get(name)) for name in dict.fromkeys(chosen)]


def remade(recipe: dict[str, Any]) -> Checkpoint:
    """The checkpoint that a recipe describes, to be computed from the models it names."""
    if "method" not in recipe:
        location = recipe.get("location")
        if not location:
            raise InputError("The recipe names a model that was in memory only: it cannot be read again.")
        return Checkpoint.open(location)
    inputs = {name: remade(inner) for name, inner in recipe["inputs"].items()}
    if get_method(recipe["method"]).needs_tasks:
        raise InputError(f"The recipe's {recipe['method']} looked at data: it is not run again.")
    pool = pool_of({name: model for name, model in inputs.items() if name != "base"}, inputs.get("base"))
    return algorithm(recipe["method"], **recipe["hyperparameters"]).run(pool)


def read_table(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file that was written with a model."""
    try:
        content = json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise InputError(
            f"'{folder}' has no {name}: it was not written by fusionbench, or is no model folder."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"'{folder / name}' cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise InputError(f"'{folder / name}' is no table.")
    return content
