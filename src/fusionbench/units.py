"""The units of work of `save`: parts of tensors, computed and written at their places. Safe to do twice."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from fusionbench.checkpoint import Checkpoint
from fusionbench.formats import DTYPES
from fusionbench.parallel import Budget, once
from fusionbench.param import buffers
from fusionbench.sources import BLOCK, PART, hashes

Unit = tuple[str, int, int]
"""A tensor's name, and the first and last of its elements, flattened in C order."""
CALL = 2**12  # elements that are computed while a unit is begun and ended
PIECE = 2**19  # bytes: at 8 MB a call, writing a new file took five times as long (Linux 6.18, ext4)


@dataclass
class UnitWriter:
    """Computes units and writes them; may be sent to other processes and machines that share the files.

    Attributes:
        checkpoint: gives the tensors.
        places: of a tensor, the file, and where in it its data begin.
        memory: bytes that may be in use at once, in one process.
    """

    checkpoint: Checkpoint
    places: dict[str, tuple[str, int]]
    memory: int

    @once
    def budget(self) -> Budget:
        """Of this process."""
        return Budget(self.memory)

    def __call__(self, units: Sequence[Unit]) -> list[tuple[str, dict[int, bytes]]]:
        """Write units of one file; of each, the tensor's name, and the hashes of its blocks by their first elements."""
        source = self.checkpoint.source
        needed = max((stop - start) * source.working_set(name) for name, start, stop in units)
        with self.budget.use(needed):
            descriptor = os.open(self.places[units[0][0]][0], os.O_WRONLY)
            try:
                return [(unit[0], self._write(descriptor, *unit)) for unit in units]
            finally:
                os.close(descriptor)

    def _write(self, descriptor: int, name: str, start: int, stop: int) -> dict[int, bytes]:
        size = DTYPES[self.checkpoint.specs[name].dtype]
        stored = (stop - start) * size
        known: dict[int, bytes] = {}
        with (
            buffers(1, stored) as (out,),
            closing(self.checkpoint.pieces_as_stored(name, start, stop, out[:stored])) as pieces,
        ):
            for first, data in pieces:
                offset = self.places[name][1] + first * size
                write_at(descriptor, data.data, offset)
                if len(data) >= PIECE:
                    begin_writing(descriptor, offset, len(data))
                known.update(hashes(first, data, BLOCK * size))
        return known

    def together(self, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """Units in groups that are worth a call: each of one file, and of no more than a part, or of one unit."""
        group: list[Unit] = []
        cost, file = 0, ""
        for unit in units:
            name, start, stop = unit
            more = stop - start + CALL
            if group and (cost + more > PART or self.places[name][0] != file):
                yield group
                group, cost = [], 0
            group.append(unit)
            cost, file = cost + more, self.places[name][0]
        if group:
            yield group


# Of the C library, on Linux: Python has no name for it.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and wait for nothing


def begin_writing(descriptor: int, offset: int, size: int) -> None:
    """Have the system bring bytes of a file to the disk from now on: `fsync`, which says if it could, waits less."""
    if _sync_file_range:
        _sync_file_range(descriptor, offset, size, WRITE)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at their place, whatever the number of calls that takes."""
    while data:
        written = os.pwrite(descriptor, data[:PIECE], offset)
        data, offset = data[written:], offset + written
