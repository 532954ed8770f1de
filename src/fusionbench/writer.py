"""Write a checkpoint to a folder: block by block, from many threads, the same bytes always, all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import fusionbench
from fusionbench.checkpoint import PLACEHOLDER, Checkpoint, File
from fusionbench.direct import free_memory, past_cache
from fusionbench.errors import InputError, did_you_mean
from fusionbench.executors import EXECUTORS
from fusionbench.formats import ADAPTER_CONFIG, DTYPES, Spec, header_bytes, weight_files
from fusionbench.journal import JOURNAL, Partial
from fusionbench.locations import locate
from fusionbench.parallel import check_workers, cores
from fusionbench.progress import track
from fusionbench.sources import BLOCK, hash_of, hashes
from fusionbench.units import Unit, UnitWriter, write_at

# What belongs to a model besides its weights: configs, tokenizers, processors, licences.
CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_CARRIED = (".index.json", "recipe.json", "manifest.json", "trainer_state.json", "_results.json")
OWN = ("config.json", "recipe.json", "manifest.json", "model.safetensors.index.json")  # what save itself writes
ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors")  # what an adapter's folder has that was written here
READ = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")  # what of a model's folder a merge looks at
MEMORY = "512MB"  # for the tensors in flight
SMALL = 2**14  # elements of a tensor, on average: below, threads wait for Python's lock, and one takes half the time
FULL = (errno.ENOSPC, errno.EDQUOT)

Shards = Mapping[str, Mapping[str, Spec]]
"""Of every file, its tensors."""
Headers = Mapping[str, tuple[bytes, Mapping[str, int]]]
"""Of every file, how it begins, and where each tensor's data do."""


def save(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    shard_size: str | int = "5GB",
    memory: str | int = MEMORY,
    workers: int | None = None,
    executor: str = "threads",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a Hugging Face folder of safetensors, computing lazy tensors on the way.

    The bytes do not depend on `workers`, `executor` or `memory`. The folder appears under its name when it is complete.
    What was interrupted or killed goes on where it was when it is started again with the same inputs, and ends with
    the same bytes; what fails otherwise leaves nothing. `config.json`, tokenizer files and the like come along from the
    base model's folder, unless `checkpoint.files` has others; its code (`*.py`), which nobody has looked at, and its
    model card do not. `recipe.json`, which the files' metadata repeats, says how the weights were made, and
    `manifest.json` has a hash of every tensor and header.

    Args:
        checkpoint: what to write. Tied tensors are written once.
        folder: where to; must not exist, unless `overwrite`.
        shard_size: above this size the weights are divided into several files with an index; "5GB" or bytes.
        memory: a bound on the tensors in flight; "512MB" or bytes. One block of every model (2^18 elements) is held in
            any case. A tensor of a method that is not elementwise is computed whole, alone if it must.
        workers: threads or processes; one per core by default, or one thread for tensors that are small.
        executor: where the work is done: in "threads", in "processes", or by the nodes of a cluster ("ray").
        overwrite: replace what is there, if it was written here and is none of the inputs.

    Returns:
        The folder.

    Raises:
        InputError: where `folder` is a file, is not empty without `overwrite`, or cannot be written; for a wrong size,
            workers or executor; where a model changed meanwhile.
    """
    folder = Path(folder)
    check_writable(folder, overwrite=overwrite)
    check_inputs(folder, [checkpoint])
    shards = divide(checkpoint.specs, parse_bytes(shard_size))
    budget = parse_bytes(memory)
    check_workers(workers)
    if executor not in EXECUTORS:
        raise InputError(f"No executor is called '{executor}'. {did_you_mean(executor, EXECUTORS)}")
    before = stamps(checkpoint)
    with Partial(folder, _key(checkpoint, shards, before)) as partial:
        headers = _headers(checkpoint, shards, _recipe(checkpoint, hashed=False))
        _lay_out(checkpoint, shards, headers, partial)
        with past_cache(size_of(before) > free_memory() > 0):
            hashed = _write_tensors(checkpoint, headers, partial, budget, workers, executor)
            _finish(checkpoint, shards, partial.path, hashed)
        if stamps(checkpoint) != before:
            raise InputError("A model was changed while it was read: nothing was written. Start again.")
        check_writable(folder, overwrite=overwrite)  # again: another run may have come first
        partial.become()
    return folder


def check_writable(folder: Path, *, overwrite: bool) -> None:
    """An error where `folder` cannot become a new model folder; changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: name a folder to write to.")
    if folder.is_dir() and folder.resolve() in (here := Path.cwd(), *here.parents):  # it would be moved away
        raise InputError(f"'{folder}' is the folder you are in, or holds it: name another folder to write to.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"'{folder}' exists and is not empty: choose another folder, or say overwrite "
            "(--overwrite, or overwrite=true of fusionbench run)."
        )
    if folder.is_dir() and (lost := _not_ours(folder)):
        raise InputError(
            f"'{folder}' holds '{lost}', so it is no folder that was written here, and is not overwritten: "
            "choose another folder, or remove it yourself."
        )
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"'{folder}' cannot be written: '{parent}' is not a folder one may write to.")


