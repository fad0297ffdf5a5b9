"""Conformal p-values and the band of a distribution function: by definition, and their levels by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import benjamini_hochberg, conformal_pvalues, dkw
from tests.probes.statistics.common import not_above, not_below


def test_conformal_p_values_by_definition() -> None:
    rng = np.random.default_rng(60)
    for decimals in (8, 0):
        scores, calibration = np.round(rng.normal(size=30), decimals), np.round(rng.normal(size=19), decimals)
        expected = [(1 + sum(c >= s for c in calibration)) / 20 for s in scores]
        assert conformal_pvalues(scores, calibration).tolist() == expected
    assert conformal_pvalues([9.0, -9.0], [0.0] * 99).tolist() == [0.01, 1.0]
    assert conformal_pvalues([0.0], [0.0] * 9).tolist() == [1.0]  # ties count against the finding
    assert conformal_pvalues([3.0, 4.0], []).tolist() == [1.0, 1.0]
    assert conformal_pvalues([], [1.0]).shape == (0,)


@pytest.mark.parametrize(("n", "decimals"), [(1, 8), (19, 8), (40, 0), (1, 0)])
def test_conformal_level_is_exact(n: int, decimals: int) -> None:
    rng, repetitions = np.random.default_rng(61), 2000
    drawn = np.round(rng.normal(size=(repetitions, n + 1)), decimals)
    p = np.array([conformal_pvalues(row[:1], row[1:])[0] for row in drawn])
    for alpha in (0.05, 0.1, 0.5, 1.0):
        assert not_above(int((p <= alpha).sum()), repetitions, alpha)
    if decimals == 8:
        assert (p <= 0.5).mean() == pytest.approx(math.floor(0.5 * (n + 1)) / (n + 1), abs=0.05)


def test_flags_of_conformal_p_values_keep_the_false_discovery_rate() -> None:
    rng, shares, found = np.random.default_rng(62), [], 0
    for _ in range(300):
        scores = np.append(rng.normal(4.5, 1, 10), rng.normal(size=40))
        flagged = benjamini_hochberg(conformal_pvalues(scores, rng.normal(size=200))) <= 0.1
        shares.append(flagged[10:].sum() / max(1, flagged.sum()))
        found += flagged[:10].sum()
    assert np.mean(shares) <= 0.1 * 40 / 50 + 4 * np.std(shares) / math.sqrt(300)
    assert found > 2500


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [1, 5, 50, 400])
def test_band_holds_the_whole_distribution_function(n: int, level: float) -> None:
    rng, repetitions = np.random.default_rng(63), 2000
    u = np.sort(rng.random((repetitions, n)), axis=1)
    steps = np.arange(1, n + 1) / n
    distance = np.maximum((steps - u).max(axis=1), (u - steps + 1 / n).max(axis=1))
    width = dkw(u[0], level)
    assert not_below(int((distance <= width).sum()), repetitions, level)
    assert stats.kstwo.cdf(width, n) >= level
    if n >= 50:
        assert stats.kstwo.cdf(width, n) < level + (1 - level) * 0.4  # and is not much too wide


def test_band_without_values() -> None:
    assert dkw([]) == 1.0
    assert dkw([1.0]) == 1.0
    assert dkw([0.0] * 100) == pytest.approx(math.sqrt(math.log(40) / 200))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal_pvalues([math.nan], [1.0]), "expected finite scores"),
        (lambda: conformal_pvalues([1.0], [math.inf]), "expected finite calibration"),
        (lambda: dkw([1.0], 1.0), "confidence level"),
        (lambda: dkw([math.nan]), "expected finite x"),
    ],
)
def test_misuse_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
