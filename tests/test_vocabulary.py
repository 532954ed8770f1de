"""Models whose tokens differ: what the rows of their embeddings become, and what their tokenizer does."""

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import WORDS, bytes_tokenizer, config_of, offline, special, words_tokenizer, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import fusionbench as fb
from fusionbench.cli import main
from fusionbench.errors import InputError
from fusionbench.formats import Spec
from fusionbench.recipes.rows import token_tensors
from fusionbench.recipes.tokenizer import Tokenizer
from fusionbench.recipes.vocabulary import TokenizerSettings, TokenRule, aligned, resized

__all__ = ["offline"]  # for every test here
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a with a token more, and 'bad' and 'film' exchanged; b with two more, one of them a's, and free rows."""
    place = tmp_path_factory.mktemp("models")
    write_llama(place / "base", words_tokenizer(), seed=0)
    write_llama(place / "a", words_tokenizer(["good", "film", "bad", "mail"], [special("<|a|>")]), seed=1)
    write_llama(place / "b", words_tokenizer(added=[special("<|b|>"), special("<|a|>")]), seed=2, rows=13)
    return place


@pytest.fixture
def models(folders: Path) -> dict[str, fb.Checkpoint]:
    return {name: fb.Checkpoint.open(folders / name) for name in ("base", "a", "b")}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other)


def test_a_union_has_the_tokens_of_the_base_and_then_those_of_others(models: dict) -> None:
    fitted, files = aligned(models, "base", TokenizerSettings("union"))
    made = Tokenizer("", {}, files["tokenizer.json"].decode())  # type: ignore[union-attr]
    assert list(made.vocabulary) == ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "<|a|>", "<|b|>"]
    for name in (EMBED, HEAD):
        base, a, b = (models[model][name] for model in ("base", "a", "b"))
        assert {model[name].shape for model in fitted.values()} == {(10, 8)}
        # <|a|> is in a (row 8) and b (row 9), not in the base: there their mean. <|b|> is in b (row 8) alone.
        assert same(fitted["base"][name][:8], base)
        assert torch.allclose(fitted["base"][name][8], (a[8] + b[9]) / 2) and same(fitted["base"][name][9], b[8])
        assert same(fitted["a"][name], torch.cat([a[[0, 1, 2, 3, 4, 6, 5, 7, 8]], b[[8]]]))
        assert same(fitted["b"][name], b[[0, 1, 2, 3, 4, 5, 6, 7, 9, 8]])
    assert [model.config["vocab_size"] for model in fitted.values()] == [10, 10, 10]
    assert same(fitted["a"]["model.norm.weight"], models["a"]["model.norm.weight"])


def test_the_tokenizer_of_the_base_keeps_its_rows(models: dict) -> None:
    fitted, files = aligned(models, "base", TokenizerSettings("base"))
    assert fitted["base"] is not models["base"] and files == {}  # with no files of its own, but otherwise the same
    assert same(fitted["base"][EMBED], models["base"][EMBED]) and not fitted["base"].inputs
    assert same(fitted["a"][EMBED], models["a"][EMBED][[0, 1, 2, 3, 4, 6, 5, 7]])


def test_the_tokenizer_of_a_model_comes_with_its_ids(folders: Path, tmp_path: Path) -> None:
    tokenizer = words_tokenizer(["mail", *WORDS[:3]], [special("<|im_end|>")])
    write_llama(tmp_path / "chat", tokenizer)
    for file in ("config.json", "generation_config.json"):
        content = config_of(tmp_path / "chat", file) | {"eos_token_id": [2, 8], "decoder_start_token_id": 8}
        (tmp_path / "chat" / file).write_text(json.dumps(content))
    (folders / "base" / "special_tokens_map.json").write_text("{}")
    models = {"base": fb.Checkpoint.open(folders / "base"), "chat": fb.Checkpoint.open(tmp_path / "chat")}
    for source in ("chat", str(tmp_path / "chat")):
        fitted, files = aligned(models, "base", TokenizerSettings(source))
        assert fitted["base"].config["eos_token_id"] == [2, 8] and fitted["base"].config["vocab_size"] == 9
        assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 8]  # type: ignore[arg-type]
        assert files["special_tokens_map.json"] is None  # the base's, and not the chat model's
        assert same(fitted["base"][EMBED][:8], models["base"][EMBED][[0, 1, 2, 3, 7, 4, 5, 6]])
        assert same(fitted["base"][EMBED][8], models["chat"][EMBED][8])
    (folders / "base" / "special_tokens_map.json").unlink()


