import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pool_of, random_tasks, small_model
from safetensors.torch import save_file

import fusionbench as fb
from fusionbench.cli import main
from fusionbench.parallel import Budget, in_order
from fusionbench.sources import BLOCK


def test_param_shows_every_model_in_the_pools_order(pool: fb.ModelPool) -> None:
    seen = {}

    def look(p: fb.Param) -> torch.Tensor:
        seen[p.name] = (p.base, p.models, p.task_vectors)
        return p.base

    dict(pool.map(look))
    base, models, task_vectors = seen["hidden.weight"]
    assert models.shape == (3, 6, 6)
    assert [models[i].equal(pool[name]["hidden.weight"]) for i, name in enumerate("abc")] == [True] * 3
    assert task_vectors.equal(models - base)
    assert "norm.num_batches_tracked" not in seen and "mask" not in seen and "nothing" not in seen


def test_an_elementwise_merge_is_handed_flat_blocks() -> None:
    pool = fb.ModelPool({"a": {"w": torch.ones(900, 900)}}, base={"w": torch.zeros(900, 900)})
    shapes = []

    def look(p: fb.Param) -> torch.Tensor:
        shapes.append(tuple(p.base.shape))
        return p.base

    merged = pool.map(look, elementwise=True)
    for start, stop in merged.blocks("w"):
        merged.read("w", start, stop)
    assert shapes == [(BLOCK,)] * 3 + [(900 * 900 - 3 * BLOCK,)]


def test_a_merge_of_the_wrong_shape_says_so() -> None:
    with pytest.raises(fb.InputError, match=r"The merge of 'w' has the shape \(1, 2\), but \(2,\) is expected"):
        pool_of([1, 2], [3, 4]).map(lambda p: p.models)["w"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(2, 3)}, r"Model 'm': 'w' is \(2, 3\), but \(3, 2\) in the base model"),
        ({"w": torch.ones(3, 2, dtype=torch.int64)}, "Model 'm': 'w' has the dtype I64, but F32"),
        ({"x": torch.ones(3, 2)}, "Model 'm' lacks 'w', which the base model has: they are not of one architecture"),
        (
            {"w": torch.ones(3, 2), "x": torch.ones(1), "y": torch.ones(1)},
            "has 'x' and 1 other tensors, which the base",
        ),
    ],
)
def test_models_that_differ_stop_the_run(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(fb.InputError, match=message):
        fb.ModelPool({"m": change}, base={"w": torch.ones(3, 2)})


def test_without_a_base_the_first_model_is_the_measure() -> None:
    with pytest.raises(fb.InputError, match=r"Model 'b': 'w' is \(3,\), but \(2,\) in model 'a'"):
        fb.ModelPool({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}})


def test_a_pool_may_mix_half_precisions_and_answers_in_the_bases() -> None:
    pool = fb.ModelPool({"a": {"w": torch.tensor([1.0]).bfloat16()}}, base={"w": torch.tensor([2.0]).half()})
    merged = fb.methods.task_arithmetic(pool, scaling_factor=0.5)["w"]
    assert merged.dtype == torch.float16 and merged.item() == 1.5


def test_a_file_that_lacks_a_tied_copy_matches_one_that_has_it() -> None:
    embedding = torch.ones(3, 2)
    base = {"embed.weight": embedding, "head.weight": embedding}
    pool = fb.ModelPool({"a": {"head.weight": torch.full((3, 2), 3.0)}}, base=base)
    merged = fb.methods.simple_average(pool)
    assert merged["embed.weight"].eq(3).all() and merged["head.weight"].eq(3).all()


