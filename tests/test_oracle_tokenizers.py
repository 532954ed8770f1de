"""Tokenizers and embeddings of merges against mergekit's, where it is installed (make test-oracle)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fusionbench as fb
from fusionbench.recipes.build import build
from fusionbench.recipes.vocabulary import TokenizerSettings, TokenRule, aligned

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
NAMES = ("base", "a", "b")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import bytes_tokenizer, special, write_llama

    place = tmp_path_factory.mktemp("models")
    added = {
        "base": [special("<|base|>")],
        "a": [special("<|im_start|>"), special("<|im_end|>"), "plain"],
        "b": [special("<|im_end|>"), special("<|b|>"), special("<|base|>")],
    }
    for seed, name in enumerate(NAMES):
        rows = len(bytes_tokenizer(added[name])) + (3 if name == "b" else 0)  # three of no token
        write_llama(place / name, bytes_tokenizer(added[name]), seed=seed, rows=rows, dtype=torch.float64)
    return place


def merged_by_mergekit(recipe: dict[str, Any], out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)


def rows_by_token(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    found = load_file(folder / "model.safetensors")
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    rows = {f"{name} {text}": found[name][i] for name in found if "layers" not in name and "norm" not in name
            for text, i in vocabulary.items()}  # fmt: skip
    last = max(vocabulary.values()) + 1
    rest = {f"{name} rest": found[name][last:] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    return rows | rest | {name: tensor for name, tensor in found.items() if "layers" in name}


# Theirs, and ours.
CASES: list[tuple[dict[str, Any], TokenizerSettings]] = [
    ({"source": "union"}, TokenizerSettings("union")),
    ({"source": "base"}, TokenizerSettings("base")),
    ({"source": "b"}, TokenizerSettings("b")),
    ({"source": "union", "pad_to_multiple_of": 64}, TokenizerSettings("union", pad_to_multiple_of=64)),
    ({"source": "base", "pad_to_multiple_of": 7}, TokenizerSettings("base", pad_to_multiple_of=7)),
    (
        {
            "source": "union",
            "tokens": {
                "<|im_end|>": {"source": "b", "force": True},
                "<|im_start|>": {"source": {"kind": "zero"}},
                "<|b|>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}, "force": True},
                "new": {"source": {"kind": "model_token", "model": "b", "token": "<|b|>"}},
            },
        },
        TokenizerSettings(
            "union",
            tokens={
                "<|im_end|>": TokenRule("b", force=True),
                "<|im_start|>": TokenRule("zero"),
                "<|b|>": TokenRule(("a", 7), force=True),
                "new": TokenRule(("b", "<|b|>")),
            },
        ),
    ),
]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize(("theirs", "ours"), CASES, ids=lambda case: str(case)[:40])
def test_our_rows_are_theirs(
    folders: Path, tmp_path: Path, theirs: dict[str, Any], ours: TokenizerSettings, method: str
) -> None:
    def placed(value: Any) -> Any:  # names as folders
        if isinstance(value, dict):
            return {key: placed(entry) for key, entry in value.items()}
        return str(folders / value) if value in ("a", "b") else value

    based = method == "task_arithmetic"
    if not based and theirs["source"] == "base":
        pytest.skip("without a base_model, theirs is any of the models, by the order of a set")
    listed = [{"model": str(folders / name), "parameters": {"weight": 0.5}} for name in (NAMES[1:] if based else NAMES)]
    recipe = {"merge_method": method, "models": listed, "dtype": "float64", "tokenizer": placed(theirs)}
    if based:
        recipe["base_model"] = str(folders / "base")
    merged_by_mergekit(recipe, tmp_path / "theirs")

    models = {name: fb.Checkpoint.open(folders / name) for name in NAMES}
    fitted, _ = aligned(models, "base" if based else None, ours)
    base = fitted.pop("base") if based else None
    pool = fb.ModelPool(fitted, base)
    if based:
        merged = fb.algorithm("task_arithmetic", scaling_factor=0.5).run(pool)
    else:
        merged = fb.algorithm("linear", weights=[0.5] * 3, normalize=True).run(pool)
    fb.save(merged, tmp_path / "ours")

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    fb.save(build(tmp_path / "recipe.yaml").checkpoint, tmp_path / "by recipe")

    expected = rows_by_token(tmp_path / "theirs")
    for place in ("ours", "by recipe"):
        found = rows_by_token(tmp_path / place)
        assert found.keys() == expected.keys() and len(found) > 500
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14, msg=f"{place}: {name}")
        size = fb.Checkpoint.open(tmp_path / place).config["vocab_size"]
        assert size == fb.Checkpoint.open(tmp_path / "theirs").config["vocab_size"]
