from pathlib import Path

import pytest
import torch
from conftest import small_model
from torch import nn

import fusionbench as fb
from fusionbench.layers import layer_name


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(9)]), "head": nn.Linear(2, 2)})


@pytest.fixture
def pool() -> fb.ModelPool:
    return fb.ModelPool({name: network(i) for i, name in enumerate("abcd", 1)}, base=network(0))


def origin(pool: fb.ModelPool, model: fb.Checkpoint, tensor: str) -> str:
    return next(name for name in pool if pool[name][tensor].equal(model[tensor]))


@pytest.mark.parametrize("by", ["layer", "tensor"])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_and_nothing_doubled(pool: fb.ModelPool, by: str, seed: int) -> None:
    dealt = fb.methods.model_recombination(pool, by=by, seed=seed)
    assert list(dealt) == list(pool)
    for tensor in pool.reference:
        assert sorted(origin(pool, model, tensor) for model in dealt.values()) == list(pool)


def test_a_layer_stays_together_and_layers_part(pool: fb.ModelPool) -> None:
    dealt = fb.methods.model_recombination(pool)
    orders = set()
    for layer in [f"layers.{i}" for i in range(9)] + ["head"]:
        weights, biases = (
            [origin(pool, m, f"{layer}.{which}") for m in dealt.values()] for which in ("weight", "bias")
        )
        assert weights == biases
        orders.add(tuple(weights))
    assert len(orders) > 1
    other = fb.methods.model_recombination(pool, seed=1)
    again = fb.methods.model_recombination(pool)
    assert [m.digest for m in again.values()] == [m.digest for m in dealt.values()]
    assert [m.digest for m in other.values()] != [m.digest for m in dealt.values()]


def test_a_seed_has_64_bits(pool: fb.ModelPool) -> None:
    assert list(fb.methods.model_recombination(pool, seed=2**64 - 1)) == list(pool)
    with pytest.raises(fb.InputError, match="model_recombination.seed must be in .*; got 18446744073709551616"):
        fb.methods.model_recombination(pool, seed=2**64)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layers.3.mlp.fc1.weight", "encoder.layers.3"),
        ("encoder.layers.13.self_attn.0.bias", "encoder.layers.13"),
        ("0.weight", "0"),
        ("head.weight", "head"),
        ("class_embedding", "class_embedding"),
        ("layer1.0.bn1.running_mean", "layer1.0"),
    ],
)
def test_layers_by_name(name: str, layer: str) -> None:
    assert layer_name(name) == layer


def test_tied_weights_stay_tied_and_a_recombined_model_is_saved_with_its_recipe(tmp_path: Path) -> None:
    pool = fb.ModelPool({name: small_model(i) for i, name in enumerate("ab", 1)}, base=small_model(0))
    model = fb.algorithm("model_recombination").run(pool)["a"]
    assert model.aliases == {"head.weight": "embed.weight"}
    opened = fb.Checkpoint.open(fb.save(model, tmp_path / "a"))
    assert opened.digest == model.digest
    assert '"model_recombination"' in (tmp_path / "a" / "recipe.json").read_text()
