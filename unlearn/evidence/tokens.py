"""Per-token results on disk: what every attack that reads the one pass reads.

Numbers alone, but they belong to single records: they stay in a run's `private/` folder and in the cache, which holds
neither ids nor text.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes.likelihood import SamplingScheme, TokenTable
from probes.records import TokenRecord

_COLUMNS = ("log_prob", "log_sampled", "rank", "margin", "gap", "mean", "variance", "log_schemes")


def dump(table: TokenTable) -> bytes:
    """A table as the bytes of an `.npz` file, without record ids."""
    buffer = io.BytesIO()
    arrays = {name: getattr(table, name) for name in _COLUMNS}
    np.savez(buffer, offsets=table.offsets, splits=np.int64(table.splits), **arrays)
    return buffer.getvalue()


def load(
    path: Path, records: Sequence[TokenRecord], scheme: SamplingScheme, schemes: Sequence[SamplingScheme] = ()
) -> TokenTable:
    """The table of these records, in their order, as `dump` wrote it."""
    with np.load(path, allow_pickle=False) as stored:
        return TokenTable(
            record_ids=tuple(record.record_id for record in records),
            compressed_bytes=np.array([record.compressed_bytes for record in records], dtype=np.int64),
            offsets=stored["offsets"],
            scheme=scheme,
            schemes=tuple(schemes),
            splits=int(stored["splits"]),
            **{name: stored[name] for name in _COLUMNS},
        )
