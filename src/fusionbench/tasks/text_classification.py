"""Text classification: a backbone's hidden states, pooled, through the task's own linear head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError, check_keys, did_you_mean
from fusionbench.locations import find
from fusionbench.task import Outcomes, Scores, TaskPool
from fusionbench.tasks._batches import check_texts, classified, numbers, other_family
from fusionbench.tasks._data import Rows, check_split, check_tasks, open_rows, with_card
from fusionbench.tasks._tokens import Inputs, Tokens

HEADS = ("score.weight", "classifier.weight")
POOLINGS = ("last", "first", "mean")


class Examples(Protocol):
    """Rows of named values, by split."""

    def rows(self, split: str, columns: Sequence[str]) -> Rows: ...

    def digest(self) -> str: ...


class TextClassification:
    """Accuracy and loss of a language model's backbone on labelled texts.

    Args:
        tokens: the tokenizer.
        examples: the data.
        head: checkpoint with the classifier's `score.weight`, `(classes, hidden size)`: often the task's own model.
        text: the column of the text, or the two of a pair.
        label: the column of the label: a number, or the name of a class.
        classes: a name per label.
        pooling: which hidden state stands for the text: that of its `last` token, as for GPT-2, that of its `first`, or
            the `mean` of all, as for sentence encoders.
        batch_size: texts evaluated at once.
        version: changes whenever scores of the task are no longer comparable.
    """

    primary = "accuracy"

    def __init__(
        self,
        tokens: Tokens,
        examples: Examples,
        head: Checkpoint,
        *,
        text: Sequence[str],
        label: str,
        classes: Sequence[str],
        pooling: str = "last",
        batch_size: int = 64,
        version: int = 1,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"No pooling is called '{pooling}'. {did_you_mean(pooling, POOLINGS)}")
        for given, what in ((text, "text must be a column, or a list of two"), (classes, "classes must be a list")):
            if not isinstance(given, list) or not all(isinstance(item, str | int) for item in given) or not given:
                raise InputError(f"{what}; got {given!r}.")
        if not isinstance(label, str):
            raise InputError(f"label must be a column; got {label!r}.")
        if len(text) > 2:
            raise InputError(f"text must be a column, or a list of two; got {len(text)}.")
        self.tokens, self.examples, self._head = tokens, examples, head
        self.text, self.label, self.classes = list(text), label, list(classes)
        self.pooling, self.batch_size, self.version = pooling, batch_size, version

    @cached_property
    def head(self) -> nn.Linear:
        """The classifier, from the hidden size to the classes."""
        name = next((name for name in HEADS if name in self._head), None)
        if name is None:
            raise InputError(f"'{self._head.location}' has no classifier: none of {', '.join(HEADS)} is in it.")
        if any("pooler.dense" in other for other in self._head):
            raise InputError(f"'{self._head.location}' classifies what its pooler makes, which is no linear head.")
        weight, bias = self._head[name].float(), name.replace("weight", "bias")
        if len(weight) != len(self.classes):
            raise InputError(
                f"'{self._head.location}' classifies into {len(weight)} classes, but {len(self.classes)} are named."
            )
        head = nn.Linear(weight.shape[1], len(weight), bias=bias in self._head)
        head.load_state_dict({n.partition(".")[2]: self._head[n].float() for n in (name, bias) if n in self._head})
        return head.requires_grad_(False)

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        """`input_ids` and `attention_mask`, `(batch, tokens)`, and labels of a split: by length, or shuffled."""
        check_split(split)
        rows = list(self.examples.rows(split, (*self.text, self.label)))
        if seed is None:  # neighbours of one length need little filling up
            rows.sort(key=lambda row: sum(len(str(row[column])) for column in self.text))
        for chosen in numbers(len(rows), size, seed):
            part = [rows[i] for i in chosen]
            for row, column in product(part, self.text):
                if not isinstance(row[column], str):
                    raise InputError(f"'{column}' of an example must be a text; got {row[column]!r}.")
            texts = [row[self.text[0]] if len(self.text) == 1 else tuple(row[t] for t in self.text) for row in part]
            yield self.tokens.encode(texts), torch.tensor([self._number(row[self.label]) for row in part])

    def predict(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Logits of a backbone, or of anything with its output: `(batch, classes)`."""
        first = check_texts(model, inputs)
        if getattr(getattr(first, "config", None), "is_encoder_decoder", False):
            raise other_family(first, "a text and give hidden states", "is an encoder and a decoder")
        states, mask = model(**inputs)[0], inputs["attention_mask"]  # last_hidden_state
        if states.shape[-1] != self.head.in_features:
            wanted = f"a text and give states of width {self.head.in_features}"
            raise other_family(first, wanted, f"gives states of {states.shape[-1]}")
        if self.pooling == "mean":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            at = mask.sum(1) - 1 if self.pooling == "last" else torch.zeros_like(mask[:, 0])
            pooled = states[torch.arange(len(states), device=states.device), at]
        return self.head.to(states)(pooled)

    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """Accuracy (0 to 1) and mean cross-entropy on a split; the model is put in evaluation mode."""
        return self.scored(model, split)[0]

    def scored(self, model: nn.Module, split: str = "test") -> tuple[Scores, Outcomes]:
        """The same, and of every example whether it is classified right (`correct`), and its cross-entropy (`loss`)."""
        return classified(self, model, split, self.batch_size, "texts")

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "text_classification",
            "version": self.version,
            "text": self.text,
            "label": self.label,
            "classes": self.classes,
            "head": Checkpoint.of(self.head.state_dict()).digest,
            "pooling": self.pooling,
            **self.tokens.describe(),
            "data": self.examples.digest(),
        }

    def _number(self, label: Any) -> int:
        if isinstance(label, str):
            if label not in self.classes:
                raise InputError(f"The label '{label}' is no class. {did_you_mean(label, self.classes)}")
            return self.classes.index(label)
        if type(label) is not int or not 0 <= label < len(self.classes):
            raise InputError(f"A label is {label!r}, but {len(self.classes)} classes are named.")
        return int(label)


