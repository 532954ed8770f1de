"""Fuse, save, evaluate, report: what one run does, and in which order."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusionbench import card
from fusionbench.adapt import states_kept
from fusionbench.algorithms import Algorithm, algorithm
from fusionbench.alignment import distance
from fusionbench.batch_norm import recalibrated, warn_of_impossible
from fusionbench.checkpoint import Checkpoint
from fusionbench.cost import cost, forget_peak_memory, stopwatch
from fusionbench.errors import InputError
from fusionbench.pool import ModelPool
from fusionbench.task import NoData, Outcomes, Report, TaskPool, split_and_examples
from fusionbench.tasks._batches import to_device
from fusionbench.writer import MEMORY, check_file, check_inputs, check_writable, parse_bytes, save, write_json

if TYPE_CHECKING:
    from fusionbench.config import Run


def check(work: Run, tasks: TaskPool | None) -> None:
    """Find what can be known to fail before anything is computed."""
    out, report_file = work.options["out"], work.options["report"]
    if not isinstance(work.options["overwrite"], bool):
        raise InputError(f"overwrite must be true or false; got {work.options['overwrite']!r}.")
    if out is not None and not work.algorithm.method.saves:
        raise InputError(
            f"{work.algorithm.method.name} keeps several models: there is no one checkpoint to save. Omit out=."
        )
    if out is not None:
        check_writable(Path(out), overwrite=work.options["overwrite"])
    if report_file is not None:
        check_file(Path(report_file), "report", None if out is None else Path(out))
    if out is None and tasks is None:
        raise InputError(
            "Nothing would come of this run: give a taskpool= to evaluate on, an out= to save to, or both."
        )
    parse_device(work.options["device"])
    parse_bytes(work.options["memory"] or MEMORY)
    split_and_examples(work.options["calibration"])
    if work.options["batch_norm"] not in ("merge", "calibrate"):
        raise InputError(f"batch_norm must be merge or calibrate; got '{work.options['batch_norm']}'.")
    if work.options["batch_norm"] == "calibrate" and tasks is None:
        raise InputError("batch_norm=calibrate needs a taskpool=, whose calibration data it reads.")


def check_scored(pool: ModelPool, tasks: TaskPool) -> None:
    """An error where the pool's models are not those of the tasks, found on one example of each task."""
    model = pool.build(pool.reference).eval()
    for task in tasks.values():
        with suppress(NoData), torch.no_grad():
            for inputs, _ in islice(task.batches("test", 1), 1):
                task.predict(model, to_device(inputs, torch.device(pool.device)))


@states_kept()
def run(work: Run, pool: ModelPool, tasks: TaskPool | None, alignment: Mapping[str, Any] | None = None) -> Report:
    """Do one run: fuse the pool, save the result, evaluate it, write the report.

    The merged model is saved first, the report as soon as there are scores. The method looks at the tasks of the merged
    models, the result is scored on all. `alignment` is what `align` has found.
    """
    check(work, tasks)
    out, report_file = work.options["out"], work.options["report"]
    if out is not None:
        check_inputs(out, pool.inputs.values())
    device = parse_device(work.options["device"])
    calibrated = work.options["batch_norm"] == "calibrate"
    pool.device, pool.memory = device, work.options["memory"]
    if tasks is not None:
        check_scored(pool, tasks)
    forget_peak_memory()
    seen = None if tasks is None else tasks.of_models(pool)
    with stopwatch() as fusion:
        result = work.algorithm.run(pool, seen)
        calibrated = calibrated and isinstance(result, Checkpoint)
        if out is None:
            result = computed(result, pool)
        if calibrated and seen is not None and isinstance(result, Checkpoint):
            result = recalibrated(result, pool, seen)
        if out is not None:
            options = {key: work.options[key] for key in ("workers", "executor", "overwrite")}
            made = _to_save(result, work.algorithm, pool, seen)
            made = made.with_files({card.FILE: card.model_card(made, work.command)})
            saved = save(made, out, memory=work.options["memory"] or MEMORY, **options)
            if isinstance(result, Checkpoint) and tasks is not None:  # evaluated as it is there, and not computed again
                result = Checkpoint.open(saved)
    report: Report = {}
    with stopwatch() as evaluation:
        if tasks is not None:
            report = evaluate(result, pool, tasks, device)
    report["run"] = {
        **facts(work.algorithm, pool, tasks),
        **({"tuned": work.tuned} if work.tuned else {}),
        **({"batch_norm": "calibrate", "batch_norm_seen": _seen(seen)} if calibrated and seen else {}),
        **({"alignment": dict(alignment)} if alignment else {}),
        **cost(result, pool, tasks, device, fusion=fusion, evaluation=evaluation),
        **({"out": str(out)} if out is not None else {}),
    }
    if report_file is not None:
        write_json(Path(report_file), report)
    return report


