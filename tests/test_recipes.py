"""Recipes: what is wrong in them is told at once, and what is right is numbers that one can check by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fusionbench as fb
from fusionbench.cli import main
from fusionbench.recipes.build import build
from fusionbench.recipes.methods import METHODS


def write(folder: Path, name: str, value: float, *, layers: int = 3, vocabulary: int = 4, dtype=torch.float64, **more):
    """A model of a few layers, all of whose elements are one number."""
    shapes = {"embed_tokens.weight": (vocabulary, 2), "norm.weight": (2,), "lm_head.weight": (vocabulary, 2)}
    for i in range(layers):
        shapes |= {f"layers.{i}.attn.weight": (2, 2), f"layers.{i}.mlp.weight": (3, 2)}
    tensors = {f"model.{n}": torch.full(shape, value, dtype=dtype) for n, shape in shapes.items()}
    (folder / name).mkdir()
    save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    config = {"num_hidden_layers": layers, "vocab_size": vocabulary, "torch_dtype": "float64", **more}
    (folder / name / "config.json").write_text(json.dumps(config))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("base", 1.0), ("a", 2.0), ("b", 4.0), ("c", 8.0)):
        write(tmp_path, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(text: str, **options) -> fb.Checkpoint:
    Path("recipe.yaml").write_text(text)
    return build("recipe.yaml", **options).checkpoint


def wrong(text: str) -> list[str]:
    """The lines that are told of a recipe, without the name of the file."""
    Path("recipe.yaml").write_text(text)
    with pytest.raises(fb.InputError) as error:
        build("recipe.yaml")
    lines = str(error.value).splitlines()
    assert all(line.startswith("recipe.yaml:") for line in lines), lines
    return [line.removeprefix("recipe.yaml:") for line in lines]


def first(checkpoint: fb.Checkpoint) -> dict[str, float]:
    """The first element of every tensor, without what names begin with."""
    return {name.removeprefix("model."): float(tensor.flatten()[0]) for name, tensor in checkpoint.items()}


LINEAR = "merge_method: linear\nmodels:\n  - model: a\n  - model: b\nparameters:\n"


def test_values_are_of_the_nearest_scope(models: Path) -> None:
    found = first(
        merged(
            """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: a, layer_range: [0, 1], parameters: {weight: 2}}
      - {model: b, layer_range: [0, 1]}
    parameters: {weight: 3}
  - sources:
      - {model: base, layer_range: [1, 3]}
      - {model: a, layer_range: [1, 3]}
parameters:
  weight: [{filter: mlp, value: 5}, {value: 7}]
