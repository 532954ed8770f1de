"""A folder that is not complete yet: what of it is done stands in a journal, and a second run goes on from there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
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
        self.folder, self.path = folder, folder.parent / f".{folder.name}.partial"
        self.done: dict[str, str] = {}
        self._key = key
        self._lock = threading.Lock()

    def __enter__(self) -> Partial:
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._journal)
            raise InputError(f"'{self.folder}' is being written by another process: wait for it, or stop it.") from None
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stays = isinstance(error, KeyboardInterrupt | OSError)
        if not stays:
            shutil.rmtree(self.path, ignore_errors=True)  # nothing is there when it has become the folder
        os.close(self._journal)

    def restart(self) -> None:
        """Begin anew, with nothing done."""
        for file in self.path.iterdir():
            if file.name != JOURNAL:
                file.unlink()
        os.ftruncate(self._journal, 0)
        self.done = {}
        self._write({"key": self._key})

    def add(self, name: str, digest: str) -> None:
        """A tensor is at its place."""
        self._write({"name": name, "hash": digest})
        self.done[name] = digest

    def become(self) -> None:
        """Give the complete folder its name; what had it goes once the new one is there."""
        (self.path / JOURNAL).unlink()
        old = self.folder.parent / f".{self.folder.name}.old"
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        try:
            self.path.rename(self.folder)
        except OSError:
            if old.exists():
                old.rename(self.folder)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _read(self) -> None:
        size = os.fstat(self._journal).st_size
        lines = os.pread(self._journal, size, 0).decode(errors="replace").split("\n")[:-1]  # the last may be torn
        try:
            entries = [json.loads(line) for line in lines]
            key = entries[0]["key"] if entries else None
            self.done = {entry["name"]: entry["hash"] for entry in entries[1:]}
        except (ValueError, KeyError, TypeError):
            key = None
        if key != self._key or not key:
            if key is not None:
                log.warning("'%s' was begun with other models or settings: it begins anew.", self.folder)
            self.restart()
            return
        os.ftruncate(self._journal, sum(len(line.encode()) + 1 for line in lines))

    def _write(self, entry: dict[str, str]) -> None:
        with self._lock:
            os.write(self._journal, json.dumps(entry).encode() + b"\n")
