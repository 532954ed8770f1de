"""Files that lie, made at random from files that do not: `python tests/faults/fuzz.py --seconds 60`.

Each must be refused in one line, or read as what it says it is: an exception that is no InputError, a tensor that lies
outside its file, a second or much memory for a small file are what is looked for. Prints one line.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
import resource
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fusionbench.errors import InputError
from fusionbench.formats import DTYPES, SafetensorsFile, read_table, weight_files

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    -1,
    2**31,
    2**62,
    2**63,
    2**64,
    10**400,
    True,
    False,
    1.0,
    -0.5,
    1e308,
    float("nan"),
    None,
    "4",
]
NAMES = ["a", "b.weight", "", "\ud800", "\0", "x" * 5000, "two\nlines", "\x1b[2J", "../a", "__metadata__", "[/red]"]
_VALUES: list[Any] = [None, True, 0, -1, 1.5, "F32", [], {}, [[]], [1, 2], {"dtype": "F32"}, "é", 10**4000]


def values() -> list[Any]:
    """What stands where something else is expected; to be changed further."""
    return copy.deepcopy(_VALUES)


def header(random: Random) -> bytes:
    """A safetensors file with a header of which a few things are wrong."""
    entries: list[tuple[str, Any]] = []
    end = 0
    for i in range(random.randint(0, 4)):
        dtype = random.choice(list(DTYPES))
        shape = [random.randint(0, 4) for _ in range(random.randint(0, 3))]
        size = DTYPES[dtype]
        for number in shape:
            size *= number
        entries.append((f"t{i}", {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}))
        end += size
    if random.random() < 0.3:
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        random.choice(CHANGES)(random, entries)
    text = _json(entries).encode(errors="surrogatepass")
    if random.random() < 0.1:
        text = _scrambled(random, text)
    if random.random() < 0.05:
        text = text.decode(errors="replace").encode(random.choice(["utf-16", "utf-8-sig", "utf-32"]), "replace")
    text += b" " * random.choice([0, 0, 0, 1, -len(text) % 8])
    length = len(text) if random.random() < 0.9 else max(0, random.choice([len(text) + 1, len(text) - 1, 2**40, 0]))
    data = bytes(max(0, end + random.choice([0, 0, 0, 0, 0, 0, 1, -1, 1000])))
    return length.to_bytes(8, "little") + text + data


def _json(entries: list[tuple[str, Any]]) -> str:
    """An object of these keys, of which some may stand twice."""
    return (
        "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=False)}" for name, value in entries) + "}"
    )


def _change_number(random: Random, entries: list[tuple[str, Any]]) -> None:
    for _, entry in _some(random, entries):
        numbers = entry.get(random.choice(["shape", "data_offsets"])) if isinstance(entry, dict) else None
        if isinstance(numbers, list) and numbers:
            i = random.randrange(len(numbers))
            near = type(numbers[i]) is int and random.random() < 0.5
            numbers[i] = numbers[i] + random.choice([-1, 1, 8]) if near else random.choice(NUMBERS)


def _change_value(random: Random, entries: list[tuple[str, Any]]) -> None:
    for _, entry in _some(random, entries):
        if isinstance(entry, dict) and entry:
            key = random.choice(list(entry))
            entry[key] = random.choice([*values(), random.choice(list(DTYPES)), [1] * 100])


def _change_key(random: Random, entries: list[tuple[str, Any]]) -> None:
    for _, entry in _some(random, entries):
        if isinstance(entry, dict) and entry:
            value = entry.pop(random.choice(list(entry)))
            if random.random() < 0.5:
                entry[random.choice(["dtype", "shape", "data_offsets", "more"])] = value


def _rename(random: Random, entries: list[tuple[str, Any]]) -> None:
    for name, entry in _some(random, entries):
        entries[entries.index((name, entry))] = (random.choice(NAMES), entry)


def _replace(random: Random, entries: list[tuple[str, Any]]) -> None:
    for name, entry in _some(random, entries):
        entries[entries.index((name, entry))] = (name, random.choice(values()))


def _repeat(random: Random, entries: list[tuple[str, Any]]) -> None:
    entries += _some(random, entries)


def _remove(random: Random, entries: list[tuple[str, Any]]) -> None:
    for entry in _some(random, entries):
        entries.remove(entry)


def _swap(random: Random, entries: list[tuple[str, Any]]) -> None:
    random.shuffle(entries)


def _add_metadata(random: Random, entries: list[tuple[str, Any]]) -> None:
    value = random.choice([{"k": v} for v in values()] + [{n: "t0"} for n in NAMES] + values())
    entries.append(("__metadata__", value))


def _nest(random: Random, entries: list[tuple[str, Any]]) -> None:
    value: Any = []
    for _ in range(random.choice([5, 500, 900])):
        value = [value] if random.random() < 0.5 else {"a": value}
    for name, entry in _some(random, entries):
        if isinstance(entry, dict) and random.random() < 0.7:
            entry[random.choice(["dtype", "shape", "data_offsets"])] = value
        else:
            entries[entries.index((name, entry))] = (name, value)


def _some(random: Random, entries: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [random.choice(entries)] if entries else []


CHANGES: list[Callable[[Random, list[tuple[str, Any]]], None]] = [
    _change_number,
    _change_number,
    _change_value,
    _change_key,
    _rename,
    _replace,
    _repeat,
    _remove,
    _swap,
    _add_metadata,
    _nest,
]


def _scrambled(random: Random, content: bytes) -> bytes:
    """Bytes changed, removed, repeated or added."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(changed))
        what = random.randrange(4)
        if what == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif what == 1:
            del changed[at : at + random.choice([1, 2, 10, 1000])]
        elif what == 2:
            changed[at:at] = changed[at : at + random.choice([1, 8, 40])]
        else:
            changed[at:at] = random.choice([b"{", b"]", b'"', b"\xff", b"\0", b"[" * 2000, b"1" * 5000, b"1e999", b","])
    return bytes(changed)


