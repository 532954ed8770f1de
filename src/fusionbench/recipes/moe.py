"""Recipes of mixtures of experts, as mergekit-moe reads them: dense models, and the prompts each is to answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.recipes.document import Node, parse, read
from fusionbench.recipes.models import check_numbers, opened
from fusionbench.registry import Range

if TYPE_CHECKING:
    from torch import Tensor

    from fusionbench.sparse import Layout, Routers

log = logging.getLogger(__name__)

KEYS = ("base_model", "experts", "shared_experts", "gate_mode", "dtype", "experts_per_token", "architecture")
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "residual_scale", "noise_scale")
RANDOM = ("random", "uniform_random")
MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", *RANDOM)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Expert:
    """A dense model, and when it is to be chosen.

    Attributes:
        node: where the recipe has it.
        source: the model, as it is named there.
        positive, negative: prompts.
        residual_scale: what its MLPs' outputs are multiplied by.
        noise_scale: standard deviation of what is added to its MLPs.
    """

    node: Node
    source: str = ""
    positive: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)
    residual_scale: float = 1.0
    noise_scale: float = 0.0


@dataclass(frozen=True)
class MoeRecipe:
    """What is to be made, of models whose headers are read. There is at most one shared expert.

    Attributes:
        models: by the names that the recipe has for them: the base, experts, and what adapters stand on.
        dtype: of the result, as safetensors calls it.
        text: of the recipe.
    """

    base: str
    experts: list[Expert]
    shared: Expert | None
    gate_mode: str
    dtype: str
    per_token: int
    layout: Layout
    models: Mapping[str, Checkpoint]
    text: str

    @property
    def all(self) -> list[Expert]:
        """The experts, the shared one last."""
        return [*self.experts, *([self.shared] if self.shared else [])]


@dataclass(frozen=True)
class Size:
    """Of a mixture: parameters, all and those that work for a token; tensors; bytes to read and to write."""

    parameters: int
    active: int
    tensors: int
    read: int
    written: int


def read_moe(path: str | Path, *, text: str | None = None, models: Mapping[str, Checkpoint] | None = None) -> MoeRecipe:
    """Read a recipe, and the headers of its models.

    Args:
        path: of the recipe.
        text: its content, where it is not to be read.
        models: those that are open already, by the names that the recipe has for them.

    Raises:
        InputError: a line for everything that is wrong.
    """
    root, *more = read(path) if text is None else parse(text, str(path))
    if more:
        more[0].wrong("a recipe of a mixture of experts is one document.")
    fields = root.fields(KEYS, required=("base_model", "experts"))
    experts = [_expert(node) for node in fields["experts"].items(least=1)] if "experts" in fields else []
    shared = [_expert(node) for node in fields["shared_experts"].items()] if "shared_experts" in fields else []
    for one in shared[1:]:
        one.node.wrong("there can be one shared expert.")
    mode = fields["gate_mode"].choice(MODES) if "gate_mode" in fields else "hidden"
    per_token = fields["experts_per_token"].whole(Range(1)) if "experts_per_token" in fields else 2
    if experts and per_token > len(experts):
        node = fields.get("experts_per_token", fields["experts"])
        node.wrong(f"experts_per_token is {per_token}, but there {_count(len(experts), 'expert')}.")
    if mode not in RANDOM:
        _check_prompts(fields["experts"] if experts else root, experts, mode)
    models = _models(fields.get("base_model"), [*experts, *shared], Path(path).parent, models or {})
    base = models.get(fields["base_model"].text()) if "base_model" in fields else None
    layout = None
    if base is not None:
        layout = _layout(fields, base, shared, mode, len(experts))
        for one in (*experts, *shared):
            if models.get(one.source, base) is not base:
                _check_same(one, models[one.source], base)
    dtype = _dtype(fields.get("dtype"), base)
    root.problems.stop()
    assert layout is not None  # or there was a problem
    if len({one.source for one in experts}) == 1 < len(experts) and not any(one.noise_scale for one in experts):
        log.warning("All experts are the same model: what is made predicts what it does, until it is trained.")
    name = fields["base_model"].text()
    return MoeRecipe(
        name, experts, shared[0] if shared else None, mode, dtype, per_token, layout, models, root.problems.text
    )


def build_moe(recipe: MoeRecipe, seed: int = 0) -> Checkpoint:
    """The mixture, lazily, but for its routers: for those that are made from prompts the base model runs now.

    Args:
        recipe: what to make.
        seed: of random routers and of noise.
    """
    from fusionbench.routers import alike, gates_of_prompts, given_routers, random_routers, uniform_routers

    if recipe.gate_mode == "random":
        routers = random_routers(seed, 1.0)
    elif recipe.gate_mode == "uniform_random":
        routers = uniform_routers(seed)
    else:
        gated = [one for one in recipe.all if one.positive]
        mode = "hidden" if recipe.gate_mode == "hidden_last" else recipe.gate_mode
        gates: Tensor = gates_of_prompts(
            recipe.models[recipe.base],
            [one.positive for one in gated],
            [one.negative for one in gated],
            mode,  # type: ignore[arg-type]  (one of three, here)
        )
        if layers := alike(gates):
            which = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} of {len(gates)} layers"
            log.warning(
                f"The prompts of some experts are so alike that the routers of {which} will hardly choose one of them."
            )
        routers = given_routers(gates)
    return _mixture(recipe, routers, seed).made_by("moe", {"text": recipe.text, "seed": seed})


def remade(hyperparameters: Mapping[str, Any], models: Mapping[str, Checkpoint]) -> Checkpoint:
    """The mixture again, of what its own recipe says and of its models."""
    text, seed = hyperparameters.get("text"), hyperparameters.get("seed")
    if not isinstance(text, str) or not isinstance(seed, int):
        raise InputError("The recipe of a mixture of experts has no text and seed.")
    return build_moe(read_moe("recipe.json", text=text, models=models), seed)


def size_of(recipe: MoeRecipe) -> Size:
    """How large the mixture will be. Nothing is read."""
    from fusionbench.sparse import MLP

    mixture = _mixture(recipe, lambda _, empty: empty.zero_(), 0)
    specs = mixture.specs
    routed = sum(spec.numel for name, spec in specs.items() if ".experts." in name)
    parameters = sum(spec.numel for spec in specs.values())
    idle = routed // len(recipe.experts) * (len(recipe.experts) - recipe.per_token)
    models = [(one.source, True) for one in recipe.all] + [(recipe.base, False)]
    read = sum(
        spec.nbytes
        for source, mlps in models
        for name, spec in recipe.models[source].specs.items()
        if bool(MLP.fullmatch(name)) == mlps
    )
    return Size(parameters, parameters - idle, len(specs), read, sum(spec.nbytes for spec in specs.values()))


def _mixture(recipe: MoeRecipe, routers: Routers, seed: int) -> Checkpoint:
    from fusionbench.sparse import as_expert, converted, mixture

    def made(one: Expert, key: str) -> Checkpoint:
        scales = {"residual_scale": one.residual_scale, "noise_scale": one.noise_scale}
        return as_expert(recipe.models[one.source], recipe.dtype, **scales, key=f"{seed}/{key}")

    base = recipe.models[recipe.base]
    return mixture(
        converted(base, recipe.dtype),
        [made(one, f"expert {i}") for i, one in enumerate(recipe.experts)],
        routers,
        per_token=recipe.per_token,
        inputs=recipe.models,
        shared=made(recipe.shared, "shared") if recipe.shared else None,
        layout=recipe.layout,
    )


def _expert(node: Node) -> Expert:
    fields = Node("an expert", node.yaml, node.problems).fields(EXPERT_KEYS, required=("source_model",))

    def prompts(name: str) -> list[str]:
        return [text.text() for text in fields[name].items()] if name in fields else []

    residual, noise = fields.get("residual_scale"), fields.get("noise_scale")
    return Expert(
        node,
        fields["source_model"].text() if "source_model" in fields else "",
        prompts("positive_prompts"),
        prompts("negative_prompts"),
        1.0 if residual is None else residual.number(),
        0.0 if noise is None else noise.number(Range(0)),
    )


def _check_prompts(node: Node, experts: list[Expert], mode: str) -> None:
    """Note where a router cannot be made from prompts."""
    for one in experts:
        if not one.positive and "positive_prompts" not in one.node.entries():
            one.node.wrong(
                f"this expert has no positive_prompts, from which its gate is made: give some, or gate_mode: random "
                f"instead of {mode}."
            )
    prompts = [(one.positive, one.negative) for one in experts]
    if len(prompts) > 1 and prompts[0][0] and all(given == prompts[0] for given in prompts):
        node.wrong("all experts have the same prompts, so that nothing tells them apart: give each its own.")


def _models(
    base: Node | None, experts: list[Expert], folder: Path, given: Mapping[str, Checkpoint]
) -> dict[str, Checkpoint]:
    """The models that can be opened, by name; what cannot is noted."""
    models: dict[str, Checkpoint] = {}
    named = [] if base is None else [(base, base.text())]
    for node, name in (*named, *((one.node, one.source) for one in experts)):
        try:
            _open(name, folder, given, models)
        except InputError as error:
            node.wrong(str(error))
    return models


def _open(name: str, folder: Path, given: Mapping[str, Checkpoint], models: dict[str, Checkpoint]) -> None:
    """Open a model by a path, from the recipe's folder or from here, `zoo:` or `hf:`; `+` and an adapter may follow."""
    if not name or name in models:
        return
    place, plus, adapter = name.partition("+")
    if name in given:
        models[name] = given[name]
    elif plus and not Path(name).exists():
        _open(place, folder, given, models)
        models[name] = opened(adapter, folder, models[place])
    else:
        models[name] = opened(name, folder, None)
    check_numbers(name, models[name])


