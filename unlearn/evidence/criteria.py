"""From measurements to a verdict: criteria, arms, residuals, claim level, and the limits that go with them.

Arms of a figure: O original on the records, U edited on the records, N edited (in an audit: original) on the control
set, R reference on the records. Residual = (U - N) / (O - N), "not testable" where O - N < 0.2.

A criterion is met, not met or inconclusive. The verdict is `criteria met` when every required criterion is met,
`criteria not met` when one is not, else `inconclusive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from probes import statistics
from probes.errors import UsageError
from unlearn.evidence.measure import Measured
from unlearn.evidence.metrics import (
    LEVEL,
    Figure,
    Metric,
    as_figure,
    clusters,
    figure,
    find,
    metrics_of,
    residual_figure,
    values,
)
from unlearn.evidence.stress import survives
from unlearn.requests.presets import RESIDUAL
from unlearn.requests.request import Criterion

MET, NOT_MET, INCONCLUSIVE = "criteria met", "criteria not met", "inconclusive"
EXIT_CODES = {MET: 0, NOT_MET: 1, INCONCLUSIVE: 3}
Status = Literal["met", "not met", "inconclusive"]
FIGURE_KEYS = ("value", "unit", "n", "ci_low", "ci_high", "ci_level", "direction")


@dataclass(frozen=True, slots=True)
class Evidence:
    """Measurements that criteria look at. `current` is the checkpoint under judgement: edited, or as audited."""

    task: str
    current: Measured
    before: Measured | None
    reference: Measured | None
    seed: int
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)  # as in `compare/paired.json`
    stress: dict[str, Any] | None = None  # likewise
    inference_time: bool = False  # the files of `current` hold the weights of `before`

    def table(self, stage: str, name: str) -> pd.DataFrame | None:
        """One set's table of `current`, `before` or `reference`, or None when it was not measured."""
        measured = {"current": self.current, "before": self.before, "reference": self.reference}[stage]
        return None if measured is None else measured.tables.get(name)


def check(criteria: Sequence[Criterion], task: str, *, auditing: bool) -> None:
    """Refuse criteria that this kind of run cannot evaluate, before any model is loaded.

    Raises:
        UsageError: for a metric of another task, or a comparison with a checkpoint state that an audit has not.
    """
    for criterion in criteria:
        if criterion.metric != RESIDUAL:
            find(task, criterion.metric)
        elif auditing:
            raise UsageError(
                f"expected criterion {criterion.id} of an audit to name a figure, found residual of an edit"
            )
        if auditing and criterion.against == "before":
            raise UsageError(
                f"expected criterion {criterion.id} of an audit to compare with control or reference, found before"
            )


def _direction(metric: Metric, criterion: Criterion) -> Literal["higher", "lower"]:
    return metric.better("retain" if criterion.set == "retain" else "records")


def evaluate(criterion: Criterion, evidence: Evidence) -> dict[str, Any]:
    """One criterion against the measurements.

    Returns:
        A row of `compare/criteria.json`: the criterion's own fields, the observed figure, status and reason.
    """
    table = evidence.table("current", criterion.set)
    observed: Figure | None = None
    status: Status = "inconclusive"
    if criterion.metric == RESIDUAL:
        observed, status, reason = _under_attack(criterion, evidence)
    elif table is None or not len(table):
        reason = f"the {criterion.set} set was not measured"
    elif criterion.test in ("upper95", "point"):
        observed, status, reason = _threshold(criterion, find(evidence.task, criterion.metric), table, evidence.seed)
    else:
        observed, status, reason = _compare(criterion, find(evidence.task, criterion.metric), table, evidence)
    return {
        "id": criterion.id,
        "metric": criterion.metric,
        "attack": criterion.attack,
        "set": criterion.set,
        "aggregate": criterion.aggregate,
        "test": criterion.test,
        "against": criterion.against,
        "max": criterion.max,
        "margin": criterion.margin,
        "required": criterion.required,
        "observed": observed,
        "status": status,
        "reason": reason,
    }


