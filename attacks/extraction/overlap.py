"""How close generated text comes to a record: edit distance, common spans, ROUGE-L, near-copy coverage.

    edit similarity     1 - Levenshtein(a, b) / max(|a|, |b|)
    common span         length of the longest contiguous run that stands in both
    ROUGE-L             LCS(a, b) = longest common subsequence; recall LCS / |reference|, precision LCS / |hypothesis|,
                        F their harmonic mean (Lin 2004); on words, lower-cased, without stemming
    near-copy coverage  share of a long reference that stands in ordered blocks of exact words with only short gaps
                        between them, very short spans dropped: a block approximation of the longest common substring,
                        after Ahmed et al. 2026 (arXiv 2601.02671)

Everything takes strings or sequences of token ids (or any hashable units); the two sides of a call are of one kind.

Limits: all of these are symptoms. Ordinary phrases overlap too, so a figure is read against the same figure on
records that the model never saw. Text of another language or paraphrase is not seen at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

from probes.errors import UsageError
from probes.records import TokenRecord

Units = str | Sequence[Hashable]

BLOCK = 5  # shortest run of exact words that counts as a block of a near copy
GAP = 3  # words that two blocks of one near copy may lie apart
MINIMUM = 20  # exact words that a near copy holds at least

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, case-folded; punctuation is dropped."""
    return _WORD.findall(text.casefold())


def _units(sequence: Units) -> Sequence[Hashable]:
    return words(sequence) if isinstance(sequence, str) else sequence


def _codes(*sequences: Units) -> list[np.ndarray]:
    """The sequences with each distinct unit replaced by one small integer."""
    numbers: dict[Hashable, int] = {}
    return [
        np.array([numbers.setdefault(unit, len(numbers)) for unit in sequence], dtype=np.int64)
        for sequence in sequences
    ]


def edit_similarity(hypothesis: Units, reference: Units) -> float:
    """1 - Levenshtein distance / length of the longer one, in [0, 1]; characters of strings, units of sequences.

    Two empty sequences are equal: 1.
    """
    longest = max(len(hypothesis), len(reference))
    if not longest:
        return 1.0
    if isinstance(hypothesis, str) and isinstance(reference, str):
        return 1.0 - Levenshtein.distance(hypothesis, reference) / longest
    a, b = _codes(hypothesis, reference)
    return 1.0 - Levenshtein.distance(a.tolist(), b.tolist()) / longest


def longest_common_span(hypothesis: Units, reference: Units) -> int:
    """Length of the longest contiguous run that stands in both; characters of strings, units of sequences.

    Time O(|a| |b|) in vectorised rows, memory O(|b|).
    """
    a, b = _codes(hypothesis, reference)
    longest = 0
    runs = np.zeros(len(b) + 1, dtype=np.int64)  # runs[j + 1]: length of the common run that ends at a[i], b[j]
    for unit in a:
        runs[1:] = np.where(b == unit, runs[:-1] + 1, 0)
        longest = max(longest, int(runs.max()))
    return longest


