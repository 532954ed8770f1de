"""Hyperparameters for a family of the zoo: a small grid for each method, compared on calibration data.

    python benchmarks/choices.py FAMILY [--methods NAME ...] [--kept FOLDER]

The first of a method's settings is its defaults; the best is what the suites have as a row of its own. Test data are
not looked at: methods that adapt see the calibration inputs. What is measured is kept in the folder, a file for each
setting, so that it goes on after a stop. `tune=20` of `fusionbench run` searches by itself.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import fusionbench as fb
from fusionbench.results import key_of, label_of
from fusionbench.runner import evaluate
from fusionbench.writer import write_json

Settings = dict[str, Any]
GRID: dict[str, list[Settings]] = {
    "task_arithmetic": [{}, *({"scaling_factor": factor} for factor in (0.1, 0.2, 0.4, 0.5))],
    "ties_merging": [{}, *({"scaling_factor": factor} for factor in (0.1, 0.2, 0.5, 0.8))],
    "regmean": [{}, {"off_diagonal": 0.6}, {"off_diagonal": 0.9}, {"off_diagonal": 1.0}],
    "regmean_plus_plus": [{}, {"off_diagonal": 0.9}, {"off_diagonal": 1.0}],
    "adamerging": [{}, {"learning_rate": 1e-2, "steps": 300}],
    "smile_upscaling": [{}, {"gate_rank": 64, "rank": -1}, {"gate_rank": 64, "rank": -1, "others": "average"}],
    "we_moe": [{}, {"learning_rate": 1e-3, "steps": 300}, {"learning_rate": 1e-2, "steps": 300}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="a model pool and task pool of that name")
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID), help="only these")
    parser.add_argument("--kept", type=Path, default=Path("demo/choices"), help="folder to keep averages in")
    arguments = parser.parse_args()
    pool, tasks = fb.load_modelpool(arguments.family).load(), fb.load_taskpool(arguments.family)
    for method in arguments.methods:
        averages = []
        for settings in GRID[method]:
            name = {"modelpool": arguments.family, "method": method, "hyperparameters": settings}
            averages.append(average(pool, tasks, method, settings, arguments.kept / f"{key_of(name)}.json"))
            mark = "  (the default)" if not settings else ""
            print(f"{100 * averages[-1]:6.1f}  {label_of(name)}{mark}", flush=True)
        best = GRID[method][averages.index(max(averages))]
        print(f"        best: {label_of({'method': method, 'hyperparameters': best})}", flush=True)


def average(pool: fb.ModelPool, tasks: fb.TaskPool, method: str, settings: Settings, file: Path) -> float:
    """The mean score on calibration data, kept in a file."""
    if not file.exists():
        algorithm = fb.algorithm(method, **settings)
        if "split" in algorithm.method.hyperparameters:
            algorithm = fb.algorithm(method, **settings, split="calibration")
        scores = tasks.headline(evaluate(algorithm.run(pool, tasks), pool, tasks, split="calibration"))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"method": method, "settings": settings, "scores": scores})
    return json.loads(file.read_text())["scores"]["average"]


if __name__ == "__main__":
    main()
