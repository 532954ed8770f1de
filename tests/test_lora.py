"""LoRA adapters: what PEFT makes of them is what we read, and merging them is exact."""

import json

import pytest
import tiny_clip
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, jvp
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fusionbench as fb
from fusionbench.architectures import get_architecture
from fusionbench.cli import main
from fusionbench.errors import InputError
from fusionbench.lora import Adapter, combine


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, **more)
    return LlamaForCausalLM(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)


def adapter(model: nn.Module, folder, seed: int = 1, **options) -> nn.Module:
    """Save an adapter with random factors, and return the model that PEFT makes of it."""
    transposed = isinstance(model, GPT2LMHeadModel) and options["target_modules"] != ["wte"]
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=transposed, **options))
    torch.manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return peft.merge_and_unload()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
        (gpt2, {"target_modules": ["wte"]}),
        (gpt2, {"target_modules": ["c_attn"], "use_rslora": True}),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
        (t5, {"target_modules": ["q", "v"]}),
        (t5, {"target_modules": ["q", "wi"], "rank_pattern": {"wi": 7}, "alpha_pattern": {"q": 3}}),
        (Convolutions, {"target_modules": ["first", "second"], "bias": "lora_only"}),
    ],
)
def test_an_adapter_on_its_base_is_what_peft_merges(make, options, tmp_path):
    base = fb.Checkpoint.of(make().state_dict())
    merged = adapter(make(), tmp_path / "adapter", **options).state_dict()
    opened = fb.Checkpoint.open(tmp_path / "adapter", base=base)
    assert set(opened) == set(merged)
    changed = [name for name in base if not torch.equal(merged[name], base[name])]
    assert changed
    for name in opened:
        torch.testing.assert_close(opened[name], merged[name], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of ties, and of embeddings that it saves
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_embeddings_and_output_layers_are_those_of_the_model_that_was_trained(options, tied, tmp_path):
    """What is saved and opened by transformers computes what the adapter on its base does, whether they were tied."""
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    peft = get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(r=2, **options)).eval()
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "adapter").eval()
    pool = fb.ModelPool({"a": fb.Checkpoint.open(tmp_path / "adapter", base=fb.Checkpoint.open(tmp_path / "base"))})
    fb.save(fb.methods.passthrough(pool), tmp_path / "out")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(ours(tokens).logits, loaded(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_base_is_found_where_the_adapter_says(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    merged = adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"]).state_dict()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for named in (str(tmp_path / "base"), "../base"):
        config["base_model_name_or_path"] = named
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        name = "transformer.h.0.attn.c_attn.weight"
        torch.testing.assert_close(fb.Checkpoint.open(tmp_path / "adapter")[name], merged[name])


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("openai/base", False),
        ("base", False),
        ("../base/", False),
        ("/cache/models--openai--base/snapshots/0123abc", False),
        (None, False),
        ("openai/other", True),
        ("/cache/models--openai--other/snapshots/base", True),
    ],
)
def test_a_base_of_another_name_than_the_adapters_own_is_told(named, told, tmp_path, caplog):
    gpt2().save_pretrained(tmp_path / "base")
    adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"])
    _edit(tmp_path / "adapter", base_model_name_or_path=named)
    for base in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        caplog.clear()
        fb.ModelPool({"a": tmp_path / "adapter"}, base=base).load()
        line = f"'{tmp_path / 'adapter'}' was trained on '{named}', and is put on '{base}': that must be the same model"
        assert [record.getMessage() for record in caplog.records] == [f"{line} under another name."] * told


def test_an_adapter_on_bfloat16_is_not_rounded(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in gpt2().state_dict().items()}
    adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"])
    opened = fb.Checkpoint.open(tmp_path / "adapter", base=fb.Checkpoint.of(tensors))
    name = "transformer.h.0.attn.c_attn.weight"
    b, a = Adapter.open(tmp_path / "adapter").matrices("transformer.h.0.attn.c_attn")
    assert opened.specs[name].dtype == "F32"
    torch.testing.assert_close(opened[name], tensors[name].float() + (b @ a).T.float(), rtol=1e-7, atol=1e-8)


def test_any_part_of_a_weight_reads_as_in_the_whole(tmp_path):
    base = fb.Checkpoint.of(gpt2().state_dict())
    adapter(gpt2(), tmp_path / "adapter", target_modules=["c_fc"])
    opened = fb.Checkpoint.open(tmp_path / "adapter", base=base)
    whole = opened["transformer.h.1.mlp.c_fc.weight"].reshape(-1)
    for start, stop in ((0, 1), (5, 64), (63, 65), (1000, 1024)):
        assert torch.equal(opened.read("transformer.h.1.mlp.c_fc.weight", start, stop), whole[start:stop])


def test_a_pool_takes_adapters_with_no_special_case(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    merged = [adapter(gpt2(), tmp_path / str(seed), seed, target_modules=["c_attn"]).state_dict() for seed in (1, 2)]
    pool = fb.ModelPool({str(seed): tmp_path / str(seed) for seed in (1, 2)}, tmp_path / "base")
    average = fb.methods.simple_average(pool)
    for name in average:
        torch.testing.assert_close(average[name], (merged[0][name] + merged[1][name]) / 2)
    fb.save(average, tmp_path / "merged")
    assert fb.Checkpoint.open(tmp_path / "merged").digest == average.digest


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    prefix = f"base_model.model.{module}.lora_"
    return tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()


def sum_of(products) -> torch.Tensor:
    return torch.stack(list(products)).sum(0)


def test_stacked_adapters_are_exactly_the_weighted_sum(tmp_path):
    model = t5()
    for seed in (1, 2, 3):
        adapter(t5(), tmp_path / str(seed), seed, target_modules=["q", "wi"])
    adapters = [Adapter.open(tmp_path / str(seed)) for seed in (1, 2, 3)]
    combined = combine(adapters, [0.5, -0.3, 1.0])
    assert set(combined.errors.values()) == {0.0}
    for module in adapters[0].changes:
        exact = sum_of(
            w * b @ a for w, (b, a) in zip([0.5, -0.3, 1.0], (x.matrices(module) for x in adapters), strict=True)
        )
        assert torch.allclose(product(combined.tensors, module), exact, atol=1e-7)
    combined.save(tmp_path / "combined")
    merged = PeftModel.from_pretrained(model, tmp_path / "combined").merge_and_unload().state_dict()
    ours = fb.Checkpoint.open(
        tmp_path / "combined",
        base=fb.Checkpoint.of(t5().state_dict()),
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


def test_cut_to_a_rank_they_are_the_nearest_of_that_rank_and_say_how_near(tmp_path):
    for seed in (1, 2):
        adapter(t5(), tmp_path / str(seed), seed, target_modules=["q"])
    adapters = [Adapter.open(tmp_path / str(seed)) for seed in (1, 2)]
    combined = combine(adapters, [1.0, 1.0], rank=3)
    for module, error in combined.errors.items():
        exact = sum_of(b @ a for b, a in (x.matrices(module) for x in adapters))
        u, s, v = torch.linalg.svd(exact)
        best = u[:, :3] * s[:3] @ v[:3]
        torch.testing.assert_close(product(combined.tensors, module), best, rtol=1e-5, atol=1e-6)
        assert error == pytest.approx(float((exact - best).norm() / exact.norm()), rel=1e-5)
        assert error > 0.1


def test_adapters_of_different_layers_merge_into_one_that_peft_loads(tmp_path):
    for layer in (0, 1):
        adapter(gpt2(), tmp_path / str(layer), 1, target_modules=["c_attn"], layers_to_transform=[layer])
    combine([Adapter.open(tmp_path / str(layer)) for layer in (0, 1)], [1.0, 1.0]).save(tmp_path / "both")
    merged = PeftModel.from_pretrained(gpt2(), tmp_path / "both").merge_and_unload().state_dict()
    ours = fb.Checkpoint.open(tmp_path / "both", base=fb.Checkpoint.of(gpt2().state_dict()))
    for layer in (0, 1):
        name = f"transformer.h.{layer}.attn.c_attn.weight"
        assert not torch.equal(ours[name], gpt2().state_dict()[name])
        torch.testing.assert_close(ours[name], merged[name], rtol=1e-6, atol=1e-6)


def test_merging_the_factors_apart_would_be_wrong_by_about_everything(tmp_path):
    """What others do: sqrt(w) on each factor, then B and A added apart. It shows that the tests above can fail."""
    torch.manual_seed(0)
    b1, b2 = torch.randn(2, 64, 8)
    a1, a2 = torch.randn(2, 8, 64)
    exact = b1 @ a1 + b2 @ a2
    assert ((b1 + b2) @ (a1 + a2) - exact).norm() / exact.norm() > 0.9


def test_an_adapter_cut_to_its_own_rank_is_itself(tmp_path):
    adapter(t5(), tmp_path / "a", target_modules=["q"])
    one = Adapter.open(tmp_path / "a")
    combined = combine([one], rank=4)
    for module in one.changes:
        b, a = one.matrices(module)
        torch.testing.assert_close(product(combined.tensors, module), b @ a, rtol=1e-5, atol=1e-7)
        assert combined.errors[module] < 1e-6


def _edit(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _edit(f, peft_type="IA3"), "IA3"),
        (lambda f: _edit(f, init_lora_weights="pissa_niter_4"), "pissa_niter_4, which also changes the base"),
        (lambda f: _edit(f, init_lora_weights="olora"), "olora, which also changes the base"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), "has no tensor of an adapter in its file"),
        (lambda f: _reshape(f, ()), "not two matrices"),
        (lambda f: _reshape(f, (0, 16)), "not two matrices"),
        (lambda f: _edit(f, use_dora=True), "use_dora"),
        (lambda f: _edit(f, lora_alpha="lots"), "no number for lora_alpha, but 'lots'"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (lambda f: _truncate(f / "adapter_model.safetensors"), "is truncated"),
        (lambda f: _edit(f, r=3), "rank 4, but adapter_config.json says 3"),
        (lambda f: _edit(f, fan_in_fan_out=False), "It looks transposed"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: _rename(f, "c_attn", "c_atn"), "Did you mean 'transformer.h.0.attn.c_attn.weight'"),
        (lambda f: _rename(f, "lora_A.weight", "lora_magnitude_vector"), "form of LoRA that is not supported"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(spoil, message, tmp_path):
    base = fb.Checkpoint.of(gpt2().state_dict())
    adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"])
    spoil(tmp_path / "adapter")
    with pytest.raises(InputError, match=message) as error:
        fb.Checkpoint.open(tmp_path / "adapter", base=base)
    assert "\n" not in str(error.value)


def _reshape(folder, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if ".lora_A." in name)
    save_file({**tensors, name: torch.zeros(shape)}, folder / "adapter_model.safetensors")


def _truncate(file) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _rename(folder, old: str, new: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): t for name, t in tensors.items()}, folder / "adapter_model.safetensors")


def test_a_missing_base_is_named(tmp_path):
    adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"])
    _edit(tmp_path / "adapter", base_model_name_or_path="nowhere/gpt2")
    with pytest.raises(InputError, match="nowhere/gpt2"):
        fb.Checkpoint.open(tmp_path / "adapter")
    _edit(tmp_path / "adapter", base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base model"):
        fb.Checkpoint.open(tmp_path / "adapter")


def test_adapters_that_bring_whole_tensors_are_not_combined(tmp_path):
    adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"], modules_to_save=["ln_f"])
    with pytest.raises(InputError, match="on their base"):
        combine([Adapter.open(tmp_path / "adapter")])


@pytest.mark.parametrize(
    "damage",
    [{"rank_pattern": 5}, {"alpha_pattern": {"(": 5}}, {"rank_pattern": ["q"]}],
    ids=lambda damage: str(damage),
)
def test_patterns_that_are_none_are_one_line(damage, tmp_path):
    adapter(gpt2(), tmp_path / "a", target_modules=["c_attn"])
    _edit(tmp_path / "a", **damage)
    with pytest.raises(InputError, match=f"no table of numbers by regular expression for {next(iter(damage))}"):
        Adapter.open(tmp_path / "a")


def test_adapters_of_different_bases_and_numbers_that_overflow_are_not_combined(tmp_path):
    adapter(gpt2(), tmp_path / "a", target_modules=["attn.c_proj"])
    adapter(t5(), tmp_path / "b", target_modules=["q"])
    _edit(tmp_path / "b", base_model_name_or_path="another")
    adapters = [Adapter.open(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(InputError, match="change no module both, and are of the bases '.*' and 'another'"):
        combine(adapters)
    with pytest.raises(InputError, match="is too large with these weights"):
        combine(adapters[:1] * 2, [1e308, 1e308])


def test_adapters_of_which_one_is_transposed_are_not_of_one_base(tmp_path):
    for name in ("a", "b"):
        adapter(gpt2(), tmp_path / name, target_modules=["attn.c_proj"])
    _edit(tmp_path / "b", fan_in_fan_out=False)  # as square as it is, no shape tells
    with pytest.raises(InputError, match="they are not of one base"):
        combine([Adapter.open(tmp_path / name) for name in ("a", "b")])


def test_the_command_line_merges_adapters(tmp_path, capsys):
    for seed in (1, 2):
        adapter(t5(), tmp_path / str(seed), seed, target_modules=["q"])
    words = ["lora", "merge", str(tmp_path / "1"), str(tmp_path / "2"), "-o"]
    assert main([*words, str(tmp_path / "exact"), "--weights", "1", "-0.5"]) == 0
    assert "rank 8: nothing is left out" in capsys.readouterr().out.replace("\n", " ")
    report = ["--report", str(tmp_path / "report.json")]
    assert main([*words, str(tmp_path / "cut"), "--rank", "2", *report]) == 0
    out = capsys.readouterr().out
    assert "% of the change of" in out
    modules = json.loads((tmp_path / "report.json").read_text())["modules"]
    for name, error in combine([Adapter.open(tmp_path / name) for name in "12"], rank=2).errors.items():
        assert modules[name] == {"rank": 2, "error": error}
        assert f"{error:.3g}" in out
    expected = combine([Adapter.open(tmp_path / name) for name in "12"], [1, -0.5]).tensors
    written = load_file(tmp_path / "exact" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "1"], "1 weights are given for 2 adapters"),
        (["--rank", "0"], "rank must be 1 or more"),
        (["--weights", "1", "nan"], "must be a finite number; got nan"),
        (["1/adapter_config.json"], "is no LoRA adapter"),
        (["3"], "does not exist"),
    ],
)
def test_mistakes_on_the_command_line_write_nothing(more, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        adapter(t5(), tmp_path / str(seed), seed, target_modules=["q"])
    assert main(["lora", "merge", "1", "2", *more, "-o", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main(["lora", "merge", "1", "2", "-o", "out"]) == 2


class Linearised(nn.Module):
    """A layer as its own tangent where training began (Tang et al., 2024): what the reference implementation trains."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.model = layer
        self.names = [name for name, _ in layer.named_parameters()]
        self.params0_values = nn.ParameterList([p.detach().clone() for p in layer.parameters()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at, now = tuple(self.params0_values), tuple(self.model.parameters())

        def run(*parameters: torch.Tensor) -> torch.Tensor:
            return functional_call(self.model, dict(zip(self.names, parameters, strict=True)), x)

        value, change = jvp(run, at, tuple(b - a for a, b in zip(at, now, strict=True)))
        return value + change


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp
@pytest.mark.parametrize("began", ["at zero, as PEFT begins", "anywhere"])
def test_a_linearised_adapter_is_the_tangent_it_was_trained_as(began, tmp_path):
    clip = tiny_clip.write_clip(tmp_path / "clip").eval()
    tower, pictures = clip.vision_model, torch.randn(3, 3, 16, 16)
    peft = get_peft_model(tower, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    if began == "anywhere":
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    saved = {}
    for path, layer in [(p, m) for p, m in peft.named_modules() if isinstance(m, LoraLayer)]:
        linearised = Linearised(layer)
        for i, (name, parameter) in enumerate(layer.named_parameters()):
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
                saved[f"{path}.model.{name}"] = parameter.detach().clone()
                saved[f"{path}.params0_values.{i}"] = linearised.params0_values[i].detach().clone()
        peft.set_submodule(path, linearised)
    assert all(name.startswith("base_model.model.encoder.layers.") for name in saved)  # no word of which tower
    folder = tmp_path / "adapter"
    peft.peft_config["default"].save_pretrained(folder)
    save_file(saved, folder / "linearized_adapter_model.safetensors")
    pool = fb.ModelPool({"a": folder}, tmp_path / "clip", architecture=get_architecture("clip_vision"))
    with torch.no_grad():
        torch.testing.assert_close(pool.build("a")(pictures)[1], peft(pictures)[1], rtol=1e-4, atol=1e-5)
    combined = combine([Adapter.open(folder), Adapter.open(folder)], [0.5, 0.5])
    combined.save(tmp_path / "both")
    again = fb.ModelPool({"a": tmp_path / "both"}, tmp_path / "clip", architecture=get_architecture("clip_vision"))
    for name in again["a"]:
        torch.testing.assert_close(again["a"][name], pool["a"][name], rtol=1e-5, atol=1e-6)


def test_a_linearised_adapter_that_lost_its_beginning_is_one_line(tmp_path):
    peft = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    names = {n.replace(".lora_", ".model.lora_"): p.detach() for n, p in peft.named_parameters() if "lora_" in n}
    peft.peft_config["default"].save_pretrained(tmp_path)
    save_file(names, tmp_path / "linearized_adapter_model.safetensors")
    with pytest.raises(InputError, match="does not say where its A and B began"):
        Adapter.open(tmp_path)
