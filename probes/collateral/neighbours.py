"""Neighbours: do the kept records that resemble the removed ones suffer more than the rest?

Each kept record's nearness is its similarity to the most similar removed record: the cosine of tf-idf weighted, hashed
character n-grams where there is text, the Jaccard index of token sets where there are only ids. The nearest quarter is
then compared with the rest: the difference of their mean rises of the loss, in nats per token, with its interval. Above
0 the edit spread to what stands near the records it removed.

Limits: nearness of wording; a record about the same person in other words is not found.

Shape letters: F removed records, K kept records, V features.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from probes.errors import UsageError
from probes.statistics import Clusters, Floats, Interval, difference_interval, mean_interval

GRAMS = (3, 4, 5)  # characters
BITS = 18  # of the hash
SHARE = 0.25
BLOCK = 512  # kept records compared at once
LEAST = 2  # clusters on either side


@dataclass(frozen=True, slots=True)
class Damage:
    """Rises of the loss near the removed records and elsewhere.

    Attributes:
        near: [K] whether a record is among the nearest.
        near_rise: mean rise of the nearest, in nats per token; None where not resolvable.
        far_rise: of the rest; None likewise.
        difference: near - far; None likewise.
        status: "ok", or "not resolvable" with too few records or clusters on a side, or nothing that is nearer.
        reason: why not.
    """

    near: np.ndarray = field(repr=False)
    near_rise: Interval | None
    far_rise: Interval | None
    difference: Interval | None
    status: Literal["ok", "not resolvable"]
    reason: str | None


def text_nearness(removed: Sequence[str], kept: Sequence[str]) -> Floats:
    """[K] cosine of each kept text with the most similar removed one, in [0, 1].

    Inverse document frequencies come from both sets together.

    Raises:
        UsageError: no removed text.
    """
    _some(removed)
    counts = _grams([*removed, *kept])  # [F + K, V]
    seen = np.asarray((counts > 0).sum(axis=0)).ravel()  # [V]
    idf = np.log((1 + counts.shape[0]) / (1 + seen)) + 1.0
    weighted = sparse.csr_matrix(counts.multiply(idf[None, :]))
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    scaled = sparse.csr_matrix(sparse.diags(1.0 / np.where(norms > 0, norms, 1.0)) @ weighted)
    first, rest = scaled[: len(removed)], scaled[len(removed) :]
    found = np.zeros(len(kept))
    for start in range(0, len(kept), BLOCK):
        products = rest[start : start + BLOCK] @ first.T  # [block, F]
        found[start : start + BLOCK] = products.max(axis=1).toarray().ravel()
    return np.clip(found, 0.0, 1.0)


def token_nearness(removed: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> Floats:
    """[K] Jaccard index of each kept record's token set with that of the most similar removed one, in [0, 1].

    Raises:
        UsageError: no removed record.
    """
    _some(removed)
    sets = [set(ids) for ids in removed]

    def nearest(own: set[int]) -> float:
        return max((len(own & other) / len(own | other) if own | other else 0.0) for other in sets)

    return np.array([nearest(set(ids)) for ids in kept], dtype=np.float64)


def damage(
    nearness: ArrayLike,
    rises: ArrayLike,
    *,
    clusters: Clusters = None,
    share: float = SHARE,
    level: float = 0.95,
    seed: int = 0,
) -> Damage:
    """Compare the rises of the nearest records with those of the rest.

    Args:
        nearness: [K] as from `text_nearness`.
        rises: [K] finite changes of the loss, after - before, in nats per token.
        clusters: [K] near-duplicate clusters.
        share: of the records that counts as near, in (0, 1); records as near as the last of them count as well.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        UsageError: lists that do not belong together, numbers that are not finite, or a share outside (0, 1).
    """
    near_to, change = np.asarray(nearness, dtype=np.float64), np.asarray(rises, dtype=np.float64)
    if near_to.ndim != 1 or near_to.shape != change.shape:
        raise UsageError(f"expected one rise for each record, found {change.size} for {near_to.size}; align them")
    if not (np.isfinite(near_to).all() and np.isfinite(change).all()):
        raise UsageError("expected finite nearness and rises, found others; leave those records out and say so")
    if not 0 < share < 1:
        raise UsageError(f"expected a share in (0, 1), found {share}; {SHARE} is usual")
    n = len(change)
    if not n:
        return Damage(np.zeros(0, dtype=bool), None, None, None, "not resolvable", "there is no kept record")
    near = near_to >= np.sort(near_to)[::-1][max(1, math.ceil(share * n)) - 1]
    sides = [_side(where, clusters) for where in (near, ~near)]
    if near.all():
        return Damage(
            near, None, None, None, "not resolvable", "no kept record is nearer to the removed ones than another"
        )
    if min(groups for _, groups in sides) < LEAST:
        reason = (
            f"{sides[0][1]} independent records near the removed ones and {sides[1][1]} elsewhere; {LEAST} are needed"
        )
        return Damage(near, None, None, None, "not resolvable", reason)
    (near_clusters, _), (far_clusters, _) = sides
    return Damage(
        near=near,
        near_rise=mean_interval(change[near], near_clusters, level=level, seed=seed),
        far_rise=mean_interval(change[~near], far_clusters, level=level, seed=seed),
        difference=difference_interval(
            change[near],
            change[~near],
            paired=False,
            clusters=near_clusters,
            y_clusters=far_clusters,
            level=level,
            seed=seed,
        ),
        status="ok",
        reason=None,
    )


def _side(where: np.ndarray, clusters: Clusters) -> tuple[Clusters, int]:
    """Clusters of some of the records, and how many independent ones these are."""
    rows = np.flatnonzero(where).tolist()
    if clusters is None:
        return None, len(rows)
    chosen = [clusters[i] for i in rows]
    return chosen, len({(0, i) if c is None else (1, c) for i, c in enumerate(chosen)})


def _some(removed: Sequence[object]) -> None:
    if not removed:
        raise UsageError("expected removed records to be near to, found none; give the records of the request")


def _grams(texts: Sequence[str]) -> sparse.csr_matrix:
    """[n, 2^BITS] counts of hashed character n-grams, letter case and runs of blanks aside."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        plain = f" {' '.join(text.casefold().split())} "
        grams = Counter(plain[i : i + size] for size in GRAMS for i in range(len(plain) - size + 1))
        for gram, count in grams.items():
            rows.append(row)
            columns.append(zlib.crc32(gram.encode("utf-8", "surrogatepass")) & ((1 << BITS) - 1))
            values.append(float(count))
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(texts), 1 << BITS))
