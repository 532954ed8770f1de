"""Test-time adaptation: numbers of a merge, learned from what the merged model says about inputs without labels."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fusionbench
from fusionbench import ops
from fusionbench.checkpoint import Checkpoint
from fusionbench.cost import add_earlier_seconds, clock
from fusionbench.errors import InputError
from fusionbench.locations import cache_folder
from fusionbench.param import Param
from fusionbench.pool import ModelPool
from fusionbench.progress import track
from fusionbench.task import TaskPool
from fusionbench.tasks._batches import to_device

SECONDS_BETWEEN_STATES = 20
WINDOW = 20  # steps whose mean entropy is looked at: that of one step's inputs is above or below by chance


@dataclass(frozen=True)
class Vectors:
    """A parameter of the base, and what is added to it of each model: `(models, *shape)`."""

    name: str
    base: Tensor
    task_vectors: Tensor


Merge = Callable[[Vectors], Tensor]


class Functional(nn.Module):
    """A module that runs with other tensors in the place of its own: `{name: tensor}`, for each place one name."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self._tensors = dict(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self._tensors, args, kwargs, tie_weights=False)


class Adaptation:
    """The entropy of what a model predicts on inputs of all tasks, to learn some of its numbers by.

    Args:
        pool: what the model was made of.
        tasks: give the inputs. Labels are not looked at.
        module: the model; what requires a gradient in it is learned.
        split: of the inputs: all of "test", or of "calibration" those that methods may look at.
        batch_size: inputs of each task in a step.
        seed: of their order.
    """

    def __init__(
        self, pool: ModelPool, tasks: TaskPool, module: nn.Module, *, split: str, batch_size: int, seed: int
    ) -> None:
        self.pool, self.module = pool, module
        self.tasks = tasks if split == "calibration" else tasks.calibrated_on(split)
        self.states: list[Path] = []
        self._batch_size, self._seed = batch_size, seed

    def entropies(self, first: int) -> Iterator[Callable[[], float]]:
        """For each step from `first`, what computes the mean entropy of all tasks' predictions and its gradient."""
        streams = {name: _endless(self.tasks, name, self._batch_size, self._seed) for name in self.tasks}
        for stream in streams.values():
            for _ in range(first):
                next(stream)
        while True:
            batches = {name: next(stream) for name, stream in streams.items()}
            yield lambda batches=batches: self.entropy(batches)

    def entropy(self, batches: Mapping[str, Any]) -> float:
        """The mean entropy on a batch of each task; its gradient is added to that of what is learned."""
        return self._entropy_of(self.module, batches)

    def _entropy_of(self, module: nn.Module, batches: Mapping[str, Any]) -> float:
        total = 0.0
        for name, inputs in batches.items():
            inputs = to_device(inputs, torch.device(self.pool.device))
            loss = entropy(self.tasks[name].predict(module, inputs)) / len(batches)
            if loss.requires_grad:  # not where all models are the base
                loss.backward()
            total += loss.item()
        return total

    def finish(self) -> None:
        """The adaptation is done: its states are removed, now or at the end of a block of `states_kept`."""
        if _kept:
            _kept[-1].extend(self.states)
        else:
            _remove(self.states)


class MergeAdaptation(Adaptation):
    """A merge with numbers to learn.

    A step costs one forward and backward pass of the model for each task's batch, and two passes over the task vectors:
    one that merges, one that carries the gradient of the merged tensors to the numbers. No graph is kept of the merge,
    and there is one merged model, whatever the number of models. Task vectors are held up to `pool.memory`, by default
    half of what is free where models run; those beyond are read anew in every step, one parameter at a time, which
    gives the same bytes. A parameter that no model changed is the base's: the backward pass goes only as deep as models
    differ.

    Args:
        merge: one parameter of the merged model that models changed; what it depends on and requires a gradient is
            learned. Buffers are averaged.
        vectors: what to merge of each model, the task vectors or what is left of them.
    """

    def __init__(
        self,
        pool: ModelPool,
        tasks: TaskPool,
        merge: Merge,
        *,
        vectors: Callable[[Param], Tensor],
        split: str,
        batch_size: int,
        seed: int,
    ) -> None:
        pool.require_base()
        module = pool.build(pool.map(lambda p: ops.mean(p.models))).requires_grad_(False)
        super().__init__(pool, tasks, module, split=split, batch_size=batch_size, seed=seed)
        self.merge, self._vectors = merge, vectors
        names = pool.names_in(module)
        parameters = {names[name] for name, _ in module.named_parameters()}
        self.learned = [name for name in pool.reference.specs if name in parameters]
        places = [f"{path}.{own}".lstrip(".") for path, m in module.named_modules() for own in m._parameters]
        self._places = {place: names[place] for place in places if names.get(place) in parameters}
        self._room = pool.room()
        self._held: dict[str, Vectors] = {}
        self._changed: dict[str, bool] = {}

    def _read(self, name: str) -> Vectors:
        p, device = self.pool.param(name), self.pool.device
        vectors = self._vectors(p).contiguous()
        if name not in self._changed:
            self._changed[name] = bool(vectors.any())
        return Vectors(name, p.base.contiguous().to(device), vectors.to(device))

    def vectors(self, name: str) -> Vectors:
        """A parameter, as the merge takes it."""
        found = self._held.get(name)
        if found is None:
            found = self._read(name)
            size = found.base.nbytes + found.task_vectors.nbytes
            if size <= self._room:
                self._room -= size
                self._held[name] = found
        return found

    def _merged(self, v: Vectors) -> Tensor:
        return self.merge(v) if self._changed[v.name] else v.base

    def entropy(self, batches: Mapping[str, Any]) -> float:
        with torch.no_grad():
            leaves = {name: self._merged(self.vectors(name)).float() for name in self.learned}
        for name, leaf in leaves.items():
            leaf.requires_grad_(self._changed[name])
        model = Functional(self.module, {name: leaves[stored] for name, stored in self._places.items()})
        total = self._entropy_of(model, batches)
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                merged = self.merge(self.vectors(name))
                if merged.requires_grad:
                    torch.autograd.backward(merged, leaf.grad.to(merged))
        return total

    def checkpoint(self) -> Checkpoint:
        """What was merged, with the numbers as they are now. The adaptation is done."""
        self.finish()
        learned = set(self.learned)

        def merge(p: Param) -> Tensor:
            if p.name not in learned:
                return ops.mean(p.models)
            with torch.no_grad():
                return self.merge(Vectors(p.name, p.base, self._vectors(p)))

        return self.pool.map(merge)


