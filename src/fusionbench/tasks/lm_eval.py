"""Tasks of the LM evaluation harness (https://github.com/EleutherAI/lm-evaluation-harness), by its names."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.compare import score_of
from fusionbench.errors import InputError, check_keys, did_you_mean, is_count
from fusionbench.locations import find
from fusionbench.task import NoData, Outcomes, Scores, TaskPool
from fusionbench.tasks._batches import device_of
from fusionbench.tasks._data import check_split
from fusionbench.tasks._tokens import Tokens

FIRST = ("acc", "exact_match")  # what is shown of a task that has them
NUMBERS = (int, float, np.number, np.bool_)
SEED = 1234  # the harness's own: of few-shot examples, and of answers that are sampled


class HarnessTask:
    """A task, or a group that has scores of its own, in the harness's registry. Nothing is loaded before it is scored.

    Args:
        name: in the registry.
        manager: the harness's `TaskManager`.
        num_fewshot: examples in the prompt, in place of what the task says.
        limit: the most examples, or which part of them, in (0, 1).
    """

    def __init__(self, name: str, manager: Any, num_fewshot: int | None, limit: float | None) -> None:
        self.name, self._manager = name, manager
        self.num_fewshot, self.limit = num_fewshot, limit
        self._config = _config(manager.task_index[name])
        self._loaded: Any = None
        if any(config.get("unsafe_code") for config, _ in self._configs(name)):
            raise InputError(f"{name} runs code that the model writes: that is not done here.")
        if "group" in self._config and not self._config.get("aggregate_metric_list"):
            raise InputError(f"{name} is a group without a score of its own: name its tasks one by one.")

    def metrics(self) -> dict[str, bool | None]:
        """Scores that its YAML names, and whether more is better; those of filters as `exact_match,strict-match`."""
        from lm_eval.api.metrics import mean  # pyright: ignore[reportMissingImports]  # noqa: F401  (importing it registers the metrics)
        from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, higher_is_better_registry  # pyright: ignore[reportMissingImports]

        entries = self._config.get("aggregate_metric_list") or self._config.get("metric_list")
        if entries is None and "class" not in self._config:
            output = str(self._config.get("output_type", "generate_until"))
            entries = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY.get(output, ())]
        filters = [entry["name"] for entry in self._config.get("filter_list") or ()]
        found = {}
        for entry in [entries] if isinstance(entries, Mapping) else entries or ():
            name = str(entry["metric"])
            name = name.rpartition(".")[2] if "/" in name else name  # a function, by its file
            better = entry.get("higher_is_better", higher_is_better_registry.get(name, None))
            own = entry.get("filter_list") or filters or ["none"]
            found |= {_named(f"{name},{one}"): better for one in ([own] if isinstance(own, str) else own)}
        return found

    def scored(self, model: nn.Module, tokens: Tokens, batch_size: int) -> tuple[Scores, list[dict[str, Any]]]:
        """The numbers that the harness gives, without their standard errors, and what it notes of every document."""
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

        with _seeded():
            lm = _language_model(model, tokens, batch_size)
            found = evaluate(lm=lm, task_dict=self._load(), limit=self.limit, bootstrap_iters=0)
        assert found is not None
        table = {**found["results"], **found.get("groups", {})}[self.name]
        scores = {
            _named(key): float(value)
            for key, value in table.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
        return scores, [sample for samples in found["samples"].values() for sample in samples]

    def describe(self) -> dict[str, Any]:
        number = self.num_fewshot if self.num_fewshot is not None else self._config.get("num_fewshot")
        return {
            "task": self.name,
            "version": (self._config.get("metadata") or {}).get("version"),
            "config": self._digest(),
            "num_fewshot": number or 0,
            "limit": self.limit,
        }

    def _load(self) -> Any:
        """The harness's own objects, which read the data."""
        if self._loaded is None:
            try:
                with _quiet():
                    self._loaded = self._manager.load([self.name])
            except Exception as error:  # the harness and its data library raise many unrelated types
                reason = f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0][:200]}"
                raise InputError(f"The harness cannot load {self.name} ({reason}).") from error
        for task in self._loaded["tasks"].values():
            if self.num_fewshot is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            task.set_fewshot_seed(seed=SEED)
        return self._loaded

    def _configs(self, name: str) -> Iterator[tuple[dict[str, Any], Path | None]]:
        """The configs and YAML files of a task; of a group, of all that is in it, too."""
        entry = self._manager.task_index.get(name)
        if entry is None:  # stands within a group's own YAML
            return
        config = _config(entry)
        yield config, entry.yaml_path
        inner = config.get("task") if "group" in config else sorted(entry.tags) if not config else ()
        for item in [inner] if isinstance(inner, str) else inner or ():
            named = item if isinstance(item, str) else item.get("task") or item.get("group")
            for one in [named] if isinstance(named, str) else ():
                yield from self._configs(one)

    def _digest(self) -> str:
        """Hash of the YAML, of the Python beside it, and of data files on this machine."""
        digest = hashlib.sha256()
        for config, path in self._configs(self.name):
            text = json.dumps(config, sort_keys=True, default=str)
            files: list[Path] = []
            if path is not None:
                text = text.replace(str(path.resolve().parent), "")
                files += sorted(path.parent.glob("*.py"))
            files += _strings((config.get("dataset_kwargs") or {}).get("data_files"))
            digest.update(text.encode())
            for file in files:
                digest.update(file.read_bytes() if file.is_file() else str(file).encode())
        return digest.hexdigest()


