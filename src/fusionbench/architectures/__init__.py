"""How the tensors of a checkpoint become a module that runs: one file per family.

A file has two functions, `backbone(checkpoint)` and `build(checkpoint)`, as `fusionbench.pool.Architecture` says, and
names in `MODEL_TYPES` the `model_type` of the configs it understands.

It may have a third, `symmetries(checkpoint)`: which axes of which tensors share a permutation that leaves what the
model computes unchanged (`fusionbench.alignment`). `_symmetries.py` makes that of a table of rules.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fusionbench.architectures._building import MIXED
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError, did_you_mean


def list_architectures() -> list[str]:
    """The names of the families there are."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get_architecture(name: str) -> Any:
    """The architecture called `name`, for `ModelPool(architecture=...)`."""
    if name not in list_architectures():
        raise InputError(f"No architecture is called '{name}'. {did_you_mean(name, list_architectures())}")
    return import_module(f"{__name__}.{name}")


def architecture_of(checkpoint: Checkpoint) -> Any:
    """The architecture that a checkpoint's own config.json names."""
    model_type = checkpoint.config.get("model_type")
    family = str(model_type).removeprefix(MIXED)
    for name in list_architectures():
        if family in get_architecture(name).MODEL_TYPES:
            return get_architecture(name)
    raise InputError(
        f"'{checkpoint.location}' has the model type '{model_type}' in its config.json, which no architecture here "
        f"builds. There is: {', '.join(list_architectures())}."
    )
