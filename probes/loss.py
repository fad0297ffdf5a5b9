"""Differentiable losses over completion positions that never hold the logits of a whole batch.

For hidden states h_n, logits z_n = head(h_n) (the model's own scaling and soft-capping included) and weights w_n

    cross entropy   L = sum_n w_n (logsumexp(z_n) - z_n[y_n])
    uniform         L = sum_n w_n (logsumexp(z_n) - mean_v z_nv)   (to know nothing, arXiv 2406.08607)
    squared norm    L = sum_n w_n ||z_n||^2                        (label-free importance, arXiv 2402.19308)

The forward pass visits the positions a chunk at a time and, while the chunk's logits are there, also takes the
gradients with respect to the hidden states and to those head parameters that train. The backward pass only scales
what was stored, so memory is [N, d] plus one chunk of logits instead of [N, V] several times over. Cut Your Losses
(arXiv 2411.09009) does the same inside one kernel.

Shape letters: N positions, C positions in one chunk, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from probes.likelihood import CHUNK_ELEMENTS
from probes.modelmap import ModelMap

_Objective = Callable[[Tensor, slice], Tensor]  # logits [C, V] of the positions in the slice -> scalar


def cross_entropy(
    model_map: ModelMap,
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    uniforms: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Weighted sum of next-token cross entropies, in nats.

    Args:
        model_map: map of the causal language model that made `hidden`.
        hidden: [N, d] final hidden states of the positions that predict.
        labels: [N] int64, the token each position should predict.
        weights: [N] factor of each position: 1/N gives the mean.
        uniforms: [N] in [0, 1): when given, each label is instead drawn from the model's own distribution at that
            position by inverting its cumulative distribution, and `labels` is not read.
        chunk_elements: logits alive at once; the result depends on it by rounding only.

    Returns:
        A scalar that supports one backward pass, not a second derivative.
    """

    def objective(logits: Tensor, part: slice) -> Tensor:
        target = labels[part] if uniforms is None else sample(logits.detach(), uniforms[part])
        return functional.cross_entropy(logits, target, reduction="none") @ weights[part].to(logits)

    return _chunked(model_map, hidden, objective, chunk_elements)


def uniform(model_map: ModelMap, hidden: Tensor, weights: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Weighted sum of the cross entropies of the uniform distribution with the model's, in nats.

    At each position this is log V + KL(uniform || model), V the width of the logits: log V where the model is uniform,
    more elsewhere. In this form it stays finite however small a probability is.

    Arguments and result as for `cross_entropy`.
    """

    def objective(logits: Tensor, part: slice) -> Tensor:
        return uniform_entropies(logits) @ weights[part].to(logits)

    return _chunked(model_map, hidden, objective, chunk_elements)


def uniform_entropies(logits: Tensor) -> Tensor:
    """Cross entropy [...] of the uniform distribution with softmax(logits [..., V]), nats; at least log V."""
    return logits.logsumexp(-1) - logits.mean(-1)


def squared_norm(
    model_map: ModelMap, hidden: Tensor, weights: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Weighted sum of squared Euclidean norms of the logits; arguments and result as for `cross_entropy`."""

    def objective(logits: Tensor, part: slice) -> Tensor:
        return logits.square().sum(-1) @ weights[part].to(logits)

    return _chunked(model_map, hidden, objective, chunk_elements)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Classes [C] drawn from softmax(logits [C, V]), one per uniform number in [0, 1); never one of probability 0."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # [C, V]
    height = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, height, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _chunked(model_map: ModelMap, hidden: Tensor, objective: _Objective, chunk_elements: int) -> Tensor:
    size = max(1, chunk_elements // model_map.vocab_size)
    parts = [slice(start, start + size) for start in range(0, max(1, len(hidden)), size)]

    def value(states: Tensor, part: slice) -> Tensor:
        logits = model_map.logits(states)  # [C, V]
        return objective(logits if logits.dtype == torch.float64 else logits.float(), part)

    head = [p for p in model_map.model.get_submodule(model_map.head).parameters() if p.requires_grad]
    total: Tensor = _Chunked.apply(value, parts, hidden, *head)  # type: ignore[no-untyped-call]
    return total


class _Chunked(torch.autograd.Function):
    """Sum over parts of value(hidden[part], part); gradients are taken while the part's logits are alive."""

    @staticmethod
    def forward(
        ctx: Any, value: Callable[[Tensor, slice], Tensor], parts: list[slice], hidden: Tensor, *head: nn.Parameter
    ) -> Tensor:
        states_too = ctx.needs_input_grad[2]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        by_state = torch.empty_like(hidden) if states_too else None  # [N, d]
        by_head: list[Tensor] = []
        for part in parts:
            states = hidden[part].detach().requires_grad_(states_too)  # [C, d]
            with torch.set_grad_enabled(states_too or bool(head)):
                partial = value(states, part)
            total += partial.detach()
            if not partial.requires_grad:
                continue
            gradients = list(torch.autograd.grad(partial, [states, *head] if states_too else head))
            if by_state is not None:
                by_state[part] = gradients.pop(0)
            by_head = [a.add_(b) for a, b in zip(by_head, gradients, strict=True)] if by_head else gradients
        ctx.found = (by_state, *by_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None  # scaled in place, so it serves once
        if found is None:
            raise RuntimeError("expected one backward pass through this loss, found a second; compute the loss again")
        return None, None, *(None if x is None else x.mul_(scale.to(x.dtype)) for x in found)
