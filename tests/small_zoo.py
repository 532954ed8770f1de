"""The zoo with its models as they are, and with a few examples of each task: minutes become seconds."""

from pathlib import Path

import fusionbench_zoo
import numpy as np

FEW = 8  # examples of each split
ZOO = Path(fusionbench_zoo.__file__).parent


def write_small_zoo(folder: Path, source: Path = ZOO) -> None:
    """Links to what has no examples, and copies of the first examples of what has some."""
    folder.mkdir(parents=True)
    for entry in source.iterdir():
        place = folder / entry.name
        if entry.suffix == ".jsonl":
            lines = entry.read_text().splitlines(keepends=True)
            test, calibration = ([line for line in lines if f'"split": "{s}"' in line] for s in ("test", "calibration"))
            place.write_text("".join(test[:FEW] + calibration[:FEW]))
        elif entry.suffix == ".npz":
            with np.load(entry) as arrays:
                np.savez(place, **{name: arrays[name][:FEW] for name in arrays.files})  # type: ignore[arg-type]
        elif entry.is_dir() and any(entry.rglob("*.jsonl")) | any(entry.rglob("*.npz")):
            write_small_zoo(place, entry)
        else:
            place.symlink_to(entry)
