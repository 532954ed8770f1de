"""Whether models whose tensors fit compute alike: what their configs say of it, and which tokens their rows are of."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.errors import InputError
from fusionbench.recipes.rows import vocabulary_size
from fusionbench.recipes.tokenizer import files_of

if TYPE_CHECKING:
    from fusionbench.checkpoint import Checkpoint
    from fusionbench.pool import ModelPool

log = logging.getLogger(__name__)
# Keys of configs; with other values of the first, the same weights are those of another model altogether.
REFUSED = (
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"),
    *("encoder_attention_heads", "decoder_attention_heads"),
    *("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj"),
)
TOLD = (
    *("model_type", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    *("sliding_window", "layer_types"),
)
SAME = {
    "swish": "silu",
    # Approximations of one function, and configs of Gemma that name another than is computed.
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_python", "gelu_accurate", "gelu_pytorch_tanh"), "gelu"),
}


def check_pool(pool: ModelPool, *, tokens: bool) -> None:
    """Compare a pool's models with its base, or the first model: `check_config`, and `check_tokens` where asked for."""
    first, *others = pool.inputs
    label = "the base model" if pool.base is not None else f"model '{first}'"
    for name in others:
        check_config(f"Model '{name}'", pool[name], label, pool.reference)
    if tokens:
        check_tokens({f"Model '{name}'": pool[name] for name in others}, label, pool.reference)


def check_config(named: str, model: Checkpoint, label: str, reference: Checkpoint) -> None:
    """Refuse models of other heads or activations, and warn of what else changes what is computed of the same weights.

    Raises:
        InputError: for other numbers of heads, and other activations.
    """
    theirs, ours = model.config, reference.config
    for key, own, other in () if theirs == ours else _differences(theirs, ours):
        said = f"{named}: {key} is {own!r} in its config.json, but {other!r} in that of {label}"
        if key.rpartition(".")[2] in REFUSED:
            raise InputError(f"{said}: weights of one mean nothing in the other. Merge models of one architecture.")
        log.warning("%s, by which what is merged computes.", said)


def check_tokens(models: Mapping[str, Checkpoint], label: str, reference: Checkpoint) -> None:
    """Warn where rows of the same number are of different tokens: those are merged with each other."""
    ours = _tokenizer(reference)
    known: dict[int, str] = {}
    for named, model in models.items() if ours else ():
        theirs = _tokenizer(model)
        if not theirs or theirs == ours:
            continue
        known, own = known or _tokens(ours), _tokens(theirs)
        rows = [size for checkpoint in (model, reference) if (size := vocabulary_size(checkpoint.config))]
        both = sorted(number for number in own if number in known and number < min(rows, default=number + 1))
        differ = [number for number in both if own[number] != known[number]]
        if differ:
            log.warning(
                "%s has other tokens than %s in %s of %s rows that are merged with each other, first %r for %r in row "
                "%s. To merge them by their texts: --vocabulary union (in YAML vocabulary: union).",
                *(named, label, f"{len(differ):,}", f"{len(both):,}", own[differ[0]], known[differ[0]], differ[0]),
            )


def _tokenizer(model: Checkpoint) -> bytes:
    """The content of a model's tokenizer.json; nothing where it has none, or one that cannot be read."""
    file = files_of(model, ["tokenizer.json"]).get("tokenizer.json")
    try:
        return file.read_bytes() if isinstance(file, Path) else file or b""
    except OSError:
        return b""  # it is not merged: whoever needs it says what is wrong


def _tokens(tokenizer: bytes) -> dict[int, str]:
    """The texts of tokens by their ids; none where the file is not as such files are."""
    try:
        table = json.loads(tokenizer)
        vocabulary = table["model"]["vocab"]
        if isinstance(vocabulary, dict):
            found = {int(number): text for text, number in vocabulary.items()}
        else:  # of Unigram: texts with their scores
            found = {number: str(text) for number, (text, _) in enumerate(vocabulary)}
        return found | {int(entry["id"]): entry["content"] for entry in table.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that both have, whose values differ in what is computed; of the parts of whole models, too."""
    both = [(key, theirs[key], ours[key]) for key in theirs if key in ours]
    for part, own, other in both:
        if part.endswith("_config") and isinstance(own, dict) and isinstance(other, dict):
            yield from ((f"{part}.{key}", *values) for key, *values in _differences(own, other))
    own, other = _computed(theirs), _computed(ours)
    yield from ((key, own[key], other[key]) for key in own if key in other and _differ(own[key], other[key]))


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config changes what is computed, whichever version of transformers wrote it."""
    found = {key: config[key] for key in (*REFUSED, *TOLD) if config.get(key) is not None}
    if "num_attention_heads" in found:
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
    if "sliding_window" in config and config.get("use_sliding_window", True):
        found["sliding_window"] = config["sliding_window"]
    else:
        found.pop("sliding_window", None)
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if scaling or "rope_theta" in config:
        scaling = dict(scaling) if isinstance(scaling, dict) else {}
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
        found |= {**theta, "rope_type": kind, **scaling}
    return found


def _differ(own: Any, other: Any) -> bool:
    if isinstance(own, list) and isinstance(other, list) and len(own) != len(other):
        return False  # of stacks of other layers, of which a recipe takes some
    if isinstance(own, str) and isinstance(other, str):
        return SAME.get(own, own) != SAME.get(other, other)
    return own != other
