"""The unit of work of `save`: a part of a tensor, computed and written at its place. Safe to do twice."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fusionbench.checkpoint import BLOCK, Checkpoint, hashes
from fusionbench.formats import DTYPES
from fusionbench.parallel import Budget, once
from fusionbench.param import buffers

Unit = tuple[str, int, int]
"""A tensor's name, and the first and last of its elements, flattened in C order."""
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

    def __call__(self, unit: Unit) -> tuple[str, dict[int, bytes]]:
        """Write a unit; the tensor's name, and the hashes of its blocks by their first elements."""
        name, start, stop = unit
        size = DTYPES[self.checkpoint.specs[name].dtype]
        needed, stored = (stop - start) * self.checkpoint.source.working_set(name), (stop - start) * size
        with self.budget.use(needed), buffers(1, stored) as (out,):
            data = self.checkpoint.as_stored(name, start, stop, out[:stored])
            file, offset = self.places[name]
            descriptor = os.open(file, os.O_WRONLY)
            try:
                write_at(descriptor, data.data, offset + start * size)
            finally:
                os.close(descriptor)
            return name, hashes(start, data, BLOCK * size)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at their place, whatever the number of calls that takes."""
    while data:
        written = os.pwrite(descriptor, data[:PIECE], offset)
        data, offset = data[written:], offset + written
