from pathlib import Path

import pytest
import tiny_clip
import tiny_text
import torch
from conftest import random_tasks
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    DistilBertModel,
)

import fusionbench as fb
from fusionbench.methods.task_arithmetic import task_arithmetic
from fusionbench.methods.we_moe import BLOCKS, linear_layers_of
from fusionbench.mixed import as_checkpoint, mix
from fusionbench.mixing import EnsembleLinear, WeightEnsemble


class Toy(nn.Module):
    """Tokens `(batch, tokens, 4)` to logits of what their mean is."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.LayerNorm(4))
        self.head = nn.Linear(4, 3)
        self.head.weight.data.mul_(4)  # predictions far from uniform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mlp(x)
        return self.head(x.mean(1) if x.dim() > 2 else x)


@pytest.fixture
def pool() -> fb.ModelPool:
    return fb.ModelPool({name: Toy(i) for i, name in enumerate("abc", 1)}, base=Toy(0))


def upscaled(pool: fb.ModelPool, **given) -> nn.Module:
    """Without training, but with routers that tell inputs apart."""
    model = fb.methods.we_moe(pool, random_tasks(pool), steps=0, **given)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.normal_()
    return model


def test_with_equal_routers_it_is_task_arithmetic(pool: fb.ModelPool) -> None:
    model = fb.methods.we_moe(pool, random_tasks(pool), steps=0, scaling_factor=0.4)
    for name, parameter in model.named_parameters():
        if "router" in name and name.endswith("weight"):
            parameter.data.zero_()
    merged = pool.build(task_arithmetic(pool, scaling_factor=0.4))
    x = torch.randn(5, 7, 4)
    torch.testing.assert_close(model(x), merged(x))


def test_an_input_is_merged_for_by_hand(pool: fb.ModelPool) -> None:
    model, x = upscaled(pool), torch.randn(1, 7, 4)
    coefficients = model.mlp.router(x.mean(1))[0]
    names = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight")
    merged = dict(task_arithmetic(pool, scaling_factor=0.3))
    for name in names:
        p = pool.param(name)
        merged[name] = p.base + sum(c * v for c, v in zip(coefficients, p.task_vectors, strict=True))
    torch.testing.assert_close(model(x), pool.build(fb.Checkpoint.of(merged))(x))


def test_an_input_by_itself_and_in_a_batch_gives_the_same(pool: fb.ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = upscaled(pool), torch.randn(9, 7, 4)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone)
    monkeypatch.setattr("fusionbench.mixing.MERGED_AT_ONCE", 2 * 24)  # two inputs at once
    with torch.no_grad():
        torch.testing.assert_close(model(x), alone)


def test_routing_by_batch_depends_on_the_batch(pool: fb.ModelPool) -> None:
    model, x = upscaled(pool, routing="batch"), torch.randn(9, 7, 4)
    assert not torch.allclose(model(x), torch.cat([model(row[None]) for row in x]), atol=1e-3)
    assert model.mlp.route(x).equal(model.mlp.router(x.mean(1)).mean(0, keepdim=True))


@pytest.mark.parametrize("write", [tiny_text.write_gpt2_zoo, tiny_text.write_bert_zoo, tiny_text.write_t5_zoo])
def test_what_only_fills_a_batch_up_is_not_routed(write, tmp_path: Path) -> None:
    write(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    blocks = {"blocks": r".*\.attention\.self"} if "bert" in write.__name__ else {}  # what its adapters change
    model = fb.methods.we_moe(pool, tasks, steps=0, **blocks)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.normal_()
    task = next(iter(tasks.values()))
    texts = task.tokens.encode(["good film", "it is bad mail ? it is bad film"])
    assert texts["attention_mask"].sum() < texts["attention_mask"].numel()
    together = task.predict(model, texts)
    for i, text in enumerate(("good film", "it is bad mail ? it is bad film")):
        torch.testing.assert_close(task.predict(model, task.tokens.encode([text]))[0], together[i])
    if hasattr(model, "generate"):  # the decoder, which sees a token at a time, has no routers
        cached, anew = (model.generate(**texts, max_new_tokens=5, use_cache=use) for use in (True, False))
        assert cached.equal(anew)


def test_the_entropy_of_the_predictions_goes_down(pool: fb.ModelPool) -> None:
    from fusionbench.adapt import entropy

    tasks = random_tasks(pool)
    inputs = [next(task.batches("test", 24))[0] for task in tasks.values()]

    def found(steps: int) -> float:
        model = fb.methods.we_moe(pool, tasks, steps=steps, learning_rate=0.1, batch_size=24)
        return sum(entropy(model(x)).item() for x in inputs)

    assert found(30) < 0.95 * found(0)


def test_parameter_counts_are_the_published_ones() -> None:
    """Of CLIP ViT-B/32: one model 87.456M, eight mixed 547.97M, of which routers 7.16M."""
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(hidden_size=768, intermediate_size=3072, projection_dim=512))
        assert sum(p.numel() for p in model.parameters()) == 87_456_000
        paths = [path for path, module in model.named_modules() if path.endswith(".mlp")]
        numbers = {"experts": 8, "router_layers": 2, "routing": "sample"}
        mixed = mix(model, {"kind": "we_moe", "blocks": paths, **numbers})
    assert round(sum(p.numel() for p in mixed.parameters()) / 1e6, 2) == 547.97
    routers = [m.router for m in mixed.modules() if isinstance(m, WeightEnsemble)]
    assert round(sum(p.numel() for router in routers for p in router.parameters()) / 1e6, 2) == 7.16


@pytest.mark.parametrize("at_once", [1, 8])
def test_merged_weights_of_a_large_batch_are_not_kept_for_the_backward_pass(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = EnsembleLinear(16, 32, bias=True, experts=3)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x, layer.coefficients = torch.randn(8, 2, 16, requires_grad=True), torch.rand(8, 3, requires_grad=True)
    wanted = (x, layer.coefficients, *layer.parameters())

    def kept_and_gradients() -> tuple[int, tuple[torch.Tensor, ...]]:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = layer(x).square().sum()
        return sum(kept.values()), torch.autograd.grad(loss, wanted)

    one = layer.weight.numel()
    monkeypatch.setattr("fusionbench.mixing.MERGED_AT_ONCE", at_once * one)
    before, gradients = kept_and_gradients()
    monkeypatch.setattr("fusionbench.mixing.KEPT", 8 * one - 1)
    after, again = kept_and_gradients()
    assert after < 8 * layer.weight.nbytes < before
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(a, b)


def test_berts_layers_have_one_router_each_and_distilberts_mlps(tmp_path: Path) -> None:
    with torch.device("meta"):
        bert = BertModel(BertConfig())
        distil = DistilBertModel(DistilBertConfig())
    blocks = linear_layers_of(bert, BLOCKS)
    assert list(blocks) == [f"encoder.layer.{i}" for i in range(12)] and {len(b) for b in blocks.values()} == {6}
    assert list(linear_layers_of(distil, BLOCKS)) == [f"transformer.layer.{i}.ffn" for i in range(6)]
    mixed = mix(bert, {"kind": "we_moe", "blocks": [*blocks], "experts": 8, "router_layers": 2, "routing": "sample"})
    routers = [m.router for m in mixed.modules() if isinstance(m, WeightEnsemble)]
    assert sum(p.numel() for router in routers for p in router.parameters()) == 12 * (768 * 769 + 8 * 769)


def test_all_linear_layers_of_the_mlps_are_mixed_and_no_others(tmp_path: Path) -> None:
    tiny_clip.write_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    model = fb.methods.we_moe(pool, tasks, steps=0)
    mixed = [name for name, module in model.named_modules() if isinstance(module, EnsembleLinear)]
    assert len(mixed) == 4 and all(name.endswith((".mlp.block.fc1", ".mlp.block.fc2")) for name in mixed)


@pytest.mark.parametrize("blocks", [r".*\.self_attn", r".*\.layers\.\d+"])
def test_attention_and_whole_layers_are_blocks_too(blocks: str, tmp_path: Path) -> None:
    tiny_clip.write_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    model = fb.methods.we_moe(pool, tasks, steps=1, blocks=blocks)
    task = next(iter(tasks.values()))
    images = next(task.batches("test", 3))[0]
    for router in (m.router for m in model.modules() if isinstance(m, WeightEnsemble)):
        router[-1].weight.data.zero_()
        router[-1].bias.data.fill_(0.3)
    torch.testing.assert_close(task.predict(model, images), task.predict(pool.build(task_arithmetic(pool)), images))


@pytest.mark.parametrize(
    ("blocks", "message"), [("mpl", "There is: mlp"), ("head", "is the whole name of no block"), ("(", "no regular")]
)
def test_blocks_that_are_not_there_are_one_line(pool: fb.ModelPool, blocks: str, message: str) -> None:
    with pytest.raises(fb.InputError, match=message) as error:
        fb.methods.we_moe(pool, random_tasks(pool), blocks=blocks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["smile", "we_moe"])
def test_mixed_layers_are_where_the_model_is(kind: str) -> None:
    model = Toy(0).to("meta")
    plan = {"layers": ["mlp.0", "mlp.2"], "experts": 2, "gate_rank": 1, "rank": 1, "top_k": 1}
    if kind == "we_moe":
        plan = {"blocks": ["mlp"], "experts": 2, "router_layers": 2, "routing": "sample"}
    mixed = mix(model, {"kind": kind, **plan})
    assert {tensor.device.type for tensor in mixed.state_dict().values()} == {"meta"}
    assert mixed(torch.zeros(2, 5, 4, device="meta")).shape == (2, 3)


def test_t5_in_half_precision_gives_nearly_the_same(tmp_path: Path) -> None:
    tiny_text.write_t5_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    fb.save(as_checkpoint(fb.methods.we_moe(pool, tasks, steps=0), pool), tmp_path / "mixed")
    tokens, given = torch.randint(3, 14, (3, 6)), torch.randint(3, 14, (3, 2))
    full, half = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mixed", dtype=dtype).eval()
        for dtype in (torch.float32, torch.float16)
    )
    assert half.encoder.block[0].layer[1].DenseReluDense.block.wo.weight.dtype == torch.float32
    with torch.no_grad():
        found = [model(input_ids=tokens, decoder_input_ids=given).logits.float() for model in (full, half)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_gradient_checkpointing_which_knows_no_masks_is_refused_by_transformers(tmp_path: Path) -> None:
    tiny_text.write_t5_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    model = fb.methods.we_moe(pool, tasks, steps=0)
    fb.save(as_checkpoint(model, pool), tmp_path / "mixed")
    for each in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mixed")):
        with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
            each.gradient_checkpointing_enable()


class Encoder(nn.Module):
    """With a layer of torch's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean(1)


def test_of_torch_own_encoder_layer_what_it_calls_is_mixed() -> None:
    pool = fb.ModelPool({name: Encoder(i) for i, name in enumerate("ab", 1)}, base=Encoder(0))
    model, x = upscaled(pool, blocks="layer"), torch.randn(5, 7, 4)
    mixed = [name for name, layer in model.named_modules() if isinstance(layer, EnsembleLinear)]
    assert mixed == ["layer.block.linear1", "layer.block.linear2"]
    with torch.no_grad():  # where it reads the weights of layers instead, in evaluation
        torch.testing.assert_close(model.eval()(x), model.train()(x))
    with pytest.raises(fb.InputError, match="no block with linear layers"):
        fb.methods.we_moe(pool, random_tasks(pool), blocks=r".*self_attn")
