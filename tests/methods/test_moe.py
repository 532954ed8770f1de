import json
from pathlib import Path

import pytest
import tiny_text
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import fusionbench as fb
from fusionbench.cli import main

SIZE = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, **HEADS),
    "tied": LlamaConfig(**SIZE, **HEADS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZE, **HEADS, sliding_window=4),
    "qwen2": Qwen2Config(**SIZE, **HEADS),
    "qwen2, a window in some layers": Qwen2Config(**SIZE, **HEADS, **WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZE, **HEADS, head_dim=8),
    "qwen3, a window in no layer": Qwen3Config(**SIZE, **HEADS, **WINDOW, head_dim=8, max_window_layers=3),
    "qwen3, a window in all": Qwen3Config(**SIZE, **HEADS, **WINDOW, head_dim=8, max_window_layers=0),
}


def write(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_text.write_tokenizer(folder)
    return folder


@pytest.fixture(params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "dense", CONFIGS[request.param], 0)


def open_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(2, 15, (3, 9))).logits


def test_before_training_it_predicts_what_the_dense_model_does(dense: Path, tmp_path: Path) -> None:
    sparse = fb.algorithm("moe_upscaling", experts=5, experts_per_token=3).run(fb.ModelPool({"a": dense}))
    model = open_model(fb.save(sparse, tmp_path / "sparse"))
    torch.testing.assert_close(logits(model), logits(open_model(dense)))
    assert model.config.num_experts_per_tok == 3
    routers = [tensor for name, tensor in sparse.items() if name.endswith((".mlp.gate.weight", "moe.gate.weight"))]
    assert [router.shape for router in routers] == [(5, 16)] * 3 and not routers[0].equal(routers[1])
    cached, anew = (model.generate(torch.arange(2, 8)[None], max_new_tokens=6, use_cache=use) for use in (True, False))
    assert cached.equal(anew)


def test_a_config_that_leaves_out_defaults_keeps_those_of_the_dense_class(tmp_path: Path) -> None:
    """Mixtral's defaults are others than Llama's: of the rotary embedding, and of the norms."""
    write(tmp_path / "dense", CONFIGS["llama"], 0)
    file = tmp_path / "dense" / "config.json"
    config = json.loads(file.read_text())
    for name in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "head_dim"):
        config.pop(name, None)
    file.write_text(json.dumps(config))
    fb.save(fb.methods.moe_upscaling(fb.ModelPool({"a": tmp_path / "dense"})), tmp_path / "sparse")
    torch.testing.assert_close(logits(open_model(tmp_path / "sparse")), logits(open_model(tmp_path / "dense")))


@pytest.fixture
def pool(tmp_path: Path) -> fb.ModelPool:
    config = CONFIGS["qwen3"]
    folders = [write(tmp_path / name, config, i) for i, name in enumerate(("base", "a", "b", "c"))]
    return fb.ModelPool({f.name: f for f in folders[1:]}, folders[0], architecture=architecture("causal_lm"))


def architecture(name: str):
    from fusionbench.architectures import get_architecture

    return get_architecture(name)


def test_a_sparse_model_is_transformers_to_build(pool: fb.ModelPool) -> None:
    with pytest.raises(fb.InputError, match="'qwen3_moe' is not built here: save it"):
        pool.build(fb.methods.moe_merging(pool))


@pytest.mark.parametrize("others", ["base", "average"])
def test_experts_are_the_models_mlps_and_the_rest_is_asked_for(pool: fb.ModelPool, others: str) -> None:
    sparse = fb.methods.moe_merging(pool, others=others)
    for i, model in enumerate(pool.values()):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            found = sparse[f"model.layers.1.mlp.experts.{i}.{matrix}.weight"]
            assert found.equal(model[f"model.layers.1.mlp.{matrix}.weight"])
    name = "model.layers.2.self_attn.q_proj.weight"
    models = torch.stack([model[name] for model in pool.values()])
    torch.testing.assert_close(sparse[name], pool.require_base()[name] if others == "base" else models.mean(0))


def test_of_equal_models_it_is_the_model(pool: fb.ModelPool, tmp_path: Path) -> None:
    same = fb.ModelPool({name: pool["a"] for name in "xyz"}, pool["a"])
    model = open_model(fb.save(fb.methods.moe_merging(same), tmp_path / "sparse"))
    torch.testing.assert_close(logits(model), logits(pool.build("a")))


def test_routers_from_prompts_choose_the_prompts_own_expert(pool: fb.ModelPool, tmp_path: Path) -> None:
    prompts = {"a": ["good film", "film"], "b": ["bad mail ?"], "c": ["yes no"]}
    sparse = fb.methods.moe_merging(pool, prompts=prompts, experts_per_token=1)
    base, states = pool.build(pool.require_base()), []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: states.append(args[0][0].mean(0)))
    tokenizer = tiny_text.PreTrainedTokenizerFast.from_pretrained(tmp_path / "base")
    for text in ("good film", "bad mail ?", "yes no"):
        base(tokenizer(text, return_tensors="pt")["input_ids"])
    chosen = (torch.stack(states) @ sparse["model.layers.0.mlp.gate.weight"].T).argmax(1)
    assert chosen.tolist() == [0, 1, 2]
    assert open_model(fb.save(sparse, tmp_path / "sparse")).config.num_experts_per_tok == 1


def test_what_cannot_be_is_one_line(pool: fb.ModelPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "biased", LlamaConfig(**SIZE, **HEADS, attention_bias=True), 0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_decoder().save_pretrained(tmp_path / "headless")
    tiny_text.write_gpt2_zoo(tmp_path / "gpt2")
    write(tmp_path / "windows", Qwen3Config(**SIZE, **HEADS, **WINDOW, head_dim=8, max_window_layers=1), 0)
    (tmp_path / "windows.yaml").write_text("models: {a: windows}\n")
    (tmp_path / "headless.yaml").write_text("models: {a: headless}\n")
    (tmp_path / "qwen3.yaml").write_text("base: base\nmodels: {a: a, b: b}\n")
    (tmp_path / "biased.yaml").write_text("models: {a: biased}\n")
    for words, message in (
        (f"moe_upscaling modelpool={tmp_path}/gpt2/pool.yaml", "of the type 'gpt2' there is no sparse class"),
        (f"moe_upscaling modelpool={tmp_path}/biased.yaml", "_proj.bias' has no place in a MixtralForCausalLM"),
        (f"moe_upscaling modelpool={tmp_path}/windows.yaml", "(sliding_window) in some layers only"),
        (f"moe_upscaling modelpool={tmp_path}/headless.yaml", "has no MLPs under model.layers.N.mlp, but '"),
        (f"moe_upscaling method.experts=2 method.experts_per_token=3 modelpool={tmp_path}/qwen3.yaml", "are 2 experts"),
        (f"moe_merging modelpool={tmp_path}/qwen3.yaml method.prompts={{a:[x]}}", "no texts for the model 'b'"),
        (f"moe_merging modelpool={tmp_path}/qwen3.yaml method.prompts={{d:[x]}}", "has no model 'd'"),
        (f"moe_merging modelpool={tmp_path}/biased.yaml", "needs the base model"),
    ):
        capsys.readouterr()
        assert main(["run", *f"method={words} out={tmp_path}/out".split()]) == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
