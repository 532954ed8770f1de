import json
import sys
from pathlib import Path

import pytest
import tiny_clip
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    PretrainedConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

import fusionbench as fb
from fusionbench import suites
from fusionbench.architectures import get_architecture
from fusionbench.cli import main
from fusionbench.layers import with_layers
from fusionbench.methods.depth_upscaling import chosen_layers
from fusionbench.results import Results

SMALL = {"vocab_size": 40, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(10)[None]).logits


def upscaled(folder: Path, out: Path, layers: str) -> Path:
    return fb.save(fb.algorithm("depth_upscaling", layers=layers).run(fb.ModelPool({"model": folder})), out)


def test_all_layers_once_give_the_same_logits(llama: Path, tmp_path: Path) -> None:
    assert logits(upscaled(llama, tmp_path / "same", "0:4")).equal(logits(llama))


def test_layers_are_stacked_in_the_order_asked_for(llama: Path, tmp_path: Path) -> None:
    before = fb.Checkpoint.open(llama)
    after = fb.Checkpoint.open(upscaled(llama, tmp_path / "deep", "0:3+1:4"))
    for new, old in enumerate([0, 1, 2, 1, 2, 3]):
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"):
            assert after[f"model.layers.{new}.{part}"].equal(before[f"model.layers.{old}.{part}"])
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "deep").generate(torch.arange(4)[None], max_length=8).shape[1]
        == 8
    )
    recipe = json.loads((tmp_path / "deep" / "recipe.json").read_text())
    assert recipe["hyperparameters"]["layers"] == "0:3+1:4" and "xxh3" in recipe["inputs"]["base"]


def test_doubled_layers_are_not_tied(llama: Path) -> None:
    deep = fb.methods.depth_upscaling(fb.ModelPool({"model": llama}), layers="0+0+0")
    assert not deep.aliases and sum(name.endswith("up_proj.weight") for name in deep.specs) == 3


def test_gpt2_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "pool.yaml").write_text(f"base: {tmp_path}/gpt2\nmodels: {{gpt2: {tmp_path}/gpt2}}\n")
    words = ["run", "method=depth_upscaling", f"modelpool={tmp_path}/pool.yaml"]
    assert main([*words, "method.layers=0:3+2:3", f"out={tmp_path}/deep"]) == 0
    assert fb.Checkpoint.open(tmp_path / "deep").config["n_layer"] == 4
    assert main(["merge", "depth_upscaling", f"{tmp_path}/gpt2", "-o", f"{tmp_path}/one", "layers=2"]) == 0
    assert fb.Checkpoint.open(tmp_path / "one").config["n_layer"] == 1
    for wrong, message in (
        ("3", "'3' is no part of 3 layers"),
        ("0:4", "'0:4' is no part of 3 layers"),
        ("2:1", "'2:1' is no part of 3 layers"),
        ("all", "'all' is no part of 3 layers"),
        ("0:3 method.stack=decoder", "stack='decoder' fits 0 of the model's stacks of layers (h)."),
    ):
        capsys.readouterr()
        assert main([*words, *f"method.layers={wrong}".split(), f"out={tmp_path}/not"]) == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
        assert not (tmp_path / "not").exists()


def test_a_suite_scores_and_times_a_deeper_model_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_clip.write_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    monkeypatch.setattr(suites, "_opened", lambda *names: (pool, tasks))
    cell = suites.Cell("clip", "depth_upscaling", {"layers": "0:2+0:2"})
    report = suites.run_cell(cell, Results(tmp_path / "results")).report
    deep = pool.build(fb.methods.depth_upscaling(pool, layers="0:2+0:2"))
    layers = sum(tensor.numel() for name, tensor in pool.build(pool.reference).named_parameters() if ".layers." in name)
    assert report["run"]["added_parameters"] == layers
    assert report["run"]["seconds_per_sample"]["this"] != report["run"]["seconds_per_sample"]["one model"]
    assert report["average"]["loss"] == pytest.approx(tasks.evaluate(deep)["average"]["loss"])


