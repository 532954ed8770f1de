"""A recipe's YAML, read and checked: mergekit's keys, and the few of ours (convention, seed, vocabulary)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fusionbench.errors import InputError, did_you_mean
from fusionbench.locations import find
from fusionbench.recipes import chat_templates
from fusionbench.recipes.document import Node, Problems, parse, read
from fusionbench.recipes.methods import METHODS, Parameter
from fusionbench.recipes.schema import Recipe, Reference, Setting, Settings, Slice, Source, inputs_of
from fusionbench.recipes.vocabulary import WAYS, TokenizerSettings, TokenRule
from fusionbench.registry import Method, Range, get_method

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "name",
    "convention",
    "seed",
    "vocabulary",
)
log = logging.getLogger(__name__)
DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""Under safetensors' names."""


def read_recipes(path: str | Path, *, text: str | None = None, known: Collection[str] = ()) -> list[Recipe]:
    """The documents of a recipe file, the result last; each names only those before it.

    Nothing but the file is read, and whether the models are there is looked up.

    Args:
        path: of the file.
        text: its content, where it is not to be read.
        known: names of models that need not be looked up.

    Raises:
        InputError: with everything that is wrong, one a line.
    """
    roots = read(path) if text is None else parse(text, str(path))
    names = [_name_of(root) for root in roots]
    reader = _Reader(Path(path).parent, [*filter(None, names), *known])
    recipes = [reader.recipe(root) for root in roots]
    problems = roots[0].problems
    for recipe in recipes:
        _check_inputs(recipe)
    _check_names(recipes, problems)
    problems.stop()
    return _in_order(recipes, problems)