"""
        )
    )
    assert found["layers.0.attn.weight"] == 1 + 2 * 1 + 3 * 3  # of a source, and of its slice
    assert found["layers.1.mlp.weight"] == 1 + 5 and found["layers.2.attn.weight"] == 1 + 7
    assert found["embed_tokens.weight"] == 1 + 2 * 1 + 3 * 3  # as the first slice
    assert found["norm.weight"] == found["lm_head.weight"] == 1 + 7  # as the last


def test_a_gradient_goes_over_the_layers_of_a_slice(models: Path) -> None:
    found = first(
        merged(LINEAR + "  weight: [{filter: attn, value: [0.0, 1, 0]}, {value: [1, 3]}]\n  normalize: false\n")
    )
    assert [found[f"layers.{i}.attn.weight"] for i in range(3)] == [0, 6, 0]
    assert [found[f"layers.{i}.mlp.weight"] for i in range(3)] == [6, 12, 18]
    assert found["embed_tokens.weight"] == found["lm_head.weight"] == 6  # what is in no layer is at the beginning


def test_a_slice_of_one_layer_is_at_the_end_of_a_gradient(models: Path) -> None:
    slices = "slices:\n  - sources: [{model: a, layer_range: [2, 3]}]\n"
    found = merged(f"merge_method: passthrough\n{slices}parameters: {{scale: [1, 5]}}")
    assert first(found)["layers.0.mlp.weight"] == 10 and first(found)["norm.weight"] == 2
    assert found.config["num_hidden_layers"] == 1


def test_the_first_filter_that_fits_holds(models: Path) -> None:
    weights = "[{filter: layers.1, value: 10}, {filter: mlp, value: 100}, {filter: '*', value: 1}]"
    found = first(merged(LINEAR + f"  weight: {weights}\n  normalize: false\n"))
    assert found["layers.1.mlp.weight"] == 60 and found["layers.0.mlp.weight"] == 600 and found["norm.weight"] == 6


def test_layers_are_repeated_and_left_out(models: Path) -> None:
    write(models, "deep", 3.0, layers=5)
    parts = [("a", 1, 3), ("deep", 3, 5), ("b", 0, 1), ("a", 1, 2)]
    slices = "".join(f"  - sources: [{{model: {m}, layer_range: [{i}, {j}]}}]\n" for m, i, j in parts)
    found = merged(f"merge_method: passthrough\nslices:\n{slices}")
    assert [first(found)[f"layers.{i}.mlp.weight"] for i in range(6)] == [2, 2, 3, 3, 4, 2]
    assert "model.layers.6.mlp.weight" not in found and found.config["num_hidden_layers"] == 6
    assert not found.aliases  # a layer that is taken twice is two
    assert set(found.inputs) == {"a", "b", "deep"}


def test_lists_of_the_config_with_an_entry_a_layer_follow_their_models(models: Path) -> None:
    write(models, "x", 1.0, layers=2, layer_types=["full", "sliding"])
    write(models, "y", 1.0, layers=3, layer_types=["p", "q", "r"])
    found = merged(
        "merge_method: passthrough\nslices:\n  - sources: [{model: x, layer_range: [0, 2]}]\n"
        "  - sources: [{model: y, layer_range: [2, 3]}]\n"
    )
    assert found.config["layer_types"] == ["full", "sliding", "r"]


def test_documents_feed_each_other_without_files(models: Path) -> None:
    steps = (
        "name: sum\nmerge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: sum}, {model: c}]\nparameters: {weight: 0.5}\n",
    )
    found = merged("---\n".join(steps))
    assert set(first(found).values()) == {0.5 * (1 + 1 + 3) + 0.5 * 8}
    assert set(found.inputs) == {"base", "a", "b", "c"}
    assert main(["merge", "recipe.yaml", "out"]) == 0
    Path("one.yaml").write_text(steps[0].replace("name: sum\n", ""))
    Path("two.yaml").write_text(steps[1])
    assert main(["merge", "one.yaml", "sum"]) == 0 and main(["merge", "two.yaml", "out2"]) == 0
    assert fb.Checkpoint.open("out").digest == fb.Checkpoint.open("out2").digest
    again = merged("---\n".join(reversed(steps)))  # in any order
    assert again.digest == found.digest


def test_an_adapter_is_put_on_its_model(models: Path) -> None:
    (models / "adapter").mkdir()
    lora = {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}
    named = {f"base_model.model.model.layers.0.attn.lora_{x}.weight": tensor for x, tensor in lora.items()}
    save_file(named, models / "adapter" / "adapter_model.safetensors")
    (models / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 3}')
    found = merged("merge_method: passthrough\nmodels: [{model: a+adapter}]\ndtype: float64")
    assert first(found)["layers.0.attn.weight"] == 5 and first(found)["layers.1.attn.weight"] == 2
    assert found.specs["model.layers.0.attn.weight"].dtype == "F64"
    twice = merged(
        "name: x\nmerge_method: passthrough\nmodels: [{model: a}]\n---\n"
        "merge_method: passthrough\nmodels: [{model: x+adapter}]\n"
    )
    assert first(twice)["layers.0.attn.weight"] == 5


def test_the_result_is_rounded_once_to_out_dtype(models: Path) -> None:
    x = {"model.w": torch.tensor([1 + 2**-8 + 2**-30], dtype=torch.float64)}  # half-way for bfloat16, but for a bit
    for name in ("x", "y"):
        save_file(x, f"{name}.safetensors")
    text = "merge_method: linear\nmodels: [{model: x.safetensors}, {model: y.safetensors}]\nparameters: {weight: 1}\n"
    found = merged(text + "dtype: float32\nout_dtype: bfloat16\n")
    assert found.specs["model.w"].dtype == "BF16"
    assert float(found["model.w"]) == 1 + 2**-7  # by way of float32 it would be 1
    assert merged(text).specs["model.w"].dtype == "F64"
    found = merged(LINEAR + "  weight: 1\nout_dtype: float16")
    assert found.config["torch_dtype"] == "float16" and {spec.dtype for spec in found.specs.values()} == {"F16"}


def test_a_method_of_ours_has_its_own_convention(models: Path) -> None:
    text = "convention: paper\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    ours = merged(f"{text}merge_method: ties_merging\nparameters: {{scaling_factor: 1, density: 1.0, merge: mean}}\n")
    assert set(first(ours).values()) == {1 + (1 + 3) / 2}
    stacked = (
        "convention: paper\nmerge_method: depth_upscaling\nmodels: [{model: a}]\nparameters: {layers: '0:2+1:3'}\n"
    )
    deep = merged(stacked + "dtype: float32\n")
    assert deep.config == {"num_hidden_layers": 4, "vocab_size": 4, "torch_dtype": "float32"}
    assert main(["merge", "recipe.yaml", "out"]) == 0
    assert fb.Checkpoint.open("out").specs["model.layers.3.attn.weight"].dtype == "F32"
    assert wrong(text + "merge_method: ties\n") == [
        "4: by convention: paper, the methods are ours: No method is called 'ties'. Did you mean 'ties_merging'?"
    ]
    assert wrong(text + "merge_method: fisher_merging\n") == [
        "4: fisher_merging looks at calibration data: use fusionbench run, with a task pool."
    ]
    assert wrong(text + "merge_method: ties_merging\nparameters: {density: 2, lambda: 1}\n") == [
        "5: ties_merging takes no 'lambda'. There is: density, elect, merge, scaling_factor, trim.",
        "5: ties_merging.density must be in (0, 1]; got 2.",
    ]
    assert wrong(stacked.replace("layers: '0:2+1:3'", "")) == [
        "2: depth_upscaling needs 'layers': those to stack, counted from 0, ends left out: 0:24+8:32 is SOLAR's, of 32 "
        "layers."
    ]


def test_tied_embeddings_stay_tied_and_are_written_once(models: Path) -> None:
    for name, value in (("t0", 1.0), ("t1", 3.0)):
        (models / name).mkdir()
        tensors = {"model.embed_tokens.weight": torch.full((4, 2), value), "model.layers.0.w": torch.full((2,), value)}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, models / name / "model.safetensors")
        config = {"num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": 4}
        (models / name / "config.json").write_text(json.dumps(config))
    weights = "[{filter: lm_head, value: 3}, {value: 1}]"
    found = merged(f"merge_method: linear\nmodels: [{{model: t0}}, {{model: t1}}]\nparameters: {{weight: {weights}}}")
    assert set(found.specs) == {"model.embed_tokens.weight", "model.layers.0.w"}
    assert found.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    slices = "".join(f"  - sources: [{{model: t{i}, layer_range: [0, 1]}}]\n" for i in (0, 1))
    deep = merged(f"merge_method: passthrough\nslices:\n{slices}")
    assert float(deep["lm_head.weight"][0, 0]) == 1 and len(deep.specs) == 3


HEAD = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n"
CASES = [case.partition("\n") for case in (Path(__file__).parent / "wrong_recipes.txt").read_text().split("### ")[1:]]


@pytest.mark.parametrize("case", [case for _, _, case in CASES], ids=[title for title, _, _ in CASES])
def test_what_is_wrong_is_told_with_its_line(case: str, models: Path) -> None:
    recipe, *said = case.rstrip().split("\n=> ")
    assert wrong(recipe + "\n") == said


def test_models_that_do_not_fit_are_told_with_their_sizes(models: Path) -> None:
    write(models, "more", 1.0, vocabulary=5)
    write(models, "deep", 1.0, layers=5)
    write(models, "head", 1.0)
    for name, entry in (("head", "model.layers.0.bias"),):
        tensors = dict(fb.Checkpoint.open(name)) | {entry: torch.ones(2)}
        save_file(tensors, models / name / "model.safetensors")
    listed = "".join(f"  - model: {name}\n" for name in ("a", "more", "deep", "head"))
    assert wrong(f"merge_method: linear\nmodels:\n{listed}parameters: {{weight: 1}}\n") == [
        "5: 'deep' has 5 layers in model.layers, and the first 3: give slices of as many layers each.",
        "6: 'head' has 'model.layers.0.bias', which others lack.",
    ]
    assert wrong("merge_method: linear\nmodels:\n  - model: a\n  - model: more\nparameters: {weight: 1}\n") == [
        "4: 'more': 'model.embed_tokens.weight' is (5, 2), but (4, 2) in 'a': give tokenizer: {source: union}, or "
        "vocabulary: truncate, pad or union."
    ]
    parts = "".join(f"  - sources: [{{model: {name}, layer_range: [0, 1]}}]\n" for name in ("a", "more"))
    assert wrong(f"merge_method: passthrough\nslices:\n{parts}") == [
        "4: 'more': 'model.lm_head.weight' is (5, 2), but (4, 2) in 'a': give tokenizer: {source: union}, or "
        "vocabulary: truncate, pad or union."
    ]
    found = merged(
        "merge_method: linear\nmodels:\n  - model: a\n  - model: more\nparameters: {weight: 1}\nvocabulary: pad\n"
    )
    assert found.specs["model.lm_head.weight"].shape == (5, 2) and found.config["vocab_size"] == 5


@pytest.mark.parametrize("how", ["config", "tensor", "int8"])
def test_quantised_models_are_refused(how: str, models: Path) -> None:
    more = {"quantization_config": {"quant_method": "gptq"}} if how == "config" else {}
    write(models, "q", 1.0, **more)
    if how != "config":
        tensors = dict(fb.Checkpoint.open("q"))
        tensors |= (
            {"model.x.weight_scale": torch.ones(1)} if how == "tensor" else {"model.x": torch.ones(1, dtype=torch.int8)}
        )
        save_file(tensors, models / "q" / "model.safetensors")
    [line] = wrong("merge_method: linear\nmodels:\n  - model: a\n  - model: q\nparameters: {weight: 1}\n")
    reason = {"config": "gptq", "tensor": "'model.x.weight_scale' is F32 (1,)", "int8": "'model.x' is I8 (1,)"}[how]
    assert line.startswith(
        f"4: 'q' is quantised ({reason}), and such numbers cannot be merged: name the model that it was"
    )


TIES = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, density: [0.3, 0.9]}
  - model: b
    parameters: {weight: 0.5, density: 0.5}
"""