def test_one_of_several_stacks_is_chosen_by_name() -> None:
    tensors = {f"{side}.block.{i}.w": torch.full((1,), i) for side in ("encoder", "decoder") for i in range(3)}
    pool = fb.ModelPool({"model": tensors})
    with pytest.raises(
        fb.InputError, match="Choose one by stack=, of the .* layers \\(encoder.block, decoder.block\\)"
    ):
        fb.methods.depth_upscaling(pool, layers="0:2")
    assert int(fb.methods.depth_upscaling(pool, layers=2, stack="decoder.block")["decoder.block.0.w"]) == 2
    deep = fb.methods.depth_upscaling(pool, layers="2+0:3", stack="decoder.block")
    assert [int(deep[f"decoder.block.{i}.w"]) for i in range(4)] == [2, 0, 1, 2] and "encoder.block.3.w" not in deep


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many layers in the encoder as in the decoder."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("stack", "encoder", "decoder"), [("encoder.block", 3, 2), ("decoder.block", 2, 3)])
def test_of_two_stacks_alike_the_one_that_is_asked_for_grows(
    t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stack: str, encoder: int, decoder: int
) -> None:
    words = ["layers=0:2+1:2", f"stack={stack}", "-o", str(tmp_path / "deep")]
    assert main(["merge", "depth_upscaling", str(t5), *words]) == 0
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (encoder, decoder)
    _, loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "deep", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("stack", "encoder", "decoder"), [("encoder.layers", 4, 2), ("decoder.layers", 2, 4)])
def test_of_bart_too(tmp_path: Path, stack: str, encoder: int, decoder: int, told: bool) -> None:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    config = BartConfig(vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, **heads)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    if told:  # as those of the hub do, which say it twice
        file = tmp_path / "bart" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 2}))
    pool = fb.ModelPool({"bart": tmp_path / "bart"})
    fb.save(fb.methods.depth_upscaling(pool, layers="0:2+0:2", stack=stack), tmp_path / "deep")
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (encoder, decoder)
    assert not told or config["num_hidden_layers"] == encoder
    _, loaded = BartForConditionalGeneration.from_pretrained(tmp_path / "deep", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]


BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(("layers", "order"), [("0:2+0:2", [0, 1, 0, 1]), ("1:2+0:2", [1, 0, 1])])
def test_what_only_the_first_layer_has_the_new_first_layer_has_alone(t5: Path, layers: str, order: list[int]) -> None:
    pool = fb.ModelPool({"t5": t5}, architecture=get_architecture("t5"))
    deep = fb.methods.depth_upscaling(pool, layers=layers, stack="encoder.block")
    before = pool["t5"]
    assert [name for name in deep if name.startswith("encoder") and BIAS in name] == [f"encoder.block.0.{BIAS}"]
    assert deep[f"encoder.block.0.{BIAS}"].equal(before[f"encoder.block.0.{BIAS}"])
    for new, old in enumerate(order):
        rest = "layer.0.SelfAttention.q.weight"
        assert deep[f"encoder.block.{new}.{rest}"].equal(before[f"encoder.block.{old}.{rest}"])
    assert len(pool.build(deep).encoder.block) == len(order)


def test_layers_of_two_kinds_and_a_single_one_are_copied_whole() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    kinds = fb.ModelPool({"a": {"h.0.dense.w": one, "h.0.norm": one, "h.1.sparse.w": two, "h.1.norm": two}})
    deep = fb.methods.depth_upscaling(kinds, layers="0:2+0")
    assert sorted(deep) == ["h.0.dense.w", "h.0.norm", "h.1.norm", "h.1.sparse.w", "h.2.dense.w", "h.2.norm"]
    single = fb.ModelPool({"a": {"h.0.w": one}})
    assert list(fb.methods.depth_upscaling(single, layers="0+0")) == ["h.0.w", "h.1.w"]


def tied_layers(*order: int) -> fb.Checkpoint:
    """Layers that each stand at one or more places, with the same norm in all, and that of layer 0 outside."""
    norm, layers = torch.full((2,), 9.0), [torch.full((1,), float(i)) for i in order]
    layers = [layers[order.index(i)] for i in order]
    tensors = {f"layers.{i}.{n}": t for i, w in enumerate(layers) for n, t in (("w", w), ("norm", norm))}
    return fb.Checkpoint.of({**tensors, "out.w": layers[0], "embed": torch.zeros(3)})


def test_tensors_that_are_tied_between_layers_are_in_the_copies() -> None:
    deep = fb.methods.depth_upscaling(fb.ModelPool({"a": tied_layers(0, 1, 2)}), layers="0:3+1:3")
    assert [deep[f"layers.{i}.norm"].tolist() for i in range(5)] == [[9, 9]] * 5
    assert [float(deep[f"layers.{i}.w"]) for i in range(5)] == [0, 1, 2, 1, 2]
    less = fb.methods.depth_upscaling(fb.ModelPool({"a": tied_layers(0, 1, 2)}), layers="0:2")
    assert {*less} == {"embed", "out.w", *(f"layers.{i}.{rest}" for i in (0, 1) for rest in ("w", "norm"))}


