"""Make the vendored files from nothing: `python -m fusionbench_zoo.build clip-mini`."""

import argparse
import fcntl
import logging
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("fusionbench_zoo")


def main() -> None:
    """Run the stages whose output is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", choices=["clip-mini"], help="what to make")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "fusionbench-zoo", help="where to work")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=MADE, help="only these; all but seeds")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--list", action="store_true", help="tell which stages are complete, and stop")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    work = arguments.work.expanduser()
    work.mkdir(parents=True, exist_ok=True)
    lock = open(work / "lock", "w")  # held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"Another build is at work in {work}: wait for it, or give another --work.") from None
    for stage in sorted(arguments.stage, key=list(STAGES).index):
        done = work / f"{stage}.done"
        if arguments.list:
            print(f"{stage:10} {'complete' if done.exists() else 'to do'}")
        elif not done.exists():
            missing = [s for s in MADE[: list(STAGES).index(stage)] if not (work / f"{s}.done").exists()]
            if missing:
                raise SystemExit(f"Stage {stage} needs the stages {', '.join(missing)}, which are not complete.")
            start = time.perf_counter()
            log.info("stage %s", stage)
            STAGES[stage](work, arguments.seed)
            done.write_text(f"{time.perf_counter() - start:.0f} seconds\n")
            log.info("stage %s took %s", stage, done.read_text().strip())


# The recipes import torch and more: each is imported when its stage runs.
def fetch(work: Path, seed: int) -> None:
    """Download, check and unpack the source packages."""
    from fusionbench_zoo.recipes.fetch import fetch

    fetch(work)


def data(work: Path, seed: int) -> None:
    """Draw all pictures and split them."""
    from fusionbench_zoo.recipes.split import build_data

    build_data(work, seed)


def tokenizer(work: Path, seed: int) -> None:
    """Learn the vocabulary from the captions."""
    from fusionbench_zoo.recipes.tokenizer import train_tokenizer

    train_tokenizer(work)


def pretrain(work: Path, seed: int) -> None:
    """Train the base model."""
    from fusionbench_zoo.recipes.pretrain import pretrain

    pretrain(work, seed)


def finetune(work: Path, seed: int) -> None:
    """Fine-tune the vision tower on each task."""
    from fusionbench_zoo.recipes.finetune import finetune_all

    finetune_all(work, seed)


def vendor(work: Path, seed: int) -> None:
    """Copy what is published into this package, and write its manifest."""
    from fusionbench_zoo.recipes.vendor import vendor

    vendor(work, Path(__file__).parent / "clip-mini", seed)


def seeds(work: Path, seed: int) -> None:
    """Fine-tune with two more seeds, to `models-1` and `models-2`: they measure deviations, and are not vendored."""
    from fusionbench_zoo.recipes.finetune import finetune_all

    for i in (1, 2):
        finetune_all(work, seed + i, f"models-{i}")


STAGES: dict[str, Callable[[Path, int], None]] = {
    stage.__name__: stage for stage in (fetch, data, tokenizer, pretrain, finetune, vendor, seeds)
}
MADE = [stage for stage in STAGES if stage != "seeds"]  # what makes the vendored files

if __name__ == "__main__":
    main()
