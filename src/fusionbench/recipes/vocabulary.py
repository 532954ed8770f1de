"""Models of different vocabularies, made to fit: by the texts of their tokens, or by the numbers of rows alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fusionbench.checkpoint import Checkpoint, File
from fusionbench.errors import InputError, did_you_mean, is_count
from fusionbench.formats import read_config, read_table
from fusionbench.locations import find
from fusionbench.recipes.rows import PADDING, Plan, reordered, vocabulary_size
from fusionbench.recipes.tokenizer import READ, Tokenizer, as_json, carried, folder_files, table_of

if TYPE_CHECKING:
    from tokenizers import AddedToken

log = logging.getLogger(__name__)
WAYS = ("truncate", "pad", "union")
IDS = ("_token_id", "_token_ids", "_token_index")  # how a config's keys for single tokens end

Row = tuple[str, int]
"""A model's name, and a row of its embedding."""


@dataclass(frozen=True)
class TokenRule:
    """Where a token's embedding comes from.

    Attributes:
        source: a model's name, for its embedding of the same token; "zero"; a model's name and a token's id or text,
            for its embedding of that; or None, for the rule that holds for tokens of which nothing is said.
        force: also in models that have the token.
    """

    source: str | tuple[str, int | str] | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer a merged model has, and what the embeddings of its tokens are.

    Attributes:
        source: "base" for the base's; "union" for the base's with all tokens that only others have; or that of a model,
            by name or folder.
        pad_to_multiple_of: of the number of rows; those that are added are the mean of all others.
        tokens: rules for single tokens, which are added where the tokenizer lacks them.
    """

    source: str = "base"
    pad_to_multiple_of: int | None = None
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)


def aligned(
    models: Mapping[str, Checkpoint], base_name: str | None, settings: TokenizerSettings
) -> tuple[dict[str, Checkpoint], dict[str, File]]:
    """The models with one vocabulary, read when they are asked for, and the files that make its tokenizer.

    A token that a model lacks has there the base's embedding; that of the only model that has it; or the mean of those
    of all that do, in float64. Models without a tokenizer have the base's. Rows of no token are left out.

    Args:
        models: by name, the base among them, all with a `config.json`.
        base_name: which is the base; None where there is none, and the first has the tokenizer that is built upon.
        settings: which tokenizer.

    Returns:
        The models under the same names; and of the files for the merged model's folder those that differ from what is
        in the base's (or the first model's), which the models carry too.

    Raises:
        InputError: for a tokenizer that is missing or unreadable, a rule that cannot be followed.
    """
    first = base_name or next(iter(models))
    if first not in models:
        raise InputError(f"The base '{first}' is not among the models. {did_you_mean(first, models)}")
    if settings.pad_to_multiple_of is not None and not is_count(settings.pad_to_multiple_of):
        given = settings.pad_to_multiple_of
        raise InputError(f"pad_to_multiple_of must be a whole number of 1 or more; got {given!r}.")
    order = [first, *(name for name in models if name != first)]
    known = _tokenizers(models, order)
    own = {name: _with_rows(known[name], models[name]) for name in models}
    tokenizer = _chosen(models, order, known, settings)
    texts = tokenizer.vocabulary
    rows = max(texts.values(), default=-1) + 1
    multiple = settings.pad_to_multiple_of or 1
    rows += -rows % multiple
    donors = {
        text: _donors(text, own, base_name, settings.tokens.get(text))
        for text in texts
        if text in settings.tokens or any(text not in tokens for tokens in own.values())
    }
    sizes = vocabulary_sizes(models)
    for text, places in donors.items():
        for name, row in places:
            if not 0 <= row < sizes[name]:
                raise InputError(f"The token '{text}' is to have the row {row} of '{name}', which has {sizes[name]:,}.")
    recipe = {"vocabulary": {"base": base_name, "settings": asdict(settings)}}
    files = carried(tokenizer, models[first])
    theirs = _tables(models, first, settings.source)
    if theirs is not None and (generation := table_of(models[first], "generation_config.json")):
        files["generation_config.json"] = as_json(_translated(generation, theirs[1], tokenizer, known[first]))
    found: dict[str, Checkpoint] = {}
    for name in models:
        plan = _plan(texts, rows, own[name], donors, settings)
        changed = reordered(name, models, plan, {**recipe, "model": name})
        found[name] = changed.with_files(files)
        if theirs is not None:
            found[name].new_config = _translated(changed.config, theirs[0], tokenizer, known[name])
    return found, files


def resized(
    models: Mapping[str, Checkpoint], how: str, base_name: str | None = None
) -> tuple[dict[str, Checkpoint], dict[str, File]]:
    """The models with as many rows for tokens each, where their numbers differ; and files, as of `aligned`.

    Args:
        models: by name, the base among them.
        how: "truncate" to the fewest rows; "pad" to the most, a row that a model lacks being the base's, the only one
            there is of that number, or the mean of all there are; "union", by the texts of the tokens: see `aligned`.
        base_name: which is the base, if there is one.
    """
    if how not in WAYS:
        raise InputError(f"vocabulary must be truncate, pad or union; got '{how}'. {did_you_mean(how, WAYS)}")
    if how == "union":
        return aligned(models, base_name, TokenizerSettings("union"))
    sizes = vocabulary_sizes(models)
    rows = min(sizes.values()) if how == "truncate" else max(sizes.values())
    first = base_name or next(iter(models))
    if how == "truncate" and rows < sizes[first]:
        tokenizer = Tokenizer.of(models[first])
        lost = [] if tokenizer is None else [text for text, number in tokenizer.vocabulary.items() if number >= rows]
        if lost:
            raise InputError(
                f"vocabulary=truncate would leave {rows:,} rows: {len(lost)} tokens of model '{first}' would have "
                f"none, as '{lost[0]}'. Use pad or union."
            )
    recipe = {"vocabulary": {"base": base_name, "how": how}}
    found = {}
    for name in models:
        size = min(sizes[name], rows)
        made = [
            [(base_name, row)] if base_name is not None and row < sizes[base_name]
            else [(other, row) for other in models if row < sizes[other]]
            for row in range(size, rows)
        ]  # fmt: skip
        plan = Plan(np.concatenate([np.arange(size), -2 - np.arange(rows - size)]), made)
        found[name] = reordered(name, models, plan, {**recipe, "model": name})
    return found, {}


def vocabulary_sizes(models: Mapping[str, Checkpoint]) -> dict[str, int]:
    """How many rows for tokens each model has."""
    sizes = {name: vocabulary_size(model.config) for name, model in models.items()}
    missing = next((name for name, size in sizes.items() if size is None), None)
    if missing is not None:
        raise InputError(f"Model '{missing}': its config.json has no vocab_size: what belongs to a token is not known.")
    return {name: size for name, size in sizes.items() if size is not None}


def remade(recipe: Mapping[str, Any], models: Mapping[str, Checkpoint]) -> Checkpoint:
    """The model that `aligned` or `resized` made, of the entry `vocabulary` and `model` of its recipe."""
    said, name = recipe["vocabulary"], recipe["model"]
    if "how" in said:
        return resized(models, said["how"], said["base"])[0][name]
    given = said["settings"]
    rules = {text: TokenRule(_frozen(rule["source"]), rule["force"]) for text, rule in given["tokens"].items()}
    return aligned(models, said["base"], TokenizerSettings(given["source"], given["pad_to_multiple_of"], rules))[0][
        name
    ]


def _frozen(source: Any) -> Any:
    return tuple(source) if isinstance(source, list) else source  # as JSON has it


def _tokenizers(models: Mapping[str, Checkpoint], order: list[str]) -> dict[str, Tokenizer]:
    """Each model's tokenizer, or the base's where it has none and as many rows."""
    found = {name: Tokenizer.of(models[name]) for name in order}
    base = found[order[0]]
    if base is None:
        raise InputError(f"Model '{order[0]}' has no tokenizer in its folder, on which those of others could be built.")
    sizes = vocabulary_sizes(models)
    for name, tokenizer in found.items():
        if tokenizer is None and sizes[name] != sizes[order[0]]:
            raise InputError(
                f"Model '{name}' has no tokenizer in its folder, and {sizes[name]:,} rows for tokens where "
                f"'{order[0]}' has {sizes[order[0]]:,}: which token a row belongs to is not known."
            )
    return {name: tokenizer or base for name, tokenizer in found.items()}


def _with_rows(tokenizer: Tokenizer, model: Checkpoint) -> dict[str, int]:
    """The tokens that a model has rows for."""
    size = vocabulary_size(model.config) or 0
    return {text: number for text, number in tokenizer.vocabulary.items() if number < size}


def _chosen(
    models: Mapping[str, Checkpoint], order: list[str], known: Mapping[str, Tokenizer], settings: TokenizerSettings
) -> Tokenizer:
    from_models = {name: known[name].within(vocabulary_size(models[name].config) or 0) for name in order}
    first = from_models[order[0]]
    if settings.source == "base":
        chosen = first
    elif settings.source == "union":
        others = [tokenizer for tokenizer in from_models.values() if tokenizer is not first]
        chosen = first.extended(_new(first, others))
    elif settings.source in from_models:
        chosen = from_models[settings.source]
    else:
        chosen = Tokenizer.read(dict(folder_files(find(settings.source), READ)), settings.source)
        if chosen is None:
            raise InputError(f"'{settings.source}' has no tokenizer in its folder.")
    unknown = {text for text in settings.tokens if text not in chosen.vocabulary}
    if unknown:
        chosen = chosen.extended(
            {text: _token(text, from_models.values()) for text in settings.tokens if text in unknown}
        )
    return chosen


def _new(first: Tokenizer, others: list[Tokenizer]) -> dict[str, AddedToken]:
    """The tokens that only others have: in the order of the models, then of ids."""
    found: dict[str, AddedToken] = {}
    for tokenizer in others:
        for text in tokenizer.vocabulary:
            if text not in first.vocabulary and text not in found:
                found[text] = _token(text, others)
    return found


def _token(text: str, tokenizers: Any) -> AddedToken:
    """How a token is found in a text: as the first tokenizer that adds it says; anywhere, where none does."""
    from tokenizers import AddedToken

    said = [tokenizer.added[text] for tokenizer in tokenizers if text in tokenizer.added]
    if any(repr(token) != repr(said[0]) for token in said):
        log.warning("Models add the token '%s' with different settings: those of the first hold.", text)
    return said[0] if said else AddedToken(text, special=False)


def _donors(
    text: str, own: Mapping[str, Mapping[str, int]], base_name: str | None, rule: TokenRule | None
) -> tuple[Row, ...]:
    """Whose rows' mean a token's embedding is, where it is not the model's own; none for zeros."""
    having = {name: known[text] for name, known in own.items() if text in known}
    source = None if rule is None else rule.source
    if source is None:
        if not having:
            log.warning("No model has the token '%s': its embedding is zero.", text)
        return ((base_name, having[base_name]),) if base_name in having else tuple(having.items())
    if source == "zero":
        return ()
    name, wanted = source if isinstance(source, tuple) else (source, text)
    if name not in own:
        raise InputError(f"The token '{text}' is to have its embedding from '{name}'. {did_you_mean(name, own)}")
    known = own[name]
    if isinstance(wanted, str):
        if wanted not in known:
            raise InputError(f"The token '{text}' is to have the embedding of '{wanted}' in '{name}', which lacks it.")
        return ((name, known[wanted]),)
    return ((name, wanted),)


