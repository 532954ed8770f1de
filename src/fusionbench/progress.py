"""Progress of long work: the library reports it, and whoever runs the library decides whether to show it."""

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Description = str | Callable[[], str]  # a function is asked again after every item
Tracker = Callable[[Iterable[T], Description, int | None], Iterator[T]]

shown: ContextVar[Tracker | None] = ContextVar("shown", default=None)


def track(items: Iterable[T], description: Description, total: int | None = None) -> Iterator[T]:
    """Yield from `items`, telling the tracker in `shown`, if there is one, how far it is."""
    tracker = shown.get()
    yield from items if tracker is None else tracker(items, description, total)
