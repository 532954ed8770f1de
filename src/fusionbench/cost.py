"""What a run costs: time, memory, parameters that are more, and how much longer a prediction takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusionbench.checkpoint import Checkpoint
from fusionbench.pool import ModelPool
from fusionbench.task import NoData, TaskPool, model_info
from fusionbench.tasks._batches import to_device

SAMPLES, REPEATS = 32, 5
_timed: list[dict[str, float]] = []  # the tables of the blocks that stopwatches are running for


def clock() -> dict[str, float]:
    """Wall and CPU seconds, of which differences mean something."""
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds of a block, in the table it yields, once the block has ended."""
    start, earlier = clock(), dict.fromkeys(clock(), 0.0)
    _timed.append(earlier)
    taken: dict[str, float] = {}
    try:
        yield taken
    finally:
        _timed.pop()
    taken.update({kind: round(now - start[kind] + earlier[kind], 3) for kind, now in clock().items()})


def add_earlier_seconds(seconds: Mapping[str, float]) -> None:
    """Count, for the block that is timed, what its work took before, in a process from whose state it goes on."""
    for earlier in _timed:
        for kind, value in seconds.items():
            earlier[kind] += value


def forget_peak_memory() -> None:
    """Begin anew to look for the most memory, where the system can: a process that does many runs tells each one's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        pass


def peak_memory_mb() -> float:
    """The most memory this process has had, in megabytes, since `forget_peak_memory` or since it was started."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6, 1)
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def added_parameters(result: Checkpoint | ModelPool | nn.Module, pool: ModelPool, one: nn.Module | None = None) -> int:
    """How many parameters what a method returned has more than one model of the pool (`one`, where it is built)."""
    if isinstance(result, Checkpoint):
        return _size(result) - _size(pool.reference)
    parameters = model_info(pool.build(pool.reference) if one is None else one)["all_params"]
    if isinstance(result, nn.Module):
        return model_info(result)["all_params"] - parameters
    more = sum(_size(model) - _size(pool.reference) for model in result.values())
    return more + (len(result) - 1) * parameters  # tensors may be buffers


def inference_seconds(
    result: nn.Module, one: nn.Module, tasks: TaskPool, device: torch.device | str
) -> dict[str, float]:
    """Seconds that a prediction takes for one sample, of a module and of one model, which may be the same.

    On a batch of the first task's data, drawn at random, the two by turns, each its fastest pass.

    Raises:
        NoData: where that task only scores.
    """
    task = next(iter(tasks.values()))
    inputs, labels = next(task.batches("test", SAMPLES, seed=0))  # unshuffled, texts are by length
    modules = (
        {"one model": one.to(device)}
        if result is one
        else {"this": result.to(device).eval(), "one model": one.to(device)}
    )
    inputs = to_device(inputs, torch.device(device))
    fastest = dict.fromkeys(modules, float("inf"))
    with torch.no_grad():
        for _ in range(REPEATS + 1):  # the first ones warm up, and cannot be the fastest
            for name, module in modules.items():
                start = time.perf_counter()
                task.predict(module, inputs)
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    found = {name: round(seconds / len(labels), 7) for name, seconds in fastest.items()}
    return {"this": found["one model"], **found}


def cost(
    result: Any,
    pool: ModelPool,
    tasks: TaskPool | None,
    device: torch.device | str,
    *,
    fusion: dict[str, float],
    evaluation: dict[str, float],
) -> dict[str, Any]:
    """The cost of a run, for its report."""
    one = pool.build(pool.reference) if tasks is not None or isinstance(result, nn.Module) else None
    found: dict[str, Any] = {
        "seconds": {"fusion": fusion["wall"], "evaluation": evaluation["wall"]},
        "cpu_seconds": {"fusion": fusion["cpu"], "evaluation": evaluation["cpu"]},
        "peak_memory_mb": peak_memory_mb(),
        "added_parameters": added_parameters(result, pool, one),
    }
    if one is not None and tasks is not None:
        with suppress(NoData):
            found["seconds_per_sample"] = inference_seconds(_runs(result, pool, one), one, tasks, device)
    return found


def _runs(result: Any, pool: ModelPool, one: nn.Module) -> nn.Module:
    """What predicts: `one` model where the result's are of the same layers, whose weights take no other time."""
    if isinstance(result, nn.Module):
        return result
    return pool.build(result) if isinstance(result, Checkpoint) and result.config != pool.reference.config else one


def _size(model: Checkpoint) -> int:
    return sum(spec.numel for spec in model.specs.values() if spec.floating)
