r"""Near-duplicates of records in a corpus: what a request to forget these records leaves in the training data.

A text that differs in a few words counts for memorisation almost as much as an exact copy, and survives exact
deduplication (Shilov et al. 2024, arXiv 2405.15523). A request that names one copy of several would leave the others,
and any edit would then look broken. Two texts belong together if they

- are identical,
- share words in order: the Jaccard similarity |A n B| / |A u B| of their sets of word 5-shingles is at least a
  threshold (Broder 1997). Candidates come from MinHash signatures and locality-sensitive hashing, over records only,
  so that the corpus is read once and never held; each candidate's similarity is then computed exactly.
- share a span of at least `span_tokens` equal tokens in a row (Lee et al. 2022, arXiv 2107.06499, use 50). An index of
  the records' hashed token k-grams finds candidates; the longest common span of each is then found exactly, by the
  suffix automaton of the record (Blumer et al. 1985).

Both checks are exact: no pair is reported that does not qualify. Spans are never missed. A pair with exactly the
threshold's similarity is missed with probability at most `MISS`; pairs above it with less.

Limits: pairs within the corpus are not looked for, except through a record. A word is a run of letters and digits, or
one Chinese or Japanese character; languages that write without spaces in other scripts (Thai, Khmer) get long "words",
and there the spans are the better test. Paraphrase and translation are not found.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]
from numpy.typing import NDArray

from probes.errors import UsageError

Kind = Literal["identical", "near-duplicate", "span"]
Tokenise = Callable[[str], Sequence[Hashable]]
Hashes = NDArray[np.uint64]

PERMUTATIONS = 128
MISS = 0.002  # probability that the index misses a pair whose similarity is exactly the threshold
MIN_THRESHOLD = 0.05  # below it 128 permutations cannot keep to MISS
_BLOCK = 4096  # shingles hashed at once; their permutations take 4 MB
_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Pair:
    """A record and another text that belong together.

    Attributes:
        record: index of the record.
        other: index of the corpus item, or, in `Duplicates.among_records`, of the later record.
        kind: "identical", "near-duplicate" or "span".
        similarity: exact Jaccard similarity of word shingles; None for a span.
        span: tokens in the longest common span; None for the other kinds.
    """

    record: int
    other: int
    kind: Kind
    similarity: float | None
    span: int | None


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What belongs to which record. Holds indices, never text.

    Attributes:
        pairs: of records and corpus items, sorted. One text can be both a near-duplicate and share a span.
        among_records: the same among the records themselves.
        record_clusters: [R] cluster of each record; texts linked through any chain of pairs share one. Numbered by
            first record, and fit to be the `group` of records where intervals should respect duplicates.
        corpus_clusters: corpus index -> cluster, for the corpus items in a pair.
        uncovered: [R] for each record the corpus items of its pairs that are not identical to any record: what the
            request does not name.
        corpus_size: corpus items read.
        too_short: records with fewer than `shingle` words and fewer than `span_tokens` tokens. A short text is one
            shingle, so such records are found only where all their words are the same.
        threshold: of the similarity.
        span_tokens: of the span.
    """

    pairs: tuple[Pair, ...]
    among_records: tuple[Pair, ...]
    record_clusters: tuple[int, ...]
    corpus_clusters: Mapping[int, int]
    uncovered: tuple[tuple[int, ...], ...]
    corpus_size: int
    too_short: int
    threshold: float
    span_tokens: int


