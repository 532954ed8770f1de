"""What is written beside the weights: tokenizer, chat template, model card; all of it, or nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_llama import bytes_tokenizer, config_of, offline, special, words_tokenizer, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusionbench as fb
from fusionbench.card import hub_id, leaves, model_card
from fusionbench.cli import main
from fusionbench.errors import InputError
from fusionbench.recipes.chat_templates import chat_template, names
from fusionbench.recipes.vocabulary import TokenizerSettings, aligned

EMBED = "model.embed_tokens.weight"
__all__ = ["offline"]  # for every test here
ASK = [{"role": "user", "content": "Hi?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *ASK,
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_llama(place / "base", bytes_tokenizer(), seed=0)
    for seed, name in enumerate(("a", "b"), 1):
        tokenizer = bytes_tokenizer([special(f"<|{name}|>"), special("<|im_end|>")])
        write_llama(place / name, tokenizer, seed=seed, template="{{ messages[0]['content'] }}!\n")
    write_llama(place / "c", bytes_tokenizer(), seed=3, template="other {{ messages[0]['content'] }}")
    return place


def opened(folders: Path, *wanted: str) -> dict[str, fb.Checkpoint]:
    return {name: fb.Checkpoint.open(folders / name) for name in wanted}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


# Files


def test_files_of_a_checkpoint_stand_in_its_folder(folders: Path, tmp_path: Path) -> None:
    base = opened(folders, "base")["base"]
    (tmp_path / "notes").write_text("from a file")
    more = {"generation_config.json": b"{}", "new.txt": tmp_path / "notes", "tokenizer_config.json": None}
    fb.save(base.with_files(more), tmp_path / "out")
    found = contents(tmp_path / "out")
    assert found["generation_config.json"] == b"{}" and found["new.txt"] == b"from a file"
    assert (
        "tokenizer_config.json" not in found and found["tokenizer.json"] == contents(folders / "base")["tokenizer.json"]
    )
    assert not base.files
    merged = fb.algorithm("simple_average").run(fb.ModelPool({"a": base.with_files({"x.txt": b"x"}), "b": base}))
    assert merged.files == {"x.txt": b"x"}  # of the first, whose folder is carried along, too


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "recipe.json", "a/b.json", ".."])
def test_what_save_writes_itself_cannot_be_given(folders: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be given as a file"):
        fb.save(opened(folders, "base")["base"].with_files({name: b""}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_belongs_to_a_model_comes_along_and_what_does_not_stays(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "base", tmp_path / "base")
    carried = ("merges.txt", "spiece.model", "chat_template.jinja", "added_tokens.json", "vocab.json", "LICENSE")
    left = ("README.md", "modeling_own.py", "trainer_state.json", "all_results.json", "training_args.bin")
    for name in (*carried, *left):
        (tmp_path / "base" / name).write_text("{}")
    fb.save(fb.Checkpoint.open(tmp_path / "base" / "model.safetensors").beside(tmp_path / "base"), tmp_path / "out")
    found = contents(tmp_path / "out")
    assert set(carried) | {"generation_config.json", "tokenizer.json"} <= found.keys() and not set(left) & found.keys()


def test_a_file_that_goes_away_is_one_line_and_leaves_nothing_finished(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.txt' cannot be read: No such file"):
        fb.save(opened(folders, "base")["base"].with_files({"a.txt": tmp_path / "nowhere.txt"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_content_of_a_file_is_other_work(folders: Path, tmp_path: Path) -> None:
    from fusionbench.writer import _key, divide, stamps

    base = opened(folders, "base")["base"]
    keys = [
        _key(model, divide(base.specs, 10**9), stamps(model))
        for model in (base, base.with_files({"a": b"1"}), base.with_files({"a": b"2"}), base.with_files({"a": None}))
    ]
    assert len(set(keys)) == 4


# Chat templates


def rendered(choice: str, folder: Path, messages: list[dict], prompt: bool) -> str:
    write_llama(folder / "model", words_tokenizer())
    model = fb.Checkpoint.open(folder / "model")
    fb.save(model.with_files(chat_template(choice, {"model": model}, model)), folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
RENDERED = {
    "alpaca": (
        PREAMBLE + "### Instruction:\nHi?\n\n### Response:\n",
        "Be brief.\n\n### Instruction:\nHi?\n\n### Response:\nYes.</s>\n\n### Instruction:\nWhy?\n\n",
    ),
    "chatml": (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]Hi?\n[|assistant|]",
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi?\n[|assistant|]Yes.[|endofturn|]\n[|user|]Why?\n",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
    ),
    "mistral": (
        "<s> [INST] Hi? [/INST]",
        "<s> [INST] Be brief.\n\nHi? [/INST] Yes.</s> [INST] Why? [/INST]",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_template_renders_as_its_models_were_trained(name: str, tmp_path: Path) -> None:
    question, talk = RENDERED[name]
    assert rendered(name, tmp_path / "1", ASK, True) == question
    assert rendered(name, tmp_path / "2", TALK, False) == talk


def test_all_templates_are_tested() -> None:
    assert names() == sorted(RENDERED)


def test_a_template_of_ones_own_is_taken_as_it_is(tmp_path: Path) -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert rendered(text, tmp_path, TALK, False) == "Be brief."


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("chatlm", "No chat template is called 'chatlm'. Did you mean 'chatml'?"),
        ("{% for m in messages %}\n{{ m }", "chat_template, line 2 of it: unexpected '}'"),
    ],
)
def test_a_template_that_is_none_is_refused(choice: str, message: str, folders: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        chat_template(choice, {}, opened(folders, "base")["base"])


def test_the_template_that_most_models_have_is_taken(folders: Path, tmp_path: Path) -> None:
    base = opened(folders, "base")["base"]
    assert chat_template("auto", {"base": base}, base) == {}
    files = chat_template("auto", opened(folders, "base", "c", "a", "b"), base)
    assert files == {"chat_template.jinja": b"{{ messages[0]['content'] }}!\n"}
    assert b"other" in chat_template("auto", opened(folders, "base", "c", "a"), base)["chat_template.jinja"]  # type: ignore
    # As older versions have it: in the tokenizer's config, where it must not stay.
    shutil.copytree(folders / "base", tmp_path / "old")
    config = config_of(folders / "base", "tokenizer_config.json")
    said = [{"name": "tool", "template": "no"}, {"name": "default", "template": "old {{ messages }}"}]
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": said}))
    old = fb.Checkpoint.open(tmp_path / "old")
    assert chat_template("auto", {"old": old}, old)["chat_template.jinja"] == b"old {{ messages }}"
    fb.save(old.with_files(chat_template("chatml", {"old": old}, old)), tmp_path / "out")
    assert config_of(tmp_path / "out", "tokenizer_config.json") == config
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template(ASK, tokenize=False) == "<|im_start|>user\nHi?<|im_end|>\n"


def test_a_template_goes_with_the_tokenizer_that_was_made(folders: Path, tmp_path: Path) -> None:
    models = opened(folders, "base", "a", "b")
    fitted, _ = aligned(models, "base", TokenizerSettings("union"))
    base = fitted.pop("base")
    merged = fb.algorithm("task_arithmetic").run(fb.ModelPool(fitted, base))
    fb.save(merged.with_files(chat_template("auto", models, merged)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "good <|b|>"}], return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == "good <|b|>!"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_new_tokens == 5
    assert model.generate(**ids, do_sample=False).shape[1] > ids["input_ids"].shape[1]


# The model card


def test_the_card_says_what_was_merged_and_how(folders: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from huggingface_hub import ModelCard

    monkeypatch.chdir(folders)
    for name, license in (("a", "mit"), ("c", "mit")):
        (folders / name / "README.md").write_text(f"---\nlicense: {license}\nlanguage: en\n---\n# Old\n")
    out = str(tmp_path / "out")
    assert main(["merge", "weighted_average", "a", "c", "weights=[1,3]", "--vocabulary", "union", "-o", out]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "mit",
        "tags": ["merge", "fusionbench", "weighted_average"],
    }
    text = card.text
    assert "# A merge of a and c\n" in text and "Old" not in text
    assert "| model | weight | from |\n| --- | ---: | --- |\n| a | 1 | `a` |\n| c | 3 | `c` |\n" in text
    assert "fusionbench merge weighted_average a c 'weights=[1,3]' -o OUT --vocabulary union\n" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["method"] == "weighted_average" and recipe["hyperparameters"]["weights"] == [1, 3]
    assert recipe["models"] == {"a": "a", "c": "c"}
    (folders / "c" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    again = str(tmp_path / "again")
    assert main(["merge", "weighted_average", "a", "c", "weights=[1,3]", "--vocabulary", "union", "-o", again]) == 0
    assert "license" not in front(tmp_path / "again")
    for name in ("a", "c"):
        (folders / name / "README.md").unlink()


@pytest.mark.parametrize(
    "card", ["no front matter", "---\n- a\n---\n", "---\na: [\n---\n", "---\nlicense: mit\n", "\xff"]
)
def test_a_card_that_cannot_be_read_says_nothing(folders: Path, tmp_path: Path, card: str) -> None:
    shutil.copytree(folders / "base", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(card.encode("latin-1"))
    models = {"a": fb.Checkpoint.open(tmp_path / "base"), "b": fb.Checkpoint.open(tmp_path / "base")}
    merged = fb.algorithm("simple_average").run(fb.ModelPool(models))
    assert b"license" not in model_card(merged, ["x"])


def test_models_of_the_hub_are_named_as_it_does(folders: Path) -> None:
    a, base = (fb.Checkpoint.open(folders / name) for name in ("c", "base"))
    a.location, base.location = "hf:owner/a-1.0", "/home/x/.cache/hub/models--owner--base/snapshots/0a1b"
    merged = fb.algorithm("task_arithmetic").run(fb.ModelPool({"a|b": a}, base))
    assert [hub_id(model) for model in leaves(merged).values()] == ["owner/base", "owner/a-1.0"]
    text = model_card(merged, ["x"], recipe="a: |\n  ```\n", weights={"a|b": 0.5}).decode()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == ["owner/base", "owner/a-1.0"]
    assert "| a\\|b | 0.5 | [owner/a-1.0](https://huggingface.co/owner/a-1.0) |" in text
    assert "([arXiv 2212.04089](https://arxiv.org/abs/2212.04089))" in text
    assert "````yaml\na: |\n  ```\n````" in text
    a.location = "hf:../../etc"
    assert hub_id(a) == ""


def test_models_of_merges_are_what_was_read(folders: Path) -> None:
    a, b, c, base = opened(folders, "a", "b", "c", "base").values()
    fitted, _ = aligned({"a": a, "b": b}, None, TokenizerSettings("union"))
    inner = fb.algorithm("simple_average").run(fb.ModelPool(fitted))
    both, _ = aligned({"inner": inner, "c": c}, "inner", TokenizerSettings("union"))
    assert len(both["c"][EMBED]) == inner.config["vocab_size"] == len(bytes_tokenizer()) + 3  # of both, not of a alone
    assert list(leaves(inner)) == ["a", "b"] and leaves(inner)["a"].location == str(folders / "a")
    merged = fb.algorithm("simple_average").run(fb.ModelPool(both))
    assert list(leaves(merged)) == ["a", "b", "c"]


# Kills


def test_a_merge_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    added = {"base": [], "a": [special("<|x|>"), special("<|a|>")], "b": [special("<|b|>"), special("<|x|>")]}
    for seed, (name, tokens) in enumerate(added.items()):
        write_llama(tmp_path / name, bytes_tokenizer(tokens), seed=seed, tied=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        more = {f"more.{i}.weight": torch.full((40, 40), float(i)) for i in range(400)}
        model.save_pretrained(tmp_path / name, state_dict={**model.state_dict(), **more})
    words = ["merge", "task_arithmetic", *(str(tmp_path / name) for name in added), "--vocabulary", "union"]
    assert main([*words, "-o", str(tmp_path / "once")]) == 0
    journal = tmp_path / ".out.partial" / "journal"
    killed = 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-m", "fusionbench.cli", *words, "-o", str(tmp_path / "out")])
        until = time.perf_counter() + 20
        while process.poll() is None and killed < 2 and time.perf_counter() < until:
            if journal.exists() and journal.stat().st_size > 5000 * (killed + 1):
                process.kill()
                break
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == contents(tmp_path / "once")
            if killed:
                return
            shutil.rmtree(tmp_path / "out")
    pytest.fail(f"of 20 runs {killed} could be killed; {os.listdir(tmp_path)}")


def test_what_tells_whether_inputs_are_the_same_covers_every_file_of_weights(tmp_path: Path) -> None:
    """Of files of any ending, of the shards behind an index that is named, and of the base of an adapter."""
    from peft import LoraConfig, get_peft_model
    from test_lora import llama

    from fusionbench.writer import stamps

    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")
    shards = fb.save(fb.Checkpoint.of({"w": torch.ones(9), "v": torch.ones(9)}), tmp_path / "shards", shard_size=40)
    llama().save_pretrained(tmp_path / "base")
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["k_proj"])).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../base"}))
    for opened, file in [
        (tmp_path / "w.pth", tmp_path / "w.pth"),
        (shards / "model.safetensors.index.json", shards / "model-00002-of-00002.safetensors"),
        (tmp_path / "adapter", tmp_path / "base" / "model.safetensors"),
    ]:
        model = fb.Checkpoint.open(opened)
        before = stamps(model)
        os.utime(file, (1, 1))
        assert stamps(model) != before
