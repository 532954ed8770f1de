"""GPT-2 and T5 models of a few thousand parameters with fine-tunes and tasks, as the files that hubs and zoos hold."""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["<pad>", "</s>", "<unk>", "good", "bad", "film", "mail", "yes", "no", "1.0", "2.0", "5.0", "is", "it", "?"]


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def gpt2_config(labels: int = 2) -> GPT2Config:
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    config.num_labels = labels
    return config


def near(model: nn.Module, seed: int) -> None:
    """Move every parameter a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def write_lines(file: Path, seed: int, rows: list[dict], counts: dict[str, int]) -> None:
    random = np.random.default_rng(seed)
    lines = [{"split": s, **rows[random.integers(len(rows))]} for s, count in counts.items() for _ in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


COUNTS = {"test": 20, "calibration": 8}


def write_gpt2_zoo(folder: Path) -> None:
    """A bare base, two classifiers made from it, their tasks, and the YAML of both pools."""
    torch.manual_seed(0)
    base = GPT2Model(gpt2_config())
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for seed, (name, labels) in enumerate({"films": 2, "pairs": 3}.items(), 1):
        model = GPT2ForSequenceClassification(gpt2_config(labels))
        model.transformer.load_state_dict(base.state_dict())
        near(model, seed)
        model.save_pretrained(folder / name)
    films = [{"text": "good film", "label": "good"}, {"text": "it is bad", "label": "bad"}]
    pairs = [{"a": "good film", "b": "bad mail ?", "label": 2}, {"a": "it is", "b": "yes", "label": 0}]
    write_lines(folder / "films.jsonl", 1, films, COUNTS)
    write_lines(folder / "pairs.jsonl", 2, pairs, COUNTS)
    (folder / "pool.yaml").write_text("base: base\nmodels: {films: films, pairs: pairs}\n")
    (folder / "tasks.yaml").write_text(
        "kind: text_classification\ntokenizer: base\ntasks:\n"
        "  films: {data: films.jsonl, head: films, classes: [bad, good]}\n"
        "  pairs: {data: pairs.jsonl, head: pairs, text: [a, b], classes: [none, some, all]}\n"
    )


def write_bert_zoo(folder: Path) -> None:
    """A sentence encoder, two LoRA adapters for it with heads, their tasks, and the YAML of both pools."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **size)).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for seed, (name, labels) in enumerate({"films": 2, "mails": 3}.items(), 1):
        base = BertModel.from_pretrained(folder / "base", add_pooling_layer=False)
        adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]))
        near(adapted, seed)
        adapted.save_pretrained(folder / name)
        save_file({"score.weight": torch.randn(labels, 16)}, folder / name / "head.safetensors")
    write_lines(folder / "films.jsonl", 1, [{"text": "good film", "label": 0}, {"text": "bad", "label": 1}], COUNTS)
    write_lines(folder / "mails.jsonl", 2, [{"text": "good mail", "label": 2}, {"text": "no", "label": 0}], COUNTS)
    (folder / "pool.yaml").write_text("base: base\nmodels: {films: films, mails: mails}\n")
    (folder / "tasks.yaml").write_text(
        "kind: text_classification\ntokenizer: base\npooling: mean\ntasks:\n"
        "  films: {data: films.jsonl, head: films/head.safetensors, classes: [bad, good]}\n"
        "  mails: {data: mails.jsonl, head: mails/head.safetensors, classes: [none, some, all]}\n"
    )


def write_t5_zoo(folder: Path) -> None:
    """A base, two fine-tunes, their tasks (one with numbers), and the YAML of both pools."""
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.decoder_start_token_id = 0
    for seed, name in enumerate(("base", "films", "similar")):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        if seed:
            near(model, seed)
        model.save_pretrained(folder / name)
    write_tokenizer(folder / "base")
    films = [{"sentence": "good film", "label": 1}, {"sentence": "bad film", "label": 0}]
    similar = [{"a": "good", "b": "film", "label": 2.04}, {"a": "bad", "b": "mail", "label": 5.0}]
    write_lines(folder / "films.jsonl", 1, films, COUNTS)
    write_lines(folder / "similar.jsonl", 2, similar, COUNTS)
    (folder / "pool.yaml").write_text("base: base\nmodels: {films: films, similar: similar}\n")
    (folder / "tasks.yaml").write_text(
        "kind: text_generation\ntokenizer: base\ntasks:\n"
        "  films: {data: films.jsonl, prompt: 'is it good ? {sentence}', answers: {0: 'no', 1: 'yes'}}\n"
        "  similar: {data: similar.jsonl, prompt: '{a} is {b} ?', answers: '{:.1f}', metric: spearman_rho}\n"
    )
