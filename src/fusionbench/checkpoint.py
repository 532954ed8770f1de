"""A checkpoint: a read-only mapping from names to tensors, each produced when it is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fusionbench import formats
from fusionbench.dtypes import as_float64, from_torch, to_torch
from fusionbench.errors import InputError, did_you_mean
from fusionbench.formats import SafetensorsFile, Spec, is_adapter
from fusionbench.locations import find
from fusionbench.parallel import in_order

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLOCK = 2**16  # elements read or computed at once: small enough for the cache, large enough to be worth a call


class Source(Protocol):
    """Where a checkpoint's tensors come from."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The elements `start` to `stop` of a tensor, flattened in C order."""
        ...

    def blockwise(self, name: str) -> bool:
        """Whether a part of this tensor can be had without computing all of it."""
        ...

    @property
    def working_set(self) -> int:
        """Bytes in flight per element while a block is read."""
        ...


class Checkpoint(Mapping[str, "Tensor"]):
    """Named tensors whose shapes and dtypes are known without reading them.

    As a mapping it has every name, tied ones too; `specs` has every tensor once. Indexing twice reads (or computes)
    twice: `Checkpoint.of(dict(checkpoint))` keeps what it has read.

    Attributes:
        specs: dtype and shape of every stored tensor, in file order.
        aliases: tied names: `{"lm_head.weight": "wte.weight"}` says that the first is the second.
        folder: the model folder whose `config.json` and tokenizer files belong to these tensors.
        location: where it was opened from, as it was given.
        config: the content of the `config.json` that describes these tensors; empty where there is none.
        recipe: how these tensors were made, as data; empty for what was read from a file.
        inputs: the checkpoints they were made from, the base model under "base", others by name.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        source: Source,
        *,
        aliases: Mapping[str, str] | None = None,
        folder: Path | None = None,
        location: str = "",
        recipe: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Checkpoint] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.specs = dict(specs)
        self.source = source
        self.aliases = dict(aliases or {})
        self.folder = folder
        self.location = location
        self.recipe = dict(recipe or {})
        self.inputs = dict(inputs or {})
        self.new_config = None if config is None else dict(config)  # where it is not that of the folder

    @property
    def config(self) -> dict[str, Any]:
        return formats.read_config(self.folder) if self.new_config is None else self.new_config

    @classmethod
    def open(cls, path: str | Path, *, base: Checkpoint | None = None) -> Checkpoint:
        """Open a `.safetensors`, `.bin` or `.pt` file, a model folder (sharded or not), `zoo:NAME` or `hf:OWNER/NAME`.

        Only headers are read. A pickle is read with weights only: one that wants to run code is refused. The folder of
        a LoRA adapter is the model it makes of `base`, or of the base its own config names: see `fusionbench.lora`.
        """
        location = find(path)
        if is_adapter(location):
            return _adapted(location, str(path), base)
        files = formats.weight_files(location)
        folder = location if location.is_dir() else location.parent
        if all(file.suffix == ".safetensors" for file in files):
            shards = [SafetensorsFile(file) for file in files]
            source = Files(shards)
            specs = {name: spec for shard in shards for name, spec in shard.specs.items()}
            if len(specs) != sum(len(shard.specs) for shard in shards):
                raise InputError(f"'{location}': a tensor stands in two shards.")
            # safetensors' own way of keeping tied names: alias -> name in the metadata
            aliases = {k: v for shard in shards for k, v in shard.metadata.items() if v in specs and k not in specs}
            checkpoint = cls(specs, source, aliases=aliases, folder=folder, location=str(path))
        else:
            tensors: dict[str, Tensor] = {}
            for file in files:
                tensors.update(_load_pickle(file))
            checkpoint = cls.of(tensors, folder=folder, location=str(path))
        return checkpoint._tied_by_config()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], **more: Any) -> Checkpoint:
        """A checkpoint of tensors in memory; more arguments are its attributes. Names that share storage are tied."""
        first: dict[tuple[Any, ...], str] = {}
        kept: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        for name, tensor in tensors.items():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in first:
                aliases[name] = first[place]
            else:
                first[place] = name
                kept[name] = tensor.detach()
        specs = {name: Spec(from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in kept.items()}
        return cls(specs, InMemory(kept), aliases=aliases, **more)

    @classmethod
    def assemble(
        cls,
        parts: Mapping[str, tuple[Checkpoint, str]],
        *,
        like: Checkpoint,
        inputs: Mapping[str, Checkpoint],
        config: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """A checkpoint of tensors of others, read when they are asked for: `{new name: (checkpoint, its name)}`.

        A tensor that is taken twice is then two, which are not tied. Files beside the weights, and what is tied, are
        those of `like`; `config` is given where it changes.
        """
        stored = {name: (part, part.resolve(old)) for name, (part, old) in parts.items()}
        aliases = {alias: to for alias, to in like.aliases.items() if to in stored and alias not in stored}
        specs = {name: part.specs[old] for name, (part, old) in stored.items()}
        config = like.new_config if config is None else config
        return cls(specs, Assembled(stored), aliases=aliases, folder=like.folder, inputs=inputs, config=config)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the elements `start` to `stop` of a tensor, flattened in C order, in the dtype it is stored in."""
        name = self.resolve(name)
        return self.source.read(name, start, self.specs[name].numel if stop is None else stop)

    def numbers(self, name: str, start: int, stop: int) -> np.ndarray:
        """Like `read`, as a numpy array in float64; from a safetensors file without torch."""
        name = self.resolve(name)
        if isinstance(self.source, Files):
            return as_float64(self.source.read_bytes(name, start, stop), self.specs[name].dtype)
        return self.read(name, start, stop).double().numpy()

    def resolve(self, name: str) -> str:
        """The name a tensor is stored under: the name itself, or what it is tied to."""
        name = self.aliases.get(name, name)
        if name not in self.specs:
            raise KeyError(f"No tensor is called '{name}'. {did_you_mean(name, self.specs)}")
        return name

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[tuple[int, int]]:
        """The parts of a tensor that can be read apart, as (start, stop); all of it when it cannot be divided."""
        numel = self.specs[name].numel
        step = size if self.source.blockwise(name) else max(numel, 1)
        for start in range(0, numel, step):
            yield start, min(start + step, numel)

    def rename(self, old_names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under new names: `{new name: old name}`, in the order given. Others are left out."""
        stored = {new: self.resolve(old) for new, old in old_names.items()}
        first: dict[str, str] = {}
        names = {new: old for new, old in stored.items() if first.setdefault(old, new) == new}
        aliases = {new: first[old] for new, old in stored.items() if first[old] != new}
        specs = {new: self.specs[old] for new, old in names.items()}
        return self._with(specs, Renamed(self.source, names), aliases)

    def beside(self, folder: Path | None) -> Checkpoint:
        """The same checkpoint with the `config.json` and tokenizer files of another folder."""
        checkpoint = self._with(self.specs, self.source, self.aliases)
        checkpoint.folder = folder
        return checkpoint

    def replace(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """The same checkpoint with other values for some tensors, of the same shapes."""
        stored = {self.resolve(name): tensor for name, tensor in tensors.items()}
        for name, tensor in stored.items():
            if tuple(tensor.shape) != self.specs[name].shape:
                raise InputError(f"'{name}' is {self.specs[name].shape}; {tuple(tensor.shape)} cannot replace it.")
        cast = {name: tensor.detach().to(to_torch(self.specs[name].dtype)) for name, tensor in stored.items()}
        return self._with(self.specs, Replaced(self.source, cast), self.aliases)

    def __getitem__(self, name: str) -> Tensor:
        name = self.resolve(name)
        return self.read(name).reshape(self.specs[name].shape)

    def __iter__(self) -> Iterator[str]:
        yield from self.specs
        yield from self.aliases

    def __len__(self) -> int:
        return len(self.specs) + len(self.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self.specs or name in self.aliases

    def __repr__(self) -> str:
        millions = sum(spec.numel for spec in self.specs.values()) / 1e6
        return f"<Checkpoint of {len(self.specs)} tensors, {millions:.1f}M parameters>"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and contents: independent of file format, shards and order."""

        def content(name: str) -> list[Any]:
            sha = hashlib.sha256()
            for start, stop in self.blocks(name):
                sha.update(as_bytes(self.read(name, start, stop)))
            return [name, self.specs[name].dtype, list(self.specs[name].shape), sha.hexdigest()]

        table = [*in_order(content, sorted(self.specs)), sorted(self.aliases.items())]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()

    def made_by(self, method: str, hyperparameters: Mapping[str, Any], **more: Any) -> Checkpoint:
        """The same checkpoint, with the method and hyperparameters that made it, and more, written into its recipe."""
        checkpoint = self._with(self.specs, self.source, self.aliases)
        checkpoint.recipe = {"method": method, "hyperparameters": dict(hyperparameters), **more}
        return checkpoint

    def provenance(self) -> dict[str, Any]:
        """How to make this checkpoint again: method, hyperparameters and inputs, each with the hash of its contents."""
        if self.inputs:
            return {**self.recipe, "inputs": {name: model.provenance() for name, model in self.inputs.items()}}
        if self.recipe:
            return self.recipe
        return {"location": self.location, "sha256": self.digest}

    def _tied_by_config(self) -> Checkpoint:
        """Tie what the config declares tied and the file holds twice: an output layer equal to the input embedding."""
        if not self.config.get("tie_word_embeddings"):
            return self
        groups: dict[Spec, list[str]] = {}
        for name, spec in self.specs.items():
            if name.endswith(_EMBEDDINGS):
                groups.setdefault(spec, []).append(name)
        aliases = dict(self.aliases)
        for names in groups.values():
            first, *others = sorted(names, key=lambda name: name.endswith(_OUTPUTS))  # the embedding, then its copies
            for name in others:
                if all(bool((self.read(name, *b) == self.read(first, *b)).all()) for b in self.blocks(name)):
                    aliases[name] = first
        specs = {name: spec for name, spec in self.specs.items() if name not in aliases}
        return self._with(specs, self.source, aliases)

    def _with(self, specs: Mapping[str, Spec], source: Source, aliases: Mapping[str, str]) -> Checkpoint:
        return Checkpoint(
            specs,
            source,
            aliases=aliases,
            folder=self.folder,
            location=self.location,
            recipe=self.recipe,
            inputs=self.inputs,
            config=self.new_config,
        )


def _adapted(folder: Path, location: str, base: Checkpoint | None) -> Checkpoint:
    from fusionbench.lora import Adapter

    adapter = Adapter.open(folder, location)
    if base is None:
        named = adapter.config.get("base_model_name_or_path")
        if not named:
            raise InputError(f"'{location}' is a LoRA adapter that names no base model: give the base.")
        try:
            base = Checkpoint.open(find(named, relative_to=folder))
        except InputError as error:
            raise InputError(f"'{location}' is a LoRA adapter, and its base cannot be opened: {error}") from None
    return adapter.on(base)


_OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight", "predictions.decoder.weight")
_EMBEDDINGS = (
    *_OUTPUTS,
    "embed_tokens.weight",
    "wte.weight",
    "shared.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)


class Files:
    """Tensors in one safetensors file, or in several shards."""

    def __init__(self, shards: list[SafetensorsFile]) -> None:
        self._shard_of = {name: shard for shard in shards for name in shard.specs}

    @property
    def working_set(self) -> int:
        return 8

    def read(self, name: str, start: int, stop: int) -> Tensor:
        import torch

        dtype = to_torch(self._shard_of[name].specs[name].dtype)
        if start == stop:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.read_bytes(name, start, stop), dtype=dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> bytearray:
        return self._shard_of[name].read(name, start, stop)

    def blockwise(self, name: str) -> bool:
        return True


class InMemory:
    """Tensors held in memory."""

    working_set = 8

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop]

    def blockwise(self, name: str) -> bool:
        return self._tensors[name].is_contiguous()


class Renamed:
    """Another source's tensors under new names: `{new name: old name}`."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)

    @property
    def working_set(self) -> int:
        return self._source.working_set

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read(self._names[name], start, stop)

    def blockwise(self, name: str) -> bool:
        return self._source.blockwise(self._names[name])


class Assembled:
    """Tensors of several checkpoints: `{name: (checkpoint, its name there)}`."""

    def __init__(self, parts: Mapping[str, tuple[Checkpoint, str]]) -> None:
        self._parts = dict(parts)

    @property
    def working_set(self) -> int:
        return max((part.source.working_set for part, _ in self._parts.values()), default=8)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        part, old = self._parts[name]
        return part.source.read(old, start, stop)

    def blockwise(self, name: str) -> bool:
        part, old = self._parts[name]
        return part.source.blockwise(old)


class Replaced:
    """Another source's tensors, but for some that are held in memory."""

    def __init__(self, source: Source, tensors: Mapping[str, Tensor]) -> None:
        self._source, self._held = source, InMemory(tensors)
        self._names = frozenset(tensors)

    @property
    def working_set(self) -> int:
        return self._source.working_set

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return (self._held if name in self._names else self._source).read(name, start, stop)

    def blockwise(self, name: str) -> bool:
        return (self._held if name in self._names else self._source).blockwise(name)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as a file holds them."""
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    import pickle
    import warnings
    import zipfile

    import torch

    try:
        with warnings.catch_warnings():  # about pickle protocols: what cannot be read is an error below
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(
            f"'{path}' is a pickle that wants to run code or is damaged: refused. "
            "Have its weights saved as .safetensors where you trust the file."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):  # as training scripts save it
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"'{path}' is not a table of tensors: save the model's state_dict() itself.")
    return {str(name): tensor for name, tensor in loaded.items()}
