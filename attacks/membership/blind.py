"""The blind test: can members and non-members be told apart without the model?

A linear classifier reads nothing but the records: hashed character n-grams and words, length, digits, dates,
punctuation; of images their colours, contrast, sharpness and an 8 x 8 thumbnail. Where it beats chance, the two sets
differ by more than membership (another source, another year), and a membership figure on them measures that as well:
such blind tests outdid published attacks on every one of eight data sets (Das et al., arXiv 2406.16201; Meeus et al.,
2406.17975). It runs before any membership attack.

Ridge regression of the label (1 or -1) on the features, weight 1, five folds by cluster. Scores are standardised
within a fold, over members and non-members together: what a fold's own model adds to all its scores says nothing. The
AUC of the scores and its interval come from `probes.statistics.auc`, which assumes independent scores. These are not:
any two classifiers share most of their training records, and the AUC of sets without a difference varies up to 1.5
times as much. So the interval is widened by how much more a contrast of the sets varies, over 400 random labellings,
when classifiers are trained on those labels than when they are not. Ridge scores are linear in the labels, so this
costs one matrix product. In simulations with 50 to 200 records a side, the test called 13 to 18 % of equal sets
confounded without the widening, and 2 to 7 % with it.

The verdict is two-sided: an AUC below one half mostly comes from near-duplicates across the two sets that no cluster
names (a record in training pulls its twin under the opposite label the wrong way), and such sets are no better.

Limits: a linear test of surface features; sets it cannot tell apart may still differ. Fewer than 50 independent records
a side cannot be tested, and nothing is cleared by that. At most 1,200 records of a set train the classifiers, all are
scored; memory grows by some 35 kB a record.

Shape letters: n members, m non-members, F features.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, sparse

from attacks.membership.folds import Indices, joint_codes, needed
from attacks.membership.folds import folds as deal
from probes.errors import UsageError
from probes.statistics import Clusters, Estimate, auc

Floats = NDArray[np.float64]

BITS = 13
DIMENSIONS = 1 << BITS  # hashed features
GRAMS = (2, 3, 4)  # characters
RIDGE = 1.0
FOLDS = 5
CALIPER = 0.2  # in standard deviations of the scores, halved until the matched sets cannot be told apart
THUMBNAIL = 8
BLOCK = 512  # records whose features are spelled out at once
PERMUTATIONS = 400
LARGEST = 1200  # records of a set to train on; more would cost memory and tell little

_MONTHS = "january february march april may june july august september october november december".split()
_PATTERNS = (
    re.compile(r"\b(?:1[5-9]|20)\d\d\b"),  # years
    re.compile(rf"\b(?:{'|'.join(f'{month[:3]}(?:{month[3:]})?' for month in _MONTHS)})\b", re.IGNORECASE),
    re.compile(r"\b\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b"),  # dates in figures
    re.compile(r"\d+(?:[.,]\d+)*"),  # numbers
    re.compile(r"https?://|www\.|\S@\S"),
    re.compile(r"[.!?](?:\s|$)"),  # sentences
)


@dataclass(frozen=True, slots=True)
class Blind:
    """What the records alone say about membership.

    Attributes:
        auc: of the out-of-fold scores.
        status: "confounded" where the interval excludes one half, "clear" where it does not, "not testable" below 50
            independent records a side.
        reason: a sentence.
        scores: [n] out-of-fold scores of members, higher = more like the members; standardised within folds.
        other_scores: [m] the same of non-members.
        clusters: of the members.
        other_clusters: of the non-members.
    """

    auc: Estimate
    status: Literal["clear", "confounded", "not testable"]
    reason: str
    scores: Floats = field(repr=False)
    other_scores: Floats = field(repr=False)
    clusters: Clusters = field(repr=False, default=None)
    other_clusters: Clusters = field(repr=False, default=None)

    @property
    def confounded(self) -> bool:
        """Whether membership figures on these sets cannot be taken for membership; also where it cannot be tested."""
        return self.status != "clear"


@dataclass(frozen=True, slots=True)
class Matched:
    """Pairs of a member and a non-member that look alike to the blind test.

    Attributes:
        members: [k] indices of members, each once.
        others: [k] index of the non-member beside each.
        auc: of the blind scores on these records.
        status: "ok", or "not resolvable" where too few pairs remain or the scores still separate them.
        reason: why not.
    """

    members: Indices = field(repr=False)
    others: Indices = field(repr=False)
    auc: Estimate
    status: Literal["ok", "not resolvable"]
    reason: str | None


def blind_test(
    members: Sequence[str],
    others: Sequence[str],
    *,
    clusters: Clusters = None,
    other_clusters: Clusters = None,
    folds: int = FOLDS,
    seed: int = 0,
    level: float = 0.95,
) -> Blind:
    """Tell members from non-members by their text alone.

    Args:
        members: [n] texts.
        others: [m] texts.
        clusters: [n] near-duplicate cluster of each member, None for one of its own. A cluster may hold records of
            both sets.
        other_clusters: [m] the same of the others.
        folds: parts; each is scored by a classifier trained on the rest.
        seed: of the folds and of the bootstrap.
        level: of the interval.

    Returns:
        The verdict, with every record's score.

    Raises:
        UsageError: clusters of the wrong length, or fewer than two folds.
    """
    sides = _Side(len(members), clusters), _Side(len(others), other_clusters)
    return _test(lambda: _text_features([*members, *others]), *sides, folds, seed, level)


def blind_images(
    members: Sequence[ArrayLike],
    others: Sequence[ArrayLike],
    *,
    clusters: Clusters = None,
    other_clusters: Clusters = None,
    folds: int = FOLDS,
    seed: int = 0,
    level: float = 0.95,
) -> Blind:
    """Tell members from non-members by their pixels alone.

    Args:
        members: n images [channels, height, width], all of one shape.
        others: m images.
        clusters: as in `blind_test`.
        other_clusters: as in `blind_test`.
        folds: as in `blind_test`.
        seed: as in `blind_test`.
        level: as in `blind_test`.

    Returns:
        As `blind_test`.

    Raises:
        UsageError: images of different shapes, or as `blind_test`.
    """
    sides = _Side(len(members), clusters), _Side(len(others), other_clusters)
    return _test(lambda: _image_features([*members, *others]), *sides, folds, seed, level)


def propensity_matched(blind: Blind, *, seed: int = 0) -> Matched:
    """The largest set of pairs that the blind scores do not separate.

    A member and a non-member are a pair when their scores lie within a caliper of each other: a fifth of a standard
    deviation (Austin 2011), halved until the interval of the blind AUC on the pairs holds one half.

    Args:
        blind: the test's result.
        seed: of the bootstrap of clustered records.

    Returns:
        The pairs. They are alike in what the classifier saw, which need not be all they differ in.
    """
    caliper = CALIPER
    while True:
        pairs = _pairs(blind.scores, blind.other_scores, caliper)
        found = _auc(blind, pairs[:, 0], pairs[:, 1], seed)
        if found.interval is None:
            return Matched(pairs[:, 0], pairs[:, 1], found, "not resolvable", f"{len(pairs)} pairs: {found.reason}")
        if found.interval.low <= 0.5 <= found.interval.high:
            return Matched(pairs[:, 0], pairs[:, 1], found, "ok", None)
        caliper /= 2


# ------------------------------------------------------------------------------------------------------------ testing


class _Side(NamedTuple):
    """One of the two sets."""

    n: int
    clusters: Clusters


def _test(features: Callable[[], Any], ours: _Side, theirs: _Side, parts: int, seed: int, level: float) -> Blind:
    n, m = ours.n, theirs.n
    if parts < 2:
        raise UsageError(f"expected at least 2 folds, found {parts}")
    units = joint_codes(n, m, ours.clusters, theirs.clusters)
    fold = np.concatenate(deal(n, m, ours.clusters, theirs.clusters, parts, seed))
    label = np.concatenate([np.ones(n), -np.ones(m)])
    scores, widening = np.zeros(n + m), 1.0
    if n and m:
        classifier = _Classifier(features(), fold, _usable(n, m, seed), parts)
        scores = classifier.scores(label[:, None])[:, 0]
        widening = _widening(classifier, label, fold, units, scores, seed)
    untested = Estimate("not resolvable", None, None)
    blank = Blind(untested, "not testable", "", scores[:n], scores[n:], ours.clusters, theirs.clusters)
    found = _widened(_auc(blank, np.arange(n), np.arange(m), seed, level), widening)
    if found.interval is None:
        return replace(blank, auc=found, reason=f"the sets cannot be tested for other differences: {found.reason}")
    low, high = found.interval.low, found.interval.high
    shown = f"AUC {found.interval.value:.3f} [{low:.3f}, {high:.3f}]"
    if low > 0.5:
        reason = f"the records alone tell members from non-members: {shown}"
    elif high < 0.5:
        reason = f"the records alone tell the sets apart in reverse, as near-duplicates across them do: {shown}"
    else:
        return replace(
            blank, auc=found, status="clear", reason=f"the records alone do not tell the sets apart: {shown}"
        )
    return replace(blank, auc=found, status="confounded", reason=reason)


def _auc(blind: Blind, members: Indices, others: Indices, seed: int, level: float = 0.95) -> Estimate:
    """AUC of the scores of some of the records."""
    x, y = blind.scores[members], blind.other_scores[others]
    if needed(blind.clusters) is None and needed(blind.other_clusters) is None:
        return auc(x, y, level=level)
    pos, neg = (
        None if names is None else [names[i] for i in chosen]
        for names, chosen in ((blind.clusters, members), (blind.other_clusters, others))
    )
    return auc(x, y, pos_clusters=pos, neg_clusters=neg, method="bootstrap", level=level, seed=seed)


def _widened(estimate: Estimate, factor: float) -> Estimate:
    """An AUC whose interval's arms are longer by a factor, within [0, 1]."""
    if estimate.interval is None:
        return estimate
    found = estimate.interval
    low = max(0.0, found.value - factor * (found.value - found.low))
    high = min(1.0, found.value + factor * (found.high - found.value))
    method = f"{found.method}, widened for shared training records"
    return Estimate("ok", None, replace(found, low=low, high=high, method=method))


