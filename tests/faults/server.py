"""Run the command line many times in one process that forks: what it takes to start is paid once.

For every line on standard input, `{"words": [...], "inject": "..."}`, a child runs the words; a line of JSON answers
with its exit status (-9 for a child that was killed), what it printed, and how many calls of the injected kind it made.
"""

import ctypes
import json
import os
import sys
import tempfile
from importlib import import_module
from typing import NoReturn


def answer(words: list[str], inject: str | None, library: ctypes.CDLL) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as counted:
        child = os.fork()
        if not child:
            _run(words, inject, library, out.fileno(), err.fileno(), counted.fileno())
        _, status = os.waitpid(child, 0)
        for file in (out, err, counted):
            file.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "out": out.read().decode(),
            "err": err.read().decode(),
            "calls": int(counted.read() or 0),
        }


def _run(words: list[str], inject: str | None, library: ctypes.CDLL, out: int, err: int, counted: int) -> NoReturn:
    from fusionbench.cli import main

    status = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        if inject:
            library.inject(inject.encode())
        try:
            status = main(words)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        calls = library.injected()
        library.inject(b"none - 1 1 EIO")
        os.write(counted, str(calls).encode())
    finally:
        os._exit(status)


if __name__ == "__main__":
    for name in ("commands", "config", "file_commands", "methods", "verify", "writer"):
        import_module(f"fusionbench.{name}")
    loaded = ctypes.CDLL(os.environ["LD_PRELOAD"])
    loaded.injected.restype = ctypes.c_long
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(asked["words"], asked.get("inject"), loaded)), flush=True)