def _layout(fields: dict[str, Node], base: Checkpoint, shared: list[Expert], mode: str, experts: int) -> Layout | None:
    """The layout of the result; None where something is wrong, which is noted."""
    from fusionbench.sparse import check_dense, dense_config, fitting_layout

    node = fields.get("architecture", fields["base_model"])
    wanted = fields["architecture"].text().lower() if "architecture" in fields else ""
    wanted = wanted.removesuffix("moe").rstrip(" _-").replace("qwen2", "qwen")
    try:
        gated = bool(shared and shared[0].positive)
        layout = fitting_layout(str(base.config.get("model_type")), shared=bool(shared), gated=gated, name=wanted)
        check_dense(base, layout, dense_config(base))
    except InputError as error:
        node.wrong(str(error))
        return None
    if 0 < experts < layout.least:
        node.wrong(f"'{layout.name}' needs at least {layout.least} experts, and there {_count(experts, 'expert')}.")
    if shared and not gated and layout.shared == "gated" and mode not in RANDOM:
        shared[0].node.wrong(
            f"this shared expert has no positive_prompts, from which its gate in '{layout.name}' is made: give some."
        )
    if shared and not shared[0].positive and shared[0].negative:
        shared[0].node.wrong("the shared expert has negative_prompts, but no positive_prompts.")
    return layout