class _Reader:
    """Reads documents; knows where models may be."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def recipe(self, root: Node) -> Recipe:
        fields = root.fields(KEYS, required=["merge_method"])
        convention = fields["convention"].choice(["mergekit", "paper"]) if "convention" in fields else "mergekit"
        method, ours = self._method(fields.get("merge_method"), convention)
        parts = [key for key in ("models", "slices") if key in fields]
        if "modules" in fields:
            fields["modules"].wrong(
                "modules is not supported: list models, which merges all parts of the models alike."
            )
        elif len(parts) != 1:
            given = "both" if parts else "neither"
            root.wrong(f"the recipe must have either models or slices; it has {given}.")
        known = METHODS[method].parameters if method in METHODS and convention == "mergekit" else None
        base = self.reference(fields["base_model"]) if "base_model" in fields else None
        slices: tuple[Slice, ...] = ()
        if "models" in fields:
            sources = tuple(self._source(node, method, known, False) for node in fields["models"].items(least=1))
            slices = (Slice(sources, None, {}, fields["models"].line),)
        elif "slices" in fields:
            slices = tuple(self._slice(node, method, known) for node in fields["slices"].items(least=1))
            if convention == "paper":
                fields["slices"].wrong(
                    "slices go with mergekit's methods: leave convention: paper out, or list models."
                )
        settings: Settings = {}
        hyperparameters: dict[str, Any] = {}
        if "parameters" in fields and ours is not None:
            hyperparameters = _hyperparameters(fields["parameters"], ours)
        elif "parameters" in fields:
            settings = _settings(fields["parameters"], method, known)
        if ours is not None:
            _check_method(fields["merge_method"], ours, hyperparameters)
        written = "out_dtype" if "out_dtype" in fields else "dtype"
        dtypes = {key: DTYPES[fields[key].choice(DTYPES)] for key in ("dtype", "out_dtype") if key in fields}
        return Recipe(
            method=method,
            convention="paper" if convention == "paper" else "mergekit",
            slices=slices,
            whole="models" in fields,
            base=base,
            parameters=settings,
            hyperparameters=hyperparameters,
            dtype=dtypes.get(written),
            tokenizer=self._settings_of_tokenizer(fields),
            vocabulary=fields["vocabulary"].choice(WAYS) if "vocabulary" in fields else "",
            chat_template=_chat_template(fields["chat_template"]) if "chat_template" in fields else "",
            lines={key: node.line for key, node in fields.items()},
            name=_name_of(root),
            seed=fields["seed"].whole(Range(0)) if "seed" in fields else 0,
            problems=root.problems,
            line=root.line,
        )

    def _method(self, node: Node | None, convention: str) -> tuple[str, Method | None]:
        if node is None:
            return "", None
        name = node.text()
        if convention == "paper":
            try:
                return name, get_method(name)
            except InputError as error:
                node.wrong(f"by convention: paper, the methods are ours: {error}")
                return name, None
        if name and name not in METHODS:
            node.wrong(f"merge_method cannot be '{name}'. {did_you_mean(name, METHODS)}")
        return name, None

    def reference(self, node: Node) -> Reference:
        """A model's; a problem where it is not there."""
        place, adapter = "", ""
        if node.is_table:
            fields = node.fields(("model", "lora", "override_architecture"), required=["model"])
            place = _path(fields["model"]) if "model" in fields else ""
            adapter = _path(fields["lora"]) if "lora" in fields else ""
            if "override_architecture" in fields:
                fields["override_architecture"].wrong(
                    "override_architecture is not supported: layers are found by their names, so leave it out."
                )
            return self._checked(Reference(place, adapter, node.line), node) if place else Reference("?")
        text = node.text()
        if "+" in text and text not in self.names and not self._there(text):
            place, _, adapter = text.partition("+")
        else:
            place = text
        return self._checked(Reference(place, adapter, node.line), node) if place else Reference("?")

    def _checked(self, reference: Reference, node: Node) -> Reference:
        for place in (reference.place, reference.adapter):
            if not place or place in self.names or place.startswith("hf:"):
                continue
            try:
                find(place, relative_to=self.folder)
            except InputError as error:
                path, at, revision = place.rpartition("@")
                if at and path:
                    node.wrong(
                        f"'{place}': revisions are not supported: download '{revision}', and name its local folder."
                    )
                else:
                    node.wrong(str(error))
        return reference

    def _there(self, place: str) -> bool:
        try:
            find(place, relative_to=self.folder)
        except InputError:
            return False
        return True

    def _slice(self, node: Node, method: str, known: Mapping[str, Parameter] | None) -> Slice:
        fields = node.fields(("sources", "base_model", "parameters"), required=["sources"])
        sources: tuple[Source, ...] = ()
        if "sources" in fields:
            sources = tuple(self._source(source, method, known, True) for source in fields["sources"].items(least=1))
        base = self.reference(fields["base_model"]) if "base_model" in fields else None
        settings = _settings(fields["parameters"], method, known) if "parameters" in fields else {}
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            counts = ", ".join(str(length) for length in sorted(lengths))
            node.wrong(f"the sources of a slice must have as many layers each; they have {counts}.")
        return Slice(sources, base, settings, node.line)

    def _source(self, node: Node, method: str, known: Mapping[str, Parameter] | None, layers: bool) -> Source:
        keys = ("model", "layer_range", "parameters") if layers else ("model", "parameters")
        fields = node.fields(keys, required=keys[:-1])
        model = self.reference(fields["model"]) if "model" in fields else Reference("?")
        settings: Settings = {}
        if "parameters" in fields and known is not None:
            settings = _settings(fields["parameters"], method, known)
            for name, values in settings.items():
                if known[name].scope != "model":
                    place = "the recipe's or the slice's" if layers else "the recipe's"
                    line = values[0].line if values else node.line
                    said = f"{name} is one for all models in {method}: give it under {place} parameters."
                    node.problems.add(line, said)
        elif "parameters" in fields and method:
            fields["parameters"].wrong("by convention: paper, hyperparameters stand under the recipe's parameters.")
        between = _layer_range(fields["layer_range"]) if "layer_range" in fields else None
        return Source(model, between, settings, node.line)

    def _settings_of_tokenizer(self, fields: Mapping[str, Node]) -> TokenizerSettings | None:
        asked = [key for key in ("tokenizer", "tokenizer_source", "vocabulary") if key in fields]
        if len(asked) > 1:
            fields[asked[1]].wrong(f"{asked[0]} says what the tokenizer is: leave {asked[1]} out.")
        if "tokenizer_source" in fields:
            return TokenizerSettings(self._tokenizer(fields["tokenizer_source"]))
        if "tokenizer" not in fields:
            return None
        settings = fields["tokenizer"].fields(("source", "tokens", "pad_to_multiple_of"))
        source = self._tokenizer(settings["source"]) if "source" in settings else "union"
        multiple = settings["pad_to_multiple_of"].whole(Range(1)) if "pad_to_multiple_of" in settings else None
        given = settings["tokens"].entries() if "tokens" in settings else {}
        return TokenizerSettings(source, multiple, {text: self._rule(node) for text, node in given.items()})

    def _tokenizer(self, node: Node) -> str:
        if not node.is_table and node.text() in ("union", "base"):
            return node.text()
        return self.reference(node).name

    def _rule(self, node: Node) -> TokenRule:
        fields = node.fields(("source", "force"))
        force = fields["force"].flag() if "force" in fields else False
        if "source" not in fields:
            return TokenRule(None, force)
        source = fields["source"]
        if not source.is_table or "kind" not in source.entries():
            return TokenRule(self.reference(source).name, force)
        given = source.fields(("kind", "model", "token", "token_id"), required=["kind"])
        if "kind" not in given or given["kind"].choice(["zero", "model_token"]) == "zero":
            return TokenRule("zero", force)
        if "model" not in given or ("token" in given) == ("token_id" in given):
            source.wrong("a model_token has a model, and either token or token_id.")
            return TokenRule(None, force)
        token = given["token"].text() if "token" in given else given["token_id"].whole(Range(0))
        return TokenRule((self.reference(given["model"]).name, token), force)