def check_inputs(folder: str | Path, checkpoints: Iterable[Checkpoint | str | Path]) -> None:
    """An error where a new `folder` would take the place of one of these models, or of what they are made from."""
    place = Path(os.path.realpath(folder))
    for source in _sources(checkpoints):
        found = Path(os.path.realpath(source))
        if place == found or place in found.parents:
            raise InputError(f"'{folder}' holds the model '{source}', which is merged: choose another folder.")


def check_file(file: Path, what: str, beside: Path | None = None) -> None:
    """An error where `file`, which is to hold what is called `what`, cannot be written; changes nothing.

    `beside` is a folder that is written, too.
    """
    if beside is not None and os.path.realpath(file) == os.path.realpath(beside):
        raise InputError(f"{what}: '{file}' is the folder that is written; name a file beside it.")
    if file.is_dir():
        raise InputError(f"{what}: '{file}' is a folder; name a file, as {file / (what + (file.suffix or '.json'))}.")
    parent = next(parent for parent in file.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{what}: '{file}' cannot be written: '{parent}' is not a folder one may write to.")


def write_json(file: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Write JSON, all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def parse_bytes(size: str | int) -> int:
    """Bytes of "512MB", "5GB", "300KiB" or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if not match or not 0 < float(match[1]) < 1e18:
        raise InputError(f"'{size}' is not a size: write 512MB, 5GB or a number of bytes.")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def divide(specs: Mapping[str, Spec], shard_size: int) -> dict[str, dict[str, Spec]]:
    """Which tensors go to which file: `{file name: {tensor name: spec}}`, in file order."""
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    # Wide dtypes first keeps every tensor aligned, as readers that map the file expect.
    shards = [dict(sorted(shard.items(), key=lambda item: -DTYPES[item[1].dtype])) for shard in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def stamps(checkpoint: Checkpoint) -> list[Any]:
    """What tells whether inputs are still the same without reading them: size and time of files, hashes of others."""
    if checkpoint.inputs:
        return [[name, stamps(model)] for name, model in checkpoint.inputs.items()]
    if not checkpoint.location:
        return [checkpoint.digest]
    place = locate(checkpoint.location)
    if not place.exists():
        raise InputError(f"The model '{checkpoint.location}' is not there any more, or not from this folder.")
    if place.is_file():
        files = {place, *weight_files(place)}
    else:  # an adapter's base may be elsewhere
        folders = {place, checkpoint.folder or place}
        inside = (file for folder in folders if folder.is_dir() for file in folder.iterdir())
        files = {file for file in inside if file.suffix in READ and file.is_file()}
    found = [(file.name, file.stat()) for file in sorted(files)]
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found]


def _sources(checkpoints: Iterable[Checkpoint | str | Path]) -> Iterator[Path]:
    """Where models are, and those that they are made from."""
    for checkpoint in checkpoints:
        if not isinstance(checkpoint, Checkpoint):
            yield locate(checkpoint)
            continue
        if checkpoint.location:
            yield locate(checkpoint.location)
        if checkpoint.folder is not None:
            yield checkpoint.folder
        yield from _sources(checkpoint.inputs.values())


def _not_ours(folder: Path) -> str:
    """The name of what tells that a folder with something in it was not written by `save`, nor as an adapter."""
    inside = sorted(folder.iterdir())
    names = [path.name for path in inside]
    if {"recipe.json", "manifest.json"} <= {*names}:
        return next((path.name for path in inside if path.is_dir()), "")
    return next((name for name in names if name not in ADAPTER), "")


def size_of(inputs: list[Any]) -> int:
    """How many bytes the files have that `stamps` describes."""
    entries = [entry for entry in inputs if isinstance(entry, list)]
    return sum(size_of(entry[1]) if isinstance(entry[1], list) else entry[1] for entry in entries)


def _key(checkpoint: Checkpoint, shards: Shards, inputs: list[Any]) -> str:
    """What tells this work from other work; empty where a function is in it that has no name."""
    if checkpoint.inputs and "method" not in checkpoint.recipe:
        return ""
    tensors = {file: [[name, str(spec)] for name, spec in specs.items()] for file, specs in shards.items()}
    files = {
        name: None if file is None else xxhash.xxh3_128_hexdigest(_read(file)) for name, file in _files(checkpoint)
    }
    content = [fusionbench.__version__, checkpoint.provenance(hashed=False), inputs, tensors, files]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _headers(checkpoint: Checkpoint, shards: Shards, recipe: Mapping[str, Any]) -> Headers:
    metadata = {"format": "pt", "recipe": json.dumps(recipe), **checkpoint.aliases}
    return {file: header_bytes(specs, metadata) for file, specs in shards.items()}


def _recipe(checkpoint: Checkpoint, *, hashed: bool) -> dict[str, Any]:
    return {"fusionbench": fusionbench.__version__, **checkpoint.provenance(hashed=hashed)}


def _lay_out(checkpoint: Checkpoint, shards: Shards, headers: Headers, partial: Partial) -> None:
    """All files, at their full size: a full disk is found before anything is computed."""
    sizes = {
        file: len(headers[file][0]) + sum(spec.nbytes for spec in specs.values()) for file, specs in shards.items()
    }
    for file in partial.path.iterdir():
        if file.name not in (*sizes, JOURNAL):
            file.unlink()  # written again below: of a killed run it may be a part only, or have a name of its own
    present = {file.name: file.stat().st_size for file in partial.path.iterdir() if file.name != JOURNAL}
    if present and not (sizes.items() <= present.items() and _still_good(checkpoint, shards, headers, partial)):
        partial.restart()
    try:
        for file, size in sizes.items():
            descriptor = os.open(partial.path / file, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                _allocate(descriptor, size)
            finally:
                os.close(descriptor)
        write_json(partial.path / "recipe.json", _recipe(checkpoint, hashed=False))
        if checkpoint.new_config is not None:
            write_json(partial.path / "config.json", checkpoint.new_config, sort_keys=True)
        if len(shards) > 1:
            total_size = sum(spec.nbytes for spec in checkpoint.specs.values())
            weight_map = {name: file for file, specs in shards.items() for name in specs}
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            write_json(partial.path / "model.safetensors.index.json", index, sort_keys=True)
        for name, file in _files(checkpoint):
            if file is not None:
                (partial.path / name).write_bytes(_read(file))
        _carry_along(checkpoint.folder, partial.path, checkpoint.files)
        unknown = _manifest(dict.fromkeys(checkpoint.specs, PLACEHOLDER), dict.fromkeys(shards, PLACEHOLDER))
        write_json(partial.path / "manifest.json", unknown, sort_keys=True)
    except OSError as error:
        if error.errno in FULL:
            reason = f"The disk is full: the merged model needs {sum(sizes.values()):,} bytes."
            raise InputError(reason) from (error if partial.done else None)  # what is done stays
        raise


def _still_good(checkpoint: Checkpoint, shards: Shards, headers: Headers, partial: Partial) -> bool:
    """Keep in `partial.done` what is in the files as the journal says; whether a sample of it is what it should be."""
    partial.done = {name: digest for name, digest in partial.done.items() if name in checkpoint.specs}
    for file, specs in shards.items():
        offsets = headers[file][1]
        with open(partial.path / file, "rb") as stream:
            for name, spec in specs.items():
                if name in partial.done:
                    found: dict[int, bytes] = {}
                    size = DTYPES[spec.dtype]
                    for start in range(0, spec.numel, BLOCK):
                        stream.seek(offsets[name] + start * size)
                        data = np.frombuffer(stream.read(min(BLOCK, spec.numel - start) * size), np.uint8)
                        found.update(hashes(start, data, BLOCK * size))
                    if hash_of(found) != partial.done[name]:
                        del partial.done[name]
    computed = [name for name, spec in checkpoint.specs.items() if spec.floating and spec.numel]
    done = [name for name in computed if name in partial.done]
    sample = min(done, key=lambda name: checkpoint.specs[name].numel, default=None)
    return sample is None or checkpoint.hash(sample) == partial.done[sample]


def _write_tensors(
    checkpoint: Checkpoint,
    headers: Headers,
    partial: Partial,
    memory: int,
    workers: int | None,
    executor: str,
) -> dict[str, str]:
    """Compute what is not done yet, and write it at its place. Returns the hash of every tensor."""
    paths = {file: str(partial.path.absolute() / file) for file in headers}
    places = {name: (paths[file], offset) for file, (_, offsets) in headers.items() for name, offset in offsets.items()}
    units: list[Unit] = []
    found: dict[str, dict[int, bytes]] = {}
    left: dict[str, int] = {}
    at_once = workers or cores()
    for name in places:
        if name not in partial.done:
            mine = [(name, *block) for block in checkpoint.blocks(name, memory // at_once)]
            units += mine
            left[name], found[name] = len(mine), {}
            if not mine:
                partial.add(name, hash_of({}))
    if executor == "threads" and workers is None and sum(stop - start for _, start, stop in units) < SMALL * len(units):
        workers = 1
    writer = UnitWriter(checkpoint, places, memory if executor == "threads" else memory // at_once)
    groups = list(writer.together(units))
    for written in track(EXECUTORS[executor](writer, groups, workers), "writing", len(groups)):
        for name, known in written:
            found[name].update(known)
            left[name] -= 1
            if not left[name]:
                partial.add(name, hash_of(found.pop(name)))
    return partial.done


def _finish(checkpoint: Checkpoint, shards: Shards, folder: Path, tensors: Mapping[str, str]) -> None:
    """What is known only in the end, of the same lengths as what stood for it: hashes of the inputs and the output."""
    recipe = _recipe(checkpoint, hashed=True)
    headers = {}
    for file, (header, _) in _headers(checkpoint, shards, recipe).items():
        headers[file] = xxhash.xxh3_128_hexdigest(header)
        descriptor = os.open(folder / file, os.O_WRONLY)
        try:
            write_at(descriptor, memoryview(header), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    write_json(folder / "recipe.json", recipe)  # in the models' order, in which weights may be given
    write_json(folder / "manifest.json", _manifest(tensors, headers), sort_keys=True)


def _manifest(tensors: Mapping[str, str], headers: Mapping[str, str]) -> dict[str, Any]:
    said = f"XXH3-128 of the XXH3-128 of every {BLOCK} elements; of headers, XXH3-128"
    return {"hash": said, "tensors": dict(tensors), "headers": dict(headers)}


def _allocate(descriptor: int, size: int) -> None:
    """Set a file's size, on disk where the system can: a full disk is found before anything is computed."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in FULL:
            raise
        os.ftruncate(descriptor, size)


def _files(checkpoint: Checkpoint) -> list[tuple[str, File]]:
    for name in checkpoint.files:
        if Path(name).name != name or name in (*OWN, "..") or name.endswith(".safetensors"):
            raise ValueError(
                f"'{name}' cannot be given as a file of a checkpoint: it is in a folder, or written by save"
            )
    return sorted(checkpoint.files.items(), key=lambda item: item[0])


def _read(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from error


def _carry_along(source: Path | None, folder: Path, own: Collection[str]) -> None:
    if source is None or not (source / "config.json").is_file():
        return  # a lone file: what lies beside it need not be its own
    for pattern in CARRIED:
        for file in sorted(source.glob(pattern)):
            if not file.name.endswith(NOT_CARRIED) and not (folder / file.name).exists() and file.name not in own:
                try:
                    shutil.copyfile(file, folder / file.name)
                except OSError as error:
                    if error.errno in FULL:
                        raise
                    raise InputError(f"'{file}' cannot be copied to '{folder}': {error.strerror}.") from error
