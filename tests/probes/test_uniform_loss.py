"""The uniform loss against its definition written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from probes.loss import uniform, uniform_entropies
from probes.modelmap import ModelMap
from tests.tiny import causal_lm, seeded

F64 = torch.float64


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk", [1, 96 * 3, 1 << 22])
def test_it_is_the_cross_entropy_with_a_uniform_target(arch: str, chunk: int) -> None:
    model = causal_lm(arch, dtype=F64)
    model_map = ModelMap.of(model)
    head = list(model.get_submodule(model_map.head).parameters())
    with seeded(1):
        hidden, weights = torch.randn(8, 32, dtype=F64, requires_grad=True), torch.randn(8, dtype=F64)
    loss = uniform(model_map, hidden, weights, chunk_elements=chunk)
    found = torch.autograd.grad(2 * loss, [hidden, *head])
    target = torch.full((8, 96), 1 / 96, dtype=F64)
    each = -(target * model_map.logits(hidden).log_softmax(-1)).sum(-1)
    expected = torch.autograd.grad(2 * each @ weights, [hidden, *head])
    assert float(loss.detach()) == pytest.approx(float((each @ weights).detach()), rel=1e-10)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_its_excess_over_log_v_is_the_divergence_from_uniform() -> None:
    with seeded(2):
        logits = 3 * torch.randn(4, 7, dtype=F64)
    p = logits.softmax(-1)
    divergence = sum((1 / 7) * ((1 / 7) / p[:, v]).log() for v in range(7))
    torch.testing.assert_close(uniform_entropies(logits) - math.log(7), divergence, rtol=1e-12, atol=1e-12)
    flat = uniform_entropies(torch.full((3, 7), -41.5, dtype=F64))
    torch.testing.assert_close(flat, torch.full((3,), math.log(7), dtype=F64))


def test_a_gap_that_underflows_a_softmax_stays_finite() -> None:
    """The released code takes softmax().log(), infinite where a logit lies more than about 104 below the largest."""
    logits = torch.zeros(1, 96)
    logits[0, 0] = 300.0
    assert not bool(logits.softmax(-1).log().mean().isfinite())
    assert float(uniform_entropies(logits)) == pytest.approx(300.0 * 95 / 96, rel=1e-6)
    model = causal_lm("llama").requires_grad_(False)
    model_map = ModelMap.of(model)
    hidden = (2000 * torch.ones(2, 32)).requires_grad_()
    with torch.no_grad():
        spread = model_map.logits(hidden)
    assert float(spread.max() - spread.min()) > 208
    loss = uniform(model_map, hidden, torch.full((2,), 0.5))
    loss.backward()
    assert bool(loss.isfinite())
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


def test_logits_are_made_a_chunk_at_a_time() -> None:
    model: nn.Module = causal_lm("llama").requires_grad_(False)
    model_map, rows = ModelMap.of(model), list[int]()
    model.get_submodule(model_map.head).register_forward_hook(lambda _m, _x, y: rows.append(len(y)))
    uniform(model_map, torch.randn(50, 32, requires_grad=True), torch.ones(50), chunk_elements=96 * 8)
    assert (max(rows), sum(rows)) == (8, 50)
