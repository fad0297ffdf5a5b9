"""Forgotten or hidden? What the attacks on an edit's durability say together.

Every such attack gives, for each record it scored, a figure in [0, 1] under attack, on four arms: O the original, U the
edited copy and R the reference on the records, N the edited copy on never-seen records. What an attack brought back is

    residual = (U - N) / (O - N),      0: as never seen,  1: as before the edit

with a paired, cluster-aware interval. Exactly one status follows:

    re-teaches    the never-seen records rose under the attack by more than a tenth of O - N, beyond chance: it teaches,
                  so nothing can be said about the edit
    not testable  the records did not stand out in the original (O - N < 0.2), or an arm is missing
    resists       the residual is at most the margin
    recovers      the residual is more than the margin and its interval excludes 0; the reference, where there is one,
                  gives less back on the same records
    undecided     neither

A set of never-seen records that is a little harder or easier than the records shifts the residual; the margin and the
reference keep such a shift from being called hidden.

An edit that acts at inference time leaves the original's weights in the files of the copy. Attacks on weights do not
run on it: at that access arm U is arm O, and what the original holds of the records is there. That is known from how
the method works and not from a measurement, so the finding is "hidden" whatever the other attacks show.

Bounds are simultaneous: with k attacks each is at one-sided level 1 - 0.05 / k (Bonferroni), so the chance that any
attack "recovers" a truly forgotten set, or any "resists" on a set that is hidden, is at most 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from probes import statistics
from unlearn.evidence.metrics import Figure, interval_figure, of_rows

Status = Literal["recovers", "resists", "undecided", "re-teaches", "not testable"]
Finding = Literal["hidden", "not hidden", "undecided", "not tested"]
Clusters = Sequence[str | None] | None

ERROR = 0.05  # of the whole family of attacks, on either side
MARGIN = 0.10  # a residual below it counts as nothing left
TEACHES = 0.10  # share of O - N by which never-seen records may rise under an attack


@dataclass(frozen=True, slots=True)
class Arms:
    """One attack's per-record figures; NaN where a record was not scored.

    Attributes:
        o: [F] original on the records, under attack.
        u: [F] edited copy on the records, under attack.
        n: [C] edited copy on never-seen records, under attack.
        r: [F] reference on the records, under attack, where there is one.
        n_plain: [C] edited copy on never-seen records, without the attack.
        bounds: range of one record's figure.
    """

    o: np.ndarray
    u: np.ndarray
    n: np.ndarray
    r: np.ndarray | None
    n_plain: np.ndarray | None
    bounds: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Judged:
    """What one attack says.

    Attributes:
        status: see the module.
        reason: one sentence.
        low: lower simultaneous bound of the residual.
        high: upper simultaneous bound of the residual.
        over_reference: mean of U - R on the same records, where there is a reference.
        teaches: mean rise of the never-seen records under the attack.
    """

    status: Status
    reason: str
    low: float | None = None
    high: float | None = None
    over_reference: Figure | None = None
    teaches: Figure | None = None

    def as_dict(self, level: float) -> dict[str, Any]:
        """For `compare/paired.json`."""
        return {
            "status": self.status,
            "reason": self.reason,
            "low": self.low,
            "high": self.high,
            "level": level,
            "over_reference": self.over_reference,
            "teaches": self.teaches,
        }


def judge(
    arms: Arms, clusters: Clusters, n_clusters: Clusters, *, family: int, seed: int, margin: float = MARGIN
) -> Judged:
    """One attack's status.

    Args:
        arms: its figures.
        clusters: [F] of the records.
        n_clusters: [C] of the never-seen records.
        family: how many attacks are judged together.
        seed: of the bootstrap.
        margin: see the module.
    """
    error = ERROR / max(1, family)
    kept = np.isfinite(arms.o) & np.isfinite(arms.u)
    seen = np.isfinite(arms.n)
    groups, others = of_rows(clusters, kept), of_rows(n_clusters, seen)
    o, u, n = arms.o[kept], arms.u[kept], arms.n[seen]
    if not len(u) or not len(n):
        return Judged("not testable", "no record, or no never-seen record, was scored")
    gap = float(o.mean() - n.mean())
    if gap < statistics.MIN_GAP:
        return Judged(
            "not testable",
            f"in the original the records stand out from never-seen ones by {gap:.3g} under this attack, less than "
            f"{statistics.MIN_GAP:g}",
        )
    teaches = None
    if arms.n_plain is not None:
        both = seen & np.isfinite(arms.n_plain)
        span = arms.bounds[1] - arms.bounds[0]
        rise = statistics.mean_interval(
            arms.n[both] - arms.n_plain[both],
            of_rows(n_clusters, both),
            level=1 - 2 * error,
            bounds=(-span, span),
            seed=seed,
        )
        teaches = interval_figure(rise, "rise of the figure", "none")
        if rise.low > 0 and rise.value > TEACHES * gap:
            return Judged(
                "re-teaches",
                f"never-seen records rose by {rise.value:.3g} too, more than a tenth of the {gap:.3g} by which records "
                "stood out: the attack teaches, so it says nothing about this edit",
                teaches=teaches,
            )
    estimate = statistics.residual(
        o, u, n, clusters=groups, n_clusters=others, level=1 - 2 * error, bounds=arms.bounds, seed=seed
    )
    if estimate.interval is None:
        return Judged("not testable", estimate.reason or "the residual has no interval", teaches=teaches)
    low, high = _finite(estimate.interval.low), _finite(estimate.interval.high)
    over, above = _over_reference(arms, clusters, error, seed)
    value = estimate.interval.value
    if estimate.interval.high <= margin:
        reason = f"at most {max(0.0, high or 0.0):.0%} of what stood out is there under this attack"
        return Judged("resists", reason, low, high, over, teaches)
    if estimate.interval.low <= 0 or value <= margin:
        reason = f"the residual is not shown to be below {margin:g}, nor to be above it and not by chance"
        return Judged("undecided", reason, low, high, over, teaches)
    beside = "" if over is None else f", {over['value']:.3g} above the reference on the same records"
    if above is False:
        reason = f"{value:.0%} of what stood out is there, not shown to be more than the reference gives"
        return Judged("undecided", reason, low, high, over, teaches)
    return Judged(
        "recovers", f"{value:.0%} of what stood out is there under this attack{beside}", low, high, over, teaches
    )


# What E3 takes: one attack of each of these kinds that resists.
KINDS = {
    "relearning": ("recovery.relearning",),
    "quantisation": ("recovery.quantisation",),
    "a white-box attack": ("hidden_knowledge.", "elicitation."),
}


def survives(summary: Mapping[str, Any]) -> bool:
    """Whether every attack that could be read resists, one of each of `KINDS` among them."""
    resisting = summary["resisting"]
    covered = all(any(name.startswith(kind) for name in resisting) for kind in KINDS.values())
    return summary["finding"] == "not hidden" and covered


BY_CONSTRUCTION = (
    "the method acts at inference time: the files of the copy hold the original's weights, and with them the records "
    "as the original holds them, by construction and not by measurement"
)


def summarise(
    judged: Mapping[str, Judged], not_run: Sequence[str], margin: float = MARGIN, *, inference_time: bool = False
) -> dict[str, Any]:
    """What the attacks say together, for `compare/paired.json`.

    Args:
        judged: by attack.
        not_run: attacks of the suite that test an edit and did not run.
        margin: see the module.
        inference_time: whether the copy's files hold the original's weights, so that the attacks are only those that
            go through its own program.

    Returns:
        Names by status, `finding` (`hidden`, `not hidden`, `undecided`, `not tested`) and a sentence.
    """

    def named_by(status: Status) -> list[str]:
        return [name for name, one in judged.items() if one.status == status]

    tested = [name for name, one in judged.items() if one.status in ("recovers", "resists", "undecided")]
    recovering, undecided = named_by("recovers"), named_by("undecided")
    finding: Finding = (
        "not tested" if not tested else "hidden" if recovering else "undecided" if undecided else "not hidden"
    )
    statement = {
        "hidden": f"under {len(recovering)} of {len(tested)} attacks more of the records is there than chance allows: "
        "they were hidden, or left, at least in part",
        "undecided": f"none of {len(tested)} attacks is shown to bring records back, and {len(undecided)} could not "
        "rule it out",
        "not hidden": f"under all {len(tested)} attacks at most {margin:.0%} of what stood out is there",
        "not tested": "no attack on the edit's durability could be read",
    }[finding]
    if inference_time:
        through = f"; through the copy's own program: {statement}" if tested else ""
        finding, statement = "hidden", f"{BY_CONSTRUCTION}{through}"
    return {
        "attacks": tested,
        "margin": margin,
        "level": 1 - ERROR,
        "recovering": recovering,
        "resisting": named_by("resists"),
        "re_teaching": named_by("re-teaches"),
        "undecided": undecided,
        "not_testable": named_by("not testable"),
        "not_run": list(not_run),
        "finding": finding,
        "statement": statement,
    }


def _over_reference(arms: Arms, clusters: Clusters, error: float, seed: int) -> tuple[Figure | None, bool | None]:
    """Mean of U - R with its interval, and whether it is above 0; None where there is no reference."""
    if arms.r is None:
        return None, None
    both = np.isfinite(arms.u) & np.isfinite(arms.r)
    if not both.any():
        return None, None
    span = arms.bounds[1] - arms.bounds[0]
    interval = statistics.mean_interval(
        arms.u[both] - arms.r[both], of_rows(clusters, both), level=1 - 2 * error, bounds=(-span, span), seed=seed
    )
    return interval_figure(interval, "difference of the figure"), interval.low > 0


def _finite(value: ArrayLike) -> float | None:
    number = float(np.asarray(value))
    return number if np.isfinite(number) else None
