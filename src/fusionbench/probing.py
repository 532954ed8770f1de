"""What merging does to models that run: losses between models, and how far each task's features move."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.calibrate import attention_of
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.fuse import Models, TaskVectors
from fusionbench.progress import track
from fusionbench.runner import evaluate
from fusionbench.tasks._batches import device_of, to_device

if TYPE_CHECKING:
    from fusionbench.pool import ModelPool
    from fusionbench.task import Scores, TaskPool

SAMPLES = 128


def interpolation(
    pool: ModelPool, tasks: TaskPool, ends: tuple[str, str], points: Sequence[float], split: str = "test"
) -> list[Scores]:
    """Scores on the straight line from one model of the pool to another, or the base: `(1 - t) * first + t * second`.

    Args:
        pool: has the models.
        tasks: to score on: of these the mean of what all have, and of their primary scores as "score".
        ends: names of two models; "base" is the base.
        points: values of t: 0 is the first model, 1 the second.
        split: of the tasks' data.

    Raises:
        InputError: where both are the same model.
    """
    models = {name: pool.inputs[name] if name in pool.inputs else pool[name] for name in ends}
    if len(models) < 2:
        raise InputError(f"There is nothing between '{ends[0]}' and itself: name two models.")
    line = pool.of({f"end {i}": model for i, model in enumerate(models.values())}, None)
    return [
        _scores(line.fuse(Models([1 - t, t])), pool, tasks, split) for t in track(points, "interpolating", len(points))
    ]


def landscape(
    pool: ModelPool,
    tasks: TaskPool,
    models: tuple[str, str],
    first: Sequence[float],
    second: Sequence[float],
    split: str = "test",
) -> list[list[Scores]]:
    """Scores on the plane of two task vectors, `base + a * first + b * second`: a row for each b, an entry for each a.

    At (1, 0) and (0, 1) are the models themselves, at (0, 0) the base (Ilharco et al., 2023, among others).

    Raises:
        InputError: where both are the same model, or the pool has no base.
    """
    plane = pool.of({name: pool[name] for name in models}, pool.require_base())
    if len(plane) < 2:
        raise InputError(f"'{models[0]}' and itself span no plane: name two models.")
    places = [(a, b) for b in second for a in first]
    found = [
        _scores(plane.fuse(TaskVectors([a, b])), pool, tasks, split) for a, b in track(places, "mapping", len(places))
    ]
    return [found[i : i + len(first)] for i in range(0, len(found), len(first))]


def barrier(values: Sequence[float], points: Sequence[float]) -> float:
    """How far a loss rises above the straight line between its ends, at the most; 0 or more (Frankle et al., 2020)."""
    ends = [values[0] + (values[-1] - values[0]) * (t - points[0]) / (points[-1] - points[0]) for t in points]
    return max(0.0, *(value - end for value, end in zip(values, ends, strict=True)))


@torch.no_grad()
def interference(
    merged: Checkpoint | nn.Module, pool: ModelPool, tasks: TaskPool, *, samples: int = SAMPLES
) -> dict[str, dict[str, float]]:
    """How far each task's features in a merged model are from those in its own model, by layer.

    Of every layer's output on a task's calibration inputs, ||merged - own|| / ||own||, over all of them together; 0 is
    no interference.

    Args:
        merged: what merging gave: of the pool's architecture.
        pool: has a model of its own for each task.
        tasks: whose inputs are looked at.
        samples: how many of each task.

    Returns:
        `{task: {layer: distance}}`, layers in the order they run.
    """
    tasks.check_covers(name for name in tasks if name in pool)
    module = pool.build(merged) if isinstance(merged, Checkpoint) else merged
    found = {}
    names = [name for name in tasks if name in pool]
    for name in track(names, "probing", len(names)):
        inputs = [batch for batch, _ in tasks.calibrated_on(f"calibration:{samples}").calibration_batches(name, 32)]
        own, ours = (_features(model.eval(), tasks[name], inputs) for model in (pool.build(name), module))
        found[name] = {
            layer: (sum_of(ours[layer], own[layer]) / sum_of(own[layer])) ** 0.5 for layer in own if layer in ours
        }
    return found


def sum_of(ours: Sequence[Tensor], own: Sequence[Tensor] | None = None) -> float:
    """The sum of squares of tensors, or of their differences."""
    others: Sequence[Tensor | float] = [0.0] * len(ours) if own is None else own
    return sum(float(((a - b).double() ** 2).sum()) for a, b in zip(ours, others, strict=True))


def _features(model: nn.Module, task: Any, inputs: Sequence[Any]) -> dict[str, list[Tensor]]:
    """The outputs of a model's layers, modules that stand in a list of several, without what fills batches up."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found.setdefault(name, []).append(attended(output if isinstance(output, Tensor) else output[0]))

        return hook

    layers = {name: m for name, m in model.named_modules() if re.search(r"(^|\.)\d+$", name)}
    outer = {n: m for n, m in layers.items() if not any(n.startswith(f"{other}.") for other in layers if other != n)}
    with ExitStack() as stack:
        attended = stack.enter_context(attention_of(model))
        for name, module in outer.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        for batch in inputs:
            task.predict(model, to_device(batch, device_of(model)))
    if not found:
        raise InputError("This architecture has no layers in a list: nothing to compare feature by feature.")
    return found


def _scores(model: Checkpoint, pool: ModelPool, tasks: TaskPool, split: str) -> Scores:
    report = evaluate(model, pool, tasks, pool.device, split=split)
    return {**report["average"], "score": tasks.headline(report)["average"]}


def grid(values: Sequence[Sequence[Mapping[str, float]]], what: str) -> list[list[float]]:
    """One score of a landscape, as a matrix."""
    return [[scores[what] for scores in row] for row in values]


def between(points: int) -> list[float]:
    """So many values from 0 to 1."""
    return np.linspace(0, 1, points).tolist()
