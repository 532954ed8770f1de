"""The commands and snippets that documents show."""

import re
import shlex


def blocks(text: str, language: str) -> list[str]:
    """What stands in the fences of a language, a regular expression."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each `fusionbench` command in the fences, without the first."""
    lines = "\n".join(blocks(text, "(?:ba)?sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fusionbench ")]


def mentions(text: str) -> list[list[str]]:
    """The words of each command within a sentence; values left out with dots are left out."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"`fusionbench ([^`]+)`", prose)
    return [shlex.split(words.replace("...,", "").replace(",...", "")) for words in found]