@pytest.fixture
def random_models(models: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        random = {n: torch.randn_like(tensor) for n, tensor in fb.Checkpoint.open(name).items()}
        save_file(random, models / name / "model.safetensors")
    return models


def test_what_is_written_can_be_verified_by_its_recipe(random_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = "name: sum\n" + TIES + "---\nmerge_method: dare_linear\nbase_model: a\nmodels:\n  - model: sum\nseed: 3\n"
    Path("recipe.yaml").write_text(steps + "parameters: {weight: 1, density: 0.5}\nout_dtype: float32\n")
    assert main(["merge", "recipe.yaml", "-o", "out"]) == 0
    assert json.loads(Path("out/recipe.json").read_text())["hyperparameters"]["text"] == Path("recipe.yaml").read_text()
    Path("recipe.yaml").unlink()
    assert main(["verify", "out", "--inputs", "--samples", "99"]) == 0
    assert "the recipe gives 9 of them again" in capsys.readouterr().out
    changed = {n: tensor + 1 for n, tensor in fb.Checkpoint.open("b").items()}
    save_file(changed, "b/model.safetensors")
    assert main(["verify", "out", "--inputs"]) == 1


def test_options_of_the_command_change_no_number(random_models: Path) -> None:
    Path("recipe.yaml").write_text(TIES)
    assert main(["merge", "recipe.yaml", "out"]) == 0
    words = ["--memory", "1MB", "--workers", "2", "--executor", "processes", "--shard-size", "200", "--nan", "ignore"]
    assert main(["merge", "recipe.yaml", "-o", "other", *words]) == 0
    assert len(list(Path("other").glob("*.safetensors"))) > 1
    assert fb.Checkpoint.open("out").digest == fb.Checkpoint.open("other").digest
    assert main(["merge", "recipe.yaml", "out", "--overwrite"]) == 0


def test_numbers_that_are_none_are_refused_with_their_model(
    random_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(fb.Checkpoint.open("b"))
    tensors["model.norm.weight"][1] = torch.nan
    save_file(tensors, "b/model.safetensors")
    Path("recipe.yaml").write_text(TIES)
    assert main(["merge", "recipe.yaml", "out"]) == 2
    assert "Model 'b': 'model.norm.weight' contains NaN or Inf." in capsys.readouterr().err
    assert main(["merge", "recipe.yaml", "out", "--nan", "ignore"]) == 0


def test_what_was_killed_goes_on(random_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionbench import units

    Path("recipe.yaml").write_text(TIES)
    assert main(["merge", "recipe.yaml", "whole"]) == 0
    done: list[str] = []
    write_at = units.write_at

    def killed(descriptor: int, data: memoryview, offset: int) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append("")
        write_at(descriptor, data, offset)

    monkeypatch.setattr(units, "write_at", killed)
    assert main(["merge", "recipe.yaml", "out", "--workers", "1"]) == 130
    assert not Path("out").exists()
    left = len(list(Path().glob(".out*")))
    monkeypatch.setattr(units, "write_at", write_at)
    assert left and main(["merge", "recipe.yaml", "out", "--workers", "2"]) == 0
    assert not list(Path().glob(".out*"))
    assert fb.Checkpoint.open("out").digest == fb.Checkpoint.open("whole").digest


def test_a_recipe_needs_no_torch(random_models: Path) -> None:
    Path("recipe.yaml").write_text(TIES)
    code = (
        "import sys; from fusionbench.cli import main; assert main(['merge', 'recipe.yaml', 'out']) == 0;"
        "assert main(['merge', 'recipe.yaml', '--dry-run']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_dry_run_tells_what_would_be_done(random_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(TIES)
    before = sorted(Path().rglob("*"))
    assert main(["merge", "recipe.yaml", "--dry-run", "--memory", "10MB", "--workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ties: 9 tensors in 3 groups of the same values, of base, a, b"
    size = 8 * (8 + 2 + 8 + 3 * (4 + 6))
    assert lines[1] == f"reads:   {3 * size:,} bytes" and lines[2] == f"writes:  {size:,} bytes in 9 tensors"
    assert lines[3] == "memory:  10 MB for blocks in flight, in 2 threads or processes"
    assert lines[4].startswith("seconds: about 0.0") and "elements a second, as measured now" in lines[4]
    assert sorted(Path().rglob("*")) == before


def test_what_the_base_is_given_in_vain_is_warned_of(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    merged(
        "merge_method: ties\nbase_model: base\nmodels:\n  - {model: base, parameters: {weight: 1}}\n"
        "  - {model: a, parameters: {weight: 1}}\n"
    )
    assert caplog.messages == ["recipe.yaml:4: ties has no weight of the base model: it has no effect."]


def test_words_of_the_command_are_checked(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(TIES)
    for words, said in (
        (["recipe.yaml"], "Name the folder to write: -o OUT."),
        (["none.yaml", "out"], "'none.yaml' does not exist"),
        (["recipe.yaml", "out", "more"], "A recipe takes one folder to write"),
        (["recipe.yaml", "out", "--align", "weight_matching"], "A recipe's models are not aligned"),
        (["recipe.yaml", "a"], "'a' exists and is not empty"),
        (["linear", "a", "b"], "Name the folder to write: -o OUT."),
        (["linear", "a", "b", "-o", "out", "--dry-run"], "--dry-run is for recipes"),
    ):
        assert main(["merge", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_many_tensors_take_time_in_proportion(models: Path) -> None:
    """Four times the tensors, each with a group of its own: less than ten times the function calls."""

    def calls(layers: int) -> int:
        import cProfile

        write(models, f"x{layers}", 1.0, layers=layers)
        write(models, f"y{layers}", 2.0, layers=layers)
        Path("recipe.yaml").write_text(
            f"merge_method: linear\nmodels: [{{model: x{layers}}}, {{model: y{layers}}}]\n"
            "parameters: {weight: [{filter: attn, value: [1, 2]}, {value: [2, 1]}]}\n"
        )
        profile = cProfile.Profile()
        profile.runcall(build, "recipe.yaml")
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(80) < 6 * calls(20)


def test_random_methods_keep_what_they_are_told(models: Path) -> None:
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 3.0)):
        tensor = torch.full((300, 200), value, dtype=torch.float64)
        if value:
            tensor = tensor * (1 + torch.arange(200) / 1000)
        save_file({"model.layers.0.w": tensor}, models / name / "model.safetensors")
    text = "base_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [%s], density: 0.3%s}\nseed: %d\n"
    found = merged("merge_method: dare_linear\n" + text % (1, "", 0))["model.layers.0.w"]
    sums = [float(fb.Checkpoint.open(name)["model.layers.0.w"].sum()) for name in "ab"]
    assert float(found.sum()) == pytest.approx(sum(sums), rel=1e-9)  # L1 norms are restored exactly
    kept = float((found > 5).double().mean())  # what b has, times about 1 / 0.3
    assert kept == pytest.approx(0.3, abs=0.01)
    assert (merged("merge_method: dare_linear\n" + text % (1, "", 1))["model.layers.0.w"] != found).any()
    one = "merge_method: della_linear\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1, density: 0.4, "
    found = merged(one + "epsilon: 0.3, rescale: false}")["model.layers.0.w"]
    share = (found != 0).double().mean(0)  # of columns, whose magnitudes grow
    assert float(share.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(share[:20].mean()) == pytest.approx(0.13, abs=0.03)
    assert float(share[-20:].mean()) == pytest.approx(0.67, abs=0.03)


def test_every_method_and_parameter_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert len(METHODS) == 19 and all(f"`{name}`" in text for name in METHODS)
    assert all(f"`{key}" in text for key in ("int8_mask", "seed", "convention", "vocabulary", "modules"))


def test_no_weight_is_read_before_all_is_checked(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("fusionbench.formats.SafetensorsFile.read_into", read)
    recipes = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
    built = build_all(recipes)
    assert built > 20
    wrong(HEAD + "parameters: {weight: [{filter: atn, value: 1}]}\n")


def build_all(recipes: list[Path]) -> int:
    """How many recipes of the oracle's can be built with models of three layers, without reading them."""
    for name, value in (("tied-base", 1.0), ("tied-a", 2.0), ("tied-b", 3.0)):
        write(Path.cwd(), name, value)
    for name in ("base", "a", "b", "c"):
        for file in Path(name).iterdir():
            file.unlink()
        Path(name).rmdir()
        write(Path.cwd(), name, 1.0, layers=4)
    count = 0
    for recipe in recipes:
        try:
            build(recipe)
        except fb.InputError as error:
            assert "filter" in str(error) or "adapter" in str(error)
        else:
            count += 1
    return count
