"""The methods there are, and what their hyperparameters may be. Knows nothing of tensors, and imports no torch."""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fusionbench.errors import InputError, did_you_mean

Kind = Literal["merging", "ensemble", "mixing", "reference"]
Data = Literal["none", "calibration", "test inputs"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """The interval a number must be in: `density: Annotated[float, Range(0, 1, open_low=True)]` is (0, 1].

    Args:
        low: the least value.
        high: the largest.
        open_low: `low` itself is left out.
        search: where a good value is looked for, by `fusionbench run ... tune=20`: a part of the interval.
    """

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    search: tuple[float, float] | None = None

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and value <= self.high and _is_finite(value)

    @property
    def bounded(self) -> bool:
        return self.low > float("-inf") or self.high < float("inf")

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == float("-inf") else "["
        right = ")" if self.high == float("inf") else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


class Output:
    """In the annotation of a text: it names a file that the method writes, "" for none. Each run needs its own."""


SCALING = Range(search=(0.0, 1.0))
"""Of what a task vector is multiplied by."""
DENSITY = Range(0, 1, open_low=True, search=(0.05, 1.0))
"""Of a fraction of elements that is kept."""
INDENT = "    "
"""Of a formula in a docstring."""
SYMBOLS = {
    "θ": "the parameters that come out",
    "θ₀": "the base's",
    "θᵢ": "those of model i",
    "τᵢ": "θᵢ - θ₀, a task vector",
    "N": "the number of models",
    "f": "the output of what comes out",
    "fᵢ": "the output of model i",
    "H": "the entropy of the predicted classes",
    "[…]": "1 where it holds, else 0",
    "⊙": "times, element by element",
    "‖…‖": "the length, of a tensor as one vector",
    "sgn": "-1, 0 or 1",
    "σ": "1 / (1 + exp(-z))",
}
"""What symbols mean in the formulas of all methods."""
LETTERS = {
    "λ": "scaling_factor",
    "wᵢ": "weights",
    "d": "density",
    "γ": "gamma",
    "ε": "epsilon",
    "α": "off_diagonal",
    "T": "temperature",
    "η": "base_learning_rate",
    "k": "experts_per_token",
}
"""Of hyperparameters, in formulas."""


@dataclass(frozen=True)
class Hyperparameter:
    """A keyword-only argument of a method, as its annotation describes it."""

    name: str
    type: Any
    default: Any
    range: Range | None
    meaning: str
    writes: bool = False

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        return _type_name(self.type)

    @property
    def space(self) -> tuple[float, float] | None:
        """Where to search for a good value; None where the annotation does not say."""
        return self.range.search if self.range is not None else None

    @property
    def is_file(self) -> bool:
        """Whether it names a file that is read: its type is `Path`. Recipes and suites have the path as a text."""
        return self.type is Path

    def check(self, value: Any, method: str) -> Any:
        """Return `value` as recipes tell it; an error where its type or range is wrong."""
        value = value.tolist() if hasattr(value, "tolist") else value  # numbers of numpy and torch
        if isinstance(value, int) and not _fits(value, self.type) and _fits(str(value), self.type):
            value = str(value)  # the name of a folder may be a number
        if not _fits(value, self.type):
            wanted = str(self)
            if self.range is not None and self.range.bounded:
                wanted += f" in {self.range}"
            hint = (
                " A list is written as [0.5,0.5]."
                if "list of float" in wanted and not isinstance(value, list | tuple | Mapping)
                else ""
            )
            raise InputError(f"{method}.{self.name} must be {wanted}; got {value!r}.{hint}")
        for number in _numbers(value):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, int) and not _is_finite(number):
                raise InputError(
                    f"{method}.{self.name} must be a number below {sys.float_info.max:g}; got a larger one."
                )
            if self.range is not None and number not in self.range:
                raise InputError(f"{method}.{self.name} must be in {self.range}; got {number}.")
        return str(value) if self.is_file else float(value) if self.type is float else value


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: the function's name, and the name on the command line.
        kind: what the result is: one set of weights (merging), several models side by side (ensemble), a module with
            parts of several (mixing), or a model to compare with (reference).
        function: the function itself, as it was written.
        paper: arXiv identifier; empty for what no single paper introduced.
        ordered: whether the order of the models matters.
        data: what it looks at besides weights: nothing, calibration data, or the test inputs without their labels.
        gradients: whether it takes gradients of the models.
        base: whether it needs the base model.
        example: words after the method's name that show its use: models as files (the base first), where it does not
            take those of the pool `clip-mini`, and hyperparameters, `name=value`.
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    paper: str
    ordered: bool
    data: Data
    gradients: bool
    base: bool
    example: str = ""

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def paragraphs(self) -> list[str]:
        """Of the docstring; the lines of an indented one begin with four spaces."""
        return re.split(r"\n\s*\n", inspect.getdoc(self.function) or "")

    @property
    def formula(self) -> str:
        """The docstring's first indented paragraph, without the indentation; empty where there is none."""
        return next((textwrap.dedent(part) for part in self.paragraphs if part.startswith(INDENT)), "")

    @property
    def symbols(self) -> dict[str, str]:
        """What the symbols of the formula mean: those that all methods share, and letters of its hyperparameters."""
        letters = {letter: name for letter, name in LETTERS.items() if name in self.hyperparameters}
        used = re.findall(r"\w+|\S", self.formula)
        return {symbol: what for symbol, what in {**SYMBOLS, **letters}.items() if symbol.partition("…")[0] in used}

    @property
    def shown(self) -> tuple[list[str], dict[str, str]]:
        """Models and hyperparameters of a command that works; without models it is for the pool `clip-mini`."""
        words = self.example.split()
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        numbers = {name: h.default for name, h in self.hyperparameters.items() if type(h.default) in (int, float)}
        if not settings and numbers:
            name, default = next(iter(numbers.items()))
            settings = {name: str(default)}
        return [word for word in words if "=" not in word], settings

    @property
    def saves(self) -> bool:
        """Whether the result is one model, which can be saved, and not several."""
        return self.kind != "ensemble" and self._result != "ModelPool"

    @property
    def makes_checkpoint(self) -> bool:
        """Whether the result is tensors, and not a module; what does not say so may be."""
        return self._result not in ("nn.Module", "Module")

    @property
    def _result(self) -> str:
        """What the function is annotated to return, which may be written as a text."""
        annotation = inspect.signature(self.function).return_annotation
        return getattr(annotation, "__name__", str(annotation))

    @property
    def adds_parameters(self) -> bool:
        """Whether the result has more parameters than one model."""
        return self.kind in ("ensemble", "mixing")

    @property
    def needs_tasks(self) -> bool:
        return self.data != "none"

    @property
    def plugin(self) -> str:
        """The name of the file that it was loaded from as a plugin; empty for a method of a module."""
        name = self.function.__module__
        return Path(inspect.getfile(self.function)).name if name.startswith(PLUGIN) else ""

    @property
    def looks_at(self) -> str:
        """What it looks at besides weights, in words; empty where that is nothing."""
        return {"none": "", "calibration": "calibration data"}.get(self.data, self.data)

    @cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """The keyword-only arguments, by name."""
        names = vars(sys.modules[self.function.__module__])
        found = {}
        for name, argument in inspect.signature(self.function).parameters.items():
            if argument.kind is inspect.Parameter.KEYWORD_ONLY:
                # Only these annotations are evaluated: those of pools and tasks would bring torch in.
                annotation = argument.annotation
                try:
                    annotation = eval(annotation, names) if isinstance(annotation, str) else annotation  # noqa: S307
                except Exception as error:  # whatever the author's own words raise, as of a name not imported
                    place = f"{self.name} of '{inspect.getfile(self.function)}'"
                    raise InputError(f"{place}: the annotation of '{name}' is not understood: {error}.") from error
                found[name] = _hyperparameter(name, annotation, argument.default)
        return found

    @cached_property
    def checked(self) -> Callable[..., Any]:
        """The function with its hyperparameters checked; a checkpoint it returns says in its recipe how it was made."""

        @wraps(self.function)
        def run(pool: Any, tasks: Any = None, **hyperparameters: Any) -> Any:
            from fusionbench.algorithms import Algorithm

            return Algorithm(self, self.check(hyperparameters)).run(pool, tasks)

        return run

    def require(self, name: str) -> Hyperparameter:
        """The hyperparameter called `name`."""
        if name not in self.hyperparameters:
            raise InputError(f"{self.name} takes no '{name}'. {did_you_mean(name, self.hyperparameters)}")
        return self.hyperparameters[name]

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters to call the function with; an error for an unknown name, a wrong type or range."""
        for name in given:
            self.require(name)
        for name, hyperparameter in self.hyperparameters.items():
            if hyperparameter.required and name not in given:
                raise InputError(f"{self.name} needs '{name}': {hyperparameter.meaning or hyperparameter}.")
        return {name: self.hyperparameters[name].check(value, self.name) for name, value in given.items()}


PLUGIN = "fusionbench_plugin_"
"""What the names of modules begin with that are files of plugins."""
ANYTHING = (Any, inspect.Parameter.empty)
_methods: dict[str, Method] = {}


def method(
    kind: Kind,
    *,
    paper: str = "",
    ordered: bool = False,
    data: Data = "none",
    gradients: bool = False,
    base: bool = False,
    example: str = "",
) -> Callable[[F], F]:
    """Register a function as a fusion method, and return it unchanged.

    The function takes a `ModelPool` and, where it looks at data (`data=`), `tasks`; its keyword-only arguments are its
    hyperparameters. Their types, ranges and meanings are read from the annotations:
    `density: Annotated[float, Range(0, 1, open_low=True), "fraction kept"] = 0.2`.

    Raises:
        InputError: for a kind that does not exist, `data` without the argument `tasks` or the other way round, and a
            name that another file's method has.
    """
    if kind not in typing.get_args(Kind):
        raise InputError(f"A method cannot be of the kind '{kind}'. {did_you_mean(kind, typing.get_args(Kind))}")

    def register(function: F) -> F:
        name = function.__name__
        given = "tasks" in inspect.signature(function).parameters
        if given != (data != "none"):
            raise InputError(
                f"The method '{name}' is registered with data={data!r}, but takes {'' if given else 'no '}tasks."
            )
        known = _methods.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise InputError(f"Two methods are called '{name}': in {known.function.__module__}, {function.__module__}.")
        _methods[name] = Method(name, kind, function, paper, ordered, data, gradients, base, example)
        return function

    return register


def registered() -> dict[str, Method]:
    """The methods whose files have been imported so far, by name."""
    return _methods


def list_methods() -> list[Method]:
    """All methods: those of the package, and those of plugins imported so far."""
    import_module("fusionbench.methods")
    return [_methods[name] for name in sorted(_methods)]


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        InputError: where there is none.
    """
    methods = {found.name: found for found in list_methods()}
    if name not in methods:
        raise InputError(f"No method is called '{name}'. {did_you_mean(name, methods)}")
    return methods[name]


