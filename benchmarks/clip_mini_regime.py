"""Is clip-mini in the regime of the paper, where merging means something?

With g = (accuracy - base) / (individual - base), averages over the eight tasks on test data, prints for every seed of
the fine-tunes: base, individual, simple average, task arithmetic and TIES with the scaling factor that is best on
calibration data, and RegMean (Jin et al., 2023) with the share of the off-diagonal that is best there; then mean and
deviation over the seeds.

    python benchmarks/clip_mini_regime.py [--seeds FOLDER ...] [--pictures docs/images]

The vendored fine-tunes are seed 0; `python -m fusionbench_zoo.build clip-mini --stage seeds` makes others, each a
folder of `<task>.safetensors`.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import fusionbench as fb
from fusionbench.architectures import clip_vision

FACTORS = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
EXAMPLES = 512  # of each task, for RegMean's Gram matrices
OFF_DIAGONALS = [0.9, 0.95, 0.99, 1.0]
TIES_FACTORS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5]
ROWS = ["base", "individual", "simple_average", "task_arithmetic", "ties_merging", "regmean"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=Path, nargs="*", default=[], help="folders of more fine-tunes")
    parser.add_argument("--pictures", type=Path, help="folder for the curves of the vendored fine-tunes")
    arguments = parser.parse_args()
    tasks, pools = fb.load_taskpool("clip-mini"), [fb.load_modelpool("clip-mini")]
    for folder in arguments.seeds:
        models = {task: folder / f"{task}.safetensors" for task in tasks}
        pools.append(fb.ModelPool(models, "zoo:clip-mini/base", architecture=clip_vision))
    gains: dict[str, list[float]] = {row: [] for row in ROWS}
    accuracies: dict[str, list[float]] = {row: [] for row in ROWS}
    for seed, pool in enumerate(pools):
        scores, chosen = measure(pool.load(), tasks)
        print(f"\nseed {seed:<11}" + "".join(f"{task:>15}" for task in (*tasks, "average", "g")))
        for row in ROWS:
            accuracies[row].append(100 * scores[row]["average"])
            gains[row].append(gain(scores, row))
            numbers = [f"{100 * value:15.1f}" for value in scores[row].values()]
            print(
                f"{row:<16}"[:16] + "".join(numbers)[10:] + f"{gains[row][-1]:15.2f}  {chosen.get(row, '')}", flush=True
            )
    print(f"\n{len(pools)} seeds{'':<10}{'average':>16}{'g':>16}")
    for row in ROWS:
        print(f"{row:<16}{mean_and_deviation(accuracies[row], 1):>18}{mean_and_deviation(gains[row], 2):>18}")
    if arguments.pictures is not None:
        curves(pools[0].load(), tasks, arguments.pictures)


def gain(scores: dict[str, dict[str, float]], row: str) -> float:
    base, individual = scores["base"]["average"], scores["individual"]["average"]
    return (scores[row]["average"] - base) / (individual - base)


def mean_and_deviation(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def measure(pool: fb.ModelPool, tasks: fb.TaskPool) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Test accuracies of every row, and the scaling factors that calibration data chose."""

    def score(checkpoint: fb.Checkpoint, split: str = "test") -> dict[str, float]:
        return tasks.headline(tasks.evaluate(pool.build(checkpoint), split))

    def best(merge: Callable[[float], fb.Checkpoint], factors: list[float]) -> tuple[float, fb.Checkpoint]:
        factor = max(factors, key=lambda f: score(merge(f), "calibration")["average"])
        return factor, merge(factor)

    ta_factor, ta = best(lambda f: fb.methods.task_arithmetic(pool, scaling_factor=f), FACTORS)
    ties_factor, ties = best(lambda f: fb.methods.ties_merging(pool, scaling_factor=f), TIES_FACTORS)
    grams = {name: gram_matrices(pool.build(name), tasks[name], EXAMPLES) for name in pool}
    off_diagonal, regressed = best(lambda share: regmean(pool, grams, share), OFF_DIAGONALS)
    scores = {
        "base": score(pool.require_base()),
        "individual": tasks.headline(tasks.evaluate(pool.build)),
        "simple_average": score(fb.methods.simple_average(pool)),
        "task_arithmetic": score(ta),
        "ties_merging": score(ties),
        "regmean": score(regressed),
    }
    chosen = {
        "task_arithmetic": f"scaling_factor={ta_factor}",
        "ties_merging": f"scaling_factor={ties_factor}",
        "regmean": f"off_diagonal={off_diagonal}",
    }
    return scores, chosen