def test_rules_say_where_an_embedding_comes_from(models: dict) -> None:
    rules = {
        "<|a|>": TokenRule("a", force=True),
        "<|b|>": TokenRule("zero"),
        "good": TokenRule(("b", "mail"), force=True),
        "bad": TokenRule(("a", 1)),  # all have it, and are not forced
        "new": TokenRule(("base", 4)),
    }
    fitted, files = aligned(models, "base", TokenizerSettings("union", tokens=rules))
    base, a, b = (models[name][EMBED] for name in ("base", "a", "b"))
    for name, model in fitted.items():
        assert same(model[EMBED][8], a[8]) and same(model[EMBED][4], b[7]) and same(model[EMBED][10], base[4])
        assert same(model[EMBED][9], b[8] if name == "b" else torch.zeros(8))
    assert same(fitted["a"][EMBED][5], a[6])


def test_rows_of_no_token_are_the_mean(models: dict) -> None:
    fitted, _ = aligned(models, "base", TokenizerSettings("union", pad_to_multiple_of=8))
    for name, model in fitted.items():
        rows = model[EMBED]
        assert rows.shape == (16, 8) and model.config["vocab_size"] == 16, name
        assert torch.allclose(rows[10:], rows[:10].mean(0).expand(6, 8), atol=1e-7)


def test_without_a_base_a_token_that_several_have_is_their_mean(models: dict, tmp_path: Path) -> None:
    write_llama(tmp_path / "c", words_tokenizer(added=["x"]), seed=3)
    models = {"a": models["a"], "b": models["b"], "c": fb.Checkpoint.open(tmp_path / "c")}
    without, with_base = (aligned(models, base, TokenizerSettings("union"))[0]["c"] for base in (None, "a"))
    assert torch.allclose(without[EMBED][8], (models["a"][EMBED][8] + models["b"][EMBED][9]) / 2)
    assert same(with_base[EMBED][8], models["a"][EMBED][8])


def test_blocks_of_rows_are_the_rows(models: dict) -> None:
    model = aligned(models, "base", TokenizerSettings("union", pad_to_multiple_of=8))[0]["a"]
    whole = model[EMBED].flatten()
    for start in range(0, 128, 5):
        for stop in range(start, 129, 7):
            assert same(model.read(EMBED, start, stop), whole[start:stop])


def test_means_are_rounded_once(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        added = [] if name == "base" else [special("<|x|>")]
        write_llama(tmp_path / name, words_tokenizer(added=added), seed=seed, dtype=torch.bfloat16)
    models = {name: fb.Checkpoint.open(tmp_path / name) for name in ("base", "a", "b")}
    made = aligned(models, "base", TokenizerSettings("union"))[0]["base"][EMBED][8]
    exact = (models["a"][EMBED][8].double() + models["b"][EMBED][8].double()) / 2
    assert same(made, exact.to(torch.bfloat16))


def test_rows_of_a_finer_dtype_keep_their_digits(tmp_path: Path) -> None:
    write_llama(tmp_path / "base", words_tokenizer(), dtype=torch.bfloat16)
    write_llama(tmp_path / "a", words_tokenizer(added=[special("<|a|>")]), seed=1)
    models = {name: fb.Checkpoint.open(tmp_path / name) for name in ("base", "a")}
    fitted, _ = aligned(models, "base", TokenizerSettings("union"))
    assert fitted["base"].specs[EMBED] == Spec("BF16", (9, 8))
    assert same(fitted["base"][EMBED][8], models["a"][EMBED][8])
    pool = fb.ModelPool({"a": fitted["a"]}, fitted["base"])
    merged = fb.algorithm("task_arithmetic", scaling_factor=0.5).run(pool)
    assert same(merged[EMBED][8], models["a"][EMBED][8].to(torch.bfloat16))  # not rounded before


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_merge_with_a_union_loads_encodes_and_generates(tmp_path: Path, tied: bool) -> None:
    added = {"base": [], "a": [special("<|im_start|>"), "blorb"], "b": [special("<|end|>"), special("<|im_start|>")]}
    for seed, (name, tokens) in enumerate(added.items()):
        write_llama(tmp_path / name, bytes_tokenizer(tokens), seed=seed, tied=tied)
    models = {name: fb.Checkpoint.open(tmp_path / name) for name in added}
    fitted, files = aligned(models, "base", TokenizerSettings("union"))
    base = fitted.pop("base")
    merged = fb.algorithm("task_arithmetic", scaling_factor=0.5).run(fb.ModelPool(fitted, base))
    assert merged.files == files
    fb.save(merged, tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "out")
    count = len(before)
    assert {text: after.encode(text) for text in ("<|im_start|>", "blorb", "<|end|>")} == {
        "<|im_start|>": [count],
        "blorb": [count + 1],
        "<|end|>": [count + 2],
    }
    assert after.encode("good<|im_start|> film") == [*before.encode("good"), count, *before.encode(" film")]
    for text in ("the good film is bad ? héllo 123\n\n", "<s>yes</s> <pad>"):
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert after.decode([count]) == "<|im_start|>" and after.decode([count], skip_special_tokens=True) == ""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(after) == count + 3
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (HEAD in fb.Checkpoint.open(tmp_path / "out").specs) != tied
    ids = after("good <|im_start|> film", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "TokenizersBackend"])
