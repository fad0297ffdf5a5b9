"""Splits of members and non-members into parts that share no near-duplicate cluster.

A cluster named in both sets is one cluster: a record and the control drafted from it stand in the same part. Otherwise
whatever is learned on one part meets its own near-duplicates in the other, under the same label or the opposite one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from probes.errors import UsageError
from probes.statistics import Clusters

Indices = NDArray[np.intp]


def folds(
    n: int, m: int, clusters: Clusters, other_clusters: Clusters, parts: int, seed: int
) -> tuple[Indices, Indices]:
    """A part for every record, whole clusters together.

    Args:
        n: members.
        m: non-members.
        clusters: [n] cluster of each member, None for one of its own; or None when all are independent.
        other_clusters: [m] the same of non-members.
        parts: how many parts.
        seed: of the order in which clusters of one size are dealt out.

    Returns:
        [n] and [m] numbers of parts from 0. Clusters of members, of non-members and of both are dealt out apart, the
        largest first, each to the part with the fewest records of its kind; so without clusters every part has the
        same share of both.

    Raises:
        UsageError: clusters of the wrong length.
    """
    codes = joint_codes(n, m, clusters, other_clusters)
    units = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]) if len(codes) else []
    order = np.random.default_rng((seed, 3)).permutation(len(units))
    found = np.zeros(n + m, dtype=np.intp)
    load = np.zeros((3, parts), dtype=np.intp)  # records of each kind in each part
    for unit in sorted((units[i] for i in order), key=len, reverse=True):
        kind = 2 if unit[0] < n <= unit[-1] else int(unit[0] >= n)  # indices ascend
        part = int(np.argmin(load[kind]))
        load[kind, part] += len(unit)
        found[unit] = part
    return found[:n], found[n:]


def joint_codes(n: int, m: int, clusters: Clusters, other_clusters: Clusters) -> Indices:
    """[n + m] numbers of clusters from 0, in order of appearance, members first.

    Raises:
        UsageError: clusters of the wrong length.
    """
    numbers: dict[Hashable, int] = {}
    names = [*_names(clusters, n, "clusters", 0), *_names(other_clusters, m, "other_clusters", 1)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.intp)


def representatives(n: int, clusters: Clusters, seed: int) -> Indices:
    """One record of each cluster, drawn by the seed, in input order; all of them when `clusters` is None.

    Raises:
        UsageError: clusters of the wrong length.
    """
    names = _names(clusters, n, "clusters", 0)
    order = np.random.default_rng((seed, 4)).permutation(n)
    first: dict[Hashable, int] = {}
    for i in order:
        first.setdefault(names[i], int(i))
    return np.array(sorted(first.values()), dtype=np.intp)


def needed(clusters: Clusters) -> Clusters:
    """The clusters, or None where every record is its own and nothing is clustered."""
    named = [name for name in clusters or () if name is not None]
    return clusters if len(set(named)) < len(named) else None


def chosen(clusters: Clusters, where: NDArray[np.bool_]) -> list[Hashable | None] | None:
    """The clusters of some of the records."""
    return None if clusters is None else [clusters[i] for i in np.flatnonzero(where).tolist()]


def _names(clusters: Clusters, n: int, argument: str, side: int) -> Sequence[Hashable]:
    if clusters is None:
        return [(side, i) for i in range(n)]
    if len(clusters) != n:
        raise UsageError(f"expected {argument} for {n} records, found {len(clusters)}; give one of each")
    return [(side, i) if name is None else (2, name) for i, name in enumerate(clusters)]
