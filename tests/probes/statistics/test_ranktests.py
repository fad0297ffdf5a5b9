"""p-value and null interval of an AUC: scipy, enumeration, permutations as a loop, error rates by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import auc_null_interval, auc_pvalue, resampling
from probes.statistics.ranktests import _EXACT, _Studentised
from probes.statistics.resampling import permuted_sides
from tests.probes.statistics.common import limits, not_above, not_below


def u_of(pos, neg) -> float:
    return sum((p > q) + 0.5 * (p == q) for p in pos for q in neg)


def by_enumeration(pos: list[float], neg: list[float]) -> tuple[float, float]:
    """Share of all ways to pick the members that give at least, and at most, this U."""
    pooled, seen = [*pos, *neg], u_of(pos, neg)
    every = []
    for chosen in itertools.combinations(range(len(pooled)), len(pos)):
        rest = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        every.append(u_of([pooled[i] for i in chosen], rest))
    return float(np.mean(np.array(every) >= seen)), float(np.mean(np.array(every) <= seen))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 30), (30, 1), (4, 9), (12, 12), (25, 60), (60, 25)])
def test_small_samples_without_ties_equal_scipy(m: int, n: int) -> None:
    rng = np.random.default_rng(30)
    for shift in (-1.0, 0.0, 2.0):
        x, y = rng.normal(shift, 1, m), rng.normal(0, 1, n)
        for alternative in ("greater", "two-sided"):
            expected = stats.mannwhitneyu(x, y, alternative=alternative, method="exact").pvalue
            assert auc_pvalue(x, y, alternative=alternative) == pytest.approx(expected, rel=1e-9)


def test_small_samples_with_ties_equal_enumeration() -> None:
    rng = np.random.default_rng(31)
    for m, n in ((1, 3), (3, 4), (5, 3), (4, 7)):
        for high in (1, 2, 5):
            x, y = rng.integers(0, high + 1, m).tolist(), rng.integers(0, high + 1, n).tolist()
            greater, less = by_enumeration(x, y)
            assert auc_pvalue(x, y) == pytest.approx(greater, abs=1e-12)
            assert auc_pvalue(x, y, alternative="two-sided") == pytest.approx(min(1, 2 * min(greater, less)), abs=1e-12)


@pytest.mark.parametrize("decimals", [8, 0])
def test_large_samples_equal_scipy(decimals: int) -> None:
    rng = np.random.default_rng(32)
    x, y = np.round(rng.normal(0.1, 1, 150), decimals), np.round(rng.normal(0, 1, 230), decimals)
    assert _EXACT < 150 * 380
    for a, b in ((x, y), (y, x)):
        for alternative in ("greater", "two-sided"):
            expected = stats.mannwhitneyu(a, b, alternative=alternative, method="asymptotic").pvalue
            assert auc_pvalue(a, b, alternative=alternative) == pytest.approx(expected, rel=1e-9)


def test_both_laws_agree_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(33)
    x, y = np.round(rng.normal(0.4, 1, 50), 1), np.round(rng.normal(0, 1, 70), 1)
    exact, interval = auc_pvalue(x, y), auc_null_interval(50, 70)
    monkeypatch.setattr("probes.statistics.ranktests._EXACT", 0)
    assert auc_pvalue(x, y) == pytest.approx(exact, rel=0.05)
    assert auc_pvalue(x, y) != exact
    assert limits(auc_null_interval(50, 70)) == pytest.approx(limits(interval), abs=2 / (50 * 70))


def test_nothing_to_compare_rejects_nothing() -> None:
    for alternative in ("greater", "two-sided"):
        assert auc_pvalue([], [1.0], alternative=alternative) == 1.0
        assert auc_pvalue([1.0], [], alternative=alternative) == 1.0
        for n in (1, 30, 500):  # constant scores
            assert auc_pvalue([0.5] * n, [0.5] * n, alternative=alternative) == 1.0
    assert auc_pvalue([2.0] * 4, [1.0] * 4) == pytest.approx(1 / math.comb(8, 4))
    assert auc_pvalue([0.5] * 20, [0.5] * 20, pos_clusters=[1] * 20) == 1.0


# --- clusters


def studentised(pos: np.ndarray, pos_codes: np.ndarray, neg: np.ndarray, neg_codes: np.ndarray) -> float:
    """(AUC - 1/2) / clustered standard error, pair by pair (Obuchowski 1997)."""
    wins = np.array([[(p > q) + 0.5 * (p == q) for q in neg] for p in pos])
    variance = 0.0
    for codes, part in ((pos_codes, wins.mean(1)), (neg_codes, wins.mean(0))):
        groups = np.unique(codes)
        sums = [(part[codes == g] - wins.mean()).sum() for g in groups]
        variance += sum(s**2 for s in sums) * len(groups) / max(len(groups) - 1, 1) / len(part) ** 2
    return float((wins.mean() - 0.5) / math.sqrt(max(variance, 1e-24)))


def test_statistic_of_every_assignment_equals_pairs() -> None:
    rng = np.random.default_rng(49)
    codes = rng.permutation(np.repeat(np.arange(7), [1, 2, 3, 1, 2, 4, 2]))
    scores = np.round(rng.normal(size=15), 1)
    sides = np.concatenate(list(permuted_sides(3, 7, 20, 0, 7)))
    assert (sides.sum(axis=1) == 3).all()
    assert len({tuple(row) for row in sides.tolist()}) > 10
    expected = []
    for row in sides:
        z = row[codes]
        expected.append(studentised(scores[z], codes[z], scores[~z], codes[~z]))
    assert _Studentised(scores, codes).of(sides).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_clustered_p_value_equals_permutations_in_a_loop(alternative) -> None:
    rng = np.random.default_rng(34)
    pos_codes, neg_codes = (
        np.repeat(np.arange(6), [1, 2, 3, 1, 2, 4]),
        np.repeat(np.arange(8), [1, 1, 2, 3, 1, 1, 2, 1]),
    )
    pos = np.round(rng.normal(size=6)[pos_codes] + rng.normal(0.5, 0.3, 13), 1)
    neg = np.round(rng.normal(size=8)[neg_codes] + rng.normal(0, 0.3, 12), 1)
    scores, codes = np.concatenate([pos, neg]), np.concatenate([pos_codes, neg_codes + 6])
    size = abs if alternative == "two-sided" else float
    seen = size(studentised(pos, pos_codes, neg, neg_codes))
    reached = 0
    for sides in np.concatenate(list(permuted_sides(6, 14, 150, 9, 1000))):
        z = sides[codes]
        reached += size(studentised(scores[z], codes[z], scores[~z], codes[~z])) >= seen - 1e-9
    assert 0 < reached < 150
    found = auc_pvalue(
        pos,
        neg,
        pos_clusters=pos_codes.tolist(),
        neg_clusters=neg_codes.tolist(),
        alternative=alternative,
        seed=9,
        n_permutations=150,
    )
    assert found == (1 + reached) / 151


def test_chunks_and_names_of_clusters_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(35)
    pos, neg = rng.normal(0.2, 1, 40), rng.normal(0, 1, 30)
    codes = [i // 3 for i in range(40)]
    expected = auc_pvalue(pos, neg, pos_clusters=codes)
    assert 0.001 < expected < 0.5
    assert auc_pvalue(pos, neg, pos_clusters=[f"c{c}" for c in codes], neg_clusters=[None] * 30) == expected
    assert auc_pvalue(pos, neg, pos_clusters=codes, seed=1) == pytest.approx(expected, abs=0.03)
    monkeypatch.setattr(resampling, "CHUNK", 500)
    assert auc_pvalue(pos, neg, pos_clusters=codes) == expected
    singles = auc_pvalue(pos, neg, pos_clusters=list(range(40)), neg_clusters=list(range(30)))
    assert singles == auc_pvalue(pos, neg)  # nothing is clustered: the exact law


def test_one_cluster_a_side_shows_nothing() -> None:
    p = auc_pvalue([2.0] * 30, [1.0] * 30, pos_clusters=[0] * 30, neg_clusters=[0] * 30)
    assert p == pytest.approx(0.5, abs=0.05)  # two arrangements
    one = auc_pvalue([2.0] * 30, list(np.arange(9.0) / 9), pos_clusters=["only"] * 30)
    assert one == pytest.approx(0.1, abs=0.03)  # the best of ten arrangements


# --- error rates


@pytest.mark.parametrize(("m", "n", "decimals"), [(5, 8, 8), (20, 20, 0), (60, 60, 8), (100, 150, 0)])
@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_false_alarms_stay_at_the_level(m: int, n: int, decimals: int, alternative) -> None:
    rng, repetitions = np.random.default_rng(36), 300
    p = []
    for _ in range(repetitions):
        scores = np.round(rng.normal(size=m + n), decimals)
        p.append(auc_pvalue(scores[:m], scores[m:], alternative=alternative))
    for alpha in (0.01, 0.05, 0.3):
        assert not_above(int((np.array(p) <= alpha).sum()), repetitions, alpha)
    assert np.mean(np.array(p) <= 0.3) > 0.15  # and are not conservative without need


def clustered_null(rng: np.random.Generator, groups: int, sizes) -> tuple[np.ndarray, list[int]]:
    codes = np.repeat(np.arange(groups), rng.choice(sizes, groups))
    return rng.normal(size=groups)[codes] + rng.normal(0, 0.5, len(codes)), codes.tolist()


@pytest.mark.parametrize(
    ("members", "others"), [((15, [1, 2, 6]), (15, [1, 2, 6])), ((15, [4]), (60, [1])), ((40, [1]), (12, [5]))]
)
def test_clustered_false_alarms_stay_at_the_level(members, others) -> None:
    rng, repetitions = np.random.default_rng(37), 300
    alarms = ignoring = 0
    for i in range(repetitions):
        (x, x_codes), (y, y_codes) = clustered_null(rng, *members), clustered_null(rng, *others)
        alarms += auc_pvalue(x, y, pos_clusters=x_codes, neg_clusters=y_codes, seed=i, n_permutations=199) <= 0.05
        ignoring += auc_pvalue(x, y) <= 0.05
    assert not_above(alarms, repetitions, 0.05), alarms
    assert not not_above(ignoring, repetitions, 0.05), ignoring


def test_members_that_score_higher_are_found() -> None:
    rng = np.random.default_rng(38)
    codes = np.arange(90) // 3
    found = 0
    for i in range(40):
        x, y = rng.normal(1.0, 1, 30)[codes] + rng.normal(0, 0.5, 90), rng.normal(size=30)[codes]
        found += auc_pvalue(x, y, pos_clusters=codes.tolist(), neg_clusters=codes.tolist(), seed=i) <= 0.05
    assert found > 32


# --- the null interval


def test_null_interval_cuts_the_exact_law() -> None:
    for m, n in ((2, 3), (3, 6), (7, 5)):
        every = []
        for chosen in itertools.combinations(range(m + n), m):
            every.append(u_of(chosen, [i for i in range(m + n) if i not in chosen]) / (m * n))
        law = np.array(every)
        for level in (0.5, 0.9, 0.95):
            low, high = limits(auc_null_interval(m, n, level))
            below = (1 - level) / 2
            assert (law < low - 1e-9).mean() <= below + 1e-12 < (law < low + 1e-9).mean()
            assert high == pytest.approx(1 - low)


def test_null_interval_has_the_published_spread() -> None:
    for n, sd in ((50, 0.058), (100, 0.041), (200, 0.029), (500, 0.018), (1000, 0.013)):
        interval = auc_null_interval(n, n)
        assert (interval.value, interval.n) == (0.5, 2 * n)
        assert (interval.high - 0.5) / stats.norm.ppf(0.975) == pytest.approx(sd, abs=6e-4)
    assert limits(auc_null_interval(0, 10)) == limits(auc_null_interval(10, 0)) == (0.0, 1.0)
    assert limits(auc_null_interval(1, 1)) == (0.0, 1.0)
    assert limits(auc_null_interval(1, 3000, 1 - 1e-9)) == (0.0, 1.0)


@pytest.mark.parametrize(("m", "n", "decimals"), [(8, 5, 8), (50, 50, 8), (50, 50, 0), (200, 90, 8)])
def test_null_interval_covers(m: int, n: int, decimals: int) -> None:
    rng, repetitions = np.random.default_rng(39), 2000
    ranks = stats.rankdata(np.round(rng.normal(size=(repetitions, m + n)), decimals), axis=1)
    aucs = (ranks[:, :m].sum(axis=1) - m * (m + 1) / 2) / (m * n)
    low, high = limits(auc_null_interval(m, n))
    inside = int(((low - 1e-12 <= aucs) & (aucs <= high + 1e-12)).sum())
    assert not_below(inside, repetitions, 0.95)
    assert inside < 0.99 * repetitions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc_pvalue([1.0], [0.0], alternative="less"), "alternative"),  # type: ignore[arg-type]
        (lambda: auc_pvalue([1.0], [0.0], neg_clusters=[1, 2]), "expected neg_clusters for 1 values, found 2"),
        (lambda: auc_pvalue([math.nan], [0.0]), "expected finite pos"),
        (lambda: auc_null_interval(-1, 3), "counts"),
        (lambda: auc_null_interval(1, 3, 0.0), "confidence level"),
    ],
)
def test_misuse_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