class LMEval:
    """A task of the harness, as tasks are here.

    Args:
        name: the task's own, for errors.
        tokens: the tokenizer.
        test: what is scored.
        calibration: what is scored in place of a calibration split, which the harness's tasks do not have.
        metric: the score that tables show. By default acc, exact_match, or the first that is better when it is higher.
            Of a perplexity that is `1/perplexity`: the mean probability (geometric) of a word, byte or answer.
        batch_size: texts evaluated at once.
    """

    def __init__(
        self,
        name: str,
        tokens: Tokens,
        test: HarnessTask,
        calibration: HarnessTask | None = None,
        *,
        metric: str | None = None,
        batch_size: int = 8,
    ) -> None:
        self._name, self.tokens, self.batch_size = name, tokens, batch_size
        self._of = {"test": test, **({"calibration": calibration} if calibration is not None else {})}
        self.primary = _primary(f"Task '{name}'", test, metric)
        if calibration is not None and _primary(f"Task '{name}'", calibration, metric) != self.primary:
            raise InputError(f"Task '{name}': {calibration.name} has no {self.primary}, the score of {test.name}.")

    def batches(self, split: str, size: int, *, seed: int | None = None) -> NoReturn:
        """An error: the harness gives scores, not data."""
        raise NoData(
            f"Task '{self._name}' is of the LM evaluation harness, which shows its data to no method: give a task pool "
            "of another kind, such as text_generation, to what looks at data."
        )

    def predict(self, model: nn.Module, inputs: Any) -> NoReturn:
        """An error, as for `batches`."""
        self.batches("test", 1)

    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """All numbers that the harness gives; "calibration" is the score on the task named for it."""
        return self.scored(model, split)[0]

    def scored(self, model: nn.Module, split: str = "test") -> tuple[Scores, Outcomes]:
        """The same, and of every document what the score that tables show is made of.

        That is whether it is `correct`; or its `value`, of which the score is the mean; or of a perplexity its
        `log_probability` and `length`. Of a score that is made otherwise, as a mean of means, nothing.
        """
        check_split(split)
        if split not in self._of:
            raise InputError(
                f"Task '{self._name}': {self._of['test'].name} has no calibration split. Name another task of the "
                "harness to calibrate on, as calibration_task: NAME."
            )
        task = self._of[split]
        found, samples = task.scored(model, self.tokens, self.batch_size)
        found |= {f"1/{key}": 1 / value for key, value in found.items() if _is_perplexity(key)}
        if self.primary not in found:
            hint = did_you_mean(self.primary, found)
            raise InputError(f"Task '{self._name}': {task.name} has no score '{self.primary}'. {hint}")
        outcomes = _outcomes(samples, self.primary)
        same = outcomes and math.isclose(score_of(outcomes), found[self.primary], rel_tol=1e-6, abs_tol=1e-12)
        return found, outcomes if same else {}

    def describe(self) -> dict[str, Any]:
        calibration = self._of.get("calibration")
        return {
            "kind": "lm_eval",
            "lm_eval": version("lm_eval"),
            **self._of["test"].describe(),
            **({"calibration_task": calibration.describe()} if calibration is not None else {}),
        }


