"""The list of flagged records: its false-discovery rate, its resolution, its edges."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.membership.flagged import flag
from probes.errors import UsageError


def test_the_list_is_the_definition_written_out() -> None:
    generator = np.random.default_rng(0)
    scores, calibration = generator.normal(2, 1, 30).round(1), generator.normal(size=200).round(1)
    found = flag(scores, calibration, 0.1)
    p = [(1 + sum(c >= s for c in calibration)) / 201 for s in scores]
    np.testing.assert_allclose(found.pvalues, p)
    passed = [k for k in range(1, 31) if sorted(p)[k - 1] <= 0.1 * k / 30 + 1e-12]
    cut = sorted(p)[max(passed) - 1] if passed else -1.0
    np.testing.assert_array_equal(found.flagged, [x <= cut for x in p])
    assert 0 < found.flagged.sum() < 30
    np.testing.assert_array_equal(found.flagged, found.adjusted <= 0.1)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_of_mistakes_stays_below_the_bound(share: float) -> None:
    q, runs, wrong, power = 0.1, 400, [], []
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        member = generator.random(60) < share
        scores = generator.normal(size=60) + 3.0 * member
        found = flag(np.round(scores, 1), np.round(generator.normal(size=300), 1), q)
        wrong.append((found.flagged & ~member).sum() / max(1, found.flagged.sum()))
        power.append((found.flagged & member).sum() / max(1, member.sum()))
    error = np.std(wrong) / np.sqrt(runs)
    assert np.mean(wrong) <= q + 3 * error
    if share:
        assert np.mean(power) > 0.4


def test_too_few_calibration_records_are_not_resolvable() -> None:
    found = flag([5.0, 6.0, 7.0], np.zeros(18))
    assert found.status == "not resolvable"
    assert "19 are needed" in str(found.reason)
    assert not found.flagged.any()
    assert flag([5.0], np.zeros(18)).needed == 19
    exactly = flag([5.0, 6.0, 7.0], np.zeros(19))
    assert exactly.status == "ok"
    assert exactly.flagged.all()  # all three at the smallest p-value, which equals q
    assert exactly.needed == 59
    assert not flag([5.0, -1.0, -1.0], np.zeros(58)).flagged.any()
    assert flag([5.0, -1.0, -1.0], np.zeros(59)).flagged.sum() == 1


@pytest.mark.parametrize("q", [0.01, 0.05, 0.07, 0.1, 0.2, 0.3])
def test_the_needed_number_is_enough_and_one_fewer_is_not(q: float) -> None:
    for records in (1, 2, 3, 7, 30):
        scores = [1.0] + [-1.0] * (records - 1)
        needed = flag(scores, np.zeros(5), q).needed
        assert flag(scores, np.zeros(needed), q).flagged.sum() == 1
        assert flag(scores, np.zeros(needed - 1), q).flagged.sum() == 0


def test_empty_and_infinite_scores() -> None:
    none = flag([], np.zeros(100))
    assert none.status == "not resolvable"
    assert none.flagged.shape == (0,)
    nothing = flag([1.0], [])
    assert nothing.status == "not resolvable"
    assert list(nothing.pvalues) == [1.0]
    infinite = flag([float("inf"), -float("inf")], [0.0] * 99 + [-float("inf")])
    np.testing.assert_allclose(infinite.pvalues, [1 / 101, 1.0])
    assert list(infinite.flagged) == [True, False]


def test_constant_scores_flag_nothing() -> None:
    assert not flag([1.0] * 50, [1.0] * 500).flagged.any()


def test_near_duplicates_in_the_calibration_count_once() -> None:
    names = [str(i // 10) for i in range(100)]
    found = flag([5.0], np.zeros(100), clusters=names)
    assert found.n == 10
    assert found.status == "not resolvable"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="NaN"):
        flag([float("nan")], [0.0])
    with pytest.raises(UsageError, match="NaN"):
        flag([0.0], [float("nan")])
    with pytest.raises(UsageError, match="rate"):
        flag([0.0], [0.0], 1.0)
    with pytest.raises(UsageError, match="clusters"):
        flag([0.0], [0.0], clusters=["a", "b"])
