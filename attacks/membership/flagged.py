"""Which records were in the training data, as a list with a bounded share of mistakes.

For record i with score s_i, and n scores c_j of records that were certainly never seen, the conformal p-value is

    p_i = (1 + #{j : c_j >= s_i}) / (n + 1)

and Benjamini and Hochberg's procedure on the p_i flags records such that the expected share of never-seen ones among
the flagged is at most q, whatever the score and the model (Bates et al. 2023; for language models PTDI, arXiv
2510.09717, which also estimates the share of members to flag more; that estimate is not used here).

Limits: it holds if a never-seen record among the audited ones is exchangeable with the calibration records: same
source, same length, same treatment (`attacks.membership.blind` tests that). No p-value is below 1 / (n + 1).

Shape letters: R records, n calibration records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.membership.folds import representatives
from probes.errors import UsageError
from probes.statistics import Clusters, benjamini_hochberg, conformal_pvalues

Floats = NDArray[np.float64]

ROUNDING = 1e-9  # discrete p-values often meet a threshold exactly


@dataclass(frozen=True, slots=True)
class Flagged:
    """Records flagged as members.

    Attributes:
        pvalues: [R] conformal p-values.
        adjusted: [R] the same adjusted: the smallest q at which the record is flagged.
        flagged: [R] bool; none where the status is not "ok".
        q: the bound on the expected share of never-seen records among the flagged.
        smallest: the smallest p-value that the calibration records allow, 1 / (n + 1).
        needed: calibration records that would allow a single record to be flagged.
        n: calibration records used.
        status: "ok", or "not resolvable" where not even all records together could be flagged.
        reason: why not.
    """

    pvalues: Floats = field(repr=False)
    adjusted: Floats = field(repr=False)
    flagged: NDArray[np.bool_] = field(repr=False)
    q: float
    smallest: float
    needed: int
    n: int
    status: Literal["ok", "not resolvable"]
    reason: str | None


def flag(
    scores: ArrayLike, calibration: ArrayLike, q: float = 0.05, *, clusters: Clusters = None, seed: int = 0
) -> Flagged:
    """Flag members at a false-discovery rate of at most q.

    Args:
        scores: [R] scores of the audited records, higher = more likely a member; infinite ones are fine.
        calibration: [n] scores of never-seen records, not used to choose or to tune the score.
        q: the rate, in (0, 1).
        clusters: [n] near-duplicate clusters of the calibration records; one record of each is used, because
            near-duplicates are not exchangeable with a single record.
        seed: of the record drawn from each cluster.

    Returns:
        The list. A false-discovery rate is a mean over audits: one list may hold more, or only, mistakes.

    Raises:
        UsageError: scores that are NaN, clusters of the wrong length, q outside (0, 1).
    """
    if not 0 < q < 1:
        raise UsageError(f"expected a false-discovery rate in (0, 1), found {q}; 0.05 is usual")
    s, c = np.asarray(scores, dtype=np.float64), np.asarray(calibration, dtype=np.float64)
    if bad := int(np.isnan(s).sum() + np.isnan(c).sum()):
        raise UsageError(f"expected a score for every record, found {bad} NaN; find out why")
    c = c[representatives(len(c), clusters, seed)]
    largest = np.finfo(np.float64).max
    pvalues = conformal_pvalues(np.clip(s, -largest, largest), np.clip(c, -largest, largest))
    adjusted = benjamini_hochberg(pvalues)
    smallest = 1 / (len(c) + 1)
    reason = None
    if not len(s):
        reason = "no records to flag"
    elif smallest > q * (1 + ROUNDING):
        fewest = math.ceil(1 / q - 1 - ROUNDING)
        reason = f"{len(c)} never-seen records allow no p-value below {smallest:.3g}; {fewest} are needed for q = {q:g}"
    return Flagged(
        pvalues=pvalues,
        adjusted=adjusted,
        flagged=(adjusted <= q * (1 + ROUNDING)) & (reason is None),
        q=q,
        smallest=smallest,
        needed=math.ceil(max(1, len(s)) / q - 1 - ROUNDING),
        n=len(c),
        status="ok" if reason is None else "not resolvable",
        reason=reason,
    )
