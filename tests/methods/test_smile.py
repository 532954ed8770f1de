import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fusionbench as fb
from fusionbench.calibrate import linear_layers
from fusionbench.methods.smile_upscaling import upscaled as with_experts
from fusionbench.mixing import SmileLinear

# What the authors published of their grids (examples/smile_upscaling of the reference implementation).
COUNTS = Path(__file__).parents[1] / "smile_parameter_counts.csv"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))


@pytest.fixture
def pool() -> fb.ModelPool:
    return fb.ModelPool({name: network(i) for i, name in enumerate("abc", 1)}, base=network(0))


def test_with_all_ranks_and_the_right_expert_it_is_the_fine_tuned_model(pool: fb.ModelPool) -> None:
    x = torch.randn(7, 6)
    for i, name in enumerate(pool):
        model = fb.methods.smile_upscaling(pool, rank=-1)
        for layer in (model[0], model[2]):
            keep = layer.gate[i].clone()
            layer.gate.data.zero_()
            layer.gate.data[i] = 1e3 * keep  # the router of an oracle
        torch.testing.assert_close(model(x), pool.build(name)(x), rtol=1e-4, atol=1e-5)


def test_the_router_by_hand() -> None:
    layer = SmileLinear(2, 2, experts=2, gate_rank=1, rank=2, top_k=1, bias=True)
    changes = torch.tensor([[[3.0, 0], [0, 0]], [[0, 0], [0, 2.0]]])  # one reads the first feature, one the second
    layer.fill(torch.eye(2), torch.eye(2) + changes, None, torch.tensor([[10.0, 0], [0, 20.0]]))
    x = torch.tensor([[1.0, 0.1], [0.1, -1.0]])
    assert layer.route(x).equal(torch.eye(2))
    torch.testing.assert_close(layer(x), torch.tensor([[14.0, 0.1], [0.1, 17.0]]))
    layer.top_k = 2
    share = layer.route(x)
    torch.testing.assert_close(share, torch.stack([torch.tensor([1.0, 0.1]), torch.tensor([0.1, 1.0])]).softmax(-1))


def test_what_is_no_number_in_the_base_is_told(pool: fb.ModelPool) -> None:
    base = network(0)
    base[0].weight.data[0, 0] = float("nan")
    with pytest.raises(fb.InputError, match="The base model: '0.weight' contains NaN"):
        fb.methods.smile_upscaling(fb.ModelPool(dict(pool), base=base, architecture=pool.architecture))


@pytest.mark.parametrize("rank", [2, -1])
def test_a_token_is_routed_by_itself(pool: fb.ModelPool, rank: int) -> None:
    """An input's output does not depend on what else is in the batch."""
    model, x = fb.methods.smile_upscaling(pool, gate_rank=1, rank=rank, top_k=2), torch.randn(9, 6)
    torch.testing.assert_close(model(x), torch.cat([model(row[None]) for row in x]))
    torch.testing.assert_close(model(x.reshape(3, 3, 6)).flatten(0, 1), model(x))


def test_an_expert_of_full_rank_is_the_change_itself() -> None:
    """It gives what two factors of all ranks give, and is smaller."""
    torch.manual_seed(0)
    layer = SmileLinear(6, 8, bias=True, experts=3, gate_rank=2, rank=6, top_k=2)
    base, weights = torch.randn(8, 6), torch.randn(3, 8, 6)
    layer.fill(base, weights, torch.zeros(8), torch.randn(3, 8))
    assert layer.v is None and layer.u.equal(weights - base)
    x, share = torch.randn(4, 5, 6), layer.route
    wanted = torch.einsum("bti,bte,eoi->bto", x, share(x), weights) + share(x) @ layer.bias
    torch.testing.assert_close(layer(x), wanted)
    layer(x).square().sum().backward()
    assert layer.u.grad is not None and (layer.u.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(("wrong", "message"), [({"rank": 0}, "rank is 0"), ({"top_k": 4}, "the pool has 3 models")])
def test_no_experts_and_more_than_there_are_are_refused(pool: fb.ModelPool, wrong: dict, message: str) -> None:
    with pytest.raises(fb.InputError, match=message):
        fb.methods.smile_upscaling(pool, **wrong)


def test_a_lower_rank_is_a_truncated_decomposition(pool: fb.ModelPool) -> None:
    layer = fb.methods.smile_upscaling(pool, rank=2)[0]
    change = pool["b"]["0.weight"] - pool.require_base()["0.weight"]
    kept = (layer.u[1] @ layer.v[1]).detach()
    s = torch.linalg.svdvals(change)
    assert float((change - kept).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-4)


def published(name: str) -> list[tuple[int, int, int]]:
    with open(COUNTS) as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == name]
    return [(int(row["gate_k"]), int(row["k"]), int(row["num_params"])) for row in rows]


