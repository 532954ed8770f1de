"""Merge the same checkpoints with this project and with mergekit: time, memory, and how exact the result is.

Prints, for every method, the least wall and CPU seconds of several runs (and the median), and the highest peak memory,
of whole processes with their start-up. The two take turns, and the inputs are read before each run, so that no run
waits for the disk. What mergekit took is kept in the folder `--work`, so that an interrupted benchmark goes on.

The checkpoints have the shape of Qwen2 0.5B (or 1.5B): a base and three fine-tunes of random numbers in bfloat16. With
`--tensors 16000` they are a base and two fine-tunes of many small tensors in float32; mergekit, whose time grows with
the square of their number, merges those only with `--peer-tensors`.

    make bench-merge
    python benchmarks/merge.py [--size 0.5B] [--methods linear ties] [--runs 3] [--markdown docs/performance.md]
"""

import argparse
import compileall
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import limits
import numpy as np
from out_of_core import measured

ROOT = Path(__file__).resolve().parent.parent
FUSIONBENCH = Path(sys.executable).with_name("fusionbench")
MERGEKIT = ROOT / ".venv-bench" / "bin" / "mergekit-yaml"
KEPT = "mergekit-0.1.5.json"
WEIGHTS = "model.safetensors"
MODELS = ("base", "model0", "model1", "model2")
BLOCK = 2**20
Results = dict[str, Any]  # runs: [CPU seconds, wall seconds, peak MB] of each; inexact: a share of the elements
Read = Callable[[slice], np.ndarray]  # a block of a tensor in float64: (models, elements)


class Method(NamedTuple):
    """One method in both programs' words: its name, then hyperparameters. The first model is its base, if any."""

    ours: str
    theirs: str
    models: tuple[str, ...] = MODELS


METHODS = {
    "linear": Method("simple_average", "linear weight=1", MODELS[1:]),
    "task_arithmetic": Method("task_arithmetic scaling_factor=0.3", "task_arithmetic weight=0.3"),
    "ties": Method("ties_merging trim=tensor density=0.2 merge=mean scaling_factor=1", "ties density=0.2 weight=1"),
    "dare": Method("dare over=ties rescale=l1 density=0.5 scaling_factor=1", "dare_ties density=0.5 weight=1"),
    "slerp": Method("slerp t=0.5 convention=mergekit", "slerp t=0.5", MODELS[1:3]),
    "breadcrumbs": Method(
        "breadcrumbs density=0.9 gamma=0.01 scaling_factor=1", "breadcrumbs density=0.9 gamma=0.01 weight=1"
    ),
    "della": Method("della rescale=l1 density=0.5 epsilon=0.15", "della density=0.5 epsilon=0.15 weight=1"),
    "model_stock": Method("model_stock", "model_stock"),
}
BOUNDED = ("linear", "ties")  # of which the table says how far they are from reading, computing and writing alone


class Shape(NamedTuple):
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    dtype: str = "bfloat16"


SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 320, 8192),
    "0.5B": Shape(896, 24, 14, 2, 4864, 151936),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151936),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "demo" / "bench", help="for checkpoints and what is kept")
    parser.add_argument("--size", choices=SHAPES, default="0.5B")
    parser.add_argument("--tensors", type=int, metavar="COUNT", help="many small tensors instead")
    parser.add_argument("--peer-tensors", action="store_true", help="let mergekit merge those, too")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=["both", "ours", "theirs"], default="both")
    parser.add_argument("--peer-dtype", metavar="DTYPE", help="what mergekit computes in (default: as stored)")
    parser.add_argument("--fresh", action="store_true", help="measure mergekit again, whatever is kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also insert the tables there")
    given = parser.parse_args()
    given.work = given.work.resolve()  # mergekit may take relative paths for names on the hub

    name = f"{given.tensors} tensors" if given.tensors else given.size
    shape = Shape(8, given.tensors // 12, 1, 1, 8, 8, "float32") if given.tensors else SHAPES[given.size]
    dtype = given.peer_dtype or shape.dtype
    folder, out, kept_at = given.work / name.replace(" ", "-"), given.work / "merged", given.work / KEPT
    ours_runs = given.side != "theirs"
    theirs_runs = given.side != "ours" and (given.peer_tensors or not given.tensors)
    if theirs_runs and not MERGEKIT.exists():
        parser.error(f"{MERGEKIT} is not there: `make bench-merge` installs it")
    marker = "merge" if name == "0.5B" else f"merge {name}"
    if given.markdown and f"<!-- {marker} -->" not in given.markdown.read_text():
        parser.error(f"{given.markdown} has no place for '{marker}'")
    if not folder.is_dir():
        apart(make_models, folder, shape, MODELS[:3] if given.tensors else MODELS)
    size = (folder / "base" / WEIGHTS).stat().st_size / 1e9
    rates = apart(limits.measure, given.work)
    kept = json.loads(kept_at.read_text()) if kept_at.exists() else {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    compileall.compile_dir(ROOT / "src" / "fusionbench", quiet=1)  # as pip does when it installs, mergekit's too

    rows, loads, old = [], [], 0
    for label in given.methods:
        method = METHODS[label]
        models = [folder / model for model in method.models if (folder / model).is_dir()]
        ours: Results = {"runs": [], "inexact": None}
        key = f"{name}, {method.theirs}, {dtype}"
        if given.fresh and theirs_runs:
            kept.pop(key, None)
        theirs = kept.setdefault(key, {"runs": [], "inexact": None})
        old += min(len(theirs["runs"]), given.runs)
        config = given.work / "mergekit.yaml"
        config.write_text(json.dumps(their_config(label, models, dtype, shape.dtype)))
        for i in range(given.runs):
            loads.append(os.getloadavg()[0])
            if ours_runs:
                first, *options = method.ours.split()
                run(ours, [FUSIONBENCH, "merge", first, *models, "-o", out, *options], label, models, out, "ours")
            if theirs_runs and i >= len(theirs["runs"]):
                run(theirs, [MERGEKIT, config, out, "--lazy-unpickle", "--quiet"], label, models, out, "theirs")
                kept_at.with_suffix(".part").write_text(json.dumps(kept, indent=1))
                kept_at.with_suffix(".part").replace(kept_at)
        theirs = {**theirs, "runs": theirs["runs"][: given.runs]}
        computed = apart(computing, label, len(models), shape) if label in BOUNDED else 0.0
        rows.append(row(label, ours, theirs, size * len(models), size, rates, computed))
    load = f"Load average before the runs: {min(loads):.1f} to {max(loads):.1f}"
    load += f"; {old} of mergekit's runs were made before." if old else "."
    text = tables(about(name, shape, size, given.runs, dtype) + load + "\n", rows, rates)
    print(text, end="")
    if given.markdown:
        insert(given.markdown, marker, text)


def apart(function: Callable, *arguments: object) -> Any:
    """What a function returns, from a process of its own: a child's peak memory counts what its parent once held."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(results: Results, command: list, label: str, models: list[Path], out: Path, side: str) -> None:
    """Measure a merge once; the first time, compare what it wrote with the exact result."""
    shutil.rmtree(out, ignore_errors=True)
    for model in models:
        read_once(model / WEIGHTS)
    took = measured(command)
    print(f"{label}, {side}: {took[1]:.1f} s", file=sys.stderr, flush=True)
    if not results["runs"] and label in EXACT:
        results["inexact"] = apart(inexact, label, models, out, side)
    results["runs"].append(took)
    shutil.rmtree(out)


def read_once(file: Path) -> None:
    buffer = bytearray(BLOCK)
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def their_config(label: str, models: list[Path], dtype: str, out_dtype: str) -> dict[str, Any]:
    """The same merge as mergekit's configuration (JSON is YAML)."""
    name, *options = METHODS[label].theirs.split()
    config: dict[str, Any] = {"merge_method": name, "dtype": dtype, "out_dtype": out_dtype}
    config["parameters"] = {key: float(value) for key, value in (option.split("=") for option in options)}
    if label != "linear":
        config["base_model"] = str(models[0])
    return {**config, "models": [{"model": str(model)} for model in models]}


def computing(label: str, models: int, shape: Shape) -> float:
    """CPU seconds of a method's passes alone over a whole model, of blocks in the cache, on one thread: the least."""
    from fusionbench import passes

    size, random = 2**16, np.random.default_rng(0)
    name = "F32" if shape.dtype == "float32" else "BF16"
    base = 0.02 * random.standard_normal(size)
    changes = 0.002 * random.standard_normal((models - 1, size)) * (random.random((models - 1, size)) < 0.5)
    blocks = [(stored(values, name).view(np.uint8), name) for values in (base, *(base + changes))]
    out, every, ones = np.empty_like(blocks[0][0]), passes.Selection(), np.ones(models - 1)
    bits = np.sort(passes.reference.magnitudes(blocks))
    first, kept, last = (bits[:, size * place // 100].copy() for place in (79, 80, 81))
    trimmed = passes.Selection(low=kept.view(np.float32))
    mean = passes.Combination(ones, ones, elect="mass", combine="mean")

    def ties() -> None:
        passes.between(blocks, first[None], last[None], every, room=size)
        passes.masked_merge(blocks, trimmed, 0, mean, out, name)

    def linear() -> None:
        passes.weighted_sum(blocks, 1.0, ones, float(models), out, name)

    took = min(limits.timed(ties if label == "ties" else linear)[1] for _ in range(300))
    return took / size * sum(map(math.prod, tensors(shape).values()))


def row(
    label: str, ours: Results, theirs: Results, read: float, written: float, rates: limits.Rates, computed: float
) -> str:
    """One line of the table; sizes in GB, and the seconds that the passes alone take."""
    cells = [label, *(cell(side["runs"]) for side in (ours, theirs))]
    if ours["runs"] and theirs["runs"]:
        cells += [f"{least(theirs, i) / least(ours, i):.1f}" for i in (1, 0)]
    else:
        cells += ["-", "-"]
    cells.append(f"{(read + written) / least(ours, 1):.2f}" if ours["runs"] else "-")
    bound = read / limits.fastest(rates, "read") + written / limits.fastest(rates, "write") + computed
    cells.append(f"{bound:.3g} ({computed:.2g})" if label in BOUNDED else "-")
    cells.append(f"{least(ours, 0) / bound:.1f}" if label in BOUNDED and ours["runs"] else "-")
    cells += ["-" if side["inexact"] is None else f"{100 * side['inexact']:.2g} %" for side in (ours, theirs)]
    return f"| {' | '.join(cells)} |"


def cell(runs: list[tuple[float, float, float]]) -> str:
    if not runs:
        return "-"
    cpu, wall, peak = zip(*runs, strict=True)
    return f"{min(wall):.2f} ({median(wall):.2f}) / {min(cpu):.2f} ({median(cpu):.2f}) / {max(peak):.0f}"


def least(results: Results, column: int) -> float:
    return min(run[column] for run in results["runs"])


def about(name: str, shape: Shape, size: float, runs: int, dtype: str) -> str:
    shapes = tensors(shape).values()
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    told = "One run of each" if runs == 1 else f"The least of {runs} runs, the median in brackets; the highest peak"
    return (
        f"{name}: {sum(map(math.prod, shapes)) / 1e6:.1f}M parameters in {len(shapes)} tensors, {shape.dtype}, "
        f"{size:.3g} GB a file; mergekit computes in {dtype}.\n{os.cpu_count()} cores "
        f"({processor[1] if processor else 'unknown'}). {told}.\n"
    )


def tables(intro: str, rows: list[str], rates: limits.Rates) -> str:
    heads = ["method", "ours: wall s / CPU s / peak MB", "mergekit: wall s / CPU s / peak MB", "wall ratio"]
    heads += ["CPU ratio", "ours, GB/s", "bound (passes), CPU s", "ours / bound", "not exact: ours", "mergekit"]
    return "\n".join(
        [
            intro,
            f"| {' | '.join(heads)} |",
            f"|---|{'--:|' * (len(heads) - 1)}",
            *rows,
            "\nThe bound is the CPU time of reading every input and writing the output once, at this machine's "
            "rates, which were\nmeasured before the merges, and of this project's passes alone (in brackets) on blocks "
            "that are in the cache, on one\nthread. It leaves out starting, hashes, `fsync`, the sample that says "
            "where a threshold is, and reading a second time:\n",
            limits.markdown(rates),
        ]
    )


def insert(file: Path, marker: str, content: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    file.write_text(pattern.sub(lambda match: match[1] + content + match[2], file.read_text()))


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 model's parameters; its head is its embedding."""
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    layer = {f"self_attn.{p}_proj": (hidden if p == "q" else kv, hidden) for p in "qkv"}
    biases = {f"{name}.bias": dims[:1] for name, dims in layer.items()}
    layer |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, shape.mlp)}
    layer |= {"mlp.gate_proj": (shape.mlp, hidden), "mlp.up_proj": (shape.mlp, hidden)}
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer = biases | {f"{name}.weight": dims for name, dims in layer.items()}
    found = {f"model.layers.{i}.{name}": dims for i in range(shape.layers) for name, dims in layer.items()}
    return {"model.embed_tokens.weight": (shape.vocabulary, hidden), **found, "model.norm.weight": (hidden,)}


def make_models(folder: Path, shape: Shape, models: tuple[str, ...]) -> None:
    """Write a base and fine-tunes that each change half of it, partly in one direction; always the same numbers."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    dtype, width = ("F32", 4) if shape.dtype == "float32" else ("BF16", 2)
    header, end = {}, 0
    for name, dims in tensors(shape).items():
        start, end = end, end + width * math.prod(dims)
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [start, end]}
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = np.random.default_rng(0)
    with ExitStack() as stack:
        files = []
        for model in models:
            (part / model).mkdir(parents=True)
            for name, content in side_files(shape).items():
                (part / model / name).write_text(json.dumps(content))
            files.append(stack.enter_context(open(part / model / WEIGHTS, "wb")))
            files[-1].write(len(encoded).to_bytes(8, "little") + encoded)
        for dims in tensors(shape).values():
            for block in blocks(math.prod(dims)):
                base, shared = random.standard_normal((2, block.stop - block.start), np.float32)
                for i, file in enumerate(files):
                    change = 0.6 * shared + 0.8 * random.standard_normal(base.shape, np.float32)
                    change *= random.random(base.shape, np.float32) < 0.5
                    file.write(stored(0.02 * base + 0.002 * min(i, 1) * change, dtype).tobytes())
    part.rename(folder)


def side_files(shape: Shape) -> dict[str, dict[str, Any]]:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "max_position_embeddings": 32768,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": shape.dtype,
        "vocab_size": shape.vocabulary,
    }
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config}


def blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 or float64 values as a file holds them, rounded once, to the nearest and to even."""
    single = values.astype(np.float32)
    if dtype == "F32":
        return single
    # Rounding float64 twice would be wrong near the middle of two values. So the first step cuts off, and sets the last
    # bit where anything was lost, which tells the second step on which side of the middle a value is.
    bits = single.view(np.uint32) - (np.abs(single) > np.abs(values))
    bits = (bits | (single != values)).astype(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def loaded(values: np.ndarray) -> np.ndarray:
    """What a file holds, as float64."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def mapped(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, flat, in the type that their bytes are stored in."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        content = np.memmap(file, np.uint8, "r", 8 + length)
        for name, entry in header.items():
            if name != "__metadata__":
                dtype = {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]]
                found[name] = content[slice(*entry["data_offsets"])].view(dtype)
    return found


def inexact(label: str, models: list[Path], out: Path, side: str) -> float:
    """The share of a merge's elements that are not the exact result, rounded once."""
    options = {key: float(value) for key, value in re.findall(r"(\w+)=(\S+)", METHODS[label].theirs)}
    inputs, outputs = [mapped(model) for model in models], mapped(out)
    if outputs.keys() != inputs[0].keys():
        sys.exit(f"{out} has other tensors than its inputs: {sorted(outputs.keys() ^ inputs[0].keys())[:3]}")
    wrong = compared = 0
    for name, result in outputs.items():
        dtype = "BF16" if result.dtype == np.uint16 else "F32"

        def read(block: slice, name: str = name) -> np.ndarray:
            return np.stack([loaded(tensors[name][block]) for tensors in inputs])

        exact = EXACT[label](read, result.size, options, side, dtype)
        for block in blocks(result.size):
            expected = exact(read(block))
            clear = ~np.isnan(expected)
            compared += np.count_nonzero(clear)
            wrong += np.count_nonzero((loaded(stored(expected, dtype)) != loaded(result[block])) & clear)
    return wrong / compared


def exact_linear(read: Read, size: int, options: dict, side: str, dtype: str) -> Callable:
    return lambda x: x.sum(0) / len(x)


def exact_task_arithmetic(read: Read, size: int, options: dict, side: str, dtype: str) -> Callable:
    # Results half-way between two numbers are common here. A fraction finds them; 0.3 as float64 would miss most.
    times, over = Fraction(str(options["weight"])).as_integer_ratio()
    return lambda x: (over * x[0] + times * (x[1:] - x[0]).sum(0)) / over


def exact_slerp(read: Read, size: int, options: dict, side: str, dtype: str) -> Callable:
    gram = np.sum([x @ x.T for x in map(read, blocks(size))], 0)
    cosine, weights = gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1]), np.array([[1 - options["t"]], [options["t"]]])
    if abs(cosine) <= 0.9995:  # nearer to a line, mergekit takes the line
        angle = np.arccos(cosine)
        weights = np.sin(weights * angle) / np.sin(angle)
    return lambda x: (weights * x).sum(0)


def exact_model_stock(read: Read, size: int, options: dict, side: str, dtype: str) -> Callable:
    gram = np.sum([change @ change.T for change in (x[1:] - x[0] for x in map(read, blocks(size)))], 0)
    norms, n = np.sqrt(np.diag(gram)), len(gram)
    cosine = (gram / np.outer(norms, norms))[np.triu_indices(n, 1)].mean()
    ratio = n * cosine / (1 + (n - 1) * cosine)
    return lambda x: x[0] + ratio * (x[1:].mean(0) - x[0])


def exact_ties(read: Read, size: int, options: dict, side: str, dtype: str) -> Callable:
    """Ours keeps all that are as large as the k-th largest, mergekit some of them, after it rounded the differences.

    So of mergekit's only those elements count (the others are NaN here) where that makes no difference: no model's
    change is as large as the k-th when both are rounded, and the votes do not cancel.
    """
    kept = options["density"] * size
    kept = max(1, round(kept) if side == "ours" else int(kept))
    count = len(read(slice(0, 1))) - 1
    threshold = np.empty((count, 1), np.float32)
    for i in range(count):
        magnitudes = np.empty(size, np.float32)
        for block in blocks(size):
            x = read(block)
            magnitudes[block] = np.abs(x[i + 1] - x[0])
        magnitudes.partition(size - kept)
        threshold[i] = magnitudes[size - kept]

    def ties(x: np.ndarray) -> np.ndarray:
        change = x[1:] - x[0]
        magnitude = np.abs(change).astype(np.float32)
        trimmed = np.where(magnitude >= threshold, change, 0)
        votes = trimmed.sum(0)
        agreeing = np.where(trimmed * np.sign(votes) > 0, trimmed, 0)
        result = x[0] + agreeing.sum(0) / np.maximum(np.count_nonzero(agreeing, 0), 1)
        if side == "theirs":
            unclear = (stored(magnitude, dtype) == stored(threshold, dtype)).any(0)
            unclear |= (votes == 0) & trimmed.any(0)
            result[unclear] = np.nan
        return result

    return ties


EXACT = {
    "linear": exact_linear,
    "task_arithmetic": exact_task_arithmetic,
    "ties": exact_ties,
    "slerp": exact_slerp,
    "model_stock": exact_model_stock,
}


if __name__ == "__main__":
    main()