def build(
    *,
    tokenizer: str,
    tasks: Mapping[str, Mapping[str, Any]],
    pooling: str = "last",
    max_length: int = 512,
    batch_size: int = 64,
    relative_to: Path | None = None,
) -> TaskPool:
    """A pool of text classification tasks that share one tokenizer.

    Args:
        tokenizer: folder of the tokenizer, often that of the base model.
        tasks: by name, `data` (a `.jsonl` file, or `{dataset, name, splits: {test, calibration}}` for the `datasets`
            library), `head` (the model whose `score.weight` classifies), `classes`, and, where they are called
            otherwise, the columns `text` (or a list of two) and `label`; a `.json` beside the data may say the same.
        pooling: see `TextClassification`.
        max_length: tokens that are kept of a text.
        batch_size: texts evaluated at once.
        relative_to: where local paths start that do not exist from here.
    """
    check_tasks(tasks)
    tokens = Tokens(find(tokenizer, relative_to=relative_to), max_length)
    found = {}
    for name, entry in tasks.items():
        known = ("data", "head", "classes", "text", "label", "version")
        check_keys(f"Task '{name}'", entry, known, required=("data", "head"))
        entry = with_card(entry["data"], entry, relative_to)
        if "classes" not in entry:
            raise InputError(f"Task '{name}': 'classes' is missing, in the YAML and in a .json beside the data.")
        text = entry.get("text", "text")
        found[name] = TextClassification(
            tokens,
            open_rows(name, entry["data"], relative_to),
            Checkpoint.open(find(entry["head"], relative_to=relative_to)),
            text=[text] if isinstance(text, str) else text,
            label=entry.get("label", "label"),
            classes=entry["classes"],
            pooling=pooling,
            batch_size=batch_size,
            version=entry.get("version", 1),
        )
    return TaskPool(found)