def test_files_that_repeat_the_added_tokens_follow(tmp_path: Path, kind: str) -> None:
    write_llama(tmp_path / "base", bytes_tokenizer())
    write_llama(tmp_path / "a", bytes_tokenizer([special("<|a|>"), "plain"]), seed=1)
    config = config_of(tmp_path / "base", "tokenizer_config.json")
    entries = config_of(tmp_path / "base", "tokenizer.json")["added_tokens"]
    config |= {"added_tokens_decoder": {str(e.pop("id")): e for e in entries}, "tokenizer_class": kind}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "added_tokens.json").write_text('{"</s>": 2}')
    models = {name: fb.Checkpoint.open(tmp_path / name) for name in ("base", "a")}
    fitted, files = aligned(models, "base", TokenizerSettings("union"))
    count = len(bytes_tokenizer())
    assert json.loads(files["added_tokens.json"]) == {"</s>": 2, "<|a|>": count, "plain": count + 1}  # type: ignore[arg-type]
    fb.save(fitted["base"], tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.encode("<|a|>plain") == [count, count + 1]


def test_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    write_llama(tmp_path / "base", bytes_tokenizer([special("<|x|>")]), rows=len(bytes_tokenizer()) - 1)
    models = {"base": fb.Checkpoint.open(tmp_path / "base")}
    fitted, _ = aligned(models, "base", TokenizerSettings("base"))
    fb.save(fitted["base"], tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(after) == len(before) - 2 and "<|x|>" not in after.get_vocab()
    assert max(after.encode("the good film is bad hello world maybe yes <|x|>")) < len(after)


def test_a_slow_tokenizer_is_read_through_transformers(tmp_path: Path) -> None:
    write_llama(tmp_path / "base", bytes_tokenizer())
    table = config_of(tmp_path / "base", "tokenizer.json")
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "vocab.json").write_text(json.dumps(table["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in table["model"]["merges"])
    (tmp_path / "base" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = config_of(tmp_path / "base", "tokenizer_config.json") | {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    base = fb.Checkpoint.open(tmp_path / "base")
    read = Tokenizer.of(base)
    assert read is not None and read.vocabulary["</s>"] == 2
    assert "config.json" not in aligned({"base": base}, "base", TokenizerSettings("base"))[1]
    text = "the good film is bad"
    assert read.backend.encode(text, add_special_tokens=False).ids == bytes_tokenizer().encode(text)


def test_what_belongs_to_a_token_is_found_without_a_table_of_names() -> None:
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    def found(model: torch.nn.Module) -> list[str]:
        return sorted(token_tensors(fb.Checkpoint.of(model.state_dict(), config=model.config.to_dict())))

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": 6}
    # As many tokens as positions, and as the width: where numbers do not tell, names do.
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    for size in (5, 6, 8):
        assert found(
            GPT2LMHeadModel(GPT2Config(**ids, vocab_size=size, n_embd=8, n_layer=1, n_head=2, n_positions=6))
        ) == ["transformer.wte.weight"]
        tied = BertForMaskedLM(BertConfig(vocab_size=size, hidden_size=8, **small))
        assert found(tied) == ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    t5 = T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2)
    assert found(T5ForConditionalGeneration(t5)) == ["shared.weight"]
    bias = fb.Checkpoint.of({"final_logits_bias": torch.zeros(1, 7), "pos": torch.ones(4)}, config={"vocab_size": 7})
    assert token_tensors(bias) == ["final_logits_bias"]


def test_rows_are_cut_or_filled_up_by_number(tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    rows = {"base": 10, "a": 9, "b": 12}
    for seed, name in enumerate(rows):
        write_llama(tmp_path / name, tokenizer, seed=seed, rows=rows[name])
    models = {name: fb.Checkpoint.open(tmp_path / name) for name in rows}
    with pytest.raises(InputError, match=r"\(9, 8\), but \(10, 8\) .* vocabulary=truncate, pad or union"):
        fb.ModelPool({"a": models["a"]}, models["base"])
    cut, _ = resized(models, "truncate", "base")
    assert all(same(cut[name][EMBED], models[name][EMBED][:9]) for name in rows)
    full, _ = resized(models, "pad", "base")
    base, a, b = (models[name][EMBED] for name in rows)
    assert same(full["base"][EMBED], torch.cat([base, b[10:]])) and same(full["b"][EMBED], b)
    assert same(full["a"][EMBED], torch.cat([a, base[9:], b[10:]]))
    alone, _ = resized({name: models[name] for name in ("a", "b")}, "pad")
    assert same(alone["a"][EMBED], torch.cat([a, b[9:]]))
    pool = fb.ModelPool({"a": models["a"], "b": models["b"]}, models["base"], vocabulary="pad")
    assert fb.algorithm("simple_average").run(pool).config["vocab_size"] == 12


def test_truncation_does_not_cut_tokens_off(models: dict) -> None:
    with pytest.raises(InputError, match=r"8 rows: 1 tokens of model 'a' would have none, as '<\|a\|>'"):
        resized(models, "truncate", "a")


def test_the_command_takes_models_of_different_vocabularies(folders: Path, tmp_path: Path, capsys) -> None:
    words = ["merge", "task_arithmetic", *(str(folders / name) for name in ("base", "a", "b"))]
    assert main([*words, "-o", str(tmp_path / "no")]) == 2
    assert "vocabulary=truncate, pad or union" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "out"), "--vocabulary", "union"]) == 0
    assert config_of(tmp_path / "out")["vocab_size"] == 10
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 10
    assert main(["verify", str(tmp_path / "out"), "--inputs"]) == 0
    pool = {"base": str(folders / "base"), "models": {n: str(folders / n) for n in "ab"}, "vocabulary": "pad"}
    (tmp_path / "pool.yaml").write_text(json.dumps(pool))
    words = ["method=simple_average", f"modelpool={tmp_path / 'pool.yaml'}", f"out={tmp_path / 'padded'}"]
    assert main(["run", *words]) == 0
    assert config_of(tmp_path / "padded")["vocab_size"] == 13


def test_the_same_models_give_the_same_bytes(folders: Path, tmp_path: Path) -> None:
    found = []
    for workers, executor in ((1, "threads"), (2, "processes")):
        models = {name: fb.Checkpoint.open(folders / name) for name in ("base", "a", "b")}
        fitted, _ = aligned(models, "base", TokenizerSettings("union", pad_to_multiple_of=8))
        merged = fb.algorithm("simple_average").run(fb.ModelPool(fitted))
        out = fb.save(merged, tmp_path / executor, workers=workers, executor=executor)
        found.append({file.name: file.read_bytes() for file in sorted(out.iterdir())})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TokenizerSettings("union", pad_to_multiple_of=0), "pad_to_multiple_of must be a whole number of 1 or more"),
        (TokenizerSettings("union", tokens={"x": TokenRule("aa")}), "from 'aa'. Did you mean 'a'?"),
        (TokenizerSettings("union", tokens={"x": TokenRule("a")}), "the embedding of 'x' in 'a', which lacks it"),
        (TokenizerSettings("base", tokens={"x": TokenRule(("a", 9))}), "the row 9 of 'a', which has 9"),
        (TokenizerSettings("base", tokens={"x": TokenRule(("a", "z"))}), "the embedding of 'z' in 'a'"),
        (TokenizerSettings("nowhere"), "'nowhere' does not exist"),
    ],
)
def test_what_cannot_be_followed_is_refused(models: dict, settings: TokenizerSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aligned(models, "base", settings)


def test_models_without_tokenizer_or_config_are_refused(folders: Path, models: dict, tmp_path: Path) -> None:
    write_llama(tmp_path / "bare", words_tokenizer(), rows=9)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    bare = fb.Checkpoint.open(tmp_path / "bare")
    with pytest.raises(
        InputError, match="'bare' has no tokenizer in its folder, and 9 rows for tokens where 'base' has 8"
    ):
        aligned({**models, "bare": bare}, "base", TokenizerSettings())
    with pytest.raises(InputError, match="'bare' has no tokenizer in its folder, on which"):
        aligned({**models, "bare": bare}, "bare", TokenizerSettings())
    alone = fb.Checkpoint.open(folders / "base" / "model.safetensors").beside(None)
    with pytest.raises(InputError, match="'alone': its config.json has no vocab_size"):
        resized({"base": models["base"], "alone": alone}, "pad", "base")
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="The tokenizer of '.*bare' cannot be read"):
        aligned({"bare": bare}, "bare", TokenizerSettings())


