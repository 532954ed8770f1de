"""The one error a user can cause and can mend."""

from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """Something given from outside is wrong: one line says what was asked, what was found and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class UnknownName(InputError, KeyError):
    """A mapping has nothing of that name: what `Mapping.get` answers with None."""

    __str__ = InputError.__str__  # KeyError's has quotes around it


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """End an error about an unknown name: the nearest of `options`, or all of them when none is near."""
    import difflib

    options = sorted(options)
    nearest = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    nearest = nearest or [option for option in options if word and option.startswith(word)]
    if nearest:
        return f"Did you mean '{nearest[0]}'?"
    return f"There is: {', '.join(options)}." if options else "There is none."


def is_count(value: object) -> bool:
    """Whether a value from outside is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_keys(what: str, table: Mapping[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    """An error for a key that is not known, or that is missing."""
    known = list(known)
    for key in table:
        if key not in known:
            raise InputError(f"{what} takes no '{key}'. {did_you_mean(str(key), known)}")
    for key in required:
        if table.get(key) is None:
            raise InputError(f"{what} has no '{key}'.")