def _usable(n: int, m: int, seed: int) -> NDArray[np.bool_]:
    """[n + m] which records classifiers may train on: all, or a random LARGEST of a set."""
    rng = np.random.default_rng((seed, 6))
    return np.concatenate([rng.permutation(size) < LARGEST for size in (n, m)])


class _Classifier:
    """Out-of-fold scores as a linear function of the labels: one matrix a fold, whatever the labels are.

    Ridge regression on centred features, in its dual form: scores of held records are K (K' + RIDGE I)^-1 (y - mean),
    with K the inner products of held and training records and K' those of training records, centred.
    """

    def __init__(self, features: Any, fold: Indices, usable: NDArray[np.bool_], parts: int) -> None:
        self._maps: list[tuple[Indices, Indices, Floats]] = []  # (held, trained on, [held, trained on])
        column = np.cumsum(usable) - 1  # [n + m] of a usable record in the products
        products = _products(features, np.flatnonzero(usable))  # [n + m, usable]
        for part in range(parts):
            held, kept = np.flatnonzero(fold == part), np.flatnonzero((fold != part) & usable)
            if not len(held) or not len(kept):
                continue
            inner = products[np.ix_(kept, column[kept])]  # [t, t]
            inner = inner - inner.mean(axis=0) - inner.mean(axis=1)[:, None] + inner.mean()
            inner.flat[:: len(kept) + 1] += RIDGE
            # Centring the held records would add one constant to all of a fold's scores: the weights sum to zero.
            across = products[np.ix_(held, column[kept])]  # [h, t]
            self._maps.append((held, kept, linalg.solve(inner, across.T, assume_a="pos").T))

    def scores(self, labels: Floats) -> Floats:
        """[n + m, P] scores for P label vectors [n + m, P], standardised within each fold."""
        out = np.zeros(labels.shape)
        for held, kept, hat in self._maps:
            found = hat @ (labels[kept] - labels[kept].mean(axis=0))
            found -= found.mean(axis=0)
            spread = found.std(axis=0)
            out[held] = found / np.where(spread > 1e-12, spread, np.inf)
        return out


