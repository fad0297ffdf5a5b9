"""Exposure: its exact law by enumeration, the Kolmogorov-Smirnov test by scipy, error rates by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import exposure, exposure_law, exposure_pvalue, fisher_combined
from tests.probes.statistics.common import not_above


def test_exposure_in_bits() -> None:
    assert exposure(1, 1024) == 10.0
    assert exposure(1024, 1024) == 0.0
    assert exposure(512, 1024) == 1.0
    assert exposure(1, 1) == 0.0
    assert exposure(1, 10**9) == pytest.approx(29.897, abs=1e-3)
    for rank, size in ((1, 7), (3, 7), (7, 7), (5, 10**9)):
        assert exposure_pvalue(rank, size) == pytest.approx(2 ** -exposure(rank, size))


def test_law_of_a_canary_never_seen_is_exact() -> None:
    size = 256
    bits = np.array([exposure(rank, size) for rank in range(1, size + 1)])  # every rank is equally likely
    for b in (0.0, 0.5, 1.0, 2.7, 8.0):
        assert (bits >= b).mean() <= 2**-b + 1e-12
    for b in range(9):
        assert (bits >= b).mean() == 2**-b
    p = np.array([exposure_pvalue(rank, size) for rank in range(1, size + 1)])
    for value in p:
        assert (p <= value).mean() == value
    million = np.log2(10**6) - np.log2(np.arange(1, 10**6 + 1))
    assert million.mean() == pytest.approx(1 / math.log(2), abs=1e-4)  # 1.44 bits


def test_law_equals_scipy_on_the_same_values() -> None:
    rng = np.random.default_rng(50)
    for k in (1, 2, 9, 60):
        sizes = rng.integers(2, 50, k)
        ranks = np.array([rng.integers(1, s + 1) for s in sizes])
        u = (ranks - np.random.default_rng((6, 4)).random(k)) / sizes
        expected = stats.kstest(u, "uniform", method="exact").pvalue
        assert exposure_law(ranks.tolist(), sizes.tolist(), seed=6) == pytest.approx(expected, abs=1e-9)


def test_law_sees_memorised_and_overforgotten_canaries() -> None:
    assert exposure_law([1] * 10, [1000] * 10) < 1e-6
    assert exposure_law([1000] * 10, [1000] * 10) < 1e-6
    assert exposure_law(list(range(50, 1000, 100)), [1000] * 10) > 0.9
    assert exposure_law([], []) == 1.0
    assert exposure_law([1], [1], seed=2) == exposure_law([1], [1], seed=2) != exposure_law([1], [1], seed=3)
    assert 0 < exposure_law([1], [10**6]) <= 2e-6  # two-sided, one canary


@pytest.mark.parametrize(("k", "size"), [(1, 2), (5, 3), (12, 1000), (40, 10)])
def test_false_alarms_stay_at_the_level(k: int, size: int) -> None:
    rng, repetitions = np.random.default_rng(51), 400
    p = np.array([exposure_law(rng.integers(1, size + 1, k).tolist(), [size] * k, seed=i) for i in range(repetitions)])
    for alpha in (0.01, 0.05, 0.5):
        assert not_above(int((p <= alpha).sum()), repetitions, alpha)
    assert stats.kstest(p, "uniform").pvalue > 1e-4  # exact: not conservative either
    ranks = rng.integers(1, size + 1, (repetitions, k))
    fisher = np.array([fisher_combined([exposure_pvalue(int(r), size) for r in row]) for row in ranks])
    for alpha in (0.01, 0.05, 0.5):
        assert not_above(int((fisher <= alpha).sum()), repetitions, alpha)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exposure(0, 5), "rank 0 of 5"),
        (lambda: exposure(6, 5), "count the canary itself"),
        (lambda: exposure_pvalue(1, 0), "1 <= rank <= size"),
        (lambda: exposure_law([1, 2], [5]), "found 2 and 1"),
        (lambda: exposure_law([6], [5]), "rank 6 of 5"),
    ],
)
def test_misuse_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
