"""Nanoseconds that a pass takes for an element of a model, in a block that stays in the cache, on one thread.

Prints a table: the compiled core, as it runs on three kinds of processors, the reference in numpy, and torch.

    python benchmarks/passes.py [--elements 131072] [--dtype BF16]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fusionbench import passes
from fusionbench.passes import ALWAYS, LOW_BITS, Block, Combination, Selection, reference

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**17)
    parser.add_argument("--dtype", choices=TORCH, default="BF16")
    parser.add_argument("--only", default="", help="passes whose names contain this, without numpy and torch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| pass, ns per element and model | v4 | v3 | baseline | numpy | torch |\n|---|---|---|---|---|---|")
    for name, models, compiled, numpy, torch_ in rows(arguments.elements, arguments.dtype):
        if arguments.only not in name:
            continue
        times = []
        for architecture in ("v4", "v3", "baseline"):
            try:
                passes._core.choose(architecture)  # type: ignore[union-attr]
            except (ValueError, AttributeError):
                times.append(None)
            else:
                times.append(seconds(compiled))
        times += [None, None] if arguments.only else [seconds(numpy, 3), torch_ and seconds(torch_, 5)]
        each = (f"{t / models / arguments.elements * 1e9:.2f}" if t else "" for t in times)
        print(f"| {name} | {' | '.join(each)} |", flush=True)


def seconds(function: Callable[[], object], rounds: int = 15) -> float:
    """CPU time of one call: the median of several measurements of some milliseconds each."""
    function()
    start = time.process_time()
    function()
    calls = max(1, int(0.01 / max(time.process_time() - start, 1e-6)))
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            function()
        found.append((time.process_time() - start) / calls)
    return statistics.median(found)


def rows(n: int, dtype: str):
    """Name, number of models that time is divided by, the pass, its reference, and what torch would do."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=generator) * 0.02
    tensors = [base, *(base + torch.randn(n, generator=generator) * 1e-3 for _ in range(8))]
    tensors = [tensor.to(TORCH[dtype]) for tensor in tensors]
    blocks: list[Block] = [(tensor.view(torch.uint8).numpy(), dtype) for tensor in tensors]
    out = np.empty(len(blocks[0][0]), np.uint8)
    sizes = np.sort(reference.magnitudes(blocks).view(np.float32))
    low = sizes[:, n * 4 // 5].copy()
    prefixes = low.view(np.uint32).astype(np.int64) >> LOW_BITS
    keys, half = np.arange(8, dtype=np.uint64), np.full(8, ALWAYS // 2, np.uint64)

    def differences(models: int) -> torch.Tensor:
        return torch.stack([t.float() for t in tensors[1 : models + 1]]) - tensors[0].float()

    for others in (2, 3, 7):
        given = (blocks[: others + 1], 1.0, np.ones(others), others + 1.0, out, dtype)

        def torch_average(count: int = others + 1) -> torch.Tensor:
            return torch.stack([t.float() for t in tensors[:count]]).mean(0).to(TORCH[dtype])

        name = f"weighted_sum, average of {others + 1}"
        yield (
            name,
            others + 1,
            partial(passes.weighted_sum, *given),
            partial(reference.weighted_sum, *given),
            torch_average,
        )
    given = (blocks[:4], 1.0, np.full(3, 0.3), 1.0, out, dtype)
    yield (
        "weighted_sum, base + 3 task vectors", 4, partial(passes.weighted_sum, *given),
        partial(reference.weighted_sum, *given),
        lambda: (tensors[0].float() + 0.3 * differences(3).sum(0)).to(TORCH[dtype]),
    )  # fmt: skip

    def torch_ties(models: int) -> torch.Tensor:
        values = differences(models)
        values = torch.where(values.abs() >= torch.from_numpy(low[:models, None]), values, 0.0)
        values = torch.where(values * values.sum(0).sign() > 0, values, 0.0)
        return (tensors[0].float() + values.sum(0) / (values != 0).sum(0).clamp(min=1)).to(TORCH[dtype])

    for models in (3, 8):
        selection, combination = (
            Selection(low=low[:models]),
            Combination(np.ones(models), np.ones(models), elect="mass", combine="mean"),
        )
        given = (blocks[: models + 1], selection, 0, combination, out, dtype)
        yield (
            f"masked_merge, TIES of {models}", models, partial(passes.masked_merge, *given),
            partial(reference.masked_merge, *given), partial(torch_ties, models),
        )  # fmt: skip
    selection, combination = Selection(keys=keys[:3], chances=half[:3]), Combination(np.full(3, 2.0), np.ones(3))

    def torch_dare() -> torch.Tensor:
        values = differences(3)
        return (tensors[0].float() + (values * (torch.rand(values.shape) < 0.5)).sum(0) * 2).to(TORCH[dtype])

    given = (blocks[:4], selection, 0, combination, out, dtype)
    yield (
        "masked_merge, DARE of 3",
        3,
        partial(passes.masked_merge, *given),
        partial(reference.masked_merge, *given),
        torch_dare,
    )

    for models in (2, 4, 8):
        given = (blocks[: models + 1], Selection(), 0)

        def torch_gram(models: int = models) -> torch.Tensor:
            values = differences(models)
            return values @ values.T

        yield (
            f"products of {models}",
            models,
            partial(passes.products, *given),
            partial(reference.products, *given),
            torch_gram,
        )

    counts, low_counts = np.zeros((3, 2**15), np.int64), np.zeros((3, 2**16), np.int64)
    given = (blocks[:4], None, Selection(), 0)
    yield (
        "histogram, high bits", 3, partial(passes.histogram, *given, counts=counts),
        partial(reference.histogram, *given, variance=False),
        lambda: [torch.bincount(row) for row in differences(3).abs().view(torch.int32) >> LOW_BITS],
    )  # fmt: skip
    given = (blocks[:4], prefixes[:3], Selection(), 0)
    yield (
        "histogram, low bits", 3, partial(passes.histogram, *given, counts=low_counts),
        partial(reference.histogram, *given, variance=False), None,
    )  # fmt: skip
    table = np.linspace(0.35, 0.65, 1024)[None] * ALWAYS
    selection = Selection(keys=keys[:3], chances=table.astype(np.uint64))

    def torch_della() -> torch.Tensor:
        values = differences(3)
        order = values.abs().view(3, -1, 1024).argsort(stable=True).argsort()
        return values * (torch.rand(values.shape) < torch.linspace(0.35, 0.65, 1024)[order].view_as(values))

    given = (blocks[:4], selection, 0)
    yield (
        "sums, DELLA of 3, rows of 1024", 3, partial(passes.sums, *given), partial(reference.sums, *given), torch_della,
    )  # fmt: skip
    for divide in (False, True):
        combination = Combination(np.ones(3), np.ones(3), divide=divide, elect="mass", combine="mean")
        given = (blocks[:4], selection, 0, combination, out, dtype)
        name = "masked_merge, DELLA of 3" + (", divided by chances" if divide else "")
        yield name, 3, partial(passes.masked_merge, *given), partial(reference.masked_merge, *given), None


if __name__ == "__main__":
    main()
