"""Model pools as the reference implementation of the paper writes them (tanganke/fusion_bench), read as they are.

Their base is the model called `_pretrained_`; a model is a hub id, or a call (`_target_`) with the id among its
arguments; and a file may be put together of others by a `defaults` list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

BASE = "_pretrained_"
# What names a model in a call, an adapter before the base that it is for.
ID_KEYS = ("peft_name", "peft_model_path", "pretrained_model_name_or_path", "model_name", "path")
# Their classes of pools, and the names of older versions.
ARCHITECTURES = {
    "CLIPVisionModelPool": "clip_vision",
    "huggingface_clip_vision": "clip_vision",
    "GPT2ForSequenceClassificationPool": "gpt2",
    "HF_GPT2ForSequenceClassification": "gpt2",
    "Seq2SeqLMPool": "t5",
    "AutoModelForSeq2SeqLMPool": "t5",
    "PeftModelForSeq2SeqLMPool": "t5",
    "NYUv2ModelPool": "resnet",
}


def is_reference(config: Mapping[str, Any]) -> bool:
    """Whether a pool's YAML is in the reference implementation's shape."""
    models = config.get("models")
    has_base = isinstance(models, Mapping) and BASE in models
    return "_target_" in config or "defaults" in config or isinstance(models, list) or has_base


def read(file: Path) -> dict[str, Any]:
    """The pool that a file of theirs describes, in our shape: `base`, `models`, perhaps `architecture`."""
    from omegaconf import OmegaConf

    config = _composed(file)
    raw = OmegaConf.to_container(config)  # what is read of it need not resolve what is not
    assert isinstance(raw, dict)
    if raw.get("platform") not in (None, "hf"):
        raise InputError(
            f"'{file}': platform is {raw['platform']}, but models come from Hugging Face's hub or a folder."
        )
    if not raw.get("models") or raw["models"] == "???":
        raise InputError(f"'{file}' names no models.")
    if not isinstance(raw["models"], Mapping | list):
        raise InputError(f"'{file}': models must be a table by name, or a list of names and paths.")
    models = OmegaConf.to_container(config.models, resolve=True)
    if isinstance(models, list):
        nameless = [model for model in models if not isinstance(model, Mapping) or "name" not in model]
        if nameless:
            raise InputError(f"'{file}': a model of a list needs a name and a path; got {nameless[0]!r}.")
        models = {model["name"]: model for model in models}
    assert isinstance(models, dict)
    located = {str(name): _location(str(name), model, file) for name, model in models.items()}
    pool: dict[str, Any] = {
        "models": {n: at for n, at in located.items() if not (n.startswith("_") and n.endswith("_"))}
    }
    if BASE in located:
        pool["base"] = located[BASE]
    kind = str(raw.get("_target_") or raw.get("type") or "").rpartition(".")[2]
    if kind in ARCHITECTURES:
        pool["architecture"] = ARCHITECTURES[kind]
    return pool


def _location(name: str, model: Any, file: Path) -> str:
    """Where a model is: a hub id becomes `hf:ID`, unless a folder of that name exists."""
    if isinstance(model, Mapping):
        key = next((key for key in ID_KEYS if isinstance(model.get(key), str)), None)
        if key is None:
            raise InputError(f"'{file}': the model '{name}' names no hub id or folder: none of {', '.join(ID_KEYS)}.")
        model = model[key]
    if not isinstance(model, str):
        raise InputError(f"'{file}': the model '{name}' is {model!r}; a hub id or a folder is expected.")
    is_local = Path(model).expanduser().exists() or (file.parent / model).exists()
    return model if is_local or model.startswith(("hf:", "zoo:")) else f"hf:{model}"


def _composed(file: Path, within: tuple[Path, ...] = ()) -> DictConfig:
    """A file with what its `defaults` list names, as Hydra would put it together; data sets are left out."""
    from omegaconf import DictConfig, OmegaConf

    from fusionbench.config import load_yaml

    file = file.absolute()
    if file in within:
        raise InputError(f"'{file}' builds on itself.")
    own = load_yaml(file)
    defaults = own.pop("defaults", None) or []
    defaults = OmegaConf.to_container(defaults) if OmegaConf.is_config(defaults) else defaults
    if not isinstance(defaults, list) or not all(isinstance(e, str) or _is_choice(e) for e in defaults):
        raise InputError(f"'{file}': defaults must be a list of names, or of a group and what is chosen of it.")
    parts: list[Any] = []
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            parts.append(own)
            continue
        group, chosen = next(iter(entry.items())) if isinstance(entry, Mapping) else ("", entry)
        group, at, package = str(group).partition("@")
        if package.endswith("_datasets") or package in ("processor", "tokenizer"):
            continue
        for name in chosen if isinstance(chosen, list) else [chosen]:
            part = _composed(_file_of(file, group.strip("/"), str(name)), (*within, file))
            key = package if at else group.rpartition("/")[2]
            parts.append(OmegaConf.create({key: part}) if key else part)
    merged = OmegaConf.merge(*parts)
    assert isinstance(merged, DictConfig)
    return merged


def _is_choice(entry: Any) -> bool:
    return isinstance(entry, Mapping) and len(entry) == 1


def _file_of(file: Path, group: str, name: str) -> Path:
    """The file of a group, in the nearest folder above that has it."""
    for folder in file.parents:
        found = folder / group / f"{name}.yaml"
        if found.is_file():
            return found
    raise InputError(f"'{file}' builds on '{Path(group) / name}.yaml', which is in no folder above it.")
