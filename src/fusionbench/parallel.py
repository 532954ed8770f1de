"""Work spread over threads: results in order, and only as much in flight as is needed."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fusionbench.errors import InputError, is_count

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> None:
    """An error where this is no number of workers; None is one per core."""
    if workers is not None and not is_count(workers):
        raise InputError(f"workers must be a number of threads, 1 or more; got {workers!r}.")


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, computed by `workers` threads (one per core by default).

    The first failure is raised, and nothing that has not begun is begun. Meanwhile each thread is torch's only one: its
    own threads on top of ours would wait for each other, and twice the CPU time would go by.
    """
    workers = workers or cores()
    torch = sys.modules.get("torch")  # what has not been imported has no threads
    before = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(1)
    try:
        if workers == 1:
            yield from map(function, items)
        else:
            yield from submitted(ThreadPoolExecutor(workers), function, items, 2 * workers)
    finally:
        if torch:
            torch.set_num_threads(before)


def submitted(executor: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield an executor's results in order, with so many items submitted ahead; then shut it down."""
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class once:
    """A property that is computed when first asked for, then kept.

    Like `functools.cached_property`, which in Python 3.11 holds one lock for all instances while it computes: threads
    that read different parameters would wait for each other.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        value = instance.__dict__[self._function.__name__] = self._function(instance)
        return value


class Budget:
    """Bytes that may be in use at once. What needs more than there is at all runs alone."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._changed = threading.Condition()

    def use(self, amount: int) -> "_Share":
        """A context in which `amount` bytes are set aside; entering it waits until they are free."""
        return _Share(self, min(amount, self.total))

    def change(self, amount: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free + amount >= 0)
            self._free += amount
            self._changed.notify_all()


class _Share:
    def __init__(self, budget: Budget, amount: int) -> None:
        self._budget, self._amount = budget, amount

    def __enter__(self) -> None:
        self._budget.change(-self._amount)

    def __exit__(self, *_: object) -> None:
        self._budget.change(self._amount)
