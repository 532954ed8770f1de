"""The commands and snippets that documents show."""

import re
import shlex
from pathlib import Path

import fusionbench as fb
from fusionbench import config
from fusionbench.cli import _parsed, _parser
from fusionbench.suites import load_suites


def blocks(text: str, language: str) -> list[str]:
    """What stands in the fences of a language, a regular expression."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each `fusionbench` command in the fences, without the first."""
    lines = "\n".join(blocks(text, "(?:ba)?sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fusionbench ")]


def mentions(text: str) -> list[list[str]]:
    """The words of each command within a sentence."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(words) for words in re.findall(r"`fusionbench ([^`]+)`", prose)]


def name_of(block: str) -> str:
    """The file that a block is, which its first line names; nothing where it does not."""
    found = re.match(r"# ([\w-]+\.\w+)\n", block)
    return found[1] if found else ""


def write_files(text: str, folder: Path) -> None:
    """The files that a page shows, and the lines of JSON that writing.md calls films.jsonl."""
    for block in blocks(text, "(?:python|yaml)"):
        if name_of(block):
            (folder / name_of(block)).write_text(block)
    for block in blocks(text, "json"):
        (folder / "films.jsonl").write_text(block)


def check(words: list[str]) -> None:
    """The command is one that the parser takes, and what it is to run is there."""
    parsed = _parsed(_parser(), words)
    assert callable(parsed.command)
    if words[0] == "run":
        assert config.compose(parsed.words)
    if words[0] == "bench" and parsed.suites != ["SUITE"]:
        assert load_suites(parsed.suites).cells
    if words[0] == "merge" and parsed.method.islower() and not parsed.method.endswith(".yaml"):
        settings = [word.partition("=")[0] for word in parsed.words if "=" in word]
        assert set(settings) <= set(fb.registry.get_method(parsed.method).hyperparameters)