def _plan(
    texts: Mapping[str, int],
    rows: int,
    own: Mapping[str, int],
    donors: Mapping[str, tuple[Row, ...]],
    settings: TokenizerSettings,
) -> Plan:
    found = np.full(rows, PADDING, np.int64)
    made: list[tuple[Row, ...]] = []
    for text, number in texts.items():
        rule = settings.tokens.get(text)
        if text in own and not (rule is not None and rule.force):
            found[number] = own[text]
        else:
            found[number] = -2 - len(made)
            made.append(donors[text])
    return Plan(found, made)


def _tables(models: Mapping[str, Checkpoint], first: str, source: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The two configs that say what ids a chosen tokenizer has for special tokens; None where they stay as they are."""
    if source in ("base", "union", first):
        return None
    if source in models:
        return models[source].config, table_of(models[source], "generation_config.json")
    folder = find(source)
    file = folder / "generation_config.json"
    return read_config(folder), read_table(file) if file.is_file() else {}


def _translated(table: Mapping[str, Any], other: Mapping[str, Any], new: Tokenizer, old: Tokenizer) -> dict[str, Any]:
    """A config with ids of tokens as another model has them or, where that says nothing, of the same tokens."""
    texts = {number: text for text, number in old.vocabulary.items()}

    def id_of(number: Any) -> Any:
        return new.vocabulary.get(texts.get(number, "")) if isinstance(number, int) else number

    found: dict[str, Any] = {key: value for key, value in other.items() if key.endswith(IDS)}
    for key, value in table.items():
        theirs = other.get(key)
        if isinstance(value, dict):
            found[key] = _translated(value, theirs if isinstance(theirs, dict) else {}, new, old)
        elif not key.endswith(IDS):
            found[key] = value
        elif theirs is not None:
            found[key] = theirs
        elif isinstance(value, list):
            found[key] = [number for number in map(id_of, value) if number is not None]
        else:
            found[key] = id_of(value)
    return found
