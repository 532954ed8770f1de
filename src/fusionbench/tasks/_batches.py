"""What tasks of every kind do with their examples: number them, move them to a device, count what is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.ensemble import Ensemble
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


def check_family(model: nn.Module, takes: str) -> Any:
    """An error where a model says that it takes other inputs than `takes`. Returns it, or an ensemble's first model."""
    first = model.models[0] if isinstance(model, Ensemble) else model
    found = getattr(first, "main_input_name", takes)  # of models of transformers; others say nothing
    if found != takes:
        raise other_family(first, takes, f"takes {found}")
    return first


def other_family(model: nn.Module, takes: str, found: str) -> InputError:
    """The error where a model is of another family than a task's."""
    return InputError(
        f"The tasks are of models that take {takes}, but a {type(model).__name__} {found}: "
        "name the task pool of the models' family."
    )


def check_texts(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """An error where a model takes no texts, or has no embedding of some of these tokens. Returns as `check_family`."""
    first = check_family(model, "input_ids")
    if hasattr(first, "get_input_embeddings"):  # of transformers, which is not imported for this
        rows, most = getattr(first.get_input_embeddings(), "num_embeddings", None), int(inputs["input_ids"].max())
        if rows is not None and most >= rows:
            raise other_family(first, f"the tokenizer's {most + 1:,} tokens or more", f"has embeddings of {rows:,}")
    return first


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
