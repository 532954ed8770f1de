"""The verbs on checkpoints alone, and moe. merge, diff and verify import no torch, unless a method asks for it."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.console import quiet, shown_progress, terminal
from fusionbench.errors import InputError, did_you_mean, is_count

if TYPE_CHECKING:
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.cli import Add
    from fusionbench.pool import ModelPool


MERGE = """examples:
  fusionbench merge ties_merging BASE FIRST SECOND -o merged density=0.2 scaling_factor=0.5
  fusionbench merge weighted_average FIRST SECOND -o merged 'weights=[0.7,0.3]'
  fusionbench merge depth_upscaling MODEL -o deeper layers=0:24+8:32
  fusionbench merge recipe.yaml merged          (as mergekit's; --dry-run shows the plan)

Models are folders, files, zoo:NAME or hf:OWNER/NAME. What is killed or interrupted goes on where it was when the same
command is started again. fusionbench describe METHOD says what a method takes."""

MOE = """example:
  fusionbench moe recipe.yaml mixture      with a recipe.yaml of

    base_model: mistral                    (a folder, zoo:NAME or hf:OWNER/NAME; MODEL+ADAPTER is a model with LoRA)
    gate_mode: hidden                      (or hidden_avg, cheap_embed, random, uniform_random)
    dtype: bfloat16
    experts:
      - source_model: mistral-code
        positive_prompts: ["Write a function that", "def main():"]
      - source_model: mistral-law
        positive_prompts: ["The court held that"]
        negative_prompts: ["def main():"]

Gates come from what the base model's layers are given at the last token of the prompts (hidden, or hidden_last), from
its mean over their tokens (hidden_avg), or from the prompts' embeddings (cheap_embed). Llama and Mistral become Mixtral
or, with a shared expert or architecture: deepseek, have DeepSeek's experts (as GLM-4's class in transformers);
architecture: qwen gives the shared expert a gate. Qwen2 and Qwen3 become their own sparse classes."""

VERIFY = """examples:
  fusionbench verify merged
  fusionbench verify merged --inputs"""

DIFF = """example:
  fusionbench diff zoo:clip-mini/base merged"""


def add_verbs(add: Add) -> None:
    """Put these verbs into the command line's parser."""
    merge = add("merge", "merge checkpoints by a method or a recipe: files to files, without torch", MERGE)
    merge.add_argument("method", metavar="METHOD|RECIPE.yaml", help="a method's name, or a recipe")
    merge.add_argument(
        "words",
        nargs="*",
        metavar="MODEL",
        help="models (base first, if the method needs one) and hyperparameters as KEY=VALUE",
    )
    merge.add_argument("-o", "--out", help="folder to write; for a recipe, it may also be given as the second argument")
    merge.add_argument("--dry-run", action="store_true", help="of a recipe: show the plan, and write nothing")
    merge.add_argument("--memory", default="96MB", help="for what is read and computed (default: 96MB)")
    merge.add_argument("--workers", type=int, help="threads or processes (default: one per core)")
    merge.add_argument("--executor", default="threads", help="threads | processes | ray: who does the work")
    merge.add_argument(
        "--device", default="cpu", help="where blocks are computed: cpu, cuda, cuda:1 ... (default: cpu)"
    )
    merge.add_argument("--shard-size", default="5GB", help="above which the weights are several files (default: 5GB)")
    merge.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    merge.add_argument(
        "--nan",
        choices=("error", "warn", "ignore"),
        default="error",
        help="what to do about NaN or Inf in an input (default: error)",
    )
    merge.add_argument(
        "--align", metavar="HOW", help="weight_matching: permute units to the order of the first model's"
    )
    merge.add_argument(
        "--vocabulary", choices=("truncate", "pad", "union"), help="make language models of different tokens fit"
    )
    moe = add("moe", "make a mixture of experts of dense language models, by a recipe of mergekit-moe", MOE)
    moe.add_argument("recipe", metavar="RECIPE", help="a .yaml file")
    moe.add_argument("out", metavar="OUT", help="folder to write")
    moe.add_argument("--dry-run", action="store_true", help="check the recipe, and show how large the result will be")
    moe.add_argument("--seed", type=int, default=0, help="of random gates and of noise (default: 0)")
    moe.add_argument("--memory", default="96MB", help="for what is read and computed (default: 96MB)")
    moe.add_argument("--workers", type=int, help="threads (default: one per core)")
    moe.add_argument("--shard-size", default="5GB", help="above which the weights are several files (default: 5GB)")
    moe.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    verify = add("verify", "check a folder that was written here against its manifest, and its recipe", VERIFY)
    verify.add_argument("folder", metavar="FOLDER", help="what merge, run or save has written")
    verify.add_argument("--inputs", action="store_true", help="compute some tensors again from the recipe's models")
    verify.add_argument(
        "--samples", type=int, default=8, help="how many tensors to compute again, with --inputs (default: 8)"
    )
    for verb in (merge, verify):
        verb.add_argument(
            "--plugin", action="append", default=[], help="a .py file or module with methods of one's own"
        )
    diff = add("diff", "compare two checkpoints tensor by tensor", DIFF)
    for name in ("A", "B"):
        diff.add_argument(name.lower(), metavar=name, help="folder, file, zoo:NAME or hf:OWNER/NAME")
    diff.add_argument("--all", action="store_true", help="show every tensor, not only the 20 that differ most")


