"""Pair every record with a foil of about its length, each foil used as evenly as possible.

Of all assignments that use every one of F foils floor(R / F) or ceil(R / F) times, one with the smallest sum of length
differences over the R pairs. On a line there is always a best assignment that keeps the order of lengths, so a dynamic
program over records and places, both sorted, finds it: a place is one use of a foil, and

    D[i, j] = |length_i - place_j| - bonus_j + min over j' < j of D[i - 1, j'],

where the bonus of the first floor(R / F) places of a foil is so large that none of them stays empty.

Shape letters: R records, F foils, K places that stay empty, plus one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.errors import UsageError

CELLS = 1 << 24  # of the program's table, 64 MB; beyond it a random part of the foils is considered


def pair_by_length(lengths: ArrayLike, foil_lengths: ArrayLike, *, seed: int = 0) -> NDArray[np.intp]:
    """The foil of each record.

    Args:
        lengths: [R] whole-number lengths of the records, in any unit.
        foil_lengths: [F] lengths of the foils, in the same unit.
        seed: decides between foils of equal length, and which foils are considered when R times the number left
            over exceeds `CELLS`.

    Returns:
        [R] indices into the foils; empty for no records. Equal inputs give equal pairs.

    Raises:
        UsageError: no foils.
    """
    records, foils = np.asarray(lengths, dtype=np.int64), np.asarray(foil_lengths, dtype=np.int64)
    if not len(foils):
        raise UsageError("expected at least one foil to pair records with, found none; pass never-seen records")
    if not len(records):
        return np.zeros(0, dtype=np.intp)
    shuffled = np.random.default_rng((seed, 11)).permutation(len(foils))
    uses, extra = divmod(len(records), len(foils))
    optional = shuffled[: extra + CELLS // len(records)] if extra else shuffled[:0]
    places = np.concatenate([np.repeat(shuffled, uses), optional])  # [R + K - 1], foils
    needed = np.arange(len(places)) < uses * len(foils)
    order = np.argsort(foils[places], kind="stable")
    places, needed = places[order], needed[order]
    by_length = np.argsort(records, kind="stable")
    pairs = np.empty(len(records), dtype=np.intp)
    pairs[by_length] = places[_assign(records[by_length], foils[places], needed)]
    return pairs


def _assign(records: NDArray[np.int64], places: NDArray[np.int64], needed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """[R] the place of each record: increasing, no needed place empty, of least total length difference."""
    empty = len(places) - len(records)  # record i takes one of the places i .. i + empty
    spread = int(max(records.max(), places.max()) - min(records.min(), places.min()))
    bonus = np.where(needed, len(records) * spread + 1, 0)
    best = np.zeros(empty + 1, dtype=np.int64)  # [K] of the records so far, the last one at place i + k or before
    came_from = np.empty((len(records), empty + 1), dtype=np.int32)  # [R, K]
    offsets = np.arange(empty + 1)
    for i, length in enumerate(records):
        cost = best + np.abs(length - places[i : i + empty + 1]) - bonus[i : i + empty + 1]
        best = np.minimum.accumulate(cost)
        came_from[i] = np.maximum.accumulate(np.where(cost == best, offsets, 0))
    taken, k = np.empty(len(records), dtype=np.intp), empty
    for i in range(len(records) - 1, -1, -1):
        k = int(came_from[i, k])
        taken[i] = i + k
    return taken
