"""Tasks of the LM evaluation harness: what it finds is what models' own probabilities say; nothing is downloaded."""

import json
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_llama import offline, words_tokenizer, write_llama
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaForCausalLM

from fusionbench import InputError, config
from fusionbench.cli import main
from fusionbench.ensemble import Ensemble

__all__ = ["offline"]  # no test asks the network
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness's own dependencies

WORDS = ["good", "bad", "film", "mail", "is", "the", "yes", "no", "very"]
CHOICES = ["good", "bad", "very bad"]
TEXTS = ["the film is", "the mail is", "no film is", "yes the mail is", "good mail is", "bad film is"]
QUESTIONS = [{"question": text, "right": i % 3} for i, text in enumerate(TEXTS)]
MULTIPLE_CHOICE = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
PERPLEXITY = """\
task: mine_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def lines(file: Path, rows: Sequence[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models `base` and `other`, and a folder `own` with three tasks of the harness."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "other")):
        write_llama(tmp_path / name, words_tokenizer(WORDS), seed=seed, initializer_range=0.5)
    own = tmp_path / "own"
    own.mkdir()
    for name, rows in (("mine", QUESTIONS), ("mine_dev", QUESTIONS[::-1][:4])):
        file = lines(own / f"{name}.jsonl", rows)
        text = MULTIPLE_CHOICE.format(task=name, file=file, cache=tmp_path / "cache", choices=json.dumps(CHOICES))
        (own / f"{name}.yaml").write_text(text)
    (own / "mine_text.yaml").write_text(PERPLEXITY.format(file=own / "mine.jsonl", cache=tmp_path / "cache"))
    return tmp_path


def write_pool(folder: Path, tasks: dict, **more: object) -> str:
    (folder / "tasks.yaml").write_text(json.dumps({"kind": "lm_eval", "tokenizer": "base", "tasks": tasks, **more}))
    return str(folder / "tasks.yaml")


def log_probability(model: nn.Module, before: str, text: str) -> float:
    """Of the words of `text` after those before, or after the token that begins texts."""
    number = {word: i + 4 for i, word in enumerate(WORDS)}
    first, last = [number[word] for word in before.split()] or [1], [number[word] for word in text.split()]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([first + last])).logits[0].log_softmax(-1)
    return sum(float(found[len(first) + i - 1, token]) for i, token in enumerate(last))


def accuracies(model: nn.Module, questions: Sequence[dict]) -> tuple[float, float]:
    """Of the most probable answer, and of the most probable by length in bytes."""
    right, normed = [], []
    for row in questions:
        found = [log_probability(model, row["question"], choice) for choice in CHOICES]
        by_length = [value / len(choice) for value, choice in zip(found, CHOICES, strict=True)]
        right.append(found.index(max(found)) == row["right"])
        normed.append(by_length.index(max(by_length)) == row["right"])
    return sum(right) / len(right), sum(normed) / len(normed)


@needs_harness
def test_scores_are_those_of_the_models_own_probabilities(folder: Path) -> None:
    other = {"task": "mine_text", "include": "own"}
    tasks = config.load_taskpool(write_pool(folder, {"choices": {"task": "mine", "include": "own"}, "text": other}))
    assert (tasks["choices"].primary, tasks["text"].primary) == ("acc", "1/word_perplexity")
    seen = set()
    for name in ("base", "other"):
        model = LlamaForCausalLM.from_pretrained(folder / name)
        report = tasks.evaluate(model)
        seen.add(accuracies(model, QUESTIONS))
        assert (report["choices"]["acc"], report["choices"]["acc_norm"]) == accuracies(model, QUESTIONS)
        mean = sum(log_probability(model, "", text) for text in TEXTS) / sum(len(text.split()) for text in TEXTS)
        assert report["text"]["word_perplexity"] == pytest.approx(math.exp(-mean), rel=1e-5)
        assert tasks.headline(report)["text"] == pytest.approx(math.exp(mean), rel=1e-5)
        bits = -sum(log_probability(model, "", text) for text in TEXTS) / sum(map(len, TEXTS)) / math.log(2)
        assert report["text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert tasks.evaluate(model) == report
    assert len(seen) == 2  # the numbers say which model it was


@needs_harness
def test_of_every_document_is_kept_what_the_score_is_made_of(folder: Path) -> None:
    (folder / "own" / "both.yaml").write_text(
        "group: both\ntask: [mine, mine_dev]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "own" / "apart.yaml").write_text(
        "group: apart\ntask: [mine, mine_dev]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    entries = {
        "choices": {"task": "mine"},
        "normed": {"task": "mine", "metric": "acc_norm"},
        "few": {"task": "mine", "limit": 2},
    }
    entries |= {"text": {"task": "mine_text"}, "both": {"task": "both"}, "apart": {"task": "apart"}}
    tasks = config.load_taskpool(
        write_pool(folder, {name: {**entry, "include": "own"} for name, entry in entries.items()})
    )
    model, outcomes = LlamaForCausalLM.from_pretrained(folder / "other"), {}
    report = tasks.evaluate(model, outcomes=outcomes)
    alone = {text: accuracies(model, [row]) for text, row in zip(TEXTS, QUESTIONS, strict=True)}
    assert outcomes["choices"]["correct"].tolist() == [alone[text][0] == 1 for text in TEXTS]
    assert outcomes["normed"]["correct"].tolist() == [alone[text][1] == 1 for text in TEXTS]
    assert outcomes["few"]["correct"].tolist() == outcomes["choices"]["correct"].tolist()[:2]
    found = [log_probability(model, "", text) for text in TEXTS]
    assert outcomes["text"]["log_probability"].tolist() == pytest.approx(found, rel=1e-5)
    assert outcomes["text"]["length"].tolist() == [len(text.split()) for text in TEXTS]
    assert len(outcomes["both"]["correct"]) == 10
    assert outcomes["both"]["correct"].mean() == pytest.approx(report["both"]["acc"])
    same = report["apart"]["acc"] == pytest.approx(report["both"]["acc"])
    assert same or "apart" not in outcomes  # a mean of means is made of no single documents
    assert tasks["text"].score(model) == report["text"]


@needs_harness
def test_answers_that_a_model_writes_are_compared(folder: Path) -> None:
    models = {name: LlamaForCausalLM.from_pretrained(folder / name) for name in ("base", "other")}
    tokenizer = words_tokenizer(WORDS)

    def written(name: str, question: str) -> str:
        read = tokenizer(question, return_tensors="pt")
        read.pop("token_type_ids", None)
        made = models[name].generate(**read, max_new_tokens=2, do_sample=False)[0, len(read["input_ids"][0]) :]
        return tokenizer.decode(made, skip_special_tokens=True)

    rows = [{"question": text, "right": written("base", text)} for text in TEXTS]
    rows[1]["right"] += " mail"
    file = lines(folder / "own" / "written.jsonl", rows)
    text = PERPLEXITY.partition("output_type")[0].replace("mine_text", "mine_written")
    text = text.format(file=file, cache=folder / "cache") + "output_type: generate_until\n"
    more = "generation_kwargs: {until: [zzz], max_gen_toks: 2}\ndoc_to_text: '{{question}}'\ndoc_to_target: right\n"
    (folder / "own" / "mine_written.yaml").write_text(text + more)
    task = config.load_taskpool(write_pool(folder, {"a": {"task": "mine_written", "include": "own"}}))["a"]
    assert task.primary == "exact_match"
    same = [written("other", row["question"]) == row["right"] for row in rows]
    assert task.score(models["base"])["exact_match"] == pytest.approx(5 / 6)
    assert task.score(models["other"])["exact_match"] == pytest.approx(sum(same) / 6) != pytest.approx(5 / 6)


@needs_harness
def test_eval_prints_the_scores_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"task": "mine", "include": "own", "limit": 4, "metric": "acc_norm"}
    model = LlamaForCausalLM.from_pretrained(folder / "other")
    pool = write_pool(folder, {"choices": entry}, batch_size=2)
    assert main(["eval", "other", f"taskpool={pool}", "report=report.json"]) == 0
    expected = accuracies(model, QUESTIONS[:4])
    assert f"{100 * expected[1]:.1f}" in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert (report["choices"]["acc"], report["choices"]["acc_norm"]) == expected
    described = report["run"]["taskpool"]["choices"]
    assert {key: described[key] for key in ("task", "version", "num_fewshot", "limit")} == {
        "task": "mine",
        "version": 3,
        "num_fewshot": 0,
        "limit": 4,
    }


@needs_harness
def test_few_shot_examples_and_data_are_in_the_description(folder: Path) -> None:
    def described(**more: object) -> dict:
        pool = write_pool(folder, {"a": {"task": "mine", "include": "own", **more}})
        return config.load_taskpool(pool)["a"].describe()

    first = described()
    assert described() == first and described(num_fewshot=2) == {**first, "num_fewshot": 2}
    lines(folder / "own" / "mine.jsonl", QUESTIONS[:5])
    assert described()["config"] != first["config"]


@needs_harness
def test_few_shot_examples_change_the_prompt_and_are_the_same_each_time(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "other")
    entries = {f"n{n}": {"task": "mine", "include": "own", "num_fewshot": n} for n in (0, 3)}
    tasks = config.load_taskpool(write_pool(folder, entries))
    asked: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    longest = []
    for name in ("n0", "n3", "n3"):
        asked.clear()
        tasks[name].score(model)
        longest.append(list(asked))
    assert max(longest[1]) > max(longest[0]) + 6 and longest[1] == longest[2]


@needs_harness
def test_evolve_scores_on_the_calibration_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "merge_method: linear\nmodels:\n- {model: base, parameters: {weight: {search: [0, 1]}}}\n"
    (folder / "recipe.yaml").write_text(recipe + "- {model: other, parameters: {weight: 0.5}}\n")
    pool = write_pool(folder, {"a": {"task": "mine", "include": "own", "calibration_task": "mine_dev"}})
    words = ["evolve", "recipe.yaml", "found", "--taskpool", pool, "--generations", "1", "--population", "4"]
    assert main(words) == 0, capsys.readouterr().err
    report = json.loads((folder / "found" / "report.json").read_text())
    assert report["run"]["taskpool"]["a"]["calibration_task"]["task"] == "mine_dev"
    assert main(["merge", "found/best.yaml", "best"]) == 0
    best = LlamaForCausalLM.from_pretrained(folder / "best")
    assert report["run"]["calibration"]["best"] == accuracies(best, QUESTIONS[::-1][:4])[0]
    assert report["a"]["acc"] == accuracies(best, QUESTIONS)[0]
    assert (
        main([*words[:2], "other-search", "--taskpool", write_pool(folder, {"a": {"task": "mine", "include": "own"}})])
        == 2
    )
    assert "as calibration_task: NAME" in capsys.readouterr().err


@needs_harness
def test_an_ensemble_is_scored_and_costs_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = write_pool(folder, dict.fromkeys("ab", {"task": "mine", "include": "own"}))
    (folder / "pool.yaml").write_text("base: base\nmodels: {a: base, b: other}\n")
    words = ["run", "method=simple_ensemble", "modelpool=pool.yaml", f"taskpool={pool}", "report=r.json"]
    assert main(words) == 0, capsys.readouterr().err
    models = [LlamaForCausalLM.from_pretrained(folder / name) for name in ("base", "other")]
    report = json.loads((folder / "r.json").read_text())
    assert report["a"]["acc"] == accuracies(Ensemble(models, lambda outputs: outputs.mean(0)), QUESTIONS)[0]
    assert "seconds_per_sample" not in report["run"]
    assert main(["run", "method=fisher_merging", *words[2:4]]) == 2
    assert "shows its data to no method" in capsys.readouterr().err


@needs_harness
def test_what_is_no_language_model_is_refused_in_one_line(folder: Path) -> None:
    task = config.load_taskpool(write_pool(folder, {"a": {"task": "mine", "include": "own"}}))["a"]
    for model, message in (
        (GPT2Model(GPT2Config(vocab_size=13, n_positions=16, n_embd=8, n_layer=1, n_head=1)), "gives no logits"),
        (nn.Linear(2, 2), "has no config"),
    ):
        with pytest.raises(InputError, match=message):
            task.score(model)


@needs_harness
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "arc_eazy"}, "has no task 'arc_eazy'. Did you mean 'arc_easy'?"),
        ({"task": "qqqqqqqqq"}, "has no task 'qqqqqqqqq'. `lm-eval ls tasks` lists all."),
        ({"task": "ai2_arc"}, "ai2_arc stands for several tasks of the harness: name one of them, as arc_challenge"),
        ({"task": "humaneval"}, "humaneval runs code that the model writes"),
        ({"task": "mine", "include": "own", "metric": "accc"}, "mine has no metric 'accc'. Did you mean 'acc'?"),
        (
            {"task": "mine_text", "include": "own", "metric": "bits_per_byte"},
            "bits_per_byte is better when it is lower",
        ),
        ({"task": "mine", "include": "own", "calibration_task": "mine_text"}, "mine_text has no"),
    ],
)
def test_a_wrong_name_is_told_before_anything_runs(entry: dict, message: str, folder: Path) -> None:
    refused(folder, entry, message)


@needs_harness
def test_a_group_has_the_mean_of_its_tasks(folder: Path) -> None:
    group = "group: both\ntask: [mine, mine_dev]\n"
    (folder / "own" / "both.yaml").write_text(group + "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    (folder / "own" / "none.yaml").write_text(group.replace("both", "none"))
    task = config.load_taskpool(write_pool(folder, {"a": {"task": "both", "include": "own"}}))["a"]
    model, before = LlamaForCausalLM.from_pretrained(folder / "other"), task.describe()
    parts = accuracies(model, QUESTIONS)[0], accuracies(model, QUESTIONS[::-1][:4])[0]
    assert task.score(model)["acc"] == pytest.approx((6 * parts[0] + 4 * parts[1]) / 10)
    assert task.describe() == before
    lines(folder / "own" / "mine_dev.jsonl", QUESTIONS[:1])
    assert task.describe()["config"] != before["config"]
    refused(folder, {"task": "none", "include": "own"}, "none is a group without a score of its own")


@needs_harness
def test_metrics_are_found_in_the_harness_registry_without_loading_data(folder: Path) -> None:
    names = {"arc_easy": "acc", "gsm8k": "exact_match,strict-match", "mmlu": "acc", "wikitext": "1/word_perplexity"}
    entries = {name: {"task": name} for name in names} | {"n": {"task": "arc_easy", "metric": "acc_norm"}}
    entries["f"] = {"task": "gsm8k", "metric": "exact_match,flexible-extract"}
    tasks = config.load_taskpool(write_pool(folder, entries))
    expected = {**names, "n": "acc_norm", "f": "exact_match,flexible-extract"}
    assert {name: task.primary for name, task in tasks.items()} == expected
    described = tasks["gsm8k"].describe()
    assert (described["num_fewshot"], described["version"]) == (5, 3.0)
    with pytest.raises(InputError, match="The harness cannot load arc_easy"):  # its data is on the hub
        tasks["arc_easy"].score(LlamaForCausalLM.from_pretrained(folder / "base"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tusk": "mine"}, "Task 'a' takes no 'tusk'. Did you mean 'task'?"),
        ({"limit": 3}, "Task 'a' has no 'task'."),
        ({"task": "mine", "limit": 0}, "limit must be a whole number of 1 or more, or a part in (0, 1); got 0."),
        ({"task": "mine", "num_fewshot": -1}, "num_fewshot must be a whole number of 0 or more; got -1."),
        ({"task": "mine", "include": "owm"}, "'owm' does not exist. Did you mean 'own'?"),
        ({"task": "mine", "include": "own/mine.yaml"}, "include must be a folder"),
        ({"task": "mine", "calibration_task": "mine"}, "calibration_task is the task itself"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told_without_the_package(entry: dict, message: str, folder: Path) -> None:
    refused(folder, entry, message)


def test_the_package_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(folder, {"task": "mine"}, "pip install 'fusionbench[lmeval]'")


def refused(folder: Path, entry: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        config.load_taskpool(write_pool(folder, {"a": entry}))
    assert message in str(caught.value) and "\n" not in str(caught.value)
