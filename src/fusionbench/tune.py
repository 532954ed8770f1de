"""Hyperparameters chosen on calibration data, within a budget of trials. Test labels choose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fusionbench.algorithms import Algorithm
from fusionbench.errors import InputError, is_count
from fusionbench.progress import track
from fusionbench.registry import Method

if TYPE_CHECKING:
    from fusionbench.pool import ModelPool
    from fusionbench.task import TaskPool

SPLIT = "calibration"


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        algorithm: the method with the best hyperparameters.
        trials: all that were tried, in order, the first with those that were given: hyperparameters, and the average of
            primary scores on calibration data.
    """

    algorithm: Algorithm
    trials: list[tuple[dict[str, Any], float]]

    def describe(self) -> dict[str, Any]:
        """For reports."""
        scores = [score for _, score in self.trials]
        return {"on": SPLIT, "trials": len(scores), "given": scores[0], "best": max(scores)}


def search_space(method: Method) -> dict[str, tuple[float, float]]:
    """What of a method is searched: `{hyperparameter: (low, high)}`."""
    found = {name: h.space for name, h in method.hyperparameters.items() if h.space is not None}
    if not found:
        raise InputError(f"{method.name} has nothing to tune: none of its hyperparameters says where to search.")
    return found


def tune(algorithm: Algorithm, pool: ModelPool, tasks: TaskPool, *, trials: int, seed: int = 0) -> Tuned:
    """Search a method's hyperparameters by Optuna's TPE (Akiba et al., 2019), scored on calibration data.

    Those that were given are the first trial: what is found is no worse on these data.

    Args:
        algorithm: the method; what is not searched stays as given.
        pool: the models.
        tasks: to score on. A method that adapts to test inputs is given the calibration inputs meanwhile.
        trials: how many settings are tried.
        seed: of the search.

    Raises:
        InputError: for trials that are no count, a method with nothing to tune, and where Optuna is not installed.
    """
    if not is_count(trials):
        raise InputError(f"tune is a number of trials, 1 or more; got {trials!r}.")
    space = search_space(algorithm.method)
    try:
        import optuna
        from optuna.distributions import FloatDistribution, IntDistribution
    except ModuleNotFoundError:
        raise InputError("tune needs Optuna: pip install 'fusionbench[tune]'.") from None
    from fusionbench.runner import evaluate

    seen = {"split": SPLIT} if "split" in algorithm.method.hyperparameters else {}

    def score(chosen: dict[str, Any]) -> float:
        result = replace(algorithm, given={**algorithm.given, **chosen, **seen}).run(pool, tasks)
        return tasks.headline(evaluate(result, pool, tasks, pool.device, split=SPLIT))["average"]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    ranges: dict[str, Any] = {}
    for name, (low, high) in space.items():
        whole = algorithm.method.hyperparameters[name].type is int
        ranges[name] = IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high)
    given = {name: algorithm.hyperparameters[name] for name in space}
    tried = []
    for number in track(range(trials), "tuning", trials):
        if number == 0:
            tried.append((given, score({})))
            if all(value is not None and low <= value <= high for value, (low, high) in _pairs(given, space)):
                study.add_trial(optuna.create_trial(params=given, distributions=ranges, value=tried[0][1]))
            continue
        trial = study.ask(ranges)
        tried.append((trial.params, score(trial.params)))
        study.tell(trial, tried[-1][1])
    best, _ = max(tried, key=lambda pair: pair[1])
    return Tuned(replace(algorithm, given={**algorithm.given, **best}), tried)


def _pairs(given: dict[str, Any], space: dict[str, tuple[float, float]]) -> Iterator[tuple[Any, tuple[float, float]]]:
    return ((given[name], where) for name, where in space.items())
