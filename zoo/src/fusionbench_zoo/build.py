"""Make the vendored files from nothing: `python -m fusionbench_zoo.build clip-mini`."""

import argparse
import fcntl
import logging
import time
from importlib import import_module
from pathlib import Path

log = logging.getLogger("fusionbench_zoo")

STAGES = {
    "clip-mini": {
        "fetch": "fetch:fetch",
        "data": "clip_mini.split:build_data",
        "tokenizer": "clip_mini.tokenizer:train_tokenizer",
        "pretrain": "clip_mini.pretrain:pretrain",
        "finetune": "clip_mini.finetune:finetune_all",
        "vendor": "clip_mini.vendor:vendor",
        "seeds": "clip_mini.finetune:finetune_seeds",
    },
    "text": {"fetch": "fetch:fetch", "data": "text.data:build_data", "vendor": "text.vendor:vendor_tasks"},
    "gpt2-mini": {
        "pretrain": "text.gpt2:pretrain",
        "finetune": "text.gpt2:finetune",
        "vendor": "text.vendor:vendor_gpt2",
    },
    "t5-mini": {
        "pretrain": "text.t5:pretrain",
        "finetune": "text.t5:finetune",
        "adapters": "text.t5:finetune_lora",
        "vendor": "text.vendor:vendor_t5",
    },
    "minilm": {"finetune": "text.minilm:finetune", "vendor": "text.vendor:vendor_minilm"},
    "resnet-mini": {
        "data": "scenes.data:build_data",
        "pretrain": "scenes.train:pretrain",
        "finetune": "scenes.train:finetune_all",
        "vendor": "scenes.vendor:vendor",
    },
}
"""What each zoo is made by, in order: functions of the recipes, of the folder to work in and the seed."""
EXTRA = ("seeds",)  # run only when asked for
NEEDS = {"gpt2-mini": "text/data", "t5-mini": "text/data", "minilm": "text/data", "resnet-mini": "clip-mini/data"}


def main() -> None:
    """Run the stages whose output is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", choices=list(STAGES), help="what to make")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "fusionbench-zoo", help="where to work")
    parser.add_argument("--stage", nargs="+", help="only these (default: all but those that --list calls extra)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--list", action="store_true", help="tell which stages are complete, and stop")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stages = STAGES[arguments.zoo]
    made = [stage for stage in stages if stage not in EXTRA]
    unknown = [stage for stage in arguments.stage or () if stage not in stages]
    if unknown:
        raise SystemExit(f"{arguments.zoo} has no stage {unknown[0]}; there is: {', '.join(stages)}.")
    work = arguments.work.expanduser() / arguments.zoo
    work.mkdir(parents=True, exist_ok=True)
    lock = open(work / "lock", "w")  # held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"Another build is at work in {work}: wait for it, or give another --work.") from None
    for stage in sorted(arguments.stage or (stages if arguments.list else made), key=list(stages).index):
        done = work / f"{stage}.done"
        if arguments.list:
            state = "complete" if done.exists() else "to do"
            print(f"{stage:10} {state}{' (extra)' if stage in EXTRA else ''}")
        elif not done.exists():
            before = [f"{arguments.zoo}/{s}" for s in made[: list(stages).index(stage)]]
            needed = [NEEDS[arguments.zoo], *before] if arguments.zoo in NEEDS else before
            missing = [s for s in needed if not (work.parent / f"{s}.done").exists()]
            if missing:
                raise SystemExit(f"Stage {stage} needs the stages {', '.join(missing)}, which are not complete.")
            start = time.perf_counter()
            log.info("stage %s", stage)
            module, _, function = stages[stage].partition(":")  # they import torch and more: only when they run
            getattr(import_module(f"fusionbench_zoo.recipes.{module}"), function)(work, arguments.seed)
            done.write_text(f"{time.perf_counter() - start:.0f} seconds\n")
            log.info("stage %s took %s", stage, done.read_text().strip())


if __name__ == "__main__":
    main()
