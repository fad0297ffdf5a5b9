"""Rates: exact intervals against scipy, bounds for 0 of n, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import Interval, clopper_pearson, required_n, worst_of
from tests.probes.statistics.common import limits, not_below


@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_clopper_pearson_equals_scipy(level: float) -> None:
    for n in (1, 2, 7, 30, 1000):
        for k in {0, 1, n // 3, n - 1, n}:
            for sided, alternative in (("two", "two-sided"), ("upper", "less"), ("lower", "greater")):
                expected = stats.binomtest(k, n, alternative=alternative).proportion_ci(level, method="exact")
                assert limits(clopper_pearson(k, n, level, sided)) == pytest.approx(tuple(expected), abs=1e-12)


def test_zero_of_n_is_a_bound_and_no_trials_say_nothing() -> None:
    for n, bound in ((20, 0.1391), (100, 0.0295), (500, 0.0060), (1000, 0.0030)):
        assert limits(clopper_pearson(0, n, sided="upper")) == (0.0, pytest.approx(bound, abs=5e-5))
    assert clopper_pearson(5, 5).high == 1.0
    assert clopper_pearson(5, 5).low == pytest.approx(0.025 ** (1 / 5))
    nothing = clopper_pearson(0, 0)
    assert math.isnan(nothing.value)
    assert limits(nothing) == (0.0, 1.0)
    assert clopper_pearson(1, 3) == Interval(1 / 3, *limits(clopper_pearson(1, 3)), 0.95, 3, "clopper-pearson")


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(UsageError, match="expected 0 <= k <= n"):
        clopper_pearson(k, n)


def test_worst_of_holds_for_all_records_together() -> None:
    bound = worst_of([0, 2, 0], [50, 50, 10])
    assert bound.high == pytest.approx(
        max(clopper_pearson(k, n, 1 - 0.05 / 3, "upper").high for k, n in [(2, 50), (0, 10)])
    )
    assert (bound.value, bound.low, bound.n) == (0.04, 0.0, 3)
    assert worst_of([0, 0], [100, 0]).high == 1.0
    assert math.isnan(worst_of([], []).value)
    assert worst_of([], []).high == 1.0
    rng, rates, n = np.random.default_rng(0), np.array([0.02, 0.05, 0.05, 0.05]), 40
    held = sum(worst_of(rng.binomial(n, rates).tolist(), [n] * 4).high >= rates.max() for _ in range(500))
    assert not_below(held, 500, 0.95)


@pytest.mark.parametrize(
    ("p_max", "level", "records"), [(0.01, 0.95, 1), (0.01, 0.95, 24), (0.001, 0.95, 1), (0.5, 0.5, 1), (0.2, 0.99, 3)]
)
def test_required_n_is_the_smallest_that_suffices(p_max: float, level: float, records: int) -> None:
    n = required_n(p_max, level, records)
    at, before = (worst_of([0] * records, [m] * records, level).high for m in (n, max(n - 1, 0)))
    assert at <= p_max + 1e-12 < before
    assert {(0.01, 1): 299, (0.01, 24): 615, (0.001, 1): 2995}.get((p_max, records), n) == n


@pytest.mark.parametrize("sided", ["two", "upper", "lower"])
@pytest.mark.parametrize("n", [1, 5, 30, 200])
def test_rates_cover_exactly(n: int, sided) -> None:
    """Not simulated: the chance that the interval holds the rate, summed over all outcomes."""
    ends = np.array([limits(clopper_pearson(k, n, 0.9, sided)) for k in range(n + 1)])  # [n + 1, 2]
    for rate in (0.0, 1e-4, 0.01, 0.1, 0.37, 0.5, 0.9, 1.0):
        held = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
        assert stats.binom.pmf(np.arange(n + 1), n, rate)[held].sum() >= 0.9 - 1e-12
    if n == 200:
        held = (ends[:, 0] <= 0.37) & (ends[:, 1] >= 0.37)
        assert stats.binom.pmf(np.arange(n + 1), n, 0.37)[held].sum() < 0.95
