"""The model card of a merged model: README.md, with the front matter that model hubs read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fusionbench
from fusionbench.checkpoint import Checkpoint
from fusionbench.registry import list_methods

FILE = "README.md"
LICENSE = ("license", "license_name", "license_link")
LONGEST = 1_000_000  # bytes of a card that is read
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # where the hub's client keeps what it has downloaded
ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")

# Our methods of the same papers, where mergekit's recipes have other names.
OURS = {
    "breadcrumbs_ties": "breadcrumbs",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "della_linear": "della",
    "karcher": "karcher_mean",
    "ties": "ties_merging",
}


def model_card(
    checkpoint: Checkpoint,
    command: Sequence[str],
    *,
    methods: Sequence[str] = (),
    recipe: str = "",
    weights: Mapping[str, object] | None = None,
) -> bytes:
    """README.md: what the model was made of, and how, so that it can be made again.

    It depends on nothing but its arguments, the cards of the inputs and the version: a merge that goes on after a kill
    ends with the same bytes. Nothing is asked of the network: what is known to be on the hub is what came from there.

    Args:
        checkpoint: the result, with its recipe and inputs.
        command: the words that made it, without places and settings that change nothing in it.
        methods: by their names, where the checkpoint's recipe does not say it.
        recipe: YAML; of the checkpoint's own recipe where it is empty.
        weights: of models, by name, where there is one number for each.
    """
    models = leaves(checkpoint)
    methods = list(methods) or [checkpoint.recipe["method"]] if "method" in checkpoint.recipe or methods else []
    weights = _weights(checkpoint) if weights is None else weights
    front: dict[str, Any] = {}
    on_hub = list(dict.fromkeys(found for model in models.values() if (found := hub_id(model))))
    if on_hub:
        front |= {"base_model": on_hub, "base_model_relation": "merge"}
    if "model_type" in checkpoint.config:
        front["library_name"] = "transformers"
    front |= _license([model.folder for model in models.values()])
    front["tags"] = ["merge", "fusionbench", *methods]
    others = [Path(name).name for name in models if name != "base"] or list(models)
    title = f"A merge of {_listed(others)}"
    lines = ["---", _yaml(front).rstrip(), "---", f"# {title}", "", _made_by(methods), ""]
    lines += ["| model | weight | from |", "| --- | ---: | --- |"] if weights else ["| model | from |", "| --- | --- |"]
    for name, model in models.items():
        cells = [name, *([str(weights.get(name, ""))] if weights else []), _origin(model)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if "auto_map" in checkpoint.config:
        lines += [
            "",
            "The models come with code of their own, which is not copied: take the `.py` files from one of them.",
        ]
    text = recipe or _yaml(_described(checkpoint, models))
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    lines += [
        "",
        f"Made with fusionbench {fusionbench.__version__} by",
        "",
        "```sh",
        shlex.join(command),
        "```",
        "",
    ]
    lines += ["of the recipe", "", f"{fence}yaml", text.rstrip(), fence, ""]
    lines += ["`recipe.json` has a hash of every input, `manifest.json` of every tensor (`fusionbench verify`).", ""]
    return "\n".join(lines).encode()


def leaves(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The models that were read to make a checkpoint, by name; those of its inputs where these were made themselves."""
    found: dict[str, Checkpoint] = {}
    for name, model in checkpoint.inputs.items():
        while "vocabulary" in model.recipe:  # the same model with rows for other tokens
            model = model.inputs[model.recipe["model"]]
        for inner, leaf in leaves(model).items() if model.inputs else ((name, model),):
            if leaf.location not in [known.location for known in found.values()] or not leaf.location:
                found[inner if inner not in found else f"{name}/{inner}"] = leaf
    return found


def hub_id(model: Checkpoint) -> str:
    """A model's name on the hub, where it came from there; empty where that is not known."""
    place = model.location.removeprefix("hf:")
    cached = CACHED.search(f"{model.location}/")
    found = place if place != model.location else "/".join(cached.groups()) if cached else ""
    return found if ID.fullmatch(found) else ""


def _origin(model: Checkpoint) -> str:
    known = hub_id(model)
    return f"[{known}](https://huggingface.co/{known})" if known else f"`{model.location or 'memory'}`"


def _made_by(methods: Sequence[str]) -> str:
    if not methods:
        return "Made by fusionbench of these models, without training:"
    known = {method.name: method for method in list_methods()}
    said = []
    for name in methods:
        method = known.get(OURS.get(name, name))
        paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if method and method.paper else ""
        said.append(f"`{name}`{paper}")
    return f"Made by {_listed(said)} of these models, without training:"


def _weights(checkpoint: Checkpoint) -> dict[str, object]:
    """One number for each model, where the method was given them."""
    models = [name for name in checkpoint.inputs if name != "base"]
    given = checkpoint.recipe.get("hyperparameters", {}).get("weights")
    if isinstance(given, Mapping):
        return dict(given)
    return (
        dict(zip(models, given, strict=True)) if isinstance(given, list | tuple) and len(given) == len(models) else {}
    )


def _described(checkpoint: Checkpoint, models: Mapping[str, Checkpoint]) -> dict[str, Any]:
    recipe = {key: value for key, value in checkpoint.recipe.items() if key in ("method", "hyperparameters")}
    return {**recipe, "models": {name: model.location for name, model in models.items()}}


def _license(folders: Sequence[Path | None]) -> dict[str, Any]:
    """The licence that the cards of all models name."""
    cards = [_front_matter(folder) for folder in folders]
    found = [{key: card[key] for key in LICENSE if key in card} for card in cards]
    return found[0] if found and "license" in found[0] and all(other == found[0] for other in found) else {}


def _front_matter(folder: Path | None) -> dict[str, Any]:
    """What a model's own card says for machines; nothing where it has none, or one that cannot be read."""
    import yaml

    card = None if folder is None else folder / FILE
    try:
        if card is None or not card.is_file() or card.stat().st_size > LONGEST:
            return {}
        text = card.read_bytes().decode()
        found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s", text + "\n", re.DOTALL)
        content = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"


def _yaml(table: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_plain(table), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    """Tables and lists only, as YAML has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
