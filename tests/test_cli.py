"""The command line, as a person uses it: in this process for speed, in another where start-up itself is looked at."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import write_zoo

import fusionbench as fb
from fusionbench import published
from fusionbench.cli import _parser, main
from fusionbench.registry import Method, registered
from fusionbench.writer import stamps

PLUGIN = '''
from typing import Annotated
import torch
from fusionbench import Checkpoint, ModelPool, Range, method

@method("merging", paper="2407.06322")
def median(pool: ModelPool, *, scaling_factor: Annotated[float, Range(0, 2), "of the change"] = 0.5) -> Checkpoint:
    """Of every parameter, keep the change of largest magnitude (Marczak et al., 2024)."""
    def merge(p):
        largest = p.task_vectors.abs().argmax(0, keepdim=True)
        return p.base + scaling_factor * p.task_vectors.gather(0, largest)[0]
    return pool.map(merge)
'''


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write_zoo(folder)
    (folder / "empty.yaml").write_text("models: {}\n")
    (folder / "tasks" / "deep.json").write_text("[" * 100_000)
    return folder


@pytest.fixture
def zoo(zoo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    return zoo_folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pools(zoo: Path) -> list[str]:
    return [f"modelpool={zoo}/pool.yaml", f"taskpool={zoo}/tasks.yaml"]


def test_run_prints_a_table_and_writes_report_and_model(
    zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "run",
        "method=task_arithmetic",
        "method.scaling_factor=0.5",
        *pools(zoo),
        "out=merged",
        "report=r/one.json",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "task_arithmetic scaling_factor=0.5" in printed and "vs individual" in printed
    assert "The report is in r/one.json" in printed and "The model is in merged" in printed
    report = json.loads((work / "r" / "one.json").read_text())
    assert list(report) == ["model_info", "colours", "greys", "average", "run"]
    assert f"{100 * report['average']['accuracy']:.1f}" in printed
    run = report["run"]
    assert (run["method"], run["hyperparameters"]) == ("task_arithmetic", {"scaling_factor": 0.5})
    assert set(run["seconds"]) == set(run["cpu_seconds"]) == {"fusion", "evaluation"}
    assert run["peak_memory_mb"] > 100 and "torch" in run["versions"]
    seconds = run["seconds_per_sample"]
    assert run["added_parameters"] == 0 and seconds["this"] == seconds["one model"] > 0
    assert set(run["modelpool"]) == {"base", "colours", "greys"}
    assert len(run["taskpool"]["greys"]["data"]) == 64
    recipe = json.loads((work / "merged" / "recipe.json").read_text())
    assert recipe["inputs"]["colours"]["xxh3"] == run["modelpool"]["colours"]["xxh3"]
    base, tuned = (fb.Checkpoint.open(zoo / name) for name in ("base", "colours"))
    other = fb.Checkpoint.open(zoo / "greys")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    short = name if name in tuned else name.removeprefix("vision_model.")
    expected = base[name] + 0.5 * (tuned[short] + other[short] - 2 * base[name])
    torch.testing.assert_close(load_file(work / "merged" / "model.safetensors")[name], expected)


def test_several_methods_make_one_table_and_a_report_each(
    zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=pretrained,simple_average,simple_ensemble,individual", *pools(zoo), "report=reports"]
    assert main(words) == 0  # no verb: as the paper writes it
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert rows[3:7] == ["pretrained", "simple_average", "simple_ensemble", "individual"]
    assert "*" in printed and "The reports are in reports" in printed
    names = ["individual.json", "pretrained.json", "simple_average.json", "simple_ensemble.json"]
    assert sorted(path.name for path in (work / "reports").iterdir()) == names


def test_sweeps(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "method=task_arithmetic", "method.scaling_factor=0.1,0.2", *pools(zoo), "out=all", "reference=null"]
    assert main(words) == 0
    assert "vs individual" not in capsys.readouterr().out
    assert sorted(path.name for path in (work / "all").iterdir()) == [
        "task_arithmetic-scaling_factor=0.1",
        "task_arithmetic-scaling_factor=0.2",
    ]


def test_methods_look_at_the_tasks_of_merged_models_and_the_result_is_scored_on_all(zoo: Path, work: Path) -> None:
    words = ["run", "method=adamerging", "method.steps=1", *pools(zoo), "~modelpool.models.greys"]
    assert main([*words, "out=merged", "report=report.json"]) == 0
    assert list(json.loads((work / "merged" / "recipe.json").read_text())["data"]) == ["colours"]
    assert {"colours", "greys"} < set(json.loads((work / "report.json").read_text()))
    nameless = ["~modelpool.models.colours", f"+modelpool.models.mine={zoo}/colours"]  # all may be its task
    assert main([*words, *nameless, "out=mine"]) == 0
    assert list(json.loads((work / "mine" / "recipe.json").read_text())["data"]) == ["colours", "greys"]


def test_eval_takes_a_saved_model_and_a_whole_pool(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "method=simple_average", *pools(zoo), "out=merged", "report=run.json"]) == 0
    assert main(["eval", "merged", f"taskpool={zoo}/tasks.yaml", "report=eval.json"]) == 0
    ran, evaluated = (json.loads((work / name).read_text()) for name in ("run.json", "eval.json"))
    assert ran["greys"] == evaluated["greys"] and ran["average"] == evaluated["average"]
    capsys.readouterr()
    assert main(["eval", f"{zoo}/pool.yaml", f"taskpool={zoo}/tasks.yaml", "report=cross.json"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("base", "colours", "greys"))
    assert list(json.loads((work / "cross.json").read_text())) == ["base", "colours", "greys"]


def test_the_help_of_eval_says_what_it_takes_besides_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(word in said for word in ("MODEL|KEY=VALUE", "taskpool= (required), report= and corruption="))


def test_every_word_and_option_of_every_verb_has_help() -> None:
    def without(parser: argparse.ArgumentParser) -> list[str]:
        found = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [word for verb in action.choices.values() for word in without(verb)]
            elif not action.help:
                found.append(f"{parser.prog}: {action.dest}")
        return found

    assert without(_parser()) == []


def test_a_plugin_is_listed_configured_and_checked(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "my_median.py").write_text(PLUGIN)
    words = ["run", "method=median", "method.scaling_factor=0.8", *pools(zoo), "reference=null"]
    assert main([*words, "plugins=[my_median]"]) == 0
    assert "median scaling_factor=0.8" in capsys.readouterr().out
    assert main(["describe", "median", "--plugin", "my_median"]) == 0
    assert "[0, 2]" in capsys.readouterr().out
    assert main([*words, "plugins=[my_median]", "method.scaling_factor=3"]) == 2
    assert "must be in [0, 2]" in capsys.readouterr().err
    for missing in ("my_magmin", "my_magmin.py", "no_package.my_magmin"):
        assert main([*words, f"plugins=[{missing}]"]) == 2
        assert f"'{missing}' is neither a file '" in capsys.readouterr().err
    other = work / "other" / "my_median.py"  # of the same name
    other.parent.mkdir()
    other.write_text(PLUGIN.replace("def median", "def other_median"))
    assert main(["describe", "other_median", "--plugin", "my_median", "--plugin", str(other)]) == 0
    (work / "imports.py").write_text("import no_such_module\n")
    for _ in range(2):  # one that failed is not taken for loaded
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):  # a mistake in a plugin keeps its traceback
            main([*words, "plugins=[imports]"])
    future = "from __future__ import annotations\n" + PLUGIN.replace("def median", "def unknown_range")
    (work / "ranges.py").write_text(future.replace("ModelPool, Range, method", "ModelPool, method"))
    assert main(["list", "methods", "--plugin", "ranges"]) == 2
    error = capsys.readouterr().err
    assert f"unknown_range of '{work}/ranges.py': the annotation of 'scaling_factor' is not understood: " in error
    assert "name 'Range' is not defined." in error and "unknown_range" not in registered()
    (work / "broken.py").write_text("import fusionbench\n\ndef half(:\n")
    assert main([*words, "plugins=[broken]"]) == 2
    assert "The plugin 'broken.py' is not Python: invalid syntax in line 3." in capsys.readouterr().err


def test_merge_and_verify_take_plugins(
    zoo: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "my_largest.py").write_text(PLUGIN.replace("def median", "def largest").replace(")\n", ", base=True)\n", 1))
    models = [str(zoo / name) for name in ("base", "colours", "greys")]
    assert main(["merge", "largest", *models, "-o", "merged", "--plugin", "my_largest"]) == 0
    assert "-o OUT --plugin my_largest" in (work / "merged" / "README.md").read_text()
    loaded = next(name for name in sys.modules if name.startswith("fusionbench_plugin_my_largest"))
    monkeypatch.delitem(registered(), "largest")
    monkeypatch.delitem(sys.modules, loaded)
    assert main(["verify", "merged", "--inputs"]) == 2  # as by another process
    assert "largest is of the plugin my_largest.py: give --plugin my_largest.py." in capsys.readouterr().err
    assert main(["verify", "merged", "--inputs", "--plugin", "my_largest.py"]) == 0


def test_diff_compares_tensors(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.tensor([3.0, 4.0]), "same": torch.ones(4), "only": torch.ones(1)}, work / "a.safetensors")
    save_file({"w": torch.tensor([3.0, -4.0]), "same": torch.ones(4), "shape": torch.ones(1)}, work / "b.safetensors")
    assert main(["diff", "a.safetensors", "b.safetensors"]) == 0
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["w"])
    assert row[1:] == ["5", "5", "8", "1.6", "-0.280000", "8"]
    assert "1 only in a.safetensors: only" in printed and "1 only in b.safetensors: shape" in printed
    assert "all 2 tensors" in printed


def test_diff_tells_of_other_dtypes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"v": torch.ones(2), "w": torch.ones(3), "number": torch.tensor(1)}
    save_file(tensors, work / "a.safetensors")
    halves = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, work / "b.safetensors")
    save_file({**tensors, "v": torch.ones(2).half()}, work / "c.safetensors")
    assert main(["diff", "a.safetensors", "a.safetensors"]) == 0
    assert "F32" not in capsys.readouterr().out
    assert main(["diff", "a.safetensors", "b.safetensors"]) == 0
    assert capsys.readouterr().out.endswith("\n2 tensors are F32 in a.safetensors, BF16 in b.safetensors\n")
    assert main(["diff", "a.safetensors", "c.safetensors"]) == 0
    assert capsys.readouterr().out.endswith("\n1 tensor is F32 in a.safetensors, F16 in c.safetensors\n")


def test_models_whose_shapes_alone_differ_are_told_apart(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, width in (("a", 2), ("b", 3)):
        save_file({"model.embed_tokens.weight": torch.ones(4, width)}, work / f"{name}.safetensors")
    assert main(["diff", "a.safetensors", "b.safetensors"]) == 0
    assert capsys.readouterr().out == "1 reshaped: model.embed_tokens.weight\n"
    assert main(["merge", "slerp", "a.safetensors", "b.safetensors", "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert "is (4, 3), but (4, 2) in model" in error and "vocabulary=" not in error


def test_shards_without_an_index_are_told(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "a").mkdir()
    for i in (1, 2):
        save_file({f"w{i}": torch.ones(2)}, work / "a" / f"model-0000{i}-of-00002.safetensors")
    assert main(["diff", "a", "a"]) == 2
    assert "'a' holds 2 shards, but no index of them" in capsys.readouterr().err


def test_tuned_hyperparameters_are_rows_of_their_own(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "method=simple_average,task_arithmetic", *pools(zoo), "tune=3", "report=r", "out=m"]) == 0
    printed = capsys.readouterr().out
    assert "(tuned)" in printed and "The reports are in r" in printed
    reports = {file.name: json.loads(file.read_text()) for file in (work / "r").iterdir()}
    tuned = [report["run"]["tuned"] for name, report in reports.items() if "(tuned)" in name]
    assert len(reports) == 3 and len(tuned) == 1
    assert tuned[0]["trials"] == 3 and tuned[0]["best"] >= tuned[0]["given"]
    (folder,) = (work / "m").glob("*tuned*")
    card = (folder / "README.md").read_text()
    assert "# A merge of colours and greys\n" in card and "`task_arithmetic` ([arXiv 2212.04089]" in card
    (command,) = re.findall("^fusionbench (run .*)$", card, re.MULTILINE)
    assert "taskpool" not in command and "report" not in command
    assert main(shlex.split(command)) == 0  # makes the same model, at OUT
    for name in ("model.safetensors", "README.md"):
        assert (work / "OUT" / name).read_bytes() == (folder / name).read_bytes()
    assert main(["run", "method=simple_average", *pools(zoo), "tune=3"]) == 2
    assert "simple_average has nothing to tune" in capsys.readouterr().err
    assert main(["run", "method=task_arithmetic", *pools(zoo), "tune=0"]) == 2
    assert "tune is a number of trials" in capsys.readouterr().err
    assert main(["run", "method=task_arithmetic", pools(zoo)[0], "tune=3", "out=n"]) == 2
    assert "tune needs a taskpool=" in capsys.readouterr().err


def test_similarity_prints_and_draws(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["similarity", f"modelpool={zoo}/pool.yaml", "out=cosine.png"]) == 0
    assert "1.000" in capsys.readouterr().out
    assert (work / "cosine.png").stat().st_size > 5000
    pool = fb.load_modelpool(f"{zoo}/pool.yaml")
    vectors = [np.concatenate([(pool[m][n] - pool.require_base()[n]).numpy().ravel() for n in pool[m]]) for m in pool]
    expected = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    from fusionbench.analysis import task_vector_cosine

    assert task_vector_cosine(pool)[0, 1].item() == pytest.approx(expected, abs=1e-6)
    twins = fb.ModelPool({"a": pool["greys"], "b": pool["greys"]}, base=pool.base)
    assert task_vector_cosine(twins)[0, 1].item() == pytest.approx(1.0)  # pitfall B13: -0.02, by sampling differently


def test_reports_are_shown_in_one_table_with_what_was_published(
    zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "method=simple_average,individual", *pools(zoo), "report=reports"]) == 0
    assert main(["eval", str(zoo / "greys"), pools(zoo)[1], "report=one.json"]) == 0
    capsys.readouterr()
    assert main(["report", "reports", "one.json"]) == 0
    printed = capsys.readouterr().out
    assert "individual" in printed and "simple_average" in printed and "one" in printed
    assert "Nothing is published of models made from" in printed  # these are nobody's
    run = json.loads((work / "reports" / "simple_average.json").read_text())
    run["run"]["modelpool"]["base"]["location"] = "zoo:clip-mini/base"
    (work / "like.json").write_text(json.dumps(run))
    assert main(["report", "like.json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Simple Averaging" in printed and "66.5" in printed and "RegMean" not in printed.split("Published")[0]
    assert "the order of the methods compares, not the numbers" in printed


def test_published_rows_are_matched_by_method_and_hyperparameter() -> None:
    sweep = published.get_table("gpt2-7tasks")
    assert [row["Avg."] for row in published.matches(sweep, "task_arithmetic", {"scaling_factor": 0.5})] == ["70.0"]
    assert published.matches(sweep, "task_arithmetic", {"scaling_factor": 0.3})[0]["hyperparameter"] == "lambda=0.5"
    assert published.matches(sweep, "never_published", {}) == []
    rows = [{"method": "Ties-Merging", "hyperparameter": f"lambda={x}"} for x in (1, 2)]
    two = published.Table("t", "", "", rows)
    assert [r["hyperparameter"] for r in published.matches(two, "ties_merging", {"scaling_factor": 2.0})] == [
        "lambda=2"
    ]


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"run": 3}',
        '{"run": {}, "films": 3}',
        '{"run": {}, "films": {"accuracy": "no"}}',
        '{"run": {"method": "simple_average"}}',
        '{"run": {"method": "simple_average", "modelpool": {}}}',
    ],
)
def test_what_is_no_report_is_said_in_one_line(content: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "report.json").write_text(content)
    assert main(["report", "report.json"]) == 2
    assert capsys.readouterr().err == "fusionbench: report: 'report.json' is no report of a run.\n"
    (work / "report.json").write_text(content[:-1])
    assert main(["report", "report.json"]) == 2
    assert "report: 'report.json' cannot be read" in capsys.readouterr().err


def test_reports_of_one_name_are_both_shown(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, accuracy in (("a", 0.123), ("b", 0.456)):
        (work / folder).mkdir()
        (work / folder / "report.json").write_text(json.dumps({"run": {}, "films": {"accuracy": accuracy}}))
    assert main(["report", "a", "b"]) == 0
    printed = capsys.readouterr().out
    assert "12.3" in printed and "45.6" in printed


@pytest.mark.parametrize("name", published.list_tables())
def test_a_published_table_is_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = published.get_table(name)
    assert main(["describe", name]) == 0
    printed = capsys.readouterr().out
    scores = [v for row in table.rows for column, v in row.items() if column not in published.NO_SCORES and v]
    assert all(-1 <= float(score) <= 500 for score in scores) and len(scores) >= 6
    assert scores[0] in printed and table.what in " ".join(printed.split())


def test_list_and_describe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(method.name in printed for method in fb.list_methods() if method.name != "median")
    assert "clip-mini" in printed and "clip_vision" in printed
    assert main(["describe", "ties_merging"]) == 0
    printed = capsys.readouterr().out
    assert "(0, 1]" in printed and "https://arxiv.org/abs/2306.01708" in printed and "model | tensor" in printed
    assert "\n    θ  = θ₀ + λ Σᵢ tᵢ [tᵢ s > 0]\n" in printed and "λ: scaling_factor; d: density" in printed
    assert main(["describe", "clip-mini"]) == 0
    assert "zoo:clip-mini/base" in capsys.readouterr().out


NARROW = [
    "list",
    "similarity modelpool=clip-mini",
    "analyze layers modelpool=clip-mini",
    "diff zoo:clip-mini/base zoo:clip-mini/mnist",
    "diff zoo:t5-mini/base zoo:t5-mini/spam --all",
    "lora extract zoo:t5-mini/base zoo:t5-mini/spam -o adapter --rank 8",
    "describe clip-vit-b32-8tasks",
    "describe flan-t5-large-lora16-8tasks",
]


@pytest.mark.parametrize("words", NARROW)
@pytest.mark.parametrize("columns", [60, 80])
def test_on_a_narrow_terminal_no_number_and_no_name_is_cut(
    words: str, columns: int, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(words.split()) == 0
    wide = capsys.readouterr().out
    shutil.rmtree("adapter", ignore_errors=True)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= columns
    if not words.startswith("list"):
        numbers = Counter(word for word in wide.split() if re.fullmatch(r"-?\d+\.\d+", word))
        assert numbers and not numbers - Counter(printed.split())


def test_every_row_of_a_narrow_table_has_its_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["analyze", "layers", "modelpool=clip-mini"]) == 0
    printed = capsys.readouterr().out
    labels = [line.split()[0] for line in printed.splitlines() if "." in line]
    assert labels.count("encoder.layers.5") == labels.count("embeddings.patch_embedding") > 2  # in every block
    assert "effective rank of matrices that changed, in vision_model" in printed
    assert re.search(r"post_layernorm( +-)+ *\n", printed)  # it has no matrix
    assert main(["list", "methods"]) == 0
    printed = capsys.readouterr().out
    assert "\n  merging " in printed and "\n  ties_merging               Trim the task vectors" in printed
    assert re.search(r"\n {29}looks at test inputs, gradients, adds parameters, +\n {29}arXiv 2402\.00433", printed)


@pytest.mark.parametrize("method", [m for m in fb.list_methods() if "zoo:" in m.example], ids=lambda m: m.name)
def test_the_command_that_describe_ends_with_works(
    method: Method, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["describe", method.name]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:3] == ["fusionbench", "merge", method.name]
    assert main(command[1:]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_an_encoding_lacks_is_replaced() -> None:
    words = [sys.executable, "-m", "fusionbench.cli", "describe", "ties_merging"]
    done = subprocess.run(words, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and "ties_merging" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run method=tie_mergin {pools}", "No method is called 'tie_mergin'. Did you mean 'ties_merging'?"),
        (
            "run method=ties_merging method.densty=0.1 {pools}",
            "ties_merging takes no 'densty'. Did you mean 'density'?",
        ),
        ("run method=ties_merging method.density=5 {pools}", "ties_merging.density must be in (0, 1]; got 5."),
        ("run method=ties_merging method.density=lots {pools}", "must be float in (0, 1]; got 'lots'."),
        ("run method=task_arithmetic method.scaling_factor=inf {pools}", "must be in (-inf, inf); got inf."),
        ("run method=task_arithmetic method.scaling_factor=nan {pools}", "must be in (-inf, inf); got nan."),
        ("run method=ties_merging method.trim=all {pools}", "ties_merging.trim must be model | tensor; got 'all'."),
        ("run method=simple_average method.x=1 {pools}", "simple_average takes no 'x'. There is none."),
        (
            "run method=pretrained,ties_merging density=0.2 {pools}",
            "'density' is no option of a run. Did you mean 'method.density'?",
        ),
        ("run method=pretrained density=0.2 {pools}", "'density' is no option of a run. There is: align, batch_norm,"),
        (
            "merge task_arithmetic modelpool=clip-mini -o m",
            "merge takes models by their places, and no modelpool=: pools are for fusionbench run.",
        ),
        (
            "merge task_arithmetic {zoo}/base {zoo}/greys -o m --scaling_factor 0.3",
            "'--scaling_factor' is no option: write scaling_factor=0.3.",
        ),
        ("merge task_arithmetic a b -o m --scaling-factor=0.3", "is no option: write scaling_factor=0.3."),
        ("merge task_arithmetic a b -o m --scaling 0.3", "Unrecognized arguments: --scaling 0.3."),
        ("run metod=ties_merging {pools}", "'metod' is no option of a run. Did you mean 'method'?"),
        (
            "run method=simple_average modelpool=clip-mni",
            "No modelpool is called 'clip-mni'. Did you mean 'clip-mini'?",
        ),
        ("run method=simple_average modelpool=mine.yaml", "modelpool: the file 'mine.yaml' does not exist."),
        ("run method=simple_average", "No modelpool is given."),
        ("run {pools}", "No method is given."),
        ("run method=simple_average {model}", "Nothing would come of this run"),
        ("run simple_average {pools}", "Write KEY=VALUE"),
        ("run method=simple_average modelpool=null out=m", "'modelpool=null' names no modelpool: give one, or leave"),
        ("run method=simple_average {pools} modelpool.models={{}}", "'models' is empty: name at least one model."),
        ("run method=simple_average {pools} nan=maybe", "nan must be error, warn or ignore; got 'maybe'."),
        ("run method=simple_average {pools} --nan maybe", "invalid choice: 'maybe'"),
        (
            "run method=adamerging method.by=layer,task method.coefficients=c.json {pools}",
            "method.coefficients=c.json names one file for several runs: leave it out, or do one run for each file.",
        ),
        ("run method=simple_average {pools} workers=0", "workers must be a number of threads"),
        ("run method=simple_average {pools} out=m memory=lots", "'lots' is not a size"),
        (
            "run method=simple_average {model} out=m calibration=256",
            "calibration must be a split and perhaps a number of examples, as calibration:256; got '256'.",
        ),
        ("run method=simple_average {pools} device=gpu", "The device 'gpu' is not there"),
        ("run method=simple_ensemble {pools} out=m", "keeps several models: there is no one checkpoint to save"),
        ("run method=individual {pools} out=m", "keeps several models: there is no one checkpoint to save"),
        ("run method=simple_average {pools} out=m overwrite=no", "overwrite must be true or false; got 'no'."),
        ("run method=simple_average {pools} out=true", "out is folder for the merged model: give its name; got True."),
        ("run method=simple_average {pools} out=", "out is empty: name the folder for the merged model."),
        ("run method=simple_average {pools} report=", "report is empty: name the file for the JSON report."),
        ("run method=simple_average {pools} out=.", "'.' is the folder you are in, or holds it: name another folder"),
        ("merge simple_average {zoo}/base {zoo}/greys --out=", "out is empty: name what is to be written."),
        ("eval {zoo}/greys taskpool=clip-mini report=", "report is empty: write report=VALUE."),
        ("run method=simple_average {pools} report=[1]", "report is file for the JSON report: give its name; got [1]."),
        (
            "run method=simple_average {pools} out=runs/lr=0.1",
            """Put what has blanks or signs in it in quotes twice: 'out="runs/lr=0.1"'.""",
        ),
        ("run method=simple_average {pools} modelpool.models=null", "modelpool has no 'models'."),
        ("run method=simple_average modelpool={zoo}/empty.yaml out=m", "'models' is empty: name at least one model."),
        (
            "run method=task_arithmetic {pools} method.scaling_factor=1" + 400 * "0",
            "must be a number below 1.79769e+308",
        ),
        ("run method=simple_average {pools} out=m memory=1" + 400 * "0", "is not a size: write 512MB"),
        ("run method=weighted_average method.weights=[nan,1] {pools} nan=ignore", "must be in (-inf, inf); got nan."),
        ("merge simple_average {zoo}/base {zoo}/" + 300 * "n" + " -o m", "File name too long: '"),
        ("merge simple_average {zoo}/base {zoo}/base -o " + 300 * "n", "File name too long: '"),
        (
            "analyze interference method=simple_average {model} taskpool=gpt2-mini",
            "The task pool has no task of the pool's models: ",
        ),
        ("analyze interference method=simple_ensemble {pools}", "simple_ensemble keeps several models"),
        ("run method=simple_average {pools} out=m report=m", "report: 'm' is the folder that is written"),
        ("merge slerp {zoo}/base {zoo}/../{name}/base -o m", "is given twice: give each model once"),
        ("merge slerp {zoo}/greys {zoo}/greys/model.safetensors -o m", "is given twice: give each model once"),
        (
            "merge simple_average {zoo}/tasks.yaml {zoo}/greys -o m",
            "tasks.yaml' is no checkpoint: name a model's folder",
        ),
        ("merge {zoo}/tasks/deep.json m", "is a file, and no recipe by its name: call it .yaml."),
        ("merge smile_upscaling {zoo}/base {zoo}/greys -o m", "makes a module, not tensors alone: use fusionbench run"),
        ("merge moe_merging {zoo}/base {zoo}/greys -o m", "say others=average, or use fusionbench run with a pool"),
        (
            "merge moe_upscaling {zoo}/base {zoo}/greys -o m",
            "moe_upscaling takes, without a base, 1 model, and the pool has 2",
        ),
        (
            "merge depth_upscaling {zoo}/base {zoo}/greys -o m layers=1",
            "depth_upscaling takes, without a base, 1 model",
        ),
        ("eval {zoo}/lr=0.1 taskpool={zoo}/tasks.yaml", "lr=0.1' does not exist."),
        ("coefficients {zoo}/tasks/deep.json", "deep.json' holds no coefficients"),
        ("report {zoo}/tasks/deep.json", "deep.json' cannot be read: maximum recursion depth"),
        ("coefficients nowhere.json", "The file of coefficients 'nowhere.json' does not exist"),
        ("run method=simple_average {pools} report=.", "is a folder; name a file"),
        ("run method=simple_average {pools} reference=indivdual", "Did you mean 'individual'?"),
        ("run method=simple_average {pools} +modelpool.models.x=/nowhere", "'/nowhere' does not exist."),
        ("run method=simple_average {pools} +modelpool.arch=x", "modelpool takes no 'arch'."),
        ("run method=simple_average {pools} taskpool.kind=zero_shot", "No kind of task is called 'zero_shot'."),
        ("run method=simple_average {pools} taskpool.tasks.greys.data=nothing.npz", "'nothing.npz' does not exist."),
        (
            "run method=weighted_average method.weights=[1,2,3] {pools}",
            "weights has 3 numbers, but the pool has 2 models",
        ),
        ("run method=simple_average modelpool=a,b", "only method and its hyperparameters take several values."),
        ("run method=simple_average {pools} ~method", "would leave the run without its method."),
        ("run method=simple_average {pools} taskpool.tasks.greys=5", "'tasks' must be a table of tasks by name"),
        ("run method=simple_average {pools} +taskpool.tasks.greys.classes=x", "has no list of 'classes'"),
        ("run method=simple_average {pools} modelpool.models.greys=5", "A model is given by its path; got 5."),
        ("run method=simple_average {pools} modelpool.models=5", "'models' must be a table of paths by name"),
        ("run --foo", "Unrecognized arguments: --foo."),
        ("rnu", "There is no command 'rnu'. Did you mean 'run'?"),
        ("eval {zoo}/greys", "No taskpool is given. Write taskpool=NAME with one of: clip-mini,"),
        ("eval taskpool=clip-mini", "No model is named"),
        ("eval {zoo}/grey taskpool={zoo}/tasks.yaml", "Did you mean 'greys'?"),
        ("diff zoo:clip-mini/bsae nowhere", "'zoo:clip-mini/bsae' does not exist. Did you mean 'base'?"),
        ("diff {zoo}/base nowhere", "'nowhere' does not exist."),
        ("verify nowhere", "'nowhere' does not exist."),
        ("verify zoo:clip-mini/bsae", "'zoo:clip-mini/bsae' does not exist. Did you mean 'base'?"),
        ("verify zoo:clip-mini/base", "/clip-mini/base' has no manifest.json: it was not written by fusionbench"),
        ("verify {zoo}/base --inputs --samples -3", "--samples must be a whole number of 1 or more; got -3."),
        ("describe ties", "Nothing is called 'ties'. Did you mean 'ties_merging'?"),
        ("describe nonsense", "Nothing is called 'nonsense'. There is:"),
        ("report nowhere.json", "report: 'nowhere.json' cannot be read: No such file or directory.\n"),
        ("report {zoo}", "holds no .json file"),
        ("report {zoo}/base/config.json", "is no report of a run"),
        ("describe clip-vit-b32-8task", "Did you mean 'clip-vit-b32-8tasks'?"),
        ("list method", "There are no 'method' to list. Did you mean 'methods'?"),
        ("similarity modelpool=clip-mini out={zoo}/pool.yaml/x.png", "'{zoo}/pool.yaml' is not a folder one may write"),
        ("similarity modelpol=clip-mini", "'modelpol=clip-mini' is not understood. Did you mean 'modelpool'?"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    words: str, message: str, zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tasks = pools(zoo)
    filled = words.format(pools=f"{model} {tasks}", model=model, zoo=zoo, name=zoo.name)
    assert main(filled.split()) == 2
    output = capsys.readouterr()
    assert message.replace("{zoo}", str(zoo)) in output.err
    assert output.err.startswith("fusionbench: ") and output.err.count("\n") == 1
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated"),
        (lambda path: path.write_bytes(b""), "is empty: it has no bytes."),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer"),
        (lambda path: save_file({"embeddings.x": torch.ones(1)}, path), "holds no CLIP vision tower"),
        (lambda path: path.unlink(), "holds no weights"),
        (lambda path: _poison(path), "contains NaN or Inf. To merge it all the same: --nan warn (in Python"),
    ],
)
def test_damaged_models_are_one_line(
    damage: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_zoo(tmp_path)
    damage(tmp_path / "greys" / "model.safetensors")  # type: ignore[operator]
    capsys.readouterr()
    assert main(["run", "method=ties_merging", *pools(tmp_path), f"out={tmp_path}/merged"]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def _poison(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)


def test_nan_can_be_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_zoo(tmp_path)
    _poison(tmp_path / "greys" / "model.safetensors")
    model, _ = pools(tmp_path)
    assert main(["run", "method=simple_average", model, f"out={tmp_path}/merged", "--nan", "ignore"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_existing_model_is_not_overwritten(zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "method=simple_average", pools(zoo)[0], "out=merged"]
    assert main(words) == 0
    before = (work / "merged" / "model.safetensors").read_bytes()
    assert main([*words[:1], "method=task_arithmetic", *words[2:]]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (work / "merged" / "model.safetensors").read_bytes() == before
    assert main([*words[:1], "method=task_arithmetic", *words[2:], "overwrite=true"]) == 0
    assert (work / "merged" / "model.safetensors").read_bytes() != before


def test_models_of_a_pool_in_another_folder_are_found_again(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate("ab"):
        (work / "sub" / name).mkdir(parents=True)
        save_file({"conv1.weight": torch.full((3,), float(i))}, work / "sub" / name / "model.safetensors")
    (work / "sub" / "pool.yaml").write_text("models: {a: a, b: b}\narchitecture: resnet\n")
    merged = fb.methods.simple_average(fb.load_modelpool("sub/pool.yaml"))
    fb.save(merged, "out")
    before = stamps(merged)
    (work / "sub" / "b" / "model.safetensors").touch()
    assert stamps(merged) != before  # so that another run does not go on with what was made of the old one
    assert main(["verify", "out", "--inputs"]) == 0
    (work / "sub").rename(work / "gone")
    with pytest.raises(fb.InputError, match="'sub/a' is not there any more"):
        stamps(merged)


def test_quantised_models_are_not_merged(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (work / name).mkdir()
        save_file(
            {"x.weight": torch.ones(2, dtype=torch.int8), "x.weight_scale": torch.ones(1)},
            work / name / "x.safetensors",
        )
    (work / "pool.yaml").write_text("models: {a: a, b: b}\n")
    for words in (["merge", "simple_average", "a", "b"], ["run", "method=simple_average", "modelpool=pool.yaml"]):
        assert main([*words, "-o", "out"] if words[0] == "merge" else [*words, "out=out"]) == 2
        assert "'a' is quantised ('x.weight" in capsys.readouterr().err
    assert not (work / "out").exists()


def test_a_method_that_returns_a_module_is_saved_as_the_models_are(
    zoo: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = "import fusionbench as fb\n\n\n@fb.method('merging')\ndef built(pool):\n    return {}\n"
    (work / "built.py").write_text(plugin.format("pool.build(fb.methods.simple_average(pool))"))
    assert main(["run", "plugins=[built]", "method=built", pools(zoo)[0], "out=b"]) == 0
    assert main(["run", "method=simple_average", pools(zoo)[0], "out=a"]) == 0
    average, built = fb.Checkpoint.open("a"), fb.Checkpoint.open("b")
    assert average.digest == built.digest
    for name, returned in (("lost", "None"), ("several", "{'a': 1}")):
        (work / f"{name}.py").write_text(plugin.replace("built", name).format(returned))
        assert main(["run", f"plugins=[{name}]", f"method={name}", pools(zoo)[0], f"out={name}"]) == 2
        assert "a Checkpoint, a module or a ModelPool is expected." in capsys.readouterr().err
        assert not (work / name).exists()


def test_a_bug_keeps_its_traceback(zoo: Path, work: Path) -> None:
    (work / "broken.py").write_text(PLUGIN.replace("median", "broken").replace("p.base +", "p.bse +"))
    with pytest.raises(AttributeError, match="bse"):
        main(["run", "method=broken", "plugins=[broken.py]", *pools(zoo)])


def test_without_the_zoo_its_names_say_what_to_install(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fusionbench_zoo", None)
    assert main(["run", "method=simple_average", "modelpool=clip-mini", "taskpool=clip-mini"]) == 2
    assert "needs the embedded zoo, which is not installed" in capsys.readouterr().err


START = """
import resource, sys
sys.argv = ["fusionbench", *{words!r}]
from fusionbench.cli import main
from fusionbench.registry import Method, registered
try:
    status = main()
