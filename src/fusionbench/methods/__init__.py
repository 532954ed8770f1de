"""The fusion methods, one file per paper; `fusionbench.methods.NAME` is the function called NAME.

Called by this name, its hyperparameters are checked, and a checkpoint says in its recipe how it was made.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fusionbench import registry

# All at once: they are small, none needs torch to be imported, and only then does the name of a file that is also the
# name of its function mean the function.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
globals().update({name: method.checked for name, method in registry.registered().items()})


def __getattr__(name: str) -> Any:
    """A plugin's method, registered later."""
    if name in registry.registered():
        return registry.registered()[name].checked
    raise AttributeError(f"No method is called '{name}'. {registry.did_you_mean(name, registry.registered())}")


def __dir__() -> list[str]:
    return sorted(registry.registered())
