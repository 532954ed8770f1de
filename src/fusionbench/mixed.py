"""Models with mixed layers: made of a plan, which is plain data, and saved and loaded as any Hugging Face model.

Importing this module makes the classes known to transformers, so that `from_pretrained(folder)` loads what
`fusionbench run method=smile_upscaling ... out=folder` wrote: that of the auto class for such models, `AutoModel`, or
`AutoModelForCausalLM`, `AutoModelForSeq2SeqLM`. A plan is the entry `mixing` of the model's config.json.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusionbench.architectures import causal_lm
from fusionbench.architectures._building import MIXED
from fusionbench.calibrate import as_matrix
from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import to_torch
from fusionbench.errors import InputError
from fusionbench.mixing import SmileLinear, WeightEnsemble, attended, sizes
from fusionbench.recipes.tokenizer import table_of

if TYPE_CHECKING:
    from fusionbench.pool import ModelPool


def mix(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Put mixed layers, yet empty, into a model, as a plan says; transformers' models keep the plan in their config.

    Args:
        model: changed in place.
        plan: `kind`, and that kind's arguments.
    """
    mixed = _install(model, **plan)
    config: Any = getattr(mixed, "config", None)
    if hasattr(config, "to_dict"):
        mixed.__class__ = mixed_class(type(mixed))
        config.__class__ = mixed.config_class  # the object stays: it knows how attention is computed
        config.mixing = dict(plan)
    return mixed


def with_smile(model: nn.Module, *, layers: list[str], **numbers: Any) -> nn.Module:
    """Every linear layer named becomes a `SmileLinear`."""
    return _replaced(model, layers, lambda layer: SmileLinear(**sizes(layer), **numbers))


def with_we_moe(model: nn.Module, *, blocks: list[str], **arguments: Any) -> nn.Module:
    """Every block named becomes a `WeightEnsemble`, which is told what of the input only fills up."""
    mixed = _replaced(model, blocks, lambda block: WeightEnsemble(block, **arguments))
    for module in (mixed, *mixed.children()):  # an encoder may be called by itself
        signature = inspect.signature(module.forward)
        if module is mixed or "attention_mask" in signature.parameters:
            module.register_forward_pre_hook(partial(_tell_attended, signature), with_kwargs=True)
    # What is computed anew in a backward pass would be routed by the mask of the forward pass that ran last.
    mixed.supports_gradient_checkpointing = False  # type: ignore[assignment]
    return mixed


KINDS: dict[str, Callable[..., nn.Module]] = {"smile": with_smile, "we_moe": with_we_moe}


