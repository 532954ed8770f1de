"""Llama models of a few thousand parameters whose tokenizers differ, as folders."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = ["good", "bad", "film", "mail"]
TEXTS = ["the good film is good and the bad mail is bad ? yes no maybe hello world, 12 34"] * 5


def words_tokenizer(words: Sequence[str] = WORDS, added: Sequence[str | AddedToken] = ()) -> PreTrainedTokenizerFast:
    """Words, in this order after the special tokens, and then added tokens."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer, added)


def bytes_tokenizer(added: Sequence[str | AddedToken] = ()) -> PreTrainedTokenizerFast:
    """Byte-level pairs, as most language models have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, added)


def _fast(tokenizer: Tokenizer, added: Sequence[str | AddedToken]) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_tokens(list(added))
    return fast


def special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def write_llama(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    tied: bool = False,
    rows: int | None = None,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    **more: object,
) -> str:
    """A model with so many rows, or one for each token; and the tokenizer, where it is to be there."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test that imports this may ask the network for anything."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
