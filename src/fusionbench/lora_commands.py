"""The verb `lora`: adapters extracted from the difference of two models, and adapters merged."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.console import quiet, shown_progress, terminal
from fusionbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from fusionbench.cli import Add
    from fusionbench.lora import Adapter, Extracted

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


LORA = """examples:
  fusionbench lora extract base tuned -o adapter --rank 32
  fusionbench lora merge first second -o both"""

LORA_EXTRACT = """examples:
  fusionbench lora extract base tuned -o adapter --rank 32
  fusionbench lora extract base tuned -o adapter --energy 0.95 --max-rank 64 --exclude lm_head --save-rest

The adapter is in PEFT's format. For each changed matrix the table has the error, which is the norm of what the rank
leaves out of the change over the norm of the change, and a bound: no adapter of that rank has an error below it."""

LORA_MERGE = """examples:
  fusionbench lora merge first second -o both                        (their mean, exactly: of the ranks' sum)
  fusionbench lora merge first second -o both --weights 1,0.5 --rank 8
  fusionbench lora merge first second -o model --base BASE --weights 1,1

Without --rank nothing is left out; what a lower rank leaves out of each module is told. With --base the result is no
adapter but a model: the base and the weighted sum of the changes. To merge adapters by any other method, name them as
models of a pool with their base."""


def add_verbs(add: Add) -> None:
    """Put the verb into the command line's parser."""
    lora = add("lora", "extract LoRA adapters from models, and merge adapters", LORA)
    actions = lora.add_subparsers(dest="action", metavar="ACTION", parser_class=type(lora), required=True)

    def act(action: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return actions.add_parser(action, help=summary, description=summary, epilog=epilog, formatter_class=formatter)

    extract = act("extract", "make a LoRA adapter of the difference of two models", LORA_EXTRACT)
    extract.add_argument("base", metavar="BASE", help="the model it was fine-tuned from")
    extract.add_argument("tuned", metavar="TUNED", help="the fine-tuned model")
    extract.add_argument("-o", "--out", required=True, help="folder to write")
    extract.add_argument("--rank", type=int, help="of every module")
    extract.add_argument("--energy", type=float, help="part of each change's squared norm to keep, by the least rank")
    extract.add_argument("--max-rank", type=int, default=256, help="with --energy (default: 256)")
    extract.add_argument("--modules", metavar="REGEX", help="which modules (default: all that an adapter can change)")
    extract.add_argument("--exclude", metavar="REGEX", help="which modules not")
    extract.add_argument("--save-rest", action="store_true", help="keep norms, biases and others that changed whole")
    extract.add_argument("--dtype", default="float32", help="of the factors: float32, bfloat16, float16, float64")
    extract.add_argument("--seed", type=int, default=0, help="of the random projections (default: 0)")
    extract.add_argument("--memory", default="1GB", help="for the differences that are held (default: 1GB)")
    extract.add_argument("--workers", type=int, help="threads (default: one per core)")
    extract.add_argument("--report", metavar="FILE", help="JSON to write the table to")
    extract.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    merged = act("merge", "merge LoRA adapters into one, or into their base", LORA_MERGE)
    merged.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folder in PEFT's format")
    merged.add_argument("-o", "--out", required=True, help="folder to write")
    merged.add_argument("--weights", nargs="+", help="one per adapter (default: the mean)")
    merged.add_argument("--rank", type=int, help="of the result (default: the sum of the ranks, which is exact)")
    merged.add_argument("--base", help="write the model that the merged change makes of this one")
    merged.add_argument("--report", metavar="FILE", help="JSON to write ranks and errors to")
    merged.add_argument("--overwrite", action="store_true", help="replace a folder that is there")


def lora(arguments: argparse.Namespace) -> None:
    """Extract an adapter, or merge some."""
    {"extract": extract, "merge": merge}[arguments.action](arguments)


def extract(arguments: argparse.Namespace) -> None:
    """Make an adapter of the difference of two models, and show what each module's rank left out."""
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.lora import extract
    from fusionbench.writer import check_inputs, check_writable, write_json

    if arguments.dtype not in DTYPES:
        raise InputError(f"No dtype of adapters is called '{arguments.dtype}'. {did_you_mean(arguments.dtype, DTYPES)}")
    out = Path(arguments.out)
    check_writable(out, overwrite=arguments.overwrite)
    report = _report_file(arguments.report, out)
    quiet()
    base = Checkpoint.open(arguments.base)
    tuned = Checkpoint.open(arguments.tuned, base=base)
    check_inputs(out, [base, tuned])
    names = ("rank", "energy", "max_rank", "modules", "exclude", "save_rest", "seed", "memory", "workers")
    options = {name: getattr(arguments, name) for name in names}
    with shown_progress():
        extracted = extract(base, tuned, dtype=DTYPES[arguments.dtype], **options)
        extracted.save(out, overwrite=arguments.overwrite)
    if report is not None:
        write_json(report, extracted.report())
    _show(extracted, arguments.rank)
    terminal().print(f"The adapter is in {out}", highlight=False, markup=False)


def merge(arguments: argparse.Namespace) -> None:
    """Merge adapters into one adapter, or into a model."""
    from fusionbench.locations import find
    from fusionbench.lora import Adapter
    from fusionbench.writer import check_inputs, check_writable

    out = Path(arguments.out)
    adapters = [Adapter.open(find(location), location) for location in arguments.adapters]
    weights = _weights(arguments.weights, len(adapters))
    check_writable(out, overwrite=arguments.overwrite)
    check_inputs(out, arguments.adapters)
    if arguments.base is None:
        _merge_to_adapter(arguments, adapters, weights, out)
    else:
        _merge_to_model(arguments, weights, out)


def _merge_to_adapter(arguments: argparse.Namespace, adapters: list[Adapter], weights: list[float], out: Path) -> None:
    from fusionbench import tables
    from fusionbench.lora import combine
    from fusionbench.writer import write_json

    report = _report_file(arguments.report, out)
    combined = combine(adapters, weights, arguments.rank)
    combined.save(out, overwrite=arguments.overwrite)
    if report is not None:
        modules = {name: {"rank": combined.ranks[name], "error": error} for name, error in combined.errors.items()}
        write_json(report, {"adapters": arguments.adapters, "weights": weights, "modules": modules})
    console = terminal()
    name, error = max(combined.errors.items(), key=lambda item: item[1])
    if error:
        console.print(tables.truncations(combined, console.width))
    left_out = f"left out {error:.1%} of the change of '{name}', less of all others" if error else "nothing is left out"
    console.print(f"{len(adapters)} adapters, rank {combined.config['r']}: {left_out}.", highlight=False, markup=False)
    console.print(f"The adapter is in {out}", highlight=False, markup=False)


def _merge_to_model(arguments: argparse.Namespace, weights: list[float], out: Path) -> None:
    from fusionbench import card
    from fusionbench.algorithms import algorithm
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.file_commands import names_of
    from fusionbench.pool import pool_of
    from fusionbench.writer import save

    for option in ("rank", "report"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option} is of an adapter; with --base nothing is left out: give one of them.")
    base = Checkpoint.open(arguments.base)
    models = {name: Checkpoint.open(place, base=base) for name, place in names_of(arguments.adapters).items()}
    if len(weights) != len(models):
        raise InputError(f"{len(weights)} weights are given for {len(models)} adapters.")
    if not math.isfinite(sum(weights)):
        raise InputError(f"A weight must be a finite number; got {', '.join(map(str, weights))}.")
    # base + sum w (model - base), which is the weighted sum of all of them, with what is left of 1 for the base
    first = "pretrained" if "pretrained" not in models else "the pretrained"
    factors = {first: 1 - math.fsum(weights), **dict(zip(models, weights, strict=True))}
    pool = pool_of({first: base, **models}, None)
    merged: Any = algorithm("weighted_average", weights=factors, normalize=False).run(pool)
    said = ["fusionbench", "lora", "merge", *arguments.adapters, "-o", "OUT", "--base", arguments.base]
    said.append(f"--weights={','.join(map(str, weights))}")  # one word: the first weight may be negative
    with shown_progress():
        save(merged.with_files({card.FILE: card.model_card(merged, said)}), out, overwrite=arguments.overwrite)
    print(f"{len(weights)} adapters on {arguments.base}: the model is in {out}")


def _show(extracted: Extracted, rank: int | None) -> None:
    from fusionbench import tables

    console = terminal()
    console.print(tables.extraction(extracted, console.width))
    lines = []
    capped = [name for name, module in extracted.modules.items() if rank is not None and module.rank < rank]
    if capped:
        lines.append(f"{len(capped)} modules have no rank of {rank}, and have the largest they can: {_some(capped)}.")
    if not extracted.built:
        lines.append("No class of transformers told what the modules are: matrices were taken for linear layers.")
    if extracted.whole:
        lines.append(f"Saved whole: {len(extracted.whole)} modules: {_some(extracted.whole)}.")
    for reason in dict.fromkeys(extracted.left.values()):
        names = [name for name, why in extracted.left.items() if why == reason]
        lines.append(f"NOT captured: {len(names)} tensors, {reason}: {_some(names)}.")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weights(words: list[str] | None, count: int) -> list[float]:
    """A weight per adapter, from words such as "0.7,0.3" or "0.7" "0.3"."""
    if words is None:
        return [1 / count] * count
    try:
        return [float(word) for text in words for word in text.split(",")]
    except ValueError:
        raise InputError(f"--weights takes numbers, as 0.7,0.3; got '{' '.join(words)}'.") from None


def _report_file(name: str | None, out: Path) -> Path | None:
    from fusionbench.writer import check_file

    if name is not None:
        check_file(Path(name), "report", out)
    return None if name is None else Path(name)