def with_tuned(runs: Sequence[Run], pool: ModelPool, tasks: TaskPool | None) -> list[Run]:
    """The runs and, where `tune` says so, after each the same with hyperparameters that a search has found."""
    trials = runs[0].options["tune"]
    if trials is None:
        return list(runs)
    if tasks is None:
        raise InputError("tune needs a taskpool=, on whose calibration data hyperparameters are scored.")
    from fusionbench.tune import tune

    found = []
    searched = [work for work in runs if any(h.space for h in work.algorithm.method.hyperparameters.values())]
    for work in runs:
        found.append(work)
        if work in searched or not searched:  # where none has anything to tune, that is an error
            best = tune(work.algorithm, pool, tasks.of_models(pool), trials=trials)
            found.append(replace(work, algorithm=best.algorithm, tuned=best.describe()))
    return found


def align(work: Run, pool: ModelPool, tasks: TaskPool | None) -> tuple[ModelPool, dict[str, Any]]:
    """The pool with its models permuted to the order of the reference's units, and how near they came.

    Of each model: the objective, its weights' distance to the reference's, before and after; and where there are tasks,
    the barrier: the loss (the error, 1 - score, where tasks have no loss) half-way between model and reference, less
    the mean of theirs, on average over the tasks.
    """
    pool.device = parse_device(work.options["device"])
    aligned = pool.aligned(str(work.options["align"]))
    reference, found = pool.reference, {}
    start = None if tasks is None else _loss(pool.build(reference), tasks)
    for name in pool:
        if pool[name] is reference:
            continue
        both = {"before": pool[name], "after": aligned[name]}
        found[name] = {"how": work.options["align"]}
        found[name]["objective"] = {when: distance(reference, model) for when, model in both.items()}
        if tasks is not None and start is not None:
            measure, end = _loss(pool.build(name), tasks)
            barriers = {}
            for when, model in both.items():
                pair = pool.of({"reference": reference, name: model}, None)
                middle = algorithm("simple_average").run(pair)
                if work.options["batch_norm"] == "calibrate":
                    middle = recalibrated(middle, pair, tasks.of_models(pool))
                barriers[when] = _loss(pair.build(middle), tasks)[1] - (start[1] + end) / 2
            found[name] |= {"barrier": barriers, "measure": measure}
    return aligned, found


def _loss(model: nn.Module, tasks: TaskPool) -> tuple[str, float]:
    """What a model's loss is called, and how large it is, on average over tasks."""
    report = tasks.evaluate(model)
    if "loss" in report["average"]:
        return "loss", report["average"]["loss"]
    return "error", 1 - tasks.headline(report)["average"]


def _to_save(result: Any, algorithm: Algorithm, pool: ModelPool, tasks: TaskPool | None) -> Checkpoint:
    if isinstance(result, Checkpoint):
        return result
    if not isinstance(result, nn.Module):
        raise _unexpected(result)
    from fusionbench.mixed import as_checkpoint

    return algorithm.made(as_checkpoint(result, pool), tasks)


