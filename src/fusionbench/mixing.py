"""Layers that hold several models, and choose between them by what they are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot


class SmileLinear(nn.Module):
    """A linear layer of a base, and for each model a low-rank expert for what it changed, chosen for every token.

    The output is `W x + sum_i p_i (U_i V_i x + b_i)` over the `top_k` experts of highest score: the norm of `x` in the
    directions in which a model changed the layer most. A bias is each expert's own, and not that of the base.

    Attributes:
        weight: of the base, `(out, in)`.
        gate: directions, `(experts, gate_rank, in)`.
        u, v: `(experts, out, rank)`, singular values in it, and `(experts, rank, in)`.
        bias: `(experts, out)`, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        experts: int,
        gate_rank: int,
        rank: int,
        top_k: int,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        gate_rank, rank = min(gate_rank, inputs, outputs), min(rank, inputs, outputs)
        self.top_k = top_k

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device))

        self.weight = parameter(outputs, inputs)
        self.gate = parameter(experts, gate_rank, inputs)
        self.u, self.v = parameter(experts, outputs, rank), parameter(experts, rank, inputs)
        self.bias = parameter(experts, outputs) if bias else None

    @torch.no_grad()
    def fill(self, base: Tensor, weights: Tensor, biases: Tensor | None) -> SmileLinear:
        """Take the base's weight `(out, in)`, and the models' weights and biases `(experts, ...)`."""
        self.weight.copy_(base)
        for i, weight in enumerate(weights):
            u, s, vt = torch.linalg.svd((weight - base).float(), full_matrices=False)
            rank, gate_rank = self.v.shape[1], self.gate.shape[1]
            self.gate[i].copy_(vt[:gate_rank])
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
        experts, rank, _ = self.v.shape
        inner = linear(x, self.v.flatten(0, 1)).unflatten(-1, (experts, rank)) * share[..., None]
        return y + linear(inner.flatten(-2), self.u.transpose(0, 1).flatten(1))
