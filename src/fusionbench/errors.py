"""The one error a user can cause and can mend."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something given from outside is wrong: one line says what was asked, what was found and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """End an error about an unknown name: the nearest of `options`, or all of them when none is near."""
    import difflib

    options = sorted(options)
    nearest = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if nearest:
        return f"Did you mean '{nearest[0]}'?"
    return f"There is: {', '.join(options)}." if options else "There is none."
