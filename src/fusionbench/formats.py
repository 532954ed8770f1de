"""Tensor files, read without torch: safetensors headers and blocks, shard indices, the files of a model folder."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fusionbench.errors import InputError

# Bytes per element, under the names safetensors gives them.
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
ADAPTER_CONFIG = "adapter_config.json"
MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known of a tensor without reading it: its dtype under safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype]

    @property
    def floating(self) -> bool:
        return "F" in self.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class SafetensorsFile:
    """One safetensors file, its header checked against its size; tensors are read block by block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self._parse()

    def read_into(self, name: str, start: int, out: Any) -> None:
        """Fill a buffer with a tensor's bytes, from the element `start` on, flattened in C order."""
        view, offset = memoryview(out), self._offsets[name] + start * DTYPES[self.specs[name].dtype]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while view:  # one call reads 2 GiB at most
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise InputError(f"'{self.path}' ended while '{name}' was read: it was changed or truncated.")
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)

    def _parse(self) -> None:
        size = os.path.getsize(self.path)
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                self._refuse(f"truncated: its header should be {length:,} bytes long, the file is {size:,}")
            if length > MAX_HEADER:
                self._refuse(f"not a safetensors file: its header claims {length:,} bytes")
            try:
                header = json.loads(file.read(length), object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                self._refuse(f"not a safetensors file: its header is not valid JSON ({error})")
        if not isinstance(header, dict):
            self._refuse("not a safetensors file: its header is not an object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse("damaged: its metadata is not a table of strings")
        self.metadata = metadata
        end = 0
        entries = [(name, *self._entry(name, entry)) for name, entry in header.items()]
        for name, spec, start, stop in sorted(entries, key=lambda entry: entry[2:]):
            if start != end:
                self._refuse(f"damaged: '{name}' starts at byte {start:,} where {end:,} is expected")
            end = stop
            self.specs[name], self._offsets[name] = spec, 8 + length + start
        if 8 + length + end != size:
            word = "truncated" if 8 + length + end > size else "damaged"
            self._refuse(f"{word}: its header describes {8 + length + end:,} bytes, the file has {size:,}")

    def _entry(self, name: str, entry: Any) -> tuple[Spec, int, int]:
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            self._refuse(f"damaged: the entry of '{name}' is not a tensor's")
        if dtype not in DTYPES:
            self._refuse(f"unreadable: '{name}' has the dtype '{dtype}', known are {', '.join(DTYPES)}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            self._refuse(f"damaged: '{name}' has the shape {shape} and the offsets {start}, {stop}")
        spec = Spec(dtype, shape)
        if stop - start != spec.nbytes:
            self._refuse(
                f"damaged: '{name}' is {spec}, {spec.nbytes:,} bytes, but {stop - start:,} are set aside for it"
            )
        return spec, start, stop

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(f"'{self.path}' is {reason}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model folder (or the file itself): sharded with an index, or one file."""
    if path.is_file():
        return _shards(path) if path.name.endswith(".index.json") else [path]
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if (path / name).is_file():
            return weight_files(path / name)
    for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pt"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return weight_files(found[0])
        if found:
            names = ", ".join(file.name for file in found)
            raise InputError(f"'{path}' holds several candidates ({names}) and no index: name the file you mean.")
    raise InputError(f"'{path}' holds no weights: no .safetensors, .bin or .pt file is in it.")


def is_adapter(location: Path) -> bool:
    """Whether a folder holds a LoRA adapter, not a model."""
    return (location / ADAPTER_CONFIG).is_file()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"'{index}' is not a shard index: it has no 'weight_map'.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"'{index}' points outside its folder: '{name}'.")
        if not (index.parent / name).is_file():
            raise InputError(f"'{index.parent / name}' does not exist, but '{index.name}' lists it.")
    return [index.parent / name for name in names]


def read_config(folder: Path | None) -> dict[str, Any]:
    """The `config.json` of a model folder; empty when there is none."""
    if folder is None or not (folder / "config.json").is_file():
        return {}
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"'{folder / 'config.json'}' is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise InputError(f"'{folder / 'config.json'}' is not a JSON object.")
    return config


def header_bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file that holds `specs` in their order, and where each tensor's data starts."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in specs.items():
        offsets[name] = end
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of eight, as the format asks
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}
