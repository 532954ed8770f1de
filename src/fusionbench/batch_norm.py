"""Batch normalisation in merged models: statistics of the merged features, not merged statistics."""

from __future__ import annotations

import logging
from itertools import zip_longest

import torch
from torch import Tensor, nn

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.fuse import STATISTICS
from fusionbench.pool import ModelPool
from fusionbench.task import TaskPool
from fusionbench.tasks._batches import device_of, to_device

log = logging.getLogger(__name__)


@torch.no_grad()
def recalibrated(checkpoint: Checkpoint, pool: ModelPool, tasks: TaskPool, *, batch_size: int = 32) -> Checkpoint:
    """The checkpoint with the running means and variances that its own features have on the tasks' inputs.

    Features of a merged model vary less than those of its parts, so that merged statistics fit them badly (Jordan et
    al., 2023). Labels are not used; what is no statistic of a batch norm stays as it is.

    Args:
        checkpoint: what was merged from the pool.
        pool: builds the model.
        tasks: give the inputs, their calibration data.
        batch_size: inputs seen at once.

    Raises:
        InputError: where the model has no batch norm.
    """
    model = pool.build(checkpoint)
    norms = batch_norms(model)
    if not norms:
        raise InputError("batch_norm=calibrate: the model has no batch norm, there is nothing to calibrate.")
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = 0.0  # what has been seen says what they are, below
        norm.register_forward_pre_hook(_Moments())
    streams = [tasks.calibration_batches(name, batch_size) for name in tasks]
    for batches in zip_longest(*streams):  # in turns: a batch of each task
        for task, batch in zip(tasks.values(), batches, strict=True):
            if batch is not None:
                task.predict(model, to_device(batch[0], device_of(model)))
    found = {f"{name}.{which}": norm.get_buffer(which).cpu() for name, norm in norms.items() for which in STATISTICS}
    changed = checkpoint.replace(found)
    changed.recipe["batch_norm"] = {"calibrated on": list(tasks), **tasks.seen(), "batch_size": batch_size}
    return changed


class _Moments:
    """A hook that keeps the running statistics of a batch norm those of all that it has been given, in all batches.

    A batch is normalised by its own statistics, as in training, unless it has one value a channel.
    """

    def __init__(self) -> None:
        self._count, self._sums = 0, torch.zeros(())

    def __call__(self, norm: nn.modules.batchnorm._BatchNorm, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].double().transpose(0, 1).flatten(1)
        self._sums = self._sums + torch.stack([values.sum(1), values.square().sum(1)])
        self._count += values.shape[1]
        mean, square = self._sums / self._count
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(
            (square - mean.square()).clamp(min=0) * self._count / max(self._count - 1, 1)
        )
        norm.train(values.shape[1] > 1)


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a model that have statistics, by name."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_var is not None}


def warn_of_impossible(model: nn.Module) -> None:
    """Say so where a merge that adds more than it averages took variances below zero: outputs are then not numbers."""
    below = [name for name, norm in batch_norms(model).items() if (norm.get_buffer("running_var") < 0).any()]
    if below:
        others = f" and {len(below) - 1} others" if len(below) > 1 else ""
        log.warning(
            f"The merged variances of the batch norm {below[0]}{others} are below zero in places, so that the model's "
            "outputs are no numbers. Set batch_norm=calibrate, or take a smaller scaling factor."
        )
