"""Reading past the page cache: of inputs larger than memory, which would only push each other out of it."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096  # what offsets, lengths and buffers are multiples of
CHUNK = 2**22  # bytes
_own = threading.local()
_enabled = False

Reader = Callable[[int, int, memoryview], int]
"""Reads what fits at once of a file's bytes, from an offset, into a buffer; how many they are, 0 at the end."""


def free_memory() -> int:
    """Bytes that programs and the page cache may still take; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


@contextmanager
def past_cache(when: bool) -> Iterator[None]:
    """A context in which this process reads models past the page cache, if it is to."""
    global _enabled
    before, _enabled = _enabled, when
    try:
        yield
    finally:
        _enabled = before


def open_to_read(path: str | Path) -> tuple[int, Reader]:
    """A descriptor, and what reads from it: past the page cache where that is wanted, and the file system can."""
    if _enabled:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), _read_direct
        except (AttributeError, OSError):
            pass  # not every system and file system has that: the cache does as well, but slower
    return os.open(path, os.O_RDONLY), _read


def _read(descriptor: int, offset: int, out: memoryview) -> int:
    return os.preadv(descriptor, [out], offset)


def _read_direct(descriptor: int, offset: int, out: memoryview) -> int:
    if not hasattr(_own, "buffer"):
        _own.buffer = mmap.mmap(-1, CHUNK)
    first = offset % PAGE
    wanted = min(-(-(first + len(out)) // PAGE) * PAGE, CHUNK)
    with memoryview(_own.buffer) as buffer, buffer[:wanted] as part:
        count = max(os.preadv(descriptor, [part], offset - first) - first, 0)
        count = min(count, len(out))
        out[:count] = part[first : first + count]
    return count
