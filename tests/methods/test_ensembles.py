from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fusionbench as fb
from fusionbench.ensemble import Ensemble


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.fixture
def pool() -> fb.ModelPool:
    return fb.ModelPool({"a": Scale(1.0), "b": Scale(3.0), "c": Scale(-5.0)}, base=Scale(0.0))


def test_ensembles_by_hand(pool: fb.ModelPool) -> None:
    x = torch.tensor([[3.0, -1.0]])
    assert fb.methods.simple_ensemble(pool)(x).tolist() == [[-1, pytest.approx(1 / 3)]]
    assert fb.methods.weighted_ensemble(pool, weights=[1, 3, 0])(x).tolist() == [[7.5, -2.5]]
    assert fb.methods.weighted_ensemble(pool, weights=[1, 1, 1], normalize=False)(x).tolist() == [[-3, 1]]
    assert fb.methods.max_model_predictor(pool)(x).tolist() == [[9, 5]]


@pytest.mark.parametrize("name", ["simple_ensemble", "weighted_ensemble", "max_model_predictor"])
def test_outputs_keep_their_dtype_and_gradients_flow(pool: fb.ModelPool, name: str) -> None:
    """Pitfall C7: a weighted ensemble that returns float64."""
    x = torch.ones(2, 2, requires_grad=True)
    output = getattr(fb.methods, name)(pool)(x)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert x.grad is not None


class Named(NamedTuple):
    first: Tensor
    second: Tensor


def give(output: object) -> nn.Module:
    module = nn.Module()
    module.forward = lambda *args: output  # type: ignore[method-assign]
    return module


def test_outputs_may_be_tuples_tables_and_model_outputs() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    one, three = torch.ones(2), torch.full((2,), 3.0)

    def mean(first: object, second: object) -> object:
        return Ensemble([give(first), give(second)], lambda outputs: outputs.mean(0))(None)

    assert mean((one, [three]), (three, [one]))[1][0].tolist() == [2, 2]  # type: ignore[index]
    table = mean({"logits": one, "cache": object()}, {"logits": three, "cache": object()})
    assert isinstance(table, dict) and list(table) == ["logits"]
    assert mean({0: one, "a": one}, {0: three, "a": one}).keys() == {0, "a"}  # type: ignore[attr-defined]
    named = mean(Named(one, one), Named(three, one))
    assert isinstance(named, Named) and named.first.tolist() == [2, 2]
    joined = mean(
        BaseModelOutputWithPooling(last_hidden_state=one, pooler_output=three),
        BaseModelOutputWithPooling(last_hidden_state=three, pooler_output=three),
    )
    assert isinstance(joined, BaseModelOutputWithPooling)
    assert joined.last_hidden_state.tolist() == [2, 2] and joined.pooler_output.tolist() == [3, 3]


@pytest.mark.parametrize("name", ["simple_ensemble", "weighted_ensemble", "max_model_predictor"])
def test_whole_numbers_are_left_out_of_outputs(pool: fb.ModelPool, name: str) -> None:
    ensemble = getattr(fb.methods, name)(pool)
    for module in ensemble.models:
        module.forward = lambda x: {"logits": x, "lengths": torch.tensor([3]), "mask": x > 0}
    assert ensemble(torch.ones(2)).keys() == {"logits"}


def test_references_give_the_base_and_each_model(pool: fb.ModelPool) -> None:
    assert fb.methods.pretrained(pool)["factor"] == 0
    individual = fb.methods.individual(pool)
    assert [float(individual[name]["factor"]) for name in individual] == [1, 3, -5]
