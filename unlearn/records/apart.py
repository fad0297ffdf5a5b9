"""Record sets that must have nothing in common.

A never-seen record that is one of the records makes every comparison with the control set smaller than it is, an
attack that brings it back passes for one that teaches, and an editor that keeps what it is to forget forgets nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from probes.errors import UsageError
from probes.records import ImageRecord, TokenRecord

# Retained and related data may be the same; what is trained on may not be never-seen.
_PAIRS = (
    ("control", "records"),
    ("retain", "records"),
    ("related", "records"),
    ("retain", "control"),
    ("related", "control"),
)
_SHOWN = 5


def expect_apart(sets: Mapping[str, Sequence[TokenRecord | ImageRecord]]) -> None:
    """Refuse sets that share records: the same tokens, or the same pixels and label.

    Raises:
        UsageError: naming for each pair of sets how many, and the first rows; nothing of a record.
    """
    contents = {role: [_content(record) for record in records] for role, records in sets.items()}
    found = []
    for role, other in _PAIRS:
        known = set(contents.get(other, ()))
        rows = [number for number, content in enumerate(contents.get(role, ()), start=1) if content in known]
        if rows:
            first = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
            found.append(f"{len(rows)} of {role} among {other} (row {first})")
    if found:
        raise UsageError(f"expected sets without a record in common, found {'; '.join(found)}; take them out of one")


def _content(record: TokenRecord | ImageRecord) -> tuple[object, ...]:
    if isinstance(record, TokenRecord):
        return record.ids
    pixels = record.pixels.detach().cpu().contiguous().numpy()
    return record.label, pixels.shape, hashlib.sha256(pixels.tobytes()).digest()
