"""Near-duplicates of the records in a corpus: what a forget request does not cover."""

from __future__ import annotations

from typing import Any

from attacks.duplicates import near_duplicates
from probes.errors import UsageError
from unlearn.attacking.result import Result, point
from unlearn.attacking.views import Views
from unlearn.records.expand import text_of

SHOWN = 200


def corpus(views: Views, settings: dict[str, Any]) -> Result:
    """Corpus items that are near-duplicates of a record and not themselves among the records."""
    items = views.workspace.corpus()
    if any(record.form in ("ids", "image") for record in items):
        raise UsageError("expected a corpus of text records, found token ids or images; give text")
    records = views.raw("records") or []
    found = near_duplicates(
        [text_of(record) for record in records],
        [text_of(item) for item in items],
        threshold=settings["threshold"],
        span_tokens=settings["span"],
        tokenise=None
        if views.tokenizer is None
        else lambda text: views.tokenizer.encode(text, add_special_tokens=False),
    )
    result = Result(headline="records", column="hit")
    uncovered = sorted({item for row in found.uncovered for item in row})
    result.rate(
        "records",
        "records with a near-duplicate that the request does not cover",
        [bool(r) for r in found.uncovered],
        None,
    )
    result.figures["items"] = point(float(len(uncovered)), "items", found.corpus_size)
    result.titles["items"] = "near-duplicates in the corpus that the request does not cover"
    result.records["hit"] = [bool(row) for row in found.uncovered]
    result.records["uncovered"] = [len(row) for row in found.uncovered]
    pairs = [pair for pair in found.pairs if pair.other in set(uncovered)]
    result.tables.append(
        {
            "title": "Uncovered near-duplicates",
            "columns": ["record", "corpus row", "kind", "similarity", "span (tokens)"],
            "rows": [
                [
                    views.workspace.pseudonym(records[pair.record].id),
                    pair.other + 1,
                    pair.kind,
                    pair.similarity,
                    pair.span,
                ]
                for pair in pairs[:SHOWN]
            ],
        }
    )
    result.private = [
        {"record": records[pair.record].id, "corpus_row": pair.other + 1, "kind": pair.kind} for pair in pairs
    ]
    result.notes.append(
        f"{found.corpus_size} corpus items; word 5-shingles at Jaccard {settings['threshold']:g} and more, or "
        f"{settings['span']} equal tokens in a row. A model can keep giving a record back through what is listed here."
    )
    if found.too_short:
        result.notes.append(
            f"{found.too_short} records are so short that only all their words, in order, were looked for."
        )
    if len(pairs) > SHOWN:
        result.notes.append(f"{len(pairs) - SHOWN} more pairs are in the private folder.")
    return result
