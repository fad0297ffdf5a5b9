"""Near-duplicates against brute force: every pair's similarity and common span, computed the slow way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest

from attacks import duplicates
from attacks.duplicates import Duplicates, bands, gram_hashes, jaccard, near_duplicates, shingles, words
from probes.errors import UsageError

VOCABULARY = [f"word{i}" for i in range(400)]


def text(source: random.Random, n: int = 60, vocabulary: list[str] = VOCABULARY) -> str:
    return " ".join(source.choice(vocabulary) for _ in range(n))


def edited(original: str, source: random.Random, edits: int) -> str:
    parts = original.split()
    for place in source.sample(range(len(parts)), edits):
        parts[place] = f"other{source.randrange(10**6)}"
    return " ".join(parts)


def slow_jaccard(a: str, b: str, size: int = 5) -> float:
    def runs(value: str) -> set[str]:
        parts = value.lower().split()
        return {" ".join(parts[i : i + size]) for i in range(max(1, len(parts) - size + 1))}

    left, right = runs(a), runs(b)
    return len(left & right) / len(left | right)


def slow_span(a: list[str], b: list[str]) -> int:
    """Longest common contiguous run by the quadratic table."""
    best, above = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0] * (len(b) + 1)
        for j, y in enumerate(b, start=1):
            if x == y:
                row[j] = above[j - 1] + 1
                best = max(best, row[j])
        above = row
    return best


def kinds(found: Duplicates, kind: str) -> set[tuple[int, int]]:
    return {(pair.record, pair.other) for pair in found.pairs if pair.kind == kind}


# --- similarity -----------------------------------------------------------------------------------------------------


def test_pairs_around_the_threshold_are_those_of_brute_force() -> None:
    source = random.Random(4)
    records = [text(source) for _ in range(60)]
    # One edit of a 60-word text costs up to 5 of 56 shingles: 0 to 4 edits lie at 1, .84, .70, .58, .47, or higher
    # where edits are neighbours.
    corpus = [edited(record, source, edits) for edits in range(5) for record in records]
    corpus += [text(source) for _ in range(100)]
    source.shuffle(corpus)
    found = near_duplicates(records, corpus, threshold=0.7)
    similarity = {(i, j): slow_jaccard(a, b) for i, a in enumerate(records) for j, b in enumerate(corpus)}
    near = {pair for pair, value in similarity.items() if value >= 0.7}
    same = {(i, j) for i, j in near if records[i] == corpus[j]}
    values = sorted({round(v, 3) for v in similarity.values()})
    assert any(0.6 < v < 0.7 for v in values)  # the test has cases on both sides
    assert any(0.7 <= v < 0.75 for v in values)
    assert kinds(found, "identical") == same
    assert kinds(found, "near-duplicate") == near - same
    for pair in found.pairs:
        if pair.kind != "span":
            assert pair.similarity == pytest.approx(similarity[pair.record, pair.other])


def test_similarity_equal_to_the_threshold_counts() -> None:
    record = " ".join(f"w{i}" for i in range(13))  # 9 shingles
    other = " ".join(f"w{i}" for i in range(12)) + " x y"  # 8 of them, and 2 others: 8 / 11
    found = near_duplicates([record], [other], threshold=8 / 11)
    assert [(p.kind, p.similarity) for p in found.pairs] == [("near-duplicate", 8 / 11)]
    assert near_duplicates([record], [other], threshold=8 / 11 + 1e-9).pairs == ()


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.9, 1.0])
def test_the_index_misses_no_more_than_it_says(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count * rows <= duplicates.PERMUTATIONS
    assert (1 - threshold**rows) ** count <= duplicates.MISS
    if rows < duplicates.PERMUTATIONS:
        assert (1 - threshold ** (rows + 1)) ** (duplicates.PERMUTATIONS // (rows + 1)) > duplicates.MISS


def test_pairs_at_the_threshold_are_found_at_the_promised_rate() -> None:
    """300 pairs of similarity 0.8 to 0.82; a default index tuned for both errors finds about half of such pairs."""
    source = random.Random(9)
    records, corpus = [], []
    while len(records) < 300:
        record = text(source, 104, [f"v{i}" for i in range(5000)])
        other = " ".join(record.split()[: 104 - 10] + [f"new{source.randrange(10**9)}" for _ in range(10)])
        if 0.8 <= slow_jaccard(record, other) <= 0.82:
            records.append(record)
            corpus.append(other)
    found = near_duplicates(records, corpus)
    assert len(kinds(found, "near-duplicate") & {(i, i) for i in range(300)}) >= 297


def test_case_punctuation_and_width_do_not_matter_to_similarity() -> None:
    record = "Mrs. Jane Doe, of 12 Harbour Street, called about invoice No. 77 on Monday."
    corpus = [
        "mrs jane doe of 12 harbour street called about invoice no 77 on monday",
        "MRS JANE DOE -- OF １２ HARBOUR STREET; CALLED ABOUT INVOICE NO 77 ON MONDAY!",
        "an unrelated sentence about the weather in the mountains and on the coast",
    ]
    found = near_duplicates([record], corpus)
    assert [(p.other, p.kind, p.similarity) for p in found.pairs] == [
        (0, "near-duplicate", 1.0),
        (1, "near-duplicate", 1.0),
    ]
    assert found.uncovered == ((0, 1),)


def test_words_of_scripts_without_spaces() -> None:
    assert words("北京 is big_city") == ["北", "京", "is", "big", "city"]
    assert words("Straße ﬁne Ⅻ") == ["strasse", "fine", "xii"]
    a, b = "我昨天在北京的商店买了一台新电脑", "我昨天在北京的商店买了一台旧电脑"
    assert jaccard(shingles(a), shingles(b)) == pytest.approx(9 / 15)  # 3 of 12 runs hold the other character


def test_short_and_empty_texts() -> None:
    found = near_duplicates(["two words", "", "!?"], ["Two words!", "two word", "", "three little words", "..."])
    assert [(p.record, p.other, p.kind) for p in found.pairs] == [(0, 0, "near-duplicate"), (1, 2, "identical")]
    assert found.too_short == 3
    assert jaccard(set(), set()) == 0.0
    assert shingles("") == set()


# --- spans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 20])
def test_spans_are_those_of_brute_force(k: int) -> None:
    source = random.Random(k)
    few = ["a", "b", "c"] if k > 2 else [f"t{i}" for i in range(30)]
    records = [text(source, source.randrange(1, 40), few) for _ in range(15)]
    corpus = [text(source, source.randrange(1, 40), few) for _ in range(30)]
    corpus += [f"{text(source, 5, few)} {record} {text(source, 5, few)}" for record in records]
    found = near_duplicates(records, corpus, span_tokens=k, tokenise=str.split)
    spans = {(p.record, p.other): p.span for p in found.pairs if p.kind == "span"}
    expected = {
        (i, j): span
        for i, a in enumerate(records)
        for j, b in enumerate(corpus)
        if a != b and (span := slow_span(a.split(), b.split())) >= k
    }
    assert spans == expected
    assert expected


def test_a_quoted_span_is_found_where_similarity_is_low() -> None:
    source = random.Random(2)
    record, host = text(source, 80), text(source, 800)
    quoting = [f"{host} {' '.join(record.split()[10 : 10 + n])} {host}" for n in (49, 50, 51)]
    found = near_duplicates([record], quoting)
    assert [(p.other, p.kind, p.span) for p in found.pairs] == [(1, "span", 50), (2, "span", 51)]


def test_spans_use_the_given_tokens() -> None:
    found = near_duplicates(["abcdefgh"], ["xxcdefxx", "xxcdxx"], span_tokens=4, tokenise=list)
    assert [(p.other, p.kind, p.span) for p in found.pairs] == [(0, "span", 4)]
    ids = {"abcdefgh": [9, 8, 7, 6], "other": [1, 8, 7, 6, 1]}
    assert near_duplicates(["abcdefgh"], ["other"], span_tokens=3, tokenise=ids.__getitem__).pairs[0].span == 3


def test_repetitive_texts_take_linear_time() -> None:
    found = near_duplicates(["na " * 20_000], ["na " * 19_000 + "batman", "ho " * 20_000])
    assert {(p.other, p.kind, p.span) for p in found.pairs} == {(0, "span", 19_000)}


@pytest.mark.parametrize("k", range(1, 20))
def test_gram_hashes_are_equal_exactly_for_equal_runs(k: int) -> None:
    ids = np.random.default_rng(k).integers(-1, 3, size=200)
    runs = [tuple(ids[i : i + k]) for i in range(len(ids) - k + 1)]
    known = [run for run in runs if min(run) >= 0]
    hashes = gram_hashes(ids, k)
    assert len(hashes) == len(known)
    for (a, x), (b, y) in combinations(list(zip(known, hashes, strict=True))[:60], 2):
        assert (a == b) == (x == y)
    assert len(gram_hashes(ids[: k - 1], k)) == 0


def test_a_hash_collision_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans and similarity are checked on the texts themselves."""
    monkeypatch.setattr(duplicates, "gram_hashes", lambda ids, k: np.zeros(1, dtype=np.uint64))
    assert near_duplicates(["a b c d e f"], ["u v w x y z"], span_tokens=2).pairs == ()


