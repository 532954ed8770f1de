"""Mixed models are saved and loaded as any model of transformers."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_clip
import tiny_text
import torch
from conftest import random_tasks
from tiny_llama import WORDS, words_tokenizer, write_llama
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

import fusionbench as fb
from fusionbench.cli import main
from fusionbench.mixed import as_checkpoint, mix, register
from fusionbench.mixing import SmileLinear

WRITERS: dict[str, Callable[[Path], None]] = {
    "AutoModel clip": tiny_clip.write_zoo,
    "AutoModel bert": tiny_text.write_bert_zoo,
    "AutoModel gpt2": tiny_text.write_gpt2_zoo,
    "AutoModelForSeq2SeqLM t5": tiny_text.write_t5_zoo,
}


def llamas(folder: Path) -> fb.ModelPool:
    """A base and two others, untied."""
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(folder / name, words_tokenizer(), seed=seed)
    return fb.ModelPool({name: folder / name for name in "ab"}, base=folder / "base", architecture="causal_lm")


# What a stranger runs, who has the folder and the package.
LOAD = """
import sys, torch, transformers, fusionbench.mixed
auto, folder, inputs, outputs = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder).eval()
with torch.no_grad():
    found = model(**torch.load(inputs))
torch.save(found.logits if "logits" in found else found.last_hidden_state, outputs)
"""


@pytest.mark.parametrize("method", ["smile_upscaling", "we_moe"])
@pytest.mark.parametrize("family", WRITERS)
def test_a_saved_model_gives_the_same_in_a_new_process(family: str, method: str, tmp_path: Path) -> None:
    WRITERS[family](tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    given = {"steps": 2, "learning_rate": 0.1} if method == "we_moe" else {"gate_rank": 4}
    model = fb.algorithm(method, **given).run(pool, tasks)
    fb.save(as_checkpoint(model, pool), tmp_path / "mixed")
    torch.manual_seed(0)
    if "clip" in family:
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    else:
        inputs = {"input_ids": torch.randint(3, 14, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
        inputs["attention_mask"][0, 4:] = 0
    if "t5" in family:
        inputs["decoder_input_ids"] = torch.randint(3, 14, (3, 2))
    torch.save(inputs, tmp_path / "inputs.pt")
    words = [family.split()[0], *(str(tmp_path / name) for name in ("mixed", "inputs.pt", "outputs.pt"))]
    subprocess.run([sys.executable, "-c", LOAD, *words], check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        here = model(**inputs)
    here = here.logits if "logits" in here else here.last_hidden_state
    torch.testing.assert_close(
        here, torch.load(tmp_path / "outputs.pt"), rtol=1e-5, atol=1e-6
    )  # of the same bits, below
    again = fb.ModelPool({"mixed": tmp_path / "mixed"}, architecture=pool.architecture).build("mixed")
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_the_command_line_saves_evaluates_and_says_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_clip.write_zoo(tmp_path)
    pools = [f"modelpool={tmp_path}/pool.yaml", f"taskpool={tmp_path}/tasks.yaml"]
    words = ["run", "method=we_moe", "method.steps=2", *pools, f"out={tmp_path}/mixed", f"report={tmp_path}/run.json"]
    assert main(words) == 0
    assert main(["eval", f"{tmp_path}/mixed", pools[1], f"report={tmp_path}/eval.json"]) == 0
    ran, evaluated = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "eval"))
    assert {k: v for k, v in ran.items() if k != "run"} == {k: v for k, v in evaluated.items() if k != "run"}
    model = fb.Checkpoint.open(tmp_path / "mixed")
    base = fb.load_modelpool(f"{tmp_path}/pool.yaml").reference
    sizes = [sum(spec.numel for spec in one.specs.values()) for one in (model, base)]
    assert ran["run"]["added_parameters"] == sizes[0] - sizes[1] > 0
    assert all(seconds > 0 for seconds in ran["run"]["seconds_per_sample"].values())
    recipe = json.loads((tmp_path / "mixed" / "recipe.json").read_text())
    assert recipe["method"] == "we_moe" and recipe["hyperparameters"]["steps"] == 2
    assert set(recipe["inputs"]) == {"base", *fb.load_modelpool(f"{tmp_path}/pool.yaml")}
    assert recipe["calibration"] and (tmp_path / "mixed" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    "wrong", [{"kind": "smilee"}, {"layers": ["encoder.layers.9"]}, {"rank": "all"}, {"depth": 3}, {"experts": -1}]
)
def test_a_plan_that_makes_no_sense_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict
) -> None:
    tiny_clip.write_zoo(tmp_path)
    pools = [f"modelpool={tmp_path}/pool.yaml", f"taskpool={tmp_path}/tasks.yaml"]
    assert main(["run", "method=smile_upscaling", pools[0], f"out={tmp_path}/mixed"]) == 0
    file = tmp_path / "mixed" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "mixing": {**config["mixing"], **wrong}}))
    capsys.readouterr()
    assert main(["eval", f"{tmp_path}/mixed", pools[1]]) == 2
    error = capsys.readouterr().err
    assert "'mixing'" in error and error.count("\n") == 1


def test_generation_with_the_cache_is_generation_without(tmp_path: Path) -> None:
    tiny_text.write_t5_zoo(tmp_path)
    pool = fb.load_modelpool(str(tmp_path / "pool.yaml"))
    model = fb.methods.smile_upscaling(pool, gate_rank=2)
    assert isinstance(model, nn.Module)
    texts = torch.randint(3, 14, (4, 6))
    cached, anew = (model.generate(texts, max_new_tokens=8, use_cache=use) for use in (True, False))
    assert cached.equal(anew) and cached.shape[1] > 2


def test_a_mixed_model_of_no_config_is_not_saved() -> None:
    models = [nn.Sequential(nn.Linear(3, 3)) for _ in range(3)]
    pool = fb.ModelPool({"a": models[1], "b": models[2]}, base=models[0])
    with pytest.raises(fb.InputError, match="none of transformers' own"):
        as_checkpoint(fb.methods.smile_upscaling(pool), pool)


def test_a_language_model_with_experts_writes_the_same_with_the_cache_and_without(tmp_path: Path) -> None:
    pool = llamas(tmp_path)
    model = fb.methods.smile_upscaling(pool, gate_rank=2, rank=3)
    assert isinstance(model.lm_head, nn.Linear)  # as in the paper
    assert isinstance(model.model.layers[0].mlp.up_proj, SmileLinear)
    fb.save(as_checkpoint(model, pool), tmp_path / "mixed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed").eval()
    tokens = torch.randint(4, 4 + len(WORDS), (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert loaded(tokens).logits.equal(model(tokens).logits)
        torch.testing.assert_close(loaded(tokens[:, :2]).logits, loaded(tokens).logits[:, :2])
    written = [loaded.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert written[0].equal(written[1]) and written[0].shape[1] > tokens.shape[1]


def test_a_language_model_gets_no_weights_chosen_by_tokens_that_come_later(tmp_path: Path) -> None:
    pool = llamas(tmp_path)
    with pytest.raises(fb.InputError, match=r"'model.layers.0.mlp' writes them one after the other.*smile_upscaling"):
        fb.methods.we_moe(pool, random_tasks(pool), steps=1)


def test_of_models_with_a_union_of_vocabularies_the_tokenizer_knows_all_words(tmp_path: Path) -> None:
    for seed, (name, more) in enumerate({"base": [], "a": ["one"], "b": ["two"]}.items()):
        write_llama(tmp_path / name, words_tokenizer([*WORDS, *more]), seed=seed)
    (tmp_path / "pool.yaml").write_text("{base: base, models: {a: a, b: b}, vocabulary: union}")
    pool = fb.load_modelpool(str(tmp_path / "pool.yaml"))
    fb.save(as_checkpoint(fb.methods.smile_upscaling(pool, gate_rank=2), pool), tmp_path / "mixed")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "mixed")("good one two")["input_ids"]
    assert tokens == [4, 8, 9]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mixed").config.vocab_size == 10


def modules(new: Callable[[], nn.Module]) -> fb.ModelPool:
    """A base and two others, in memory."""
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        made.append(new().eval())
    return fb.ModelPool({"a": made[1], "b": made[2]}, base=made[0])


def test_an_image_classifier_is_saved_and_loaded(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    pool = modules(lambda: ResNetForImageClassification(config))
    model = fb.methods.smile_upscaling(pool, gate_rank=2)
    fb.save(as_checkpoint(model, pool), tmp_path / "mixed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "mixed").eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images).logits)


SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def test_a_class_that_transformers_would_not_load_is_saved_after_it_is_registered(tmp_path: Path) -> None:
    pool = modules(lambda: ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4)))
    model = fb.methods.smile_upscaling(pool, gate_rank=2)
    with pytest.raises(fb.InputError, match=r"load it again, a ViTModel .*register\(auto, ViTModel\)") as error:
        as_checkpoint(model, pool)
    assert "\n" not in str(error.value)
    register(AutoModel, ViTModel)
    fb.save(as_checkpoint(model, pool), tmp_path / "mixed")
    assert type(AutoModel.from_pretrained(tmp_path / "mixed")) is type(model)


def test_two_classes_of_one_config_are_registered_and_registering_twice_changes_nothing() -> None:
    for _ in range(2):
        register(AutoModelForCausalLM, BertForMaskedLM)  # beside BertModel
    model = mix(BertForMaskedLM(BertConfig(vocab_size=9, **SIZES)), {"kind": "smile", "layers": [], "experts": 1})
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
    assert type(AutoModel.from_config(model.config)).__name__ == "MixedBertModel"


@pytest.mark.parametrize("method", ["smile_upscaling", "we_moe"])
def test_a_mixed_model_is_pickled(method: str, tmp_path: Path) -> None:
    tiny_text.write_t5_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    model = fb.algorithm(method, **({"steps": 0} if method == "we_moe" else {})).run(pool, tasks)
    again = pickle.loads(pickle.dumps(model))
    tokens = torch.randint(3, 14, (3, 6))
    with torch.no_grad():
        found = [each(input_ids=tokens, decoder_input_ids=tokens).logits for each in (model, again)]
    assert found[0].equal(found[1]) and type(again.config) is type(model.config)


def write_words(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]))


def write_words_as_json(folder: Path) -> None:
    write_words(folder)
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8}))


def write_pairs(folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["good film"] * 5, vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.save_model(str(folder))


def write_another(folder: Path) -> None:
    words_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "write"),
    [("bert", write_words), ("bert", write_words_as_json), ("bert", write_another), ("gpt2", write_pairs)],
)
def test_the_tokenizer_is_that_of_the_base(family: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    """What a model's type tells of it where its own files do not."""
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        bert, gpt2 = BertConfig(vocab_size=300, **SIZES), GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2)
        (BertModel(bert) if family == "bert" else GPT2Model(gpt2)).save_pretrained(tmp_path / name)
    write(tmp_path / "base")
    pool = fb.ModelPool({name: tmp_path / name for name in "ab"}, base=tmp_path / "base", architecture=family)
    fb.save(as_checkpoint(fb.methods.smile_upscaling(pool, gate_rank=2), pool), tmp_path / "mixed")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "mixed"))
    assert type(before) is type(after) and before.special_tokens_map == after.special_tokens_map
    assert before("Good film")["input_ids"] == after("Good film")["input_ids"]
    assert before.get_vocab() == after.get_vocab()