VISION = {"image_size": 224}
MODELS = {
    "clip_vit_b32": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION, patch_size=32)),
    "clip_vit_l14": lambda: CLIPVisionModel(
        CLIPVisionConfig(
            **VISION,
            patch_size=14,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        )
    ),
    "flan_t5_base": lambda: T5ForConditionalGeneration(
        T5Config(
            d_model=768,
            d_ff=2048,
            num_layers=12,
            num_heads=12,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            vocab_size=32128,
        )
    ),
    "mistral_7b": lambda: MistralForCausalLM(MistralConfig()),  # of version 0.1, as its defaults are
}


@pytest.mark.parametrize(
    ("name", "of", "experts"),
    [
        ("clip_vit_b32", "clip_vit_b32", 8),
        ("clip_vit_l14", "clip_vit_l14", 8),
        ("flan_t5_base", "flan_t5_base", 8),
        ("flan_t5_base_lora16", "flan_t5_base", 8),
        ("mistral_7b_1", "mistral_7b", 1),
        ("mistral_7b_3", "mistral_7b", 3),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, of: str, experts: int) -> None:
    with torch.device("meta"):
        model = MODELS[of]()
    total = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    if "t5" in name:  # transformers 5 ties two embeddings and the output layer: Flan-T5 has one and a layer
        total -= 2 * model.shared.weight.numel()
    layers = with_experts(model, linear_layers(model))
    if "lora" in name:  # only what the adapters change
        layers = {n: layer for n, layer in layers.items() if n.endswith((".q.weight", ".v.weight"))}
    rows = published(name)
    assert len(rows) > 4
    for gate_rank, rank, wanted in rows:
        count = total
        for layer in layers.values():
            options = {"experts": experts, "gate_rank": gate_rank, "rank": rank, "top_k": 1}
            bias = layer.bias is not None
            with torch.device("meta"):
                upscaled = SmileLinear(layer.in_features, layer.out_features, bias=bias, **options)
            count += sum(p.numel() for p in upscaled.parameters()) - sum(p.numel() for p in layer.parameters())
        assert count == wanted, (gate_rank, rank)


def test_a_router_looks_at_no_directions_beyond_the_rank_of_a_change() -> None:
    """They are those of rounding: others for a base that is hardly another one."""
    torch.manual_seed(0)
    base, x = torch.randn(32, 32), torch.randn(200, 32)
    changes = torch.stack([1e-2 * torch.randn(32, 4) @ torch.randn(4, 32) for _ in range(2)])

    def chosen(weight: torch.Tensor, gate_rank: int) -> torch.Tensor:
        layer = SmileLinear(32, 32, bias=False, experts=2, gate_rank=gate_rank, rank=-1, top_k=1)
        return layer.fill(weight, weight + changes, None, None).route(x)

    moved = base + 1e-6 * torch.randn(32, 32)
    torch.testing.assert_close(chosen(base, 16), chosen(base, 4))
    torch.testing.assert_close(chosen(base, 16), chosen(moved, 16))
    layer = SmileLinear(32, 32, bias=False, experts=2, gate_rank=3, rank=-1, top_k=1)
    layer.fill(base, torch.stack([base, base + changes[1]]), None, None)
    assert not layer.gate[0].any() and layer.route(x)[:, 1].eq(1).all()  # the first model left the layer alone


def test_a_layer_whose_bias_alone_changed_has_experts_for_it() -> None:
    torch.manual_seed(0)
    base, tuned = network(0), network(0)
    tuned[0].bias.data += 1
    pool, x = fb.ModelPool({"a": tuned}, base=base), torch.randn(5, 6)
    torch.testing.assert_close(fb.methods.smile_upscaling(pool, rank=-1)(x), tuned(x))


def encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("training", [True, False])
def test_of_torch_own_encoder_the_layers_that_it_calls_have_experts(training: bool) -> None:
    """In evaluation it would read their weights instead, and its attention does so always."""
    base, tuned = encoder(0), encoder(0)
    for layer in tuned.layers:
        torch.nn.init.normal_(layer.linear1.weight)
        torch.nn.init.normal_(layer.self_attn.out_proj.weight)
    model = fb.methods.smile_upscaling(fb.ModelPool({"tuned": tuned}, base=base), rank=-1).train(training)
    mixed = [name for name, layer in model.named_modules() if isinstance(layer, SmileLinear)]
    assert mixed == ["layers.0.linear1", "layers.1.linear1"]
    for layer, its in zip(tuned.layers, base.layers, strict=True):
        layer.self_attn.load_state_dict(its.self_attn.state_dict())
    x, mask = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        torch.testing.assert_close(model(x), tuned(x))
        found, wanted = (each(x, src_key_padding_mask=mask)[~mask] for each in (model, tuned))
    torch.testing.assert_close(found, wanted)
