"""What a parameter is for one tensor: precedence, filters, and gradients over the layers."""

from __future__ import annotations

from collections.abc import Iterable

from fusionbench.recipes.schema import Setting, Settings

Value = float | bool


def resolved(name: str, scopes: Iterable[Settings], tensor: str, t: float) -> Value | None:
    """The value of a parameter for a tensor; None where no scope has one for it.

    Args:
        name: of the parameter.
        scopes: from what comes first (a source in a slice) to what comes last (the recipe).
        tensor: its name.
        t: where its layer is in its slice: 0 for the first, 1 for the last.
    """
    for settings in scopes:
        for setting in settings.get(name, ()):
            if setting.filter in tensor:
                return at(setting.values, t)
    return None


def at(values: tuple[Value, ...], t: float) -> Value:
    """The value at `t` in [0, 1]: of numbers, on the line between the two nearest; of flags, of the part `t` is in."""
    place = t * (len(values) - 1)
    left = int(place)
    if any(isinstance(value, bool) for value in values):
        return values[left]
    share = place - left
    return (1 - share) * values[left] + share * values[min(left + 1, len(values) - 1)]


def position(index: int, count: int) -> float:
    """Where a layer is among `count`, from 0 to 1; a lone one is at 1."""
    return index / (count - 1) if count > 1 else 1.0


def unmatched(settings: Settings, tensors: Iterable[str]) -> list[tuple[str, Setting]]:
    """The settings, with the names of their parameters, whose filters are in no tensor's name."""
    names = list(tensors)
    return [
        (name, setting)
        for name, several in settings.items()
        for setting in several
        if not any(setting.filter in tensor for tensor in names)
    ]
