"""Tasks: data, a head and a score. A task knows no method and no pool."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fusionbench.errors import InputError, UnknownName, did_you_mean
from fusionbench.progress import track

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

Scores = dict[str, float]
"""By name. Shares in [0, 1] (accuracy, miou, within_1.25 ...), correlations in [-1, 1], loss in nats, absolute_error in
metres, angles in degrees; what the LM evaluation harness gives is as it is there."""
Outcomes = dict[str, "NDArray[Any]"]
"""What came of every example: arrays with an entry for each, in the order of the data, by names `compare` knows."""
Report = dict[str, dict[str, Any]]
"""`{"model_info": {...}, "<task>": {"accuracy": ..., "loss": ...}, ..., "average": {...}}`, as the paper's reports."""


SPLITS = ("test", "calibration")


class NoData(InputError):
    """A task that only scores was asked for its data."""


class Task(Protocol):
    """Something a model can be scored on."""

    primary: str
    """The score that tables show; higher is better."""

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels of a split ("test" or "calibration"), shuffled when a seed is given.

        Inputs are a tensor or a table of tensors, whatever `predict` takes.

        Raises:
            NoData: where the task only scores.
        """
        ...

    def predict(self, model: nn.Module, inputs: Any) -> Tensor:
        """Logits, through this task's own head: `(batch, classes)`."""
        ...

    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """Score a model on a split: "test" for results, "calibration" to choose hyperparameters by."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the scores depend on: version, number of examples, hash of the data."""
        ...


@runtime_checkable
class ImageTask(Protocol):
    """A task on images, which can be corrupted."""

    def corrupted(self, name: str, severity: int, seed: int = 0) -> Task:
        """The same task, its test images corrupted as `fusionbench.corruptions.corrupt` does."""
        ...


@runtime_checkable
class WritingTask(Protocol):
    """A task whose models read what they have written, token after token."""

    def answered(self, model: nn.Module, inputs: Any) -> Any:
        """The inputs with what the model writes, but for its last token: all that it reads while it answers."""
        ...


@runtime_checkable
class Comparable(Task, Protocol):
    """A task that tells what came of every example, so that two models can be compared example by example."""

    def scored(self, model: nn.Module, split: str = "test") -> tuple[Scores, Outcomes]:
        """What `score` gives, and what came of every example: as much as the primary score is made of.

        Nothing, where that score cannot be had from single examples.
        """
        ...


class TaskPool(Mapping[str, Task]):
    """Tasks by name, in order.

    Args:
        tasks: by name.
        calibration: the data that methods may look at: a split, and the most examples of each task.
    """

    def __init__(self, tasks: Mapping[str, Task], *, calibration: str = "calibration:256") -> None:
        if not tasks:
            raise InputError("A task pool needs at least one task; none was given.")
        self._tasks = dict(tasks)
        self.calibration = calibration
        self._split, self._examples = split_and_examples(calibration)

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise UnknownName(f"The task pool has no task '{name}'. {did_you_mean(name, self._tasks)}")
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def calibrated_on(self, calibration: str) -> TaskPool:
        """The same tasks with other calibration data: "calibration:64", or "test" for all of a split."""
        return TaskPool(self._tasks, calibration=calibration)

    def corrupted(self, name: str, severity: int, seed: int = 0) -> TaskPool:
        """The same tasks with corrupted test images, such as `motion_blur` at severity 1 to 5; calibration stays clean.

        Raises:
            InputError: for a task without images, an unknown name, or a severity that is not 1 to 5.
        """
        tasks = {}
        for task_name, task in self.items():
            if not isinstance(task, ImageTask):
                raise InputError(f"Task '{task_name}' has no images: it cannot be corrupted by {name}.")
            tasks[task_name] = task.corrupted(name, severity, seed)
        return TaskPool(tasks, calibration=self.calibration)

    def only(self, names: Iterable[str]) -> TaskPool:
        """Some of the tasks."""
        return TaskPool({name: self[name] for name in names}, calibration=self.calibration)

    def of_models(self, models: Collection[str]) -> TaskPool:
        """What a method that fuses these models may look at: the tasks of their names; all where none has one."""
        return self.only([name for name in self if name in models] or self)

    def calibration_batches(self, name: str, size: int, *, seed: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels of a task's calibration data, shuffled, so that a few examples are of every class.

        Where their number is limited, they are the same for every seed: then whole batches change places.
        """
        if self._examples == float("inf"):
            yield from self[name].batches(self._split, size, seed=seed)
            return
        batches = _first(self._examples, self[name].batches(self._split, size, seed=0))
        if seed:
            batches = list(batches)
            Random(seed).shuffle(batches)
        yield from batches

    def seen(self) -> dict[str, Any]:
        """What a method that looks at data has seen of it, for recipes."""
        return {"calibration": self.calibration, "data": {name: task.describe() for name, task in self.items()}}

    def check_covers(self, models: Iterable[str]) -> None:
        """An error where a model has no task of its own name."""
        for name in models:
            if name not in self:
                raise InputError(f"The task pool has no task of the model '{name}'. {did_you_mean(name, self)}")

    def evaluate(
        self,
        model: nn.Module | Callable[[str], nn.Module],
        split: str = "test",
        *,
        outcomes: dict[str, Outcomes] | None = None,
    ) -> Report:
        """Score a model on every task. Instead of a module, a function may give a module for each task's name.

        What came of every example is put into `outcomes`, of tasks that tell it.
        """
        from torch import nn

        report: Report = {}
        for name, task in track(self._tasks.items(), "evaluating", len(self)):
            module = model if isinstance(model, nn.Module) else model(name)
            report.setdefault("model_info", model_info(module))
            if outcomes is not None and isinstance(task, Comparable):
                report[name], found = task.scored(module, split)
                if found:
                    outcomes[name] = found
            else:
                report[name] = dict(task.score(module, split))
        report["average"] = average([report[name] for name in self])
        return report

    def headline(self, report: Report) -> dict[str, float]:
        """The primary score of every task in a report, and their mean under "average". As scored, not in percent."""
        scores = {name: report[name][task.primary] for name, task in self.items()}
        return {**scores, "average": sum(scores.values()) / len(scores)}


def split_and_examples(calibration: str) -> tuple[str, float]:
    """Of "calibration:64" or "test": the split, and the most examples of each task."""
    split, _, examples = str(calibration).partition(":")
    if split not in SPLITS or not (examples.isdecimal() and int(examples) > 0 or calibration == split):
        raise InputError(
            f"calibration must be a split and perhaps a number of examples, as calibration:256; got '{calibration}'. "
            f"Splits are {' and '.join(SPLITS)}."
        )
    return split, int(examples) if examples else float("inf")


def _first(examples: float, batches: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    left = int(examples)
    for inputs, labels in batches:
        if left < len(labels):
            keep = slice(left)
            inputs = {n: t[keep] for n, t in inputs.items()} if isinstance(inputs, Mapping) else inputs[keep]
            labels = labels[keep]
        yield inputs, labels
        left -= len(labels)
        if not left:
            return


def average(scores: list[dict[str, float]]) -> Scores:
    """The mean of every score that all tasks have."""
    shared = [key for key in scores[0] if all(key in task for task in scores)]
    return {key: sum(task[key] for task in scores) / len(scores) for key in shared}


def model_info(model: nn.Module) -> dict[str, Any]:
    """Parameter counts, tied parameters once."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {
        "trainable_params": trainable,
        "all_params": total,
        "trainable_percentage": trainable / total if total else 0.0,
    }