def fill(mixed: nn.Module, path: str, layer: nn.Module, pool: ModelPool, names: Mapping[str, str], old: str) -> None:
    """Give a mixed layer what the base and the models of a pool have in a linear layer.

    Args:
        mixed: the model, with the mixed layer at `path`.
        path: of the mixed layer.
        layer: the linear layer that was in its place.
        pool: the models.
        names: their names of the tensors that the model had, as `pool.names_in` gives them.
        old: path of the linear layer.
    """
    found = [names.get(f"{old}.{which}".lstrip(".")) for which in ("weight", "bias")]
    weight, bias = (None if name is None else pool.param(name) for name in found)
    assert weight is not None
    biases = (None, None) if bias is None else (bias.base, bias.models)
    mixed.get_submodule(path).fill(as_matrix(layer, weight.base), as_matrix(layer, weight.models), *biases)  # type: ignore[operator]


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model of transformers writes token by token, each after all before it, without an encoder."""
    config, writes = getattr(model, "config", None), getattr(model, "can_generate", None)
    return writes is not None and writes() and not getattr(config, "is_encoder_decoder", False)


def as_checkpoint(model: nn.Module, pool: ModelPool) -> Checkpoint:
    """The tensors of a model that was made from a pool, to be saved, and the config of one that was mixed.

    Raises:
        InputError: where it has other tensors than the pool's models, and no config that says how to build it again; or
            is of a class with mixed layers that is not registered.
    """
    config: Any = getattr(model, "config", None)
    beside: dict[str, Any] = {"folder": pool.reference.folder, "files": pool.reference.files, "inputs": pool.inputs}
    if not hasattr(config, "mixing"):
        try:
            names = pool.names_in(model)
        except InputError:
            names = {}
        if set(names.values()) != set(pool.reference.specs):
            raise InputError(
                "This model cannot be saved: it has other tensors than the pool's models, and is none of transformers' "
                "own, whose config could say how to build it again."
            )
        tensors = model.state_dict()
        found = {stored: tensors[name].to(to_torch(pool.spec(stored).dtype)) for name, stored in names.items()}
        return Checkpoint.of(found, config=pool.reference.new_config, **beside)
    if globals().get(type(model).__name__) is not type(model):
        known = type(model).__name__.removeprefix("Mixed")
        raise InputError(
            f"This model cannot be saved: transformers would not load it again, a {known} with mixed layers. Call "
            f"fusionbench.mixed.register(auto, {known}) before, with the auto class that loads a {known}."
        )
    content = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    return Checkpoint.of(model.state_dict(), config={**content, **_tokenizer(config, pool.reference)}, **beside)


def _tokenizer(config: Any, reference: Checkpoint) -> dict[str, str]:
    """The entry for the class of the tokenizer, where nothing but the type of a model without mixed layers tells it."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    name = TOKENIZER_MAPPING_NAMES.get(config.model_type.removeprefix(MIXED))
    told = getattr(config, "tokenizer_class", None) or table_of(reference, "tokenizer_config.json").get(
        "tokenizer_class"
    )
    # What reads any tokenizer.json is taken anyway; and Mistral's class only where a folder has Mistral's own files.
    return {} if told or name is None or name.endswith("Backend") else {"tokenizer_class": name}


def register(auto: Any, model_class: type[Any]) -> None:
    """Let an auto class of transformers load what is saved of a class of its models with mixed layers.

    Args:
        auto: the one that loads `model_class`, as `AutoModelForImageClassification`.
        model_class: without mixed layers.
    """
    from transformers import AutoConfig

    mixed = mixed_class(model_class)
    for made in (mixed, mixed.config_class):
        globals()[made.__name__] = made  # where pickle looks for them
    AutoConfig.register(mixed.config_class.model_type, mixed.config_class, exist_ok=True)
    auto.register(mixed.config_class, mixed, exist_ok=True)


@cache
def mixed_class(model_class: type[Any]) -> type[Any]:
    """The class of transformers for models of another of its classes with mixed layers."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        _install(self, **config.mixing)

    members = {"config_class": _mixed_config(model_class.config_class), "__init__": __init__, "__module__": __name__}
    return type(f"Mixed{model_class.__name__}", (model_class,), members)


@cache
def _mixed_config(config_class: type[Any]) -> type[Any]:
    members = {"model_type": MIXED + config_class.model_type, "__module__": __name__}
    return type(f"Mixed{config_class.__name__}", (config_class,), members)


def _install(model: nn.Module, kind: str, **arguments: Any) -> nn.Module:
    return KINDS[kind](model, **arguments)


def _replaced(model: nn.Module, paths: list[str], new: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for path in paths:
        old = model.get_submodule(path)  # without a path the model itself is the layer
        device = next(old.parameters()).device
        there = new(old).to(device)
        if not path:
            return there
        model.set_submodule(path, there)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # of which layers are given a batch without what fills it up
    return model


def _tell_attended(
    forward: inspect.Signature, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = forward.bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):  # of other dimensions, it is made of one before
        attended.set(mask)


def _register() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        return
    import transformers as t

    for auto, model_class in (
        (t.AutoModel, t.CLIPVisionModel),
        (t.AutoModel, t.GPT2Model),
        (t.AutoModel, t.BertModel),
        (t.AutoModelForImageClassification, t.ResNetForImageClassification),
        (t.AutoModelForSeq2SeqLM, t.T5ForConditionalGeneration),
        *((t.AutoModelForCausalLM, getattr(t, name)) for name in causal_lm.CLASSES.values()),
    ):
        register(auto, model_class)


_register()
