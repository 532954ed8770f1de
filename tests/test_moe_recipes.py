"""Mixtures of experts by recipe: gates that can be checked by hand, what each layout predicts, every mistake's line."""

import json
from pathlib import Path

import pytest
import tiny_text
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

import fusionbench as fb
from fusionbench import routers
from fusionbench.checkpoint import Checkpoint
from fusionbench.cli import main
from fusionbench.recipes.moe import build_moe, read_moe
from fusionbench.routers import gates_of_prompts, states

SIZE = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, **HEADS),
    "tied": LlamaConfig(**SIZE, **HEADS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZE, **HEADS, sliding_window=4),
    "wide": MistralConfig(**SIZE, **HEADS, sliding_window=None),
    "qwen2": Qwen2Config(**SIZE, **HEADS),
    "qwen3": Qwen3Config(**SIZE, **HEADS, head_dim=8),
}
GOOD, BAD, FILM = 3, 4, 5  # tokens
PROMPTS = [["good film", "it is"], ["bad mail ?"], ["yes no yes no"]]


def write(folder: Path, config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    if config.model_type == "qwen2":  # transformers reads no other kind of tokenizer beside such a config
        vocabulary = {letter: i for i, letter in enumerate([*tiny_text.WORDS[:3], *"godbafilmst", "\u0120"])}
        Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    else:
        tiny_text.write_tokenizer(folder)
    return folder


def open_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(2, 15, (3, 9))).logits


@pytest.fixture
def llamas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, where we are, with models `base`, `a` and `b`."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, CONFIGS["llama"], seed)
    return tmp_path


def made(text: str, seed: int = 0) -> Checkpoint:
    Path("recipe.yaml").write_text(text)
    return build_moe(read_moe("recipe.yaml"), seed)


TWO = """
base_model: base
gate_mode: {mode}
experts:
  - source_model: a
    positive_prompts: [good film, bad]
    negative_prompts: [bad]
  - source_model: b
    positive_prompts: [film]
"""


def test_gates_from_embeddings_can_be_checked_by_hand(llamas: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("base")
    model.model.embed_tokens.weight.data = torch.eye(15, 16)
    model.save_pretrained("base")
    sparse = made(TWO.format(mode="cheap_embed"))
    expected = torch.zeros(2, 16)
    expected[0, [GOOD, FILM, BAD]] = torch.tensor([3**-0.5, 3**-0.5, 3**-0.5 - 1])  # the sum, of length 1, less "bad"
    expected[0] /= expected[0].norm()
    expected[1, FILM] = 1
    for layer in range(3):
        torch.testing.assert_close(sparse[f"model.layers.{layer}.block_sparse_moe.gate.weight"], expected)


@pytest.mark.parametrize(
    ("mode", "first"),
    [
        ("hidden", {FILM: 0.5, BAD: -0.5}),  # the mean of the last tokens, "film" and "bad", less "bad"
        ("hidden_avg", {GOOD: 0.25, FILM: 0.25, BAD: -0.5}),
    ],
)
def test_gates_from_hidden_states_can_be_checked_by_hand(llamas: Path, mode: str, first: dict[int, float]) -> None:
    model = AutoModelForCausalLM.from_pretrained("base")
    model.model.embed_tokens.weight.data = torch.eye(15, 16)
    for layer in model.model.layers[:1]:  # the first one changes nothing
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained("base")
    sparse = made(TWO.format(mode=mode))
    expected = torch.zeros(2, 16)
    expected[0, list(first)] = torch.tensor(list(first.values()))
    expected[0] /= expected[0].norm()
    expected[1, FILM] = 1
    for layer in range(2):
        torch.testing.assert_close(sparse[f"model.layers.{layer}.block_sparse_moe.gate.weight"], expected)
    assert not sparse["model.layers.2.block_sparse_moe.gate.weight"].allclose(expected, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "tied", "mistral", "qwen2", "qwen3"])
