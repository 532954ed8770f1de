"""Weight matching: permutations change nothing, are found again, and bring models nearer to each other."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scenes import LAYERS, WIDTH
from tiny_text import write_gpt2_zoo
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fusionbench as fb
from fusionbench import alignment
from fusionbench.alignment import Group, Symmetries, distance, permuted, symmetries_of
from fusionbench.architectures import get_architecture
from fusionbench.architectures import gpt2 as gpt2_family
from fusionbench.architectures._dilated_resnet import DilatedResNet
from fusionbench.cli import main
from fusionbench.verify import compare_with_recipe

Outputs = Callable[[nn.Module], torch.Tensor]
TOKENS = torch.tensor([[1, 5, 3, 9, 2], [4, 4, 7, 0, 8]])
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5))


def convolutions() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    more = (nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.Tanh())
    return nn.Sequential(first, *more, nn.Softmax(-1), nn.Linear(7, 5))


def resnet(layer_type: str) -> nn.Module:
    sizes = {"embedding_size": 6, "hidden_sizes": [12, 20], "depths": [2, 2], "num_labels": 5}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type=layer_type))


def llama(**more: object) -> nn.Module:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=11, attention_bias=True, **more)
    return LlamaForCausalLM(config)


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, vocab_size=11))


def gpt2(model: type[nn.Module]) -> nn.Module:
    return model(GPT2Config(vocab_size=11, n_positions=8, n_embd=24, n_layer=2, n_head=4))


def bert(model: type[nn.Module]) -> nn.Module:
    return model(BertConfig(**SMALL, vocab_size=11, max_position_embeddings=8))


def clip_vision() -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=32, patch_size=16))


def clip() -> nn.Module:
    text = {**SMALL, "vocab_size": 11, "max_position_embeddings": 8, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 16}))


def t5(**more: object) -> nn.Module:
    sizes = {"vocab_size": 11, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **more))


MODELS: dict[str, tuple[Callable[[], nn.Module], Outputs]] = {
    "mlp": (mlp, lambda m: m(IMAGES.reshape(-1, 12))),
    "convolutions": (convolutions, lambda m: m(IMAGES)),
    "resnet-mini": (lambda: DilatedResNet(layers=[2, *LAYERS[1:]], width=WIDTH), lambda m: m(IMAGES)),
    "resnet-basic": (lambda: resnet("basic"), lambda m: m(IMAGES).logits),
    "resnet-bottleneck": (lambda: resnet("bottleneck"), lambda m: m(IMAGES).logits),
    "gpt2": (lambda: gpt2(GPT2LMHeadModel), lambda m: m(TOKENS).logits),
    "gpt2-backbone": (lambda: gpt2(GPT2Model), lambda m: m(TOKENS).last_hidden_state),
    "llama": (llama, lambda m: m(TOKENS).logits),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), lambda m: m(TOKENS).logits),
    "qwen3": (qwen3, lambda m: m(TOKENS).logits),
    "bert": (lambda: bert(BertForSequenceClassification), lambda m: m(TOKENS).logits),
    "bert-backbone": (lambda: bert(BertModel), lambda m: m(TOKENS).pooler_output),
    "clip-vision": (clip_vision, lambda m: m(IMAGES).pooler_output),
    "clip": (clip, lambda m: m(TOKENS, IMAGES).logits_per_image),
    "t5": (t5, lambda m: m(TOKENS, decoder_input_ids=TOKENS).logits),
    "t5-gated": (lambda: t5(feed_forward_proj="gated-gelu"), lambda m: m(TOKENS, decoder_input_ids=TOKENS).logits),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """A model all of whose parameters are random, norms, biases and statistics too."""
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if key.endswith("running_var") else tensor.normal_(std=0.3)
    return model


def pool_of(name: str, *models: nn.Module) -> fb.ModelPool:
    """By the family's own file, for the one that transformers has no config for."""
    architecture = get_architecture("resnet") if name == "resnet-mini" else None
    return fb.ModelPool({f"m{i}": model for i, model in enumerate(models)}, architecture=architecture)