def _under_attack(criterion: Criterion, evidence: Evidence) -> tuple[Figure | None, Status, str]:
    """The residual under one attack, or the worst under all that could be read, by simultaneous bounds."""
    assert criterion.max is not None
    assert criterion.attack is not None
    every = criterion.attack == "all"
    tested = evidence.stress["attacks"] if evidence.stress else []
    names = [name for name in tested if every or name == criterion.attack]
    if every and evidence.inference_time and criterion.max < 1:
        return _by_construction(evidence, criterion.max)
    if not names:
        if every:
            return None, "inconclusive", "no attack on the edit's durability could be read"
        found = (evidence.attacks.get(criterion.attack) or {}).get("stress")
        return None, "inconclusive", found["reason"] if found else "this attack did not run"
    bounds = {name: evidence.attacks[name]["stress"] for name in names}
    worst = max(names, key=lambda name: evidence.attacks[name]["residual"]["value"])
    shown = {key: evidence.attacks[worst]["residual"][key] for key in FIGURE_KEYS}
    over = [name for name in names if bounds[name]["status"] == "recovers" and _above(bounds[name], criterion.max)]
    if over:
        return shown, "not met", f"{', '.join(over)}: residual above {criterion.max:g}, beyond chance"
    if all(one["high"] is not None and one["high"] <= criterion.max for one in bounds.values()):
        return shown, "met", f"upper bound at most {criterion.max:g} under {len(names)} attack{'s' * (len(names) > 1)}"
    open_ = [name for name in names if bounds[name]["high"] is None or bounds[name]["high"] > criterion.max]
    return shown, "inconclusive", f"{', '.join(open_)}: a residual above {criterion.max:g} is not ruled out"


def _by_construction(evidence: Evidence, limit: float) -> tuple[None, Status, str]:
    """The residual under every attack where the copy's files hold the original's weights: arm U is arm O at access A2.

    (U - N) / (O - N) is then 1 without a measurement, provided that the records stood out in the original at all. What
    attacks through the copy's own program show cannot make up for it.
    """
    metric = find(evidence.task, "label_probability" if evidence.task == "image_classification" else "probability")
    records, control = evidence.table("before", "records"), evidence.table("before", "control")
    if records is None or control is None or not len(records) or not len(control):
        return None, "inconclusive", "the copy's files hold the original's weights, and no control set was measured"
    gap = float(values(metric, records).mean() - values(metric, control).mean())
    holds = "the copy's files hold the original's weights"
    if gap < statistics.MIN_GAP:
        why = f"in which the records stand out from never-seen ones by {gap:.3g}, less than {statistics.MIN_GAP:g}"
        return None, "inconclusive", f"{holds}, {why}: no residual can be given"
    why = f"for whoever has them the residual is 1 by construction, above {limit:g}, without a measurement"
    return None, "not met", f"{holds}: {why}"


def _above(bounds: dict[str, Any], limit: float) -> bool:
    return bounds["low"] is not None and bounds["low"] > limit


