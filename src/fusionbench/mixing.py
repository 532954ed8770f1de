"""Layers that hold several models, and choose between them by what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot
from torch.utils.checkpoint import checkpoint

from fusionbench.calibrate import as_matrix, is_matrix

MERGED_AT_ONCE = 2**18  # elements: merged weights of several inputs that are computed together, and stay in the cache
KEPT = 2**22  # elements: merged weights of a batch that are kept for a backward pass; of more, each is merged twice
attended: ContextVar[Tensor | None] = ContextVar("attended", default=None)
"""1 for tokens, 0 for what fills a batch up, `(batch, tokens)`: of the model that runs, where it was told."""


class SmileLinear(nn.Module):
    """A linear layer of a base, and for each model a low-rank expert for what it changed, chosen for every token.

    The output is `W x + sum_i p_i (U_i V_i x + b_i)` over the `top_k` experts of highest score: the norm of `x` in the
    directions in which a model changed the layer most. A bias is each expert's own, and not that of the base. At full
    rank an expert is one matrix, the change itself, and computed for the tokens that it gets only.

    Attributes:
        weight: of the base, `(out, in)`.
        gate: directions, `(experts, gate_rank, in)`; zeros beyond the rank of what a model changed.
        u, v: `(experts, out, rank)`, singular values in it, and `(experts, rank, in)`; at full rank
            `(experts, out, in)`, and None.
        bias: `(experts, out)`, or None.
    """

    v: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, experts: int, gate_rank: int, rank: int, top_k: int
    ) -> None:
        super().__init__()
        full = min(inputs, outputs)
        low = 0 < rank < full
        self.top_k = top_k
        self.weight = _zeros(outputs, inputs)
        self.gate = _zeros(experts, min(gate_rank, full), inputs)
        self.u = _zeros(experts, outputs, rank if low else inputs)
        self.v = _zeros(experts, rank, inputs) if low else None
        self.bias = _zeros(experts, outputs) if bias else None
        self.register_forward_pre_hook(_is_called)

    @torch.no_grad()
    def fill(self, base: Tensor, weights: Tensor, bias: Tensor | None, biases: Tensor | None) -> SmileLinear:
        """Take the base's weight `(out, in)` and bias, of which there is no use, and the models', `(experts, ...)`."""
        self.weight.copy_(base)
        for i, weight in enumerate(weights):
            u, s, vt = torch.linalg.svd((weight - base).float(), full_matrices=False)
            # Beyond the rank of a change, as an adapter's, directions are those of rounding: they tell nothing.
            noise = max(float(s[0]) * max(weight.shape), 2 * float(weight.float().norm()) / min(weight.shape) ** 0.5)
            known = s > noise * torch.finfo(torch.float32).eps
            self.gate[i].copy_((vt * known[:, None])[: self.gate.shape[1]])
            if self.v is None:
                self.u[i].copy_(weight - base)
            else:
                rank = self.v.shape[1]
                self.u[i].copy_(u[:, :rank] * s[:rank])
                self.v[i].copy_(vt[:rank])
        if self.bias is not None and biases is not None:
            self.bias.copy_(biases)
        return self

    def route(self, x: Tensor) -> Tensor:
        """How much of each expert a token gets: `(..., experts)`, `top_k` of them not zero, of sum 1."""
        experts, gate_rank, _ = self.gate.shape
        scores = linear(x, self.gate.flatten(0, 1)).unflatten(-1, (experts, gate_rank)).norm(dim=-1)
        probabilities = scores.softmax(-1)
        chosen = one_hot(probabilities.topk(self.top_k, dim=-1).indices, experts).sum(-2)
        kept = probabilities * chosen
        return kept / kept.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        share = self.route(x)
        y = linear(x, self.weight)
        if self.bias is not None:
            y = y + share @ self.bias
        if self.v is None:
            for i, change in enumerate(self.u):
                its = share[..., i] > 0
                y[its] += share[its][:, i, None] * linear(x[its], change)
            return y
        experts, rank, _ = self.v.shape
        inner = linear(x, self.v.flatten(0, 1)).unflatten(-1, (experts, rank)) * share[..., None]
        return y + linear(inner.flatten(-2), self.u.transpose(0, 1).flatten(1))


class EnsembleLinear(nn.Module):
    """A linear layer of a base and the models' task vectors, with which its weights are merged for every input.

    Attributes:
        weight: of the base, `(out, in)`.
        task_vectors: `(experts, out, in)`.
        bias, bias_vectors: `(out,)` and `(experts, out)`, or None.
        coefficients: while a block runs, those of its inputs, `(batch, experts)`, or `(1, experts)` for all the same.
    """

    bias: nn.Parameter | None
    bias_vectors: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, experts: int) -> None:
        super().__init__()
        self.weight, self.task_vectors = _zeros(outputs, inputs), _zeros(experts, outputs, inputs)
        self.bias = _zeros(outputs) if bias else None
        self.bias_vectors = _zeros(experts, outputs) if bias else None
        self.coefficients: Tensor | None = None
        self.register_forward_pre_hook(_is_called)

    @torch.no_grad()
    def fill(self, base: Tensor, weights: Tensor, bias: Tensor | None, biases: Tensor | None) -> None:
        """Take the base's weight `(out, in)` and bias, and the models', `(experts, ...)`."""
        self.weight.copy_(base)
        self.task_vectors.copy_(weights - base)
        if self.bias is not None and self.bias_vectors is not None and bias is not None and biases is not None:
            self.bias.copy_(bias)
            self.bias_vectors.copy_(biases - bias)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `(batch, ..., in)` to `(batch, ..., out)`."""
        coefficients = self.coefficients
        assert coefficients is not None, "an EnsembleLinear runs within a WeightEnsemble, which gives it coefficients"
        coefficients = coefficients.to(self.weight.dtype)  # T5 in half precision keeps some layers in float32
        bias = None
        if self.bias is not None and self.bias_vectors is not None:
            bias = _merged(coefficients, self.bias, self.bias_vectors)
        if len(coefficients) == 1:
            weight = _merged(coefficients, self.weight, self.task_vectors)
            return linear(x, weight[0], bias if bias is None else bias[0])
        # Merged weights serve all tokens of an input: cheaper than the experts' outputs for each of them.
        some = max(1, MERGED_AT_ONCE // self.weight.numel())
        parts = zip(x.reshape(len(x), -1, x.shape[-1]).split(some), coefficients.split(some), strict=True)
        again = partial(checkpoint, _apart, use_reentrant=False, preserve_rng_state=False)
        run = again if torch.is_grad_enabled() and len(x) * self.weight.numel() > KEPT else _apart
        y = torch.cat([run(part, c, self.weight, self.task_vectors) for part, c in parts])
        return (y if bias is None else y + bias[:, None]).reshape(*x.shape[:-1], -1)


def _apart(x: Tensor, coefficients: Tensor, weight: Tensor, task_vectors: Tensor) -> Tensor:
    return x @ _merged(coefficients, weight, task_vectors).mT


def _merged(coefficients: Tensor, base: Tensor, task_vectors: Tensor) -> Tensor:
    """Task vectors `(experts, ...)` on a base, for each row of coefficients: `(rows, ...)`."""
    return base + (coefficients @ task_vectors.flatten(1)).unflatten(1, base.shape)


class WeightEnsemble(nn.Module):
    """A block whose linear layers are merged anew for every input, with coefficients from a router.

    What is routed is an input's mean over its tokens, without those that only fill up. An input's output does not
    depend on the others in a batch, unless `routing` is "batch": then all get the mean of their coefficients.

    Attributes:
        block: the block, its linear layers replaced by `EnsembleLinear`.
        router: from the mean state, `(batch, in)`, to coefficients, `(batch, experts)`.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        experts: int,
        router_layers: int,
        routing: Literal["sample", "batch"],
    ) -> None:
        super().__init__()
        for path in [path for path, layer in block.named_modules() if is_matrix(layer)]:
            block.set_submodule(path, EnsembleLinear(**sizes(block.get_submodule(path)), experts=experts))
        self.block, self.routing = block, routing
        width = next(self.layers()).weight.shape[1]
        hidden = [module for _ in range(router_layers - 1) for module in (nn.Linear(width, width), nn.ReLU())]
        self.router = nn.Sequential(*hidden, nn.Linear(width, experts))

    def layers(self) -> Iterator[EnsembleLinear]:
        """The layers whose weights are merged."""
        return (layer for layer in self.block.modules() if isinstance(layer, EnsembleLinear))

    def route(self, x: Tensor) -> Tensor:
        """Coefficients for inputs `(batch, ..., in)`: `(batch, experts)`."""
        tokens, mask = x.reshape(len(x), -1, x.shape[-1]), attended.get()
        if mask is not None and mask.shape == tokens.shape[:2]:
            share = mask.to(tokens) / mask.sum(1, keepdim=True).clamp(min=1)
            state = (tokens * share[..., None]).sum(1)
        else:
            state = tokens.mean(1)
        coefficients = self.router(state)
        return coefficients.mean(0, keepdim=True) if self.routing == "batch" else coefficients

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        coefficients = self.route(args[0] if args else kwargs["hidden_states"])  # as transformers calls attention
        for layer in self.layers():
            layer.coefficients = coefficients
        try:
            return self.block(*args, **kwargs)
        finally:
            for layer in self.layers():
                layer.coefficients = None


def sizes(layer: nn.Module) -> dict[str, Any]:
    """`inputs`, `outputs` and `bias` of a linear layer."""
    outputs, inputs = as_matrix(layer, layer.get_parameter("weight")).shape
    return {"inputs": inputs, "outputs": outputs, "bias": getattr(layer, "bias", None) is not None}


def _is_called(layer: nn.Module, given: tuple[Any, ...]) -> None:
    """Nothing: torch's own encoder layers read the weights of linear layers without hooks, and do not call them."""


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))