def near_duplicates(
    records: Sequence[str],
    corpus: Iterable[str],
    *,
    threshold: float = 0.8,
    shingle: int = 5,
    span_tokens: int = 50,
    tokenise: Tokenise | None = None,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Duplicates:
    """Expand records to their near-duplicates in a corpus.

    Args:
        records: texts to look for, at least one.
        corpus: texts to look in, read once in order; may be a generator.
        threshold: smallest Jaccard similarity, in [0.05, 1].
        shingle: words in a shingle.
        span_tokens: length from which an exactly equal span counts.
        tokenise: text -> tokens (any hashable values) for spans; words with their case when absent.
        seed: of the MinHash permutations. It decides only which pairs near the threshold are missed.
        progress: called with the number of corpus items done.

    Returns:
        Pairs, clusters and uncovered items. Same input, same result, in any process.

    Raises:
        UsageError: no record, an empty corpus, or a setting out of range.
    """
    if not MIN_THRESHOLD <= threshold <= 1:
        raise UsageError(f"expected a similarity threshold in [{MIN_THRESHOLD}, 1], found {threshold}; pass 0.8")
    if shingle < 1 or span_tokens < 1:
        raise UsageError(
            f"expected shingles and spans of at least 1 token, found {shingle} and {span_tokens}; pass 5 and 50"
        )
    if isinstance(records, str) or isinstance(corpus, str):
        raise UsageError("expected lists of texts, found a single text; put it into a list")
    if not records:
        raise UsageError("expected at least one record to look for, found none; pass the request's records")
    index = _Index.of(records, threshold, shingle, span_tokens, tokenise or cased_words, seed)
    among = [pair for i, text in enumerate(records) for pair in index.lookup(text, i) if pair.record < i]
    pairs: list[Pair] = []
    size = 0
    for size, text in enumerate(corpus, start=1):
        pairs += index.lookup(text, size - 1)
        if progress:
            progress(size)
    if not size:
        raise UsageError("expected a corpus of at least one text, found none; pass the corpus the checkpoint saw")
    covered = {pair.other for pair in pairs if pair.kind == "identical"}
    uncovered: list[set[int]] = [set() for _ in records]
    for pair in pairs:
        if pair.other not in covered:
            uncovered[pair.record].add(pair.other)
    record_clusters, corpus_clusters = _clusters(len(records), among, pairs)
    return Duplicates(
        pairs=tuple(sorted(pairs, key=_order)),
        among_records=tuple(sorted(among, key=_order)),
        record_clusters=record_clusters,
        corpus_clusters=corpus_clusters,
        uncovered=tuple(tuple(sorted(items)) for items in uncovered),
        corpus_size=size,
        too_short=index.too_short,
        threshold=threshold,
        span_tokens=span_tokens,
    )


def words(text: str) -> list[str]:
    """Words in order, without case and punctuation, compatibility forms unified (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def cased_words(text: str) -> list[str]:
    """Words in order as they are written."""
    return _WORD.findall(text)


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """The set of runs of `size` words; one run of all words if there are fewer; empty for a text without words."""
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))} if found else set()


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """|A n B| / |A u B|; 0 where both are empty."""
    common = len(a & b)
    return common / (len(a) + len(b) - common) if common else 0.0


def bands(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """(bands, rows a band) of the index: the most rows for which 1 - (1 - t^rows)^bands >= 1 - MISS.

    A pair of similarity t shares the signature of one band of r rows with probability t^r. Optimising both kinds of
    error, as is common, would miss every second pair at the threshold; false candidates only cost time, for each is
    checked.
    """
    rows = max(r for r in range(1, permutations + 1) if (1 - threshold**r) ** (permutations // r) <= MISS)
    return permutations // rows, rows


def _order(pair: Pair) -> tuple[int, int, str]:
    return pair.record, pair.other, pair.kind


def _clusters(n: int, among: Iterable[Pair], pairs: Iterable[Pair]) -> tuple[tuple[int, ...], dict[int, int]]:
    """Union-find over records (0..n - 1) and corpus items (n + index); the root is the smallest member, a record."""
    parent: dict[int, int] = {i: i for i in range(n)}

    def find(x: int) -> int:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    links = [(pair.record, pair.other) for pair in among] + [(pair.record, n + pair.other) for pair in pairs]
    for a, b in links:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    roots = sorted({find(i) for i in range(n)})
    number = {root: i for i, root in enumerate(roots)}
    corpus = sorted(x for x in parent if x >= n)
    return tuple(number[find(i)] for i in range(n)), {x - n: number[find(x)] for x in corpus}


@dataclass(slots=True)
class _Index:
    """Everything about the records that one pass over a corpus needs."""

    threshold: float
    shingle: int
    span_tokens: int
    tokenise: Tokenise
    identical: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))
    sets: list[set[tuple[str, ...]]] = field(default_factory=list)
    lsh: MinHashLSH = None
    empty: MinHash = None  # the signature of no shingles; to copy it is cheaper than to draw permutations again
    vocabulary: dict[Hashable, int] = field(default_factory=dict)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    grams: Hashes = field(default_factory=lambda: np.empty(0, dtype=np.uint64))  # [G] sorted
    owners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # [G]
    automata: dict[int, _SuffixAutomaton] = field(default_factory=dict)
    too_short: int = 0

    @classmethod
    def of(
        cls, records: Sequence[str], threshold: float, shingle: int, span_tokens: int, tokenise: Tokenise, seed: int
    ) -> _Index:
        self = cls(threshold, shingle, span_tokens, tokenise)
        self.lsh = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
        self.empty = MinHash(num_perm=PERMUTATIONS, seed=seed)
        grams, owners = [], []
        for i, text in enumerate(records):
            self.identical[_digest(text)].append(i)
            self.sets.append(shingles(text, shingle))
            if self.sets[i]:
                self.lsh.insert(i, self.signature(self.sets[i]))
            ids = np.array([self.vocabulary.setdefault(t, len(self.vocabulary)) for t in tokenise(text)], np.int64)
            self.tokens.append(ids)
            found = np.unique(gram_hashes(ids, span_tokens))
            grams.append(found)
            owners.append(np.full(len(found), i))
            self.too_short += len(words(text)) < shingle and len(ids) < span_tokens
        order = np.argsort(np.concatenate(grams), kind="stable")
        self.grams, self.owners = np.concatenate(grams)[order], np.concatenate(owners)[order]
        return self

    def signature(self, items: set[tuple[str, ...]]) -> MinHash:
        """The MinHash signature of a set of shingles."""
        signature = self.empty.copy()
        encoded = ["\x1f".join(item).encode() for item in items]  # order is of no matter to a minimum
        for start in range(0, len(encoded), _BLOCK):
            signature.update_batch(encoded[start : start + _BLOCK])
        return signature

    def lookup(self, text: str, other: int) -> Iterator[Pair]:
        """Pairs of all records with one text."""
        same = self.identical.get(_digest(text), [])
        for i in same:
            yield Pair(i, other, "identical", 1.0, None)
        found = shingles(text, self.shingle)
        if found:
            for i in sorted(set(self.lsh.query(self.signature(found))) - set(same)):
                similarity = jaccard(self.sets[i], found)
                if similarity >= self.threshold:
                    yield Pair(i, other, "near-duplicate", similarity, None)
        for i, span in self.spans(text):
            if i not in same and span >= self.span_tokens:
                yield Pair(i, other, "span", None, span)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(record, tokens in the longest span in common with the text), for the records that share a k-gram's hash."""
        if not len(self.grams):
            return
        ids = np.array([self.vocabulary.get(token, -1) for token in self.tokenise(text)], np.int64)
        hashes = np.unique(gram_hashes(ids, self.span_tokens))
        first, last = (np.searchsorted(self.grams, hashes, side) for side in ("left", "right"))
        hits = [self.owners[a:b] for a, b in zip(first, last, strict=True) if a < b]
        for i in sorted({int(owner) for owners in hits for owner in owners}):
            if i not in self.automata:
                self.automata[i] = _SuffixAutomaton(self.tokens[i].tolist())
            yield i, self.automata[i].longest_common_span(ids.tolist())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def gram_hashes(ids: NDArray[np.int64], k: int) -> Hashes:
    """Hashes of every run of k tokens; runs with a negative id (unknown to the index) are left out.

    Built by doubling: the hash of 2m tokens from those of its halves. Equal runs have equal hashes always; different
    ones with probability about 2^-64, and whoever uses the hashes checks the tokens.

    Args:
        ids: [n] token ids.
        k: tokens in a run.

    Returns:
        [n - k + 1 or fewer] hashes, in order.
    """
    count = len(ids) - k + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = _mix(ids.astype(np.uint64))  # [n]
    length = 1
    while 2 * length <= k:
        hashes = _join(hashes[:-length], hashes[length:])  # [n - 2 length + 1]
        length *= 2
    if length < k:  # two runs that overlap
        hashes = _join(hashes[:count], hashes[k - length :])
    unknown = np.concatenate([[0], np.cumsum(ids < 0)])
    kept: Hashes = hashes[unknown[k:] == unknown[:-k]]
    return kept


def _join(left: Hashes, right: Hashes) -> Hashes:
    return _mix(left * np.uint64(0x9E3779B97F4A7C15) + right)


def _mix(x: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _SuffixAutomaton:
    """All spans of one token sequence, in linear space; the longest span in common with another takes linear time."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.edges: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        last = 0
        for token in tokens:
            last = self._extend(last, token)

    def _extend(self, last: int, token: int) -> int:
        state = self._add({}, -1, self.length[last] + 1)
        p = last
        while p >= 0 and token not in self.edges[p]:
            self.edges[p][token] = state
            p = self.link[p]
        if p < 0:
            self.link[state] = 0
            return state
        target = self.edges[p][token]
        if self.length[p] + 1 == self.length[target]:
            self.link[state] = target
            return state
        clone = self._add(dict(self.edges[target]), self.link[target], self.length[p] + 1)
        while p >= 0 and self.edges[p].get(token) == target:
            self.edges[p][token] = clone
            p = self.link[p]
        self.link[target] = self.link[state] = clone
        return state

    def _add(self, edges: dict[int, int], link: int, length: int) -> int:
        self.edges.append(edges)
        self.link.append(link)
        self.length.append(length)
        return len(self.length) - 1

    def longest_common_span(self, tokens: Sequence[int]) -> int:
        """Tokens in the longest contiguous span that both sequences hold."""
        state = matched = best = 0
        for token in tokens:
            while state and token not in self.edges[state]:
                state = self.link[state]
                matched = self.length[state]
            if token in self.edges[state]:
                state = self.edges[state][token]
                matched += 1
                best = max(best, matched)
        return best