def _threshold(criterion: Criterion, metric: Metric, table: pd.DataFrame, seed: int) -> tuple[Figure, Status, str]:
    x, groups, limit = values(metric, table), clusters(table), criterion.max
    if limit is None:
        raise UsageError(f"expected max in criterion {criterion.id}, found none; add it")
    direction = _direction(metric, criterion)
    if criterion.aggregate == "worst":
        if criterion.test == "upper95" and metric.binary:
            upper = statistics.worst_of([int(v) for v in x], [1] * len(x), LEVEL)
            status: Status = "met" if upper.high <= limit else "not met" if upper.value > limit else "inconclusive"
            need = statistics.required_n(limit, LEVEL, len(x)) if 0 < limit < 1 else 0
            reason = (
                f"one prompt a record bounds the worst record by {upper.high:.3g}; {need} prompts a record would do"
            )
            return as_figure(upper, metric, direction), status, reason
        worst = float(x.max())
        status = "met" if worst <= limit else "not met"
        exact = statistics.Interval(worst, worst, worst, LEVEL, len(x), "largest of the records")
        return as_figure(exact, metric, direction), status, f"the largest value is {worst:.4g}, the limit {limit:g}"
    shown = figure(metric, table, criterion.set, seed)
    if criterion.test == "point":
        status = "met" if shown["value"] <= limit else "not met"
        return shown, status, f"the value is {shown['value']:.4g}, the limit {limit:g}; no allowance for sampling"
    if metric.binary and groups is None:
        hits = int(x.sum())
        upper = statistics.clopper_pearson(hits, len(x), LEVEL, "upper")
        lower = statistics.clopper_pearson(hits, len(x), LEVEL, "lower")
        hint = f"; 0 hits would need n = {statistics.required_n(limit, LEVEL)}" if 0 < limit < 1 else ""
        counts = f"{hits} of {len(x)}, "
    else:
        upper = statistics.mean_interval(x, groups, level=LEVEL, sided="upper", bounds=metric.bounds, seed=seed)
        lower = statistics.mean_interval(x, groups, level=LEVEL, sided="lower", bounds=metric.bounds, seed=seed)
        hint, counts = "", ""
    status = "met" if upper.high <= limit else "not met" if lower.low > limit else "inconclusive"
    reason = f"{counts}upper 95 % bound {upper.high:.4g}, limit {limit:g}"
    return shown, status, reason + (hint if status == "inconclusive" else "")


def _compare(
    criterion: Criterion, metric: Metric, table: pd.DataFrame, evidence: Evidence
) -> tuple[Figure | None, Status, str]:
    if criterion.margin is None or criterion.against is None:
        raise UsageError(f"expected margin and against in criterion {criterion.id}, found neither or one; add them")
    stage, name = ("current", "control") if criterion.against == "control" else (criterion.against, criterion.set)
    other = evidence.table(stage, name)
    if other is None or not len(other):
        return None, "inconclusive", f"no {criterion.against} to compare with"
    paired = criterion.against != "control"
    if paired and _same_weights(evidence, criterion.against):
        shown = as_figure(statistics.Interval(0.0, 0.0, 0.0, LEVEL, len(table), "same weights"), metric, "none")
        return shown, "met", f"the checkpoint has the weights of {criterion.against}: nothing can differ"
    x, y, groups = values(metric, table), values(metric, other), clusters(table)
    options: dict[str, Any] = {"paired": paired, "clusters": groups, "bounds": metric.bounds, "seed": evidence.seed}
    if not paired:
        options["y_clusters"] = clusters(other)
    direction = _direction(metric, criterion)
    if criterion.test == "equivalence":
        decision = statistics.equivalence(x, y, criterion.margin, **options)
    else:
        decision = statistics.noninferiority(x, y, criterion.margin, better=direction, **options)
    what = f"difference to {criterion.against}: {decision.reason}"
    return as_figure(decision.difference, metric, direction), decision.status, what


