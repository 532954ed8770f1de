"""Mixtures of experts against mergekit-moe's, where it is installed (make test-oracle)."""

from pathlib import Path

import pytest
import torch

import fusionbench as fb

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
PROMPTS = """
experts:
  - source_model: {place}/a
    positive_prompts: [the good film, hello world]
    negative_prompts: ["bad mail ?"]
    residual_scale: 0.5
  - source_model: {place}/b
    positive_prompts: [maybe, the bad mail is bad, "12 34"]
"""
SHARED = {
    "mixtral": "",
    "qwen": "shared_experts:\n  - {{source_model: {place}/base, positive_prompts: [yes no]}}\n",
    "deepseek": "shared_experts:\n  - {{source_model: {place}/base, residual_scale: 0.25}}\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import bytes_tokenizer, write_llama

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(folder / name, bytes_tokenizer(), seed=seed, initializer_range=0.3)
    return folder


def made_by_mergekit(recipe: str, out: Path) -> Path:
    import yaml
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    options = MergeOptions(write_model_card=False, quiet=True)
    build(MoEMergeConfig.model_validate(yaml.safe_load(recipe)), str(out), options, device="cpu")
    return out


def made_by_us(recipe: str, folder: Path) -> Path:
    from fusionbench.recipes.moe import build_moe, read_moe

    (folder / "recipe.yaml").write_text(recipe)
    return fb.save(build_moe(read_moe(folder / "recipe.yaml")), folder / "ours")


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
@pytest.mark.parametrize("architecture", SHARED)
def test_a_recipe_makes_what_it_makes_there(mode: str, architecture: str, place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    recipe = f"base_model: {place}/base\narchitecture: {architecture}\ngate_mode: {mode}\ndtype: float32\n"
    recipe += (PROMPTS + SHARED[architecture]).format(place=place)
    folders = made_by_mergekit(recipe, tmp_path / "theirs"), made_by_us(recipe, tmp_path)
    if architecture == "deepseek":  # theirs is a class that transformers does not have
        theirs, ours = (load_file(folder / "model.safetensors") for folder in folders)
        ours = {name: tensor for name, tensor in ours.items() if not name.endswith("e_score_correction_bias")}
    else:
        theirs, ours = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict() for f in folders)
    if architecture == "qwen":  # they give a Llama, which has no biases, some that are zero
        theirs = {name: tensor for name, tensor in theirs.items() if name in ours or tensor.any()}
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if "gate." in name and mode == "hidden":  # they run the model in bfloat16
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0.02)
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6 if "gate." in name else 0)