def merge(arguments: argparse.Namespace) -> None:
    """Merge checkpoints by a method, or as a recipe says, and write the result."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads of numpy's that have no work would spin
    gc.set_threshold(100_000)  # the headers of many tensors are many objects, and not in cycles
    if arguments.method.lower().endswith((".yaml", ".yml")):
        merge_recipe(arguments)
    else:
        merge_by_method(arguments)


def check_hyperparameters(method: str, words: list[str]) -> None:
    """An error where one of these words gives a hyperparameter as if it were an option."""
    from fusionbench.registry import list_methods

    known = next((found.hyperparameters for found in list_methods() if found.name == method), {})
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in known:
            raise InputError(f"'{option}' is no option: write {name}={value or after or 'VALUE'}.")


def merge_by_method(arguments: argparse.Namespace) -> None:
    from fusionbench import card
    from fusionbench.algorithms import algorithm
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.registry import get_method

    if Path(arguments.method).suffix and Path(arguments.method).is_file():
        raise InputError(f"'{arguments.method}' is a file, and no recipe by its name: call it .yaml.")
    method = get_method(arguments.method)
    settings = [word for word in arguments.words if is_setting(word)]
    models = [word for word in arguments.words if word not in settings]
    given = {name: literal(value) for name, _, value in (word.partition("=") for word in settings)}
    for name in ("modelpool", "taskpool"):
        if name in given:
            raise InputError(f"merge takes models by their places, and no {name}=: pools are for fusionbench run.")
    chosen = algorithm(method.name, **given)
    if method.needs_tasks:
        raise InputError(f"{method.name} looks at {method.looks_at}: use fusionbench run, with a task pool.")
    if not method.saves:
        raise InputError(f"{method.name} gives several models side by side, which cannot be saved as one.")
    least = 2 if method.base else 1
    if len(models) < least:
        wanted = "the base model and at least one other" if method.base else "at least one model"
        raise InputError(f"{method.name} needs {wanted}: fusionbench merge {method.name} {usage(method.base)} -o OUT.")
    if not method.makes_checkpoint:
        out = arguments.out or "OUT"
        raise InputError(f"{method.name} makes a module, not tensors alone: use fusionbench run, with out={out}.")
    if arguments.dry_run:
        raise InputError("--dry-run is for recipes: fusionbench merge RECIPE.yaml --dry-run.")
    out = check_options(arguments, arguments.out)
    start = time.perf_counter()
    pool = opened(models, base=method.base, **options_of(arguments))
    if arguments.align is not None:
        with shown_progress():
            pool = _aligned(pool, arguments.align)
    merged: Any = chosen.run(pool)
    if not isinstance(merged, Checkpoint):
        raise InputError(f"{method.name} gives no checkpoint, but a module: use fusionbench run, with out={out}.")
    said = ["fusionbench", "merge", method.name, *models, *settings, "-o", "OUT", *_beside(arguments)]
    write(merged.with_files({card.FILE: card.model_card(merged, said)}), out, arguments, chosen.label, start)


def merge_recipe(arguments: argparse.Namespace) -> None:
    from fusionbench import card
    from fusionbench.recipes.build import build

    if len(arguments.words) + (arguments.out is not None) > 1:
        raise InputError(f"A recipe takes one folder to write: fusionbench merge {arguments.method} OUT.")
    if arguments.align is not None:
        raise InputError("A recipe's models are not aligned: merge by a method (fusionbench merge METHOD --align ...).")
    out = arguments.out or next(iter(arguments.words), None)
    if arguments.dry_run:
        from fusionbench.recipes.plan import plan

        for line in plan(build(arguments.method, **options_of(arguments)), arguments.memory, arguments.workers):
            print(line)
        return
    folder = check_options(arguments, out)
    start = time.perf_counter()
    built = build(arguments.method, **options_of(arguments))
    said = ["fusionbench", "merge", arguments.method, "OUT", *_beside(arguments)]
    text, methods, weights = built.described()
    readme = card.model_card(built.checkpoint, said, methods=methods, recipe=text, weights=weights)
    write(built.checkpoint.with_files({card.FILE: readme}), folder, arguments, arguments.method, start)


def _beside(arguments: argparse.Namespace) -> list[str]:
    """The options that change what is made."""
    vocabulary = ["--vocabulary", arguments.vocabulary] if arguments.vocabulary else []
    return [*vocabulary, *(word for plugin in arguments.plugin for word in ("--plugin", plugin))]


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of a pool."""
    return {name: getattr(arguments, name) for name in ("nan", "workers", "device", "vocabulary")}


