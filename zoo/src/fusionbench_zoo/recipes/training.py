"""The loop that pre-trains every model: it goes on from its checkpoint after a stop, with the same steps."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 120


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    cycles: list[tuple[int, float]],
    warm_up: int,
    file: Path,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.98),
    relative: bool = False,
    after: Callable[[], object] = lambda: None,
) -> int:
    """Train with AdamW, and return the seconds it took, those before a stop included.

    Args:
        loss_of: the loss of a step by its number, seeded by it, so that a resumed run sees what an unbroken one does.
        cycles: steps and highest rate of each; in each the rate goes up in a line and down along a cosine.
        warm_up: steps of the way up.
        file: the checkpoint.
        relative: whether a rate is one of a tensor's size at first, as Adafactor's: T5 begins with tensors of very
            different sizes, and a rate that suits its embeddings saturates its attention.
        after: called after each step.
    """
    file.parent.mkdir(exist_ok=True)
    optimizer = _optimizer(model, weight_decay, betas, relative)
    first, spent = _resume(file, model, optimizer)
    steps = sum(steps for steps, _ in cycles)
    start = saved = time.monotonic()
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, cycles, warm_up) * group["size"]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()
        now = time.monotonic()
        if step % 50 == 0:
            each = (now - start) / (step - first + 1)
            log.info("step %d of %d, loss %.3f, %.2f s a step", step, steps, loss.item(), each)
        if now - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save(file, model, optimizer, step + 1, spent + now - start)
            saved = now
    return round(spent + time.monotonic() - start)


def rate(step: int, cycles: list[tuple[int, float]], warm_up: int) -> float:
    """Return the learning rate of a step: in each cycle up in a line, then down along a cosine."""
    for steps, highest in cycles:
        if step < steps:
            return highest * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
        step -= steps
    raise ValueError("The cycles have fewer steps.")


def _optimizer(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], relative: bool
) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [p],
            "weight_decay": weight_decay if p.ndim > 1 else 0.0,
            "size": p.detach().square().mean().sqrt().item() if relative else 1.0,
        }
        for p in model.parameters()
    ]
    return torch.optim.AdamW(groups, betas=betas)


def _save(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    """Write a checkpoint that is whole even when the machine stops meanwhile."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, file.with_suffix(".partial"))
    file.with_suffix(".partial").rename(file)


def _resume(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Return the step to go on with and the seconds spent before."""
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("going on at step %d", state["step"])
    return state["step"], state["seconds"]


def layered(
    layers: list[nn.Module], *, rate: float, decay: float, steps: int, warm_up: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam whose rate goes up in a line and down along a cosine, `decay` times less in every layer below the last.

    What is in no layer is not trained.
    """
    groups = [
        {"params": [p for p in layer.parameters() if p.requires_grad], "lr": rate * decay**above}
        for above, layer in enumerate(reversed(layers))
    ]
    optimizer = torch.optim.Adam(groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
