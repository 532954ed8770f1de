"""A LoRA adapter (Hu et al., 2022) in PEFT's format: on its base it is a checkpoint."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.card import CACHED
from fusionbench.checkpoint import EMBEDDINGS, HEAD, PICKLES, Checkpoint
from fusionbench.dtypes import compute_dtype, from_torch
from fusionbench.errors import InputError, did_you_mean
from fusionbench.formats import ADAPTER_CONFIG as CONFIG
from fusionbench.formats import Spec, is_adapter, read_table
from fusionbench.passes import Block, Bytes
from fusionbench.sources import Source, as_block

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    # As the reference implementation saves linearised adapters (Tang et al., 2024, arXiv 2310.04742).
    ".model.lora_A.default.weight": "A",
    ".model.lora_B.default.weight": "B",
}
INITIAL = re.compile(r"(.*)\.params0_values\.(\d+)")  # what a linearised adapter began with, A before B
FILES = ("adapter_model.safetensors", "adapter_model.bin", "linearized_adapter_model.safetensors")
# What changes the formula base + s * B A: refused, never ignored.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "target_parameters",
    "layer_replication",
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings that PEFT takes away from the base again


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: `scaling * B A`, or its transpose where the weight is stored as (in, out).

    Of a linearised adapter it is the tangent of that product where training began, at A0 and B0, and so exactly
    `scaling * (B0 A + (B - B0) A0)`.
    """

    a: str  # names in the adapter's file
    b: str
    scaling: float
    transposed: bool
    initial: tuple[str, str] | None = None  # of a linearised adapter, the names of A0 and B0