class _Shown:
    """What the harness asks of a model; it would tie the weights of a module of transformers again."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.device = module, device_of(module)
        config = next((m.config for m in module.modules() if hasattr(m, "config")), None)
        if config is None:
            raise InputError(f"{type(module).__name__} has no config: the harness takes models of transformers.")
        self.config: Any = config
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        more = {"attention_mask": one + 1, "labels": one} if self.config.is_encoder_decoder else {}
        with torch.no_grad():
            logits = getattr(module(input_ids=one, **more), "logits", None)
        if logits is None or logits.ndim != 3:
            raise InputError(
                f"{type(module).__name__} gives no logits of tokens, which the harness needs: only language models "
                "have them, not backbones or classifiers."
            )

    def __call__(self, input_ids: Tensor, **more: Tensor) -> Any:
        return self._module(input_ids=input_ids, **more)

    def generate(self, *, input_ids: Tensor, max_length: int, **more: Any) -> Tensor:
        write: Any = getattr(self._module, "generate", None)
        if write is None:
            raise InputError(
                f"{type(self._module).__name__} writes no texts: choose tasks that are scored by probabilities."
            )
        # A model's own max_new_tokens would overrule max_length.
        return write(input_ids=input_ids, max_new_tokens=max_length - input_ids.shape[1], **more)


def build(
    *,
    tokenizer: str,
    tasks: Mapping[str, Mapping[str, Any]],
    batch_size: int = 8,
    relative_to: Path | None = None,
) -> TaskPool:
    """A pool of tasks of the LM evaluation harness (`pip install 'fusionbench[lmeval]'`).

    Args:
        tokenizer: folder of the tokenizer, often that of the base model.
        tasks: by name, `task` (its name in the harness), and perhaps `include` (a folder with YAML files of one's own
            tasks), `limit`, `num_fewshot`, `metric`, and `calibration_task` (another task of the harness: what
            `fusionbench evolve` and `tune=` score).
        batch_size: texts evaluated at once.
        relative_to: where local paths start that do not exist from here; those within the harness's own YAML files
            start from here.

    Raises:
        InputError: for what is no task, or no metric of it; without the package.
    """
    if not isinstance(tasks, Mapping) or not all(isinstance(entry, Mapping) for entry in tasks.values()):
        raise InputError("taskpool: 'tasks' must be a table of tasks by name, each with its 'task' in the harness.")
    includes = {name: _checked(f"Task '{name}'", entry, relative_to) for name, entry in tasks.items()}
    tokens = Tokens(find(tokenizer, relative_to=relative_to), max_length=0)  # the harness cuts texts by itself
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "lm_eval":
            raise
        raise InputError("Tasks of the kind lm_eval need lm-eval: pip install 'fusionbench[lmeval]'.") from None

    own = {
        folder: TaskManager(include_path=str(folder), include_defaults=False)
        for folder in set(includes.values())
        if folder
    }

    def opened(what: str, name: str, include: Path | None, entry: Mapping[str, Any]) -> HarnessTask:
        if include in own and name in own[include].all_subtasks:
            registry = own[include]
        else:
            registry = _registry(include)
        if name in registry.all_tags:
            inside = ", ".join(sorted(registry.task_index[name].tags)[:5])
            raise InputError(f"{what}: {name} stands for several tasks of the harness: name one of them, as {inside}.")
        if name not in registry.task_index:
            hint = did_you_mean(name, registry.all_tasks)
            hint = "`lm-eval ls tasks` lists all." if hint.startswith("There is") else hint
            raise InputError(f"{what}: the harness has no task '{name}'. {hint}")
        return HarnessTask(name, registry, entry.get("num_fewshot"), entry.get("limit"))

    found = {}
    for name, entry in tasks.items():
        what, include, other = f"Task '{name}'", includes[name], entry.get("calibration_task")
        test = opened(what, str(entry["task"]), include, entry)
        calibration = None if other is None else opened(what, str(other), include, entry)
        found[name] = LMEval(name, tokens, test, calibration, metric=entry.get("metric"), batch_size=batch_size)
    return TaskPool(found)


@cache
def _registry(include: Path | None) -> Any:
    """All tasks of the harness, and those of a folder: thousands of files, of which a folder's own tasks need none."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=None if include is None else str(include))


