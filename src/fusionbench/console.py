"""What people see while the command line works, and where: tables on the terminal, progress on its error stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fusionbench.progress import Description, shown

if TYPE_CHECKING:
    from rich.console import Console


def terminal() -> Console:
    """Where tables go."""
    from rich.console import Console

    # A file or a pipe has no width of its own: room for every column, unless COLUMNS says otherwise.
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=200 if wide else None)


def quiet() -> None:
    """Keep transformers' advice and progress bars out of the terminal: it is not about what the user did."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def shown_progress() -> Iterator[None]:
    """A context in which long work shows a bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:

        def tracker(items: Iterable[Any], description: Description, total: int | None) -> Iterator[Any]:
            task = progress.add_task(description if isinstance(description, str) else description(), total=total)
            for item in items:
                yield item
                progress.advance(task)
                if not isinstance(description, str):
                    progress.update(task, description=description())
            progress.remove_task(task)

        token = shown.set(tracker)
        try:
            yield
        finally:
            shown.reset(token)
