"""Several tests at once: definitions, scipy, and error rates by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import benjamini_hochberg, fisher_combined, holm, median_combined
from tests.probes.statistics.common import not_above


def test_holm_and_benjamini_hochberg_by_their_definitions() -> None:
    rng = np.random.default_rng(17)
    for k in (1, 2, 7):
        p = np.round(rng.random(k) ** 3, 2)
        for alpha in np.arange(0.005, 1.0, 0.01):
            ordered = sorted(p)
            rejected = list(itertools.takewhile(lambda i: ordered[i] <= alpha / (k - i), range(k)))  # noqa: B023
            assert (holm(p) <= alpha).sum() == len(rejected)
        assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).shape == benjamini_hochberg([]).shape == (0,)


def test_fisher_equals_scipy() -> None:
    rng = np.random.default_rng(90)
    for k in (1, 2, 7, 100):
        p = rng.random(k) ** 2
        assert fisher_combined(p) == pytest.approx(stats.combine_pvalues(p, "fisher").pvalue, rel=1e-9)
    assert fisher_combined([]) == 1.0
    assert fisher_combined([1.0, 1.0]) == 1.0
    assert fisher_combined([0.0, 1.0]) == 0.0
    assert fisher_combined([0.3]) == pytest.approx(0.3)


def test_median_is_the_lower_one_doubled() -> None:
    assert median_combined([0.4, 0.1, 0.2]) == pytest.approx(0.4)
    assert median_combined([0.4, 0.1, 0.2, 0.9]) == pytest.approx(0.4)
    assert median_combined([0.9, 0.8]) == 1.0
    assert median_combined([0.0]) == 0.0
    assert median_combined([]) == 1.0


def independent(rng: np.random.Generator, k: int) -> np.ndarray:
    return rng.random(k)


def positively_dependent(rng: np.random.Generator, k: int) -> np.ndarray:
    return stats.norm.sf(0.8 * rng.normal() + 0.6 * rng.normal(size=k))


def discrete(rng: np.random.Generator, k: int) -> np.ndarray:
    return rng.integers(1, 5, k) / 4


@pytest.mark.parametrize("law", [independent, positively_dependent, discrete])
def test_false_alarms_of_several_tests_stay_at_the_level(law) -> None:
    rng, repetitions, k = np.random.default_rng(91), 1000, 9
    drawn = [law(rng, k) for _ in range(repetitions)]
    for alpha in (0.05, 0.3):
        for combine in (lambda p: holm(p).min(), lambda p: benjamini_hochberg(p).min(), median_combined):
            assert not_above(sum(combine(p) <= alpha for p in drawn), repetitions, alpha)
        if law is not positively_dependent:  # Fisher needs independence
            assert not_above(sum(fisher_combined(p) <= alpha for p in drawn), repetitions, alpha)


def test_median_holds_where_splits_agree_exactly() -> None:
    rng, repetitions = np.random.default_rng(92), 1000
    alarms = sum(median_combined([rng.random()] * 10) <= 0.05 for _ in range(repetitions))
    assert not_above(alarms, repetitions, 0.025)


def test_holm_and_benjamini_hochberg_beside_true_findings() -> None:
    rng, repetitions = np.random.default_rng(93), 500
    false_any, shares, found = 0, [], 0
    for _ in range(repetitions):
        p = np.append(rng.random(12), rng.random(8) * 1e-3)  # the last eight hypotheses are false
        false_any += bool((holm(p)[:12] <= 0.05).any())
        rejected = benjamini_hochberg(p) <= 0.1
        shares.append(rejected[:12].sum() / max(1, rejected.sum()))
        found += rejected[12:].sum()
    assert not_above(false_any, repetitions, 0.05)
    assert np.mean(shares) <= 0.1 * 12 / 20 + 4 * np.std(shares) / math.sqrt(repetitions)
    assert found == 8 * repetitions


@pytest.mark.parametrize("combine", [fisher_combined, median_combined])
def test_combining_refuses_what_is_no_p_value(combine) -> None:
    with pytest.raises(UsageError, match="1 outside"):
        combine([0.5, 1.5])
    with pytest.raises(UsageError, match="expected finite p-values"):
        combine([math.nan])
