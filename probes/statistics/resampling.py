"""Which clusters each bootstrap resample draws, and which sides they take in each permutation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from probes.statistics.results import Floats

RESAMPLES = 2000
CHUNK = 1 << 16  # resampling weights held at a time: 0.5 MB stays in the cache, twice as fast as all at once


def weights_of(groups: int, n_resamples: int, seed: tuple[int, int], rows: int | None = None) -> Iterator[Floats]:
    """[chunk, G] times each cluster is drawn, for `n_resamples` resamples in chunks of bounded memory.

    The draws do not depend on the chunk size.
    """
    rng = np.random.default_rng(seed)
    rows = rows or CHUNK // groups + 1
    for start in range(0, n_resamples, rows):
        count = min(rows, n_resamples - start)
        drawn = rng.integers(0, groups, (count, groups)) + np.arange(count)[:, None] * groups
        yield np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups).astype(np.float64)


def permuted_sides(members: int, groups: int, count: int, seed: int, rows: int) -> Iterator[NDArray[np.bool_]]:
    """[rows, G] which clusters play the members, in chunks; the draws do not depend on the chunk size."""
    rng = np.random.default_rng((seed, 3))
    for start in range(0, count, rows):
        order = rng.random((min(rows, count - start), groups)).argsort(axis=1)
        sides = np.zeros(order.shape, dtype=np.bool_)
        np.put_along_axis(sides, order[:, :members], True, axis=1)
        yield sides
