"""A LoRA adapter from the difference of two models: for each weight the nearest matrix of a low rank."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.dtypes import to_torch
from fusionbench.errors import InputError, is_count
from fusionbench.lora.adapter import PREFIX
from fusionbench.lora.factors import Difference, Factors, factorise
from fusionbench.lora.files import config_of, write_adapter
from fusionbench.lora.layout import Kind, Layout, layout
from fusionbench.parallel import check_workers, cores, in_order
from fusionbench.progress import track
from fusionbench.writer import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("F32", "BF16", "F16", "F64")
MAX_RANK = 256


@dataclass(frozen=True)
class Extracted:
    """A LoRA adapter that makes of a base, as nearly as its ranks allow, a fine-tuned model.

    Attributes:
        config: the content of `adapter_config.json`.
        checkpoint: the tensors, under PEFT's names; those that are saved whole are read when they are asked for.
        modules: what became of each changed matrix: its shape as stored, and the norm of its change.
        whole: the modules that are saved whole.
        left: tensors that differ and are not in the adapter, each with the reason.
        error: of all changed matrices together: the norm of what was left out over that of the change.
        built: whether a class of transformers told what the modules are.
    """

    config: dict[str, Any]
    checkpoint: Checkpoint
    modules: dict[str, Factored]
    whole: list[str]
    left: dict[str, str]
    built: bool

    @property
    def error(self) -> float:
        total = sum(m.norm**2 for m in self.modules.values())
        return (sum((m.error * m.norm) ** 2 for m in self.modules.values()) / total) ** 0.5

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapter in PEFT's format, all of it or nothing."""
        return write_adapter(self.config, self.checkpoint, folder, overwrite=overwrite)

    def report(self) -> dict[str, Any]:
        """What is known of the adapter, as data."""
        modules = {name: dict(vars(module)) for name, module in self.modules.items()}
        return {"error": self.error, "modules": modules, "whole": self.whole, "not_captured": self.left}


