"""The command line: a verb, then words in Hydra's override language. Prints; computes nothing itself."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fusionbench import __version__
from fusionbench.errors import InputError, did_you_mean

DESCRIPTION = """Combine fine-tuned models without training, and measure what is gained and lost.

  fusionbench run method=ties_merging modelpool=clip-mini taskpool=clip-mini
  fusionbench list
  fusionbench describe ties_merging"""

RUN = """examples:
  fusionbench run method=task_arithmetic method.scaling_factor=0.3 modelpool=clip-mini taskpool=clip-mini
  fusionbench run method=ties_merging modelpool=clip-mini out=merged report=report.json
  fusionbench run method=simple_average,ties_merging modelpool=clip-mini taskpool=clip-mini     (a table of both)
  fusionbench run method=task_arithmetic method.scaling_factor=0.1,0.2,0.3 modelpool=clip-mini taskpool=clip-mini
  fusionbench run method=my_method plugins=[my_method.py] modelpool=my_pool.yaml taskpool=my_tasks.yaml

method, modelpool and taskpool are names (see: fusionbench list) or .yaml files; keys inside them are set with dots, as
method.density=0.1, +modelpool.models.mine=path/to/model or ~taskpool.tasks.mnist."""

EVAL = """examples:
  fusionbench eval merged taskpool=clip-mini report=report.json
  fusionbench eval clip-mini taskpool=clip-mini         (every model of the pool on every task)"""

MERGE = """examples:
  fusionbench merge ties_merging BASE FIRST SECOND -o merged density=0.2 scaling_factor=0.5
  fusionbench merge weighted_average FIRST SECOND -o merged 'weights=[0.7,0.3]'
  fusionbench merge depth_upscaling MODEL -o deeper layers=0:24+8:32
  fusionbench merge recipe.yaml merged          (as mergekit's; --dry-run shows the plan)

Models are folders, files, zoo:NAME or hf:OWNER/NAME. What is killed or interrupted goes on where it was when the same
command is started again. fusionbench describe METHOD says what a method takes."""

VERIFY = """examples:
  fusionbench verify merged
  fusionbench verify merged --inputs"""

DIFF = """example:
  fusionbench diff zoo:clip-mini/base merged"""

SIMILARITY = """example:
  fusionbench similarity modelpool=clip-mini out=cosine.png"""

COEFFICIENTS = """example:
  fusionbench run method=adamerging method.coefficients=learned.json modelpool=clip-mini taskpool=clip-mini
  fusionbench coefficients learned.json --out learned.png
  fusionbench run method=apply_coefficients method.file=learned.json modelpool=clip-mini out=merged"""

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

REPORT = """examples:
  fusionbench report report.json
  fusionbench report reports             (all of a folder, in one table)
  fusionbench report results -o report.html    (a page of what suites have kept: fusionbench bench)"""

LIST = """examples:
  fusionbench list
  fusionbench list methods
  fusionbench list published"""

EVOLVE = """example:
  fusionbench evolve recipe.yaml search --taskpool clip-mini --generations 5      with a recipe.yaml of

    merge_method: linear
    models:
      - model: zoo:clip-mini/mnist
        parameters: {weight: {search: [0, 1]}}
      - model: zoo:clip-mini/emoji
        parameters: {weight: {search: [0, 1], start: 0.3}}

The search (CMA-ES) merges candidates in memory and scores them on calibration data; the best one alone is scored on
test data, in the end. OUT has the best recipe, for fusionbench merge, the report, a picture, and a journal of what was
tried: the same command goes on where it was, and with more --generations goes further."""

MOE = """example:
  fusionbench moe recipe.yaml mixture      with a recipe.yaml of

    base_model: mistral                    (a folder, zoo:NAME or hf:OWNER/NAME; MODEL+ADAPTER is a model with LoRA)
    gate_mode: hidden                      (or cheap_embed, random, uniform_random)
    dtype: bfloat16
    experts:
      - source_model: mistral-code
        positive_prompts: ["Write a function that", "def main():"]
      - source_model: mistral-law
        positive_prompts: ["The court held that"]
        negative_prompts: ["def main():"]

Gates come from what the base model's layers are given at the last token of the prompts (hidden), or from the prompts'
embeddings (cheap_embed). Llama and Mistral become Mixtral or, with a shared expert or architecture: deepseek, have
DeepSeek's experts (as GLM-4's class in transformers); architecture: qwen gives the shared expert a gate. Qwen2 and
Qwen3 become their own sparse classes."""

DESCRIBE = """examples:
  fusionbench describe ties_merging
  fusionbench describe clip-mini
  fusionbench describe clip-vit-b32-8tasks"""


# What the machine refuses, which is no bug of ours: a full or read-only disk, a missing permission.
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


# What is installed only where it is wanted, and with which extra.
EXTRAS = {
    "torch": "torch",
    "safetensors": "torch",
    "transformers": "hf",
    "datasets": "hf",
    "peft": "hf",
    "matplotlib": "plot",
    "optuna": "tune",
    "cmaes": "evolve",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}. See: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from fusionbench import analysis_commands, suite_commands
    from fusionbench.commands import LISTED, VERBS

    parser = _Parser(prog="fusionbench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"fusionbench {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def add(verb: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        added = verbs.add_parser(verb, help=summary, description=summary, epilog=epilog, formatter_class=formatter)
        added.set_defaults(command=VERBS[verb])
        return added

    options = "\n".join(f"  {name + '=':<12} {meaning}" for name, meaning in _options().items())
    run = add("run", "fuse a pool of models, save and evaluate the result", f"options:\n{options}\n\n{RUN}")
    run.add_argument("words", nargs="*", metavar="KEY=VALUE", help="method=, modelpool=, taskpool=, and options")
    run.add_argument("--nan", choices=("error", "warn", "ignore"), help="the same as nan=")
    evaluate = add("eval", "evaluate models that are there", EVAL)
    evaluate.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder, file, zoo:NAME, or a pool's name or .yaml"
    )
    evaluate.add_argument("--device", default="cpu", help="where to evaluate (default: cpu)")
    evolve = add("evolve", "search the free numbers of a recipe against a task pool", EVOLVE)
    evolve.add_argument("recipe", metavar="RECIPE", help="a .yaml file, with numbers as {search: [low, high]}")
    evolve.add_argument("out", metavar="OUT", help="folder to write; a search that was interrupted goes on there")
    evolve.add_argument("--taskpool", required=True, metavar="NAME", help="a task pool's name, or a .yaml file")
    evolve.add_argument("--split", default="calibration", help="to score on: calibration, never test (the default)")
    evolve.add_argument("--generations", type=int, default=10, help="how many there are to be (default: 10)")
    evolve.add_argument("--population", type=int, help="candidates in each (default: 4 + 3 log of how many numbers)")
    evolve.add_argument("--sigma", type=float, default=0.25, help="how wide it begins, of each range (default: 0.25)")
    evolve.add_argument("--seed", type=int, default=0, help="of the candidates (default: 0)")
    evolve.add_argument("--device", default="cpu", help="where to evaluate (default: cpu)")
    merge = add("merge", "merge checkpoints by a method or a recipe: files to files, without torch", MERGE)
    merge.add_argument("method", metavar="METHOD|RECIPE.yaml")
    merge.add_argument("words", nargs="*", metavar="MODEL", help="first the base, where the method needs it; KEY=VALUE")
    merge.add_argument("-o", "--out", help="folder to write; of a recipe, also behind it")
    merge.add_argument("--dry-run", action="store_true", help="of a recipe: show the plan, and write nothing")
    merge.add_argument("--memory", default="96MB", help="for what is read and computed (default: 96MB)")
    merge.add_argument("--workers", type=int, help="threads or processes (default: one per core)")
    merge.add_argument("--executor", default="threads", help="threads | processes | ray: who does the work")
    merge.add_argument("--device", default="cpu", help="of the passes: cpu, cuda, cuda:1 ... (default: cpu)")
    merge.add_argument("--shard-size", default="5GB", help="above which the weights are several files (default: 5GB)")
    merge.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    merge.add_argument("--nan", choices=("error", "warn", "ignore"), default="error", help="in an input")
    merge.add_argument(
        "--align", metavar="HOW", help="weight_matching: permute units to the order of the first model's"
    )
    merge.add_argument("--vocabulary", choices=("truncate", "pad", "union"), help="where models have other tokens")
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
    verify.add_argument("folder", metavar="FOLDER")
    verify.add_argument("--inputs", action="store_true", help="compute some tensors again from the recipe's models")
    verify.add_argument("--samples", type=int, default=8, help="how many (default: 8)")
    diff = add("diff", "compare two checkpoints tensor by tensor", DIFF)
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    diff.add_argument("--all", action="store_true", help="show every tensor, not only the 20 that differ most")
    similarity = add("similarity", "show the cosine of every two models' task vectors", SIMILARITY)
    similarity.add_argument("words", nargs="+", metavar="KEY=VALUE", help="modelpool=, and out= for a heat map")
    coefficients = add("coefficients", "show the merging coefficients that a method has learned", COEFFICIENTS)
    coefficients.add_argument("file", metavar="FILE", help="what method.coefficients= wrote")
    coefficients.add_argument("--out", metavar="PICTURE", help="a heat map, tensors by models: .png, .svg or .pdf")
    lora = add("lora", "extract LoRA adapters from models, and merge adapters", LORA)
    actions = lora.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser, required=True)

    def act(action: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return actions.add_parser(action, help=summary, description=summary, epilog=epilog, formatter_class=formatter)

    extract = act("extract", "make a LoRA adapter of the difference of two models", LORA_EXTRACT)
    extract.add_argument("base", metavar="BASE")
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
    report = add("report", "show reports of runs, and what the paper's authors published of the same methods", REPORT)
    report.add_argument("reports", nargs="+", metavar="REPORT", help="file that report= wrote, or a folder of them")
    report.add_argument("-o", "--out", metavar="PAGE", help="an .html file: a page of a folder of kept results")
    report.add_argument("--cosines", action="store_true", help="with heat maps of the pools' task vectors (opens them)")
    analysis_commands.add_verbs(add)
    suite_commands.add_verbs(add)
    listing = add("list", "list methods, modelpools, taskpools, architectures, suites, and published tables", LIST)
    listing.add_argument("what", nargs="?", metavar="WHAT", help=" | ".join(LISTED))
    describe = add("describe", "show what a method does and takes, what a pool or a published table holds", DESCRIBE)
    describe.add_argument("name", metavar="NAME")
    for verb in (listing, describe):
        verb.add_argument(
            "--plugin", action="append", default=[], help="a .py file or module with methods of one's own"
        )
    return parser


def _options() -> dict[str, str]:
    from fusionbench.config import OPTIONS

    return OPTIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 for what the user can mend; bugs keep their traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and "=" in words[0] and not words[0].startswith("-"):
        words.insert(0, "run")  # as the paper writes it: fusion_bench method=... modelpool=...
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        parser = _parser()
        _check_verb(parser, words)
        parsed = _parsed(parser, words)
        if parsed.verb is None:
            parser.print_help()
            return 0
        command: Callable[[argparse.Namespace], int | None] = parsed.command
        return command(parsed) or 0
    except InputError as error:
        print(f"fusionbench: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        print(f"fusionbench: this needs {error.name}: pip install 'fusionbench[{extra}]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        place = f" '{error.filename}'" if error.filename else ""
        print(
            f"fusionbench: {error.strerror}:{place or ' while writing'}. What is done is kept for the same command.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("fusionbench: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The parsed words; what stands behind an option belongs to those before it."""
    parsed, more = parser.parse_known_args(words)
    if more and (any(word.startswith("-") for word in more) or not hasattr(parsed, "words")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        parsed.words += more
    return parsed


def _check_verb(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from fusionbench.commands import VERBS

    if words and not words[0].startswith("-") and words[0] not in VERBS:
        raise InputError(f"There is no command '{words[0]}'. {did_you_mean(words[0], VERBS)}")


if __name__ == "__main__":
    sys.exit(main())
