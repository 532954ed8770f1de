"""Models of one architecture, and the parameters they share."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

import numpy as np

from fusionbench.alike import check_pool
from fusionbench.architectures import get_architecture
from fusionbench.checkpoint import Checkpoint
from fusionbench.direct import free_memory
from fusionbench.dtypes import as_float64
from fusionbench.errors import InputError, UnknownName, did_you_mean
from fusionbench.formats import DTYPES, Spec
from fusionbench.merged import Fused, Merged
from fusionbench.parallel import check_workers, in_order
from fusionbench.param import Param, summed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fusionbench.fuse import Pass

    Model = Checkpoint | Mapping[str, Tensor] | nn.Module | str | Path

T = TypeVar("T")
IDLE = ("_name_or_path", "transformers_version")  # of a config: what a model computes does not depend on it
log = logging.getLogger(__name__)
NonFinite = Literal["error", "warn", "ignore"]


class Architecture(Protocol):
    """How the tensors of a pool become a module that runs. A module of `fusionbench.architectures` is one."""

    def backbone(self, checkpoint: Checkpoint) -> Checkpoint:
        """The part of a checkpoint that is merged, under the names that all models of the pool use."""
        ...

    def build(self, checkpoint: Checkpoint) -> nn.Module:
        """A module in float32 and evaluation mode with the tensors of a backbone."""
        ...


class ModelPool(Mapping[str, Checkpoint]):
    """Fine-tuned models of one architecture, by name and in order, and the base model they come from.

    Args:
        models: checkpoints, state dicts, modules, or paths (see `Checkpoint.open`).
        base: the pre-trained model; may be missing for methods that do not use it.
        architecture: how to make modules of the tensors, or its name; not needed when modules are given.
        nan: what to do about NaN or Inf in an input: stop with an error, warn and go on, or do not look.
        vocabulary: how language models are made to fit that have rows for other tokens, or for more: "truncate", "pad"
            or "union" (see `fusionbench.recipes.vocabulary.resized`); otherwise they are refused.
        device: where `build` puts modules: what methods learn, or measure, by running models happens there.
        workers: threads that read and compute; one per core by default.
        memory: bound on what methods that look at data hold, task vectors or Gram matrices, as "2GB" or bytes; by
            default half of what is free.
        dtype: what merges of floating-point tensors are rounded to, under safetensors' name; by default the dtype of
            the base, or of the first model.

    Raises:
        InputError: where the models do not have the same tensors in the same shapes, or compute other things of them;
            where one cannot be opened, or has NaN or Inf; for no model, one called "base", and options not as above.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        base: Model | None = None,
        *,
        architecture: Architecture | str | None = None,
        nan: NonFinite = "error",
        workers: int | None = None,
        device: str | torch.device = "cpu",
        vocabulary: str | None = None,
        memory: str | int | None = None,
        dtype: str | None = None,
    ) -> None:
        if not isinstance(models, Mapping):
            raise InputError(f"A model pool takes a table of models by name; got a {type(models).__name__}.")
        if not models:
            raise InputError("A model pool needs at least one model; none was given.")
        if nan not in get_args(NonFinite):
            raise InputError(f"nan must be one of {', '.join(get_args(NonFinite))}; got {nan!r}.")
        if dtype is not None and not (dtype in DTYPES and Spec(dtype, ()).floating):
            floating = [name for name in DTYPES if Spec(name, ()).floating]
            raise InputError(f"dtype must be one of {', '.join(floating)}; got {dtype!r}.")
        if base is not None and "base" in models:
            raise InputError("A model beside the base cannot be called 'base' itself: give it another name.")
        given = [model for model in (base, *models.values()) if model is not None]
        named = get_architecture(architecture) if isinstance(architecture, str) else architecture
        module = next((model for model in given if not isinstance(model, str | Path | Mapping)), None)
        if named is None and module is not None:
            from fusionbench.architectures._template import Template

            named = Template(module)
        self.architecture: Architecture | None = named
        self.nan: NonFinite = nan
        check_workers(workers)
        self.workers = workers
        self.device = device
        self.memory = memory
        self.dtype = dtype
        self.base = None if base is None else self._backbone(_open(base))
        opened = {name: self._backbone(_open(model, self.base)) for name, model in models.items()}
        if vocabulary is not None:
            opened = self._resized(opened, vocabulary)
        first = next(iter(opened))
        self.reference = opened[first] if self.base is None else self.base
        label = f"model '{first}'" if self.base is None else "the base model"
        self._models = {name: _under_names(model, name, self.reference, label) for name, model in opened.items()}
        self._warned: set[tuple[str, str]] = set()
        if any(isinstance(model, str | Path) for model in given):  # what was opened here, nobody has looked at
            check_pool(self, tokens=vocabulary is None)

    def __getitem__(self, name: str) -> Checkpoint:
        if name not in self._models:
            raise UnknownName(f"The pool has no model '{name}'. {did_you_mean(name, self._models)}")
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def __repr__(self) -> str:
        base = " and their base" if self.base is not None else ""
        return f"<ModelPool of {', '.join(self)}{base}>"

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """The base, under that name, where there is one, and all models: what results are made from."""
        return {**({} if self.base is None else {"base": self.base}), **self._models}

    def require_base(self) -> Checkpoint:
        """The base model, which a method needs.

        Raises:
            InputError: where the pool has none.
        """
        if self.base is None:
            raise InputError("This method needs the base model, and the pool has none: give it as 'base'.")
        return self.base

    def spec(self, name: str) -> Spec:
        """Dtype and shape of what a merge makes of this parameter."""
        spec = self.reference.specs[name]
        return spec if self.dtype is None or not spec.floating else Spec(self.dtype, spec.shape)

    def param(self, name: str) -> Param:
        """The whole parameter called `name`."""
        spec = self.reference.specs[name]
        return Param(self, name, 0, spec.numel, spec.shape)

    def map(self, merge: Callable[[Param], Tensor], *, elementwise: bool = False) -> Checkpoint:
        """The checkpoint whose every floating-point tensor is `merge(param)`, computed when it is asked for.

        The result is rounded once, to the pool's `dtype`. Integer and boolean tensors are the base's, or the first
        model's. With `elementwise=True` — every element of the result depends on the same element of the inputs only —
        `merge` is given flat blocks, so that memory does not grow with the size of a tensor.

        Args:
            merge: of a parameter, `param.models` `(models, *shape)` and `param.base` `(*shape)`, makes the tensor
                `(*shape)`, in float32 or float64.
            elementwise: the parameter is a block: `(models, elements)` and `(elements,)`.

        Raises:
            InputError: when a tensor is read, where `merge` gives another shape, NaN or Inf.
        """
        return self._made(Merged(self, merge, elementwise))

    def fuse(self, how: Pass | Callable[[Param], Pass]) -> Checkpoint:
        """The checkpoint whose every floating-point tensor is made by a pass of `fusionbench.fuse`, without torch.

        The pass is the same for all parameters, or chosen for each by a function that may look at it. Otherwise as
        `map`, but computed in float64.
        """
        if not callable(how) and how.base:
            self.require_base()
        return self._made(Fused(self, how))

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self)

    @property
    def numel(self) -> int:
        """How many elements what is merged has in one model."""
        return sum(self.reference.specs[name].numel for name in self.floating)

    @property
    def floating(self) -> list[str]:
        """The names of what is merged: tensors of floating-point numbers."""
        return [name for name, spec in self.reference.specs.items() if spec.floating]

    def reduce(self, function: Callable[[Param], T], names: list[str] | None = None) -> T:
        """Sum `function(block)` over all blocks of all floating-point parameters (or those named), tied ones once.

        Blocks are the same for any number of workers, and are summed in order.

        Raises:
            InputError: where there is no element to look at.
        """
        names = self.floating if names is None else names
        if not any(self.reference.specs[name].numel for name in names):
            raise InputError("The models have no floating-point parameters: there is nothing to merge.")
        parts = (part for name in names for part in self.param(name).parts(0, self.reference.specs[name].numel))
        return summed(in_order(function, parts, self.workers))

    def sample(self, runs: int, length: int) -> Iterator[Param]:
        """Evenly spaced runs of so many elements of all floating-point parameters, or fewer at the end of one."""
        names = [name for name in self.floating if self.reference.specs[name].numel]
        ends = list(accumulate(self.reference.specs[name].numel for name in names))
        for place in (i * ends[-1] // runs for i in range(runs)):
            which = bisect_right(ends, place)
            size = self.reference.specs[names[which]].numel
            first = max(min(place - ends[which] + size, size - length), 0)
            yield from self.param(names[which]).parts(first, min(first + length, size))

    def within(self, prefix: str) -> ModelPool:
        """The pool of one submodule: the tensors whose names start with `prefix`, without it.

        Raises:
            InputError: where no name does.
        """
        names = {name.removeprefix(prefix): name for name in self.reference if name.startswith(prefix)}
        if not names:
            raise InputError(f"No tensor's name starts with '{prefix}'.")
        return self._derived(lambda model: model.rename(names))

    def of(self, models: Mapping[str, Checkpoint], base: Checkpoint | None) -> ModelPool:
        """A pool of other models under the names that this one's tensors have, treated in the same way."""
        pool = ModelPool(
            models, base, nan=self.nan, workers=self.workers, device=self.device, memory=self.memory, dtype=self.dtype
        )
        pool.architecture = self.architecture  # not passed in: these tensors have their backbone's names already
        return pool

    def aligned(self, how: str = "weight_matching", *, seed: int = 0) -> ModelPool:
        """The same pool with the units of every model in the order of the base's (or of the first model's).

        For models of one architecture that were trained from different initialisations: each computes what it did, by
        weights that are as near to the reference's as permutations bring them. See `fusionbench.alignment`.

        Args:
            how: `weight_matching` (Ainsworth et al., 2023).
            seed: of the order in which assignments are solved.

        Raises:
            InputError: for an unknown `how`, a model whose symmetries are not known, or where scipy is missing.
        """
        from fusionbench.alignment import aligned

        return self.of(aligned(self, how, seed=seed), self.base)

    def load(self) -> ModelPool:
        """The same pool with all tensors kept in memory, for methods that read them many times."""

        def kept(model: Checkpoint) -> Checkpoint:
            more: dict[str, Any] = {"config": model.new_config, "files": model.files}
            return Checkpoint.of(dict(model), folder=model.folder, location=model.location, **more)

        return self._derived(kept)

    def room(self) -> int:
        """Bytes that a method which looks at data may hold: `memory`, or half of what is free where models run."""
        from fusionbench.writer import parse_bytes

        if self.memory is not None:
            return parse_bytes(self.memory)
        if str(self.device).startswith("cuda"):
            import torch

            return torch.cuda.mem_get_info(self.device)[0] // 2
        return (free_memory() or 8 * 10**9) // 2  # of a system that does not tell, 8 GB

    def build(self, model: str | Checkpoint) -> nn.Module:
        """A module that runs, in float32 and evaluation mode, of a model's name or of a checkpoint.

        Raises:
            InputError: where the pool has no architecture, or this cannot build a module of the tensors.
        """
        if self.architecture is None:
            raise InputError("This pool knows tensors only: give it an architecture (or modules) to build a model.")
        checkpoint = self[model] if isinstance(model, str) else model
        if not checkpoint.config:  # a file of weights alone is built as the base is (see `identity`)
            checkpoint = checkpoint.beside(self.reference.folder)
        return self.architecture.build(checkpoint).float().eval().to(self.device)

    def identity(self, name: str) -> dict[str, Any]:
        """What tells a model (or "base") from others, wherever it lies: its tensors, and what is built of them."""
        model = self.inputs[name]
        config = {key: value for key, value in (model.config or self.reference.config).items() if key not in IDLE}
        kind = getattr(self.architecture, "__name__", type(self.architecture).__qualname__)
        describe = getattr(self.architecture, "describe", lambda: kind)
        how = json.dumps([describe(), config], sort_keys=True, default=str)
        return {**model.identity(), "built": hashlib.sha256(how.encode()).hexdigest()}

    def names_in(self, module: nn.Module) -> dict[str, str]:
        """The pool's names of the tensors of a module that it built: `{name in the module: name in the pool}`.

        They are the same but for a prefix: what loads a tower alone may leave out the name it has in a whole model. Of
        names that are tied in the module, one in the pool is enough.
        """
        tensors = module.state_dict()
        tied: dict[tuple[int, int], list[str]] = {}
        for name, tensor in tensors.items():
            tied.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
        first = next(iter(tensors))
        for prefix in [name.removesuffix(first) for name in self.reference if name.endswith(first)]:
            found = {
                name: next(
                    (prefix + n for n in (name, *tied[t.data_ptr(), t.numel()]) if prefix + n in self.reference), ""
                )
                for name, t in tensors.items()
            }
            if all(found.values()):
                return {name: self.reference.resolve(stored) for name, stored in found.items()}
        raise InputError(f"The module has a '{first}', which the pool's models lack: it was not built of them.")

    def check_finite(self, *, base: bool = False) -> None:
        """React to NaN or Inf in the models, and in the base, as the pool was told to, before they are run."""
        looked_at = self.inputs if base else self
        for model, checkpoint in looked_at.items() if self.nan != "ignore" else ():
            for name, spec in checkpoint.specs.items():
                blocks = checkpoint.blocks(name) if spec.floating else ()
                if not all(np.isfinite(as_float64(checkpoint.block(name, *block))).all() for block in blocks):
                    self.found_nonfinite("the base model" if checkpoint is self.base else f"model '{model}'", name)

    def found_nonfinite(self, label: str, name: str) -> None:
        """React to NaN or Inf in an input as the pool was told to."""
        message = f"{label[0].upper()}{label[1:]}: '{name}' contains NaN or Inf."
        if self.nan == "error":
            raise InputError(f'{message} To merge it all the same: --nan warn (in Python nan="warn").')
        if (label, name) not in self._warned:
            self._warned.add((label, name))
            log.warning(message)

    def _backbone(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.architecture.backbone(checkpoint) if self.architecture else checkpoint

    def _resized(self, models: dict[str, Checkpoint], how: str) -> dict[str, Checkpoint]:
        from fusionbench.recipes.vocabulary import resized

        base = {} if self.base is None else {"base": self.base}
        found, _ = resized({**base, **models}, how, next(iter(base), None))
        self.base = found.pop("base", None)
        return found

    def _made(self, source: Merged | Fused) -> Checkpoint:
        like = self.reference
        specs = {name: self.spec(name) for name in like.specs}
        more: dict[str, Any] = {"config": like.new_config, "files": like.files}
        return Checkpoint(specs, source, aliases=like.aliases, folder=like.folder, inputs=self.inputs, **more)

    def _derived(self, change: Callable[[Checkpoint], Checkpoint]) -> ModelPool:
        base = None if self.base is None else change(self.base)
        return self.of({name: change(model) for name, model in self.items()}, base)


def pool_of(models: Mapping[str, Checkpoint], base: Checkpoint | None, **options: Any) -> ModelPool:
    """The pool of checkpoints as they are or, where they differ, of what their family is known to share.

    That is a tower of which some are whole models, or models with heads of their own.
    """
    try:
        return ModelPool(models, base, **options)
    except InputError as error:
        from fusionbench.architectures import architecture_of

        try:
            architecture = architecture_of(base or next(iter(models.values())))
        except InputError:
            raise error from None
        return ModelPool(models, base, architecture=architecture, **options)


def _open(model: Model, base: Checkpoint | None = None) -> Checkpoint:
    """A checkpoint of what was given; a LoRA adapter stands on `base`."""
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, str | Path):
        return Checkpoint.open(model, base=base)
    if not isinstance(model, Mapping) and not hasattr(model, "state_dict"):
        raise InputError(f"A model is a path, a Checkpoint, a module or its state dict; got a {type(model).__name__}.")
    return Checkpoint.of(model if isinstance(model, Mapping) else model.state_dict())


def _under_names(model: Checkpoint, name: str, reference: Checkpoint, label: str) -> Checkpoint:
    """`model` under the reference's names; an error where it has other tensors, or other shapes."""
    if model is reference:
        return model
    names: dict[str, str] = {}
    missing: list[str] = []
    tied = {
        stored: [alias for alias, other in reference.aliases.items() if other == stored] for stored in reference.specs
    }
    for stored, spec in reference.specs.items():
        found = next((n for n in (stored, *tied[stored]) if n in model), None)
        if found is None:
            missing.append(stored)
            continue
        names[stored] = found
        other = model.specs[model.resolve(found)]
        if other.shape != spec.shape:
            from fusionbench.recipes.rows import token_tensors

            both = (
                other.shape[1:] == spec.shape[1:]
                and stored in token_tensors(reference)
                and model.resolve(found) in token_tensors(model)
            )
            hint = " Say what to do with the tokens: vocabulary=truncate, pad or union." if both else ""
            raise InputError(f"Model '{name}': '{stored}' is {other.shape}, but {spec.shape} in {label}.{hint}")
        if other.floating != spec.floating:
            raise InputError(f"Model '{name}': '{stored}' has the dtype {other.dtype}, but {spec.dtype} in {label}.")
    used = {model.resolve(found) for found in names.values()}
    extra = [stored for stored in model.specs if stored not in used]
    for which, has_not in ((missing, f"lacks '{missing[0]}'" if missing else ""), (extra, "")):
        if which:
            more = f" and {len(which) - 1} other tensors" if len(which) > 1 else ""
            what = has_not or f"has '{extra[0]}'"
            other_side = f"which {label} has" if has_not else f"which {label} lacks"
            raise InputError(f"Model '{name}' {what}{more}, {other_side}: they are not of one architecture.")
    if model.aliases == reference.aliases and list(model.specs) == list(names) == list(names.values()):
        return model
    return model.rename({**names, **{alias: names[stored] for alias, stored in reference.aliases.items()}})