def shuffled(group: Group, random: np.random.Generator) -> dict[str, np.ndarray]:
    """A random permutation of a group, with other ones within its items."""
    order = np.arange(group.items)
    while group.items > 1 and (order == np.arange(group.items)).all():
        order = random.permutation(group.items)
    found = {axis: np.arange(places.max() + 1) for axis, places in group.places.items()}
    for i, j in enumerate(order):
        inside = {axis: np.arange(places.shape[1]) for axis, places in group.places.items()}
        for part in group.within:
            change = shuffled(part, random)
            for axis, places in part.places.items():
                at = np.sort(places.reshape(-1))
                inside[axis][at] = inside[axis][change[axis][at]]
        for axis, places in group.places.items():
            found[axis][places[i]] = places[j][inside[axis]]
    return found


def randomly(pool: fb.ModelPool, seed: int = 0) -> tuple[fb.Checkpoint, Symmetries]:
    """A pool's reference, its units permuted at random, and what is permuted."""
    symmetries = symmetries_of(pool)
    random = np.random.default_rng(seed)
    permutations = {axis: p for group in symmetries.groups for axis, p in shuffled(group, random).items()}
    return permuted(pool.reference, symmetries, permutations), symmetries


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_permutations_leave_what_a_model_computes_unchanged(name: str) -> None:
    model = made(name)
    pool = pool_of(name, model)
    outputs = MODELS[name][1]
    before = outputs(model)
    for seed in range(3):
        other, symmetries = randomly(pool, seed)
        moved = [n for n in other.specs if not other[n].equal(pool.reference[n])]
        assert set(moved) == {n for n, axes in symmetries.axes.items() if any(axes)}
        model.load_state_dict(dict(other))
        torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_copy_is_brought_back_exactly(name: str) -> None:
    pool = pool_of(name, made(name))
    other, _ = randomly(pool, 1)
    assert distance(pool.reference, other) > 1
    both = pool.of({"reference": pool.reference, "other": other}, None).aligned()
    assert distance(pool.reference, both["other"]) == 0
    assert both["other"].digest == pool.reference.digest


def test_what_is_aligned_is_the_same_model_nearer_to_the_reference() -> None:
    a, b = made("gpt2", 0), made("gpt2", 1)
    pool = pool_of("gpt2", a, b)
    aligned = pool.aligned()
    assert aligned["m0"] is pool["m0"]
    assert distance(pool["m0"], aligned["m1"]) < 0.95 * distance(pool["m0"], pool["m1"])
    outputs = MODELS["gpt2"][1]
    with torch.no_grad():
        torch.testing.assert_close(outputs(aligned.build("m1").eval()), outputs(b), rtol=1e-4, atol=1e-5)


def test_two_units_that_changed_places_by_hand() -> None:
    first, second = (nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)) for _ in range(2))
    with torch.no_grad():
        for model, (w, b, v) in ((first, ([1, -1], [0, 2], [3, 4])), (second, ([-1, 1], [2, 0], [4, 5]))):
            model[0].weight[:] = torch.tensor(w).reshape(2, 1)
            model[0].bias[:] = torch.tensor(b)
            model[2].weight[:] = torch.tensor(v).reshape(1, 2)
    pool = fb.ModelPool({"first": first, "second": second})
    assert distance(pool["first"], pool["second"]) == pytest.approx((4 + 4 + 4 + 4 + 1 + 1) ** 0.5)
    aligned = pool.aligned()["second"]
    assert aligned["0.weight"].tolist() == [[1], [-1]] and aligned["0.bias"].tolist() == [0, 2]
    assert aligned["2.weight"].tolist() == [[5, 4]]
    assert distance(pool["first"], aligned) == 2


