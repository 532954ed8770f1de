"""A folder that is not complete yet: what of it is done stands in a journal, and a second run goes on from there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from types import TracebackType

from fusionbench.errors import InputError

JOURNAL = "journal"
log = logging.getLogger(__name__)


class Partial:
    """`.NAME.partial` beside the folder that is to be, held by one process at a time.

    It stays when the work is interrupted, killed or fails for want of something outside, and the next run of the same
    work finds in `done` what need not be done again: `{tensor: hash of its bytes}`. It goes when the work cannot be
    done as it is, and when it is done.

    Args:
        folder: what it becomes.
        key: of the work; empty for what cannot be told from other work, and begins anew.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._place = folder, Path(os.path.realpath(folder))  # of a link, where it points to
        self.path = self._place.parent / f".{self._place.name}.partial"
        self.done: dict[str, str] = {}
        self._key = key
        self._locked: list[int] = []  # descriptors; closing them gives the locks back

    def __enter__(self) -> Partial:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The folder too, which keeps its lock when its journal has gone, until it has its name.
            self._lock(os.open(self.path, os.O_RDONLY))
            self._journal = os.open(self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._lock(self._journal)
            self._read()
        except BaseException as error:
            self._unlock()
            if isinstance(error, OSError):
                raise self._refused(error) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        outside = isinstance(error, OSError) or error is not None and isinstance(error.__cause__, OSError)
        if error is not None and not outside and not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()
        if isinstance(error, OSError):
            raise self._refused(error) from error

    def restart(self) -> None:
        """Begin anew, with nothing done."""
        for file in self.path.iterdir():
            if file.name != JOURNAL:
                file.unlink()
        os.ftruncate(self._journal, 0)
        self.done = {}
        self._write(json.dumps({"key": self._key}))

    def add(self, name: str, digest: str) -> None:
        """A tensor is at its place."""
        self._write(f'{{"name": {json.dumps(name)}, "hash": {json.dumps(digest)}}}')
        self.done[name] = digest

    def become(self) -> None:
        """Give the complete folder its name; what had it goes once the new one is there."""
        (self.path / JOURNAL).unlink()
        old = self._place.parent / f".{self._place.name}.old"
        if self._place.exists():
            shutil.rmtree(old, ignore_errors=True)
            self._place.rename(old)
        try:
            self.path.rename(self._place)
        except OSError:
            if old.exists():
                old.rename(self._place)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _lock(self, descriptor: int) -> None:
        self._locked.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"'{self.folder}' is being written by another process: wait for it, or stop it.") from None
        except OSError:
            pass  # not every file system has locks, or has them for folders

    def _unlock(self) -> None:
        for descriptor in self._locked:
            os.close(descriptor)

    def _refused(self, error: OSError) -> InputError:
        file = f" ('{error.filename}')" if error.filename else ""
        reason = f"'{self.folder}' cannot be written: {error.strerror}{file}."
        return InputError(f"{reason} What is done is kept for the same command.")

    def _read(self) -> None:
        size = os.fstat(self._journal).st_size
        lines = os.pread(self._journal, size, 0).split(b"\n")[:-1]  # the last may be torn
        try:
            entries = [json.loads(line) for line in lines]
            key = entries[0]["key"] if entries else None
            self.done = {entry["name"]: entry["hash"] for entry in entries[1:]}
        except (ValueError, KeyError, TypeError, RecursionError):
            key = None
        if key != self._key or not key:
            if key is not None:
                log.warning("'%s' was begun with other models or settings: it begins anew.", self.folder)
            self.restart()
            return
        os.ftruncate(self._journal, sum(len(line) + 1 for line in lines))

    def _write(self, entry: str) -> None:
        line = entry.encode() + b"\n"
        while line:
            line = line[os.write(self._journal, line) :]
