"""Text to text: a prompt in, a few words out, compared with what is right (Raffel et al., 2020).

By models that encode the prompt and decode the answer, as T5, or that go on with the prompt, as Llama.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.errors import InputError, check_keys, did_you_mean, is_count
from fusionbench.locations import find
from fusionbench.task import Outcomes, Scores, TaskPool
from fusionbench.tasks._batches import check_texts, device_of, numbers, other_family, to_device
from fusionbench.tasks._data import HubRows, LinesFile, check_split, check_tasks, open_rows, with_card
from fusionbench.tasks._tokens import Inputs, Tokens

METRICS = ("accuracy", "spearman_rho")


class TextGeneration:
    """How often a model writes the right answer, or how well its numbers are ordered.

    Args:
        tokens: the tokenizer.
        examples: the data.
        prompt: what the model reads, with columns as `{sentence}`.
        target: the column of the answer.
        answers: the answer for each value of that column, or a format for numbers, as `{:.1f}`; without it the value
            itself is the answer.
        metric: `accuracy`, exact matches after stripping, or `spearman_rho`, the rank correlation of numbers.
        max_new_tokens: the most that is written.
        batch_size: texts evaluated at once.
        version: changes whenever scores of the task are no longer comparable.
    """

    def __init__(
        self,
        tokens: Tokens,
        examples: LinesFile | HubRows,
        *,
        prompt: str,
        target: str = "label",
        answers: Mapping[Any, str] | str | None = None,
        metric: str = "accuracy",
        max_new_tokens: int = 10,
        batch_size: int = 64,
        version: int = 1,
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"No metric of text generation is called '{metric}'. {did_you_mean(metric, METRICS)}")
        if not is_count(max_new_tokens):
            raise InputError(f"max_new_tokens must be a whole number of 1 or more; got {max_new_tokens!r}.")
        if answers is not None and not isinstance(answers, Mapping | str):
            raise InputError(f"answers must be a table by value, or a format such as '{{:.1f}}'; got {answers!r}.")
        try:
            self.columns = [name for _, name, _, _ in Formatter().parse(str(prompt)) if name]
        except ValueError as error:
            raise InputError(f"The prompt '{prompt}' is no format: {error}.") from None
        if not self.columns:
            raise InputError(f"The prompt '{prompt}' has no place for a column: write one as {{sentence}}.")
        self.tokens, self.examples = tokens, examples
        self.prompt, self.target = str(prompt), target
        self.answers = {str(v): a for v, a in answers.items()} if isinstance(answers, Mapping) else answers
        self.primary = metric
        self.max_new_tokens, self.batch_size, self.version = max_new_tokens, batch_size, version

    def examples_of(self, split: str) -> list[tuple[str, str]]:
        """Prompts and right answers of a split."""
        check_split(split)
        rows = self.examples.rows(split, (*self.columns, self.target))
        return [
            (self.prompt.format(**{column: row[column] for column in self.columns}), self._answer(row[self.target]))
            for row in rows
        ]

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        """`input_ids` and `attention_mask`, `(batch, tokens)`, and the tokens of the right answers, as are written."""
        examples = self.examples_of(split)
        for chosen in numbers(len(examples), size, seed):
            answers = self.tokens.encode([examples[i][1] for i in chosen])["input_ids"]
            if all(first == self.tokens.tokenizer.bos_token_id for first in answers[:, 0].tolist()):  # as by Llama's
                answers = answers[:, 1:]
            yield self.tokens.encode([examples[i][0] for i in chosen]), answers

    def predict(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Logits of the first token of the answer: `(batch, vocabulary)`.

        What `answered` returns may be given, too: of models with a decoder, of which it makes no difference.
        """
        _check_writes(model, inputs)
        if not _config(model).is_encoder_decoder:
            return model(**_ending(inputs), logits_to_keep=1).logits[:, -1]
        start = torch.full((len(inputs["input_ids"]), 1), _start(model), device=inputs["input_ids"].device)
        return model(**{"decoder_input_ids": start, **inputs}).logits[:, 0]

    @torch.no_grad()
    def answered(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """The inputs with what the model writes, but for its last token: all that it reads while it answers."""
        written = greedy(model, inputs, self.max_new_tokens)[:, :-1]
        config, ids, mask = _config(model), inputs["input_ids"], inputs["attention_mask"]
        ends = torch.tensor(config.eos_token_id).reshape(-1).to(written.device)
        ended = torch.isin(written, ends)
        if config.is_encoder_decoder:
            ended[:, 0] = False  # it begins so, whatever that is called
        kept = ended.cumsum(1) == 0
        if not config.is_encoder_decoder:
            texts = [torch.cat([i[m.bool()], w[k]]) for i, m, w, k in zip(ids, mask, written, kept, strict=True)]
            longer = [torch.ones_like(text) for text in texts]
            return {
                "input_ids": nn.utils.rnn.pad_sequence(texts, True, int(ends[0])),
                "attention_mask": nn.utils.rnn.pad_sequence(longer, True),
            }
        if written.shape == ids.shape:  # then a mask would not tell whose it is
            written, kept = (nn.functional.pad(each, (0, 1)) for each in (written, kept))
        return {**inputs, "decoder_input_ids": written, "decoder_attention_mask": kept.long()}

    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """The metric on a split, of greedy answers; the model is put in evaluation mode.

        Accuracy is 0 to 1, Spearman's rho -1 to 1. An answer that is no number counts as 0 in a rank correlation, and
        `unparsable` is the share of such answers.
        """
        return self.scored(model, split)[0]

    @torch.no_grad()
    def scored(self, model: nn.Module, split: str = "test") -> tuple[Scores, Outcomes]:
        """The same, and of every example whether the answer is right (`correct`); or the numbers `written` and `right`.

        What is written and is no number is NaN.
        """
        model.eval()
        device = device_of(model)
        examples = self.examples_of(split)
        if not examples:
            raise InputError(f"The {split} split has no texts: there is nothing to score.")
        examples.sort(key=lambda example: len(example[0]))  # neighbours of one length need little filling up
        written: list[str] = []
        for chosen in numbers(len(examples), self.batch_size):
            inputs = to_device(self.tokens.encode([examples[i][0] for i in chosen]), device)
            tokens = greedy(model, inputs, self.max_new_tokens)
            written += self.tokens.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if self.primary == "accuracy":
            same = np.array([w.strip() == answer.strip() for w, (_, answer) in zip(written, examples, strict=True)])
            return {"accuracy": float(same.mean())}, {"correct": same}
        found = [_number(text) for text in written]
        right = [_number(answer) for _, answer in examples]
        if None in right:
            answer = examples[right.index(None)][1]
            raise InputError(f"spearman_rho compares numbers, but an answer is '{answer}'. Choose metric: accuracy.")
        numbers_of = {"written": np.array(found, float), "right": np.array(right, float)}
        rho = spearman(np.nan_to_num(numbers_of["written"]), numbers_of["right"])
        return {"spearman_rho": rho, "unparsable": float(np.isnan(numbers_of["written"]).mean())}, numbers_of

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "text_generation",
            "version": self.version,
            "prompt": self.prompt,
            "target": self.target,
            "answers": self.answers,
            "metric": self.primary,
            "max_new_tokens": self.max_new_tokens,
            **self.tokens.describe(),
            "data": self.examples.digest(),
        }

    def _answer(self, value: Any) -> str:
        if self.answers is None:
            return str(value)
        if isinstance(self.answers, str):
            try:
                return self.answers.format(value)
            except (ValueError, IndexError, KeyError):
                raise InputError(f"The answers' format '{self.answers}' does not take the label {value!r}.") from None
        if str(value) not in self.answers:
            raise InputError(f"The label '{value}' has no answer. {did_you_mean(str(value), self.answers)}")
        return self.answers[str(value)]