def _widening(
    classifier: _Classifier, label: Floats, fold: Indices, units: Indices, scores: Floats, seed: int
) -> float:
    """By how much classifiers that share their training records spread a difference between the sets, at least 1.

    Under random labels, the spread of (mean score of members - mean score of others) with classifiers trained on those
    labels, over that with the scores as they are.
    """
    labels = _shuffled(label, fold, units, seed)  # [n + m, P]
    contrast = (labels > 0) / (labels > 0).sum(axis=0) - (labels < 0) / (labels < 0).sum(axis=0)
    trained = (classifier.scores(labels) * contrast).sum(axis=0)  # [P]
    fixed = scores @ contrast  # [P]
    return max(1.0, float(trained.std() / fixed.std())) if fixed.std() > 1e-12 else 1.0


def _shuffled(label: Floats, fold: Indices, units: Indices, seed: int) -> Floats:
    """[n + m, P] labels as they could have been: clusters of one label swap within a fold, mixed ones inside."""
    rng = np.random.default_rng((seed, 5))
    members = np.bincount(units, label > 0)  # [G] members in each cluster
    mixed = (members > 0) & (members < np.bincount(units))
    out = np.repeat(label[:, None], PERMUTATIONS, axis=1)
    for part in np.unique(fold):
        rows = np.flatnonzero((fold == part) & ~mixed[units])
        _, first, place = np.unique(units[rows], return_index=True, return_inverse=True)
        own = np.repeat(label[rows][first][:, None], PERMUTATIONS, axis=1)  # [clusters, P]
        out[rows] = rng.permuted(own, axis=0)[place]
    for unit in np.flatnonzero(mixed):
        rows = np.flatnonzero(units == unit)
        out[rows] = rng.permuted(out[rows], axis=0)
    return out