def _unexpected(result: Any) -> InputError:
    kind = "None" if result is None else f"a {type(result).__name__}"
    return InputError(f"The method returned {kind}: a Checkpoint, a module or a ModelPool is expected.")


def computed(result: Any, pool: ModelPool) -> Any:
    """What a method returned, a merge computed: in the time of the fusion, and not when it is evaluated."""
    if not isinstance(result, Checkpoint):
        return result
    return Checkpoint.of(dict(result), folder=pool.reference.folder, config=result.new_config)


def evaluate(
    result: Any,
    pool: ModelPool,
    tasks: TaskPool,
    device: torch.device | str = "cpu",
    *,
    split: str = "test",
    outcomes: dict[str, Outcomes] | None = None,
) -> Report:
    """Score what a method returned: a checkpoint, a module, or a pool with a model for each task.

    What came of every example is put into `outcomes`, of tasks that tell it.
    """
    if isinstance(result, Checkpoint):
        merged = pool.build(result).to(device)
        warn_of_impossible(merged)
        return tasks.evaluate(merged, split, outcomes=outcomes)
    if isinstance(result, nn.Module):
        return tasks.evaluate(result.to(device), split, outcomes=outcomes)
    if isinstance(result, ModelPool):
        without = [name for name in tasks if name not in result]
        if without:
            raise InputError(f"The pool has no model of its own for the task '{without[0]}'.")
        return tasks.evaluate(lambda name: result.build(name).to(device), split, outcomes=outcomes)
    raise _unexpected(result)


def facts(algorithm: Algorithm, pool: ModelPool, tasks: TaskPool | None) -> dict[str, Any]:
    """What a run's numbers depend on: method, hyperparameters, contents of the models, data, versions."""
    seen = None if tasks is None else algorithm.seen(tasks.of_models(pool))
    return {
        "method": algorithm.method.name,
        "hyperparameters": algorithm.hyperparameters,
        "modelpool": {name: model.provenance() for name, model in pool.inputs.items()},
        "taskpool": {name: task.describe() for name, task in tasks.items()} if tasks is not None else {},
        **({"seen": _seen(seen)} if seen else {}),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def _seen(tasks: TaskPool) -> dict[str, Any]:
    """What was looked at, for a report, which describes the tasks."""
    return {"calibration": tasks.calibration, "tasks": list(tasks)}


def versions() -> dict[str, str]:
    """Of everything the numbers of a report may depend on."""
    found = {"python": platform.python_version()}
    for package in ("fusionbench", "fusionbench-zoo", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_reports(places: Sequence[Path]) -> dict[str, Report]:
    """Reports by name: of files that runs wrote, of folders of them, and of evaluations of several models."""
    found: dict[str, Report] = {}
    for place in places:
        files = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not files:
            raise InputError(f"report: '{place}' holds no .json file.")
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise InputError(f"report: '{file}' cannot be read: {error.strerror}.") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"report: '{file}' cannot be read: {str(error).splitlines()[0]}") from None
            several = {file.stem: content} if isinstance(content, dict) and "run" in content else content
            if not isinstance(several, dict) or not several or not all(map(_is_report, several.values())):
                raise InputError(f"report: '{file}' is no report of a run.")
            for name, report in several.items():
                found[f"{name} ({file})" if name in found else name] = report
    return found


def _is_report(content: Any) -> bool:
    """Whether this has the shape of a report: scores that are numbers, and what they depend on."""
    if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
        return False
    run = content["run"]
    known = "method" not in run or all(isinstance(run.get(key), dict) for key in ("hyperparameters", "modelpool"))
    scores = [table for name, table in content.items() if name != "run"]
    return known and all(isinstance(t, dict) and all(isinstance(s, int | float) for s in t.values()) for t in scores)


def parse_device(name: str) -> torch.device:
    """The torch device of that name, which must be there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device '{name}' is not there: {str(error).splitlines()[0]}") from None
    return device