def greedy(model: nn.Module, inputs: Inputs, max_new_tokens: int) -> Tensor:
    """The most probable token after the other, `(batch, at most 1 + max_new_tokens)`, until all texts have ended.

    Of a model with an encoder, one forward pass a token, so that whatever answers `model(...)` with logits can write.
    What was read is the same for every token: models of transformers encode it once, and so does each model of an
    ensemble.
    """
    from transformers import PreTrainedModel

    from fusionbench.ensemble import Ensemble

    _check_writes(model, inputs)
    config = _config(model)
    if not config.is_encoder_decoder:
        return _continued(model, inputs, max_new_tokens)
    tokens = torch.full((len(inputs["input_ids"]), 1), _start(model), device=inputs["input_ids"].device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    models = list(model.models) if isinstance(model, Ensemble) else [model]
    encoded = [{"encoder_outputs": m.get_encoder()(**inputs)} if isinstance(m, PreTrainedModel) else {} for m in models]
    for _ in range(max_new_tokens):
        outputs = [
            m(**inputs, **e, decoder_input_ids=tokens).logits[:, -1] for m, e in zip(models, encoded, strict=True)
        ]
        logits = model.combine(torch.stack(outputs)) if isinstance(model, Ensemble) else outputs[0]
        chosen = logits.argmax(-1).masked_fill(ended, config.pad_token_id)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        ended |= chosen == config.eos_token_id
        if ended.all():
            break
    return tokens


def _continued(model: nn.Module, inputs: Inputs, max_new_tokens: int) -> Tensor:
    """The same of a model that goes on with what it reads; what it has read is kept in its cache."""
    from fusionbench.ensemble import Ensemble

    config = _config(model)
    ends = torch.tensor(config.eos_token_id).reshape(-1).to(inputs["input_ids"].device)
    models = list(model.models) if isinstance(model, Ensemble) else [model]
    caches: list[Any] = [None] * len(models)
    step = _ending(inputs)
    mask, written = step["attention_mask"], []
    ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    for _ in range(max_new_tokens):
        outputs = [
            m(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for m, cache in zip(models, caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        logits = [output.logits[:, -1] for output in outputs]
        best = (model.combine(torch.stack(logits)) if isinstance(model, Ensemble) else logits[0]).argmax(-1)
        written.append(torch.where(ended, ends[0], best))
        ended |= torch.isin(best, ends)
        if ended.all():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = {"input_ids": written[-1][:, None], "attention_mask": mask, "position_ids": mask.sum(1)[:, None] - 1}
    return torch.stack(written, 1)


def _ending(inputs: Inputs) -> Inputs:
    """Texts that were filled up on the right, filled up on the left: all end at the same place."""
    counts = (inputs["attention_mask"].shape[1] - inputs["attention_mask"].sum(1)).tolist()
    ids, mask = (
        torch.stack([row.roll(count) for row, count in zip(inputs[name], counts, strict=True)])
        for name in ("input_ids", "attention_mask")
    )
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation, tied values sharing the mean of their ranks; 0 where one side is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


def build(
    *,
    tokenizer: str,
    tasks: Mapping[str, Mapping[str, Any]],
    max_length: int = 512,
    batch_size: int = 64,
    relative_to: Path | None = None,
) -> TaskPool:
    """A pool of text-to-text tasks that share one tokenizer.

    Args:
        tokenizer: folder of the tokenizer, often that of the base model.
        tasks: by name, `data` (a `.jsonl` file, or `{dataset, name, splits: {test, calibration}}` for the `datasets`
            library), `prompt`, and perhaps `target` (a column), `answers` (by value, or a format), `metric` and
            `max_new_tokens`; a `.json` beside the data may say the same.
        max_length: tokens that are kept of a prompt.
        batch_size: texts evaluated at once.
        relative_to: where local paths start that do not exist from here.
    """
    check_tasks(tasks)
    tokens = Tokens(find(tokenizer, relative_to=relative_to), max_length)
    options = ("prompt", "target", "answers", "metric", "max_new_tokens", "version")
    found = {}
    for name, entry in tasks.items():
        check_keys(f"Task '{name}'", entry, ("data", *options), required=("data",))
        entry = with_card(entry["data"], entry, relative_to)
        if "prompt" not in entry:
            raise InputError(f"Task '{name}': 'prompt' is missing, in the YAML and in a .json beside the data.")
        given = {key: entry[key] for key in options if key in entry}
        found[name] = TextGeneration(
            tokens, open_rows(name, entry["data"], relative_to), **given, batch_size=batch_size
        )
    return TaskPool(found)


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _check_writes(model: nn.Module, inputs: Inputs) -> None:
    """An error where a model takes no texts, or writes none."""
    first = check_texts(model, inputs)
    if hasattr(first, "get_output_embeddings") and first.get_output_embeddings() is None:
        raise other_family(first, "input_ids and write tokens", "writes none")


def _config(model: nn.Module) -> Any:
    """The config of a model, or of the first part that has one."""
    return next(module.config for module in model.modules() if hasattr(module, "config"))


def _start(model: nn.Module) -> int:
    return _config(model).decoder_start_token_id
