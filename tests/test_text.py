"""Text families: GPT-2 classifiers and T5 that writes answers, scored as transformers itself would have it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_text import WORDS, near, write_gpt2_zoo, write_t5_zoo
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fusionbench as fb
from fusionbench.architectures import get_architecture
from fusionbench.calibrate import data_of, gram_matrices, linear_layers
from fusionbench.config import build_taskpool
from fusionbench.ensemble import Ensemble
from fusionbench.errors import InputError
from fusionbench.tasks.text_generation import TextGeneration, greedy, spearman


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    write_gpt2_zoo(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write_t5_zoo(folder)
    return folder


def opened(folder: Path) -> tuple[fb.ModelPool, fb.TaskPool]:
    return fb.load_modelpool(str(folder / "pool.yaml")), fb.load_taskpool(str(folder / "tasks.yaml"))


def test_classifiers_merge_as_backbones_and_keep_their_heads(gpt2: Path) -> None:
    pool, tasks = opened(gpt2)
    names = set(GPT2Model.from_pretrained(gpt2 / "base").state_dict())
    assert set(pool["films"]) == set(pool.require_base()) == names
    merged = fb.methods.task_arithmetic(pool, scaling_factor=0.5)
    report = tasks.evaluate(pool.build(merged))
    assert set(report) == {"model_info", "films", "pairs", "average"}
    assert all(0 <= report[name]["accuracy"] <= 1 for name in ("films", "pairs"))


@pytest.mark.parametrize("task", ["films", "pairs"])
def test_logits_are_those_of_transformers_whatever_fills_up(gpt2: Path, task: str) -> None:
    """The state at the last token that is not filled up; in transformers found by the padding token."""
    pool, tasks = opened(gpt2)
    reference = GPT2ForSequenceClassification.from_pretrained(gpt2 / task).eval()
    model = pool.build(task)
    for inputs, _ in tasks[task].batches("test", 7):
        expected = reference(**inputs).logits
        torch.testing.assert_close(tasks[task].predict(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_what_a_text_is_filled_up_with_makes_no_difference(gpt2: Path) -> None:
    pool, tasks = opened(gpt2)
    model, task = pool.build("films"), tasks["films"]
    inputs, _ = next(task.batches("test", 20))
    together = task.predict(model, inputs)
    for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        n = int(mask.sum())
        alone = task.predict(model, {"input_ids": ids[None, :n], "attention_mask": mask[None, :n]})
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_language_models_and_old_files_have_the_same_backbone(gpt2: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Model.from_pretrained(gpt2 / "base").config)
    tensors = {**model.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    model.config.save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    pool = fb.ModelPool({"lm": tmp_path}, gpt2 / "base", architecture=get_architecture("gpt2"))
    assert list(pool["lm"]) == list(pool.require_base())


def test_an_ensemble_of_backbones_runs(gpt2: Path) -> None:
    pool, tasks = opened(gpt2)
    assert "average" in tasks.evaluate(fb.methods.simple_ensemble(pool))


def test_answers_are_those_that_generate_writes(t5: Path) -> None:
    pool, tasks = opened(t5)
    tokenizer = AutoTokenizer.from_pretrained(t5 / "base")
    for name in ("base", "films", "similar"):
        reference = T5ForConditionalGeneration.from_pretrained(t5 / name).eval()
        ours = pool.build(pool.require_base() if name == "base" else name)
        inputs = dict(tokenizer(["good film", "it is bad mail ?", "no"], padding=True, return_tensors="pt"))
        expected = reference.generate(  # pyright: ignore[reportAttributeAccessIssue]  (transformers hides it)
            **inputs, max_new_tokens=6, do_sample=False
        )
        found = greedy(ours, inputs, 6)
        decoded = [tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (found, expected)]
        assert decoded[0] == decoded[1]


def test_a_model_that_goes_on_with_the_prompt_writes_what_generate_writes(t5: Path, tmp_path: Path) -> None:
    """Texts of several lengths in one batch, filled up on either side, with a cache and without."""
    torch.manual_seed(4)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, **size)).eval()
    near(model, 5)
    task = opened(t5)[1]["films"]
    inputs = task.tokens.encode(["is it good ? good film", "good", "mail yes no"])
    tokens = greedy(model, inputs, 6)
    for i, row in enumerate(tokens.tolist()):
        alone = inputs["input_ids"][i][inputs["attention_mask"][i].bool()][None]
        written = model.generate(alone, max_new_tokens=6, do_sample=False)[0, alone.shape[1] :].tolist()
        assert row[: len(written)] == written
        torch.testing.assert_close(task.predict(model, inputs)[i], model(alone).logits[0, -1], rtol=1e-4, atol=1e-5)
    both = Ensemble([model, model], lambda stacked: stacked.mean(0))
    assert torch.equal(greedy(both, inputs, 6), tokens)
    model.config.eos_token_id = [tokens[0, 1].item()]  # all that follows it is not written
    again = greedy(model, inputs, 6)
    ended = (again == model.config.eos_token_id[0]).cumsum(1) > 1
    assert (again[ended] == model.config.eos_token_id[0]).all()


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_gram_matrices_are_of_prompts_and_of_what_the_model_writes_itself(t5: Path, family: str, size: int) -> None:
    """As one text after the other, written by transformers, would give, whatever is filled up in a batch."""
    torch.manual_seed(4)
    task = opened(t5)[1]["films"]
    assert isinstance(task, TextGeneration)
    if family == "t5":
        model = T5ForConditionalGeneration.from_pretrained(t5 / "films").eval()
        layers = ["decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"]
        layers += ["encoder.block.1.layer.0.SelfAttention.q"]
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, **sizes)).eval()
        layers = ["model.layers.1.self_attn.q_proj"]
    near(model, 5)
    texts = ["is it good ? good film", "good", "mail yes no", "film film", "it is"]
    inputs = [task.tokens.encode(texts[i : i + size]) for i in range(0, len(texts), size)]
    tasks = fb.TaskPool({"films": task})

    def batches(*_: object, **__: object) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return [(each, torch.zeros(len(each["input_ids"]))) for each in inputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "calibration_batches", batches)
        data = data_of(model, tasks, "films")
    some = {name: layer for name, layer in linear_layers(model).items() if name.removesuffix(".weight") in layers}
    found = gram_matrices(model, task, data, some)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    lengths: set[int] = set()
    for text in texts:
        prompt = dict(task.tokens.encode([text]))
        answer = model.generate(**prompt, max_new_tokens=task.max_new_tokens, do_sample=False)  # pyright: ignore
        lengths.add(answer.shape[1] - (family != "t5") * prompt["input_ids"].shape[1])
        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0][0]))
            for name in layers
        ]
        with torch.no_grad():
            model(**prompt, decoder_input_ids=answer[:, :-1]) if family == "t5" else model(answer[:, :-1])
        for handle in handles:
            handle.remove()
    assert len(lengths) > 1
    for name in layers:
        rows = torch.cat(seen[name])
        torch.testing.assert_close(found[f"{name}.weight"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_the_first_token_of_an_answer_is_no_sign_that_a_text_begins(t5: Path) -> None:
    """Llama's tokenizer puts one before every text; what is written begins without it."""
    task = opened(t5)[1]["films"]
    assert isinstance(task, TextGeneration)
    (_, before), *_ = task.batches("calibration", 8, seed=0)
    tokenizer = task.tokens.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    tokenizer.bos_token = "<unk>"
    (inputs, after), *_ = task.batches("calibration", 8, seed=0)
    assert (inputs["input_ids"][:, 0] == tokenizer.bos_token_id).all() and after.equal(before)