def test_of_a_sequence_layers_are_stacked_and_the_rest_stays_tied() -> None:
    head = torch.ones(2)
    pool = fb.ModelPool({"a": fb.Checkpoint.of({"0.w": torch.zeros(1), "1.w": torch.ones(1), "in": head, "out": head})})
    deep = fb.methods.depth_upscaling(pool, layers="1+0:2")
    assert [float(deep[f"{i}.w"]) for i in range(3)] == [1, 0, 1] and deep.aliases == {"out": "in"}


def test_a_layer_may_stand_twice_and_what_is_tied_to_a_layer_stays_what_it_is() -> None:
    deep = fb.methods.depth_upscaling(fb.ModelPool({"a": tied_layers(0, 1, 0, 3)}), layers="1:4")
    assert [float(deep[f"layers.{i}.w"]) for i in range(3)] == [1, 0, 3]
    assert float(deep["out.w"]) == 0 and deep["embed"].tolist() == [0, 0, 0]


def test_ranges() -> None:
    assert chosen_layers("0:2+1:3+2", 3) == [0, 1, 1, 2, 2]


def test_lists_of_the_config_follow_and_towers_have_their_own_count() -> None:
    order = [0, 1, 1]
    assert with_layers({"num_hidden_layers": 2, "layer_types": ["a", "b"], "other": [1, 2, 3]}, 2, order) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "b"],
        "other": [1, 2, 3],
    }
    assert with_layers({"vision_config": {"num_hidden_layers": 2}}, 2, order) == {
        "vision_config": {"num_hidden_layers": 3}
    }
    towers = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
    deep = with_layers(towers, 2, order, stack="vision_model.encoder.layers.")
    assert [tower["num_hidden_layers"] for tower in deep.values()] == [2, 3]
    one = {"n_layer": 1, "architectures": ["GPT2LMHeadModel"], "block_types": ["a"]}
    assert with_layers(one, 1, [0, 0]) == {**one, "n_layer": 2, "block_types": ["a", "a"]}
    assert with_layers({"n_layer": 2, "eos_token_id": [3, 4]}, 2, order) == {"n_layer": 3, "eos_token_id": [3, 4]}
    alike = {"is_encoder_decoder": True, "num_layers": 2}  # T5's decoder has as many, where nothing else is said
    assert with_layers(alike, 2, order, stack="encoder.block.") == {**alike, "num_layers": 3, "num_decoder_layers": 2}
    assert with_layers(alike, 2, order, stack="decoder.block.") == {**alike, "num_decoder_layers": 3}
    with pytest.raises(fb.InputError, match="'mixing' says which layers are mixed: stack the layers first"):
        with_layers({"num_hidden_layers": 2, "mixing": {"layers": ["h.1.up"]}}, 2, order)
    with pytest.raises(fb.InputError, match="no number of layers that is 2"):
        with_layers({"num_hidden_layers": 3}, 2, order)


def test_layers_without_experts_stay_where_the_config_says_that_they_are() -> None:
    first = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    assert with_layers(first, 3, [0, 1, 2, 1, 2])["num_hidden_layers"] == 5
    with pytest.raises(
        fb.InputError, match="layer 3 would be sparse, but layer 0, which comes there, is dense"
    ) as error:
        with_layers(first, 3, [0, 1, 2, 0, 1])
    assert "\n" not in str(error.value)
    step = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": []}
    assert with_layers(step, 4, [0, 1, 2, 3, 2, 3])["num_hidden_layers"] == 6
    with pytest.raises(fb.InputError, match="layer 3 would be sparse, but layer 0"):
        with_layers(step, 4, [0, 1, 2, 0])


def test_lists_of_the_layers_without_experts_or_with_some_follow_the_layers() -> None:
    named = {"num_hidden_layers": 1, "mlp_only_layers": [0], "decoder_sparse_step": 1}  # not an entry for each layer
    assert with_layers(named, 1, [0, 0])["mlp_only_layers"] == [0, 1]
    some = {"num_hidden_layers": 1, "mlp_only_layers": []}
    assert with_layers(some, 1, [0, 0], [some, named])["mlp_only_layers"] == [1]  # of another model
    assert with_layers({**named, "num_hidden_layers": 2}, 2, [1, 1])["mlp_only_layers"] == []
    sparse = {"num_hidden_layers": 2, "moe_layers": [0, 1]}
    assert with_layers(sparse, 2, [1, 0, 1])["moe_layers"] == [0, 1, 2]


