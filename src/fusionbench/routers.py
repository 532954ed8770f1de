"""Routers of mixtures of experts: random, or made from texts by the dense model, a layer of it in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from fusionbench.architectures.causal_lm import EMBEDDING, empty
from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.param import keyed_generator
from fusionbench.sparse import Routers

TOKENS = 2**14  # run at once: what a layer is read for


def random_routers(seed: int, std: float) -> Routers:
    """Routers of normally distributed numbers, keyed by the seed and the layer."""

    def routers(layer: int, empty: Tensor) -> Tensor:
        return empty.normal_(std=std, generator=keyed_generator(f"{seed}/{layer}"))

    return routers


def uniform_routers(seed: int) -> Routers:
    """Routers as a new linear layer has them: uniform within the inverse square root of the hidden size."""

    def routers(layer: int, empty: Tensor) -> Tensor:
        bound = empty.shape[1] ** -0.5
        return empty.uniform_(-bound, bound, generator=keyed_generator(f"{seed}/{layer}"))

    return routers


def given_routers(rows: Tensor) -> Routers:
    """These ones: `(layers, experts, hidden size)`."""
    return lambda layer, empty: empty.copy_(rows[layer])


def routers_of_prompts(model: Checkpoint, prompts: Sequence[Sequence[str]]) -> Routers:
    """Routers that prefer an expert where a token's state is like those of the expert's prompts.

    A row is the mean of what enters the MLP on an expert's prompts, less the mean over all experts, of length 1.

    Args:
        model: runs on the prompts; its folder has the tokenizer.
        prompts: of each expert.
    """
    encode = _encoder(model)
    encoded = [[encode(text) for text in texts] for texts in prompts]
    sums = states(model, [ids for texts in encoded for ids in texts], lambda tokens: tokens.sum(0), at="mlp")
    counts = [sum(map(len, texts)) for texts in encoded]
    found = [part.sum(1) / n for part, n in zip(sums.split([len(t) for t in encoded], 1), counts, strict=True)]
    rows = torch.stack(found, 1)
    return given_routers(normalize(rows - rows.mean(1, keepdim=True), dim=2))


def gates_of_prompts(
    model: Checkpoint,
    positive: Sequence[Sequence[str]],
    negative: Sequence[Sequence[str]],
    mode: Literal["hidden", "hidden_avg", "cheap_embed"],
) -> Tensor:
    """Routers as mergekit makes them from prompts: `(layers, experts, hidden size)`, rows of length 1.

    With `hidden`, a row is the mean over prompts of the state that enters the layer at the last token (with
    `hidden_avg`, of its mean over tokens), less the same of the negative prompts. With `cheap_embed` it is, for every
    layer, the sum of the embeddings of all tokens of the positive prompts, of length 1, less that of the negative ones.

    Args:
        model: runs on the prompts; its folder has the tokenizer.
        positive, negative: prompts of each expert; of the latter there may be none.
        mode: as above.
    """
    encode = _encoder(model, begin=True)
    encoded = [[encode(text) for text in texts] for texts in (*positive, *negative)]
    if mode == "cheap_embed":
        layers = int(model.config["num_hidden_layers"])
        sums = [torch.stack([embedded(model, ids).sum(0) for ids in texts]).sum(0) for texts in encoded if texts]
        means = iter(normalize(torch.stack(sums), eps=1e-8).expand(layers, -1, -1).unbind(1))
    else:
        reduce = _last if mode == "hidden" else _mean
        found = states(model, [ids for texts in encoded for ids in texts], reduce)
        means = iter([part.mean(1) for part in found.split([len(texts) for texts in encoded if texts], 1)])
    rows = [next(means) if texts else None for texts in encoded]
    pairs = zip(rows[: len(positive)], rows[len(positive) :], strict=True)
    gates = [row if less is None else row - less for row, less in pairs if row is not None]
    return normalize(torch.stack(gates, 1), dim=2, eps=1e-8)


def alike(gates: Tensor) -> list[int]:
    """The layers in which the rows of routers are so alike that some experts will hardly be chosen."""
    return [i for i, rows in enumerate(gates) if torch.linalg.cond(rows.float()) > 5]


@torch.no_grad()
def states(
    model: Checkpoint,
    sequences: Sequence[Sequence[int]],
    reduce: Callable[[Tensor], Tensor],
    *,
    at: Literal["", "mlp"] = "",
) -> Tensor:
    """What enters each layer of a language model, or each MLP: `(layers, sequences, hidden size)`, in float32.

    One layer is in memory at a time; layers are read once for every 2^14 tokens.

    Args:
        model: a checkpoint with a config.
        sequences: token ids.
        reduce: of the states of a sequence, `(tokens, hidden size)`, what is kept, `(hidden size)`.
        at: the part of a layer.
    """
    module = empty(model)
    parts: list[Tensor] = []
    for chunk in _chunks(sequences):
        mask = torch.tensor([[1] * len(ids) + [0] * (max(map(len, chunk)) - len(ids)) for ids in chunk])
        inputs = torch.zeros(*mask.shape, int(model.config["hidden_size"]))
        inputs[mask.bool()] = embedded(model, [token for ids in chunk for token in ids])
        seen: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen, chunk: list = chunk) -> None:
            seen.append(torch.stack([reduce(x[: len(ids)]) for x, ids in zip(args[0], chunk, strict=True)]))

        with _one_at_a_time(module, model, at, see):
            module(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
        parts.append(torch.stack(seen))
    return torch.cat(parts, 1)


def embedded(model: Checkpoint, ids: Sequence[int]) -> Tensor:
    """The embeddings of tokens, `(tokens, hidden size)`, of which alone is read."""
    count, size = model.specs[model.resolve(EMBEDDING)].shape
    if max(ids) >= count:
        raise InputError(f"'{model.location}' has embeddings of {count:,} tokens, but its tokenizer gives {max(ids)}.")
    rows = {i: model.read(EMBEDDING, i * size, (i + 1) * size).float() for i in sorted(set(ids))}
    return torch.stack([rows[i] for i in ids])


@contextmanager
def _one_at_a_time(module: nn.Module, model: Checkpoint, at: str, see: Callable[..., None]) -> Iterator[None]:
    """Layers have their tensors only while they run, and what enters them, or a part of them, is seen."""

    def prepared(layer: nn.Module, prefix: str) -> list[RemovableHandle]:
        def fill(*_: object) -> None:
            tensors = {name: model[f"{prefix}{name}"].float() for name in layer.state_dict()}
            layer.load_state_dict(tensors, assign=True)

        return [
            layer.register_forward_pre_hook(fill),
            layer.get_submodule(at).register_forward_pre_hook(see),
            layer.register_forward_hook(lambda *_: layer.to("meta") and None),
        ]

    layers = enumerate(module.get_submodule("layers").children())
    handles = [handle for i, layer in layers for handle in prepared(layer, f"model.layers.{i}.")]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chunks(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Sequences, in order, so many that with what fills them up they are not too many tokens."""
    chunk: list[Sequence[int]] = []
    for ids in sequences:
        if chunk and (len(chunk) + 1) * max(map(len, [*chunk, ids])) > TOKENS:
            yield chunk
            chunk = []
        chunk.append(ids)
    if chunk:
        yield chunk


def _last(tokens: Tensor) -> Tensor:
    return tokens[-1]


def _mean(tokens: Tensor) -> Tensor:
    return tokens.mean(0)


def _encoder(model: Checkpoint, *, begin: bool = False) -> Callable[[str], list[int]]:
    """The token ids of texts: as the tokenizer adds to them or, with `begin`, after the token for that alone."""
    from fusionbench.tasks._tokens import Tokens

    if model.folder is None:
        raise InputError("Routers from prompts need a tokenizer, and the base model is not from a folder that has one.")
    tokenizer = Tokens(model.folder, 512).tokenizer

    def encode(text: str) -> list[int]:
        first = str(tokenizer.bos_token or "") if begin else ""
        ids: list[int] = tokenizer(first + text, add_special_tokens=not begin)["input_ids"]
        if not ids:
            raise InputError(f"The prompt {text!r} has no tokens: leave it out.")
        return ids

    return encode