_kept: list[list[Path]] = []


@contextmanager
def states_kept() -> Iterator[None]:
    """Keep the states of adaptations that end in this block until what they gave is kept, too.

    What is killed or fails while it saves or evaluates then goes on from there. They are removed where the block ends
    without an exception.
    """
    states: list[Path] = []
    _kept.append(states)
    try:
        yield
    finally:
        _kept.pop()
    _remove(states)


def _remove(states: Sequence[Path]) -> None:
    for file in states:
        file.unlink(missing_ok=True)


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy, in nats, of predictions `(batch, classes)`."""
    if logits.dim() != 2:
        raise InputError("Entropy is of predicted classes: a task of this pool predicts something else.")
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def descend(
    adaptation: Adaptation,
    update: Callable[[int, Callable[[], float]], float],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    patience: int,
    facts: Mapping[str, Any],
) -> list[float]:
    """Do the steps of an adaptation, and return the entropies.

    What was killed on the way goes on from its last state when it is started again with the same models, data and
    `facts`, and ends with the same bytes: the state is kept in the cache meanwhile. The seconds that it took before are
    counted with those of the process that goes on.

    Args:
        adaptation: gives each step's entropy, a function that also computes its gradient.
        update: of a step's number and that function: does the step, and returns the entropy.
        optimizers: hold what is learned.
        steps: how many, at most.
        patience: it ends after so many steps without a lower entropy, on average over `WINDOW` steps; 0 for never.
        facts: what the result depends on besides models and data.
    """
    file = _state_file(adaptation, {**facts, "calibration": adaptation.tasks.calibration})
    found: list[float] = []
    start = clock()
    earlier = dict.fromkeys(start, 0.0)
    if file.exists():
        state = torch.load(file, weights_only=True)
        found, earlier = state["entropies"], state["seconds"]
        add_earlier_seconds(earlier)
        for optimizer, (values, inner) in zip(optimizers, state["optimizers"], strict=True):
            with torch.no_grad():
                for tensor, value in zip(_tensors(optimizer), values, strict=True):
                    tensor.copy_(value)
            optimizer.load_state_dict(inner)

    def save() -> None:
        inner = [(_tensors(optimizer), optimizer.state_dict()) for optimizer in optimizers]
        seconds = {kind: now - start[kind] + earlier[kind] for kind, now in clock().items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"entropies": found, "seconds": seconds, "optimizers": inner}, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)

    saved = time.monotonic()
    entropies = adaptation.entropies(len(found))
    left = range(len(found), steps)
    for number in track(left, lambda: f"adapting, entropy {found[-1]:.3f}" if found else "adapting", len(left)):
        if patience and _steps_since_lowest(found) >= patience:
            break
        found.append(update(number, next(entropies)))
        if time.monotonic() - saved > SECONDS_BETWEEN_STATES:
            save()
            saved = time.monotonic()
    save()  # for the case that what comes after is killed
    adaptation.states.append(file)
    return found


def step(optimizer: torch.optim.Optimizer) -> Callable[[int, Callable[[], float]], float]:
    """The update that does a step of this optimizer, for `descend`."""

    def update(number: int, entropy: Callable[[], float]) -> float:
        optimizer.zero_grad()
        found = entropy()
        optimizer.step()
        return found

    return update


def _steps_since_lowest(entropies: Sequence[float]) -> int:
    """How many steps ago the mean over `WINDOW` steps was lowest."""
    sums = list(itertools.accumulate(entropies, initial=0.0))
    means = [after - before for before, after in zip(sums, sums[WINDOW:], strict=False)]
    return len(means) - 1 - means.index(min(means)) if means else 0


def _state_file(adaptation: Adaptation, facts: Mapping[str, Any]) -> Path:
    pool, tasks = adaptation.pool, adaptation.tasks
    models = {name: pool.identity(name) for name in pool.inputs}
    key = [fusionbench.__version__, dict(facts), models, {name: task.describe() for name, task in tasks.items()}]
    return cache_folder() / "adaptations" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.pt"


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _endless(tasks: TaskPool, name: str, size: int, seed: int) -> Iterator[Any]:
    """Inputs of a task again and again, each time in another order."""
    while True:
        count = 0
        for inputs, _ in tasks.calibration_batches(name, size, seed=seed):
            count += 1
            yield inputs
        if not count:
            raise InputError(f"The task '{name}' has no examples to adapt to ({tasks.calibration}).")
        seed += 1