def _checked(what: str, entry: Mapping[str, Any], relative_to: Path | None) -> Path | None:
    """The folder that a task's entry includes; an error for what is wrong with the entry."""
    known = ("task", "include", "limit", "num_fewshot", "metric", "calibration_task")
    check_keys(what, entry, known, required=("task",))
    limit, shots, include = entry.get("limit"), entry.get("num_fewshot"), entry.get("include")
    if limit is not None and not is_count(limit) and not (isinstance(limit, float) and 0 < limit < 1):
        raise InputError(f"{what}: limit must be a whole number of 1 or more, or a part in (0, 1); got {limit!r}.")
    if shots is not None and shots != 0 and not is_count(shots):
        raise InputError(f"{what}: num_fewshot must be a whole number of 0 or more; got {shots!r}.")
    if entry.get("calibration_task") == entry["task"]:
        raise InputError(f"{what}: calibration_task is the task itself, whose test labels nothing may be chosen by.")
    if include is None:
        return None
    folder = find(str(include), relative_to=relative_to)
    if not folder.is_dir():
        raise InputError(f"{what}: include must be a folder with YAML files of tasks; '{include}' is a file.")
    return folder.resolve()  # what is kept of a folder's tasks is not another one's of that name


def _primary(what: str, task: HarnessTask, metric: str | None) -> str:
    """The score that stands for a task, as its YAML has it; the results are not needed."""
    known = task.metrics()
    if metric is None:
        ranked = sorted(known, key=lambda key: next((i for i, f in enumerate(FIRST) if _metric(key) == f), len(FIRST)))
        metric = next((key for key in ranked if known[key] or _is_perplexity(key)), None)
        if metric is None:
            raise InputError(f"{what}: the harness does not say by which score {task.name} goes: give metric: NAME.")
    metric = str(metric).removeprefix("1/")
    if known and metric not in known:
        of_filters = [key for key in known if _metric(key) == metric]
        if not of_filters:
            raise InputError(f"{what}: {task.name} has no metric '{metric}'. {did_you_mean(metric, known)}")
        metric = of_filters[0]
    if _is_perplexity(metric):
        return f"1/{metric}"
    if known.get(metric) is False:
        raise InputError(
            f"{what}: {metric} is better when it is lower, and scores here are better when they are higher: choose "
            "another metric, such as a perplexity, whose inverse is shown."
        )
    return metric


def _outcomes(samples: Iterable[Mapping[str, Any]], primary: str) -> Outcomes:
    """What is kept of every document for a score; nothing where that is no number for each."""
    metric, _, of = primary.removeprefix("1/").partition(",")
    values = [sample.get(metric) for sample in samples if sample["filter"] == (of or "none")]
    if primary.startswith("1/"):
        pairs = [value if isinstance(value, tuple) else (value, 1) for value in values]
        found = {"log_probability": [first for first, _ in pairs], "length": [length for _, length in pairs]}
    else:
        found = {"correct" if all(value in (0, 1) for value in values) else "value": values}
    if not values or not all(isinstance(one, NUMBERS) for column in found.values() for one in column):
        return {}
    return {name: np.array(column, bool if name == "correct" else float) for name, column in found.items()}


def _language_model(model: nn.Module, tokens: Tokens, batch_size: int) -> Any:
    """A module as the harness takes it; it is put in evaluation mode."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    shown: Any = _Shown(model.eval())
    backend = "seq2seq" if shown.config.is_encoder_decoder else "causal"
    with _quiet():
        return HFLM(pretrained=shown, tokenizer=tokens.tokenizer, backend=backend, batch_size=batch_size)


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the harness's advice to those who call it."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _seeded() -> Iterator[None]:
    """A context in which all that is random is the same each time, and which leaves no trace."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _config(entry: Any) -> dict[str, Any]:
    return dict(entry.cfg or {})


def _named(key: str) -> str:
    """A score of the harness; that of no filter by its metric alone."""
    return key.removesuffix(",none")


def _metric(key: str) -> str:
    return key.partition(",")[0]


def _is_perplexity(key: str) -> bool:
    return _metric(key).endswith("perplexity") and not key.startswith("1/")


def _strings(value: Any) -> list[Path]:
    """The paths in a value, however it is nested."""
    if isinstance(value, str):
        return [Path(value)]
    inner: Iterable[Any] = value.values() if isinstance(value, Mapping) else value or ()
    return [path for item in inner for path in _strings(item)]