def regmean(pool: fb.ModelPool, grams: Mapping[str, dict[str, Tensor]], off_diagonal: float) -> fb.Checkpoint:
    """Linear layers by the closed form W = (sum G_i)^-1 sum G_i W_i, all else averaged: for this check."""

    def merge(p: fb.Param) -> Tensor:
        if p.name not in grams[next(iter(pool))]:
            return p.models.mean(0)
        left, right = torch.zeros(()).double(), torch.zeros(()).double()
        for name, weight in zip(pool, p.models.double(), strict=True):
            gram = grams[name][p.name]
            gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
            left, right = left + gram, right + gram @ weight.T
        damping = 1e-6 * left.diagonal().mean() * torch.eye(len(left))
        return torch.linalg.solve(left + damping, right).T.float()

    return pool.map(merge)


def gram_matrices(model: nn.Module, task: fb.Task, examples: int) -> dict[str, Tensor]:
    """X^T X / n of every linear layer's inputs, by the name of its weight in the pool."""
    found: dict[str, Tensor] = {}
    seen = dict.fromkeys((f"{clip_vision.PREFIX}{n}.weight" for n, m in model.named_modules() if _linear(m)), 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            seen[name] += len(x)
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    handles = [
        module.register_forward_hook(watch(f"{clip_vision.PREFIX}{name}.weight"))
        for name, module in model.named_modules()
        if _linear(module)
    ]
    with torch.no_grad():
        inputs, _ = next(iter(task.batches("calibration", examples, seed=0)))
        task.predict(model, inputs)
    for handle in handles:
        handle.remove()
    return {name: gram / seen[name] for name, gram in found.items()}


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def curves(pool: fb.ModelPool, tasks: fb.TaskPool, folder: Path) -> None:
    """Draw accuracy against the scaling factor, and against the number of merged models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def average(checkpoint: fb.Checkpoint, names: list[str]) -> float:
        model = pool.build(checkpoint)
        return 100 * statistics.mean(tasks[name].score(model)[tasks[name].primary] for name in names)

    everything = list(tasks)
    individual = {name: 100 * tasks[name].score(pool.build(name))["accuracy"] for name in everything}
    base = {name: 100 * tasks[name].score(pool.build(pool.require_base()))["accuracy"] for name in everything}
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, factors, mark in (
        ("task_arithmetic", [0.0, *FACTORS], "o"),
        ("ties_merging", [0.0, *TIES_FACTORS], "s"),
    ):
        merge = getattr(fb.methods, method)
        values = [average(merge(pool, scaling_factor=factor), everything) for factor in factors]
        print(f"{method}: " + ", ".join(f"{f:g}: {v:.1f}" for f, v in zip(factors, values, strict=True)), flush=True)
        axes.plot(factors, values, marker=mark, label=method)
    axes.axhline(
        average(fb.methods.simple_average(pool), everything), color="grey", linestyle="--", label="simple_average"
    )
    axes.axhline(statistics.mean(individual.values()), color="black", linestyle=":", label="individual")
    axes.set(xlabel="scaling factor", ylabel="average test accuracy, %", title="clip-mini: accuracy and scaling factor")
    axes.legend()
    figure.savefig(folder / "clip-mini-scaling.png", dpi=150)

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    counts = range(1, len(everything) + 1)
    around = random.Random(0).sample(everything, len(everything)) * 2
    # Windows around a circle: every task is in as many subsets as any other, or one more.
    subsets = {k: [around[i : i + k] for i in range(0, len(everything), 2)] for k in counts}
    subsets[len(everything)] = [everything]
    for method, mark in (("simple_average", "o"), ("task_arithmetic", "s"), ("ties_merging", "^")):
        merge = getattr(fb.methods, method)
        values = []
        for k in counts:
            kept = []
            for names in subsets[k]:
                part = fb.ModelPool({n: pool[n] for n in names}, pool.base, architecture=clip_vision)
                kept.append(average(merge(part), names) / statistics.mean(individual[n] for n in names))
            values.append(100 * statistics.mean(kept))
        print(
            f"{method}: " + ", ".join(f"{k} models: {v:.1f}" for k, v in zip(counts, values, strict=True)), flush=True
        )
        axes.plot(list(counts), values, marker=mark, label=f"{method}, default hyperparameters")
    floor = [
        100
        * statistics.mean(
            statistics.mean(base[n] for n in s) / statistics.mean(individual[n] for n in s) for s in subsets[k]
        )
        for k in counts
    ]
    axes.plot(list(counts), floor, color="grey", linestyle="--", label="base")
    title = "clip-mini: what is left of the individual models' accuracy"
    axes.set(xlabel="merged models (mean of four subsets)", ylabel="% of individual, on the merged tasks", title=title)
    axes.legend()
    figure.savefig(folder / "clip-mini-models.png", dpi=150)


if __name__ == "__main__":
    main()
