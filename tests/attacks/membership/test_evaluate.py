"""Evaluation of membership scores: independent oracles, rates under no difference, and what cannot be resolved."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from attacks.membership.evaluate import choose, evaluate
from probes.errors import UsageError

INFINITE = float("inf")


def test_an_auc_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    x, y = np.round(generator.normal(0.7, 1, 90), 1), np.round(generator.normal(size=70), 1)
    found = evaluate(x, y)
    assert found.auc.interval is not None
    expected = roc_auc_score([1] * 90 + [0] * 70, [*x, *y])
    np.testing.assert_allclose(found.auc.interval.value, expected)
    assert found.auc.interval.low < expected < found.auc.interval.high
    assert found.pvalue is not None
    oracle = stats.mannwhitneyu(x, y, alternative="greater").pvalue
    np.testing.assert_allclose(found.pvalue, oracle, rtol=0.05)
    assert found.null is not None
    assert found.null.high < expected
    assert found.roc is not None
    np.testing.assert_allclose(np.trapezoid(found.roc.tpr, found.roc.fpr), expected)
    assert found.groups == (90, 70)


def test_operating_points_need_enough_non_members() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(2, 1, 100)
    found = evaluate(x, generator.normal(size=250), fprs=(0.01, 0.05))
    assert found.points[0.01].status == "not resolvable"
    assert "1000 non-members" in str(found.points[0.01].reason)
    assert found.points[0.05].tpr is not None
    assert found.points[0.05].tpr.value > 0.4
    found = evaluate(x, generator.normal(size=1000))
    assert found.points[0.01].status == "ok"


def test_scores_without_a_difference_are_rarely_significant() -> None:
    below, outside, runs = 0, 0, 400
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        found = evaluate(generator.normal(size=60), generator.normal(size=80), alternative="two-sided")
        assert found.pvalue is not None
        assert found.null is not None
        assert found.auc.interval is not None
        below += found.pvalue <= 0.05
        outside += not found.null.low <= found.auc.interval.value <= found.null.high
    for hits in (below, outside):
        assert stats.binom.sf(hits - 1, runs, 0.05) > 0.001


def test_clusters_widen_the_interval_and_thin_the_points() -> None:
    generator = np.random.default_rng(0)
    base, other = generator.normal(0.5, 1, 60), generator.normal(size=60)
    x, y = np.repeat(base, 5), np.repeat(other, 5)
    names = [str(i // 5) for i in range(300)]
    plain, found = evaluate(x, y), evaluate(x, y, pos_clusters=names, neg_clusters=names)
    assert plain.auc.interval is not None
    assert found.auc.interval is not None
    wide = found.auc.interval.high - found.auc.interval.low
    assert wide > 1.8 * (plain.auc.interval.high - plain.auc.interval.low)
    assert plain.pvalue is not None
    assert found.pvalue is not None
    assert found.pvalue > plain.pvalue
    assert found.groups == (60, 60)
    assert found.points[0.05].status == "not resolvable"  # 60 clusters, not 300 records
    assert plain.points[0.05].status == "ok"
    once = evaluate(base, other, pos_clusters=[None] * 60, neg_clusters=[str(i) for i in range(60)])
    assert once.auc == evaluate(base, other).auc  # no cluster has two records


@pytest.mark.parametrize("sizes", [(0, 0), (0, 70), (70, 0), (1, 1), (30, 30), (49, 400)])
def test_few_records_are_not_resolvable_and_nothing_is_nan(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    found = evaluate(generator.normal(size=sizes[0]), generator.normal(size=sizes[1]))
    assert found.auc.status == "not resolvable"
    assert found.auc.interval is None
    assert (found.null is None) == (found.pvalue is None) == (found.roc is None) == (0 in sizes)
    if found.pvalue is not None:
        assert 0 < found.pvalue <= 1
    assert all(point.status == "not resolvable" for point in found.points.values()) or sizes == (49, 400)


def test_constant_scores_say_nothing() -> None:
    found = evaluate([0.5] * 60, [0.5] * 60)
    assert found.pvalue == 1.0
    assert found.auc.interval is not None
    assert found.auc.interval.value == 0.5
    assert found.auc.interval.low < 0.5 < found.auc.interval.high


def test_infinite_scores_rank_beyond_all_others() -> None:
    x, y = [INFINITE, 1.0, 2.0] * 20, [-INFINITE, 0.0, 1.5] * 20
    found, plain = evaluate(x, y), evaluate([9.0, 1.0, 2.0] * 20, [-9.0, 0.0, 1.5] * 20)
    assert found.auc == plain.auc
    assert found.pvalue == plain.pvalue
    assert evaluate([-INFINITE] * 60, [-INFINITE] * 60).pvalue == 1.0
    assert evaluate([INFINITE] * 60, [-INFINITE] * 60).auc.interval.value == 1.0  # type: ignore[union-attr]


def test_a_missing_score_is_refused() -> None:
    with pytest.raises(UsageError, match="1 of 3 NaN"):
        evaluate([1.0, float("nan")], [0.0])
    with pytest.raises(UsageError, match="flatten"):
        evaluate([[1.0]], [0.0])
    with pytest.raises(UsageError, match="clusters"):
        evaluate([1.0], [0.0], pos_clusters=["a", "b"])


def noise(seed: int, n: int = 100, scores: int = 6) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return {f"s{i}": (generator.normal(size=n), generator.normal(size=n)) for i in range(scores)}


def test_the_best_score_is_chosen_on_other_records_than_it_is_reported_on() -> None:
    scores = noise(0)
    generator = np.random.default_rng(1)
    scores["strong"] = (generator.normal(1.0, 1, 100), generator.normal(size=100))
    found = choose(scores, seed=3)
    assert found.status == "ok"
    assert found.best == "strong"
    assert found.evaluation is not None
    assert found.evaluation.n_members == found.evaluation.n_others == 50
    assert found.evaluation.auc.interval is not None
    assert found.adjusted["strong"] < 0.001
    assert all(found.adjusted[name] >= found.pvalues[name] for name in scores)
    assert len(set(found.areas) & set(scores)) == 7


def test_the_best_of_many_worthless_scores_is_rarely_significant() -> None:
    chosen, any_adjusted, flattering, runs = 0, 0, 0, 300
    for seed in range(runs):
        scores = noise(seed)
        found = choose(scores, seed=seed)
        assert found.evaluation is not None
        assert found.evaluation.pvalue is not None
        chosen += found.evaluation.pvalue <= 0.05
        any_adjusted += min(found.adjusted.values()) <= 0.05
        flattering += min(evaluate(*pair).pvalue or 1.0 for pair in scores.values()) <= 0.05
    for hits in (chosen, any_adjusted):
        assert stats.binom.sf(hits - 1, runs, 0.05) > 0.001
    assert flattering / runs > 0.15  # what choosing and reporting on the same records would do


def test_halves_share_no_cluster_across_the_two_sets() -> None:
    generator = np.random.default_rng(0)
    names = [str(i // 2) for i in range(200)]
    base = np.repeat(generator.normal(size=100), 2)
    found = choose({"a": (base, base + 0.1)}, pos_clusters=names, neg_clusters=names)
    assert found.evaluation is not None
    assert found.evaluation.n_members == found.evaluation.n_others
    assert found.evaluation.groups == (50, 50)


def test_too_few_records_for_two_halves_are_not_resolvable() -> None:
    for pair in (([1.0], [0.0]), ([], []), ([1.0, 2.0], [0.0])):
        found = choose({"a": pair})
        assert found.status == "not resolvable"
        assert found.reason is not None
        assert found.best is None
    one = choose({"a": ([1.0, 2.0], [0.0, 0.5])}, pos_clusters=["g", "g"])
    assert one.status == "not resolvable"


def test_scores_of_different_records_are_refused() -> None:
    with pytest.raises(UsageError, match="same records"):
        choose({"a": ([1.0], [0.0]), "b": ([1.0, 2.0], [0.0])})
    with pytest.raises(UsageError, match="found none"):
        choose({})


def test_equal_scores_leave_the_first() -> None:
    pair = ([1.0, 2.0] * 10, [0.0, 1.5] * 10)
    assert choose({"b": pair, "a": pair}).best == "b"
