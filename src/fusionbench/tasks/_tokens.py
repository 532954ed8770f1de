"""Texts as a language model takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusionbench.errors import InputError
from fusionbench.locations import find
from fusionbench.recipes.tokenizer import PATTERNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Inputs = dict[str, Tensor]


class Tokens:
    """A tokenizer that fills up on the right.

    Args:
        location: folder with the tokenizer's files.
        max_length: tokens that are kept of a text.
    """

    def __init__(self, location: str | Path, max_length: int) -> None:
        self.location, self.max_length = location, max_length

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        folder = find(self.location)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"'{self.location}' has no tokenizer: {str(error).splitlines()[0]}") from None
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:  # GPT-2 has none; what is masked may be anything
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def describe(self) -> dict[str, Any]:
        """What the tokens of a text depend on."""
        return {"tokenizer": tokenizer_digest(find(self.location)), "max_length": self.max_length}

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> Inputs:
        """`input_ids` and `attention_mask`, `(batch, tokens)`, of texts or of pairs of texts."""
        first = [text if isinstance(text, str) else text[0] for text in texts]
        second = [text[1] for text in texts if not isinstance(text, str)]
        encoded = self.tokenizer(
            first,
            second or None,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def tokenizer_digest(folder: Path) -> str:
    """A hash of the files of a tokenizer."""
    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
