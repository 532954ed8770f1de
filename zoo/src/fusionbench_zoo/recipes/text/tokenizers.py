"""Vocabularies of their own for the small models: byte pairs as GPT-2's, a unigram model as T5's."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fusionbench_zoo.recipes.text.data import load_corpus
from fusionbench_zoo.recipes.text.tasks import TASKS

VOCABULARY = 4096
END, BETWEEN = "<|endoftext|>", "<|between|>"
SENTINELS = [f"<extra_id_{i}>" for i in range(12)]


def train_gpt2(work: Path, folder: Path) -> None:
    """Byte pairs; two texts are read one after the other with `<|between|>`, and every text ends in `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, BETWEEN], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_texts(work), trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in (END, BETWEEN)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {BETWEEN} $B {END}", special_tokens=special
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=160
    ).save_pretrained(folder)


def train_t5(work: Path, folder: Path) -> None:
    """A unigram model, with T5's sentinels for what is left out, and `</s>` at the end of every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *SENTINELS]
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator([*_texts(work), *(task.prompt for task in TASKS)], trainer)
    end = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        model_max_length=160,
    ).save_pretrained(folder)


def _texts(work: Path) -> list[str]:
    return [text for document in load_corpus(work) for text in document]
