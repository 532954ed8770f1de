"""What recipes make beside weights: tokenizers, chat templates, model cards; and what is told of mistakes in them."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny_llama import bytes_tokenizer, config_of, offline, special, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusionbench as fb
from fusionbench.cli import main

__all__ = ["offline"]  # for every test here
EMBED = "model.embed_tokens.weight"
HEAD = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - {model: a, parameters: {weight: 0.5}}\n"
BOTH = f"{HEAD}  - {{model: b}}\nparameters: {{weight: 0.25}}\n"


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    added = {"base": [], "a": [special("<|im_end|>"), special("<|a|>")], "b": [special("<|b|>"), special("<|im_end|>")]}
    for seed, name in enumerate(added):
        template = None if name == "base" else "{{ messages[0]['content'] }}<|im_end|>"
        write_llama(tmp_path / name, bytes_tokenizer(added[name]), seed=seed, template=template)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(text: str) -> fb.Checkpoint:
    Path("recipe.yaml").write_text(text)
    assert main(["merge", "recipe.yaml", "out"]) == 0
    return fb.Checkpoint.open("out")


def told(text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    Path("recipe.yaml").write_text(text)
    assert main(["merge", "recipe.yaml", "out"]) == 2
    assert not Path("out").exists()
    return capsys.readouterr().err.removeprefix("fusionbench: ").splitlines()


def test_a_union_with_a_template_loads_and_generates() -> None:
    found = merged(f"{BOTH}tokenizer:\n  source: union\n  pad_to_multiple_of: 8\nchat_template: auto\n")
    count = len(bytes_tokenizer())
    base, a, b = (fb.Checkpoint.open(name)[EMBED] for name in ("base", "a", "b"))
    assert found.config["vocab_size"] == found[EMBED].shape[0] == -(-(count + 3) // 8) * 8
    assert torch.allclose(found[EMBED][:count], base + 0.5 * (a[:count] - base) + 0.25 * (b[:count] - base), atol=1e-6)
    assert torch.allclose(found[EMBED][count + 1], a[count + 1])  # of a alone: the same in all
    tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForCausalLM.from_pretrained("out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "good"}], return_tensors="pt")
    assert ids["input_ids"][0].tolist() == [*bytes_tokenizer().encode("good"), count]
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_a_tokenizer_source_is_that_models() -> None:
    found = merged(f"{BOTH}tokenizer_source: b\n")
    assert AutoTokenizer.from_pretrained("out").encode("<|b|>") == [len(bytes_tokenizer())]
    assert found.config["vocab_size"] == len(bytes_tokenizer()) + 2


def test_tokens_have_the_embeddings_that_are_said() -> None:
    rules = """
tokenizer:
  source: union
  tokens:
    "<|a|>": {source: {kind: zero}, force: true}
    "<|im_end|>": {source: b, force: true}
    new: {source: {kind: model_token, model: a, token_id: 5}}
"""
    found, count = merged(BOTH + rules)[EMBED], len(bytes_tokenizer())
    a, b = (fb.Checkpoint.open(name)[EMBED] for name in ("a", "b"))
    assert torch.equal(found[count + 1], torch.zeros(8)) and torch.allclose(found[count], b[count + 1])
    assert torch.allclose(found[count + 3], a[5])


def test_documents_feed_each_other_their_tokens() -> None:
    text = f"name: inner\n{BOTH}tokenizer: {{source: union}}\n---\nmerge_method: linear\nmodels:\n"
    text += "  - {model: inner, parameters: {weight: 1}}\n  - {model: base, parameters: {weight: 1}}\n"
    found = merged(f"{text}tokenizer: {{source: union}}\nchat_template: chatml\n")
    assert found.config["vocab_size"] == len(bytes_tokenizer()) + 3
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith(
        "<|im_start|>user"
    )
    assert tokenizer.encode("<|b|>") == [len(bytes_tokenizer()) + 2]


def test_vocabularies_are_cut_where_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(BOTH, capsys)
    assert lines and all("vocabulary" in line and line.startswith("recipe.yaml:") for line in lines)
    assert merged(f"{BOTH}vocabulary: truncate\n").config["vocab_size"] == len(bytes_tokenizer())


def test_the_card_has_the_recipe() -> None:
    merged(f"# Ours\n{BOTH}tokenizer_source: union\n")
    text = Path("out/README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["merge", "fusionbench", "task_arithmetic"]
    assert "| base |  | `base` |\n| a | 0.5 | `a` |\n| b |  | `b` |\n" in text and "2212.04089" in text
    assert "# A merge of a and b\n" in text and "fusionbench merge recipe.yaml OUT\n" in text
    assert f"```yaml\n# Ours\n{BOTH}tokenizer_source: union\n```\n" in text
    assert config_of(Path("out"), "recipe.json")["method"] == "recipe"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("chat_template: chatlm\n", "recipe.yaml:7: No chat template is called 'chatlm'. Did you mean 'chatml'?"),
        ("tokenizer_source: unoin\n", "recipe.yaml:7: "),
        ("tokenizer:\n  source: union\n  tokens:\n    zzz: {source: a}\n", "recipe.yaml:8: The token 'zzz' is to have"),
        ("vocabulary: cut\n", "recipe.yaml:7: vocabulary cannot be 'cut'."),
        ("tokenizer: {source: union, pad_to_multiple_of: 0}\n", "recipe.yaml:7: pad_to_multiple_of must be"),
    ],
)
def test_a_mistake_is_one_line_with_its_number(more: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    [found] = told(BOTH + more, capsys)
    assert found.startswith(line), found
