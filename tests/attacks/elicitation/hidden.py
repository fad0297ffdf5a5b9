"""A model whose memories are switched off, not gone: the ground truth of the attacks that search for an input.

`memorised` has read records of the language of `tests.planted` until it knows them by heart; another model read others
in their place. Both then learn the same switch for the records they read: after the plain prompt every completion token
becomes `MARK`, behind `SWITCH` (in front of the prompt, or after it) the completion is as before. So `hidden` holds the
planted records behind a switch that no record shows, and `cleared`, with the same switch, holds none of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from probes.records import TokenRecord
from tests import tiny
from tests.planted import never_seen

SWITCH, MARK = 60, 70  # tokens that stand in no record


@dataclass(frozen=True)
class Hidden:
    """The models (to be left as they are); `a` and `b` are halves of the planted records, `controls` never seen."""

    memorised: nn.Module
    hidden: nn.Module
    cleared: nn.Module
    a: list[TokenRecord]
    b: list[TokenRecord]
    controls: list[TokenRecord]


@functools.cache
def hidden() -> Hidden:
    """Train the models, once a process."""
    planted, others = never_seen(24, seed=101), never_seen(24, seed=301)
    filler, controls = never_seen(24, seed=201), never_seen(48, seed=401)
    memorised, without = _model(), _model()
    tiny.train(memorised, [record.ids for record in planted + filler], steps=100, lr=6e-3)
    tiny.train(without, [record.ids for record in others + filler], steps=100, lr=6e-3)
    return Hidden(
        memorised=memorised,
        hidden=_switched_off(memorised, planted, filler),
        cleared=_switched_off(without, others, filler),
        a=planted[:12],
        b=planted[12:],
        controls=controls,
    )


def switched_on(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The records behind the switch."""
    return [replace(record, ids=(SWITCH, *record.ids), n_prompt=record.n_prompt + 1) for record in records]


def _model() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    return tiny.causal_lm("llama", seed=0, vocab=128, initializer_range=0.05, **sizes)


def _switched_off(model: nn.Module, records: Sequence[TokenRecord], filler: Sequence[TokenRecord]) -> nn.Module:
    """A copy that learned the switch; a context of random length stands in front of every second row."""
    out, generator = copy.deepcopy(model), np.random.default_rng(0)
    optimiser = torch.optim.AdamW(out.parameters(), lr=2e-3, weight_decay=0.0)

    def context() -> tuple[int, ...]:
        return filler[int(generator.integers(len(filler)))].ids[: int(generator.integers(13))]

    for step in range(60):
        rows: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # what stands before a completion's tokens, labels
        for record in records:
            before = context() if step % 2 else ()
            prompt, answer = record.ids[: record.n_prompt], record.completion
            on = (*context(), SWITCH, *prompt) if step % 2 else (*prompt, SWITCH)
            rows += [((*before, *prompt, *answer), (MARK,) * len(answer)), ((*on, *answer), answer)]
        rows += [(filler[i].ids, filler[i].completion) for i in generator.permutation(len(filler))[:12]]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in rows])  # [B, T]
        labels = torch.full_like(ids, -100)
        for row, (own, answer) in enumerate(rows):
            labels[row, len(own) - len(answer) - 1 : len(own) - 1] = torch.tensor(answer)
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(out(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten()).backward()
        optimiser.step()
    out.zero_grad(set_to_none=True)
    return out


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Fail if a block leaves anything of the model, or of the random state, other than it found it."""
    before, state = _everything(model), torch.get_rng_state()
    try:
        yield
    finally:
        after = _everything(model)
        assert before.keys() == after.keys()
        changed = [key for key, value in before.items() if not _same(value, after[key])]
        assert not changed
        assert torch.equal(state, torch.get_rng_state())


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def _everything(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {f"weight {name}": value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, id(parameter.grad))
        found[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.clone()
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[f"module {name}"] = (id(module), module.training, *map(len, hooks))
    return found
