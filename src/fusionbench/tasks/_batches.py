"""What tasks of every kind do with their examples: number them, move them to a device, count what is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.errors import InputError
from fusionbench.task import Outcomes, Scores, Task


def numbers(count: int, size: int, seed: int | None = None) -> Iterator[np.ndarray]:
    """The numbers of `count` examples, `size` at a time, shuffled when a seed is given."""
    order = np.arange(count)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    for start in range(0, count, size):
        yield order[start : start + size]


def to_device(inputs: Any, device: torch.device) -> Any:
    """A tensor, or a table of tensors, on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; a module without any is on the CPU."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@torch.no_grad()
def classified(task: Task, model: nn.Module, split: str, batch_size: int, what: str) -> tuple[Scores, Outcomes]:
    """Accuracy (0 to 1) and mean cross-entropy, and of each example whether it is right and its own cross-entropy.

    The model is put in evaluation mode. `what` are the task's examples, in the error where there are none.
    """
    model.eval()
    device = device_of(model)
    correct, loss = [torch.empty(0, dtype=torch.bool)], [torch.empty(0)]
    for inputs, labels in task.batches(split, batch_size):
        logits, labels = task.predict(model, to_device(inputs, device)), labels.to(device)
        loss.append(nn.functional.cross_entropy(logits.float(), labels, reduction="none").cpu())
        correct.append((logits.argmax(-1) == labels).cpu())
    if len(correct) == 1:
        raise InputError(f"The {split} split has no {what}: there is nothing to score.")
    right, losses = torch.cat(correct).numpy(), torch.cat(loss).numpy()
    scores = {"accuracy": float(right.mean()), "loss": float(losses.mean(dtype=np.float64))}
    return scores, {"correct": right, "loss": losses}
