"""One-run audit: a lower bound on epsilon from canaries that a fair coin put into training or left out.

Toss a fair coin for each of m canaries and train once with those that came up. Score all of them on the checkpoint
(higher = more likely a member), guess "in" for the highest scores and "out" for the lowest, abstain between. Right
guesses beyond those of a coin need a privacy loss: `probes.statistics.one_run_epsilon` turns their number into a lower
bound on epsilon. To audit an edit, forget every planted canary and audit the edited checkpoint: the bound is what is
left of planted against never planted.

How many guesses to make is fixed before the scores are seen: the best of many thresholds on the same scores is no
bound. The audit needs the coins, so it is for those who control training; records that were in by choice will not do.

Paper: Steinke, Nasr and Jagielski 2023 (2305.08846).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.errors import UsageError
from probes.statistics import clopper_pearson, one_run_epsilon

_COIN = 1 - 1e-6  # a share of canaries outside this interval around one half did not come from a fair coin


@dataclass(frozen=True, slots=True)
class OneRun:
    """Outcome of a one-run audit.

    Attributes:
        epsilon: lower bound on the privacy loss at `level`, at least 0.
        guesses: how many guesses were made.
        correct: how many of them were right.
        ceiling: the bound had every guess been right; no audit with as many guesses can show more.
        status: "not resolvable" where even that shows nothing (the ceiling is 0), else "ok".
        reason: why it is not resolvable.
        canaries: m, all that were tossed for.
        delta: of the definition.
        level: confidence of the bound.
    """

    epsilon: float
    guesses: int
    correct: int
    ceiling: float
    status: Literal["ok", "not resolvable"]
    reason: str | None
    canaries: int
    delta: float
    level: float


def audit_one_run(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    guesses_in: int,
    guesses_out: int,
    delta: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> OneRun:
    """Guess the coin of the highest- and lowest-scoring canaries and bound epsilon from the right guesses.

    Args:
        scores: [m] finite scores of the canaries, higher = more likely a member.
        included: [m] what the coin of each canary said; independent and fair, tossed before training.
        guesses_in: how many of the highest scores are guessed "in".
        guesses_out: how many of the lowest are guessed "out". Both counts are fixed before the scores are seen.
        delta: of (epsilon, delta)-differential privacy.
        level: confidence of the bound.
        seed: decides between equal scores, which tell nothing; the order of the canaries must not.

    Returns:
        The bound. It holds whatever the scores are; poor scores only make it smaller.

    Raises:
        UsageError: scores that are not finite, not one coin for each score, more guesses than canaries or none, coins
            that cannot have been fair, delta outside [0, 1) or level outside (0, 1).
    """
    values = np.asarray(scores, dtype=np.float64)  # [m]
    coins = _coins(included, values)
    if min(guesses_in, guesses_out) < 0 or not 0 < guesses_in + guesses_out <= len(values):
        raise UsageError(
            f"expected from 1 to {len(values)} guesses, found {guesses_in} in and {guesses_out} out; "
            "choose the numbers before the audit"
        )
    shuffled = np.random.default_rng((seed, 5)).permutation(len(values))
    order = shuffled[np.argsort(values[shuffled], kind="stable")]  # [m] lowest score first, equal ones at random
    guesses = guesses_in + guesses_out
    correct = int((~coins[order[:guesses_out]]).sum() + coins[order[len(order) - guesses_in :]].sum())
    ceiling = one_run_epsilon(guesses, guesses, delta=delta, canaries=len(values), level=level)
    reason = None
    if not ceiling:
        reason = f"{guesses} guesses show nothing at level {level:g} even if all are right; make more of them"
    return OneRun(
        one_run_epsilon(guesses, correct, delta=delta, canaries=len(values), level=level),
        guesses,
        correct,
        ceiling,
        "not resolvable" if reason else "ok",
        reason,
        len(values),
        delta,
        level,
    )


def _coins(included: ArrayLike, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[m] the coins as booleans, refused where they do not fit the scores or cannot have been fair."""
    coins = np.asarray(included)
    if values.ndim != 1 or coins.shape != values.shape:
        raise UsageError(f"expected one coin for each score, found {coins.shape} for {values.shape}; pass flat lists")
    if not np.isfinite(values).all():
        raise UsageError(f"expected finite scores, found {int((~np.isfinite(values)).sum())} not finite; score again")
    if not np.isin(coins, (0, 1)).all():
        raise UsageError("expected coins of True or False, found other values; pass what each coin said")
    tossed = coins.astype(np.bool_)
    share = clopper_pearson(int(tossed.sum()), len(tossed), _COIN)
    if not share.low <= 0.5 <= share.high:
        raise UsageError(
            f"expected canaries put in by fair coins, found {int(tossed.sum())} of {len(tossed)} in; "
            "toss for each canary before training"
        )
    return tossed