def _hyperparameter(name: str, annotation: Any, default: Any) -> Hyperparameter:
    extras: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *rest = typing.get_args(annotation)
        extras = tuple(rest)
    interval = next((extra for extra in extras if isinstance(extra, Range)), None)
    meaning = next((extra for extra in extras if isinstance(extra, str)), "")
    default = str(default) if isinstance(default, Path) else default
    return Hyperparameter(name, annotation, default, interval, meaning, Output in extras)


def _is_finite(value: float) -> bool:
    """Whether a number is finite, as a float: a whole number may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _numbers(value: Any) -> list[Any]:
    """The numbers in a hyperparameter's value, which may be a list or a table of them."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _fits(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in ANYTHING:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple and arguments[-1] is not ...:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(arguments)
            and all(_fits(item, option) for item, option in zip(value, arguments, strict=True))
        )
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if wanted in (None, type(None)):
        return value is None
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str | Path if wanted is Path else wanted)


def _type_name(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in ANYTHING:
        return "anything"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is not ...:
        return f"list of {', '.join(map(_type_name, arguments))}"
    if origin in (list, tuple, Sequence):
        return f"list of {_type_name(arguments[0])}"
    if origin in (dict, Mapping):
        return f"table of {_type_name(arguments[1])} by name"
    if wanted is Path:
        return "file"
    return "null" if wanted in (None, type(None)) else wanted.__name__