def common_subsequence(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence (units in order, not necessarily adjacent).

    Bit-parallel (Hyyro 2004): one row of the dynamic programme is one integer with a bit per unit of `reference`,
    and a zero bit marks a place where the length grows.
    """
    places: dict[Hashable, int] = {}
    for j, unit in enumerate(reference):
        places[unit] = places.get(unit, 0) | 1 << j
    full = (1 << len(reference)) - 1
    row = full
    for unit in hypothesis:
        hits = row & places.get(unit, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(reference) - row.bit_count()


@dataclass(frozen=True, slots=True)
class RougeL:
    """ROUGE-L of one pair; all three in [0, 1]."""

    precision: float
    recall: float
    f: float


def rouge_l(hypothesis: Units, reference: Units) -> RougeL:
    """ROUGE-L on the words of two strings, or on the units of two sequences.

    A side without words scores 0: there is nothing to recall.
    """
    a, b = _units(hypothesis), _units(reference)
    common = common_subsequence(a, b)
    if not common:
        return RougeL(0.0, 0.0, 0.0)
    return RougeL(common / len(a), common / len(b), 2 * common / (len(a) + len(b)))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Near copies of a reference inside a long text.

    Attributes:
        coverage: share of the reference's words that stand word for word in a near copy.
        longest: exact words of the longest near copy.
        spans: how many near copies were kept.
    """

    coverage: float
    longest: int
    spans: int


def near_copy_coverage(
    hypothesis: Units, reference: Units, *, block: int = BLOCK, gap: int = GAP, minimum: int = MINIMUM
) -> Coverage:
    """How much of a long reference a long text repeats nearly word for word, in the reference's order.

    Blocks are runs of at least `block` words that stand in both, found longest first, then left and right of it.
    Blocks at most `gap` words apart on both sides are one near copy. A near copy with fewer than `minimum` exact
    words is dropped: of two unrelated long texts some blocks agree. Each word of the reference counts at most once.
    Near-linear time on ordinary text; O(|a| |b|) if both sides loop over the same words.

    Args:
        hypothesis: the generated text, or its units.
        reference: the text it may repeat; the whole record, however long.
        block: words of a block, at least 1; the search is fast because long blocks are rare.
        gap: words between two blocks of one near copy.
        minimum: exact words of a near copy.

    Returns:
        The coverage; 0 for a side without words.

    Raises:
        UsageError: for a block below 1 or a gap or minimum below 0.
    """
    if block < 1 or gap < 0 or minimum < 0:
        raise UsageError(
            f"expected block >= 1, gap >= 0 and minimum >= 0, found {block}, {gap} and {minimum}; change them"
        )
    a, b = (codes.tolist() for codes in _codes(_units(hypothesis), _units(reference)))
    # Blocks of words are runs of common shingles, which are far rarer than common words.
    first, second = ([tuple(side[i : i + block]) for i in range(len(side) - block + 1)] for side in (a, b))
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    spans: list[tuple[int, int, set[int]]] = []  # end in the text, end in the reference, reference words
    for start, reference_start, run in matcher.get_matching_blocks():
        if not run:
            continue  # the sentinel at the end
        length = run + block - 1
        places = set(range(reference_start, reference_start + length))
        end, reference_end = start + length, reference_start + length
        if spans and start - spans[-1][0] <= gap and reference_start - spans[-1][1] <= gap:
            spans[-1] = (end, reference_end, spans[-1][2] | places)
        else:
            spans.append((end, reference_end, places))
    kept = [places for _, _, places in spans if len(places) >= minimum]
    covered: set[int] = set().union(*kept)
    return Coverage(
        coverage=len(covered) / len(b) if b else 0.0,
        longest=max((len(places) for places in kept), default=0),
        spans=len(kept),
    )


def overlap_figures(
    generated: Sequence[Sequence[int]],
    records: Sequence[TokenRecord],
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> pd.DataFrame:
    """Overlap of what was generated after each record's prompt with the record's completion.

    Args:
        generated: token ids, one sequence a record (`attacks.extraction.continuation.continuations`).
        records: the records, in the same order.
        decode: token ids to text, so that ROUGE-L is on words; without it ROUGE-L is on tokens.

    Returns:
        A frame with the columns record_id, edit_similarity (tokens), common_span (tokens), common_span_share (of the
        completion), rouge_l_recall, rouge_l_f.

    Raises:
        UsageError: when the numbers of generations and records differ.
    """
    if len(generated) != len(records):
        raise UsageError(f"expected one generation a record, found {len(generated)} for {len(records)}; pass all")
    rows = []
    for tokens, record in zip(generated, records, strict=True):
        span = longest_common_span(tokens, record.completion)
        rouge = (
            rouge_l(tokens, record.completion) if decode is None else rouge_l(decode(tokens), decode(record.completion))
        )
        rows.append(
            {
                "record_id": record.record_id,
                "edit_similarity": edit_similarity(tokens, record.completion),
                "common_span": span,
                "common_span_share": span / record.n_tokens,
                "rouge_l_recall": rouge.recall,
                "rouge_l_f": rouge.f,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


COLUMNS = ("record_id", "edit_similarity", "common_span", "common_span_share", "rouge_l_recall", "rouge_l_f")
