"""The README's commands and snippets do what they say."""

import re
from pathlib import Path

import pytest
from documents import blocks, commands
from tiny_clip import write_clip, write_fine_tune, write_zoo

import fusionbench as fb
from fusionbench.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_on_the_embedded_zoo(
    work: Path, capsys: pytest.CaptureFixture[str], few_examples: None
) -> None:
    shown = commands(README)
    assert len(shown) == 11
    for words in shown:
        assert main(words) == 0, words
    assert (work / "merged" / "recipe.json").exists() and (work / "report.json").exists()


def test_the_method_in_twelve_lines_runs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = next(block for block in blocks(README, "python") if block.startswith("# my_median.py"))
    (work / "my_median.py").write_text(plugin)
    write_zoo(work)
    words = re.findall(r"`fusionbench (run plugins=.*?)`", README, re.DOTALL)[0].split()
    replaced = [
        {"modelpool": "modelpool=pool.yaml", "taskpool": "taskpool=tasks.yaml"}.get(w.split("=")[0], w) for w in words
    ]
    assert main(replaced) == 0
    assert "median scaling_factor=0.8" in capsys.readouterr().out


def test_the_python_snippets_run(work: Path, capsys: pytest.CaptureFixture[str], few_examples: None) -> None:
    clip = write_clip(work / "clip")
    for seed, name in enumerate(("base", "a", "b")):
        write_fine_tune(work / "path" / "to" / name, clip, seed)
    snippet = next(block for block in blocks(README, "python") if block.startswith("import fusionbench as fb"))
    exec(snippet, {})
    assert (work / "path/to/merged/recipe.json").exists()
    exec(next(block for block in blocks(README, "python") if block.startswith("pool, tasks =")), {"fb": fb})
    assert "'average': 0." in capsys.readouterr().out
    assert sorted(fb.Checkpoint.open("path/to/merged")) == sorted(fb.Checkpoint.open("path/to/a"))
