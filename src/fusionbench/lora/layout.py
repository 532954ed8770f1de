"""What PEFT will find in a model: which modules are layers it adapts, how they store weights, and what is tied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fusionbench.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "conv1d", "convolution", "embedding"]


@dataclass(frozen=True)
class Layout:
    """The modules of a model.

    Attributes:
        built: whether a class of transformers said so; otherwise matrices are taken for linear layers.
        kinds: of each layer that PEFT can adapt, what it is; "conv1d" is GPT-2's, a linear layer stored as (in, out).
        names: of each stored tensor, every name it has in the module: several where it is tied.
    """

    built: bool
    kinds: dict[str, Kind] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)


def layout(base: Checkpoint) -> Layout:
    """The modules of the class that the base's config.json names, or what can be told from its tensors alone."""
    model = _skeleton(base)
    if model is None:
        names = {name: [name, *(a for a, to in base.aliases.items() if to == name)] for name in base.specs}
        return Layout(
            False, {n.removesuffix(".weight"): kind for n in base.specs if (kind := _guessed(n, base))}, names
        )
    kinds: dict[str, Kind] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            kinds[name] = kind
    same: dict[int, list[str]] = {}
    for name, parameter in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        same.setdefault(id(parameter), []).append(name)
    tied = {name: group for group in same.values() for name in group}
    names = {}
    for stored in base.specs:
        found = (
            [stored] if stored in tied else [n for n in tied if n.endswith(f".{stored}") or stored.endswith(f".{n}")]
        )
        # The stored name's own first: the others are copies.
        names[stored] = sorted(tied[found[0]], key=lambda n: n != found[0]) if len(found) == 1 else [stored]
    return Layout(True, kinds, names)


def _skeleton(base: Checkpoint) -> nn.Module | None:
    """The model without its numbers; None where transformers, or the class its config names, is not there."""
    if base.folder is None or not base.config.get("architectures"):
        return None
    try:
        import torch
        import transformers
    except ModuleNotFoundError:
        return None
    cls = getattr(transformers, str(base.config["architectures"][0]), None)
    if cls is None:
        return None
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(base.folder))
    model.tie_weights()
    return model


def _kind(module: nn.Module) -> Kind | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return "convolution"
    return "linear" if isinstance(module, nn.Linear) else None


def _guessed(name: str, base: Checkpoint) -> Kind | None:
    shape = base.specs[name].shape
    if not name.endswith(".weight") or len(shape) < 2:
        return None
    last = name.removesuffix(".weight").rpartition(".")[2]
    if len(shape) == 2:
        return "embedding" if "embed" in last or last in ("wte", "wpe") else "linear"
    return "convolution" if len(shape) <= 5 else None