@dataclass(frozen=True)
class Factored:
    """What became of a changed matrix.

    Attributes:
        shape: as it is stored.
        rank: of its part in the adapter.
        norm: the Frobenius norm of its change.
        error: the norm of what the adapter leaves out of it, over `norm`, as computed from what is written.
        least: what no adapter of this rank can be below.
    """

    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float
    least: float


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = MAX_RANK,
    modules: str | None = None,
    exclude: str | None = None,
    save_rest: bool = False,
    dtype: str = "F32",
    seed: int = 0,
    memory: str | int = "1GB",
    workers: int | None = None,
) -> Extracted:
    """Find the LoRA adapter by which a base becomes a fine-tuned model.

    Linear layers (GPT-2's Conv1D too), convolutions and embeddings whose weights differ get each the matrix of a rank
    that is nearest to the difference: see `fusionbench.lora.factors`. One after the other is read, and the results,
    which are small, are kept; the bytes do not depend on `workers` or `memory`.

    Args:
        base, tuned: the models; shapes must agree.
        rank: of every module, at least 1; more than a matrix can have is cut to that.
        energy: instead of a rank: the part of each change's squared Frobenius norm to keep, above 0, at most 1. Each
            module gets the smallest rank that does, at most `max_rank`.
        modules: a regular expression that a module's name must contain to be factorised.
        exclude: one that it must not contain.
        save_rest: keep what differs and is not factorised (norms, biases, tied embeddings, new heads) as it is in the
            fine-tuned model, as PEFT's `modules_to_save` and `bias`. Without it those are only listed, in `left`.
        dtype: of the factors: "F32", "BF16", "F16" or "F64".
        seed: of the random projections.
        memory: a bound on the differences that are held at once; what is larger is read again for every product.
        workers: threads; one per core by default.

    Raises:
        InputError: where shapes differ, numbers are not finite, or no matrix differs.
    """
    if (rank is None) == (energy is None):
        raise InputError("Give either a rank or an energy: --rank 32, or --energy 0.95.")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and not is_count(value):
            raise InputError(f"{name} must be a whole number of 1 or more; got {value!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is the part of the squared norm to keep, above 0 and at most 1; got {energy!r}.")
    if dtype not in DTYPES:
        raise InputError(f"An adapter cannot be stored as '{dtype}': choose one of {', '.join(DTYPES)}.")
    check_workers(workers)
    chosen, left_out = (_pattern(what, text) for what, text in (("modules", modules), ("exclude", exclude)))
    names = _common(base, tuned)
    plan = layout(base)
    at_once = workers or cores()
    budget = parse_bytes(memory) // at_once
    fused = any(kind == "conv1d" for kind in plan.kinds.values())

    def kind_of(name: str) -> Kind | None:
        """What a stored tensor is factorised as, if it is."""
        module = plan.names[name][0].removesuffix(".weight")
        kind = plan.kinds.get(module) if plan.names[name][0].endswith(".weight") else None
        if kind == "linear" and fused:  # the config has one fan_in_fan_out for all
            return None
        picked = (chosen is None or chosen.search(module)) and not (left_out and left_out.search(module))
        return kind if picked and len(plan.names[name]) == 1 else None

    if chosen is not None and not any(kind_of(name) for name in names):
        raise InputError(f"--modules '{modules}' matches no module that an adapter can change, as {_example(plan)}.")

    def work(name: str) -> tuple[str, Factors | None, float] | None:
        """Of a tensor that differs: its factors, if it is factorised, and the norm of its change."""
        kind, spec = kind_of(name), tuned.specs[names[name]]
        if kind is None or not spec.floating or not spec.numel:
            return (name, None, 0.0) if _differs(base, name, tuned, names[name]) else None
        held = 4 * spec.numel <= budget
        change = Difference(tuned, base, (names[name], name), held=held)
        if not change.norm:
            return None
        most = rank if rank is not None else max_rank
        factors = factorise(change, f"{seed}/{name}", rank=most, energy=energy, dtype=to_torch(dtype))
        return name, factors, change.norm

    factors: dict[str, tuple[str, Kind, Factors]] = {}
    found: dict[str, Factored] = {}
    rest: list[str] = []
    for done in track(in_order(work, names, workers), "extracting", len(names)):
        if done is None:
            continue
        name, low, norm = done
        kind = kind_of(name)
        if low is None or kind is None:
            rest.append(name)
            continue
        module = plan.names[name][0].removesuffix(".weight")
        factors[module] = name, kind, low
        found[module] = Factored(base.specs[name].shape, low.rank, norm, low.error, low.least)
    new = [name for name in tuned.specs if name not in names.values()]
    if not factors and not rest and not new:
        raise InputError(f"'{tuned.location}' is equal to '{base.location}': there is nothing to extract.")
    lacking = {name: "not in the fine-tuned model" for name in base.specs if name not in names}
    whole, biases, left = _rest(rest, new, names, plan, set(factors), save_rest)
    for module in [m for m in factors if any(f"{m}.".startswith(f"{owner}.") for owner in whole)]:
        del factors[module], found[module]
    if not factors:
        raise InputError(
            f"No matrix that may be factorised differs between '{base.location}' and '{tuned.location}': "
            f"an adapter needs one. What differs: {', '.join([*rest, *new][:3])}."
        )
    for stored in [*biases.values(), *(stored for names_ in whole.values() for stored in names_.values())]:
        _check_finite(tuned, stored)
    tensors: dict[str, Tensor] = {}
    for module, (name, kind, low) in factors.items():
        tensors |= _tensors(module, kind, low, base.specs[name].shape)
    memory_part = Checkpoint.of(tensors)
    parts = {name: (memory_part, name) for name in tensors}
    saved = {f"{PREFIX}{name}": stored for names_ in whole.values() for name, stored in names_.items()}
    saved |= {f"{PREFIX}{_module(name)}.base_layer.bias": stored for name, stored in biases.items()}
    parts |= {name: (tuned, stored) for name, stored in saved.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": _place(base.location),
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(kind == "conv1d" for _, kind, _ in factors.values()),
        "bias": "lora_only" if biases else "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": sorted(whole) or None,
        **config_of({module: low.rank for module, (_, _, low) in factors.items()}, plan.kinds),
    }
    checkpoint = Checkpoint.assemble(parts, like=memory_part, inputs={})
    return Extracted(config, checkpoint, found, sorted(whole), left | lacking, plan.built)


