"""Records that are the same: in two sets that must be apart, and in one set.

A never-seen record that is one of the records makes every comparison with the control set smaller than it is, an
attack that brings it back passes for one that teaches, and an editor that keeps what it is to forget forgets nothing.
Within a set, two of the same are one observation: as two they would make an interval narrower than it is.

Two records are the same where a model sees the same: the same tokens, or the same pixels and label.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from probes.errors import UsageError
from probes.records import Record, TokenRecord

# Retained and related data may be the same; what is trained on may not be never-seen.
_PAIRS = (
    ("control", "records"),
    ("retain", "records"),
    ("related", "records"),
    ("retain", "control"),
    ("related", "control"),
)
_SHOWN = 5


def expect_apart(sets: Mapping[str, Sequence[Record]]) -> None:
    """Refuse sets that share records.

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


def clustered(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Records with the same content as one cluster, where they have no group of their own.

    Returns:
        The records in their order, and how many repeat an earlier one.
    """
    contents = [_content(record) for record in records]
    count = Counter(contents)
    groups = {content: r.group for content, r in zip(contents, records, strict=True) if r.group is not None}
    for number, content in enumerate(contents, start=1):
        if count[content] > 1:
            groups.setdefault(content, f"row {number} and the same")
    found = [
        record if record.group is not None or content not in groups else _grouped(record, groups[content])
        for record, content in zip(records, contents, strict=True)
    ]
    return found, len(contents) - len(count)


def _grouped(record: Record, group: str) -> Record:
    return replace(record, group=group)


def _content(record: Record) -> tuple[object, ...]:
    if isinstance(record, TokenRecord):
        return record.ids
    pixels = record.pixels.detach().cpu().contiguous().numpy()
    return record.label, pixels.shape, hashlib.sha256(pixels.tobytes()).digest()
