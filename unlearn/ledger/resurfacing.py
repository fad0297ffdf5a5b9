"""Whether records that earlier requests forgot came back in a newer copy.

Each earlier request is judged by itself, on the table of its records in the new copy ("now"), on the table of the
control set in the new copy, and on the tables that its own run left after its edit ("then"):

- language: a record that greedy decoding emits now and did not emit then has come back, one is enough;
- the mean probability per token (of images: of the label, and the share of correct labels) must not be shown to lie
  above the control's by the margin or more (`probes.statistics.noninferiority`, one-sided 95 % bounds). Where it
  already lay there then, it never went, and the new copy is compared with then instead, record by record: the step
  since must not be shown to be the margin or more. The same comparison clears a request with too few records for
  the one with the control: what has not moved since has not come back.

`not met` where one of the two says so, `met` where the comparisons exclude it, else `inconclusive`. The margin is that
of the sealed criterion on the probability against the control, or 0.05.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probes import statistics
from probes.errors import IntegrityError
from unlearn.evidence.metrics import Metric, clusters, find, values
from unlearn.requests.presets import Criterion

MARGIN = 0.05
FOUND = {"causal_lm": "emitted", "image_classification": "correct"}  # column that says whether a record was found
COMPARED = {"causal_lm": ("probability",), "image_classification": ("correct", "label_probability")}


@dataclass(frozen=True, slots=True)
class Part:
    """One earlier request's share of the tables.

    Attributes:
        n: number of its finished entry.
        pseudonyms: of its records, in the order of the rows.
        then: its own run's table of the records after the edit; None where that is gone.
        control: likewise of its control set.
    """

    n: int
    pseudonyms: Sequence[str]
    then: pd.DataFrame | None = None
    control: pd.DataFrame | None = None


def margin_of(criteria: Iterable[Criterion]) -> float:
    """The margin the request's own criteria grant the probability against the control set."""
    for criterion in criteria:
        named = criterion.metric in ("probability", "label_probability")
        if named and criterion.against == "control" and criterion.set == "records" and criterion.margin is not None:
            return criterion.margin
    return MARGIN


def judge(
    now: pd.DataFrame,
    control: pd.DataFrame | None,
    parts: Sequence[Part],
    task: str,
    *,
    margin: float = MARGIN,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge every earlier request.

    Args:
        now: table of all earlier records in the new copy, in the order of the parts.
        control: table of the control set in the new copy, where there is one.
        parts: the earlier requests.
        task: `causal_lm` or `image_classification`.
        margin: largest tolerated distance of a probability or share, > 0.
        seed: of the intervals.

    Returns:
        `status` (met, not met, inconclusive) over all; `reason`; `margin`; `requests`: a row for each with n, records,
        found_then (how many were emitted, of images recognised, after its own run; None where that is gone), emitted
        (language: how many are emitted now), emitted_again, again (their pseudonyms), status, reason.

    Raises:
        IntegrityError: if the table has another number of rows than the parts have records.
    """
    if len(now) != sum(len(part.pseudonyms) for part in parts):
        raise IntegrityError("expected a row for every record forgotten earlier, found another number; start a new run")
    rows, first = [], 0
    for part in parts:
        table = now.iloc[first : first + len(part.pseudonyms)].reset_index(drop=True)
        rows.append(_judge(table, control, part, task, margin, seed))
        first += len(part.pseudonyms)
    statuses = [row["status"] for row in rows]
    status = "not met" if "not met" in statuses else "inconclusive" if "inconclusive" in statuses else "met"
    back = [row["n"] for row in rows if row["status"] == "not met"]
    if back:
        reason = f"came back: entr{'ies' if len(back) > 1 else 'y'} {', '.join(map(str, back))}"
    else:
        open_ = statuses.count("inconclusive")
        reason = f"{len(rows)} earlier request{'s' * (len(rows) > 1)} asked again, none came back"
        reason += f"; {open_} with too few records to rule it out" if open_ else ""
    return {"status": status, "reason": reason, "margin": margin, "requests": rows}


def _judge(
    now: pd.DataFrame, control: pd.DataFrame | None, part: Part, task: str, margin: float, seed: int
) -> dict[str, Any]:
    then = part.then if part.then is not None and len(part.then) == len(now) else None
    found_then = None if then is None else int(then[FOUND[task]].to_numpy(dtype=bool).sum())
    row: dict[str, Any] = {"n": part.n, "records": len(now), "found_then": found_then}
    row |= {"emitted": None, "emitted_again": None, "again": []}
    statuses, reasons = [], []
    if task == "causal_lm":
        emitted = now["emitted"].to_numpy(dtype=bool)
        before = np.zeros(len(now), dtype=bool) if then is None else then["emitted"].to_numpy(dtype=bool)
        back = emitted & ~before
        again = [name for name, came in zip(part.pseudonyms, back, strict=True) if came]
        row |= {"emitted": int(emitted.sum()), "emitted_again": len(again), "again": again}
        if again:
            statuses.append("not met")
            reasons.append(f"{len(again)} of {len(now)} emitted again")
    for name in COMPARED[task]:
        status, reason = _compared(find(task, name), now, control, then, part.control, margin, seed)
        statuses.append(status)
        reasons.append(f"{name} {reason}")
    order = ("not met", "inconclusive", "met")
    return row | {"status": min(statuses, key=order.index), "reason": "; ".join(reasons)}


def _compared(
    metric: Metric,
    now: pd.DataFrame,
    control: pd.DataFrame | None,
    then: pd.DataFrame | None,
    control_then: pd.DataFrame | None,
    margin: float,
    seed: int,
) -> tuple[str, str]:
    """One figure against the control now; against then where that says nothing: no control, few records, or above it
    then already.
    """
    decision = None
    if control is not None and len(control):
        decision = _noninferior(metric, now, control, False, margin, seed)
        stood_out = (
            decision.status == "not met"
            and then is not None
            and control_then is not None
            and len(control_then) > 0
            and _noninferior(metric, then, control_then, False, margin, seed).status == "not met"
        )
        if not stood_out:
            if decision.status == "inconclusive" and then is not None:
                since = _noninferior(metric, now, then, True, margin, seed)
                if since.status == "met":
                    return "met", f"against then: {since.reason}"
            return decision.status, f"against the control: {decision.reason}"
    if then is None:
        return "inconclusive", "could not be compared: neither a control set nor the earlier run's table is there"
    since = _noninferior(metric, now, then, True, margin, seed)
    why = "above the control already then; " if decision is not None else ""
    return since.status, f"{why}against then: {since.reason}"


def _noninferior(
    metric: Metric, x: pd.DataFrame, y: pd.DataFrame, paired: bool, margin: float, seed: int
) -> statistics.Decision:
    a, b = values(metric, x), values(metric, y)
    if paired and np.array_equal(a, b):  # the same bytes: nothing moved, however few they are
        same = statistics.Interval(0.0, 0.0, 0.0, 0.9, len(a), "no record moved")
        return statistics.Decision("met", "no record moved", margin, same)
    return statistics.noninferiority(
        a,
        b,
        margin,
        paired=paired,
        better="lower",
        clusters=clusters(x),
        y_clusters=None if paired else clusters(y),
        bounds=metric.bounds,
        seed=seed,
    )


def sentences(document: dict[str, Any]) -> list[str]:
    """What `judge` found, one line a request, for a terminal or a report."""
    return [
        f"entry {row['n']}, {row['records']} records: {'came back' if row['status'] == 'not met' else row['status']}: "
        f"{row['reason']}"
        for row in document["requests"]
    ]