class Adapter:
    """A LoRA adapter: for some weights of a base model a low-rank change, for others perhaps a new value.

    Attributes:
        config: the content of `adapter_config.json`.
        checkpoint: the tensors of the file, under PEFT's names.
        changes: the low-rank change by module, as `transformer.h.0.attn.c_attn`.
        replaced: the adapter's name of each tensor it brings whole (`modules_to_save`, biases), by the base's name.
        beneath: the same of what a change is added to, which PEFT saves of embeddings.
    """

    def __init__(self, config: Mapping[str, Any], checkpoint: Checkpoint, location: str) -> None:
        self.config, self.checkpoint, self.location = dict(config), checkpoint, location
        if self.config.get("peft_type", "LORA") != "LORA":
            raise InputError(f"'{location}' is a {self.config['peft_type']} adapter: only LoRA can be read.")
        for key in UNSUPPORTED:
            if self.config.get(key):
                raise InputError(f"'{location}' is trained with {key}, which changes what B A means: not supported.")
        began_as = self.config.get("init_lora_weights")
        if isinstance(began_as, str) and began_as.startswith(CHANGES_BASE):
            raise InputError(
                f"'{location}' was begun with init_lora_weights={began_as}, which also changes the base: save it by "
                "PEFT with path_initial_model_for_weight_conversion."
            )
        for key in ("rank_pattern", "alpha_pattern"):
            if not _is_patterns(self.config.get(key)):
                raise InputError(f"'{location}': {CONFIG} has no table of numbers by regular expression for {key}.")
        self.changes: dict[str, LowRank] = {}
        self.replaced: dict[str, str] = {}
        self.beneath: dict[str, str] = {}
        found: dict[str, dict[str, str]] = {}
        began: dict[str, dict[int, str]] = {}
        for name in checkpoint:
            if not name.startswith(PREFIX):
                raise InputError(f"'{location}': '{name}' is no tensor of an adapter: it does not begin '{PREFIX}'.")
            ending = next((part for part in PARTS if name.endswith(part)), None)
            initial = INITIAL.fullmatch(name)
            if initial:
                began.setdefault(initial[1].removeprefix(PREFIX), {})[int(initial[2])] = name
            elif ending:
                module = name.removeprefix(PREFIX).removesuffix(ending)
                found.setdefault(module, {})[PARTS[ending]] = name
            elif ".lora_" in name:
                raise InputError(f"'{location}': '{name}' belongs to a form of LoRA that is not supported.")
            else:
                self.replaced[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = name
        for module, parts in found.items():
            if parts.keys() != {"A", "B"}:
                raise InputError(f"'{location}': '{module}' has one of lora_A and lora_B, but not the other.")
            transposed = bool(self.config.get("fan_in_fan_out")) or ".lora_embedding_" in parts["A"]
            initial = self._initial(module, parts, [name for _, name in sorted(began.get(module, {}).items())])
            self.changes[module] = LowRank(parts["A"], parts["B"], self._scaling(module, parts), transposed, initial)
            if self.replaced.get(f"{module}.weight", "").endswith(".base_layer.weight"):
                self.beneath[f"{module}.weight"] = self.replaced.pop(f"{module}.weight")
        if not self.changes and not self.replaced:
            raise InputError(f"'{location}' has no tensor of an adapter in its file.")

    @classmethod
    def open(cls, folder: Path, location: str = "") -> Adapter:
        """Read a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`)."""
        location = location or str(folder)
        if not is_adapter(folder):
            raise InputError(f"'{location}' is no LoRA adapter: it has no {CONFIG}.")
        config = read_table(folder / CONFIG)
        files = [folder / name for name in FILES]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise InputError(f"'{location}' has an {CONFIG}, but no adapter_model.safetensors.")
        return cls(config, Checkpoint.open(file), location)

    def matrices(self, module: str) -> tuple[Tensor, Tensor]:
        """`scaling * B`, (out, rank), and `A`, (rank, in), in float64; a convolution's kernel counts to its inputs."""
        change = self.changes[module]
        a, b = (self.checkpoint[name].double().flatten(1) for name in (change.a, change.b))
        if change.initial is not None:
            import torch

            a0, b0 = (self.checkpoint[name].double() for name in change.initial)
            # B is zero at first, as PEFT begins: then one product of the same rank is all.
            a, b = (torch.cat([a, a0]), torch.cat([b0, b - b0], 1)) if b0.any() else (a0, b)
        return change.scaling * b, a

    def tell_other_base(self, base: Checkpoint) -> None:
        """Warn where a base has another name than the one that the adapter was trained on."""
        named = self.config.get("base_model_name_or_path")
        own, given = (_name_of(str(place)) if place else "" for place in (named, base.location))
        if own and given and own != given:
            log.warning(
                "'%s' was trained on '%s', and is put on '%s': that must be the same model under another name.",
                *(self.location, named, base.location),
            )

    def on(self, base: Checkpoint) -> Checkpoint:
        """The model that the adapter makes of its base: `base + scaling * B A`, computed in float32 when it is read.

        Raises:
            InputError: where the adapter changes what the base has not, or has in another shape.
        """
        config = base.new_config
        if any(
            name.endswith(EMBEDDINGS) for name in (*self.replaced, *(f"{module}.weight" for module in self.changes))
        ):
            base = base.untied()  # what is trained is one of the two, or each of them
        names = {module: self._in_base(f"{module}.weight", base) for module in self.changes}
        specs, aliases = dict(base.specs), dict(base.aliases)
        for module, name in names.items():
            spec = base.specs[name]
            if not spec.floating:
                raise InputError(
                    f"'{self.location}' changes '{name}', but the base has it in {spec.dtype}: de-quantise it."
                )
            under = self.beneath.get(f"{module}.weight")
            spec = spec if under is None else self.checkpoint.specs[under]
            out, into = (self.checkpoint.specs[n].shape for n in (self.changes[module].b, self.changes[module].a))
            shape = (out[0], math.prod(into[1:]))
            expected = (spec.shape[0], math.prod(spec.shape[1:]))
            if (shape[::-1] if self.changes[module].transposed else shape) != expected:
                hint = " It looks transposed: see fan_in_fan_out." if shape[::-1] == expected else ""
                raise InputError(f"'{self.location}': '{module}' changes {shape}, but '{name}' is {spec.shape}.{hint}")
            # A change smaller than half a step of bfloat16 would be lost if the sum were rounded here.
            specs[name] = Spec(from_torch(compute_dtype(spec.dtype)), spec.shape)
        whole = {names[given.removesuffix(".weight")]: stored for given, stored in self.beneath.items()}
        for given, stored in self.replaced.items():
            # A new head may have no place in the base; anything else must.
            new = any(f".{part}." in f".{given}" for part in self.config.get("modules_to_save") or [])
            name = given if new and given not in base else self._in_base(given, base)
            aliases.pop(name, None)
            spec = self.checkpoint.specs[stored]
            if name in specs and specs[name].shape != spec.shape:
                raise InputError(f"'{self.location}': '{given}' is {spec.shape}, but {specs[name].shape} in its base.")
            specs[name], whole[name] = spec, stored
        source = Adapted(base, self, {name: module for module, name in names.items()}, whole)
        more: dict[str, Any] = {"aliases": aliases, "folder": base.folder, "location": self.location}
        found = Checkpoint(specs, source, config=config, **more).tied_by_config()
        both = base.new_config == config or HEAD in found.aliases  # they are equal all the same
        return found if both else Checkpoint(specs, source, config=base.new_config, **more)

    def _in_base(self, name: str, base: Checkpoint) -> str:
        """The base's name of a tensor: a backbone may be saved without the head's prefix, or the other way round."""
        if name in base:
            return base.resolve(name)
        found = [n for n in base.specs if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(found) != 1:
            raise InputError(f"'{self.location}' changes '{name}', which its base lacks. {did_you_mean(name, base)}")
        return found[0]

    def _initial(self, module: str, parts: Mapping[str, str], names: list[str]) -> tuple[str, str] | None:
        """The names of A0 and B0 of a linearised change; None of another."""
        if ".model.lora_A." not in parts["A"]:
            return None
        shapes = [self.checkpoint.specs[name].shape for name in (*names, parts["A"], parts["B"])]
        if len(names) != 2 or shapes[:2] != shapes[2:]:
            raise InputError(f"'{self.location}': the linearised '{module}' does not say where its A and B began.")
        return names[0], names[1]

    def _scaling(self, module: str, parts: Mapping[str, str]) -> float:
        shapes = [self.checkpoint.specs[name].shape for name in parts.values()]
        if any(len(shape) < 2 or 0 in shape for shape in shapes):
            raise InputError(
                f"'{self.location}': '{module}' has factors of {shapes[0]} and {shapes[1]}, not two matrices."
            )
        rank = self.checkpoint.specs[parts["A"]].shape[0]
        said = _by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", rank))
        if rank != said:
            raise InputError(f"'{self.location}': '{module}' has rank {rank}, but {CONFIG} says {said}.")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise InputError(f"'{self.location}': {CONFIG} has no number for lora_alpha, but {alpha!r}.")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


class Adapted(Source):
    """The tensors of a base model with an adapter on it."""

    def __init__(self, base: Checkpoint, adapter: Adapter, changed: dict[str, str], whole: dict[str, str]) -> None:
        self._base, self._adapter, self._changed, self._whole = base, adapter, changed, whole
        self._factors = lru_cache(maxsize=16)(self._read_factors)  # blocks of one weight are read one after the other

    def working_set(self, name: str) -> int:
        return 32

    def read(self, name: str, start: int, stop: int) -> Tensor:
        whole = self._whole.get(name)
        values = (
            self._base.read(name, start, stop) if whole is None else self._adapter.checkpoint.read(whole, start, stop)
        )
        if name not in self._changed:
            return values
        left, right = self._factors(name)
        columns = right.shape[1]
        first, last = start // columns, -(-stop // columns)
        change = (left[first:last] @ right).reshape(-1)[start - first * columns : stop - first * columns]
        # In float64 and rounded once, so that it makes no difference which part of a weight is asked for.
        return (values.double() + change).to(compute_dtype(from_torch(values.dtype)))

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        return as_block(self.read(name, start, stop))

    def unit(self, name: str, memory: int) -> int:
        if name in self._whole and name not in self._changed:
            return self._adapter.checkpoint.source.unit(self._whole[name], memory)
        return self._base.source.unit(self._base.resolve(name), memory)

    def known(self, name: str) -> None:
        return None

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        b, a = self._adapter.matrices(self._changed[name])
        return (a.T, b.T) if self._adapter.changes[self._changed[name]].transposed else (b, a)


def _name_of(place: str) -> str:
    """The last part of a model's place, or of its name on the hub, where it lies in the hub's cache."""
    cached = CACHED.search(f"{place}/")
    if cached:
        return cached[2]
    path = Path(place.removeprefix("hf:").removeprefix("zoo:"))
    path = path.parent if path.suffix in (".safetensors", *PICKLES) else path
    return path.resolve().name if path.name in ("", "..") else path.name


def _is_patterns(value: Any) -> bool:
    """Whether PEFT could read this as values by regular expressions; nothing is read as none."""
    try:
        return not value or isinstance(value, dict) and all(re.compile(pattern) for pattern in value)
    except re.error:
        return False


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends in, as PEFT chooses it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