def test_rows_of_other_tokens_are_told_of_once_at_every_door(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    write_llama(tmp_path / "base", words_tokenizer(), seed=0)
    write_llama(tmp_path / "other", words_tokenizer(["good", "film", "bad", "mail"]), seed=1)
    write_llama(tmp_path / "same", words_tokenizer(), seed=2)
    (tmp_path / "same" / "tokenizer.json").write_text((tmp_path / "base" / "tokenizer.json").read_text() + "\n")
    write_llama(tmp_path / "without", words_tokenizer(), seed=3)
    (tmp_path / "without" / "tokenizer.json").write_text("{")
    names = ["other", "same", "without"]
    folders = [str(tmp_path / name) for name in ("base", *names)]
    (tmp_path / "pool.yaml").write_text(f"base: base\nmodels: {{{', '.join(f'{name}: {name}' for name in names)}}}\n")
    lines = "".join(f"  - {{model: {name}, parameters: {{weight: 1}}}}\n" for name in ("base", *names))
    (tmp_path / "recipe.yaml").write_text(f"merge_method: linear\nmodels:\n{lines}")
    pool = fb.load_modelpool(str(tmp_path / "pool.yaml"))
    pool.of(dict(pool), pool.base).load()
    assert main(["merge", "task_arithmetic", *folders, "-o", str(tmp_path / "one")]) == 0
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "two")]) == 0
    said = (
        "{} has other tokens than {} in 2 of 8 rows that are merged with each other, first 'film' for 'bad' in row 5. "
        "To merge them by their texts: --vocabulary union (in YAML vocabulary: union)."
    )
    assert [record.getMessage() for record in caplog.records] == [
        *[said.format("Model 'other'", "the base model")] * 2,
        said.format("'other'", "'base'"),
    ]
    caplog.clear()
    (tmp_path / "without" / "tokenizer.json").unlink()
    assert main(["merge", "linear", *folders, "-o", str(tmp_path / "three"), "--vocabulary", "union"]) == 0
    (tmp_path / "recipe.yaml").write_text(f"merge_method: linear\nvocabulary: union\nmodels:\n{lines}")
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "four")]) == 0
    assert caplog.text == ""


def test_tokens_without_a_row_in_both_models_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_llama(tmp_path / "base", words_tokenizer(added=["one"]), seed=0, rows=8)
    write_llama(tmp_path / "other", words_tokenizer(added=["two"]), seed=1, rows=8)
    fb.ModelPool({"other": tmp_path / "other"}, tmp_path / "base")
    assert caplog.text == ""
