"""What this machine does at most: read a file that is in memory, write a new one, copy memory.

Files are read and written at their places in chunks of 0.5 MB, each thread with one buffer that it uses again, so that
little but the system call and its copy is timed. New files have their size set aside before. The best of several passes
counts, for seconds and for CPU seconds: other work on the machine only ever adds to them.

    python benchmarks/limits.py [--folder demo/bench] [--megabytes 256]
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 2**19
PASSES = 7
Rates = dict[str, tuple[float, float]]  # GB per wall second, GB per CPU second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo/bench"), help="on the disk that is measured")
    parser.add_argument("--megabytes", type=int, default=256)
    arguments = parser.parse_args()
    print(markdown(measure(arguments.folder, arguments.megabytes)), end="")


def measure(folder: Path, megabytes: int = 256) -> Rates:
    """Rates by what was done, by one thread and by one for every core."""
    folder.mkdir(parents=True, exist_ok=True)
    file, size, rates = folder / "limits.bin", megabytes * 2**20, Rates()
    try:
        for threads in dict.fromkeys((1, os.cpu_count() or 1)):
            by = f"{threads} thread{'s' * (threads > 1)}"
            rates[f"write, {by}"] = best(lambda n=threads: write(file, size, n), size)
            rates[f"read, {by}"] = best(lambda n=threads: read(file, size, n), size)
    finally:
        file.unlink(missing_ok=True)
    source, target = bytearray(b"\1") * size, bytearray(b"\2") * size  # not zeros, whose pages may be shared
    rates["memcpy"] = best(lambda: timed(lambda: copy(source, target)), size)
    return rates


def fastest(rates: Rates, what: str) -> float:
    """GB per CPU second of `read` or `write`, by as many threads as take the least."""
    return max(cpu for name, (_, cpu) in rates.items() if name.startswith(what))


def markdown(rates: Rates) -> str:
    rows = [f"| {name} | {wall:.1f} | {cpu:.1f} |" for name, (wall, cpu) in rates.items()]
    return "\n".join(["| | GB per second | GB per CPU second |", "|---|--:|--:|", *rows]) + "\n"


def best(measured: Callable[[], tuple[float, float]], size: int) -> tuple[float, float]:
    walls, cpus = zip(*(measured() for _ in range(PASSES)), strict=True)
    return size / min(walls) / 1e9, size / min(cpus) / 1e9


def write(file: Path, size: int, threads: int) -> tuple[float, float]:
    file.unlink(missing_ok=True)
    with open(file, "wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, size)
        return in_chunks(lambda buffer, place: os.pwrite(opened.fileno(), buffer, place), size, threads)


def read(file: Path, size: int, threads: int) -> tuple[float, float]:
    with open(file, "rb") as opened:
        return in_chunks(lambda buffer, place: os.preadv(opened.fileno(), [buffer], place), size, threads)


def in_chunks(operation: Callable[[bytearray, int], int], size: int, threads: int) -> tuple[float, float]:
    """Wall and CPU seconds of an operation on every chunk of a file; the threads take one after the other in turn."""
    buffers = [bytearray(os.urandom(CHUNK)) for _ in range(threads)]

    def part(thread: int) -> None:
        for place in range(thread * CHUNK, size, threads * CHUNK):
            operation(buffers[thread], place)

    with ThreadPoolExecutor(threads) as pool:
        return timed(lambda: list(pool.map(part, range(threads))))


def copy(source: bytearray, target: bytearray) -> None:
    memoryview(target)[:] = source


def timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
