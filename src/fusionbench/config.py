"""YAML and command-line words to objects. The only importer of Hydra, of which only composition is used."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench import reference_yaml
from fusionbench.algorithms import Algorithm
from fusionbench.errors import InputError, check_keys, did_you_mean, is_count
from fusionbench.parallel import check_workers
from fusionbench.registry import PLUGIN, Method, get_method, list_methods, registered

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fusionbench.pool import ModelPool
    from fusionbench.task import TaskPool

CONFIGS = Path(__file__).parent / "configs"

# The options of a run besides its three groups, with what they mean; their defaults are in configs/run.yaml.
OPTIONS = {
    "out": "folder for the merged model",
    "report": "file for the JSON report (a folder, where several runs are asked for)",
    "reference": "method whose scores the table compares with; null for none",
    "plugins": "list of .py files or modules with methods of one's own",
    "nan": "error | warn | ignore: what to do about NaN or Inf in an input",
    "align": "weight_matching: permute the units of models of other initialisations to the order of the base's",
    "calibration": "what methods may look at: a split and the most examples of each task, as calibration:256",
    "corruption": "what is done to test images, and how much, as motion_blur:3 of 1 to 5; null for nothing",
    "batch_norm": "merge | calibrate: statistics of batch norms as the method has them, or from calibration data",
    "tune": "trials to choose hyperparameters by, on calibration data; a row more for each run; null for none",
    "device": "where models are evaluated: cpu, cuda, cuda:1 ...",
    "workers": "threads that read, merge and write; null for one per core",
    "executor": "threads | processes | ray: who merges and writes",
    "memory": "bound on what is held to merge (null: 512MB), or to learn from (null: half of what is free), as 2GB",
    "overwrite": "true to replace what is at out",
}
GROUPS = ("method", "modelpool", "taskpool")
# Those that change nothing in the model that is made.
BESIDE = ("out", "report", "reference", "tune", "device", "workers", "executor", "memory", "overwrite")


@dataclass(frozen=True)
class Run:
    """One run, as composed: what to fuse, how, and what to evaluate it on."""

    algorithm: Algorithm
    modelpool: dict[str, Any]
    taskpool: dict[str, Any] | None
    options: dict[str, Any]
    folders: dict[str, Path]  # of a pool's own YAML file: where its relative paths start
    words: tuple[str, ...]  # that asked for it
    tuned: dict[str, Any] = field(default_factory=dict)  # how the hyperparameters were found

    @property
    def label(self) -> str:
        """The method's name and what differs from its defaults."""
        return f"{self.algorithm.label} (tuned)" if self.tuned else self.algorithm.label

    @property
    def command(self) -> list[str]:
        """The words that make the same model, without what changes nothing in it."""
        looks_at_tasks = self.algorithm.method.needs_tasks or self.options["batch_norm"] == "calibrate"
        beside = BESIDE if looks_at_tasks else (*BESIDE, "taskpool", "calibration")
        tuned = {f"method.{name}": value for name, value in self.algorithm.given.items()} if self.tuned else {}
        keys = {word: word.lstrip("+~").partition("=")[0] for word in self.words}
        kept = [word for word, key in keys.items() if key.partition(".")[0] not in beside and key not in tuned]
        return ["fusionbench", "run", *kept, *(f"{key}={value}" for key, value in tuned.items()), "out=OUT"]

    def pool(self) -> ModelPool:
        """The model pool, opened."""
        return build_modelpool(
            self.modelpool,
            relative_to=self.folders.get("modelpool"),
            nan=self.options["nan"],
            workers=self.options["workers"],
        )

    def tasks(self) -> TaskPool | None:
        """The task pool, opened."""
        if self.taskpool is None:
            if self.options["corruption"] is not None:
                raise InputError("corruption needs a taskpool=, whose test images it changes.")
            return None
        tasks = build_taskpool(self.taskpool, relative_to=self.folders.get("taskpool"))
        return corrupted(tasks.calibrated_on(self.options["calibration"]), self.options["corruption"])


