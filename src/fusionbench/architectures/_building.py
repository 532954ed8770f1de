"""What all families share that build a module from a config and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")
MIXED = "mixed_"  # before the model type of a model with mixed layers


def part_of(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    model_class: str,
    *,
    config: Mapping[str, Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> Checkpoint:
    """The tensors of these names, `{new name: old name}`; where others are left out, with the config of what is left.

    Args:
        checkpoint: the whole model.
        names: of what is kept.
        model_class: of transformers, which holds just these tensors.
        config: of that class, where it is not the whole model's.
        ignored: endings of names that are no loss.
    """
    part = checkpoint.rename(names)
    kept = {checkpoint.resolve(old) for old in names.values()}
    whole = all(name in kept or name.endswith(ignored) for name in checkpoint.specs)
    described = {**(config or checkpoint.config), "architectures": [model_class]}
    if checkpoint.config and not whole and described != checkpoint.config:
        part.new_config = described
    return part


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of the `config.json` beside a checkpoint, which says how to build its module."""
    config = checkpoint.config
    if not config:
        raise InputError(f"'{checkpoint.location or 'The base model'}' has no config.json: it cannot be built.")
    return config


def new_model(model_class: Callable[..., M], config: Mapping[str, Any], **arguments: Any) -> M:
    """An untrained model of transformers, with mixed layers where the config has them."""
    config = dict(config)
    plan = config.pop("mixing", None)
    # In float32 before the tensors come: a config that names a half precision makes a module of it.
    model = model_class(model_class.config_class(**config), **arguments).float()  # type: ignore[attr-defined]
    if plan is None:
        return model
    from fusionbench.mixed import mix

    try:
        return mix(model, plan)  # type: ignore[return-value]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"The entry 'mixing' of a config.json makes no layers of this model: {error}.") from None


def filled(model: M, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> M:
    """The module with these tensors; an error where its config describes another model than the checkpoint holds."""
    check_fits(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        checkpoint,
    )
    model.load_state_dict(dict(tensors))
    return model


def check_fits(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> None:
    """An error where shapes by a checkpoint's config are not those of its tensors."""
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"'{checkpoint.location or checkpoint.folder}' does not fit its config.json, by which '{name}' is "
                f"{wanted.get(name, 'not there')}: the file has {found.get(name, 'none')}."
            )
