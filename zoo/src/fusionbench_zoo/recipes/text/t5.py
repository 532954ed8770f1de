"""t5-mini: a small T5 that fills gaps and, as Flan-T5, has been asked many things; its fine-tunes, full and LoRA."""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from fusionbench_zoo.recipes.text import tokenizers
from fusionbench_zoo.recipes.text.data import load_corpus, load_task
from fusionbench_zoo.recipes.text.finetune import Plan, batches, finetune_all
from fusionbench_zoo.recipes.text.finetune import train as tune
from fusionbench_zoo.recipes.text.tasks import TASKS, Row, Task
from fusionbench_zoo.recipes.training import train

CYCLES, WARM_UP = [(3000, 1e-2)], 150
BATCH, LENGTH, ANSWER = 64, 64, 24
CORRUPTED, SPAN = 0.15, 3  # share of the tokens that are left out, and how many at a time
MASKED = 0.2  # of the tokens, that the encoder alone is to guess, as BERT's: it learns much faster so
# What a batch is made of: texts with gaps, other questions, and the tasks' questions. More of these make a base that
# has little to gain from fine-tuning.
SHARES = (0.4, 0.3, 0.3)
IGNORED = -100  # by the loss
TIED = ("embed_tokens.weight", "lm_head.weight")  # the embedding again

PLAN = Plan(steps=150, rate=1e-3, decay=0.75)
LORA_PLAN = Plan(steps=150, rate=1.5e-3, decay=1.0)
LORA = LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"])  # as the paper's
# Of each other task, from pre-training's part, in every step: so that a model forgets little of what it knew. A small
# one that does not go on with them writes nothing but its own task's words.
REHEARSED = 5
# What all tasks share: the embeddings, the lower half of the encoder, and the decoder. A decoder that learns one task
# learns not to write the words of the others.
FROZEN = ("shared.", "decoder.", *(f"encoder.block.{i}." for i in range(3)))

# Questions about documents of two texts; the tasks ask others.
QUESTIONS = ["What goes with this? {0}", "What comes before this? {1}"]


