"""Overlap figures against textbook dynamic programmes and exhaustive search."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from attacks.extraction import overlap
from attacks.extraction.overlap import (
    common_subsequence,
    edit_similarity,
    longest_common_span,
    near_copy_coverage,
    overlap_figures,
    rouge_l,
)
from probes.errors import UsageError
from probes.records import TokenRecord


def pairs(n: int, letters: str = "abcd", longest: int = 9, seed: int = 0) -> list[tuple[str, str]]:
    generator = random.Random(seed)
    return [
        tuple("".join(generator.choices(letters, k=generator.randint(0, longest))) for _ in range(2)) for _ in range(n)
    ]


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def subsequences(text: str) -> set[tuple[str, ...]]:
    return {kept for size in range(len(text) + 1) for kept in combinations(text, size)}


def test_edit_similarity_equals_the_textbook() -> None:
    for a, b in pairs(300):
        expected = 1 - levenshtein(a, b) / max(len(a), len(b), 1)
        assert edit_similarity(a, b) == pytest.approx(expected)
        shifted = [ord(c) + 100_000 for c in a], [ord(c) + 100_000 for c in b]
        assert edit_similarity(*shifted) == pytest.approx(expected)


def test_common_span_equals_exhaustive_search() -> None:
    for a, b in pairs(300, "abc", 14):
        runs = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1) if a[i:j] in b]
        assert longest_common_span(a, b) == max(map(len, runs), default=0)
        assert longest_common_span([ord(c) for c in a], [ord(c) for c in b]) == max(map(len, runs), default=0)


def test_common_subsequence_equals_exhaustive_search() -> None:
    for a, b in pairs(200):
        assert common_subsequence(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_rouge_l_is_on_words() -> None:
    score = rouge_l("The cat, sat on a mat!", "a cat was on THE mat today")
    assert (score.precision, score.recall) == (3 / 6, 3 / 7)  # cat on mat
    assert score.f == pytest.approx(2 * (3 / 6) * (3 / 7) / (3 / 6 + 3 / 7))
    assert rouge_l("x y", "x y").f == 1.0
    assert rouge_l([4, 5, 6], [4, 9, 6]).recall == pytest.approx(2 / 3)
    for a, b in (("", "x"), ("x", ""), ("", ""), ("!?", "...")):
        assert rouge_l(a, b) == overlap.RougeL(0.0, 0.0, 0.0)


def text(n: int, seed: int, vocabulary: int = 5000) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=n)


def test_coverage_of_a_copy_of_nothing_and_of_a_part() -> None:
    reference = text(3000, 0)
    assert near_copy_coverage(reference, reference).coverage == 1.0
    assert near_copy_coverage(text(3000, 1), reference).coverage == 0.0
    part = text(200, 2) + reference[500:1250] + text(300, 3)
    found = near_copy_coverage(part, reference)
    assert found.coverage == pytest.approx(750 / 3000)
    assert (found.longest, found.spans) == (750, 1)
    assert near_copy_coverage([], reference) == near_copy_coverage(reference, []) == overlap.Coverage(0.0, 0, 0)


def test_one_word_in_ten_changed_is_still_one_near_copy() -> None:
    reference = text(1000, 0)
    changed = [word if i % 10 else -1 for i, word in enumerate(reference)]
    found = near_copy_coverage(changed, reference)
    assert (found.coverage, found.spans) == (0.9, 1)
    assert near_copy_coverage(changed, reference, gap=0).spans == 0  # blocks of nine words, each below the minimum
    assert near_copy_coverage(changed, reference, block=10).spans == 0


def test_a_loop_counts_each_reference_word_once() -> None:
    reference = text(400, 0)
    loop = reference[100:130] * 20
    assert near_copy_coverage(loop, reference).coverage == pytest.approx(30 / 400)
    repeated = reference[:50] * 8
    assert near_copy_coverage(repeated, repeated).coverage == 1.0


def test_pieces_from_far_apart_are_no_near_copy() -> None:
    reference = text(1000, 0)
    pieces = reference[:15] + reference[500:515] + reference[900:915]  # adjacent in the text, not in the reference
    assert near_copy_coverage(pieces, reference).coverage == 0.0
    assert near_copy_coverage(reference, pieces).coverage == 0.0
    assert near_copy_coverage(pieces, reference, minimum=15).coverage == pytest.approx(45 / 1000)


def test_copies_that_overlap_count_each_word_once() -> None:
    reference = list(range(100))
    twice = reference[:30] + text(10, 1) + reference[26:60]
    found = near_copy_coverage([-1 - w if 30 <= i < 40 else w for i, w in enumerate(twice)], reference)
    assert (found.coverage, found.spans) == (0.6, 2)


def test_ordered_blocks_equal_a_search_over_words() -> None:
    # On texts of distinct words the blocks of each kind are unique, so the simplest search finds them.
    generator = random.Random(5)
    for _ in range(50):
        reference = list(range(200))
        copy = [word if generator.random() > 0.12 else 1000 + word for word in reference]
        expected, run = 0, 0
        for word in [*copy, -1]:
            if word in range(200):
                run += 1
            else:
                expected += run if run >= 4 else 0
                run = 0
        assert near_copy_coverage(copy, reference, block=4, gap=0, minimum=0).coverage == expected / 200


def test_a_popular_word_inside_a_record_is_no_copy() -> None:
    """Research defect 7: a substring hit alone must not count as a leak."""
    reference = " ".join(f"word{i}" for i in range(60)) + " Elizabeth"
    answer = "Elizabeth"
    assert answer in reference
    assert edit_similarity(answer, reference) < 0.1
    assert rouge_l(answer, reference).recall < 0.02
    assert near_copy_coverage(answer, reference).coverage == 0.0


def test_figures_of_records() -> None:
    records = [TokenRecord("a", (1, 5, 6, 7, 8), 1, 4), TokenRecord("b", (1, 2, 5, 6), 2, 4)]
    frame = overlap_figures([(5, 6, 9, 8), ()], records)
    assert list(frame.columns) == list(overlap.COLUMNS)
    assert frame.iloc[0].tolist() == ["a", 0.75, 2, 0.5, 0.75, 0.75]
    assert frame.iloc[1].tolist() == ["b", 0.0, 0, 0.0, 0.0, 0.0]
    by_word = overlap_figures([(5, 6, 9, 8), ()], records, decode=lambda ids: " ".join("x" for _ in ids))
    assert by_word["rouge_l_f"].tolist() == [1.0, 0.0]
    assert len(overlap_figures([], [])) == 0
    with pytest.raises(UsageError, match="one generation a record"):
        overlap_figures([(1,)], records)
    with pytest.raises(UsageError, match="block >= 1"):
        near_copy_coverage([1], [1], block=0)