def _check_inputs(recipe: Recipe) -> None:
    """Problems with the number of models, and with where the base is."""
    if recipe.convention != "mergekit" or recipe.method not in METHODS:
        return
    method, problems = METHODS[recipe.method], recipe.problems
    for part in (part for part in recipe.slices if part.sources):
        base, names = part.base or recipe.base, [source.model.name for source in part.sources]
        for source in part.sources:
            if source.parameters and source.model == base and method.base in ("base", "optional"):
                said = f"{recipe.method} has no {', '.join(source.parameters)} of the base model: it has no effect."
                log.warning("%s:%s: %s", problems.file, source.line, said)
            if names.count(source.model.name) > 1:
                problems.add(source.line, f"'{source.model.name}' is a source twice: a merge takes each model once.")
        if base is None and method.base in ("base", "first"):
            problems.add(recipe.line, f"{recipe.method} needs a base_model: name the model that is changed.")
        elif base is not None and method.base != "model" and not recipe.whole and base.name not in names:
            problems.add(part.line, f"the slice has no source with the base model, '{base.name}': add it.")
        else:
            count = len(inputs_of(recipe, part).models) - (method.base == "first")
            least, most = (n and n - (method.base == "first") for n in (method.least, method.most))
            if count < (least or 0) or (most is not None and count > most):
                wanted = f"{least}" if least == most else f"at least {least}"
                models = "model" if wanted == "1" else "models"
                beside = " beside the base" if base is not None and method.base != "model" else ""
                problems.add(part.line, f"{recipe.method} takes {wanted} {models}{beside}; it is given {count}.")


def _settings(node: Node, method: str, known: Mapping[str, Parameter] | None) -> Settings:
    """The values of parameters; a problem for each that the method does not take."""
    if known is None:  # of a method that is not known either
        return {}
    fields = node.fields(list(known)) if known else {}
    if not known and node.entries():
        node.wrong(f"{method} takes no parameters.")
    return {name: _values(value, known[name]) for name, value in fields.items()}


def _values(node: Node, parameter: Parameter) -> tuple[Setting, ...]:
    if node.is_table:
        return (_filtered(node, parameter),)
    if not node.is_list:
        return (Setting("", (_value(node, parameter),), node.line),)
    items = node.items(least=1)
    if not any(item.is_table for item in items):
        return (Setting("", tuple(_value(item, parameter) for item in items), node.line),) if items else ()
    settings = tuple(_filtered(item, parameter) for item in items)
    for i, setting in enumerate(settings[:-1]):
        if not setting.filter:
            items[i + 1].wrong(f"{node.name}: the entry of line {setting.line} is for all tensors: put it last.")
            break
    return settings


