"""The command line: a verb, then words in Hydra's override language. Prints; computes nothing itself."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
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
method.density=0.1, +modelpool.models.mine=path/to/model or ~taskpool.tasks.mnist. The result is scored on
all tasks; methods look at the data of those only that are called as a model is (of all, where none is)."""

EVAL = """examples:
  fusionbench eval merged taskpool=clip-mini report=report.json
  fusionbench eval clip-mini taskpool=clip-mini         (every model of the pool on every task)"""

SIMILARITY = """example:
  fusionbench similarity modelpool=clip-mini out=cosine.png"""

COEFFICIENTS = """example:
  fusionbench run method=adamerging method.coefficients=learned.json modelpool=clip-mini taskpool=clip-mini
  fusionbench coefficients learned.json --out learned.png
  fusionbench run method=apply_coefficients method.file=learned.json modelpool=clip-mini out=merged"""

REPORT = """examples:
  fusionbench report report.json
  fusionbench report reports             (all of a folder, in one table)
  fusionbench report results -o report.html    (a page of what suites have kept: fusionbench bench)"""

LIST = """examples:
  fusionbench list
  fusionbench list methods
  fusionbench list published"""

DESCRIBE = """examples:
  fusionbench describe ties_merging
  fusionbench describe clip-mini
  fusionbench describe clip-vit-b32-8tasks"""


# What the machine refuses, which is no bug of ours: a full or read-only disk, a missing permission, too long a name.
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


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


Add = Callable[[str, str, str], argparse.ArgumentParser]
"""What puts a verb into the parser: its name, what it does, and what is said at the end of its --help."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected at least one argument"):
            message += " (write what begins with - behind =, as --weights=-1,1)"
        raise InputError(f"{message[0].upper()}{message[1:]}. See: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from fusionbench import analysis_commands, evolve_commands, file_commands, lora_commands, suite_commands
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
        "models",
        nargs="+",
        metavar="MODEL|KEY=VALUE",
        help="folder, file, zoo:NAME, or a pool's name or .yaml; then taskpool= (required), report= and corruption= "
        "(as motion_blur:3)",
    )
    evaluate.add_argument("--device", default="cpu", help="where to evaluate (default: cpu)")
    evolve_commands.add_verbs(add)
    file_commands.add_verbs(add)
    similarity = add("similarity", "show the cosine of every two models' task vectors", SIMILARITY)
    similarity.add_argument("words", nargs="+", metavar="KEY=VALUE", help="modelpool=, and out= for a heat map")
    coefficients = add("coefficients", "show the merging coefficients that a method has learned", COEFFICIENTS)
    coefficients.add_argument("file", metavar="FILE", help="what method.coefficients= wrote")
    coefficients.add_argument("--out", metavar="PICTURE", help="a heat map, tensors by models: .png, .svg or .pdf")
    lora_commands.add_verbs(add)
    report = add("report", "show reports of runs, and what the paper's authors published of the same methods", REPORT)
    report.add_argument("reports", nargs="+", metavar="REPORT", help="file that report= wrote, or a folder of them")
    report.add_argument("-o", "--out", metavar="PAGE", help="an .html file: a page of a folder of kept results")
    report.add_argument("--cosines", action="store_true", help="with heat maps of the pools' task vectors (opens them)")
    analysis_commands.add_verbs(add)
    suite_commands.add_verbs(add)
    listing = add("list", "list methods, modelpools, taskpools, architectures, suites, and published tables", LIST)
    listing.add_argument("what", nargs="?", metavar="WHAT", help=" | ".join(LISTED))
    describe = add("describe", "show what a method does and takes, what a pool or a published table holds", DESCRIBE)
    describe.add_argument("name", metavar="NAME", help="a method, pool, task, suite or published table")
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe or terminal whose encoding has no letter such as θ
    if words and "=" in words[0] and not words[0].startswith("-"):
        words.insert(0, "run")  # as the paper writes it: fusion_bench method=... modelpool=...
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        parser = _parser()
        _check_verb(words)
        parsed = _parsed(parser, words)
        if parsed.verb is None:
            parser.print_help()
            return 0
        for plugin in vars(parsed).get("plugin", ()):
            from fusionbench.config import load_plugin

            load_plugin(plugin)
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
        kept = "" if error.errno == errno.ENAMETOOLONG else " What is done is kept for the same command."
        print(f"fusionbench: {error.strerror}:{place or ' while writing'}.{kept}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusionbench: interrupted; run the same command to resume.", file=sys.stderr)
        return 130


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The parsed words; what stands behind an option belongs to those before it."""
    from fusionbench import file_commands

    parsed, more = parser.parse_known_args(words)
    if more and (any(word.startswith("-") for word in more) or not hasattr(parsed, "words")):
        if parsed.verb == "merge":
            file_commands.check_hyperparameters(parsed.method, more)
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        parsed.words += more
    for name, value in vars(parsed).items():
        if name == "out" and value == "":  # as of a variable of the shell that is not set
            raise InputError("out is empty: name what is to be written.")
        if isinstance(value, str) and value.startswith("~"):  # as behind "--out=", where no shell expands it
            setattr(parsed, name, os.path.expanduser(value))
    return parsed


def _check_verb(words: list[str]) -> None:
    from fusionbench.commands import VERBS

    if words and not words[0].startswith("-") and words[0] not in VERBS:
        raise InputError(f"There is no command '{words[0]}'. {did_you_mean(words[0], VERBS)}")


if __name__ == "__main__":
    sys.exit(main())
