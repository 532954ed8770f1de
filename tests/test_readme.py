"""The README's commands do what they say on the whole zoo. (test_pages.py runs them on a few examples of each task.)"""

from pathlib import Path

import pytest
from documents import commands

from fusionbench.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_commands_run_on_the_embedded_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands(README)
    assert len(shown) == 11
    for words in shown:
        assert main(words) == 0, words
    assert Path("merged", "recipe.json").exists() and Path("report.json").exists()