def table(random: Random) -> bytes:
    """A JSON file, as an index, a config, a recipe or a manifest, with something wrong."""
    shards = [
        "a.safetensors",
        "b.safetensors",
        "../a.safetensors",
        "/etc/passwd",
        "n" * 300,
        "a\0b",
        "\ud800",
        "",
        "..",
    ]
    entry = random.choice([random.choice(shards), random.choice(values())])
    weight_map = random.choice(
        [{random.choice(NAMES): entry, "w": "a.safetensors"}, {"w": entry}, random.choice(values())]
    )
    content = json.dumps(random.choice([{"weight_map": weight_map}, weight_map])).encode()
    return _scrambled(random, content) if random.random() < 0.4 else content


def pickled(random: Random) -> bytes:
    """A file of torch's, damaged."""
    import torch

    file = io.BytesIO()
    new = random.random() < 0.7
    torch.save({"w": torch.ones(3), "b": torch.ones(2, 2).half()}, file, _use_new_zipfile_serialization=new)
    content = file.getvalue()
    if new and random.random() < 0.6:  # what is in the archive, not the archive
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        name = random.choice(list(parts))
        parts[name] = random.choice([_scrambled(random, parts[name]), b"", pickle.dumps(random.choice(values()[:-1]))])
        if random.random() < 0.2:
            del parts[name]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for part, data in parts.items():
                archive.writestr(part, data)
        return file.getvalue()
    return _scrambled(random, content)


def check_header(folder: Path, content: bytes) -> bool:
    """Whether a file is read; an error where it is not refused and yet is not what it says."""
    file = folder / "x.safetensors"
    file.write_bytes(content)
    try:
        opened = SafetensorsFile(file)
    except InputError as error:
        _one_line(error)
        return False
    found = []
    for name, spec in opened.specs.items():
        data = bytearray(spec.nbytes)
        opened.read_into(name, 0, data)
        found.append(bytes(data))
    start = 8 + int.from_bytes(content[:8], "little")
    assert sum(map(len, found)) == len(content) - start, "tensors overlap, or leave something out"
    assert b"".join(found) == content[start:], "tensors are not in the order of the file"
    return True


def check_index(folder: Path, content: bytes) -> bool:
    """Likewise, for a shard index."""
    for name in ("a", "b"):
        if not (folder / f"{name}.safetensors").exists():
            entry = {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
            text = json.dumps(entry).encode()
            (folder / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    file = folder / "model.safetensors.index.json"
    file.write_bytes(content)
    try:
        files = weight_files(file)
    except InputError as error:
        _one_line(error)
        return False
    assert files and all(found.parent == folder and found.is_file() for found in files)
    return True


def check_table(folder: Path, content: bytes) -> bool:
    """Likewise, for any file with a table."""
    file = folder / "config.json"
    file.write_bytes(content)
    try:
        return isinstance(read_table(file), dict)
    except InputError as error:
        _one_line(error)
        return False


def check_pickle(folder: Path, content: bytes) -> bool:
    """Likewise, for a file of torch's."""
    from fusionbench.checkpoint import Checkpoint

    file = folder / "model.bin"
    file.write_bytes(content)
    try:
        opened = Checkpoint.open(file)
    except InputError as error:
        _one_line(error)
        return False
    for name in opened.specs:
        opened.block(name, 0, min(opened.specs[name].numel, 100))
    return True


def _one_line(error: InputError) -> None:
    text = str(error)
    assert "\n" not in text and text.isprintable() and len(text) < 3000, f"no line that one can read: {text[:300]!r}"


KINDS: dict[str, tuple[Callable[[Random], bytes], Callable[[Path, bytes], bool]]] = {
    "header": (header, check_header),
    "bytes": (lambda random: random.randbytes(random.randint(0, 200)), check_header),
    "index": (table, check_index),
    "table": (table, check_table),
    "pickle": (pickled, check_pickle),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    random, begun = Random(arguments.seed), time.perf_counter()
    cases = read = failed = 0
    worst, worst_kind = 0.0, ""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        while time.perf_counter() - begun < arguments.seconds:
            kind = random.choice([kind for kind in arguments.kinds for _ in range(1 if kind == "pickle" else 9)])
            make, check = KINDS[kind]
            content = make(random)
            start = time.perf_counter()
            try:
                read += check(place, content)
            except Exception as error:
                failed += 1
                if failed <= 20:
                    print(f"{kind}: {type(error).__name__}: {str(error)[:200]} <- {content[:300]!r}")
            took = time.perf_counter() - start
            if took > worst:
                worst, worst_kind = took, kind
            cases += 1
    seconds = time.perf_counter() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{cases:,} cases: {cases - read - failed:,} refused, {read:,} read, {failed:,} failed; {seconds:.0f} s, "
        f"the worst {1000 * worst:.0f} ms ({worst_kind}); {memory:,.0f} MiB at most"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
