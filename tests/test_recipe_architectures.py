"""Recipes on tiny models of many architectures, of which no table of names is known: results load with transformers."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

import fusionbench as fb
from fusionbench.cli import main
from fusionbench.layers import stacks
from fusionbench.recipes.build import build

TEXT = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {**TEXT, "intermediate_size": 24, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PICTURE = {"image_size": 8, "patch_size": 4, "num_channels": 3}


def clip() -> hf.PreTrainedModel:
    text = {**TEXT, **TOWER, "num_hidden_layers": 2}
    vision = {**TOWER, **PICTURE, "num_hidden_layers": 3}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def t5() -> hf.PreTrainedModel:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, decoder_start_token_id=0, **size))


def resnet() -> hf.PreTrainedModel:
    size = {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 2, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=3, **size))


# A model, and the stacks that its layers are in, with their numbers.
FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], dict[str, int]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), {"model.layers.": 3}),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA)), {"model.layers.": 3}),
    "qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA, tie_word_embeddings=True)),
        {"model.layers.": 3},
    ),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA)), {"model.layers.": 3}),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA)), {"model.layers.": 3}),
    "phi": (
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**TEXT, intermediate_size=24, num_hidden_layers=3)),
        {"model.layers.": 3},
    ),
    "gpt_neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, intermediate_size=24, num_hidden_layers=3)),
        {"gpt_neox.layers.": 3},
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)),
        {"model.layers.": 3},
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=3, n_positions=16, bos_token_id=0, eos_token_id=1)
        ),
        {"transformer.h.": 3},
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**TOWER, **PICTURE, num_hidden_layers=3, num_labels=3)),
        {},
    ),
    "clip": (clip, {"text_model.encoder.layers.": 2, "vision_model.encoder.layers.": 3}),
    "t5": (t5, {"encoder.block.": 2, "decoder.block.": 3}),
    "resnet": (resnet, {"resnet.encoder.stages.": 3}),
}
SEVERAL = ("clip", "t5", "resnet")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = FAMILIES[request.param][0]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(name)
    return request.param


def loaded(folder: str, family: str) -> hf.PreTrainedModel:
    """The model that transformers makes of a folder, in which nothing is missing."""
    model, told = type(FAMILIES[family][0]()).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    model.eval()
    pixels = torch.randn(1, 3, 8, 8)
    words = torch.arange(6)[None]
    inputs = {
        "vit": {"pixel_values": pixels},
        "resnet": {"pixel_values": torch.randn(1, 3, 32, 32)},
        "clip": {"pixel_values": pixels, "input_ids": words},
        "t5": {"input_ids": words, "decoder_input_ids": words},
    }.get(family, {"input_ids": words})
    with torch.no_grad():
        result = model(**inputs)
    assert all(value.isfinite().all() for value in result.values() if isinstance(value, torch.Tensor))
    return model


def test_a_gradient_goes_over_each_stack(family: str) -> None:
    Path("r.yaml").write_text(
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: [1, 0]}}\n"
        "  - {model: b, parameters: {weight: [0, 1]}}\n"
    )
    assert main(["merge", "r.yaml", "out"]) == 0
    a, b, out = (fb.Checkpoint.open(name) for name in ("a", "b", "out"))
    found = stacks(out.specs)
    assert FAMILIES[family][1].items() <= found.items() and found
    for prefix, count in found.items():
        ends = {0: a, count - 1: b} if count > 1 else {0: b}
        for number, of in ends.items():
            names = [name for name in out.specs if name.startswith(f"{prefix}{number}.")]
            assert names and all(torch.equal(out[name], of[name]) for name in names)
        if count == 3:
            for name in (name for name in out.specs if name.startswith(f"{prefix}1.") and out.specs[name].floating):
                torch.testing.assert_close(out[name], (a[name] + b[name]) / 2)
    outside = [name for name in out.specs if not name.startswith(tuple(found))]
    assert outside and all(torch.equal(out[name], a[name]) for name in outside)
    assert set(out.aliases) == set(a.aliases)
    model = loaded("out", family)
    for name, tensor in model.state_dict().items():
        if name in out:
            torch.testing.assert_close(tensor, out[name].to(tensor.dtype))


def test_slices_make_a_deeper_model_of_one_stack(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: b, layer_range: [1, 3]}]\n"
    )
    if family in SEVERAL:
        assert main(["merge", "r.yaml", "out"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(re.search("slices need a model with one stack of layers|The config has no number", x) for x in lines)
        assert not Path("out").exists()
        return
    assert main(["merge", "r.yaml", "out"]) == 0
    a, b, out = (fb.Checkpoint.open(name) for name in ("a", "b", "out"))
    [(prefix, count)] = stacks(out.specs).items()
    assert count == 4
    for new, (of, old) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        names = [name for name in of.specs if name.startswith(f"{prefix}{old}.")]
        assert names and all(torch.equal(out[name.replace(f"{old}.", f"{new}.", 1)], of[name]) for name in names)
    assert len(list(loaded("out", family).parameters())) > len(list(FAMILIES[family][0]().parameters()))
    outside = [name for name in out.specs if not name.startswith(prefix)]
    first = {name for name in outside if torch.equal(out[name], a[name])}  # as the first slice's model has them
    last = {name for name in outside if torch.equal(out[name], b[name])}
    assert first | last == set(outside) and not first & last
    assert {name for name in outside if re.search(r"embeddings|embed_tokens|embed_in|wte|wpe", name)} == first
    assert any(re.search("norm|ln_f", name) for name in last)


def test_rounded_to_bfloat16_they_load(family: str) -> None:
    Path("r.yaml").write_text(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.3}\nout_dtype: bfloat16\n"
    )
    assert {spec.dtype for spec in build("r.yaml").checkpoint.specs.values() if spec.floating} == {"BF16"}
    assert main(["merge", "r.yaml", "out"]) == 0
    assert {p.dtype for p in type(FAMILIES[family][0]()).from_pretrained("out").parameters()} == {torch.bfloat16}
