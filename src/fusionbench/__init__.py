"""Fusionbench: deep model fusion. Combine fine-tuned models without training, and measure what is gained and lost.

import fusionbench as fb

pool = fb.ModelPool({"mnist": "path/to/mnist", "svhn": "path/to/svhn"}, base="path/to/base")
merged = fb.methods.ties_merging(pool, density=0.2)
fb.save(merged, "path/to/merged")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionbench import methods, ops
    from fusionbench.algorithms import Algorithm, algorithm
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.config import load_modelpool, load_taskpool
    from fusionbench.errors import InputError
    from fusionbench.param import Param
    from fusionbench.pool import ModelPool
    from fusionbench.registry import Range, get_method, list_methods, method
    from fusionbench.task import Report, Task, TaskPool
    from fusionbench.writer import save

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that `import fusionbench` costs nothing.
_HOMES = {
    "Algorithm": "algorithms",
    "algorithm": "algorithms",
    "Checkpoint": "checkpoint",
    "InputError": "errors",
    "load_modelpool": "config",
    "load_taskpool": "config",
    "ModelPool": "pool",
    "Param": "param",
    "Range": "registry",
    "get_method": "registry",
    "list_methods": "registry",
    "method": "registry",
    "save": "writer",
    "Report": "task",
    "Task": "task",
    "TaskPool": "task",
}
__all__ = [
    "Algorithm",
    "Checkpoint",
    "InputError",
    "ModelPool",
    "Param",
    "Range",
    "Report",
    "Task",
    "TaskPool",
    "algorithm",
    "get_method",
    "list_methods",
    "load_modelpool",
    "load_taskpool",
    "method",
    "methods",
    "ops",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "ops"):
        return import_module(f"fusionbench.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"fusionbench.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module 'fusionbench' has no attribute '{name}'")
