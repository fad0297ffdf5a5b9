r"""A lower bound on the privacy loss of one training run, from guesses about its canaries.

Each of m canaries was included by a fair coin, independently. The auditor guesses for r of them, v guesses are right.
If training is (eps, delta)-differentially private then
P(V >= v) <= P(B >= v) + 2 m delta max_{1 <= i <= v} P(v - i <= B < v) / i,   B ~ Binomial(r, e^eps / (1 + e^eps)),
and the bound is the smallest eps that this does not reject at 1 - level. r right guesses of r give the ceiling
log(q / (1 - q)) with q = alpha^(1 / r): 1.82 for r = 20, 3.49 for 100, 5.81 for 1,000.

Paper: Steinke, Nasr and Jagielski 2023 (2305.08846), Theorem 5.2.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from probes.errors import UsageError
from probes.statistics.checks import tails

_STEP = 0.125


def one_run_epsilon(
    guesses: int, correct: int, *, delta: float = 0.0, canaries: int | None = None, level: float = 0.95
) -> float:
    """The largest eps below which every (eps, delta) is rejected.

    Args:
        guesses: r, the number of guesses, fixed before their outcome was seen.
        correct: v, how many were right.
        delta: of the definition; 0 for pure differential privacy.
        canaries: m, all that were tossed for, guessed or not; needed where delta > 0.
        level: confidence of the bound.

    Returns:
        The lower bound on eps, finite, at least 0 (0 when nothing is shown, and without guesses).

    Raises:
        UsageError: impossible counts, delta outside [0, 1), level outside (0, 1), or delta without canaries.
    """
    _, alpha = tails(level, "upper")
    if not 0 <= correct <= guesses:
        raise UsageError(f"expected 0 <= correct <= guesses, found {correct} of {guesses}; count the right guesses")
    if not 0 <= delta < 1:
        raise UsageError(f"expected a delta in [0, 1), found {delta}; 0 or one over the training size is usual")
    if delta and canaries is None:
        raise UsageError("expected the number of canaries where delta > 0, found none; pass canaries")
    if canaries is not None and canaries < guesses:
        raise UsageError(f"expected at most one guess a canary, found {guesses} for {canaries}; correct the counts")
    if not guesses:
        return 0.0
    weight = 2.0 * (canaries or 0) * delta

    def rejected(eps: float) -> bool:
        return _chance(guesses, correct, eps, weight) <= alpha * (1 + 1e-12)

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, _STEP
    while rejected(high):  # P(B >= v) reaches 1 as eps grows, so this ends
        low, high = high, high + _STEP
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _chance(guesses: int, correct: int, eps: float, weight: float) -> float:
    """Largest probability of at least so many right guesses under (eps, delta), with weight = 2 m delta."""
    q = float(special.expit(eps))
    chance = float(special.betainc(correct, guesses - correct + 1, q)) if correct else 1.0
    if weight and correct:
        hits = np.arange(correct - 1, -1, -1)  # [v] v - 1, v - 2, ..., 0
        log_choices = special.gammaln(guesses + 1) - special.gammaln(hits + 1) - special.gammaln(guesses - hits + 1)
        mass = np.exp(log_choices + hits * math.log(q) + (guesses - hits) * math.log1p(-q))  # [v]
        chance += weight * float((np.cumsum(mass) / np.arange(1, correct + 1)).max())
    return min(1.0, chance)
