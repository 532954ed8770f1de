"""Every method on one family of the zoo: with its defaults, and with what is best of a small grid on calibration data.

    python benchmarks/all_methods.py FAMILY [--methods NAME ...] [--results FOLDER]

Test labels choose nothing: methods that adapt see the calibration inputs while they are compared, and the test inputs,
without labels, for the score that is reported. What is measured is kept in the folder, a file for each setting, so that
it goes on after a stop, and several processes can share the work. Prints a table in Markdown, with
g = (score - pretrained) / (individual - pretrained) of averages, the seconds that fusion took, and the parameters
that are more than one model's.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import fusionbench as fb
from fusionbench.cost import added_parameters
from fusionbench.runner import evaluate

Settings = dict[str, Any]
# The first is the paper's defaults, but for Concrete methods, whose 2,000 steps would take an hour on one core: these
# learn faster, in 300.
GRID: dict[str, list[Settings]] = {
    "pretrained": [{}],
    "simple_average": [{}],
    "fisher_merging": [{}],
    "task_arithmetic": [{}, *({"scaling_factor": factor} for factor in (0.1, 0.2, 0.4, 0.5))],
    "ties_merging": [{}, *({"scaling_factor": factor} for factor in (0.1, 0.2, 0.5, 0.8))],
    "regmean": [{}, {"off_diagonal": 0.9}, {"off_diagonal": 1.0}],
    "regmean_plus_plus": [{}, {"off_diagonal": 0.9}, {"off_diagonal": 1.0}],
    "adamerging": [{}, {"learning_rate": 1e-2, "steps": 300}],
    "concrete_task_arithmetic": [{"steps": 300, "learning_rate": 0.1}],
    "concrete_adamerging": [{"mask_steps": 100, "steps": 200, "mask_learning_rate": 0.1, "learning_rate": 1e-2}],
    "simple_ensemble": [{}],
    "max_model_predictor": [{}],
    "smile_upscaling": [{}, {"gate_rank": 64, "rank": -1}, {"gate_rank": 64, "rank": -1, "others": "average"}],
    "we_moe": [{}, {"learning_rate": 1e-3, "steps": 300}, {"learning_rate": 1e-2, "steps": 300}],
    "individual": [{}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="a model pool and task pool of that name")
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID), help="only these")
    parser.add_argument("--results", type=Path, default=Path("demo/all_methods"), help="folder to keep results in")
    arguments = parser.parse_args()
    study = Study(arguments.family, arguments.results / arguments.family)
    rows = []
    for method in arguments.methods:
        try:
            best = max(GRID[method], key=lambda settings: study.score(method, settings, "calibration")["average"])
            for settings in [GRID[method][0], *([best] if best != GRID[method][0] else [])]:
                rows.append((method, settings, study.measured(method, settings, "test")))
                print(method, settings, f"{100 * rows[-1][2]['scores']['average']:.1f}", flush=True)
        except fb.InputError as error:
            print(f"{method} does not apply: {error}", flush=True)
    print("\n" + table(rows, study))


class Study:
    """Settings of methods on one family, each measured once."""

    def __init__(self, family: str, folder: Path) -> None:
        self.pool, self.tasks, self.folder = fb.load_modelpool(family).load(), fb.load_taskpool(family), folder

    def score(self, method: str, settings: Settings, split: str) -> dict[str, float]:
        """Scores by task, and their average; not computed where there is nothing to choose."""
        if split == "calibration" and len(GRID[method]) == 1:
            return {"average": 0.0}
        return self.measured(method, settings, split)["scores"]

    def measured(self, method: str, settings: Settings, split: str) -> dict[str, Any]:
        """Scores, seconds and parameters of a setting, on a split."""
        key = hashlib.sha256(json.dumps([method, settings, split], sort_keys=True).encode()).hexdigest()[:12]
        file = self.folder / f"{method}-{split}-{key}.json"
        if file.exists():
            return json.loads(file.read_text())
        found = self._measure(method, settings, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".partial").write_text(json.dumps(found, indent=1))
        file.with_suffix(".partial").rename(file)
        return found

    def _measure(self, method: str, settings: Settings, split: str) -> dict[str, Any]:
        algorithm = fb.algorithm(method, **settings)
        if "split" in algorithm.method.hyperparameters:
            algorithm = fb.algorithm(method, **settings, split=split)
        start = time.perf_counter()
        result = algorithm.run(self.pool, self.tasks)
        if isinstance(result, fb.Checkpoint):  # computed here, and not in the evaluation
            result = fb.Checkpoint.of(dict(result), folder=self.pool.reference.folder)
        seconds = time.perf_counter() - start
        scores = self.tasks.headline(evaluate(result, self.pool, self.tasks, split=split))
        added = added_parameters(result, self.pool)
        return {"settings": settings, "scores": scores, "seconds": seconds, "added_parameters": added}


def table(rows: list[tuple[str, Settings, dict[str, Any]]], study: Study) -> str:
    """Markdown, scores in percent."""
    base, best = (study.measured(m, {}, "test")["scores"]["average"] for m in ("pretrained", "individual"))
    columns = [*study.tasks, "average", "g", "seconds", "parameters"]
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for method, settings, found in rows:
        words = ", ".join(f"{name}={value}" for name, value in settings.items())
        scores = found["scores"]
        cells = [f"{100 * scores[name]:.1f}" for name in columns[:-3]]
        cells.append(f"{(scores['average'] - base) / (best - base):.2f}")
        cells += [f"{found['seconds']:.0f}", f"{found['added_parameters'] / 1e6:+.1f}M"]
        label = f"{method} ({words})" if words else method
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