def _products(features: Any, columns: Indices) -> Floats:
    """[n + m, len(columns)] inner products of all rows of features, dense or sparse, with some of them."""
    blocks = [features[start : start + BLOCK] for start in range(0, features.shape[0], BLOCK)]
    some = _dense(features[columns]).T
    return np.concatenate([_dense(block) @ some for block in blocks]).astype(np.float64)


def _dense(matrix: Any) -> NDArray[np.floating]:
    """A matrix as it is, or a sparse one spelled out: its columns are full enough for that to be far faster."""
    dense: NDArray[np.floating] = matrix if isinstance(matrix, np.ndarray) else matrix.toarray()
    return dense


def _pairs(x: Floats, y: Floats, caliper: float) -> Indices:
    """[k, 2] the most disjoint pairs (i, j) with |x_i - y_j| <= caliper."""
    a, b = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        gap = x[a[i]] - y[b[j]]
        if abs(gap) <= caliper:
            found.append((int(a[i]), int(b[j])))
            i, j = i + 1, j + 1
        elif gap < 0:
            i += 1
        else:
            j += 1
    return np.array(sorted(found), dtype=np.intp).reshape(-1, 2)


# ----------------------------------------------------------------------------------------------------------- features


def _text_features(texts: Sequence[str]) -> Any:
    """[n + m, F] sparse: tf-idf of hashed n-grams, each row of norm 1, beside the style of the text."""
    rows, columns = [], []
    for i, text in enumerate(texts):
        hashed = _hashed(text)
        rows.append(np.full(len(hashed), i))
        columns.append(hashed)
    shape = (len(texts), DIMENSIONS)
    ones = np.ones(sum(map(len, columns)))
    counts: Any = sparse.csr_array((ones, (np.concatenate(rows), np.concatenate(columns))), shape=shape)  # sums repeats
    counts.sum_duplicates()
    present = np.bincount(counts.indices, minlength=DIMENSIONS)
    weight = np.log((1 + len(texts)) / (1 + present)) + 1  # [F] smoothed inverse document frequency
    counts.data = (1 + np.log(counts.data)) * weight[counts.indices]
    norms = np.sqrt(counts.multiply(counts).sum(axis=1))
    counts = sparse.diags_array(1 / np.maximum(norms, 1e-12)) @ counts
    style = _standardised(np.array([_style(text) for text in texts]))
    return sparse.hstack([counts, sparse.csr_array(style)], format="csr", dtype=np.float32)


