"""What hiding looks like, on a model small enough to train in seconds: the ground truth of the re-audit.

Four models of one architecture over records of `tests.planted`'s language:

    planted     trained on the forget and the retain records until it emits them
    retrained   trained on the retain records alone, as long: it never held the forget records
    suppressed  `planted` after a few steps of gradient ascent on the forget records beside descent on the retain ones:
                nothing is emitted any more, and most of it is still there
    untrained   the common starting point

`control` are records of the same distribution that none of them was shown. Relearning on half of the forget records
brings the other half back in `suppressed`, and in no other model that does not emit them already.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from probes.records import TokenRecord
from tests import planted, tiny

FORGET, RETAIN, CONTROL = 48, 48, 48
_EPOCHS, _BATCH, _LEARNING_RATE = 40, 16, 4e-3
_ASCENT, _ASCENT_RATE = 20, 6e-4


@dataclass(frozen=True)
class Hidden:
    """The models, to be left as they are, and the record sets."""

    planted: nn.Module
    retrained: nn.Module
    suppressed: nn.Module
    untrained: nn.Module
    tokenizer: PreTrainedTokenizerFast
    forget: list[TokenRecord]
    retain: list[TokenRecord]
    control: list[TokenRecord]

    def lines(self, records: list[TokenRecord]) -> list[dict[str, str]]:
        """Records as the lines of a record file."""
        return [
            {
                "id": record.record_id,
                "prompt": str(self.tokenizer.decode(record.ids[: record.n_prompt])),
                "completion": str(self.tokenizer.decode(record.completion)),
            }
            for record in records
        ]


@functools.cache
def hidden(seed: int = 0) -> Hidden:
    """Train the models, once a process and seed."""
    forget, retain, control = (
        [_bare(record) for record in planted._records(name, n, (4_000_000 + seed, part))]
        for part, (name, n) in enumerate((("forget", FORGET), ("retain", RETAIN), ("control", CONTROL)))
    )
    untrained = planted._untrained(seed)
    full, without = copy.deepcopy(untrained), copy.deepcopy(untrained)
    steps = _EPOCHS * (FORGET + RETAIN) // _BATCH
    _train(full, forget + retain, steps, seed)
    _train(without, retain, steps, seed)
    suppressed = copy.deepcopy(full)
    _suppress(suppressed, forget, retain, seed)
    return Hidden(full, without, suppressed, untrained, planted.tokenizer(), forget, retain, control)


def _bare(record: TokenRecord) -> TokenRecord:
    """Without the token that opens a text: record files are tokenised as they are."""
    return replace(record, ids=record.ids[1:], n_prompt=record.n_prompt - 1)


def _loss(model: nn.Module, records: list[TokenRecord]) -> torch.Tensor:
    """Mean cross entropy over the completion tokens of some records."""
    width = max(len(record.ids) for record in records)
    ids = torch.tensor([[*r.ids, *[tiny.PAD] * (width - len(r.ids))] for r in records])  # [B, T]
    labels = torch.full_like(ids, -100)
    for row, record in enumerate(records):
        labels[row, record.n_prompt : len(record.ids)] = ids[row, record.n_prompt : len(record.ids)]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _train(model: nn.Module, records: list[TokenRecord], steps: int, seed: int) -> None:
    rng = np.random.default_rng((seed, 9))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = _LEARNING_RATE * min((step + 1) / 20, (steps - step) / steps)
        batch = [records[int(i)] for i in rng.choice(len(records), _BATCH, replace=False)]
        optimiser.zero_grad(set_to_none=True)
        _loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.zero_grad(set_to_none=True)
    model.eval()


def _suppress(model: nn.Module, forget: list[TokenRecord], retain: list[TokenRecord], seed: int) -> None:
    """Gradient ascent on the forget records beside descent on the retain records."""
    rng = np.random.default_rng((seed, 10))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_ASCENT_RATE, weight_decay=0.0)
    for _ in range(_ASCENT):
        lost = [forget[int(i)] for i in rng.choice(len(forget), _BATCH, replace=False)]
        kept = [retain[int(i)] for i in rng.choice(len(retain), _BATCH, replace=False)]
        optimiser.zero_grad(set_to_none=True)
        (_loss(model, kept) - _loss(model, lost)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.zero_grad(set_to_none=True)
    model.eval()