# --- clusters, coverage, determinism --------------------------------------------------------------------------------


def test_clusters_link_through_chains_and_coverage_counts_identical_copies() -> None:
    source = random.Random(3)
    a, b, c = (text(source) for _ in range(3))
    bridge = f"{a} {text(source, 3)} {b}"  # shares a span with both, a similarity above the threshold with neither
    corpus = [text(source), bridge, c, edited(c, source, 1), c]
    found = near_duplicates([a, c, b, edited(a, source, 1)], corpus)
    assert found.record_clusters == (0, 1, 0, 0)
    assert found.corpus_clusters == {1: 0, 2: 1, 3: 1, 4: 1}
    assert found.uncovered[0] == (1,)
    assert found.uncovered[1] == (3,)  # 2 and 4 are the record itself
    assert found.uncovered[2] == (1,)
    assert {(p.record, p.other) for p in found.among_records} == {(0, 3)}
    assert found.corpus_size == 5


def test_copy_of_another_record_is_covered() -> None:
    source = random.Random(8)
    first = text(source)
    second = edited(first, source, 1)
    assert near_duplicates([first, second], [second]).uncovered == ((), ())
    assert near_duplicates([first], [second]).uncovered == ((0,),)


def test_corpus_may_be_a_generator_and_progress_is_told() -> None:
    source = random.Random(6)
    corpus = [text(source) for _ in range(5)]
    seen: list[int] = []
    found = near_duplicates(corpus[2:3], (item for item in corpus), progress=seen.append)
    assert found == near_duplicates(corpus[2:3], corpus)
    assert seen == [1, 2, 3, 4, 5]


