"""Pairing by length against every assignment there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from probes.errors import UsageError
from probes.memory import pair_by_length, pairing


def best_cost(records: list[int], foils: list[int]) -> int:
    """Least sum of differences over all assignments with even use, by trying them all."""
    low = len(records) // len(foils)
    high = -(-len(records) // len(foils))
    costs = [
        sum(abs(records[i] - foils[j]) for i, j in enumerate(chosen))
        for chosen in itertools.product(range(len(foils)), repeat=len(records))
        if all(low <= chosen.count(j) <= high for j in range(len(foils)))
    ]
    return min(costs)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (3, 5), (4, 4), (5, 3), (6, 2), (5, 1), (7, 3)])
def test_as_even_and_as_near_as_can_be(n: int, m: int) -> None:
    rng = np.random.default_rng(n * 10 + m)
    for trial in range(10):
        records, foils = rng.integers(1, 12, n).tolist(), rng.integers(1, 12, m).tolist()
        pairs = pair_by_length(records, foils, seed=trial)
        uses = np.bincount(pairs, minlength=m)
        assert uses.min() >= n // m
        assert uses.max() <= -(-n // m)
        assert sum(abs(records[i] - foils[j]) for i, j in enumerate(pairs)) == best_cost(records, foils)


def test_the_seed_decides_between_equal_foils_and_nothing_else() -> None:
    lengths = [7] * 20
    first, again, other = (pair_by_length(lengths, [7] * 40, seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert list(first) != list(other)
    assert set(first) != set(range(20))  # not simply the first ones


def test_many_foils_are_thinned_and_still_near(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    records, foils = rng.integers(10, 60, 50), rng.integers(10, 60, 3000)
    monkeypatch.setattr(pairing, "CELLS", 50 * 100)
    pairs = pair_by_length(records, foils)
    assert len(set(pairs.tolist())) == 50
    assert np.abs(records - foils[pairs]).mean() < 1
    pairs = pair_by_length(foils, records)  # more records than foils
    uses = np.bincount(pairs, minlength=50)
    assert (uses == 60).all()


def test_no_records_and_no_foils() -> None:
    assert len(pair_by_length([], [3])) == 0
    with pytest.raises(UsageError, match="at least one foil"):
        pair_by_length([3], [])