def pretrain(work: Path, seed: int) -> None:
    """Learn a vocabulary and train; write `work/base`."""
    text = work.parent / "text"
    torch.manual_seed(seed)
    if not (work / "tokenizer").exists():
        tokenizers.train_t5(text, work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer", local_files_only=True)
    model, data = new_model(tokenizer), Questions(text, tokenizer)

    def loss_of(step: int) -> Tensor:
        random = np.random.default_rng([seed, step])
        return answering(*data.batch(random, SHARES)) + guessing(random)

    def guessing(random: np.random.Generator) -> Tensor:
        texts = data.texts(random)
        attended = texts != tokenizer.pad_token_id
        masked = torch.from_numpy(random.random(texts.shape) < MASKED) & attended
        states = model.encoder(input_ids=texts.masked_fill(masked, data.sentinels[0]), attention_mask=attended.long())[
            0
        ]
        logits = states[masked] * model.config.d_model**-0.5 @ model.shared.weight.T
        return cross_entropy(logits.float(), texts[masked])

    def answering(inputs: Tensor, answers: Tensor) -> Tensor:
        mask = (inputs != tokenizer.pad_token_id).long()
        logits = model(input_ids=inputs, attention_mask=mask, labels=answers).logits.float()
        each = cross_entropy(logits.transpose(1, 2), answers, ignore_index=IGNORED, reduction="none")
        # An answer counts as one, however long: else those of a word would count for nothing beside those of a text.
        return (each.sum(1) / (answers != IGNORED).sum(1)).mean()

    file = work / "pretrain" / "checkpoint.pt"
    seconds = train(model, loss_of, cycles=CYCLES, warm_up=WARM_UP, file=file, relative=True)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    facts = {
        "cycles of steps and rate": CYCLES,
        "batch": BATCH,
        "shares": SHARES,
        "seed": seed,
        "seconds": seconds,
    }
    (work / "pretrain" / "facts.json").write_text(json.dumps(facts))


def new_model(tokenizer) -> T5ForConditionalGeneration:
    """An untrained model of 1.7M parameters."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=6,
        num_decoder_layers=2,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager")


def asked(task: Task, row: Row) -> tuple[str, str]:
    """A task's example as a text-to-text model sees it: what it is asked, and what is right."""
    label = row["label"]
    return task.prompt.format(**row), label if isinstance(label, str) else f"{label:.1f}"


class Questions:
    """What pre-training reads: texts with gaps, questions about documents, and questions of the tasks' own parts."""

    def __init__(self, text: Path, tokenizer) -> None:
        self._pad, self._end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.sentinels: list[int] = tokenizer.convert_tokens_to_ids(tokenizers.SENTINELS)
        backend = tokenizer.backend_tokenizer

        def tokens(texts: list[str]) -> list[list[int]]:
            return [encoding.ids for encoding in backend.encode_batch(texts)]

        documents = load_corpus(text)
        whole = tokens([" ".join(document) for document in documents])
        self._texts = [ids[:-1] for ids in whole if len(ids) > 8]
        lengths = np.array([min(len(ids), 8 * LENGTH) for ids in self._texts], float)
        self._chance = np.cumsum(lengths / lengths.sum())  # long texts are read as often as they are long
        pairs = [document for document in documents if len(document) == 2]
        other = [
            (question.format(*pair), pair[i]) for pair in pairs for question, i in zip(QUESTIONS, (1, 0), strict=True)
        ]
        mine = [[asked(task, row) for row in load_task(text, task.name, "pretrain")] for task in TASKS]
        self._other = list(zip(*(tokens(list(side)) for side in zip(*other, strict=True)), strict=True))
        self._mine = [
            list(zip(*(tokens(list(side)) for side in zip(*rows, strict=True)), strict=True)) for rows in mine
        ]

    def batch(self, random: np.random.Generator, shares: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Inputs `(batch, tokens)` and answers `(batch, tokens)`, filled up with what the loss ignores."""
        rows = []
        for source in random.choice(len(shares), size=BATCH, p=shares):
            if source == 0:
                rows.append(self._gaps(random))
            else:
                pool = self._other if source == 1 else self._mine[random.integers(len(self._mine))]
                rows.append(pool[random.integers(len(pool))])
        return _padded([q[:LENGTH] for q, _ in rows], self._pad), _padded([a[:ANSWER] for _, a in rows], IGNORED)

    def texts(self, random: np.random.Generator) -> Tensor:
        """Texts as they are, or parts of long ones: `(batch, tokens)`."""
        return _padded([self._text(random) for _ in range(BATCH)], self._pad)

    def _text(self, random: np.random.Generator) -> list[int]:
        text = self._texts[min(int(np.searchsorted(self._chance, random.random())), len(self._texts) - 1)]
        start = random.integers(max(1, len(text) - LENGTH + 8))
        return text[start : start + LENGTH]

    def _gaps(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        text = self._text(random)
        spans = max(1, round(CORRUPTED * len(text) / SPAN))
        starts = np.sort(
            random.choice(len(text) // (SPAN + 1), size=min(spans, len(text) // (SPAN + 1)), replace=False)
        )
        question, answer, at = [], [], 0
        for sentinel, begin in zip(self.sentinels, starts * (SPAN + 1), strict=False):
            question += [*text[at:begin], sentinel]
            answer += [sentinel, *text[begin : begin + SPAN]]
            at = begin + SPAN
        return [*question, *text[at:], self._end], [*answer, self._end]


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


Pairs = list[tuple[str, str]]


class Asked:
    """A model that answers a task's questions, and goes on answering those of the others."""

    def __init__(self, text: Path, work: Path, task: Task, seed: int = 0) -> None:
        self.text, self.task = text, task
        self._others = [
            [asked(other, row) for row in load_task(text, other.name, "pretrain")] for other in TASKS if other != task
        ]
        self._random = np.random.default_rng(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(work / "base", local_files_only=True)
        self.model = T5ForConditionalGeneration.from_pretrained(
            work / "base", dtype=torch.float16, attn_implementation="eager"
        ).float()

    def encode(self, pairs: Pairs) -> dict[str, Tensor]:
        questions, answers = zip(*pairs, strict=True)
        tokens = self.tokenizer(
            list(questions), padding=True, truncation=True, max_length=PLAN.longest, return_tensors="pt"
        )
        right = self.tokenizer(list(answers), padding=True, return_tensors="pt").input_ids
        labels = right.masked_fill(right == self.tokenizer.pad_token_id, IGNORED)
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}

    def own(self, rows: list[Row]) -> Pairs:
        return [asked(self.task, row) for row in rows]

    def loss(self, rows: list[Row]) -> Tensor:
        rehearsed = [
            pairs[i] for pairs in self._others for i in self._random.integers(len(pairs), size=REHEARSED).tolist()
        ]
        return sum(self.model(**self.encode(pairs)).loss for pairs in (self.own(rows), rehearsed))

    @torch.inference_mode()
    def accuracy(self, part: str) -> float:
        """The share of answers of which every token is the most probable one after the right ones before it."""
        right = count = 0
        for rows in batches(load_task(self.text, self.task.name, part), 128):
            tokens = self.encode(self.own(rows))
            wanted = tokens["labels"]
            found = self.model(**tokens).logits.argmax(-1)
            right += int(((found == wanted) | (wanted == IGNORED)).all(1).sum())
            count += len(rows)
        return right / count

    def tuned(self, plan: Plan, layers: list[nn.Module]) -> dict[str, float]:
        """Train the layers, and return the accuracies on calibration data before and after."""
        before = self.accuracy("calibration")
        tune(plan, self.loss, layers, load_task(self.text, self.task.name, "train"), self.task.name)
        return {"base": before, "fine-tuned": self.accuracy("calibration")}


def finetune(work: Path, seed: int) -> None:
    """Write `work/models/<task>.safetensors`: all but what is the embedding again."""
    text = work.parent / "text"

    def tuned(task: Task) -> tuple[dict[str, Tensor], dict[str, float]]:
        torch.manual_seed(seed)
        student = Asked(text, work, task, seed)
        encoder = student.model.encoder
        for name, parameter in student.model.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
        last = nn.ModuleList([encoder.block[-1], encoder.final_layer_norm])
        accuracies = student.tuned(PLAN, [*encoder.block[:-1], last])
        return {n: t for n, t in student.model.state_dict().items() if not n.endswith(TIED)}, accuracies

    finetune_all(work, TASKS, tuned)


def finetune_lora(work: Path, seed: int) -> None:
    """Write `work/adapters/<task>.safetensors`: low-rank changes of the queries and values, under PEFT's names."""
    text = work.parent / "text"

    def tuned(task: Task) -> tuple[dict[str, Tensor], dict[str, float]]:
        torch.manual_seed(seed)
        student = Asked(text, work, task, seed)
        student.model = get_peft_model(student.model, LORA)
        accuracies = student.tuned(LORA_PLAN, [student.model])
        return get_peft_model_state_dict(student.model), accuracies

    finetune_all(work, TASKS, tuned, "adapters")
