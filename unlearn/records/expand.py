"""A forget request expanded to near-duplicates: what a corpus holds of the records beside the records themselves.

A model that saw near-duplicates of a record can keep giving the record back after the record alone is forgotten: a
fuzzy duplicate counts up to 0.8 of an exact one (arXiv 2405.15523).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attacks.duplicates import near_duplicates
from probes.errors import UsageError
from unlearn.records.draft import texts_of
from unlearn.records.raw import RawRecord


@dataclass(frozen=True, slots=True)
class Expanded:
    """Records after expansion.

    Attributes:
        raw: the records, followed by what was included.
        corpus: corpus items read.
        uncovered: near-duplicates in the corpus that are not among the records as given.
        included: how many of them were added.
        records: ids of the records that have uncovered near-duplicates.
    """

    raw: list[RawRecord]
    corpus: int
    uncovered: int
    included: int
    records: tuple[str, ...]


def text_of(record: RawRecord) -> str:
    """A record as one text; of a conversation, its turns by line."""
    return ("\n" if record.messages is not None else "").join(texts_of(record))


def expand(
    raw: Sequence[RawRecord], corpus: Sequence[RawRecord], *, threshold: float, span: int, include: bool
) -> Expanded:
    """Find near-duplicates of records in a corpus and, where asked to, add them to the records.

    A record and its near-duplicates become one group, so that intervals count them once.

    Args:
        raw: records with text.
        corpus: items with text; each keeps its id, behind `near-duplicate:`.
        threshold: Jaccard similarity of word 5-shingles.
        span: words of an exact common span.
        include: add what was found.

    Raises:
        UsageError: records or a corpus without text, or an empty corpus.
    """
    if any(record.form in ("ids", "image") for record in (*raw, *corpus)):
        raise UsageError(
            "expected records and a corpus with text, found token ids or images; near-duplicates need text"
        )
    found = near_duplicates(
        [text_of(record) for record in raw],
        [text_of(item) for item in corpus],
        threshold=threshold,
        span_tokens=span,
    )
    uncovered = sorted({item for row in found.uncovered for item in row})
    records = tuple(record.id for record, row in zip(raw, found.uncovered, strict=True) if row)
    if not include:
        return Expanded(list(raw), found.corpus_size, len(uncovered), 0, records)
    members = Counter(found.record_clusters) + Counter(found.corpus_clusters[item] for item in uncovered)
    names: dict[int, str | None] = {}
    for record, cluster in zip(raw, found.record_clusters, strict=True):
        alone = members[cluster] == 1  # such a record stays a trial of its own
        names.setdefault(cluster, record.group or (None if alone else f"cluster-{cluster}"))
    grouped = [
        replace(record, group=names[cluster]) for record, cluster in zip(raw, found.record_clusters, strict=True)
    ]
    taken = {record.id for record in raw}
    added = []
    for item in uncovered:
        name = f"near-duplicate:{corpus[item].id}"
        while name in taken:
            name += "'"
        taken.add(name)
        added.append(replace(corpus[item], id=name, group=names[found.corpus_clusters[item]]))
    return Expanded([*grouped, *added], found.corpus_size, len(uncovered), len(added), records)