def compose(overrides: Sequence[str]) -> list[Run]:
    """The runs that `overrides` ask for: one, or one for every combination where several values are given with commas.

    Raises:
        InputError: for an unknown name, a value of a wrong type, or where no method or no model pool is given.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        word = next((word for word in overrides if not _is_understood(word)), " ".join(overrides))
        key, equals, value = word.partition("=")
        quoted = f""" Put what has blanks or signs in it in quotes twice: '{key}="{value}"'.""" if value else ""
        raise InputError(f"'{word}' is not understood. Write KEY=VALUE, as method=simple_average.{quoted}") from None
    _load_plugins(parsed)
    chosen = [name for override in parsed if override.key_or_group == "method" for name in _values(override)]
    for override in parsed:
        _check_key(override, chosen)
    given = {override.key_or_group for override in parsed}
    for group in ("method", "modelpool"):
        if group not in given:
            names = [method.name for method in list_methods()] if group == "method" else list_configs(group)
            raise InputError(f"No {group} is given. Write {group}=NAME with one of: {', '.join(names)}.")
    choices = [_values(override) for override in parsed]
    lines = [
        [_word(override, value) for override, value in zip(parsed, values, strict=True)]
        for values in itertools.product(*choices)
    ]
    return [_compose_one(line) for line in lines]


def _values(override: Any) -> list[str]:
    """The values of an override, of which each is for runs of its own."""
    several = override.is_sweep_override()
    return list(override.sweep_string_iterator()) if several else [override.get_value_element_as_str()]


def _is_understood(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def settings(words: Sequence[str], known: Sequence[str], required: Sequence[str]) -> dict[str, str]:
    """The values of words KEY=VALUE, for verbs that take a few keys; of a method, where it is one, what it takes.

    Raises:
        InputError: for a key that is not known, and a pool that is required and missing.
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known and not (key.startswith("method.") and "method" in known):
            raise InputError(f"'{word}' is not understood. {did_you_mean(key, known)} Write KEY=VALUE.")
        if not value and key in known:
            raise InputError(f"{key} is empty: write {key}=VALUE.")
        found[key] = value
    for group in required:
        if group not in found:
            raise InputError(f"No {group} is given. Write {group}=NAME with one of: {', '.join(list_configs(group))}.")
    return found


def list_configs(group: str) -> list[str]:
    """The names of the pools or task pools that come with the package."""
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def read_config_file(group: str, name: str) -> tuple[dict[str, Any], Path | None]:
    """The YAML called `name` in a group, or the file of that path, and the folder its relative paths start from."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    own = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if own else CONFIGS / group / f"{name}.yaml"
    if not path.is_file():
        if own:
            raise InputError(f"{group}: the file '{name}' does not exist.")
        raise InputError(
            f"No {group} is called '{name}'. {did_you_mean(name, list_configs(group))} Or give a .yaml file."
        )
    loaded = load_yaml(path)
    try:
        unresolved = OmegaConf.to_container(loaded)
        if group == "modelpool" and isinstance(unresolved, dict) and reference_yaml.is_reference(unresolved):  # type: ignore[arg-type]
            return reference_yaml.read(path), path.parent
        content = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"'{path}' is not valid YAML: {_one_line(error)}.") from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}, path.parent if own else None


def load_yaml(path: Path) -> DictConfig:
    """A YAML file's table of keys and values, its interpolations not yet resolved."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not valid YAML: {_one_line(error)}.") from None
    if not isinstance(loaded, DictConfig):
        raise InputError(f"'{path}' is not a table of keys and values.")
    return loaded


def load_modelpool(name: str, **options: Any) -> ModelPool:
    """The model pool called `name`, or that of a .yaml file; options are those of `ModelPool`: `nan`, `workers`.

    Raises:
        InputError: for a name that does not exist, a file that is no pool, and models that are not there or do not fit.
    """
    content, folder = read_config_file("modelpool", name)
    return build_modelpool(content, relative_to=folder, **options)


def load_taskpool(name: str, *, calibration: str | None = None) -> TaskPool:
    """The task pool called `name`, or that of a .yaml file.

    Args:
        name: of a task pool (`fusionbench list taskpools`), or of a file.
        calibration: what methods may look at: a split and how many examples of each task, as "calibration:64", or
            "test"; by default "calibration:256".

    Raises:
        InputError: for a name that does not exist, a file that is no pool, data that are not there, and a wrong split.
    """
    content, folder = read_config_file("taskpool", name)
    tasks = build_taskpool(content, relative_to=folder)
    return tasks if calibration is None else tasks.calibrated_on(calibration)


def corrupted(tasks: TaskPool, corruption: str | None) -> TaskPool:
    """The tasks with what is done to their test images, as `motion_blur:3`; as they are for None."""
    if corruption is None:
        return tasks
    name, _, severity = str(corruption).partition(":")
    if not severity.isdecimal():
        raise InputError(f"corruption is a name and a severity of 1 to 5, as motion_blur:3; got '{corruption}'.")
    return tasks.corrupted(name, int(severity))