def _check_same(expert: Expert, model: Checkpoint, base: Checkpoint) -> None:
    """Note where a model's MLPs cannot stand in for the base's."""
    from fusionbench.sparse import MLP

    kinds = [str(one.config.get("model_type")) for one in (model, base)]
    if kinds[0] != kinds[1]:
        expert.node.wrong(f"'{expert.source}' is of the type '{kinds[0]}', but '{kinds[1]}' is the base model's.")
        return
    for name, spec in base.specs.items():
        if MLP.fullmatch(name):
            found = model.specs[model.resolve(name)].shape if name in model else None
            if found != spec.shape:
                has = "not there" if found is None else f"{found}"
                expert.node.wrong(f"'{expert.source}': '{name}' is {has}, but {spec.shape} in the base model.")
                return
    more = next((name for name in model.specs if MLP.fullmatch(name) and name not in base), None)
    if more:
        expert.node.wrong(f"'{expert.source}' has '{more}', which the base model lacks.")


def _dtype(node: Node | None, base: Checkpoint | None) -> str:
    """What the recipe says or, where it says nothing, what the base model is stored in."""
    if node is not None:
        word = node.text().removeprefix("torch.")
        return DTYPES[word] if word in DTYPES else DTYPES[node.choice(DTYPES)]
    stored = [] if base is None else [spec.dtype for spec in base.specs.values() if spec.floating]
    return stored[0] if stored and stored[0] in DTYPES.values() else "F32"


def _count(number: int, what: str) -> str:
    return f"is 1 {what}" if number == 1 else f"are {number} {what}s"
