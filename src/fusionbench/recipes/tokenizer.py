"""Tokenizers as the files of a model folder: their vocabulary, and what they are with more tokens, or with fewer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionbench.checkpoint import Checkpoint, File
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
READ = (*PATTERNS, "config.json")  # which says of what class a tokenizer is that does not say it itself


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
    def of(cls, model: Checkpoint) -> Tokenizer | None:
        """The tokenizer in a model's folder, or among its files; None where there is none."""
        return cls.read(files_of(model, READ), model.location or str(model.folder))

    @classmethod
    def read(cls, files: Mapping[str, Path | bytes], location: str) -> Tokenizer | None:
        """The tokenizer of these files; None where there is none in them. Nothing is looked for elsewhere."""
        if not set(files) - {"chat_template.jinja", "chat_template.json", "tokenizer_config.json", "config.json"}:
            return None
        if "tokenizer.json" in files:
            own = {name: file for name, file in files.items() if name != "config.json"}
            return cls(location, own, text_of(files["tokenizer.json"]))
        return _converted(files, location)

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
            config = json.loads(text_of(files["tokenizer_config.json"]))
            if "added_tokens_decoder" in config:  # transformers believes it before tokenizer.json
                entries = json.loads(text)["added_tokens"]
                config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in entries}
                files["tokenizer_config.json"] = as_json(config)
        if "added_tokens.json" in files:
            old = json.loads(text_of(files["added_tokens.json"]))
            new = {text: i for text, i in changed.vocabulary.items() if text in old or text not in self.vocabulary}
            files["added_tokens.json"] = as_json(new)
        return changed


def folder_files(folder: Path | None, patterns: Sequence[str]) -> dict[str, Path]:
    """The files of a folder whose names are like one of the patterns."""
    if folder is None:
        return {}
    return {file.name: file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()}


def files_of(model: Checkpoint, patterns: Sequence[str]) -> dict[str, Path | bytes]:
    """The same of a model: those of its folder, but for what `Checkpoint.files` says."""
    own = {name: file for name, file in model.files.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    return {name: f for name, f in {**folder_files(model.folder, patterns), **own}.items() if f is not None}


def table_of(model: Checkpoint, name: str) -> dict[str, Any]:
    """A model's file that holds a JSON object; empty where there is none."""
    file = files_of(model, [name]).get(name)
    return {} if file is None else json.loads(file) if isinstance(file, bytes) else read_table(file)


def carried(tokenizer: Tokenizer, model: Checkpoint) -> dict[str, File]:
    """The files that make a model's folder have this tokenizer instead of its own: see `Checkpoint.files`."""
    own = files_of(model, PATTERNS)
    changed = {name: file for name, file in tokenizer.files.items() if own.get(name) != file}
    return {**dict.fromkeys(sorted(own.keys() - tokenizer.files.keys())), **changed} if changed else {}


def as_json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, ensure_ascii=False, indent=2) + "\n").encode()


def _converted(files: Mapping[str, Path | bytes], location: str) -> Tokenizer:
    """What transformers makes of other files than `tokenizer.json`."""
    import tempfile

    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        message = f"'{location}' has no tokenizer.json: transformers reads it, pip install 'fusionbench[hf]'."
        raise InputError(message) from None
    with tempfile.TemporaryDirectory() as given, tempfile.TemporaryDirectory() as made:
        for name, file in files.items():
            (Path(given) / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
        try:
            loaded = AutoTokenizer.from_pretrained(given, local_files_only=True, trust_remote_code=False)
            loaded.save_pretrained(made)
        except Exception as error:  # of files that are damaged, or of a kind that is not known, there is every type
            raise InputError(f"The tokenizer of '{location}' cannot be read: {_first_line(error)}.") from None
        found: dict[str, Path | bytes] = {n: f.read_bytes() for n, f in folder_files(Path(made), PATTERNS).items()}
    if "tokenizer.json" not in found:
        raise InputError(f"'{location}' has no tokenizer.json, and transformers makes none of its files.")
    return Tokenizer(location, found, text_of(found["tokenizer.json"]))


def text_of(file: Path | bytes) -> str:
    """The content of a file."""
    try:
        return (file if isinstance(file, bytes) else file.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise InputError(f"'{file}' is not valid text.") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
