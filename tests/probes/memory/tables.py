"""Token tables written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probes.likelihood import SamplingScheme, TokenTable


def table_of(log_probs: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]] | None = None) -> TokenTable:
    """A table with these log-probabilities (and ranks, 0 by default), one list a record."""
    log_prob = np.array([x for record in log_probs for x in record], dtype=np.float64)
    rank = np.array([x for record in ranks for x in record]) if ranks else np.zeros(len(log_prob), dtype=np.int64)
    return TokenTable(
        record_ids=tuple(f"r{i}" for i in range(len(log_probs))),
        compressed_bytes=np.full(len(log_probs), 10),
        offsets=np.cumsum([0] + [len(record) for record in log_probs]),
        log_prob=log_prob,
        log_sampled=log_prob,
        rank=rank,
        margin=np.ones(len(log_prob)),
        gap=np.where(rank > 0, -1.0, 0.0),
        mean=log_prob,
        variance=np.ones(len(log_prob)),
        scheme=SamplingScheme(),
    )