def _same_weights(evidence: Evidence, stage: str) -> bool:
    """Whether a comparison is between equal checkpoints, where a difference of zero is knowledge and not a sample."""
    other = {"before": evidence.before, "reference": evidence.reference}.get(stage)
    return other is not None and other.tensor_digest == evidence.current.tensor_digest


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The verdict over evaluated criteria; without a required one there is nothing to decide, hence inconclusive."""
    required = [row["status"] for row in rows if row["required"]]
    if "not met" in required:
        return NOT_MET
    return MET if required and set(required) == {"met"} else INCONCLUSIVE


def arms(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """O, U, N and R of every metric, and the residual where an edit was made.

    In an audit the checkpoint as it is stands in arm O, and N is its figure on the control set.
    """
    out: dict[str, dict[str, Any]] = {}
    edited = evidence.before is not None
    original = evidence.before or evidence.current
    for metric in metrics_of(evidence.task):
        sources = {
            "O": original.tables.get("records"),
            "U": evidence.table("current", "records") if edited else None,
            "N": evidence.table("current", "control"),
            "R": evidence.table("reference", "records"),
        }
        row: dict[str, Any] = {
            arm: None if table is None or not len(table) else figure(metric, table, "records", evidence.seed)
            for arm, table in sources.items()
        }
        row["residual"] = _residual(metric, sources, evidence.seed) if edited else None
        out[metric.name] = row
    return out


def _residual(metric: Metric, sources: dict[str, pd.DataFrame | None], seed: int) -> dict[str, Any]:
    o, u, n = (sources[arm] for arm in "OUN")
    if o is None or u is None or n is None or not len(n):
        return {"status": "not testable", "reason": "no control set was measured"}
    return residual_figure(
        values(metric, o), values(metric, u), values(metric, n), clusters(o), clusters(n), metric.bounds, seed
    )


def over_forgetting(evidence: Evidence) -> dict[str, Any]:
    """Whether the edited records now stand above never-seen ones: a trace that tells an attacker what was removed."""
    table, control = evidence.table("current", "records"), evidence.table("current", "control")
    metric = find(evidence.task, "loss")
    if table is None or control is None or not len(control):
        return {"flag": False, "statement": "not tested: no control set was measured"}
    difference = statistics.difference_interval(
        values(metric, table),
        values(metric, control),
        paired=False,
        clusters=clusters(table),
        y_clusters=clusters(control),
        seed=evidence.seed,
    )
    flag = difference.low > 0
    side = "above" if flag else "not shown to be above"
    interval = f"{difference.value:+.3f} nats, 95 % interval [{difference.low:.3f}, {difference.high:.3f}]"
    return {"flag": flag, "statement": f"the loss on the records is {side} that of the control set ({interval})"}


def utility(evidence: Evidence) -> dict[str, dict[str, Figure]]:
    """Retain-set figures before and after the edit, with the paired difference."""
    before, after = evidence.table("before", "retain"), evidence.table("current", "retain")
    if before is None or after is None or not len(after):
        return {}
    out = {}
    for metric in metrics_of(evidence.task):
        difference = statistics.difference_interval(
            values(metric, after),
            values(metric, before),
            paired=True,
            clusters=clusters(after),
            bounds=metric.bounds,
            seed=evidence.seed,
        )
        out[f"retain.{metric.name}"] = {
            "before": figure(metric, before, "retain", evidence.seed),
            "after": figure(metric, after, "retain", evidence.seed),
            "difference": as_figure(difference, metric, metric.better("retain")),
        }
    return out


def claim_level(rows: Sequence[dict[str, Any]], evidence: Evidence) -> str | None:
    """How far the evidence reaches: E0 edit applied, E1 not emitted under the tested prompts, E2 equivalent to the
    reference within a margin fixed beforehand, E3 that and every attack on the edit's durability resisted, among them
    relearning, quantisation and one on the inside. An attack that brings records back leaves E1 at most, and so does an
    edit that acts at inference time, whose files hold the original's weights. E4 needs retraining and is not claimed
    here.
    """
    if evidence.before is None:
        return None
    table = evidence.table("current", "records")
    hit = "emitted" if evidence.task == "causal_lm" else "correct"
    if table is None or not len(table) or bool(np.asarray(table[hit]).any()):
        return "E0"
    if evidence.inference_time:
        return "E1"
    equivalent = [row for row in rows if row["test"] == "equivalence" and row["against"] == "reference"]
    if not equivalent or any(row["status"] != "met" for row in equivalent):
        return "E1"
    if evidence.stress is None or evidence.stress["finding"] == "not tested":
        return "E2"
    if evidence.stress["finding"] == "hidden":
        return "E1"
    return "E3" if survives(evidence.stress) else "E2"