def _hashed(text: str) -> NDArray[np.int64]:
    """Numbers of the features of a text: its character n-grams and its words, with repeats."""
    codes = _codes(text).astype(np.uint64)
    found = []
    for n in GRAMS:
        if len(codes) < n:
            continue
        mixed = np.full(len(codes) - n + 1, n, dtype=np.uint64)
        for k in range(n):  # wraps modulo 2^64
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[k : len(codes) - n + 1 + k]
        found.append((mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(64 - BITS))
    words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) % DIMENSIONS for word in text.lower().split()]
    found.append(np.array(words, dtype=np.uint64))
    return np.concatenate(found).astype(np.int64)


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _style(text: str) -> list[float]:
    """Length, kinds of characters, and what looks like a date, a number or an address."""
    words, codes = text.split(), _codes(text)
    counts = [len(pattern.findall(text)) for pattern in _PATTERNS]
    years = [int(year) - 2000 for year in _PATTERNS[0].findall(text)] or [0]  # a text without dates is in the middle
    digit, upper, lower = ((codes >= ord(a)) & (codes <= ord(b)) for a, b in ("09", "AZ", "az"))
    kinds = (digit, upper, digit | upper | lower, codes <= ord(" "), codes == ord("\n"), codes > 127)
    shares = [float(kind.sum()) / max(1, len(codes)) for kind in kinds]
    return [
        np.log1p(len(text)),
        np.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        len(set(words)) / max(1, len(words)),
        *shares,
        *(np.log1p(count) for count in counts),
        float(max(years)),
        float(bool(text[:1].isupper())),
        float(text[-1:] in tuple(".!?")),
    ]


def _image_features(images: Sequence[ArrayLike]) -> Floats:
    """[n + m, F]: colours, contrast, sharpness and a thumbnail, standardised."""
    rows: list[Floats] = []
    shape: tuple[int, ...] | None = None
    for image in images:
        pixels = np.asarray(image, dtype=np.float64)  # [C, H, W]
        shape = shape or pixels.shape
        if pixels.shape != shape or pixels.ndim != 3 or not pixels.size:
            raise UsageError(f"expected images of one shape [channels, height, width], found {shape}, {pixels.shape}")
        if not np.isfinite(pixels).all():
            raise UsageError("expected finite pixels, found an image with others; leave it out and say so")
        flat = pixels.reshape(len(pixels), -1)  # [C, H W]
        across, down = np.diff(pixels, axis=2), np.diff(pixels, axis=1)
        energy = [
            float(np.square(part).mean()) if part.size else 0.0 for part in (across, down, np.diff(across, axis=2))
        ]
        rows.append(
            np.concatenate(
                [
                    flat.mean(axis=1),
                    flat.std(axis=1),
                    np.quantile(flat, [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0], axis=1).ravel(),
                    np.log1p(energy),
                    _thumbnail(pixels).ravel(),
                ]
            )
        )
    return _standardised(np.array(rows))


def _thumbnail(pixels: Floats) -> Floats:
    """[C, at most 8, at most 8] means over tiles of an image [C, H, W]."""
    for axis in (1, 2):
        size = pixels.shape[axis]
        edges = np.linspace(0, size, min(THUMBNAIL, size) + 1).astype(int)
        widths = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(3)])
        pixels = np.add.reduceat(pixels, edges[:-1], axis=axis) / widths
    return pixels


def _standardised(columns: Floats) -> Floats:
    """[n + m, F] columns of mean 0 and spread 1 within 5 of zero, constant ones 0; a row's norm is about 1."""
    spread = columns.std(axis=0)
    scaled = (columns - columns.mean(axis=0)) / np.where(spread > 1e-12, spread, np.inf)
    standardised: Floats = np.clip(scaled, -5, 5) / np.sqrt(columns.shape[1])
    return standardised
