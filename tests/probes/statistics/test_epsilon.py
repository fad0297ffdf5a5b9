"""The one-run bound: a slow version with scipy, published ceilings, error rates under the null and under privacy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from probes.errors import UsageError
from probes.statistics import one_run_epsilon
from tests.probes.statistics.common import not_above

GRID = np.arange(0, 8, 0.01)


def slow(guesses: int, correct: int, delta: float, canaries: int, alpha: float = 0.05) -> float:
    """First point of a fine grid that is not rejected, with sums of scipy's probabilities."""
    mass = stats.binom.pmf(np.arange(guesses + 1)[:, None], guesses, 1 / (1 + np.exp(-GRID)))  # [r + 1, grid]
    parts = [mass[correct - i : correct].sum(axis=0) / i for i in range(1, correct + 1)]
    chance = mass[correct:].sum(axis=0) + 2 * canaries * delta * np.max(parts, axis=0)
    return float(GRID[np.argmax(chance > alpha)])


@pytest.mark.parametrize(
    ("guesses", "ceiling"), [(20, 1.82), (50, 2.78), (100, 3.49), (200, 4.19), (500, 5.11), (1000, 5.81)]
)
def test_ceilings_when_every_guess_is_right(guesses: int, ceiling: float) -> None:
    found = one_run_epsilon(guesses, guesses)
    assert found == pytest.approx(ceiling, abs=0.005)
    q = 0.05 ** (1 / guesses)
    assert found == pytest.approx(math.log(q / (1 - q)), abs=1e-8)


def test_published_levels_below_the_ceiling() -> None:
    assert one_run_epsilon(100, 75) == pytest.approx(0.70, abs=0.005)
    assert one_run_epsilon(1000, 750) == pytest.approx(0.98, abs=0.005)
    assert one_run_epsilon(1000, 550) == pytest.approx(0.09, abs=0.005)


@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-3])
def test_equals_a_slow_version(delta: float) -> None:
    for guesses, correct in ((1, 1), (6, 6), (30, 22), (30, 29), (120, 80), (120, 120)):
        canaries = 2 * guesses
        found = one_run_epsilon(guesses, correct, delta=delta, canaries=canaries)
        expected = slow(guesses, correct, delta, canaries)
        assert expected - 0.0101 <= found <= expected + 1e-9
        other = one_run_epsilon(guesses, correct, delta=delta, canaries=canaries, level=0.8)
        assert slow(guesses, correct, delta, canaries, 0.2) - 0.0101 <= other


def test_never_negative_and_monotone() -> None:
    every = [one_run_epsilon(60, v) for v in range(61)]
    assert every[:31] == [0.0] * 31  # defect 5 of other audits: -0.69 printed
    assert all(a <= b for a, b in itertools.pairwise(every))
    assert one_run_epsilon(0, 0) == 0.0
    assert one_run_epsilon(4, 4) == 0.0 < one_run_epsilon(5, 5)
    assert one_run_epsilon(100, 90, delta=1e-4, canaries=100) < one_run_epsilon(100, 90)
    assert one_run_epsilon(100, 100, delta=0.5, canaries=100) == 0.0
    assert one_run_epsilon(100, 90, level=0.99) < one_run_epsilon(100, 90)
    assert math.isfinite(one_run_epsilon(10**6, 10**6))


@pytest.mark.parametrize("guesses", [5, 20, 200, 1000])
def test_false_alarms_are_exact(guesses: int) -> None:
    hits = np.arange(guesses + 1)
    positive = np.array([one_run_epsilon(guesses, int(v)) > 0 for v in hits])
    rate = stats.binom(guesses, 0.5).pmf(hits)[positive].sum()
    assert rate <= 0.05
    if guesses == 200:
        assert rate == pytest.approx(0.037, abs=0.002)


@pytest.mark.parametrize("truth", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bound_holds_for_randomised_response(truth: float, level: float) -> None:
    """Randomised response with flip odds e^eps is (eps, 0)-private and as leaky as that allows."""
    rng, repetitions, guesses = np.random.default_rng(70), 400, 150
    correct = rng.binomial(guesses, 1 / (1 + math.exp(-truth)), repetitions)
    bounds = np.array([one_run_epsilon(guesses, int(v), level=level) for v in correct])
    assert not_above(int((bounds > truth).sum()), repetitions, 1 - level)
    assert np.median(bounds) >= truth - 0.8  # and is not empty


def test_bound_with_delta_holds_for_a_leaky_mechanism() -> None:
    """With probability delta the whole input is published, else randomised response: (eps, delta)-private."""
    rng, repetitions, guesses, truth, delta = np.random.default_rng(71), 400, 100, 1.0, 0.02
    correct = rng.binomial(guesses, 1 / (1 + math.exp(-truth)), repetitions)
    correct[rng.random(repetitions) < delta] = guesses
    bounds = [one_run_epsilon(guesses, int(v), delta=delta, canaries=guesses) for v in correct]
    assert not_above(int((np.array(bounds) > truth).sum()), repetitions, 0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_run_epsilon(5, 6), "correct <= guesses"),
        (lambda: one_run_epsilon(-1, 0), "correct <= guesses"),
        (lambda: one_run_epsilon(5, 3, delta=1.0), "delta"),
        (lambda: one_run_epsilon(5, 3, delta=1e-5), "number of canaries"),
        (lambda: one_run_epsilon(5, 3, canaries=4), "one guess a canary"),
        (lambda: one_run_epsilon(5, 3, level=1.5), "confidence level"),
    ],
)
def test_misuse_is_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
