"""Recipes run by mergekit, where it is installed (make test-oracle), and here: the same numbers, in float64."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fusionbench.checkpoint import Checkpoint
from fusionbench.cli import main

pytestmark = pytest.mark.oracle
RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models of four layers, whose parameters are far from each other; two of them tied; an adapter."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    for prefix, tied in (("", False), ("tied-", True)):
        config = transformers.LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double()
        start = [parameter.detach().clone() for parameter in model.parameters()]
        for seed, name in enumerate(["base", "a", "b", "c"]):
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), start, strict=True):
                    parameter.copy_(value + (0.3 * torch.randn_like(value) if seed else 0))
            model.save_pretrained(folder / f"{prefix}{name}")
    from safetensors.torch import save_file

    torch.manual_seed(9)
    module = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {module.format(i, x): torch.randn(*s) for i in range(4) for x, s in (("A", (2, 16)), ("B", (16, 2)))}
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapter["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def theirs(recipe: Path, out: Path) -> None:
    options = pytest.importorskip("mergekit.options").MergeOptions(
        allow_crimes=True,
        quiet=True,
        copy_tokenizer=False,
        write_model_card=False,
        lora_merge_cache=str(out.parent / "loras"),
        lora_merge_dtype="float64",
    )
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.scripts import multimerge

    if "---" in recipe.read_text():
        configs, dependencies = multimerge.load_config(recipe.read_text(), str(out.parent / "steps"))
        (out.parent / "steps").mkdir()
        tasks = multimerge.make_tasks(configs, dependencies, options, str(out.parent / "steps"), str(out), False)
        multimerge.Executor(tasks, math_device="cpu", storage_device="cpu").execute()
    else:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text())), str(out), options)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_gives_what_mergekit_gives(
    recipe: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mergekit")
    monkeypatch.chdir(models)
    assert main(["merge", str(recipe), str(tmp_path / "ours")]) == 0
    theirs(recipe, tmp_path / "theirs")
    ours, expected = Checkpoint.open(tmp_path / "ours"), Checkpoint.open(tmp_path / "theirs")
    assert set(ours.specs) == set(expected.specs)
    for name, spec in ours.specs.items():
        assert spec == expected.specs[name]
        exact = spec.dtype == "F64" and "lora" not in recipe.stem  # their adapter's product is in float32
        tolerance = 1e-12 if exact else 1e-6 if spec.dtype == "F64" else 0
        torch.testing.assert_close(ours[name], expected[name], rtol=tolerance, atol=tolerance)
    for key in ("num_hidden_layers", "tie_word_embeddings", "vocab_size", "architectures"):
        assert ours.config[key] == expected.config[key]
    shutil.rmtree(tmp_path / "theirs")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
