"""Write a checkpoint to a folder: block by block, from many threads, the same bytes always, all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusionbench
from fusionbench.checkpoint import BLOCK, Checkpoint, as_bytes
from fusionbench.errors import InputError
from fusionbench.formats import DTYPES, Spec, header_bytes
from fusionbench.parallel import Budget, cores, in_order
from fusionbench.progress import track

# What belongs to a model besides its weights: configs, tokenizers, processors, licences.
CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
NOT_CARRIED = (".index.json", "recipe.json")


def save(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    shard_size: str | int = "5GB",
    memory: str | int = "512MB",
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a Hugging Face folder of safetensors, computing lazy tensors on the way.

    The bytes do not depend on `workers` or `memory`. The folder appears under its name when it is complete: what
    fails or is killed on the way leaves nothing there. `config.json`, tokenizer files and the like come along from the
    base model's folder; `recipe.json`, which the files' metadata repeats, says how the weights were made.

    Args:
        checkpoint: what to write. Tied tensors are written once.
        folder: where to; must not exist, unless `overwrite`.
        shard_size: above this size the weights are divided into several files with an index; "5GB" or bytes.
        memory: a bound on the tensors in flight; "512MB" or bytes. A tensor of a method that is not elementwise is
            computed whole, alone if it must.
        workers: threads; one per core by default.
        overwrite: replace what is there.

    Returns:
        The folder.
    """
    folder = Path(folder)
    check_writable(folder, overwrite=overwrite)
    recipe = {"fusionbench": fusionbench.__version__, **checkpoint.provenance()}
    shards = _divide(checkpoint.specs, parse_bytes(shard_size))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        _write_shards(checkpoint, shards, partial, recipe, parse_bytes(memory), workers or cores())
        write_json(partial / "recipe.json", recipe, sort_keys=True)
        if checkpoint.new_config is not None:
            write_json(partial / "config.json", checkpoint.new_config, sort_keys=True)
        _carry_along(checkpoint.folder, partial)
        check_writable(folder, overwrite=overwrite)  # again: another run may have come first
        _replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def check_writable(folder: Path, *, overwrite: bool) -> None:
    """An error where `folder` cannot become a new model folder; changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: name a folder to write to.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"'{folder}' exists and is not empty: choose another folder, or set overwrite=true.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"'{folder}' cannot be written: '{parent}' is not a folder one may write to.")


def check_file(file: Path, what: str) -> None:
    """An error where `file`, which is to hold what is called `what`, cannot be written; changes nothing."""
    if file.is_dir():
        raise InputError(f"{what}: '{file}' is a folder; name a file, as {file / f'{what}.json'}.")
    parent = next(parent for parent in file.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{what}: '{file}' cannot be written: '{parent}' is not a folder one may write to.")


def write_json(file: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Write JSON, all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")
    temporary.replace(file)


def parse_bytes(size: str | int) -> int:
    """Bytes of "512MB", "5GB", "300KiB" or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InputError(f"'{size}' is not a size: write 512MB, 5GB or a number of bytes.")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _divide(specs: dict[str, Spec], shard_size: int) -> dict[str, dict[str, Spec]]:
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


def _write_shards(
    checkpoint: Checkpoint,
    shards: dict[str, dict[str, Spec]],
    folder: Path,
    recipe: dict[str, Any],
    memory: int,
    workers: int,
) -> None:
    # Blocks shrink until all workers' fit into the memory; the results do not depend on them.
    per_element = max(checkpoint.source.working_set, 1)
    size = BLOCK
    while size > 4096 and size * per_element * workers > memory:
        size //= 2
    budget = Budget(memory)
    metadata = {"format": "pt", "recipe": json.dumps(recipe, sort_keys=True), **checkpoint.aliases}
    descriptors: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}  # tensor -> file descriptor, offset
    try:
        for file, specs in shards.items():
            header, offsets = header_bytes(specs, metadata)
            descriptor = descriptors[file] = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            total = len(header) + sum(spec.nbytes for spec in specs.values())
            _allocate(descriptor, total)
            _write_at(descriptor, memoryview(header), 0)
            places.update({name: (descriptor, offset) for name, offset in offsets.items()})

        def blocks() -> Iterator[tuple[str, int, int]]:
            for name in places:
                for start, stop in checkpoint.blocks(name, size):
                    yield name, start, stop

        def write(block: tuple[str, int, int]) -> None:
            name, start, stop = block
            with budget.use((stop - start) * per_element):
                descriptor, offset = places[name]
                data = as_bytes(checkpoint.read(name, start, stop))
                _write_at(descriptor, data, offset + start * DTYPES[checkpoint.specs[name].dtype])

        count = sum(1 for _ in blocks())
        for _ in track(in_order(write, blocks(), workers), "writing", count):
            pass
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    if len(shards) > 1:
        total_size = sum(spec.nbytes for spec in checkpoint.specs.values())
        weight_map = {name: file for file, specs in shards.items() for name in specs}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index, sort_keys=True)


def _allocate(descriptor: int, size: int) -> None:
    """Set a file's size, on disk where the system can: a full disk is found before anything is computed."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"The disk is full: the merged model needs {size:,} bytes.") from None
        os.ftruncate(descriptor, size)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:  # one call writes 2 GiB at most
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _carry_along(source: Path | None, folder: Path) -> None:
    if source is None or not (source / "config.json").is_file():
        return  # a lone file: what lies beside it need not be its own
    for pattern in CARRIED:
        for file in sorted(source.glob(pattern)):
            if not file.name.endswith(NOT_CARRIED) and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _replace(partial: Path, folder: Path) -> None:
    """Give the complete folder its name; an old one goes once the new one is there."""
    old = folder.parent / f".{folder.name}.{os.getpid()}.old"
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left behind, unless its process still runs."""
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        pid = leftover.name.split(".")[-2]
        if not (pid.isdigit() and _runs(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
