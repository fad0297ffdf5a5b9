"""One-run audit: guesses by hand, published ceilings, and the bound held by private mechanisms, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from attacks.membership.one_run import OneRun, audit_one_run
from probes.errors import UsageError
from probes.statistics import clopper_pearson, one_run_epsilon


def not_above(hits: int, repetitions: int, rate: float) -> bool:
    """Whether `hits` of `repetitions` is compatible with at most this rate (one wrong alarm in 10,000)."""
    return bool(stats.binomtest(hits, repetitions, rate, alternative="greater").pvalue > 1e-4)


def test_guesses_by_hand() -> None:
    scores = [0.9, 0.1, 0.8, 0.2, 0.5, 0.3]
    coins = [True, False, False, True, True, False]
    both = audit_one_run(scores, coins, guesses_in=2, guesses_out=2)  # in: 0.9 yes, 0.8 no; out: 0.1 yes, 0.2 no
    assert (both.guesses, both.correct, both.canaries) == (4, 2, 6)
    assert audit_one_run(scores, coins, guesses_in=1, guesses_out=0).correct == 1
    assert audit_one_run(scores, coins, guesses_in=0, guesses_out=1).correct == 1
    assert audit_one_run(scores, coins, guesses_in=0, guesses_out=6).correct == 3
    assert audit_one_run(scores, [1, 0, 0, 1, 1, 0], guesses_in=2, guesses_out=2) == both
    assert audit_one_run(-np.array(scores), coins, guesses_in=1, guesses_out=1).correct == 0


@pytest.mark.parametrize(
    ("guesses", "ceiling"), [(20, 1.82), (50, 2.78), (100, 3.49), (200, 4.19), (500, 5.11), (1000, 5.81)]
)
def test_full_separation_reaches_the_published_ceiling(guesses: int, ceiling: float) -> None:
    coins = np.random.default_rng(0).random(guesses) < 0.5
    inside = int(coins.sum())
    found = audit_one_run(coins + 0.0, coins, guesses_in=inside, guesses_out=guesses - inside)
    assert found.correct == guesses
    assert found.epsilon == found.ceiling == pytest.approx(ceiling, abs=0.005)


def test_delta_and_abstentions_are_passed_on() -> None:
    rng = np.random.default_rng(1)
    coins = rng.random(300) < 0.5
    scores = coins + rng.normal(0, 0.4, 300)
    found = audit_one_run(scores, coins, guesses_in=40, guesses_out=60, delta=1e-5, level=0.9)
    assert found.epsilon == one_run_epsilon(100, found.correct, delta=1e-5, canaries=300, level=0.9) > 0
    assert found.ceiling == one_run_epsilon(100, 100, delta=1e-5, canaries=300, level=0.9)
    assert (found.delta, found.level, found.canaries, found.status) == (1e-5, 0.9, 300, "ok")


def test_too_few_guesses_are_not_resolvable() -> None:
    few = audit_one_run([0.9, 0.8, 0.2, 0.1], [True, True, False, False], guesses_in=2, guesses_out=2)
    assert few == OneRun(
        0.0,
        4,
        4,
        0.0,
        "not resolvable",
        "4 guesses show nothing at level 0.95 even if all are right; make more of them",
        4,
        0.0,
        0.95,
    )
    assert audit_one_run(np.arange(10.0), np.arange(10) > 4, guesses_in=3, guesses_out=2).status == "ok"


def test_order_of_the_canaries_decides_nothing() -> None:
    """Constant scores know nothing, even where the canaries come sorted by their coin."""
    coins = np.arange(200) < 100
    epsilons, correct = [], []
    for seed in range(40):
        found = audit_one_run(np.zeros(200), coins, guesses_in=50, guesses_out=50, seed=seed)
        epsilons.append(found.epsilon)
        correct.append(found.correct)
    assert not_above(sum(e > 0 for e in epsilons), 40, 0.05)
    assert 40 < np.mean(correct) < 60
    assert found == audit_one_run(np.zeros(200), coins, guesses_in=50, guesses_out=50, seed=39)
    distinct = np.random.default_rng(2).permutation(200).astype(float)
    shuffled = np.random.default_rng(3).permutation(200)
    first = audit_one_run(distinct, coins, guesses_in=50, guesses_out=50)
    assert audit_one_run(distinct[shuffled], coins[shuffled], guesses_in=50, guesses_out=50) == first


# --- defect 5: the best threshold of the same data, and a bound below zero


def best_threshold(scores: np.ndarray, coins: np.ndarray) -> float:
    """The defect: log(TPR bound / FPR bound), the largest over all thresholds of the same scores."""
    best = -math.inf
    for threshold in np.unique(scores):
        above = scores >= threshold
        tpr = clopper_pearson(int((above & coins).sum()), int(coins.sum()), 0.95, "lower").low
        fpr = clopper_pearson(int((above & ~coins).sum()), int((~coins).sum()), 0.95, "upper").high
        best = max(best, math.log(max(tpr, 1e-9) / fpr))
    return best


def test_defect_5_no_maximum_over_thresholds_of_the_same_data() -> None:
    rng, repetitions = np.random.default_rng(4), 400
    alarms = swept = 0
    for i in range(repetitions):
        coins, scores = rng.random(60) < 0.5, rng.normal(size=60)
        alarms += audit_one_run(scores, coins, guesses_in=15, guesses_out=15, seed=i).epsilon > 0
        swept += max(audit_one_run(scores, coins, guesses_in=k, guesses_out=k).epsilon for k in range(3, 31, 3)) > 0
    assert not_above(alarms, repetitions, 0.05), alarms
    assert not not_above(swept, repetitions, 0.05), swept  # a sweep over numbers of guesses is what must not be done


def test_defect_5_no_negative_epsilon() -> None:
    rng = np.random.default_rng(5)
    coins = rng.random(100) < 0.5
    worst = audit_one_run(-(coins + 0.0), coins, guesses_in=40, guesses_out=40)
    assert worst.correct == 0
    assert worst.epsilon == 0.0
    noise = [rng.normal(size=100) for _ in range(20)]
    assert min(best_threshold(scores, coins) for scores in noise) < 0  # the formula that was printed as it stood
    assert min(audit_one_run(scores, coins, guesses_in=40, guesses_out=40).epsilon for scores in noise) == 0.0


# --- the bound holds


@pytest.mark.parametrize(("canaries", "guesses"), [(40, 10), (200, 100)])
def test_false_alarms_of_scores_that_know_nothing(canaries: int, guesses: int) -> None:
    rng, repetitions = np.random.default_rng(6), 400
    alarms = 0
    for i in range(repetitions):
        coins = rng.random(canaries) < 0.5
        scores = rng.integers(0, 4, canaries)  # tied
        alarms += audit_one_run(scores, coins, guesses_in=guesses, guesses_out=guesses, seed=i).epsilon > 0
    assert not_above(alarms, repetitions, 0.05), alarms


@pytest.mark.parametrize("truth", [0.5, 1.5])
def test_bound_holds_for_a_private_mechanism(truth: float) -> None:
    """Scores are the coins through the Laplace mechanism with scale 1 / eps: exactly (eps, 0)-private."""
    rng, repetitions = np.random.default_rng(7), 400
    bounds = []
    for i in range(repetitions):
        coins = rng.random(200) < 0.5
        scores = coins + rng.laplace(0, 1 / truth, 200)
        bounds.append(audit_one_run(scores, coins, guesses_in=50, guesses_out=50, seed=i).epsilon)
    assert not_above(int((np.array(bounds) > truth).sum()), repetitions, 0.05)
    assert np.median(bounds) > truth / 4  # and shows something


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guesses_in": -1}, "from 1 to 40 guesses, found -1 in and 10 out"),
        ({"guesses_in": 31}, "from 1 to 40 guesses, found 31 in and 10 out"),
        ({"guesses_in": 0, "guesses_out": 0}, "found 0 in and 0 out"),
        ({"scores": [math.nan, *range(39)]}, "1 not finite"),
        ({"scores": [1.0, 2.0]}, "one coin for each score"),
        ({"scores": [], "included": []}, "from 1 to 0 guesses"),
        ({"included": [2] * 40}, "True or False"),
        ({"included": [True] * 40}, "fair coins, found 40 of 40 in"),
        ({"delta": 1.0}, "delta"),
        ({"level": 0.0}, "confidence level"),
    ],
)
def test_misuse_is_refused_in_one_line(change: dict, message: str) -> None:
    call = {
        "scores": list(range(40)),
        "included": [i % 2 == 0 for i in range(40)],
        "guesses_in": 10,
        "guesses_out": 10,
    } | change
    with pytest.raises(UsageError, match=message) as caught:
        audit_one_run(call.pop("scores"), call.pop("included"), **call)
    assert "\n" not in str(caught.value)