LLAMA4 = {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}


@pytest.mark.parametrize("told", [True, False])
def test_layers_of_llama4_keep_their_experts_and_their_positions(told: bool) -> None:
    config = Llama4TextConfig(**LLAMA4).to_dict()
    if not told:
        config = {key: value for key, value in config.items() if not isinstance(value, list)}
    found = AutoConfig.for_model(**with_layers(config, 4, [0, 1, 1, 2]))
    assert found.moe_layers == [1, 2] and found.no_rope_layers == [1, 0, 0, 1]
    assert [kind.split("_")[0] for kind in found.layer_types] == ["chunked", "full", "full", "chunked"]
    del config["attention_chunk_size"]  # without which all layers have one kind of attention
    config = {key: value for key, value in config.items() if not isinstance(value, list)}
    with pytest.raises(fb.InputError, match="layer 2 would be dense, but layer 1, which comes there, is sparse"):
        with_layers(config, 4, [0, 1, 1, 2])


def test_layers_of_gpt_neo_keep_their_kind_of_attention() -> None:
    config = GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]]).to_dict()
    for content in (config, {key: value for key, value in config.items() if key != "attention_layers"}):
        found = AutoConfig.for_model(**with_layers(content, 4, [0, 1, 1, 2, 3]))
        assert found.attention_layers == ["global", "local", "local", "global", "local"] and found.num_layers == 5


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
KINDS = {
    "qwen2": Qwen2Config(**SMALL, **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "gemma2": Gemma2Config(**SMALL, **SIZES, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SMALL, **SIZES, sliding_window=4, sliding_window_pattern=3),
    "modernbert": ModernBertConfig(**SMALL, hidden_size=8, global_attn_every_n_layers=3),
}


def untold(config: PretrainedConfig) -> tuple[dict, list[str]]:
    """A config as hubs have it, and what transformers makes of the numbers of its layers."""
    content = config.to_dict()
    return content, content.pop("layer_types")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("order", [[0, 1, 2, 0, 1, 2, 3], [3, 0]])
def test_layers_keep_the_kind_of_attention_that_transformers_tells_by_their_number(
    family: str, order: list[int]
) -> None:
    config, kinds = untold(KINDS[family])
    assert len(set(kinds)) == 2
    wanted = [kinds[i] for i in order]

    def found(content: dict) -> list[str]:
        return AutoConfig.for_model(**content).layer_types

    assert found(with_layers(config, 4, order)) == wanted
    told = {**config, "layer_types": kinds}
    for of, others in ((config, told), (told, config)):  # models of several slices
        assert found(with_layers(of, 4, order, [others] * len(order))) == wanted
    nested = with_layers({"text_config": config, "vision_config": {"num_hidden_layers": 2}}, 4, order)
    assert found(nested["text_config"]) == wanted and nested["vision_config"] == {"num_hidden_layers": 2}


def test_without_transformers_only_what_it_alone_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    config, _ = untold(KINDS["gemma2"])
    with pytest.raises(fb.InputError, match="no 'layer_types'.* pip install") as error:
        with_layers(config, 4, [0, 0])
    assert "\n" not in str(error.value)
    assert with_layers(config, 4, [0, 1, 2])["num_hidden_layers"] == 3  # of the numbers that they had
    for known in (
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False},
        {"model_type": "gemma2", "sliding_window": 4, "layer_types": ["a", "b"]},
    ):
        assert with_layers({"num_hidden_layers": 2, **known}, 2, [0, 1, 0])["num_hidden_layers"] == 3


def test_layers_are_listed_where_their_new_numbers_would_tell_others() -> None:
    config, _ = untold(Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=4))
    assert "layer_types" not in with_layers(config, 4, [0, 1, 0])
    config, kinds = untold(Gemma3TextConfig(**SMALL, **SIZES, sliding_window=4))  # the sixth would attend to all
    assert set(kinds) == {"sliding_attention"}
    assert with_layers(config, 4, [0, 1, 2, 3, 2, 3])["layer_types"] == kinds[:1] * 6