def build_modelpool(config: Mapping[str, Any], *, relative_to: Path | None = None, **options: Any) -> ModelPool:
    """A model pool of its YAML: `models`, and perhaps `base`, `architecture` and `vocabulary`."""
    from fusionbench.alike import check_pool
    from fusionbench.architectures import architecture_of, get_architecture
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.locations import find
    from fusionbench.pool import ModelPool
    from fusionbench.recipes.models import check_numbers

    check_keys("modelpool", config, ("models", "base", "architecture", "vocabulary"), required=("models",))
    if options.get("nan") not in (None, "error", "warn", "ignore"):
        raise InputError(f"nan must be error, warn or ignore; got '{options['nan']}'.")
    check_workers(options.get("workers"))

    def open_model(location: Any, base: Checkpoint | None = None) -> Checkpoint:
        if not isinstance(location, str):
            raise InputError(f"A model is given by its path; got {location!r}.")
        place = find(location, relative_to=relative_to)
        checkpoint = Checkpoint.open(place, base=base)
        check_numbers(location, checkpoint)
        # Of a path, what can be found again from here: it may have begun at the pool's own file.
        checkpoint.location = location if location.startswith(("zoo:", "hf:")) else str(place)
        return checkpoint

    if not isinstance(config["models"], Mapping):
        raise InputError("modelpool: 'models' must be a table of paths by name.")
    if not config["models"]:
        raise InputError("modelpool: 'models' is empty: name at least one model.")
    base = open_model(config["base"]) if config.get("base") else None
    models = {str(name): open_model(location, base) for name, location in config["models"].items()}
    named = config.get("architecture")
    architecture = get_architecture(named) if named else architecture_of(base or next(iter(models.values())))
    pool = ModelPool(models, base, architecture=architecture, vocabulary=config.get("vocabulary"), **options)
    check_pool(pool, tokens=config.get("vocabulary") is None)
    return pool


def build_taskpool(config: Mapping[str, Any], *, relative_to: Path | None = None) -> TaskPool:
    """A task pool of its YAML: `kind`, and the arguments of that kind's `build`."""
    from fusionbench.tasks import get_kind

    if "kind" not in config:
        raise InputError("taskpool: 'kind' is missing: it says what kind of tasks these are.")
    build = get_kind(str(config["kind"])).build
    arguments = {key: value for key, value in config.items() if key != "kind"}
    if "tasks" in arguments:
        arguments["tasks"] = _named_tasks(arguments["tasks"])
    parameters = {name: p for name, p in inspect.signature(build).parameters.items() if name != "relative_to"}
    required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    check_keys(f"taskpool ({config['kind']})", arguments, list(parameters), required=required)
    for name, value in arguments.items():
        if parameters[name].annotation in (int, "int") and not is_count(value):
            raise InputError(f"taskpool: {name} must be a whole number of 1 or more; got {value!r}.")
    return build(**arguments, relative_to=relative_to)


def _named_tasks(tasks: Any) -> Any:
    """Tasks by name, of a table in which a name may stand for what `configs/task` says, or of a list of such names."""
    if isinstance(tasks, list):
        tasks = {str(name): name for name in tasks}
    if not isinstance(tasks, Mapping):
        return tasks
    return {n: read_config_file("task", entry)[0] if isinstance(entry, str) else entry for n, entry in tasks.items()}