def test_blocks_of_large_tensors_are_permuted_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of("convolutions", made("convolutions"))
    fb.save(pool.reference, tmp_path / "model")
    other, symmetries = randomly(pool)
    monkeypatch.setattr(alignment, "BLOCK", 1)  # everything is large
    stored = fb.Checkpoint.open(tmp_path / "model")
    from_file, _ = randomly(pool.of({"m": stored}, None))
    for name, spec in other.specs.items():
        whole = other[name].reshape(-1)
        for start, stop in ((0, spec.numel), (0, 1), (spec.numel // 3, spec.numel // 2 + 1)):
            assert from_file.read(name, start, stop).equal(whole[start:stop]), name


def test_a_merge_of_aligned_models_is_saved_with_its_recipe_and_made_again(tmp_path: Path) -> None:
    for seed in (0, 1):
        made("llama", seed).save_pretrained(tmp_path / str(seed))
    pool = fb.ModelPool({"a": tmp_path / "0", "b": tmp_path / "1"})
    merged = fb.algorithm("simple_average").run(pool.aligned(seed=3))
    fb.save(merged, tmp_path / "merged", workers=2)
    fb.save(fb.algorithm("simple_average").run(pool.aligned(seed=3)), tmp_path / "again", workers=1)
    files = [tmp_path / folder / "model.safetensors" for folder in ("merged", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    recipe = json.loads((tmp_path / "merged" / "recipe.json").read_text())["inputs"]
    assert "align" not in recipe["a"]
    assert recipe["b"]["align"] == "weight_matching" and recipe["b"]["seed"] == 3
    assert len(recipe["b"]["permutations"]) == 32
    assert recipe["b"]["inputs"]["reference"] == recipe["a"]
    assert recipe["b"]["inputs"]["model"]["location"] == str(tmp_path / "1")
    assert recipe["b"]["inputs"]["model"]["xxh3"] == pool["b"].digest
    compared = compare_with_recipe(tmp_path / "merged", 50)
    assert len(compared) > 20 and all(same for _, same in compared)
    fb.save(fb.algorithm("simple_average").run(pool), tmp_path / "plain")
    plain = fb.Checkpoint.open(tmp_path / "plain")
    assert distance(plain, fb.Checkpoint.open(tmp_path / "merged")) > 1


def test_what_cannot_be_aligned_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of("mlp", made("mlp", 0), made("mlp", 1))
    with pytest.raises(fb.InputError, match="No alignment is called 'weight_matchin'. Did you mean 'weight_matching'?"):
        pool.aligned("weight_matchin")
    several = fb.ModelPool({name: nn.ModuleDict({"x": nn.Linear(2, 2)}) for name in "ab"})
    with pytest.raises(fb.InputError, match=r"no symmetries of this model are known\. They are known of: bert, "):
        several.aligned()
    tensors = fb.ModelPool({"a": dict(mlp().state_dict()), "b": dict(mlp().state_dict())})
    with pytest.raises(fb.InputError, match="the symmetries of a model without a config.json are not known. They"):
        tensors.aligned()
    with torch.no_grad():
        broken = made("mlp", 1)
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(fb.InputError, match="Model 'm1': '0.weight' contains NaN"):
        pool_of("mlp", made("mlp"), broken).aligned()
    models = {"a": made("mlp"), "b": broken}
    with pytest.raises(fb.InputError, match="which no permutation brings nearer"):
        fb.ModelPool(models, nan="ignore").aligned()
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(fb.InputError, match=r"needs scipy: pip install 'fusionbench\[align\]'"):
        pool.aligned()


def test_tensors_that_no_rule_knows_keep_what_they_may_read_where_it_is() -> None:
    model = made("gpt2")
    checkpoint = fb.ModelPool({"m": model}).reference
    config = model.config.to_dict()
    known = gpt2_family.symmetries(fb.Checkpoint.of(dict(checkpoint), config=config))
    assert {"stream", "transformer.h.0.hidden"} <= {a for axes in known.axes.values() for a in axes}
    for new, lost in (
        ("adapter.weight", {"stream"}),
        (
            "transformer.h.0.adapter.weight",
            {"stream", *(f"transformer.h.0.{axis}" for axis in ("qkv", "output", "hidden"))},
        ),
    ):
        more = fb.Checkpoint.of({**checkpoint, new: torch.ones(3)}, config=config)
        left = {a for axes in gpt2_family.symmetries(more).axes.values() for a in axes}
        assert {a for axes in known.axes.values() for a in axes} - left == lost


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A base of GPT-2, a fine-tune, and the same fine-tune with its units permuted; and their tasks."""
    write_gpt2_zoo(tmp_path)
    config = json.loads((tmp_path / "films" / "config.json").read_text())
    model = fb.Checkpoint.open(tmp_path / "films")
    names = {name.removeprefix("transformer."): name for name in model if name.startswith("transformer.")}
    backbone = fb.Checkpoint.of(dict(model.rename(names)), config=config)
    pool = fb.ModelPool({"films": backbone}, architecture=get_architecture("gpt2"))
    fb.save(randomly(pool)[0].beside(tmp_path / "films"), tmp_path / "shuffled")
    (tmp_path / "pool.yaml").write_text("base: base\nmodels: {films: films, shuffled: shuffled}\n")
    return tmp_path


def test_a_run_reports_distance_and_barrier_before_and_after(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "method=simple_average", f"modelpool={zoo / 'pool.yaml'}", f"taskpool={zoo / 'tasks.yaml'}"]
    options = [f"out={zoo / 'merged'}", f"report={zoo / 'report.json'}"]
    assert main([*words, *options, "align=weight_matching"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == ["films", "shuffled"]
    assert all("weight_matching, distance " in line and "barrier (loss) " in line for line in lines[:2])
    report = json.loads((zoo / "report.json").read_text())
    films, shuffled = (report["run"]["alignment"][name] for name in ("films", "shuffled"))
    assert films["objective"]["after"] <= films["objective"]["before"] < shuffled["objective"]["before"]
    assert shuffled["objective"]["after"] < 0.9 * shuffled["objective"]["before"]
    assert shuffled["barrier"]["before"] != shuffled["barrier"]["after"]

    # By hand: the loss half-way between the base and the permuted model, less the mean of theirs.
    pool, tasks = fb.load_modelpool(str(zoo / "pool.yaml")), fb.load_taskpool(str(zoo / "tasks.yaml"))
    middle = {name: (tensor + pool["shuffled"][name]) / 2 for name, tensor in pool.require_base().items()}
    made = [pool.build(m) for m in ("shuffled", pool.require_base(), fb.Checkpoint.of(middle))]
    other, base, half = (tasks.evaluate(model)["average"]["loss"] for model in made)
    assert shuffled["barrier"]["before"] == pytest.approx(half - (other + base) / 2, abs=1e-6)

    wanted = fb.methods.simple_average(pool.aligned())
    assert fb.Checkpoint.open(zoo / "merged").digest == wanted.digest != fb.methods.simple_average(pool).digest
    assert main(["report", str(zoo / "report.json")]) == 0


def test_without_tasks_a_run_reports_the_distance_alone(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"modelpool={zoo / 'pool.yaml'}", f"out={zoo / 'merged'}", f"report={zoo / 'report.json'}"]
    assert main(["run", "method=simple_average", *words, "align=weight_matching"]) == 0
    assert "barrier" not in capsys.readouterr().out
    found = json.loads((zoo / "report.json").read_text())["run"]["alignment"]["shuffled"]
    assert found.keys() == {"how", "objective"}


@pytest.mark.parametrize("word", ["weight_matchin", "3"])
def test_an_unknown_alignment_is_one_line(zoo: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    run = ["run", "method=simple_average", f"modelpool={zoo / 'pool.yaml'}", f"out={zoo / 'merged'}", f"align={word}"]
    merge = ["merge", "simple_average", str(zoo / "base"), str(zoo / "shuffled"), "-o", str(zoo / "merged")]
    for words in (run, [*merge, "--align", word]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(f"fusionbench: No alignment is called '{word}'. ")
        assert not (zoo / "merged").exists()


def test_files_are_merged_aligned_without_torch(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["merge", "simple_average", "./base", "./shuffled", "-o", "merged", "--align", "weight_matching"]
    code = f"import sys; from fusionbench.cli import main; assert main({words}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=zoo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("./shuffled: weight_matching, distance ")
    monkeypatch.chdir(zoo)
    assert main(["verify", "merged", "--inputs"]) == 0


def test_the_barrier_between_two_seeds_falls_after_matching() -> None:
    """Two networks that have learned the same function of eight numbers."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 8, generator=random)
    wanted = torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2].abs(), inputs[:, 3].relu()], 1)

    def loss(model: nn.Module) -> torch.Tensor:
        return (model(inputs) - wanted).square().mean()

    models = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models[str(seed)] = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 3))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    pool = fb.ModelPool(models)
    with torch.no_grad():
        ends = sum(float(loss(model)) for model in models.values()) / 2
        before, after = (float(loss(p.build(fb.methods.simple_average(p)))) - ends for p in (pool, pool.aligned()))
    assert before > 0.05 and after < 0.4 * before
