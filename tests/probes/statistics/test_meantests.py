"""The permutation test of two means: Welch's t by scipy, the permutations as a loop, error rates by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import mean_difference_pvalue, resampling
from probes.statistics.meantests import _statistic
from probes.statistics.resampling import permuted_sides
from tests.probes.statistics.common import not_above


def test_statistic_is_welch_t() -> None:
    rng = np.random.default_rng(40)
    x, y = rng.normal(0.3, 2, 9), rng.normal(0, 1, 17)
    sides = np.arange(26)[None, :] < 9
    expected = stats.ttest_ind(x, y, equal_var=False).statistic
    assert _statistic(np.concatenate([x, y]), sides, False)[0] == pytest.approx(expected)
    assert _statistic(np.concatenate([x, y]), ~sides, False)[0] == pytest.approx(-expected)
    assert _statistic(np.concatenate([x, y]), ~sides, True)[0] == pytest.approx(abs(expected))


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_equals_permutations_in_a_loop_over_cluster_means(alternative) -> None:
    rng = np.random.default_rng(41)
    x, y = rng.normal(0.8, 1, 12), rng.normal(0, 2, 9)
    clusters, y_clusters = [0, 0, 1, 1, 1, 2, 3, 4, None, None, 5, 5], ["a", "a", "b", *[None] * 6]
    own = [[0, 1], [2, 3, 4], [5], [6], [7], [8], [9], [10, 11]]
    a, b = np.array([x[i].mean() for i in own]), np.append([y[:2].mean(), y[2]], y[3:])

    def t(first: np.ndarray, second: np.ndarray) -> float:
        value = stats.ttest_ind(first, second, equal_var=False).statistic
        return abs(value) if alternative == "two-sided" else value

    pooled = np.concatenate([a, b])
    reached = sum(
        t(pooled[z], pooled[~z]) >= t(a, b) - 1e-9 for z in np.concatenate(list(permuted_sides(8, 16, 200, 3, 1000)))
    )
    assert 0 < reached < 200
    found = mean_difference_pvalue(
        x, y, alternative, clusters=clusters, y_clusters=y_clusters, seed=3, n_permutations=200
    )
    assert found == (1 + reached) / 201


def test_large_groups_approach_student() -> None:
    rng = np.random.default_rng(42)
    x, y = rng.normal(0.15, 1, 300), rng.normal(0, 2, 200)
    expected = stats.ttest_ind(x, y, equal_var=False, alternative="greater").pvalue
    assert mean_difference_pvalue(x, y, n_permutations=20_000) == pytest.approx(expected, abs=0.015)
    assert mean_difference_pvalue(y, x, n_permutations=20_000) == pytest.approx(1 - expected, abs=0.015)
    assert mean_difference_pvalue(x * 1e-9 + 5, y * 1e-9 + 5) == mean_difference_pvalue(x, y)


def test_no_spread_is_judged_by_the_number_of_arrangements() -> None:
    for alternative, sides in (("greater", 1), ("two-sided", 2)):
        p = mean_difference_pvalue([1.0] * 4, [0.0] * 4, alternative, n_permutations=20_000)
        assert p == pytest.approx(sides / math.comb(8, 4), rel=0.15)
    assert mean_difference_pvalue([0.0] * 4, [1.0] * 4) == 1.0
    assert mean_difference_pvalue([0.1] * 3, [0.1] * 50) == 1.0
    assert mean_difference_pvalue([1.0] * 40, [0.0] * 40) == 1 / 2001
    assert mean_difference_pvalue([1.0] * 40, [0.0] * 40, clusters=[0] * 40, y_clusters=[0] * 40) == pytest.approx(
        0.5, abs=0.05
    )


def test_nothing_to_compare_rejects_nothing() -> None:
    assert mean_difference_pvalue([], [1.0]) == mean_difference_pvalue([1.0], [], "two-sided") == 1.0
    assert mean_difference_pvalue([], []) == 1.0
    assert mean_difference_pvalue([2.0], [1.0]) == pytest.approx(0.5, abs=0.05)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(43).random((2, 40))
    expected = mean_difference_pvalue(x, y)
    monkeypatch.setattr(resampling, "CHUNK", 500)
    assert mean_difference_pvalue(x, y) == expected


def clustered(rng: np.random.Generator, groups: int, size: int) -> tuple[np.ndarray, list[int]]:
    codes = np.repeat(np.arange(groups), size)
    return rng.exponential(size=groups)[codes] + rng.normal(0, 0.1, len(codes)), codes.tolist()


@pytest.mark.parametrize(
    ("name", "draw", "level"),
    [
        ("normal 5, 5", lambda r: (r.normal(size=5), r.normal(size=5)), 0.05),
        ("lognormal 100, 12", lambda r: (r.lognormal(size=100), r.lognormal(size=12)), 0.05),
        ("lognormal 12, 100", lambda r: (r.lognormal(size=12), r.lognormal(size=100)), 0.05),
        ("rare hits 200, 5", lambda r: (r.random(200) < 0.05, r.random(5) < 0.05), 0.05),
        ("rare hits 20, 200", lambda r: (r.random(20) < 0.05, r.random(200) < 0.05), 0.05),
        ("spreads 3, 1", lambda r: (r.normal(0, 3, 20), r.normal(size=60)), 0.06),
        ("one, many", lambda r: (r.normal(size=1), r.normal(size=60)), 0.05),
    ],
)
@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_false_alarms_stay_at_the_level(name: str, draw, level: float, alternative) -> None:
    rng, repetitions = np.random.default_rng(44), 300
    alarms = 0
    for i in range(repetitions):
        x, y = draw(rng)
        alarms += mean_difference_pvalue(x, y, alternative, seed=i, n_permutations=199) <= 0.05
    assert not_above(alarms, repetitions, level), f"{name}: {alarms} of {repetitions}"


def test_ignoring_clusters_would_raise_false_alarms() -> None:
    rng, repetitions = np.random.default_rng(45), 300
    alarms = ignoring = 0
    for i in range(repetitions):
        (x, x_codes), (y, y_codes) = clustered(rng, 20, 4), clustered(rng, 40, 1)
        own = {"clusters": x_codes, "y_clusters": y_codes}
        alarms += mean_difference_pvalue(x, y, "two-sided", seed=i, n_permutations=199, **own) <= 0.05
        ignoring += mean_difference_pvalue(x, y, "two-sided", seed=i, n_permutations=199) <= 0.05
    assert not_above(alarms, repetitions, 0.05), alarms
    assert not not_above(ignoring, repetitions, 0.05), ignoring


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(46)
    found = sum(mean_difference_pvalue(rng.normal(1, 1, 25), rng.normal(0, 1, 25), seed=i) <= 0.05 for i in range(40))
    assert found > 34


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_difference_pvalue([1.0], [0.0], "less"), "alternative"),  # type: ignore[arg-type]
        (lambda: mean_difference_pvalue([1.0], [0.0], clusters=[1, 2]), "expected clusters for 1 values, found 2"),
        (lambda: mean_difference_pvalue([1.0], [math.inf]), "expected finite y"),
    ],
)
def test_misuse_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