def _compose_one(words: list[str]) -> Run:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    for method in list_methods():
        defaults = {n: "???" if h.required else h.default for n, h in method.hyperparameters.items()}
        store.store(group="method", name=method.name, node={"_name": method.name, **defaults})
    asked = tuple(words)
    folders: dict[str, Path] = {}
    method_name = ""
    for i, word in sorted(enumerate(words), key=lambda item: "." in item[1].partition("=")[0]):  # groups first
        group, _, name = word.partition("=")
        name = name.strip("'\"")
        if group in ("modelpool", "taskpool") and name in ("null", "None", ""):
            raise InputError(f"'{word}' names no {group}: give one, or leave it out.")
        if group in ("modelpool", "taskpool"):
            content, folder = read_config_file(group, name)  # also says what is wrong with it, before Hydra does
            if folder is not None:
                folders[group] = folder
                store.store(group=group, name="_own", node=content)
                words = [*words[:i], f"{group}=_own", *words[i + 1 :]]
        elif group == "method":
            method_name = get_method(name).name
        elif group.startswith("method.") and method_name:
            get_method(method_name).require(group.removeprefix("method."))
    tables = {"modelpool.models"}  # that are there already
    if method_name:
        settings = get_method(method_name).hyperparameters
        tables |= {f"method.{name}" for name, h in settings.items() if isinstance(h.default, Mapping)}
    words = [part for word in words for part in _replacing(word, tables)]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = OmegaConf.to_container(hydra_compose("run", words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"Not understood: {_one_line(error)}") from None
    assert isinstance(config, dict)
    given = dict(config["method"])
    method = get_method(given.pop("_name"))
    given = {name: value for name, value in given.items() if value != "???"}
    options = {name: config[name] for name in OPTIONS}
    for name in ("out", "report"):
        options[name] = _place(name, options[name])
    taskpool, modelpool = config.get("taskpool"), dict(config.get("modelpool") or {})
    return Run(Algorithm(method, method.check(given)), modelpool, taskpool, options, folders, asked)


def _replacing(word: str, tables: Collection[str]) -> list[str]:
    """Words that put a table in the place of one of these, into which Hydra would merge it."""
    key, _, value = word.partition("=")
    return [f"~{key}", f"+{word}"] if key in tables and value.startswith("{") else [word]


def _place(name: str, value: Any) -> str | None:
    """Where to write, of an option; a name may be a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise InputError(f"{name} is {OPTIONS[name].partition(' (')[0]}: give its name; got {value!r}.")
    if value == "":  # as of a variable of the shell that is not set
        raise InputError(f"{name} is empty: name the {OPTIONS[name].partition(' (')[0]}.")
    return None if value is None else os.path.expanduser(str(value))


def _check_key(override: Any, chosen: Sequence[str]) -> None:
    """An error for what is no option of a run and no hyperparameter; values are checked by those who take them.

    `chosen` are the names of the run's methods, of which one may have it.
    """
    top, *rest = override.key_or_group.split(".")
    if top not in OPTIONS and top not in GROUPS:
        taken = any(top in method.hyperparameters for method in list_methods() if method.name in chosen)
        hint = f"Did you mean 'method.{top}'?" if taken else did_you_mean(top, [*GROUPS, *OPTIONS])
        raise InputError(f"'{top}' is no option of a run. {hint}")
    if override.is_sweep_override() and top != "method":
        raise InputError(f"'{override.input_line}': only method and its hyperparameters take several values.")
    if top in GROUPS and not rest and override.is_delete():
        raise InputError(f"'{override.input_line}' would leave the run without its {top}.")


def _word(override: Any, value: str) -> str:
    sign = "~" if override.is_delete() else "++" if override.is_force_add() else "+" if override.is_add() else ""
    if override.is_delete():
        return override.input_line
    return f"{sign}{override.key_or_group}={value}"


def _load_plugins(parsed: Iterable[Any]) -> None:
    for override in parsed:
        if override.key_or_group == "plugins":
            value = override.value()
            for plugin in value if isinstance(value, list) else [value]:
                load_plugin(str(plugin).strip("'\""))


def load_plugin(name: str) -> None:
    """Import a module, or a `.py` file (the ending may be left out), so that its methods are registered."""
    path = Path(name if name.endswith(".py") else f"{name}.py").expanduser()
    if path.is_file():
        place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # files of one name may be several
        module_name = f"{PLUGIN}{path.stem}_{place}"
        if module_name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
            _check_methods(module_name)
        except BaseException as error:
            del sys.modules[module_name]  # else it would pass for one that is loaded
            for found in _methods_of(module_name):
                del registered()[found.name]
            if isinstance(error, SyntaxError) and error.filename == spec.origin:
                raise InputError(f"The plugin '{path}' is not Python: {error.msg} in line {error.lineno}.") from None
            raise
        return
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # of what the plugin itself imports
            raise
        raise InputError(f"The plugin '{name}' is neither a file '{path}' nor an installed module.") from None
    _check_methods(name)


def _check_methods(module: str) -> None:
    """An error where the hyperparameters of a plugin's method cannot be read."""
    for found in _methods_of(module):
        _ = found.hyperparameters


def _methods_of(module: str) -> list[Method]:
    """The methods of a module, or of a package."""
    return [found for found in registered().values() if f"{found.function.__module__}.".startswith(f"{module}.")]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\nSee ")[0].split())
