"""Tensor files, read without torch: safetensors headers and blocks, shard indices, the files of a model folder."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fusionbench.direct import open_to_read
from fusionbench.errors import InputError
from fusionbench.parallel import once

# Bytes per element, under the names safetensors gives them.
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
ADAPTER_CONFIG = "adapter_config.json"
INDEX = ".index.json"
MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # numpy's
MAX_ELEMENTS = 2**60  # what torch can count, in bytes too


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without reading it: its dtype under safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @once
    def numel(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.numel * DTYPES[self.dtype]

    @property
    def floating(self) -> bool:
        """Whether they are floating-point numbers."""
        return "F" in self.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class SafetensorsFile:
    """One safetensors file, its header checked against its size; tensors are read block by block."""

    def __init__(self, path: Path) -> None:
        self.path, self._name = path, str(path)
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        try:
            self._parse()
        except OSError as error:
            raise InputError(f"'{path}' cannot be read: {error.strerror}.") from error

    def read_into(self, name: str, start: int, out: Any) -> None:
        """Fill a buffer with a tensor's bytes, from the element `start` on, flattened in C order."""
        view, offset = memoryview(out), self._offsets[name] + start * DTYPES[self.specs[name].dtype]
        try:
            descriptor, read = open_to_read(self._name)
            try:
                changed = _stamp(descriptor) != self._opened
                while view and not changed:  # one call reads 2 GiB at most
                    count = read(descriptor, offset, view)
                    changed = count == 0
                    view, offset = view[count:], offset + count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"'{self.path}' cannot be read: {error.strerror}.") from error
        if changed:  # what was read before, or its header, is of another file
            raise InputError(f"'{self.path}' was changed or truncated after it was opened: start again.")

    def _parse(self) -> None:
        with open(self.path, "rb") as file:
            self._opened = _stamp(file.fileno())
            size = self._opened[0]
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                refuse_pointer(self.path)
                if not size:
                    self._refuse("empty: it has no bytes")
                self._refuse(f"truncated: its header should be {length:,} bytes long, the file is {size:,}")
            if length > MAX_HEADER:
                self._refuse(f"not a safetensors file: its header claims {length:,} bytes")
            try:
                header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                self._refuse(f"not a safetensors file: its header is not valid JSON ({error})")
        if not isinstance(header, dict):
            self._refuse("not a safetensors file: its header is not an object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse("damaged: its metadata is not a table of strings")
        for name in (*header, *metadata, *metadata.values()):
            if not is_text(name):
                self._refuse(f"damaged: the name {shown(name)} is not valid text")
        self.metadata = metadata
        end = 0
        entries = [(name, *self._entry(name, entry)) for name, entry in header.items()]
        for name, spec, start, stop in sorted(entries, key=lambda entry: entry[2:]):
            if start != end:
                self._refuse(f"damaged: {shown(name)} starts at byte {start:,} where {end:,} is expected")
            end = stop
            self.specs[name], self._offsets[name] = spec, 8 + length + start
        if 8 + length + end != size:
            word = "truncated" if 8 + length + end > size else "damaged"
            self._refuse(f"{word}: its header describes {8 + length + end:,} bytes, the file has {size:,}")

    def _entry(self, name: str, entry: Any) -> tuple[Spec, int, int]:
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            self._refuse(f"damaged: the entry of {shown(name)} is not a tensor's")
        if not isinstance(dtype, str) or not isinstance(shape, list):
            self._refuse(f"damaged: the entry of {shown(name)} is not a tensor's")
        if dtype not in DTYPES:
            self._refuse(f"unreadable: {shown(name)} has the dtype {shown(dtype)}, known are {', '.join(DTYPES)}")
        if len(shape) > MAX_DIMENSIONS:
            self._refuse(f"unreadable: {shown(name)} has {len(shape):,} dimensions, more than {MAX_DIMENSIONS}")
        counts = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        if not counts or max(start, stop, math.prod(number or 1 for number in shape)) > MAX_ELEMENTS:
            self._refuse(f"damaged: {shown(name)} has the shape {shown(shape)} and the offsets {shown([start, stop])}")
        spec = Spec(dtype, tuple(shape))
        if stop - start != spec.nbytes:
            self._refuse(
                f"damaged: {shown(name)} is {dtype} {shown(shape)}, {spec.nbytes:,} bytes, "
                f"but {stop - start:,} are set aside for it"
            )
        return spec, start, stop

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(f"'{self.path}' is {reason}.") from None


def shown(value: Any) -> str:
    """What a file says, as a part of one line: quoted, and not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_text(name: str) -> bool:
    """Whether a name can be written: JSON, and pickles, may hold halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stamp(descriptor: int) -> tuple[int, int, int]:
    """What tells whether a file is still the same without reading it."""
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def refuse_pointer(path: Path) -> None:
    """An error for what stands for a large file where git-lfs has not fetched it."""
    try:
        with open(path, "rb") as file:
            begins = file.read(40)
    except OSError:  # whoever reads it next says so
        return
    if begins.startswith(b"version https://git-lfs"):
        raise InputError(f"'{path}' is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder.")


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model folder (or the file itself): sharded with an index, or one file."""
    entry = _entry_file(path)
    return _shards(entry) if entry.name.endswith(INDEX) else [entry]


def listed(path: Path) -> list[str]:
    """The tensors that the index of a sharded model lists; none of another."""
    entry = _entry_file(path)
    return list(read_table(entry)["weight_map"]) if entry.name.endswith(INDEX) else []


def _entry_file(path: Path) -> Path:
    """What of a model folder (or the file itself) says where its weights are: an index, or a file that holds them."""
    if path.is_file():
        return path
    for name in ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}"):
        if (path / name).is_file():
            return path / name
    for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pt"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found and all("-of-" in file.name for file in found):
            raise InputError(
                f"'{path}' holds {len(found)} shards, but no index of them: copy the .index.json there, too."
            )
        if found:
            names = ", ".join(file.name for file in found)
            raise InputError(f"'{path}' holds several candidates ({names}) and no index: name the file you mean.")
    raise InputError(f"'{path}' holds no weights: no .safetensors, .bin or .pt file is in it.")


def is_adapter(location: Path) -> bool:
    """Whether a folder holds a LoRA adapter, not a model."""
    return (location / ADAPTER_CONFIG).is_file()


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, which are there, and hold what it says they do."""
    weight_map = read_table(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise InputError(f"'{index}' is not a shard index: it has no 'weight_map', of tensors to files.")
    held: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"'{index}' points outside its folder: {shown(name)}.")
        held.setdefault(name, []).append(tensor)
    for name, tensors in sorted(held.items()):
        file = index.parent / name
        if not os.path.isfile(file):  # unlike the path's own is_file, this is so for every name
            raise InputError(f"'{index.parent}/{shown(name)[1:-1]}' does not exist, but '{index.name}' lists it.")
        specs = SafetensorsFile(file).specs if file.suffix == ".safetensors" else tensors
        for tensor in tensors:
            if tensor not in specs:
                raise InputError(f"'{file}' does not hold {shown(tensor)}, but '{index.name}' says so.")
    return [index.parent / name for name in sorted(held)]


def read_config(folder: Path | None) -> dict[str, Any]:
    """The `config.json` of a model folder; empty when there is none."""
    if folder is None or not (folder / "config.json").is_file():
        return {}
    return read_table(folder / "config.json")


def read_table(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object."""
    try:
        small = file.stat().st_size <= MAX_HEADER
        table = json.loads(file.read_bytes().decode()) if small else None
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is not valid JSON ({error}).") from None
    if not isinstance(table, dict):
        raise InputError(f"'{file}' is not a JSON object{'' if small else f', or has more than {MAX_HEADER:,} bytes'}.")
    return table


def header_bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file that holds `specs` in their order, and where each tensor's data starts."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in specs.items():
        offsets[name] = end
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    for name in specs:
        if name == "__metadata__" or not is_text(name):
            raise InputError(f"A tensor called {shown(name)} cannot be stored in a safetensors file: rename it.")
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of eight, as the format asks
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}
