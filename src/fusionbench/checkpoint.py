"""A checkpoint: a read-only mapping from names to tensors, each produced when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from fusionbench import formats
from fusionbench.dtypes import from_torch, to_torch
from fusionbench.errors import InputError, did_you_mean
from fusionbench.formats import DTYPES, SafetensorsFile, Spec, is_adapter
from fusionbench.locations import find
from fusionbench.parallel import in_order
from fusionbench.passes import Block, Bytes, weighted_sum
from fusionbench.sources import BLOCK, Assembled, Files, InMemory, Renamed, Replaced, Source, hash_of, hashes

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_PICKLE = 100_000_000  # bytes, as of a safetensors header
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # that torch.save wrote
PLACEHOLDER = "0" * 32  # for a hash that is not known yet

File = Path | bytes | None
"""Of a file in a model's folder: where it is, or its content; None where it is to be left out."""
StoredPieces = Generator[tuple[int, Bytes], None, None]


class Checkpoint(Mapping[str, "Tensor"]):
    """Named tensors whose shapes and dtypes are known without reading them.

    As a mapping it has every name, tied ones too; `specs` has every tensor once. Indexing twice reads (or computes)
    twice: `Checkpoint.of(dict(checkpoint))` keeps what it has read.

    Attributes:
        specs: dtype and shape of every stored tensor, in file order.
        source: what reads or computes them, by the names they are stored under.
        aliases: tied names: `{"lm_head.weight": "wte.weight"}` says that the first is the second.
        folder: the model folder whose `config.json` and tokenizer files belong to these tensors.
        location: where it was opened from, as it was given.
        config: the content of the `config.json` that describes these tensors; empty where there is none.
        new_config: the same where it is not that of `folder`; None where it is.
        recipe: how these tensors were made, as data; empty for what was read from a file.
        inputs: the checkpoints they were made from, the base model under "base", others by name.
        files: files for its folder, by name, beside or in place of those of `folder`: a path, or the content; None for
            one that is left out.
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
        files: Mapping[str, File] | None = None,
    ) -> None:
        self.specs = dict(specs)
        self.source = source
        self.aliases = dict(aliases or {})
        self.folder = folder
        self.location = location
        self.recipe = dict(recipe or {})
        self.inputs = dict(inputs or {})
        self.new_config = None if config is None else dict(config)  # where it is not that of the folder
        self.files = dict(files or {})

    @property
    def config(self) -> dict[str, Any]:
        """The content of the `config.json` that describes these tensors; empty where there is none."""
        return formats.read_config(self.folder) if self.new_config is None else self.new_config

    @classmethod
    def open(cls, path: str | Path, *, base: Checkpoint | None = None) -> Checkpoint:
        """Open a `.safetensors`, `.bin` or `.pt` file, a model folder (sharded or not), `zoo:NAME` or `hf:OWNER/NAME`.

        Only headers are read. A pickle is read with weights only: one that wants to run code is refused. The folder of
        a LoRA adapter is the model it makes of `base`, or of the base its own config names: see `fusionbench.lora`.

        Raises:
            InputError: where there is no such place, or what is there is damaged, is no model, or is refused; for an
                adapter without a base.
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
                for name, tensor in _load_pickle(file).items():
                    if name in tensors:
                        raise InputError(f"'{location}': '{name}' stands in two shards.")
                    tensors[name] = tensor
            for name in formats.listed(location):
                if name not in tensors:
                    raise InputError(f"'{location}': no shard holds '{name}', which the index lists.")
            checkpoint = cls.of(tensors, folder=folder, location=str(path))
        return checkpoint.tied_by_config()

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
        more: dict[str, Any] = {"config": like.new_config if config is None else config, "files": like.files}
        return cls(specs, Assembled(stored), aliases=aliases, folder=like.folder, inputs=inputs, **more)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the elements `start` to `stop` of a tensor, flattened in C order, in the dtype it is stored in."""
        name = self.resolve(name)
        return self.source.read(name, start, self.specs[name].numel if stop is None else stop)

    def block(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Block:
        """Like `read`, as bytes and their dtype; from a safetensors file without torch."""
        return self.source.block(self.resolve(name), start, stop, out)

    def resolve(self, name: str) -> str:
        """The name a tensor is stored under: the name itself, or what it is tied to.

        Raises:
            KeyError: where no tensor is called so.
        """
        name = self.aliases.get(name, name)
        if name not in self.specs:
            raise KeyError(f"No tensor is called '{name}'. {did_you_mean(name, self.specs)}")
        return name

    def blocks(self, name: str, memory: int = 0) -> Iterator[tuple[int, int]]:
        """The parts of a tensor that are best read apart, as (start, stop); all of it when it cannot be divided."""
        numel = self.specs[name].numel
        step = max(self.source.unit(name, memory), 1)
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

    def with_files(self, files: Mapping[str, File]) -> Checkpoint:
        """The same checkpoint with more files for its folder, see `files`."""
        checkpoint = self._with(self.specs, self.source, self.aliases)
        checkpoint.files |= files
        return checkpoint

    def replace(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """The same checkpoint with other values for some tensors, of the same shapes.

        Raises:
            InputError: where a shape is another one.
            KeyError: where no tensor is called so.
        """
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

    __eq__ = object.__eq__  # Mapping's would read both
    __hash__ = object.__hash__  # type: ignore[assignment]  (Mapping's is None)

    def __repr__(self) -> str:
        millions = sum(spec.numel for spec in self.specs.values()) / 1e6
        return f"<Checkpoint of {len(self.specs)} tensors, {millions:.1f}M parameters>"

    @cached_property
    def digest(self) -> str:
        """A hash of names, dtypes, shapes and contents: independent of file format, shards and order.

        What was read from files before is not read again, if it was read in whole blocks.
        """

        unread = [name for name in self.specs if not self._is_known(name)]
        found = dict(zip(unread, in_order(self.hash, unread), strict=True))
        contents = [
            [name, spec.dtype, list(spec.shape), found.get(name) or self.hash(name)]
            for name, spec in sorted(self.specs.items(), key=lambda item: item[0])
        ]
        table = [*contents, sorted(self.aliases.items())]
        return xxhash.xxh3_128_hexdigest(json.dumps(table).encode())

    def hash(self, name: str) -> str:
        """A hash of one tensor's bytes: of the hashes of its blocks (XXH3, 128 bits)."""
        name = self.resolve(name)
        known = self.source.known(name)
        found = {} if known is None else known
        if not self._is_known(name):
            size = BLOCK * DTYPES[self.specs[name].dtype]
            for start, stop in self.blocks(name):
                if start not in found:
                    found.update(hashes(start, self.as_stored(name, start, stop), size))
        return hash_of(found)

    def _is_known(self, name: str) -> bool:
        """Whether the hashes of all blocks of a tensor are known."""
        return len(self.source.known(name) or ()) == -(-self.specs[name].numel // BLOCK)

    def as_stored(self, name: str, start: int, stop: int, out: Bytes | None = None) -> Bytes:
        """Like `block`, in the dtype of the specs: what of a tensor a file of this checkpoint has."""
        return self._converted(name, self.source.block(name, start, stop, out), out)

    def pieces_as_stored(self, name: str, start: int, stop: int, out: Bytes) -> StoredPieces:
        """Like `as_stored`, in pieces of whole blocks, with their first elements: each is used before the next is had.

        So that what is computed of a large tensor is written while it is in the cache.
        """
        for first, block in self.source.pieces(name, start, stop, out):
            yield first, self._converted(name, block, None)

    def _converted(self, name: str, block: Block, out: Bytes | None) -> Bytes:
        data, dtype = block
        wanted = self.specs[name].dtype
        if dtype == wanted:
            return data
        out = np.empty(len(data) // DTYPES[dtype] * DTYPES[wanted], np.uint8) if out is None else out
        weighted_sum([block], 1.0, np.zeros(0), 1.0, out, wanted)
        return out

    def made_by(self, method: str, hyperparameters: Mapping[str, Any], **more: Any) -> Checkpoint:
        """The same checkpoint, with the method and hyperparameters that made it, and more, written into its recipe."""
        checkpoint = self._with(self.specs, self.source, self.aliases)
        checkpoint.recipe = {"method": method, "hyperparameters": dict(hyperparameters), **more}
        return checkpoint

    def provenance(self, *, hashed: bool = True) -> dict[str, Any]:
        """How to make this checkpoint again: method, hyperparameters and inputs, each with the hash of its contents.

        Without `hashed` nothing is read, and what stands for a hash is as long as one.
        """
        if self.inputs:
            inputs = {name: model.provenance(hashed=hashed) for name, model in self.inputs.items()}
            return {**self.recipe, "inputs": inputs}
        if self.recipe:
            return self.recipe
        return {"location": self.location, "xxh3": self.digest if hashed else PLACEHOLDER}

    def identity(self) -> dict[str, Any]:
        """What tells its tensors from others, wherever they lie: how they were made, or the hash of their contents."""
        if not self.recipe:
            return {"xxh3": self.digest}
        return {**self.recipe, "inputs": {name: model.identity() for name, model in self.inputs.items()}}

    def untied(self) -> Checkpoint:
        """The same with an output layer of its own, `HEAD`, where a language model's config ties it to the embedding.

        Not of encoders with decoders: T5 computes otherwise where they are tied.
        """
        config = self.config
        embedding = next((name for name in self.specs if name.endswith(EMBEDDINGS)), None)
        tied = config.get("tie_word_embeddings") and not config.get("is_encoder_decoder")
        if not tied or embedding is None or HEAD in self.specs:
            return self
        parts = {**{name: (self, name) for name in self.specs}, HEAD: (self, embedding)}
        return Checkpoint.assemble(
            parts, like=self, inputs=self.inputs, config={**config, "tie_word_embeddings": False}
        )

    def tied_by_config(self) -> Checkpoint:
        """Tie what the config declares tied and the file holds twice: an output layer equal to the input embedding."""
        if not self.config.get("tie_word_embeddings"):
            return self
        groups: dict[Spec, list[str]] = {}
        for name, spec in self.specs.items():
            if name.endswith(EMBEDDINGS):
                groups.setdefault(spec, []).append(name)
        aliases = dict(self.aliases)
        for names in groups.values():
            first, *others = sorted(names, key=lambda name: name.endswith(_OUTPUTS))  # the embedding, then its copies
            for name in others:
                if all(np.array_equal(self.block(name, *b)[0], self.block(first, *b)[0]) for b in self.blocks(name)):
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
            files=self.files,
        )


def _adapted(folder: Path, location: str, base: Checkpoint | None) -> Checkpoint:
    from fusionbench.lora import Adapter

    adapter = Adapter.open(folder, location)
    if base is not None:
        adapter.tell_other_base(base)
    else:
        named = adapter.config.get("base_model_name_or_path")
        if not named:
            raise InputError(f"'{location}' is a LoRA adapter that names no base model: give the base.")
        place = find(named, relative_to=folder)
        if place.resolve() == folder.resolve():
            raise InputError(f"'{location}' is a LoRA adapter that names itself as its base: give the base.")
        try:
            base = Checkpoint.open(place)
        except InputError as error:
            raise InputError(f"'{location}' is a LoRA adapter, and its base cannot be opened: {error}") from None
    return adapter.on(base)


HEAD = "lm_head.weight"
_OUTPUTS = (HEAD, "embed_out.weight", "output.weight", "predictions.decoder.weight")
EMBEDDINGS = (
    *_OUTPUTS,
    "embed_tokens.weight",
    "wte.weight",
    "shared.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)


def _is_zip(path: Path) -> bool:
    """Whether a file is a zip; an error where its pickle, which holds no numbers, unpacks to more than it can need."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if any(entry.filename.endswith(".pkl") and entry.file_size > LARGEST_PICKLE for entry in archive.infolist()):
            raise ValueError(f"its pickle unpacks to more than {LARGEST_PICKLE:,} bytes")
    return True


def _load_pickle(path: Path) -> dict[str, Tensor]:
    import pickle
    import warnings

    if path.suffix not in PICKLES:
        known = ", ".join((".safetensors", *PICKLES))
        raise InputError(f"'{path}' is no checkpoint: name a model's folder, or a file that ends in one of {known}.")

    import torch

    formats.refuse_pointer(path)
    try:
        with warnings.catch_warnings():  # about pickle protocols: what cannot be read is an error below
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:
        raise InputError(
            f"'{path}' is a pickle that wants to run code or is damaged: refused. "
            "Have its weights saved as .safetensors where you trust the file."
        ) from None
    except Exception as error:  # of damaged bytes, unpickling raises a dozen unrelated types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"'{path}' cannot be read: {reason}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):  # as training scripts save it
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"'{path}' is not a table of tensors: save the model's state_dict() itself.")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "has no numbers" if tensor.is_meta else "is sparse"
            raise InputError(f"'{path}': '{name}' {kind}: only dense tensors are merged.")
    return {str(name): tensor.resolve_neg() for name, tensor in loaded.items()}
