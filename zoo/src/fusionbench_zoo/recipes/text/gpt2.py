"""gpt2-mini: a small GPT-2 that predicts the next token, and what it becomes on each classification task."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from fusionbench_zoo.recipes.text import tokenizers
from fusionbench_zoo.recipes.text.data import load_corpus, load_task
from fusionbench_zoo.recipes.text.finetune import Classifier, Plan, finetune_all, tuned_classifier
from fusionbench_zoo.recipes.text.tasks import TASKS, Task
from fusionbench_zoo.recipes.training import train

# In the second cycle a good part of what is read are the tasks' own texts, of the part that is pre-training's, each
# with its answer after it: so that a text's last state knows of what can be asked about it.
CYCLES, WARM_UP = [(1800, 3e-3), (1200, 2e-3)], 150
BATCH, LENGTH, POSITIONS = 64, 128, 160
PLAN = Plan(steps=260, rate=2e-3, decay=0.75, fitted_head=False)  # head and backbone learn together, as the paper's
FROZEN = 2  # layers, and the embeddings below them: what all tasks share
CLASSIFICATION = [task for task in TASKS if task.classes]


def pretrain(work: Path, seed: int) -> None:
    """Learn a vocabulary and train; write `work/base`."""
    text = work.parent / "text"
    torch.manual_seed(seed)
    if not (work / "tokenizer").exists():
        tokenizers.train_gpt2(text, work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)
    documents, answered = _encoded(tokenizer, load_corpus(text)), _answered(text, tokenizer)
    first = [_stream(documents, 1000 * seed + epoch) for epoch in range(4)]
    later = [_stream([*answered, *documents[epoch::3]], 1000 * seed + 100 + epoch) for epoch in range(3)]
    tokens = torch.cat(
        [torch.cat(rows)[: steps * BATCH] for rows, (steps, _) in zip((first, later), CYCLES, strict=True)]
    )
    model = new_model(tokenizer)

    def loss_of(step: int) -> torch.Tensor:
        rows = tokens[step * BATCH : (step + 1) * BATCH]
        return model(input_ids=rows, labels=rows).loss

    assert len(tokens) == BATCH * sum(steps for steps, _ in CYCLES), len(tokens)
    seconds = train(model, loss_of, cycles=CYCLES, warm_up=WARM_UP, file=work / "pretrain" / "checkpoint.pt")
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    facts = {"cycles of steps and rate": CYCLES, "batch": BATCH, "tokens": LENGTH, "seed": seed, "seconds": seconds}
    (work / "pretrain" / "facts.json").write_text(json.dumps(facts))


def new_model(tokenizer) -> GPT2LMHeadModel:
    """An untrained model of 1.7M parameters."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=6,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager")  # faster in bfloat16 than fused


def _encoded(tokenizer, documents: list[list[str]]) -> list[list[int]]:
    """Documents of one text, or of two, as tokens."""
    pairs = [tuple(document) if len(document) > 1 else document[0] for document in documents]
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(pairs)]


def _answered(text: Path, tokenizer) -> list[list[int]]:
    """The tasks' texts of the part that is pre-training's, each with its answer after its end."""
    found = []
    for task in TASKS:
        rows = load_task(text, task.name, "pretrain")
        questions = _encoded(tokenizer, [[str(row[column]) for column in task.text] for row in rows])
        answers = _encoded(tokenizer, [[str(row["label"])] for row in rows])
        found += [question + answer for question, answer in zip(questions, answers, strict=True)]
    return found


def _stream(documents: list[list[int]], seed: int) -> torch.Tensor:
    """All documents once, in random order, one after the other: rows of `LENGTH` tokens."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    flat = torch.tensor([token for i in order for token in documents[i]])
    return flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)


def finetune(work: Path, seed: int) -> None:
    """Write `work/models/<task>.safetensors`: the backbone as `transformer.*`, and `score.weight`."""
    text = work.parent / "text"
    finetune_all(work, CLASSIFICATION, lambda task: _finetuned(text, work, task, seed))


def _finetuned(text: Path, work: Path, task: Task, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(work / "base", local_files_only=True)
    whole = GPT2LMHeadModel.from_pretrained(work / "base", dtype=torch.float16, attn_implementation="eager").float()
    backbone: GPT2Model = whole.transformer
    for shared in (backbone.wte, backbone.wpe, *backbone.h[:FROZEN]):
        shared.requires_grad_(False)
    classifier = Classifier(backbone, tokenizer, task, text, PLAN.longest, "last")
    layers = [*backbone.h[FROZEN:-1], torch.nn.ModuleList([backbone.h[-1], backbone.ln_f, classifier.head])]
    accuracies = tuned_classifier(classifier, PLAN, layers)
    tensors = {f"transformer.{name}": tensor for name, tensor in backbone.state_dict().items()}
    return {**tensors, "score.weight": classifier.head.weight.data}, accuracies