def check_options(arguments: argparse.Namespace, out: str | None) -> Path:
    """The folder to write; an error where it or another option is wrong, before any model is opened."""
    from fusionbench.executors import EXECUTORS
    from fusionbench.writer import check_writable, parse_bytes

    if not out:
        raise InputError("Name the folder to write: -o OUT.")
    parse_bytes(arguments.memory)
    parse_bytes(arguments.shard_size)
    if arguments.executor not in EXECUTORS:
        raise InputError(f"No executor is called '{arguments.executor}'. {did_you_mean(arguments.executor, EXECUTORS)}")
    folder = Path(out).expanduser()
    check_writable(folder, overwrite=arguments.overwrite)
    if arguments.device != "cpu":
        from fusionbench.runner import parse_device

        parse_device(arguments.device)
    return folder


def write(merged: Checkpoint, out: Path, arguments: argparse.Namespace, label: str, start: float) -> None:
    """Write a merge, and say what it is."""
    from fusionbench.writer import save

    with shown_progress():
        save(
            merged,
            out,
            memory=arguments.memory,
            shard_size=arguments.shard_size,
            workers=arguments.workers,
            executor=arguments.executor,
            overwrite=arguments.overwrite,
        )
    seconds = time.perf_counter() - start
    size = sum(spec.nbytes for spec in merged.specs.values())
    print(f"{label}: {len(merged.specs):,} tensors, {size / 1e6:,.1f} MB, in {out} ({seconds:.1f} s)")


def _aligned(pool: ModelPool, how: str) -> ModelPool:
    """The pool with its models aligned, and a line about each of how near that brings them."""
    from fusionbench import tables
    from fusionbench.alignment import distance

    aligned = pool.aligned(how)
    for name in pool:
        if pool[name] is not pool.reference:
            both = {"before": distance(pool.reference, pool[name]), "after": distance(pool.reference, aligned[name])}
            print(*tables.alignment({name: {"how": how, "objective": both}}))
    return aligned