def _filtered(node: Node, parameter: Parameter) -> Setting:
    fields = node.fields(("filter", "value"), required=["value"])
    words = fields["filter"].text() if "filter" in fields else ""
    values: tuple[float | bool, ...] = ()
    if "value" in fields:
        value = fields["value"]
        nodes = value.items(least=1) if value.is_list else [value]
        values = tuple(_value(Node(node.name, item.yaml, item.problems), parameter) for item in nodes)
    return Setting("" if words == "*" else words, values, node.line)


def _value(node: Node, parameter: Parameter) -> float | bool:
    if parameter.kind == "flag":
        return node.flag()
    return node.whole(parameter.range) if parameter.kind == "whole" else node.number(parameter.range)


def _hyperparameters(node: Node, method: Method) -> dict[str, Any]:
    """Of our methods: each checked as on the command line."""
    found: dict[str, Any] = {}
    for name, value in node.entries().items():
        try:
            found[name] = method.require(name).check(value.plain(), method.name)
        except InputError as error:
            value.wrong(str(error))
    return found


def _check_method(node: Node, method: Method, hyperparameters: Mapping[str, Any]) -> None:
    if method.needs_tasks:
        node.wrong(f"{method.name} looks at {method.looks_at}: use fusionbench run, with a task pool.")
    elif not method.saves:
        node.wrong(f"{method.name} gives several models side by side, which cannot be saved as one.")
    for name, hyperparameter in method.hyperparameters.items():
        if hyperparameter.required and name not in hyperparameters:
            node.wrong(f"{method.name} needs '{name}': {hyperparameter.meaning or hyperparameter}.")


def _chat_template(node: Node) -> str:
    choice = node.text()
    try:
        chat_templates.check(choice or "auto")
    except InputError as error:
        node.wrong(str(error))
    return choice


def _layer_range(node: Node) -> tuple[int, int] | None:
    numbers = [item.whole(Range(0)) for item in node.items()]
    if len(numbers) != 2 or numbers[0] >= numbers[1]:
        node.wrong("layer_range must be [FIRST, END], of which END is not in it: [0, 2] is two layers.")
        return None
    return numbers[0], numbers[1]


def _path(node: Node) -> str:
    """A path, which mergekit's own files write as {path: ...}."""
    if not node.is_table:
        return node.text()
    fields = node.fields(("path", "revision"), required=["path"])
    if "revision" in fields:
        fields["revision"].wrong("revisions are not supported: download it, and name the local folder.")
    return fields["path"].text() if "path" in fields else ""


def _name_of(root: Node) -> str:
    if not root.is_table:
        return ""
    name = root.entries().get("name")
    return "" if name is None or name.is_null else name.text()


def _check_names(recipes: list[Recipe], problems: Problems) -> None:
    names: dict[str, int] = {}
    for recipe in recipes:
        if recipe.name in names:
            first = names[recipe.name]
            what = f"the name '{recipe.name}' is that of the document of line {first}, too" if recipe.name else ""
            problems.add(
                recipe.line, f"{what or f'the document of line {first} has no name either'}: give each its own."
            )
        names.setdefault(recipe.name, recipe.line)
    used = {reference.place for recipe in recipes for reference in recipe.references.values()}
    final = recipes[-1].name if "" not in names else ""
    for recipe in recipes:
        if recipe.name not in (*used, final):
            problems.add(recipe.line, f"the document '{recipe.name}' is used by no other.")


def _in_order(recipes: list[Recipe], problems: Problems) -> list[Recipe]:
    """Each after those that it names; the one without a name last, or else the one that is last in the file."""
    named = {recipe.name: recipe for recipe in recipes}
    ordered: list[Recipe] = []

    def visit(recipe: Recipe, path: tuple[str, ...]) -> None:
        if recipe.name in path:
            problems.add(recipe.line, f"the document '{recipe.name}' needs its own result: {' -> '.join(path)}.")
            problems.stop()
        if recipe not in ordered:
            for reference in recipe.references.values():
                if reference.place in named:
                    visit(named[reference.place], (*path, recipe.name))
            ordered.append(recipe)

    visit(named.get("", recipes[-1]), ())
    return ordered