def test_states_are_those_of_the_whole_model_whatever_is_run_at_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "model", CONFIGS[family], 0)
    sequences = [[3, 4, 5, 6, 7, 8], [9], [2, 10, 11]]
    whole = [open_model(folder)(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in sequences]
    expected = torch.stack([torch.stack([layer[0, -1] for layer in states[:-1]]) for states in whole], 1)
    for tokens in (2**14, 7, 1):
        monkeypatch.setattr(routers, "TOKENS", tokens)
        found = states(Checkpoint.open(folder), sequences, lambda x: x[-1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_token_that_begins_texts_begins_prompts(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["llama"], 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    model = Checkpoint.open(folder)
    gate = gates_of_prompts(model, [["good"]], [[]], "cheap_embed")
    total = model["model.embed_tokens.weight"][[0, GOOD]].sum(0)
    torch.testing.assert_close(gate[1, 0], total / total.norm())


SAME = """
base_model: base
architecture: {architecture}
gate_mode: {mode}
experts_per_token: 2
experts:
  - {{source_model: base, positive_prompts: [good film], residual_scale: {scale}}}
  - {{source_model: base, positive_prompts: [bad mail], residual_scale: {scale}}}
  - {{source_model: base, positive_prompts: ["yes ?"], residual_scale: {scale}}}
"""


@pytest.mark.parametrize(
    ("family", "architecture", "found"),
    [
        ("llama", "mixtral", "mixtral"),
        ("tied", "Mixtral", "mixtral"),
        ("mistral", "mixtral", "mixtral"),
        ("llama", "deepseek", "glm4_moe"),
        ("tied", "DeepSeek MoE", "glm4_moe"),
        ("wide", "deepseek", "glm4_moe"),
        ("llama", "qwen", "qwen2_moe"),
        ("mistral", "Qwen MoE", "qwen2_moe"),
        ("qwen2", "qwen", "qwen2_moe"),
        ("qwen3", "qwen3", "qwen3_moe"),
    ],
)
@pytest.mark.parametrize("mode", ["hidden", "random"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # GLM-4's class where there is no shared expert
def test_of_equal_experts_it_predicts_what_the_dense_model_does(
    family: str, architecture: str, found: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = open_model(write(tmp_path / "base", CONFIGS[family], 0))
    sparse = made(SAME.format(architecture=architecture, mode=mode, scale=1))
    model = open_model(fb.save(sparse, tmp_path / "out"))
    assert (model.config.model_type, model.config.num_experts_per_tok) == (found, 2)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    cached, anew = (model.generate(torch.arange(2, 8)[None], max_new_tokens=6, use_cache=use) for use in (True, False))
    assert cached.equal(anew)
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)("good film")["input_ids"] for name in ("base", "out")]
    assert ids[0] == ids[1] and ids[0]


def test_deepseeks_shared_expert_adds_what_it_says(llamas: Path) -> None:
    """Half of what the model says from the experts, and half from the shared one."""
    text = SAME.format(architecture="", mode="hidden", scale=0.5).replace("architecture: \n", "")
    sparse = made(text + "shared_experts:\n  - {source_model: base, residual_scale: 0.5}\n")
    model = open_model(fb.save(sparse, llamas / "out"))
    assert model.config.model_type == "glm4_moe" and model.config.n_shared_experts == 1
    torch.testing.assert_close(logits(model), logits(open_model(llamas / "base")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_qwens_shared_expert_says_as_much_as_its_gate_lets_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = open_model(write(tmp_path / "base", CONFIGS[family], 0)).model.layers[1].mlp
    shared = open_model(write(tmp_path / "other", CONFIGS[family], 1)).model.layers[1].mlp
    text = SAME.format(architecture="qwen", mode="hidden", scale=1)
    sparse = made(text + "shared_experts:\n  - {source_model: other, positive_prompts: [is it]}\n")
    block = open_model(fb.save(sparse, tmp_path / "out")).model.layers[1].mlp
    gate = gates_of_prompts(Checkpoint.open("base"), [["is it"]], [[]], "hidden")[1]
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x), dense(x) + torch.sigmoid(x @ gate.T) * shared(x))


def test_experts_are_converted_scaled_and_rounded_once(llamas: Path) -> None:
    sparse = made(
        "base_model: base\ngate_mode: random\ndtype: bfloat16\nexperts:\n"
        "  - {source_model: a, residual_scale: 0.3}\n  - {source_model: b}\n"
    )
    a, b = Checkpoint.open("a"), Checkpoint.open("b")
    prefix, old = "model.layers.1.block_sparse_moe.experts", "model.layers.1.mlp"
    scaled = (a[f"{old}.down_proj.weight"].double() * 0.3).to(torch.bfloat16)
    assert sparse[f"{prefix}.0.w2.weight"].equal(scaled)
    assert sparse[f"{prefix}.0.w1.weight"].equal(a[f"{old}.gate_proj.weight"].bfloat16())
    assert sparse[f"{prefix}.1.w2.weight"].equal(b[f"{old}.down_proj.weight"].bfloat16())
    out = fb.save(sparse, llamas / "out")
    assert {tensor.dtype for tensor in Checkpoint.open(out).values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_noise_is_as_large_as_asked_and_the_same_again(llamas: Path) -> None:
    text = (
        "base_model: base\ngate_mode: random\nexperts:\n"
        "  - {source_model: a, noise_scale: 0.1, residual_scale: 2}\n  - {source_model: a, noise_scale: 0.1}\n"
    )
    sparse, again, other = made(text), made(text), made(text, seed=1)
    a = Checkpoint.open("a")

    def noise(model: Checkpoint, expert: int, matrix: str, old: str) -> torch.Tensor:
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.{matrix}.weight"
        assert model[name].equal(model[name])
        return model[name] / (2 if matrix == "w2" and expert == 0 else 1) - a[f"model.layers.0.mlp.{old}.weight"]

    for matrix, old in (("w1", "gate_proj"), ("w2", "down_proj")):
        first = noise(sparse, 0, matrix, old)
        assert first.std().item() == pytest.approx(0.1, rel=0.15) and abs(first.mean().item()) < 0.02
        assert first.equal(noise(again, 0, matrix, old))
        for unlike in (noise(sparse, 1, matrix, old), noise(other, 0, matrix, old)):
            assert abs(torch.corrcoef(torch.stack([first.flatten(), unlike.flatten()]))[0, 1].item()) < 0.2
    assert fb.save(sparse, llamas / "x", workers=1, memory="1MB").joinpath("model.safetensors").read_bytes() == (
        fb.save(again, llamas / "y", workers=2).joinpath("model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(("mode", "spread"), [("random", 1.0), ("uniform_random", 0.25 / 3**0.5)])
def test_random_gates_are_as_wide_as_mergekits(llamas: Path, mode: str, spread: float) -> None:
    text = f"base_model: base\ngate_mode: {mode}\nexperts:\n" + "  - source_model: a\n" * 20
    gates = [made(text, seed)[f"model.layers.{i}.block_sparse_moe.gate.weight"] for seed, i in ((0, 0), (0, 1), (1, 0))]
    assert not gates[0].equal(gates[1]) and not gates[0].equal(gates[2])
    for gate in gates:
        assert gate.shape == (20, 16) and gate.std().item() == pytest.approx(spread, rel=0.15)
    if mode == "uniform_random":
        assert max(gate.abs().max() for gate in gates) <= 0.25


def test_an_adapter_may_be_added_to_an_expert(llamas: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained("base")
    adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"]))
    tiny_text.near(adapted, 3)
    adapted.save_pretrained("adapter")
    sparse = made("base_model: base\ngate_mode: random\nexperts:\n  - source_model: a\n  - source_model: a+adapter\n")
    a, prefix = Checkpoint.open("a"), "model.layers.0.block_sparse_moe.experts"
    change = Checkpoint.open("adapter", base=a)["model.layers.0.mlp.up_proj.weight"]
    assert sparse[f"{prefix}.0.w3.weight"].equal(a["model.layers.0.mlp.up_proj.weight"])
    assert sparse[f"{prefix}.1.w3.weight"].equal(change) and not change.equal(sparse[f"{prefix}.0.w3.weight"])
    fb.save(sparse, "out")
    assert main(["verify", "out", "--inputs", "--samples", "100"]) == 0


def test_the_command_says_what_it_will_make_and_makes_it(llamas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(TWO.format(mode="hidden") + "experts_per_token: 1\n")
    assert main(["moe", "recipe.yaml", "out", "--dry-run"]) == 0
    # Embeddings, output, norms; three layers with attention, two norms, two experts of 3 * 16 * 24, and a router.
    total = 2 * 15 * 16 + 16 + 3 * (2 * 16 * 16 + 2 * 8 * 16 + 2 * 16 + 2 * 3 * 16 * 24 + 2 * 16)
    dry = capsys.readouterr().out
    assert f"MixtralForCausalLM: 2 experts, 1 for a token; {total:,} parameters" in dry
    assert f"{total - 3 * 3 * 16 * 24:,} of them active" in dry
    assert f"{4 * (total - 3 * 2 * 16):,} bytes to read, {4 * total:,} to write" in dry
    assert not Path("out").exists()
    assert main(["moe", "recipe.yaml", "out", "--workers", "1", "--memory", "1MB"]) == 0
    assert sum(spec.nbytes for spec in Checkpoint.open("out").specs.values()) == 4 * total
    assert logits(open_model(Path("out"))).shape == (3, 9, 15)
    card = Path("out/README.md").read_text()
    assert "fusionbench moe recipe.yaml OUT" in card and "    negative_prompts: [bad]" in card and "`moe`" in card
    assert main(["moe", "recipe.yaml", "out"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["moe", "recipe.yaml", "out", "--overwrite"]) == 0


def test_what_was_made_can_be_made_again(llamas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(TWO.format(mode="hidden") + "dtype: bfloat16\n")
    assert main(["moe", "recipe.yaml", "out"]) == 0
    assert main(["verify", "out", "--inputs", "--samples", "100"]) == 0
    assert "42 tensors are what they were when they were written, and the recipe gives 42" in capsys.readouterr().out
    write(llamas / "a", CONFIGS["llama"], 7)
    assert main(["verify", "out", "--inputs", "--samples", "100"]) == 1
    assert (
        "'model.layers.2.block_sparse_moe.experts.0.w1.weight' is not what the recipe gives" in capsys.readouterr().out
    )


def test_a_recipes_models_may_lie_beside_it(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.yaml").write_text(TWO.format(mode="random"))
    (llamas / "elsewhere").mkdir()
    monkeypatch.chdir(llamas / "elsewhere")
    assert read_moe(llamas / "recipe.yaml").models.keys() == {"base", "a", "b"}


BASE = "base_model: base\ngate_mode: random\n"
TWO_EXPERTS = "experts: [{source_model: a, positive_prompts: [x]}, {source_model: b, positive_prompts: [y]}]"
# What is wrong is in the line with the #.
MISTAKES = {
    "takes no 'gate_mod'. Did you mean 'gate_mode'?": "base_model: base\ngate_mod: random #\n" + TWO_EXPERTS,
    "gate_mode cannot be 'hiden'. Did you mean 'hidden'?": ("base_model: base\ngate_mode: hiden #\n" + TWO_EXPERTS),
    "an expert takes no 'positive_prompt'. Did you mean 'positive_prompts'?": (
        BASE + "experts:\n - source_model: a\n   positive_prompts: [x]\n   positive_prompt: [x] #\n - source_model: b"
    ),
    "the recipe has no 'base_model'": "dtype: float32 #\n" + TWO_EXPERTS,
    "the recipe has no 'experts'": "base_model: base #\ngate_mode: random",
    "experts needs at least 1 entry": "base_model: base\nexperts: [] #",
    "an expert has no 'source_model'": BASE + "experts:\n - positive_prompts: [x] #\n - source_model: a",
    "this expert has no positive_prompts, from which its gate is made": (
        "base_model: base\nexperts_per_token: 1\nexperts:\n - source_model: a #"
    ),
    "all experts have the same prompts": (
        "base_model: base\nexperts: \n - {source_model: a, positive_prompts: [x]} #\n"
        " - {source_model: b, positive_prompts: [x]}"
    ),
    "positive_prompts must be a list; got 'x'": (
        "base_model: base\nexperts_per_token: 1\nexperts:\n - source_model: a\n   positive_prompts: x #\n"
    ),
    "experts_per_token is 3, but there are 2 experts": (BASE + "experts_per_token: 3 #\n" + TWO_EXPERTS),
    "experts_per_token must be in [1, inf)": (BASE + "experts_per_token: 0 #\n" + TWO_EXPERTS),
    "residual_scale must be a number; got 'lots'": (
        BASE + "experts:\n - source_model: a\n   residual_scale: lots #\n - source_model: b"
    ),
    "noise_scale must be in [0, inf)": (
        BASE + "experts:\n - source_model: a\n   noise_scale: -1 #\n - source_model: b"
    ),
    "dtype cannot be 'bf16'. Did you mean 'bfloat16'?": (BASE + "dtype: bf16 #\n" + TWO_EXPERTS),
    "'c' does not exist": (BASE + "experts:\n - source_model: a\n - source_model: c #"),
    "'qwen' is of the type 'qwen2', but 'llama' is the base model's": (
        BASE + "experts:\n - source_model: a\n - source_model: qwen #"
    ),
    "'big': 'model.layers.0.mlp.down_proj.weight' is (16, 32), but (16, 24) in the base model": (
        BASE + "experts:\n - source_model: a\n - source_model: big #"
    ),
    "'long' has 'model.layers.3.mlp.down_proj.weight', which the base model lacks": (
        BASE + "experts:\n - source_model: a\n - source_model: long #"
    ),
    "'qwen3' cannot be made of models of the type 'llama'. There is: mixtral, deepseek, qwen": (
        BASE + "architecture: qwen3 #\n" + TWO_EXPERTS
    ),
    "For models of the type 'gpt2' there is no sparse class": (
        "base_model: gpt2/base #\ngate_mode: random\nexperts: [{source_model: gpt2/base}, {source_model: gpt2/base}]"
    ),
    "'mixtral' has no place for an expert that every token gets. There is: deepseek, qwen": (
        BASE + "architecture: mixtral #\n"
        "experts: [{source_model: a}, {source_model: b}]\nshared_experts: [{source_model: a}]"
    ),
    "'deepseek' has no place for an expert that every token gets, with a gate. There is: qwen": (
        BASE + "architecture: deepseek #\n" + TWO_EXPERTS + "\n"
        "shared_experts: [{source_model: a, positive_prompts: [x]}]"
    ),
    "there can be one shared expert": (
        BASE + "experts: [{source_model: a}, {source_model: b}]\nshared_experts:\n"
        " - source_model: a\n - source_model: b #"
    ),
    "this shared expert has no positive_prompts, from which its gate in 'qwen' is made": (
        "base_model: base\narchitecture: qwen\nexperts:\n - {source_model: a, positive_prompts: [x]}\n"
        " - {source_model: b, positive_prompts: [y]}\nshared_experts:\n - source_model: b #"
    ),
    "'deepseek' needs at least 2 experts, and there is 1 expert": (
        BASE + "architecture: deepseek #\nexperts_per_token: 1\nexperts: [{source_model: a}]"
    ),
    "attends to 4 tokens (sliding_window), which has no place in a Glm4MoeForCausalLM": (
        "base_model: windowed\ngate_mode: random\narchitecture: deepseek #\n"
        "experts: [{source_model: windowed}, {source_model: windowed}]"
    ),
    "_proj.bias' has no place in a MixtralForCausalLM": (
        "base_model: biased #\ngate_mode: random\nexperts: [{source_model: biased}, {source_model: biased}]"
    ),
    "'base_model' is given twice; line 1 has it already": (
        "base_model: base\nbase_model: a #\ngate_mode: random\n" + TWO_EXPERTS
    ),
    "'coded' is quantised (bitsandbytes), and such numbers cannot be merged: name the model that it was made of": (
        BASE + "experts:\n - source_model: a\n - source_model: coded #"
    ),
    "'headless' has no MLPs under model.layers.N.mlp, but '": (
        "base_model: headless #\ngate_mode: random\nexperts: [{source_model: headless}, {source_model: headless}]\n"
    ),
    "a recipe of a mixture of experts is one document": (
        BASE + "experts: [{source_model: a}, {source_model: b}]\n---\nbase_model: a #"
    ),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("base", "a", "b")):
        write(folder / name, CONFIGS["llama"], seed)
    write(folder / "qwen", CONFIGS["qwen2"], 0)
    write(folder / "big", LlamaConfig(**{**SIZE, "intermediate_size": 32}, **HEADS), 0)
    write(folder / "long", LlamaConfig(**{**SIZE, "num_hidden_layers": 4}, **HEADS), 0)
    write(folder / "windowed", CONFIGS["mistral"], 0)
    open_model(folder / "base").get_decoder().save_pretrained(folder / "headless")
    write(folder / "biased", LlamaConfig(**SIZE, **HEADS, attention_bias=True), 0)
    tiny_text.write_gpt2_zoo(folder / "gpt2")
    config = json.loads((write(folder / "coded", CONFIGS["llama"], 0) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "coded" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("message", MISTAKES)
def test_what_is_wrong_is_told_with_its_line(
    message: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(zoo)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MISTAKES[message])
    line = 1 + [i for i, line in enumerate(MISTAKES[message].splitlines()) if "#" in line][0]
    assert main(["moe", str(recipe), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{recipe}:{line}: " in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_everything_that_is_wrong_is_told_at_once(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(zoo)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base_model: base\ngate_mode: hidden\ndtype: half\nexperts:\n - source_model: c\n - source_model: qwen\n"
        "   positive_prompts: [x]\n   residual_scale: no\n"
    )
    assert main(["moe", str(recipe), str(tmp_path / "out")]) == 2
    lines = [line.partition(f"{recipe}:")[2][0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["3", "5", "5", "6", "8"]


def test_what_can_hardly_work_is_warned_of(llamas: Path, caplog: pytest.LogCaptureFixture) -> None:
    made("base_model: base\ngate_mode: random\nexperts:\n  - source_model: a\n  - source_model: a\n")
    assert "All experts are the same model" in caplog.text
    caplog.clear()
    made(
        "base_model: base\nexperts:\n  - {source_model: a, positive_prompts: [good film, is]}\n"
        "  - {source_model: b, positive_prompts: [film, is]}\n"
    )
    assert "will hardly choose one of them" in caplog.text and "All experts" not in caplog.text
