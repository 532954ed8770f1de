"""Tokenizers as the files of a model folder: their vocabulary, and what they are with more tokens, or with fewer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import File
from fusionbench.errors import InputError
from fusionbench.formats import read_table

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` library, and the other files that say how transformers use it.

    Attributes:
        location: as messages name it.
        files: all its files, by name: where they are, or their content.
        text: the content of its `tokenizer.json`, made by transformers where the folder has none.
    """

    location: str
    files: Mapping[str, Path | bytes]
    text: str

    @classmethod
    def read(cls, folder: Path | None) -> Tokenizer | None:
        """The tokenizer in a model folder; None where there is none. Nothing is looked for elsewhere."""
        files = tokenizer_files(folder)
        if folder is None or not set(files) - {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}:
            return None
        if "tokenizer.json" in files:
            return cls(str(folder), files, _text(files["tokenizer.json"]))
        return _converted(folder)

    @cached_property
    def backend(self) -> Backend:
        try:
            from tokenizers import Tokenizer as Backend
        except ModuleNotFoundError:
            raise InputError("Tokenizers are read by the library tokenizers: pip install 'fusionbench[hf]'.") from None
        try:
            return Backend.from_str(self.text)
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"The tokenizer of '{self.location}' cannot be read: {_first_line(error)}.") from None

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, added ones too, in the order of the ids."""
        return dict(sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))

    @cached_property
    def added(self) -> dict[str, AddedToken]:
        """The tokens that are found in a text before it is cut up, in the order of their ids."""
        return {token.content: token for _, token in sorted(self.backend.get_added_tokens_decoder().items())}

    def extended(self, tokens: Mapping[str, AddedToken]) -> Tokenizer:
        """The same tokenizer with more tokens, whose ids follow on those it has."""
        if not tokens:
            return self
        longer = Tokenizer(self.location, self.files, self.text).backend  # one of its own
        longer.add_tokens(list(tokens.values()))
        found = longer.get_vocab(with_added_tokens=True)
        first = max(self.vocabulary.values(), default=-1) + 1
        taken = [text for text, number in zip(tokens, range(first, first + len(tokens)), strict=True)]
        wrong = next((text for number, text in enumerate(taken, first) if found.get(text) != number), None)
        if wrong is not None:
            raise InputError(
                f"'{wrong}' cannot be added to the tokenizer of '{self.location}': its ids have gaps, or its "
                "normaliser makes that token another one."
            )
        return self._with(longer.to_str(pretty=True))

    def within(self, rows: int) -> Tokenizer:
        """The same tokenizer without the tokens that a model with so many rows has no row for."""
        gone = [text for text, number in self.vocabulary.items() if number >= rows]
        if not gone:
            return self
        table = json.loads(self.text)
        model = table["model"]
        ordinary = [text for text in gone if text not in self.added]
        if ordinary and model.get("type") not in ("BPE", "WordLevel", "WordPiece"):
            raise InputError(
                f"The tokenizer of '{self.location}' knows '{ordinary[0]}', the model has {rows:,} rows for tokens: "
                f"those of a {model.get('type')} tokenizer cannot be left out."
            )
        table["added_tokens"] = [entry for entry in table["added_tokens"] if entry["id"] < rows]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {text: number for text, number in model["vocab"].items() if number < rows}
        if "merges" in model:
            pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
            lost = set(ordinary)
            model["merges"] = [merge for merge, pair in pairs if not lost & {*pair, "".join(pair)}]
        return self._with(json.dumps(table, ensure_ascii=False, indent=2))

    def _with(self, text: str) -> Tokenizer:
        """With another `tokenizer.json`, and what repeats its added tokens in the other files."""
        files = dict(self.files) | {"tokenizer.json": text.encode()}
        changed = Tokenizer(self.location, files, text)
        if "tokenizer_config.json" in files:
            config = json.loads(_text(files["tokenizer_config.json"]))
            if "added_tokens_decoder" in config:  # transformers believes it before tokenizer.json
                entries = json.loads(text)["added_tokens"]
                config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in entries}
                files["tokenizer_config.json"] = as_json(config)
        if "added_tokens.json" in files:
            old = json.loads(_text(files["added_tokens.json"]))
            new = {text: i for text, i in changed.vocabulary.items() if text in old or text not in self.vocabulary}
            files["added_tokens.json"] = as_json(new)
        return changed


def tokenizer_files(folder: Path | None) -> dict[str, Path]:
    """The files of a folder that belong to its tokenizer, by name."""
    if folder is None:
        return {}
    return {file.name: file for pattern in PATTERNS for file in sorted(folder.glob(pattern)) if file.is_file()}


def carried(tokenizer: Tokenizer, folder: Path | None) -> dict[str, File]:
    """What makes a copy of `folder` have this tokenizer instead of its own: see `Checkpoint.files`."""
    own = tokenizer_files(folder)
    changed = {name: file for name, file in tokenizer.files.items() if own.get(name) != file}
    return {**dict.fromkeys(own.keys() - tokenizer.files.keys()), **changed} if changed else {}


def as_json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, ensure_ascii=False, indent=2) + "\n").encode()


def _converted(folder: Path) -> Tokenizer:
    """What transformers makes of other files than `tokenizer.json`."""
    import tempfile

    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise InputError(
            f"'{folder}' has no tokenizer.json: transformers reads it, pip install 'fusionbench[hf]'."
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of files that are damaged, or of a kind that is not known, there is every type
        raise InputError(f"The tokenizer of '{folder}' cannot be read: {_first_line(error)}.") from None
    with tempfile.TemporaryDirectory() as place:
        loaded.save_pretrained(place)
        files: dict[str, Path | bytes] = {
            name: file.read_bytes() for name, file in tokenizer_files(Path(place)).items()
        }
    if "tokenizer.json" not in files:
        raise InputError(f"'{folder}' has no tokenizer.json, and transformers makes none of its files.")
    return Tokenizer(str(folder), files, _text(files["tokenizer.json"]))


def generation_config(folder: Path | None) -> dict[str, Any]:
    """The `generation_config.json` of a model folder; empty where there is none."""
    file = None if folder is None else folder / "generation_config.json"
    return {} if file is None or not file.is_file() else read_table(file)


def _text(file: Path | bytes) -> str:
    try:
        return (file if isinstance(file, bytes) else file.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise InputError(f"'{file}' is not valid text.") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