_SCRIPT = """
import json, random, sys
from dataclasses import asdict
sys.path.insert(0, sys.argv[1])
from tests.attacks.test_duplicates import edited, text
from attacks.duplicates import near_duplicates
source = random.Random(1)
records = [text(source) for _ in range(20)]
corpus = [edited(record, source, edits) for edits in range(4) for record in records]
print(json.dumps(asdict(near_duplicates(records, corpus, threshold=0.7, span_tokens=20))))
"""


def test_same_input_same_bytes_in_every_process() -> None:
    """Python randomises the hashes of strings by process; no result may depend on them."""
    root = os.getcwd()
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, root],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())["pairs"]) > 40


def test_results_hold_no_text() -> None:
    source = random.Random(1)
    record = text(source)
    found = near_duplicates([record], [edited(record, source, 1)])
    assert "word" not in repr(found)
    assert "word" not in json.dumps(asdict(found))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_a_clear_usage_error() -> None:
    secret = "my secret text"
    for case in (
        lambda: near_duplicates([secret], []),
        lambda: near_duplicates([secret], iter(())),
        lambda: near_duplicates([], [secret]),
        lambda: near_duplicates(secret, [secret]),
        lambda: near_duplicates([secret], secret),
        lambda: near_duplicates([secret], [secret], threshold=0.0),
        lambda: near_duplicates([secret], [secret], threshold=1.1),
        lambda: near_duplicates([secret], [secret], shingle=0),
        lambda: near_duplicates([secret], [secret], span_tokens=0),
    ):
        with pytest.raises(UsageError, match="expected") as caught:
            case()
        assert "secret" not in str(caught.value)
