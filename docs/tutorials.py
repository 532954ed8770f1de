"""Write what the blocks of the tutorials print: python docs/tutorials.py [NAME ...]      (a minute each)

The blocks of docs/tutorial-NAME.md are run in order, in an empty folder: files, which their first line names
(`# tasks.yaml`), commands of fusionbench, and Python, as in one session. What a block has printed stands in the block
of text behind it, where there is one. Pictures that the page shows go to docs/images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fusionbench.cli import main as fusionbench

DOCS = Path(__file__).parent
NAMES = ("vision", "lora", "language-models", "method")
WIDTH = "100"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"\]\(images/([\w-]+\.png)\)")


def played(text: str) -> str:
    """The page, with what its blocks print when they are run here, in the working directory."""
    session: dict[str, Any] = {"__name__": "__main__"}

    def play(block: re.Match[str]) -> str:
        language, content, shown = block.groups()
        printed = run(language, content, session)
        if shown is None:
            return block[0]
        return f"```{language}\n{content}```\n\n```text\n{printed}```\n"

    return BLOCK.sub(play, text)


def run(language: str, content: str, session: dict[str, Any]) -> str:
    """Run a block, or write its file; return what it has printed."""
    if named := re.match(r"# ([\w-]+\.\w+)\n", content):
        Path(named[1]).write_text(content)
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if language == "python":
            exec(compile(content, "<tutorial>", "exec"), session)
        elif language == "sh":
            for line in content.replace("\\\n", " ").splitlines():
                command(shlex.split(line, comments=True))
        else:
            raise ValueError(f"A block of {language} is a file, and names it in its first line:\n{content}")
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip("\n") + "\n")


def command(words: list[str]) -> None:
    if words and words[0] != "fusionbench":
        raise ValueError(f"A tutorial's commands are fusionbench's: {shlex.join(words)}")
    if words and fusionbench(words[1:]):
        raise ValueError(f"It failed: {shlex.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    os.environ["COLUMNS"] = WIDTH
    for name in parser.parse_args().names or NAMES:
        page = DOCS / f"tutorial-{name}.md"
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            text = played(page.read_text())
            for picture in PICTURE.findall(text):
                shutil.copy(picture, DOCS / "images" / picture)
        page.write_text(text)


if __name__ == "__main__":
    main()