except SystemExit as exit:
    status = exit.code
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "numpy", "transformers") if name in sys.modules]
print("STATUS", status or 0, "CPU", usage.ru_utime + usage.ru_stime, "HEAVY", *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["run", "--help"], 0),
        (["run", "--wrong"], 2),
        (["run", "method=tie_mergin", "modelpool=clip-mini"], 2),
        (["run", "method=ties_merging", "method.density=5", "modelpool=clip-mini"], 2),
        (["list"], 0),
        (["describe", "ties_merging"], 0),
    ],
)
def test_what_computes_nothing_starts_at_once_and_without_torch(words: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", START.format(words=words)], capture_output=True, text=True)
    facts = done.stderr.split("STATUS ")[1].split()
    assert facts[0] == str(status)
    # Methods are made of passes on arrays: numpy, which takes a tenth of a second, comes with their files.
    needs_methods = words[0] in ("list", "describe") or any("method=" in word for word in words)
    assert facts[facts.index("HEAVY") + 1 :] == (["numpy"] if needs_methods else [])
    # Not a timing of ours but a bound a user notices: five times what it takes where it was written.
    assert float(facts[2]) < 1.0


def test_importing_the_package_imports_torch_only_when_it_is_needed() -> None:
    code = (
        "import sys, fusionbench as fb; fb.list_methods(); fb.ModelPool; fb.methods.ties_merging; fb.ops.trim;"
        "assert 'torch' not in sys.modules;"
        "import torch; fb.ModelPool({'a': {'w': torch.ones(1)}})"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0


@pytest.mark.parametrize("command", ["fusionbench", "fusion_bench"])
def test_both_names_of_the_command_are_installed(command: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name(command), "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"fusionbench {fb.__version__}"
