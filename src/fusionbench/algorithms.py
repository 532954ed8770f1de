"""The paper's interface: an algorithm is a method with its hyperparameters, ready to run on a pool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.errors import InputError
from fusionbench.registry import Method, get_method

if TYPE_CHECKING:
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.pool import ModelPool
    from fusionbench.task import TaskPool


@dataclass(frozen=True)
class Algorithm:
    """A method and its hyperparameters, checked. See `algorithm`."""

    method: Method
    given: dict[str, Any]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All of them, defaults included."""
        return {name: self.given.get(name, h.default) for name, h in self.method.hyperparameters.items()}

    @property
    def writes(self) -> dict[str, str]:
        """The files that it writes besides its result, by the hyperparameters that name them."""
        settings = self.method.hyperparameters
        return {name: file for name, file in self.hyperparameters.items() if settings[name].writes and file}

    @property
    def label(self) -> str:
        """The method's name and what differs from its defaults: `ties_merging density=0.1`."""
        changed = {n: v for n, v in self.hyperparameters.items() if v != self.method.hyperparameters[n].default}
        return " ".join([self.method.name, *(f"{name}={value}" for name, value in changed.items())])

    def run(self, pool: ModelPool, tasks: TaskPool | None = None) -> Any:
        """Fuse the pool's models: a `Checkpoint`, an `nn.Module`, or a `ModelPool` with a model per task.

        Raises:
            InputError: where the method needs tasks or the base, and there are none; for what it refuses itself.
        """
        from fusionbench.checkpoint import Checkpoint

        if self.method.needs_tasks and tasks is None:
            raise InputError(
                f"{self.method.name} looks at {self.method.looks_at}: give it a task pool (taskpool=NAME, or "
                "run(pool, tasks))."
            )
        if self.method.base:
            pool.require_base()
        inputs = (pool, tasks) if self.method.needs_tasks else (pool,)
        settings = self.method.hyperparameters
        given = {name: Path(value) if settings[name].is_file else value for name, value in self.given.items()}
        result = self.method.function(*inputs, **given)
        return self.made(result, tasks) if isinstance(result, Checkpoint) and result.inputs else result

    def seen(self, tasks: TaskPool | None) -> TaskPool | None:
        """The tasks, their `calibration` what the method looks at ("test" for all test inputs); None for no data."""
        if tasks is None or not self.method.needs_tasks:
            return None
        at_test = self.method.data == "test inputs" and self.hyperparameters.get("split") != "calibration"
        return tasks.calibrated_on("test") if at_test else tasks

    def made(self, result: Checkpoint, tasks: TaskPool | None) -> Checkpoint:
        """The checkpoint with this algorithm, and the data it has seen, put into its recipe."""
        seen = self.seen(tasks)
        more = {
            name: value for name, value in result.recipe.items() if name not in ("method", "plugin", "hyperparameters")
        }
        if self.method.plugin:
            more = {"plugin": self.method.plugin, **more}
        return result.made_by(self.method.name, self.hyperparameters, **more, **(seen.seen() if seen else {}))


def algorithm(name: str, /, **hyperparameters: Any) -> Algorithm:
    """Configure the method called `name`: `algorithm("ties_merging", density=0.1).run(pool, tasks)`.

    Raises:
        InputError: for a method or hyperparameter that does not exist, or a value of a wrong type or out of range.
    """
    found = get_method(name)
    return Algorithm(found, found.check(hyperparameters))