def test_an_output_layer_of_its_own_is_not_the_embedding(tmp_path: Path) -> None:
    """Flan-T5 has one; transformers 5 makes modules that tie it, whatever the config says."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 12}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    own["lm_head.weight"] = torch.randn(12, 8)
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "tie_word_embeddings": False}))
    pool = fb.ModelPool({"flan": tmp_path}, base=tmp_path, architecture=get_architecture("t5"))
    ours = pool.build("flan")
    assert ours.lm_head.weight.equal(own["lm_head.weight"]) and ours.shared.weight.equal(own["shared.weight"])
    inputs = {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.tensor([[0, 3, 4]])}
    with torch.no_grad():
        hidden = ours.decoder(
            input_ids=inputs["decoder_input_ids"], encoder_hidden_states=ours.encoder(inputs["input_ids"])[0]
        )[0]
        torch.testing.assert_close(ours(**inputs).logits, hidden @ own["lm_head.weight"].T)
    assert sorted(fb.Checkpoint.open(fb.save(fb.methods.simple_average(pool), tmp_path / "merged"))) == sorted(own)


def test_an_ensemble_writes_as_its_only_member(t5: Path) -> None:
    pool, tasks = opened(t5)
    model = pool.build("films")
    inputs, _ = next(tasks["films"].batches("test", 5))
    alone = greedy(model, inputs, 4)
    assert torch.equal(greedy(Ensemble([model, model], lambda outputs: outputs.mean(0)), inputs, 4), alone)


def test_text_to_text_tasks_score_by_their_own_metric(t5: Path) -> None:
    pool, tasks = opened(t5)
    report = tasks.evaluate(pool.build(fb.methods.ties_merging(pool)))
    assert report["films"].keys() == {"accuracy"}
    assert report["similar"].keys() == {"spearman_rho", "unparsable"}
    assert set(tasks.headline(report)) == {"films", "similar", "average"}


class Writes(torch.nn.Module):
    """A model that writes the same word always."""

    def __init__(self, template: torch.nn.Module, token: int) -> None:
        super().__init__()
        self.config, self.token = template.config, token
        self.words, self.end = len(WORDS), WORDS.index("</s>")

    def forward(self, input_ids, attention_mask, decoder_input_ids, **_):
        length = decoder_input_ids.shape[1]
        logits = torch.zeros(len(input_ids), length, self.words)
        logits[..., self.token if length == 1 else self.end] = 1.0
        return type("Output", (), {"logits": logits})


def test_scores_can_be_checked_by_hand(t5: Path) -> None:
    pool, tasks = opened(t5)
    yes = [json.loads(line)["label"] for line in (t5 / "films.jsonl").read_text().splitlines() if '"test"' in line]
    template = pool.build("films")
    assert tasks["films"].score(Writes(template, 7)) == {"accuracy": sum(yes) / len(yes)}  # token 7 is "yes"
    assert tasks["similar"].score(Writes(template, 7)) == {"spearman_rho": 0.0, "unparsable": 1.0}
    assert tasks["similar"].score(Writes(template, 9)) == {"spearman_rho": 0.0, "unparsable": 0.0}  # always 1.0


def test_spearman_shares_ranks_among_ties() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # ranks 1.5 1.5 3 4 and 1 2 3 4: covariance 4.5, variances 4.5 and 5
    assert spearman([0, 0, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([2, 2, 2], [1, 2, 3]) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "film.jsonl"}, "Did you mean 'films.jsonl'"),
        ({"head": "base"}, "has no classifier"),
        ({"classes": ["bad", "good", "other"]}, "into 2 classes, but 3 are named"),
        ({"classes": ["bad", "god"]}, "Did you mean 'god'"),
        ({"txt": "text"}, "takes no 'txt'. Did you mean 'text'"),
        ({"text": "txt"}, "line 1: no 'txt'. Did you mean 'text'"),
        ({"data": None}, "has no 'data'"),
        ({"data": "base"}, "cannot be read as lines of JSON"),
        ({"data": "films/model.safetensors"}, "cannot be read as lines of JSON"),
        ({"classes": 2}, "classes must be a list; got 2"),
        ({"text": 5}, "text must be a column"),
    ],
)
def test_mistakes_in_a_classification_task_are_one_line(gpt2: Path, change: dict, message: str) -> None:
    entry = {"data": "films.jsonl", "head": "films", "classes": ["bad", "good"], **change}
    config = {"kind": "text_classification", "tokenizer": str(gpt2 / "base"), "tasks": {"films": entry}}
    pool, _ = opened(gpt2)
    with pytest.raises(fb.InputError, match=message) as error:
        build_taskpool(config, relative_to=gpt2).evaluate(pool.build("films"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "no place"}, "no place for a column"),
        ({"prompt": "{sentnce}"}, "Did you mean 'sentence'"),
        ({"metric": "f1"}, "No metric of text generation is called 'f1'"),
        ({"answers": {0: "no"}}, "The label '1' has no answer"),
        ({"answers": ["no"]}, "answers must be a table by value"),
        ({"answers": "{:.1q}"}, "does not take the label 1"),
        ({"prompt": "{sentence"}, "is no format"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of 1 or more; got -1"),
        ({"metric": "spearman_rho", "answers": {0: "no", 1: "yes"}}, "compares numbers, but an answer is"),
    ],
)
def test_mistakes_in_a_generation_task_are_one_line(t5: Path, change: dict, message: str) -> None:
    entry = {"data": "films.jsonl", "prompt": "{sentence}", **change}
    config = {"kind": "text_generation", "tokenizer": str(t5 / "base"), "tasks": {"films": entry}}
    pool, _ = opened(t5)
    with pytest.raises(fb.InputError, match=message):
        build_taskpool(config, relative_to=t5).evaluate(pool.build("films"))


@pytest.mark.parametrize("option", ["batch_size", "max_length"])
@pytest.mark.parametrize("value", ["lots", 0, -3, 1.5, True])
def test_a_count_of_a_task_pool_is_a_whole_number(gpt2: Path, option: str, value: object) -> None:
    entry = {"data": "films.jsonl", "head": "films", "classes": ["bad", "good"]}
    config = {"kind": "text_classification", "tokenizer": "base", "tasks": {"films": entry}, option: value}
    with pytest.raises(fb.InputError, match=f"{option} must be a whole number of 1 or more"):
        build_taskpool(config, relative_to=gpt2)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_config_of_another_model_is_said_in_one_line(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    config = json.loads((folder / "films" / "config.json").read_text())
    config["n_layer" if family == "gpt2" else "num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "films" / "model.safetensors").read_bytes())
    pool = fb.ModelPool({"other": tmp_path}, folder / "base", architecture=get_architecture(family))
    with pytest.raises(fb.InputError, match="does not fit its config.json") as error:
        pool.build("other")
    assert "\n" not in str(error.value)


def test_a_damaged_line_is_named(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "films.jsonl").write_text('{"split": "test", "text": "good", "label": 1}\n{"split": "tes\n')
    entry = {"data": str(tmp_path / "films.jsonl"), "head": str(gpt2 / "films"), "classes": ["bad", "good"]}
    tasks = build_taskpool({"kind": "text_classification", "tokenizer": str(gpt2 / "base"), "tasks": {"films": entry}})
    with pytest.raises(fb.InputError, match="line 2"):
        next(tasks["films"].batches("test", 4))


def test_an_adapter_merges_in_a_pool_of_classifiers(gpt2: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = GPT2Model.from_pretrained(gpt2 / "base")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    near(peft, 1)
    peft.save_pretrained(str(tmp_path / "adapter"))
    pool = fb.ModelPool(
        {"films": gpt2 / "films", "lora": tmp_path / "adapter"},
        gpt2 / "base",
        architecture=get_architecture("gpt2"),
    )
    change = pool["lora"]["h.0.attn.c_attn.weight"] - pool.require_base()["h.0.attn.c_attn.weight"]
    assert torch.linalg.matrix_rank(change, atol=1e-6) == 2
    assert fb.methods.simple_average(pool)["ln_f.weight"].shape == (16,)


@pytest.mark.parametrize(("pooling", "at"), [("last", [2, 1]), ("first", [0, 0])])
def test_a_token_stands_for_the_text(gpt2: Path, pooling: str, at: list[int]) -> None:
    pool, task = _films(gpt2, pooling)
    inputs = task.tokens.encode(["good film", "bad"])  # and what ends a text
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    model = pool.build("films")
    states = model(**inputs).last_hidden_state
    weight = fb.Checkpoint.open(gpt2 / "films")["score.weight"]
    expected = torch.stack([states[0, at[0]], states[1, at[1]]]) @ weight.T
    assert torch.allclose(task.predict(model, inputs), expected, atol=1e-6)


def test_the_mean_of_the_tokens_stands_for_the_text(gpt2: Path) -> None:
    pool, task = _films(gpt2, "mean")
    model, inputs = pool.build("films"), task.tokens.encode(["good film", "bad"])
    states = model(**inputs).last_hidden_state
    expected = (
        torch.stack([states[0].mean(0), states[1, :2].mean(0)]) @ fb.Checkpoint.open(gpt2 / "films")["score.weight"].T
    )
    assert torch.allclose(task.predict(model, inputs), expected, atol=1e-6)


def _films(folder: Path, pooling: str):
    tasks = {"films": {"data": str(folder / "films.jsonl"), "head": str(folder / "films"), "classes": ["bad", "good"]}}
    content = {"kind": "text_classification", "tokenizer": str(folder / "base"), "tasks": tasks, "pooling": pooling}
    return fb.load_modelpool(str(folder / "pool.yaml")), build_taskpool(content)["films"]


def test_a_head_may_have_a_bias_but_no_pooler(gpt2: Path, tmp_path: Path) -> None:
    pool, plain = _films(gpt2, "last")
    model, inputs = pool.build("films"), plain.tokens.encode(["good film"])
    bias = torch.tensor([1.0, -2.0])
    save_file({"classifier.weight": plain.head.weight.data, "classifier.bias": bias}, tmp_path / "head.safetensors")
    pooler = {"classifier.weight": plain.head.weight.data, "bert.pooler.dense.weight": torch.eye(16)}
    save_file(pooler, tmp_path / "pooled.safetensors")
    content = {"kind": "text_classification", "tokenizer": str(gpt2 / "base")}
    entry = {"data": str(gpt2 / "films.jsonl"), "classes": ["bad", "good"]}
    heads = {name: {**entry, "head": str(tmp_path / f"{name}.safetensors")} for name in ("head", "pooled")}
    tasks = build_taskpool({**content, "tasks": heads})
    assert torch.allclose(tasks["head"].predict(model, inputs), plain.predict(model, inputs) + bias)
    with pytest.raises(InputError, match="classifies what its pooler makes"):
        tasks["pooled"].predict(model, inputs)


def test_a_description_tells_all_that_scores_depend_on(gpt2: Path, t5: Path, tmp_path: Path) -> None:
    entry = {"data": str(gpt2 / "films.jsonl"), "head": str(gpt2 / "films"), "classes": ["bad", "good"]}
    save_file({"score.weight": torch.ones(2, 16)}, tmp_path / "head.safetensors")
    other = {"head": str(tmp_path / "head.safetensors")}
    kinds = {
        "text_classification": ("gpt2", entry, [other, {"text": "label"}], [{"max_length": 4}, {"pooling": "first"}]),
        "text_generation": (
            "t5",
            {"data": str(t5 / "films.jsonl"), "prompt": "{sentence} ?", "answers": {"0": "no", "1": "yes"}},
            [{"answers": {"0": "yes", "1": "no"}}, {"target": "sentence"}, {"max_new_tokens": 1}],
            [{"max_length": 4}],
        ),
    }
    for kind, (folder, given, others, more) in kinds.items():
        place = str({"gpt2": gpt2, "t5": t5}[folder] / "base")
        changes = [({**given, **change}, {}) for change in [{}, *others]] + [(given, change) for change in more]
        told = [
            json.dumps(
                build_taskpool({"kind": kind, "tokenizer": place, "tasks": {"f": one}, **change})["f"].describe()
            )
            for one, change in changes
        ]
        assert len(set(told)) == len(told)


def test_examples_that_are_none_are_one_line(gpt2: Path, tmp_path: Path) -> None:
    for row, line in [
        ({"split": "tset", "text": "x", "label": 0}, "the split must be 'test' or 'calibration'; got 'tset'."),
        ({"split": "test", "text": None, "label": 0}, "'text' of an example must be a text; got None."),
        ({"split": "test", "text": "x", "label": True}, "A label is True"),
    ]:
        file = tmp_path / "films.jsonl"
        file.write_text(json.dumps(row))
        tasks = {"films": {"data": str(file), "head": str(gpt2 / "films"), "classes": ["bad", "good"]}}
        task = build_taskpool({"kind": "text_classification", "tokenizer": str(gpt2 / "base"), "tasks": tasks})["films"]
        with pytest.raises(InputError) as error:
            list(task.batches("test", 2))
        assert line in str(error.value)


def test_a_card_beside_the_data_says_what_the_yaml_leaves_out(gpt2: Path, t5: Path, tmp_path: Path) -> None:
    for folder, kind in ((gpt2, "text_classification"), (t5, "text_generation")):
        data = tmp_path / kind / "films.jsonl"
        data.parent.mkdir()
        data.write_text((folder / "films.jsonl").read_text())
        entry = {"data": str(data), **({"head": str(folder / "films")} if kind == "text_classification" else {})}
        content = {"kind": kind, "tokenizer": str(folder / "base"), "tasks": {"films": entry}}
        with pytest.raises(InputError, match="is missing, in the YAML and in a .json beside the data"):
            build_taskpool(content)
        card = {"classes": ["bad", "good"], "prompt": "{sentence} ?", "answers": {"0": "no", "1": "yes"}, "source": "x"}
        data.with_suffix(".json").write_text(json.dumps(card))
        task = build_taskpool(content)["films"]
        assert task.describe()["classes" if kind == "text_classification" else "prompt"] in card.values()
        data.with_suffix(".json").write_text("[1")
        with pytest.raises(InputError, match="films.json' cannot be read"):
            build_taskpool(content)