@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_error_warn_or_ignore(where: str, value: float, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = {"w": torch.tensor([1.0, value])}, {"w": torch.tensor([1.0, 2.0])}
    base, model = (bad, good) if where == "base" else (good, bad)

    def merge(nan: str) -> torch.Tensor:
        pool = fb.ModelPool({"m": model}, base=base, nan=nan)  # type: ignore[arg-type]
        return fb.methods.task_arithmetic(pool)["w"]

    label = "The base model" if where == "base" else "Model 'm'"
    with pytest.raises(fb.InputError, match=f"{label}: 'w' contains NaN or Inf"):
        merge("error")
    with caplog.at_level(logging.WARNING):
        assert merge("warn")[0] == 1
    assert f"{label}: 'w' contains NaN or Inf" in caplog.text
    caplog.clear()
    assert merge("ignore")[0] == 1
    assert caplog.text == ""


def test_large_but_finite_inputs_pass() -> None:
    largest = torch.finfo(torch.float32).max
    pool = fb.ModelPool({"m": {"w": torch.full((4,), largest)}}, base={"w": torch.full((4,), largest)})
    assert fb.methods.task_arithmetic(pool)["w"].eq(largest).all()


def test_a_merge_that_overflows_its_dtype_is_reported() -> None:
    pool = fb.ModelPool({"m": {"w": torch.tensor([60000.0]).half()}}, base={"w": torch.tensor([-60000.0]).half()})
    with pytest.raises(fb.InputError, match="The merged model: 'w' contains NaN or Inf"):
        fb.methods.task_arithmetic(pool, scaling_factor=2.0)["w"]


def test_reduce_counts_every_parameter_once(pool: fb.ModelPool) -> None:
    count = pool.reduce(lambda p: torch.tensor(p.base.numel()))
    expected = sum(spec.numel for spec in pool.reference.specs.values() if spec.floating)
    assert count == expected
    assert count == sum(p.numel() for p in small_model(0).parameters()) + 2 * 6 + 1  # and statistics, and 'scalar'


def test_randomness_is_keyed_by_seed_and_name(pool: fb.ModelPool) -> None:
    def noise(seed: int) -> fb.Checkpoint:
        return pool.map(lambda p: torch.randn(p.base.shape, generator=p.generator(seed)))

    one, again, other = noise(1), noise(1), noise(2)
    names = [n for n, spec in pool.reference.specs.items() if spec.floating and spec.numel > 1]
    backwards = {name: again[name] for name in reversed(names)}
    assert all(one[name].equal(backwards[name]) for name in names)
    assert not any(one[name].equal(other[name]) for name in names)
    assert not one["hidden.weight"].equal(one["embed.weight"][:6])


def test_unknown_models_and_empty_pools_are_refused(pool: fb.ModelPool) -> None:
    with pytest.raises(fb.InputError, match=r"no model 'd'. There is: a, b, c"):
        pool["d"]
    tasks = random_tasks(pool)
    with pytest.raises(fb.InputError, match=r"^The task pool has no task 'd'. There is: a, b, c.$"):
        tasks["d"]
    assert pool.get("d") is tasks.get("d") is None and pool.get("a") is pool["a"]
    with pytest.raises(fb.InputError, match="needs at least one model"):
        fb.ModelPool({})
    with pytest.raises(fb.InputError, match="cannot be called 'base' itself"):
        fb.ModelPool({"base": pool["a"]}, base=pool.base)
    with pytest.raises(fb.InputError, match="No tensor's name starts with 'hiden.'"):
        pool.within("hiden.")


def test_building_needs_an_architecture() -> None:
    with pytest.raises(fb.InputError, match="knows tensors only"):
        pool_of([1], [2]).build("m0")


def test_work_in_order_stops_at_the_first_failure() -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 3:
            raise ValueError("three")
        return i * i

    results = in_order(work, range(1000), workers=4)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(begun) < 50


def test_torchs_own_threads_are_as_before_after_work_and_after_a_failure() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(in_order(lambda _: torch.get_num_threads(), range(4), workers=2)) == [1] * 4
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            list(in_order(lambda i: 1 // i, [1, 0], workers=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_budget_bounds_what_is_in_use() -> None:
    budget, used, peak = Budget(100), [0], [0]

    def work(_: int) -> None:
        with budget.use(40):
            used[0] += 40
            peak[0] = max(peak[0], used[0])
            used[0] -= 40

    list(in_order(work, range(200), workers=8))
    assert peak[0] <= 80
    with budget.use(1000):  # more than there is: alone
        pass


class Linear(torch.nn.Linear):
    pass


def test_modules_come_back_as_modules_of_their_class() -> None:
    pool = fb.ModelPool({"a": Linear(2, 2).half()}, base=Linear(2, 2).half().train())
    built = pool.build("a")
    assert isinstance(built, Linear) and built.weight.dtype == torch.float32 and not built.training


def test_modules_that_are_wider_than_the_base_are_not_rounded_to_it() -> None:
    fine = Linear(2, 2)
    pool = fb.ModelPool({"a": fine}, base=Linear(2, 2).half())
    assert pool.build("a").weight.equal(fine.weight)
    of_tables = fb.ModelPool({"a": fine}, base=Linear(2, 2).state_dict())
    assert isinstance(of_tables.build("a"), Linear)


@pytest.mark.parametrize(
    ("models", "options", "line"),
    [
        ([Linear(2, 2)], {}, "a table of models by name; got a list."),
        ({"a": 5}, {}, "a module or its state dict; got a int."),
        ({"a": Linear(2, 2)}, {"nan": "eror"}, "nan must be one of error, warn, ignore; got 'eror'."),
        ({"a": Linear(2, 2)}, {"dtype": "float32"}, "F16, BF16, F32, F64; got 'float32'."),
        ({"a": Linear(2, 2)}, {"dtype": "I64"}, "dtype must be one of"),
    ],
)
def test_what_is_no_pool_is_one_line(models: Any, options: Any, line: str) -> None:
    with pytest.raises(fb.InputError) as error:
        fb.ModelPool(models, **options)
    assert line in str(error.value)


def test_a_merge_of_merges_of_files_is_that_of_merges_in_memory(tmp_path: Path) -> None:
    """Blocks that a merge has read are its own, while a model that is itself a merge reads others."""
    torch.manual_seed(0)
    states = {name: {"w": torch.randn(700, 500)} for name in ("base", "a", "b", "c")}
    folders = {name: fb.save(fb.Checkpoint.of(state), tmp_path / name) for name, state in states.items()}

    def merged(models: Mapping[str, Any]) -> fb.Checkpoint:
        inner = fb.methods.task_arithmetic(fb.ModelPool({n: models[n] for n in "ab"}, base=models["base"]))
        slow = fb.methods.ties_merging(fb.ModelPool({n: models[n] for n in "bc"}, base=models["base"]), trim="tensor")
        pool = fb.ModelPool({"inner": inner, "c": models["c"], "slow": slow}, base=models["base"])
        return fb.methods.task_arithmetic(pool)

    assert merged(folders)["w"].equal(merged(states)["w"])


LLAMA: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6}


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., Path]:
    """A folder of a model with one tensor and this config."""

    def write(name: str, config: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.mark.parametrize(
    ("key", "own", "other"),
    [("num_attention_heads", 2, 4), ("num_key_value_heads", 1, 4), ("hidden_act", "'gelu'", "'silu'")],
)
def test_models_whose_configs_give_their_weights_another_meaning_are_refused(
    described: Callable[..., Path], key: str, own: Any, other: Any
) -> None:
    base = described("base", LLAMA)
    model = described("m", {**LLAMA, key: own.strip("'") if isinstance(own, str) else own})
    line = f"Model 'm': {key} is {own} in its config.json, but {other} in that of the base model: weights of one mean"
    with pytest.raises(fb.InputError, match=line):
        fb.ModelPool({"m": model}, base)
    whole = [described(name, {"text_config": fb.Checkpoint.open(p).config}) for name, p in (("B", base), ("M", model))]
    with pytest.raises(fb.InputError, match=rf"Model 'm': text_config\.{key} is {own}"):
        fb.ModelPool({"m": whole[1]}, whole[0])


def test_what_else_changes_the_computation_is_told_once(
    described: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = {**LLAMA, "rope_theta": 10000.0, "rope_scaling": None}
    model = {
        **LLAMA, "model_type": "mistral", "sliding_window": 4096, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    }  # fmt: skip
    pool = fb.ModelPool({"m": described("m", model)}, described("base", base))
    pool.of(dict(pool), pool.base).load()
    said = {"model_type": "'mistral', 'llama'", "rms_norm_eps": "1e-05, 1e-06", "rope_theta": "1000000.0, 10000.0"}
    assert [record.getMessage() for record in caplog.records] == [
        f"Model 'm': {key} is {values.replace(', ', ' in its config.json, but ')} in that of the base model, "
        "by which what is merged computes."
        for key, values in said.items()
    ]


def test_configs_that_say_the_same_in_other_words_are_not_told_of(
    described: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = {
        **LLAMA, "num_key_value_heads": 4, "hidden_act": "gelu", "rope_theta": 1e4, "rope_scaling": None,
        "sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    model = {
        **LLAMA, "hidden_act": "gelu_pytorch_tanh", "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
        "sliding_window": None, "layer_types": ["full_attention"] * 3, "_name_or_path": "elsewhere", "vocab_size": 9,
    }  # fmt: skip
    fb.ModelPool({"m": described("m", model), "n": described("n", {})}, described("base", base))
    assert caplog.text == ""


def test_every_door_looks_at_configs(
    described: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    base, heads = described("base", LLAMA), described("heads", {**LLAMA, "num_attention_heads": 2})
    described("eps", {**LLAMA, "rms_norm_eps": 1e-5})
    for name in ("heads", "eps"):
        (tmp_path / f"{name}.yaml").write_text(f"base: base\nmodels: {{m: {name}}}\narchitecture: causal_lm\n")
        recipe = "merge_method: linear\nmodels:\n  - {model: base, parameters: {weight: 1}}\n"
        (tmp_path / f"r-{name}.yaml").write_text(f"{recipe}  - {{model: {name}, parameters: {{weight: 1}}}}\n")
    assert main(["merge", "task_arithmetic", str(base), str(heads), "-o", str(tmp_path / "out")]) == 2
    assert "Model 'heads': num_attention_heads is 2" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "r-heads.yaml"), str(tmp_path / "out")]) == 2
    assert "r-heads.yaml:4: 'heads': num_attention_heads is 2 in its config.json" in capsys.readouterr().err
    with pytest.raises(fb.InputError, match="num_attention_heads is 2"):
        fb.load_modelpool(str(tmp_path / "heads.yaml"))
    assert caplog.text == ""
    fb.load_modelpool(str(tmp_path / "eps.yaml"))
    main(["merge", "task_arithmetic", str(base), str(tmp_path / "eps"), "-o", str(tmp_path / "one")])
    main(["merge", str(tmp_path / "r-eps.yaml"), str(tmp_path / "other")])
    assert [record.getMessage().count("rms_norm_eps is 1e-05") for record in caplog.records] == [1, 1, 1]


def test_the_paths_of_a_file_begin_at_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, value in (("mine", 1.0), (".", 2.0)):
        for name in ("base", "m") if folder == "mine" else ("base", "m", "here"):
            place = tmp_path / folder / name
            place.mkdir(parents=True)
            save_file({"w": torch.full((2,), value)}, place / "model.safetensors")
            (place / "config.json").write_text(json.dumps(LLAMA))
    Path("mine/pool.yaml").write_text("base: base\nmodels: {m: m, here: here}\n")
    pool = fb.load_modelpool("mine/pool.yaml")
    assert [model["w"][0].item() for model in pool.inputs.values()] == [1, 1, 2]
    Path("mine/recipe.yaml").write_text(
        "merge_method: linear\nmodels:\n  - {model: m, parameters: {weight: 1}}\n"
        "  - {model: here, parameters: {weight: 1}}\n"
    )
    assert main(["merge", "mine/recipe.yaml", "out"]) == 0
    assert fb.Checkpoint.open("out")["w"].tolist() == [1.5, 1.5]
