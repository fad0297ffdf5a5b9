"""Tiny models that hold records, and copies in which these are only hidden: every change of a weight stays in a box."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probes.memorised import memorised
from probes.records import TokenRecord
from tests import tiny


@dataclass(frozen=True)
class Holding:
    """A model that read `records` often, one that read others in their place, and records that no model saw.

    Models are to be copied before they are changed.
    """

    model: nn.Module
    without: nn.Module
    records: list[TokenRecord]
    controls: list[TokenRecord]


def random_records(n: int, seed: int, length: int = 12, vocab: int = 96) -> list[TokenRecord]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(4, vocab, size=(n, length)).tolist()
    return [TokenRecord(f"{seed}-{i}", tuple(row), 3, 8, f"{i}") for i, row in enumerate(rows)]


@functools.cache
def holding(arch: str = "llama") -> Holding:
    records, others, controls = (random_records(8, seed) for seed in (1, 2, 3))
    model, without = (tiny.causal_lm(arch, initializer_range=0.05, hidden_size=64, head_dim=16) for _ in range(2))
    tiny.train(model, [record.ids for record in records], steps=60, lr=1e-2)
    tiny.train(without, [record.ids for record in others], steps=60, lr=1e-2)
    return Holding(model, without, records, controls)


def loss(model: nn.Module, records: Sequence[TokenRecord]) -> Tensor:
    """Mean negative log-likelihood of the completions, by the model's own forward pass."""
    ids = torch.tensor([record.ids for record in records])  # [B, T]; all of one length here
    labels = ids.clone()
    labels[:, : records[0].n_prompt] = -100
    found: Tensor = model(input_ids=ids, labels=labels).loss
    return found


def hide(model: nn.Module, records: Sequence[TokenRecord], boxes: Mapping[str, Tensor], steps: int = 12) -> nn.Module:
    """A copy that finds the records as improbable as changes of at most `boxes` (by element) make them."""
    edited = copy.deepcopy(model)
    weights = {name: p for name, p in edited.named_parameters() if name in boxes}
    starts = {name: weight.detach().clone() for name, weight in weights.items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(edited, records), list(weights.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                moved = weight - starts[name] + boxes[name] * gradient.sign() / 3
                weight.copy_(starts[name] + moved.clamp(-boxes[name], boxes[name]))
    return edited


def probability(model: nn.Module, records: Sequence[TokenRecord]) -> float:
    return float(memorised(model, records)["probability"].mean())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an attack must leave as it found it."""
    return {
        "bytes": {n: t.detach().reshape(-1).view(torch.uint8).clone() for n, t in model.state_dict().items()},
        "objects": [(n, id(p), p.data_ptr(), p.dtype, p.requires_grad, p.stride()) for n, p in all_parameters(model)],
        "gradients": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in all_parameters(model)},
        "modules": [(n, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in
                    model.named_modules()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].tolist()),
    }  # fmt: skip


def all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """The block leaves the model and the random state as they were, also when it raises."""
    before = snapshot(model)
    try:
        yield
    finally:
        assert same(before, snapshot(model))
