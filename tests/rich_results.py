"""A folder of made-up results with every kind of run that a report has a place for."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionbench.registry import get_method
from fusionbench.results import Result, Results, key_of

CLIP = ("mnist", "fashion-mnist", "animals", "climate", "icons", "emoji", "letters", "house-numbers")
T5 = ("spam", "sentiment", "domain", "verse")
QUALITY = {  # how much of the gap is closed
    "pretrained": 0.0, "individual": 1.0, "simple_average": 0.42, "task_arithmetic": 0.5, "ties_merging": 0.55,
    "simple_ensemble": 0.5, "fisher_merging": 0.45, "regmean": 0.7, "regmean_plus_plus": 0.74, "dare": 0.49,
    "breadcrumbs": 0.53, "model_stock": 0.4, "adamerging": 0.78, "concrete_adamerging": 0.81, "we_moe": 0.93,
    "smile_upscaling": 0.9,
}  # fmt: skip
ADDED = {
    "individual": 7 * 1_823_232,
    "simple_ensemble": 7 * 1_823_232,
    "we_moe": 6_400_000,
    "smile_upscaling": 2_100_000,
}
SECONDS = {"regmean": 21.0, "regmean_plus_plus": 44.0, "fisher_merging": 18.0, "adamerging": 310.0, "we_moe": 420.0,
           "concrete_adamerging": 700.0, "smile_upscaling": 3.1}  # fmt: skip
CORRUPTIONS = ("motion_blur", "impulse_noise", "gaussian_noise", "pixelate", "spatter", "contrast", "jpeg_compression")


def add(
    results: Results,
    method: str,
    *,
    pool: str = "clip-mini",
    every: Sequence[str] = CLIP,
    models: Sequence[str] | None = None,
    tasks: str = "models",
    corruption: str | None = None,
    severity: int | None = None,
    seed: int | None = None,
    why: str = "",
    quality: float | None = None,
    tune: int | None = None,
    found: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> Result:
    """Keep a made-up result of a method on a pool."""
    cell = {"modelpool": pool, "method": method, "hyperparameters": hyperparameters,
            "models": None if models is None else list(models), "tasks": tasks, "corruption": corruption,
            "severity": severity, "seed": seed, "tune": tune}  # fmt: skip
    chance = random.Random(key_of(cell))
    merged = every if models is None else models
    report: dict[str, Any] = {}
    for name in every if tasks == "all" else merged:
        low = 0.3 + 0.4 * random.Random(name).random()
        high = low + (0.97 - low) * (0.6 + 0.4 * random.Random(name + "!").random())
        closed = QUALITY.get(method, 0.5) if quality is None else quality
        if method not in ("pretrained", "individual"):
            closed *= 1.25 - 0.05 * len(merged)
            closed = closed if name in merged else 0.25 - 0.6 * closed * random.Random(method + name).random()
            closed += 0.1 * (chance.random() - 0.5)
        score = low + (high - low) * closed
        hurt = 1 - 0.09 * (severity or 0) * (0.4 + random.Random(str(corruption)).random())
        report[name] = {"accuracy": round(0.1 + (score - 0.1) * hurt, 4), "loss": round(2 - 2 * score, 6)}
    settings = {name: h.default for name, h in _known(method).items()}
    settings |= hyperparameters | ({} if seed is None else {"seed": seed}) | (found or {})
    content = {"accuracy": sum(scores["accuracy"] for scores in report.values()) / len(report)}
    primary = dict.fromkeys(report, "accuracy")
    report["model_info"] = {"all_params": 1_823_232 + ADDED.get(method, 0) * len(merged)}
    report["average"] = content
    report["run"] = {
        "method": method,
        "hyperparameters": settings,
        "modelpool": {n: {"location": f"zoo:{pool}/{n}", "xxh3": key_of([pool, n]) * 2} for n in ("base", *merged)},
        "taskpool": {
            name: {"kind": "zero_shot_classification", "version": 1, "classes": 10, "data": key_of([name]) * 4}
            | ({"corruption": [corruption, severity]} if corruption else {})
            for name in primary
        },
        "versions": {"python": "3.11.7", "fusionbench": "0.1.0", "torch": "2.13.0+cpu"},
        "threads": 1,
        "seconds": {"fusion": 300.0, "evaluation": 20.1},
        "cpu_seconds": {"fusion": round(SECONDS.get(method, 0.05) * (0.8 + 0.4 * chance.random()), 3), "evaluation": 9},
        "peak_memory_mb": round(430 + 900 * chance.random() * (method in SECONDS), 1),
        "added_parameters": ADDED.get(method, 0),
        **({"why": why} if why else {}),
        **({"tuned": {"on": "calibration", "trials": tune, "given": 0.5, "best": 0.6}} if tune else {}),
    }
    return results.add(key_of([cell, report]), cell, report, primary, {})


def rich(folder: Path) -> Results:
    """Leaderboards, seeds, chosen hyperparameters, sweeps, corruptions, numbers of models, unseen tasks, failures."""
    results = Results(folder)
    for method in QUALITY:
        add(results, method)
    for seed in (1, 2, 3):
        add(results, "dare", seed=seed, density=0.2)
    why = "the best of a search on calibration data, 20 trials"
    add(results, "ties_merging", quality=0.61, why=why, scaling_factor=0.45, density=0.3)
    add(results, "task_arithmetic", quality=0.56, tune=20, found={"scaling_factor": 0.3712345})
    for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10):  # 0.3 is the default
        add(results, "task_arithmetic", quality=0.55 - 0.9 * (i / 10 - 0.35) ** 2, scaling_factor=i / 10)
        for density in (0.1, 0.3):
            quality = 0.5 + density / 3 - 0.5 * (i / 10 - 0.5) ** 2
            add(results, "ties_merging", quality=quality, scaling_factor=i / 10, density=density)
    for i in range(5):
        add(results, "dare", quality=0.3 + 0.05 * i, density=10.0 ** (i - 4), scaling_factor=0.3)
    four = CLIP[:4]
    for method in ("pretrained", "individual", "task_arithmetic", "ties_merging", "regmean", "adamerging"):
        add(results, method, models=four)
        for corruption in CORRUPTIONS:
            for severity in range(1, 6) if method != "adamerging" else (3,):
                add(results, method, models=four, corruption=corruption, severity=severity)
        for count in range(2, 8):
            add(results, method, models=CLIP[:count])
        if method != "individual":
            add(results, method, models=CLIP[:6], tasks="all")
    add(results, "regmean", models=CLIP[2:5])
    for models in (T5[1:2], T5[3:], (T5[1], T5[3])):
        for method in ("passthrough", "smile_upscaling") if len(models) == 1 else ("smile_upscaling",):
            add(results, method, pool="t5-mini", every=T5, models=models, tasks="all")
    why = "The pool has no model of its own for the task 'letters'."
    cell = {"modelpool": "clip-mini", "method": "individual", "hyperparameters": {}, "models": list(CLIP[:6]),
            "tasks": "all", "corruption": None, "severity": None, "seed": None}  # fmt: skip
    results.add_failed(key_of(cell), cell, why)
    for method in ("pretrained", "individual", "simple_average", "task_arithmetic", "ties_merging", "regmean"):
        add(results, method, pool="t5-mini", every=T5, quality=QUALITY[method] * (0.8 if method != "individual" else 1))
    return results


def _known(method: str) -> Mapping[str, Any]:
    from fusionbench.errors import InputError

    try:
        return get_method(method).hyperparameters
    except InputError:
        return {}