def moe(arguments: argparse.Namespace) -> None:
    """Make a mixture of experts by a recipe, and write it; or say how large it will be."""
    from fusionbench import card
    from fusionbench.parallel import check_workers
    from fusionbench.recipes.moe import build_moe, read_moe, size_of
    from fusionbench.writer import check_writable, parse_bytes, save

    out, memory = Path(arguments.out), parse_bytes(arguments.memory)
    parse_bytes(arguments.shard_size)
    check_workers(arguments.workers)
    check_writable(out, overwrite=arguments.overwrite)
    quiet()
    start = time.perf_counter()
    recipe = read_moe(arguments.recipe)
    size = size_of(recipe)
    shared = ", and one for every token" if recipe.shared else ""
    print(
        f"{recipe.layout.architecture}: {len(recipe.experts)} experts, {recipe.per_token} for a token{shared}; "
        f"{size.parameters:,} parameters, {size.active:,} of them active for a token"
    )
    if arguments.dry_run:
        print(f"{size.tensors:,} tensors; {size.read:,} bytes to read, {size.written:,} to write to {out}")
        return
    said = ["fusionbench", "moe", arguments.recipe, "OUT", *(["--seed", str(arguments.seed)] if arguments.seed else [])]
    with shown_progress():
        mixture = build_moe(recipe, arguments.seed)
        save(
            mixture.with_files({card.FILE: card.model_card(mixture, said, recipe=recipe.text)}),
            out,
            memory=memory,
            shard_size=arguments.shard_size,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    seconds = time.perf_counter() - start
    print(f"{size.tensors:,} tensors, {size.written / 1e6:,.1f} MB, in {out} ({seconds:.1f} s)")


def diff(arguments: argparse.Namespace) -> None:
    """Compare two checkpoints."""
    from fusionbench import tables
    from fusionbench.analysis import differences
    from fusionbench.checkpoint import Checkpoint

    a, b = Checkpoint.open(arguments.a), Checkpoint.open(arguments.b)
    only_a, only_b = [name for name in a if name not in b], [name for name in b if name not in a]
    reshaped = [n for n in a.specs if n in b and b.specs[b.resolve(n)].shape != a.specs[n].shape]
    console = terminal()
    found = list(differences(a, b))
    if len(found) == 1 and not reshaped:
        raise InputError(f"'{arguments.a}' and '{arguments.b}' have no tensor in common.")
    if len(found) > 1:
        console.print(tables.differences(found, None if arguments.all else 20, console.width))
    for what, names in ((f"only in {arguments.a}", only_a), (f"only in {arguments.b}", only_b), ("reshaped", reshaped)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            console.print(f"{len(names)} {what}: {', '.join(names[:3])}{more}", highlight=False, markup=False)
    dtypes = Counter((spec.dtype, b.specs[b.resolve(name)].dtype) for name, spec in a.specs.items() if name in b)
    for (own, other), count in dtypes.items():
        if own != other:
            said = f"{count} tensor{'s are' if count > 1 else ' is'} {own} in {arguments.a}, {other} in {arguments.b}"
            console.print(said, highlight=False, markup=False)


def verify(arguments: argparse.Namespace) -> int:
    """Check a folder against its manifest, and samples of it against its recipe; the exit status is 1 for damage."""
    from fusionbench.locations import find
    from fusionbench.verify import compare_with_recipe, damage

    if not is_count(arguments.samples):
        raise InputError(f"--samples must be a whole number of 1 or more; got {arguments.samples}.")
    folder = find(arguments.folder)
    with shown_progress():
        found, count = damage(folder)
        compared = compare_with_recipe(folder, arguments.samples) if arguments.inputs and not found else []
    for line in found:
        print(line)
    for name, same in compared:
        if not same:
            print(
                f"'{name}' is not what the recipe gives now: a model that it names is another one, or this version is."
            )
    if found or not all(same for _, same in compared):
        return 1
    more = f", and the recipe gives {len(compared)} of them again" if compared else ""
    print(f"{folder}: {count:,} tensors are what they were when they were written{more}.")
    return 0


def opened(locations: list[str], *, base: bool, **options: Any) -> ModelPool:
    """The pool of these models, the first of which may be the base."""
    from fusionbench.alike import check_pool
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.pool import pool_of
    from fusionbench.recipes.models import check_numbers

    first = Checkpoint.open(locations[0]) if base else None
    named = names_of(locations[1:] if base else locations)
    models = {name: Checkpoint.open(place, base=first) for name, place in named.items()}
    every = list(models.values()) if first is None else [first, *models.values()]
    for place, model in zip(locations, every, strict=True):
        check_numbers(place, model)
    pool = pool_of(models, first, **options)
    check_pool(pool, tokens=options.get("vocabulary") is None)
    return pool


def usage(base: bool) -> str:
    """What models a method is given."""
    return "BASE MODEL..." if base else "MODEL..."


def is_setting(word: str) -> bool:
    """Whether a word is KEY=VALUE, and not a place that has a "=" in it."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.isidentifier()


def literal(value: str) -> Any:
    """What a word means: a number, true, false, null, a list or table as JSON has them; a text otherwise."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _place(model: str) -> str:
    """The same for what is the same model, however it is spelt."""
    from fusionbench.locations import locate

    if model.startswith("hf:"):  # not downloaded for this
        return model
    place = Path(os.path.realpath(locate(model)))
    return str(place.parent if place.name == "model.safetensors" else place)


def names_of(models: list[str]) -> dict[str, str]:
    """Names for models: of their folders, or the whole paths where two folders are called the same."""
    places = [_place(model) for model in models]
    if len(set(places)) < len(places):
        twice = next(model for i, model in enumerate(models) if places[i] in places[:i])
        raise InputError(f"'{twice}' is given twice: give each model once, and weights where one is to count more.")
    short = [Path(model).name or model for model in models]
    if len(set(short)) == len(short) and "base" not in short:
        return dict(zip(short, models, strict=True))
    return {"./base" if place == "base" else place: place for place in models}  # "base" is what recipes call the base