def _rest(
    rest: list[str],
    new: list[str],
    names: dict[str, str],
    plan: Layout,
    factorised: set[str],
    save: bool,
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """What becomes of tensors that differ and are not factorised.

    Returns:
        For each module that is saved whole, its tensors: their names in the model, and in the fine-tuned one's file.
        Biases of factorised modules, alike. Why others are not captured.
    """
    if not save:
        return {}, {}, dict.fromkeys([*rest, *new], "not saved without --save-rest")
    stored = {called: names[name] for name in names for called in plan.names[name]} | {name: name for name in new}
    biases: dict[str, str] = {}
    left: dict[str, str] = {}
    owners: set[str] = set()
    for name in [*rest, *new]:
        for called in plan.names.get(name, [name]):
            module = _module(called)
            if not module:
                left[name] = "a parameter of the model itself, for which PEFT's format has no place"
            elif called == f"{module}.bias" and module in factorised:
                biases[called] = stored[called]
            else:
                owners.add(module)
    # PEFT wraps every module whose name ends in one of these, and factorises nothing within them.
    modules = {_module(called) for called in stored} - {""}
    while more := {m for m in modules - owners if any(m.endswith(o) or f".{o}." in f".{m}." for o in owners)}:
        owners |= more
    inner = {o for o in owners if any(o.startswith(f"{other}.") for other in owners)}
    whole = {o: {n: s for n, s in stored.items() if n.startswith(f"{o}.")} for o in sorted(owners - inner)}
    biases = {name: s for name, s in biases.items() if not any(name.startswith(f"{o}.") for o in owners)}
    return whole, biases, left


def _tensors(module: str, kind: Kind, low: Factors, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A module's factors under PEFT's names, in PEFT's shapes."""
    name, left, right = f"{PREFIX}{module}", low.left.contiguous(), low.right.T.contiguous()
    if kind == "embedding":  # the weight, (vocabulary, width), is changed by (B A).T
        return {f"{name}.lora_embedding_A": left.T.contiguous(), f"{name}.lora_embedding_B": right.T.contiguous()}
    if kind == "conv1d":
        return {f"{name}.lora_A.weight": left.T.contiguous(), f"{name}.lora_B.weight": right.T.contiguous()}
    if kind == "convolution":
        ones = [1] * (len(shape) - 2)
        right, left = right.reshape(-1, *shape[1:]), left.reshape(*left.shape, *ones)
    return {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}


def _common(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """The names of the base's tensors that the fine-tuned model has, and its names of them."""
    names = {name: tuned.resolve(name) for name in base.specs if name in tuned}
    if not names:
        raise InputError(f"'{base.location}' and '{tuned.location}' have no tensor in common.")
    for name, other in names.items():
        a, b = base.specs[name], tuned.specs[other]
        if a.shape != b.shape:
            raise InputError(
                f"'{name}' is {a.shape} in '{base.location}', but {b.shape} in '{tuned.location}': an adapter changes "
                "no shapes. Are they of one architecture and vocabulary?"
            )
        if a.floating != b.floating:
            raise InputError(
                f"'{name}' is {a.dtype} in '{base.location}', but {b.dtype} in '{tuned.location}': de-quantise it."
            )
    return names


def _differs(base: Checkpoint, name: str, tuned: Checkpoint, other: str) -> bool:
    return any(
        not bool((base.read(name, start, stop).double() == tuned.read(other, start, stop).double()).all())
        for start, stop in base.blocks(name)
    )


def _check_finite(tuned: Checkpoint, name: str) -> None:
    if not all(bool(tuned.read(name, *block).isfinite().all()) for block in tuned.blocks(name)):
        raise InputError(f"'{name}' has NaN or Inf in '{tuned.location}': nothing is written.")


def _pattern(what: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise InputError(f"--{what} '{text}' is no regular expression: {error}.") from None


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _example(plan: Layout) -> str:
    return f"'{next(iter(plan.kinds), 'layers.0.linear')}'"


def _place(location: str) -> str | None:
    """Where the base is, from wherever the adapter will be opened."""
    return os.path.abspath(location) if location and os.path.exists(location) else location or None


__all__ = ["Extracted", "Factored", "extract"]
