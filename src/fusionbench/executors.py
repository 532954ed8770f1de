"""Work spread over processes, or over a Ray cluster: results in order, and what a killed worker had is done again.

Both take what `fusionbench.parallel.in_order` takes. Work must be safe to do twice: a worker may die after it has
written, and before it has said so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from fusionbench.errors import InputError
from fusionbench.parallel import cores, in_order, submitted

T = TypeVar("T")
R = TypeVar("R")

BATCHES = 8  # for each worker: few, so that a call costs little; several, so that none is waited for long
ATTEMPTS = 3  # to get a batch done on which workers die


def in_processes(
    function: Callable[[T], R], items: Iterable[T], workers: int | None = None, *, long: bool = False
) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, computed by `workers` processes (one per core by default).

    Processes are forked: the function need not be picklable, and shares its memory with them. Results are pickled.
    Where an item is `long` work, a process that has nothing to do takes the next, whatever is waited for.
    """
    from concurrent.futures.process import BrokenProcessPool

    workers, items = workers or cores(), list(items)
    batches, deaths = _batches(items, workers, long), 0
    while batches:
        try:
            for results in _forked(function, batches, workers, len(batches) if long else 2 * workers):
                yield from results
                batches, deaths = batches[1:], 0
        except BrokenProcessPool:
            deaths += 1
            if deaths == ATTEMPTS:
                raise InputError(
                    f"A worker process died {deaths} times at the same work: is the memory enough? Try fewer workers."
                ) from None


def on_ray(
    function: Callable[[T], R], items: Iterable[T], workers: int | None = None, *, long: bool = False
) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, computed by a Ray cluster: of `RAY_ADDRESS`, or a local one.

    At most `workers` batches are under way at once (two for each of the cluster's cores by default); a `long` item is a
    batch of its own. The function and the items are pickled, and must mean the same on every node: files are on a
    folder that all share.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
        from ray.exceptions import RayTaskError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError("executor=ray needs Ray: pip install 'fusionbench[ray]'.") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        at_once = workers or 2 * int(ray.cluster_resources().get("CPU", 1))
        work = ray.remote(num_cpus=1, max_retries=-1)(_results)  # without end: a node may take its workers with it
        shared = ray.put(function)
        pending: deque[Any] = deque()
        for batch in [*_batches(list(items), at_once, long), None]:
            if batch is not None:
                pending.append(work.remote(shared, batch))
            while pending and (batch is None or len(pending) >= at_once):
                try:
                    yield from ray.get(pending.popleft())
                except RayTaskError as error:
                    raise error.cause from None
    finally:
        if started:
            ray.shutdown()


EXECUTORS = {"threads": in_order, "processes": in_processes, "ray": on_ray}


def _batches(items: Sequence[T], workers: int, long: bool) -> list[Sequence[T]]:
    size = 1 if long else max(1, -(-len(items) // (BATCHES * workers)))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _results(function: Callable[[T], R], batch: Sequence[T]) -> list[R]:
    return [function(item) for item in batch]


_inherited: list[Callable[[Any], Any]] = []  # of a worker process, from its parent


def _forked(function: Callable[[T], R], batches: Sequence[Sequence[T]], workers: int, ahead: int) -> Iterator[list[R]]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_inherit, initargs=(function,))
    return submitted(executor, _own_results, batches, ahead)


def _inherit(function: Callable[[Any], Any]) -> None:
    _inherited.append(function)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch = sys.modules.get("torch")
    if torch:  # its threads were the parent's
        torch.set_num_threads(1)


def _end_with(parent: int) -> None:
    """A worker of a killed parent would wait for work for ever, and keep what the parent had locked."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _own_results(batch: Sequence[Any]) -> list[Any]:
    return _results(_inherited[-1], batch)
