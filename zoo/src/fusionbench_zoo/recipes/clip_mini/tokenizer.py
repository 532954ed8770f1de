"""A byte-pair vocabulary for the captions."""

import json
import string
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from fusionbench_zoo.recipes.clip_mini.model import MAX_TOKENS

VOCABULARY = 4000


def train_tokenizer(work: Path, seed: int = 0) -> None:
    """Learn CLIP's kind of tokenizer from the captions and write it to `work/tokenizer`."""
    captions = json.loads((work / "data" / "pretrain" / "texts.json").read_text())["captions"]
    # Every character also alone, so that each can end a word.
    texts = [*captions, *string.printable]
    # Ids 0 and 1: transformers reads an end-of-text id of 2 as a mark of old, wrong configurations.
    empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=MAX_TOKENS)
    empty.train_new_from_iterator(texts, VOCABULARY).save_pretrained(work / "tokenizer")


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return the token ids of all captions (N, longest), padded with the end of text."""
    encoded = tokenizer(captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return encoded.input_ids
