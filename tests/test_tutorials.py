"""The blocks of the tutorials run, in order, and print what the pages say that they print."""

import importlib.util
import re
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"
CLOSE = 1.5  # percent, or seconds


def tutorials() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorials", DOCS / "tutorials.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TUTORIALS = tutorials()


def pieces(text: str) -> list[str]:
    """Words, numbers and signs; keys of results, lines of tables and marks of the best row left out."""
    text = re.sub(r"\([0-9a-f]{16}\)", "(KEY)", text).replace("*", "").replace("─", "")
    return re.findall(r"[-+]?\d+\.\d+|\w+|[^\w\s]", text)


def same(shown: str | None, printed: str | None) -> bool:
    """Whether two pieces are equal or, of numbers with a point, close: another machine may round otherwise."""
    number = re.compile(r"[-+]?\d+\.\d+")
    if shown and printed and number.fullmatch(shown) and number.fullmatch(printed):
        return abs(float(shown) - float(printed)) <= CLOSE
    return shown == printed


@pytest.mark.parametrize("name", TUTORIALS.NAMES)
def test_a_tutorial_prints_what_it_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", TUTORIALS.WIDTH)
    text = (DOCS / f"tutorial-{name}.md").read_text()
    assert "```text\n```" not in text, f"python docs/tutorials.py {name} writes what is printed"
    shown, printed = pieces(text), pieces(TUTORIALS.played(text))
    for number, (a, b) in enumerate(zip_longest(shown, printed)):
        around = slice(max(number - 12, 0), number + 12)
        assert same(a, b), f"shown: {' '.join(shown[around])}\nprinted: {' '.join(printed[around])}"
    for picture in TUTORIALS.PICTURE.findall(text):
        assert (tmp_path / picture).stat().st_size > 5000 and (DOCS / "images" / picture).exists()


def test_every_tutorial_is_run() -> None:
    pages = {file.stem.removeprefix("tutorial-") for file in DOCS.glob("tutorial-*.md")}
    assert pages == {*TUTORIALS.NAMES, "smollm2"}  # test_tutorial_smollm2.py
    for name in TUTORIALS.NAMES:
        assert (DOCS / f"tutorial-{name}.md").read_text().count("```text\n") >= 3


def test_what_differs_is_seen() -> None:
    assert pieces("best: 89.0* (fe686317f3f675ac)") == pieces("best:  89.0  (0aaf2b2bf8448e76)")
    assert same("89.0", "88.2") and not same("89.0", "87.2")
    assert not same("89.0", None) and not same("better", "chance") and not same("536", "537")
