"""What every registered method promises, whichever it is. A new method is tested here without any edit."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import LEAST, MODELS, fitting, quick, random_tasks, small_model
from torch import nn

import fusionbench as fb
from fusionbench.registry import Method, Range

# A method that needs a hyperparameter, such as a file, or a language model has tests of its own.
OWN_TESTS = ("moe_upscaling", "moe_merging")
METHODS = [
    m for m in fb.list_methods() if m.name not in OWN_TESTS and not any(h.required for h in m.hyperparameters.values())
]
MERGING = [m for m in METHODS if m.kind == "merging"]
IDS: Callable[[Method], str] = lambda m: m.name  # noqa: E731


def with_mlp(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(mlp=nn.Sequential(*layers)))


def merge(method: Method, pool: fb.ModelPool) -> fb.Checkpoint:
    return run(method, pool)


def run(method: Method, pool: fb.ModelPool) -> Any:
    pool = fitting(method, pool)
    return fb.algorithm(method.name, **quick(method)).run(pool, random_tasks(pool))


def same(a: fb.Checkpoint, b: fb.Checkpoint) -> bool:
    return list(a) == list(b) and all(a[n].equal(b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_every_method_gives_a_model_that_runs(method: Method) -> None:
    torch.manual_seed(0)
    models = [with_mlp(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(4)]
    pool = fb.ModelPool(dict(zip("abc", models[1:], strict=True)), base=models[0])
    result = run(method, pool)
    if isinstance(result, fb.Checkpoint):
        result = pool.build(result)
    if isinstance(result, fb.ModelPool):
        result = result.build("a")
    assert result(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_every_method_is_documented_with_typed_and_ranged_hyperparameters(method: Method) -> None:
    assert method.summary.endswith(".")
    assert method.kind == "reference" or not method.paper or method.paper.count(".") == 1
    for h in method.hyperparameters.values():
        assert h.meaning, f"{h.name} says nothing of what it means"
        assert h.type is not inspect.Parameter.empty
        if h.type is float:
            assert isinstance(h.range, Range), f"{h.name} has no range"
        if not h.required:
            assert h.check(h.default, method.name) == h.default


@pytest.mark.parametrize("method", fb.list_methods(), ids=IDS)
def test_every_method_has_a_formula_that_fits_a_terminal_and_text_that_explains_it(method: Method) -> None:
    lines = method.formula.splitlines()
    assert " = " in method.formula and len(method.paragraphs) > 2
    assert method.paragraphs[1].startswith("    "), "the formula stands behind the summary, indented"
    assert max(map(len, lines)) <= 72 and all(line.isprintable() for line in lines)


@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_a_merge_keeps_names_shapes_and_dtypes(method: Method, pool: fb.ModelPool, base: nn.Module) -> None:
    merged = merge(method, pool)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in base.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in merged.items()} == expected


@pytest.mark.parametrize("copies", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_merging_copies_of_the_base_gives_the_base(
    method: Method, copies: int, dtype: torch.dtype, base: nn.Module
) -> None:
    if copies < LEAST.get(method.name, 1):
        pytest.skip("too few models for this method")
    base = base.to(dtype)
    pool = fb.ModelPool({f"copy{i}": copy.deepcopy(base) for i in range(copies)}, base=base)
    assert same(merge(method, pool), fb.Checkpoint.of(base.state_dict()))


@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_merging_twice_gives_the_same_bits(method: Method, pool: fb.ModelPool) -> None:
    assert same(merge(method, pool), merge(method, pool))


@pytest.mark.parametrize("method", [m for m in MERGING if not m.ordered and m.name not in MODELS], ids=IDS)
def test_the_order_of_the_models_does_not_matter(method: Method, pool: fb.ModelPool) -> None:
    shuffled = fb.ModelPool({name: pool[name] for name in "cab"}, base=pool.base, architecture=pool.architecture)
    here, there = merge(method, pool), merge(method, shuffled)
    for name in here:  # up to the order of additions, of numbers of about 1 in float32
        torch.testing.assert_close(here[name], there[name], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_any_number_of_workers_writes_the_same_bytes(method: Method, pool: fb.ModelPool, tmp_path: Any) -> None:
    merged = merge(method, pool)
    for workers in (1, 4):
        fb.save(merged, tmp_path / f"w{workers}", workers=workers)
    files = {path.name for path in (tmp_path / "w1").iterdir()}
    assert files == {path.name for path in (tmp_path / "w4").iterdir()}
    for file in files:
        assert (tmp_path / "w1" / file).read_bytes() == (tmp_path / "w4" / file).read_bytes()


@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_integer_and_boolean_buffers_are_the_bases(method: Method, pool: fb.ModelPool, base: nn.Module) -> None:
    merged, own = merge(method, pool), base.state_dict()
    for name in ("norm.num_batches_tracked", "mask"):
        assert merged[name].equal(own[name]) and merged[name].dtype == own[name].dtype


@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_tied_weights_stay_tied_and_are_computed_once(method: Method, pool: fb.ModelPool, tmp_path: Any) -> None:
    merged = merge(method, pool)
    assert merged.aliases == {"head.weight": "embed.weight"}
    reopened = fb.Checkpoint.open(fb.save(merged, tmp_path / "merged"))
    assert reopened.aliases == merged.aliases
    assert "head.weight" not in reopened.specs
    assert reopened["head.weight"].equal(merged["embed.weight"])


@pytest.mark.parametrize("method", MERGING, ids=IDS)
def test_nan_in_an_input_is_reported_with_model_and_tensor(method: Method, base: nn.Module) -> None:
    bad = small_model(2)
    with torch.no_grad():
        bad["hidden"].weight[1, 2] = float("nan")
    models = {"good": small_model(1), "bad": bad}
    with pytest.raises(fb.InputError, match=r"Model 'bad': 'hidden.weight' contains NaN or Inf"):
        dict(merge(method, fb.ModelPool(models, base=base)))
    if method.data == "none":  # what a broken model predicts tells nothing of its other tensors
        merged = merge(method, fb.ModelPool(models, base=base, nan="ignore"))
        assert merged["hidden.bias"].isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_inputs_are_not_modified(method: Method) -> None:
    models = {name: with_mlp(nn.Linear(3, 3), nn.BatchNorm1d(3)) for name in ("base", "a", "b")}
    before = copy.deepcopy({name: model.state_dict() for name, model in models.items()})
    pool = fb.ModelPool({name: models[name] for name in "ab"}, base=models["base"])
    result = run(method, pool)
    if isinstance(result, fb.Checkpoint):
        pool.build(result)(torch.randn(4, 3))
    elif isinstance(result, nn.Module):
        result(torch.randn(4, 3))
    for name, model in models.items():
        assert all(before[name][key].equal(value) for key, value in model.state_dict().items())


# A threshold over the whole model is another one within a part of it, where random numbers are others, too, as they
# depend on names; and a part alone sees no data.
WITHIN = [m for m in MERGING if not {"trim", "seed"} & set(m.hyperparameters) and m.data == "none"]


@pytest.mark.parametrize("method", WITHIN, ids=IDS)
def test_within_a_prefix_and_in_memory_the_merge_is_the_same(method: Method, pool: fb.ModelPool) -> None:
    whole = merge(method, pool)
    part = merge(method, pool.load().within("hidden."))
    assert part["weight"].equal(whole["hidden.weight"])


def test_plain_calls_and_algorithms_are_the_same(pool: fb.ModelPool) -> None:
    called = fb.methods.ties_merging(pool, density=0.1)
    ran = fb.algorithm("ties_merging", density=0.1).run(pool)
    assert same(called, ran)
    assert ran.recipe["method"] == "ties_merging"
    assert ran.recipe["hyperparameters"]["density"] == 0.1
    assert ran.recipe["hyperparameters"]["scaling_factor"] == 0.3
