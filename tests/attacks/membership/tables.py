"""Token tables by hand, and full log-probabilities of a model the slow way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from probes.likelihood import SamplingScheme, TokenTable
from probes.records import TokenRecord


def table(
    log_p: Sequence[Sequence[float]],
    *,
    mean: float | Sequence[Sequence[float]] = -1.0,
    variance: float | Sequence[Sequence[float]] = 1.0,
    sizes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> TokenTable:
    """A table whose records have these log-probabilities."""
    flat = np.array([x for record in log_p for x in record], dtype=np.float64)

    def column(values: float | Sequence[Sequence[float]]) -> np.ndarray:
        if isinstance(values, float):
            return np.full(len(flat), values)
        return np.array([x for record in values for x in record], dtype=np.float64)

    return TokenTable(
        record_ids=tuple(names or (f"r{i}" for i in range(len(log_p)))),
        compressed_bytes=np.array(sizes if sizes is not None else [10] * len(log_p), dtype=np.int64),
        offsets=np.cumsum([0] + [len(record) for record in log_p]),
        log_prob=flat,
        log_sampled=flat,
        rank=np.zeros(len(flat), dtype=np.int64),
        margin=np.ones(len(flat)),
        gap=np.zeros(len(flat)),
        mean=column(mean),
        variance=column(variance),
        scheme=SamplingScheme(),
    )


def records(n: int, seed: int = 0, *, vocab: int = 96, lengths: tuple[int, int] = (3, 30)) -> list[TokenRecord]:
    """Random records; every fifth has a completion of one token."""
    generator = np.random.default_rng(seed)
    out = []
    for i in range(n):
        length = int(generator.integers(*lengths))
        ids = tuple(int(t) for t in generator.integers(4, vocab, length))
        n_prompt = length - 1 if i % 5 == 0 else int(generator.integers(1, length))
        out.append(TokenRecord(f"r{i}", ids, n_prompt, int(generator.integers(5, 40))))
    return out


def distributions(model: nn.Module, record: TokenRecord) -> np.ndarray:
    """[k, V] log-probabilities over the vocabulary at each completion token, alone in its batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([record.ids])).logits[0]  # [T, V]
    return logits[record.n_prompt - 1 : -1].double().log_softmax(-1).numpy()


def golds(model: nn.Module, record: TokenRecord) -> np.ndarray:
    """[k] log-probability of each completion token."""
    rows = distributions(model, record)
    return rows[np.arange(len(rows)), list(record.completion)]
