"""Any module at all: a copy of one given, with other tensors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from fusionbench.alignment import Symmetries

# What does the same to every unit, to every channel of a picture, and what has a weight for each.
UNITWISE = ("ReLU", "ReLU6", "GELU", "SiLU", "ELU", "LeakyReLU", "Tanh", "Sigmoid", "Softplus", "Dropout", "Identity")
POOLING = ("MaxPool1d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d")
LIBRARIES = ("torch", "transformers")  # whose classes are known by their names
CONVOLUTIONS, NORMS, VECTOR_NORMS = ("Conv1d", "Conv2d"), ("BatchNorm1d", "BatchNorm2d"), ("LayerNorm", "RMSNorm")


class Template:
    """Build models as copies of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def backbone(self, checkpoint: Checkpoint) -> Checkpoint:
        """All of it."""
        return checkpoint

    def build(self, checkpoint: Checkpoint) -> nn.Module:
        """A copy of the module with the tensors of `checkpoint`."""
        module = copy.deepcopy(self._module).float()  # numbers of a half would be rounded to it
        module.load_state_dict(dict(checkpoint))
        return module

    def describe(self) -> list[Any]:
        """What the module computes, as far as can be told: its layers, its config, and the code of its own classes."""
        to_dict = getattr(getattr(self._module, "config", None), "to_dict", dict)
        classes = {type(module) for module in self._module.modules()}
        own = [each for each in classes if each.__module__.partition(".")[0] not in LIBRARIES]
        return [repr(self._module), to_dict(), sorted(map(_code, own))]

    def symmetries(self, checkpoint: Checkpoint) -> Symmetries | None:
        """Hidden units of a `Sequential`; those of its family for a model of transformers; None of others."""
        from torch import nn

        from fusionbench.architectures import architecture_of
        from fusionbench.errors import InputError

        if isinstance(self._module, nn.Sequential):
            return _of_sequential(self._module, checkpoint)
        config = getattr(self._module, "config", None)
        to_dict = getattr(config, "to_dict", None)
        if to_dict is None:
            return None
        described = Checkpoint(checkpoint.specs, checkpoint.source, aliases=checkpoint.aliases, config=to_dict())
        try:
            architecture = architecture_of(described)
        except InputError:
            return None
        return architecture.symmetries(described)


def _of_sequential(module: nn.Sequential, checkpoint: Checkpoint) -> Symmetries:
    """Of layer after layer; units that go into what is not known to treat them all alike stay where they are."""
    from fusionbench.architectures._symmetries import permutation_spec, symmetries_of_spec

    rules: dict[str, tuple[str | None, ...]] = {}
    fixed: set[str | None] = set()
    axis: str | None = None
    units, picture = 0, False  # whether they are channels, with more dimensions behind
    for name, layer in _flat(module):
        kind, weight = type(layer).__name__, getattr(layer, "weight", None)
        if kind == "Linear" or kind in CONVOLUTIONS and layer.groups == 1:
            assert weight is not None
            if picture != (kind != "Linear") or weight.shape[1] != units:
                fixed.add(axis)
                axis = None
            rules[name] = (f"units of {name}", axis)
            axis, units, picture = f"units of {name}", weight.shape[0], kind != "Linear"
        elif kind in (*NORMS, *VECTOR_NORMS) and weight is not None and weight.shape == (units,):
            if picture and kind in VECTOR_NORMS:
                fixed.add(axis)
            rules[name] = (axis,)
        elif kind == "Flatten":
            picture = False
        elif kind not in UNITWISE and not (kind in POOLING and picture):
            fixed.add(axis)
            axis = None
    fixed.add(axis)
    rules = {name: tuple(None if axis in fixed else axis for axis in axes) for name, axes in rules.items()}
    spec = permutation_spec(checkpoint, rules, output="", free=True, whole_names=True)
    return symmetries_of_spec(checkpoint, spec)


def _code(own: type) -> str:
    try:
        return inspect.getsource(own)
    except (OSError, TypeError):  # as of a class that was typed in
        return own.__qualname__


def _flat(module: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a `Sequential`, in order, with those of `Sequential` within it."""
    for name, layer in module.named_children():
        if type(layer).__name__ == "Sequential":
            yield from _flat(layer, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, layer
