"""What was tried to get the records out: STAGE/attacks/*.json, the per-record columns beside them, and attacks[].

A result is copied field by field, so the report has exactly the keys of its schema whatever else a file holds: numbers
are finite or null, strings cleaned, parallel lists of equal length. A run folder without these files has none, and its
attacks are those of the one pass alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reports.arms import measured_arms
from reports.reading import ReportError, figure_of, float_of, read, read_list, rows_of, text_of
from reports.text import STRESS_STATUSES, Json, clean, finite, tree

SCHEMA = "unlearn.attack/v1"
STAGES = ("before", "after", "reference")
ARM_PLACES = {"O": ("before", "figures"), "U": ("after", "figures"), "R": ("reference", "figures")}
RESIDUAL_FLOOR = 0.2
HIT = ":hit"
PLAIN = "plain"  # key of the figure without the attack, in a result that gives its figure with and without
_COSTS = ("passes", "generated_tokens", "reference_passes")


def attack_details(run: Path) -> Json:
    """Every attack's result by stage and name; None for a stage without any.

    Raises:
        ReportError: if a result is of another schema or of another attack than its file's name says.
    """
    return {stage: _stage(run, stage) for stage in STAGES}


def attack_columns(run: Path, stage: str) -> dict[str, Json]:
    """Per-record figures of the attacks of one stage by record id: numbers, answers, and `hits`.

    `hits` names the attacks that got the record out or flagged it, in the order of their names; it is absent where no
    attack of the stage says so of single records.
    """
    rows = {}
    table = rows_of(run, f"{stage}/attacks/records.parquet")
    judged = any(key.endswith(HIT) for row in table.values() for key in row)
    for name, row in table.items():
        hits = sorted(key.removesuffix(HIT) for key, value in row.items() if key.endswith(HIT) and value is True)
        kept = {
            key: value
            for key, value in row.items()
            if not key.endswith(HIT) and (value is None or isinstance(value, bool | int | float))
        }
        rows[name] = kept | ({"hits": hits} if judged else {})
    return rows


def attack_rows(run: Path, measured: Json, details: Json, paired: Json) -> list[Json]:
    """Every attack any stage names, in order, with its figure on each arm; the latest stage decides run or not run.

    Args:
        run: run folder.
        measured: set-level figures by stage, None for a stage that was not measured.
        details: what `attack_details` returns.
        paired: compare/paired.json; {} if there is none.
    """
    rows: dict[str, Json] = {}
    for stage in ("before", "after"):
        found = read(run, f"{stage}/metrics.json", required=False).get("attacks")
        for attack in found or read_list(run, f"{stage}/attacks.json"):
            name = clean(str(attack.get("name") or "unnamed"))
            if not (name in rows and _without_model((details["before"] or {}).get(name), attack)):
                rows[name] = tree(attack)
        for name, detail in (details[stage] or {}).items():  # an attack alone may have written nothing but its result
            rows.setdefault(name, {"status": detail["status"], "reason": detail["reason"]})
    return [_row(name, attack, measured, details, paired) for name, attack in rows.items()]


def _without_model(detail: Json | None, attack: Json) -> bool:
    """Whether an attack that did not run again never asked the model: its result holds for every checkpoint."""
    return attack.get("status") != "run" and detail is not None and detail["cost"]["passes"] == 0


def _row(name: str, attack: Json, measured: Json, details: Json, paired: Json) -> Json:
    ran = attack.get("status") == "run"
    latest = next((found for stage in ("after", "before") if (found := (details[stage] or {}).get(name))), None)
    metric = attack.get("figure") or (latest or {}).get("headline") or ""
    reason = attack.get("reason") or (None if ran else "no reason was recorded")
    arms: Json = dict.fromkeys("OUNR")
    plain: Json = dict.fromkeys("OUNR")
    residual = stress = None
    given = (paired.get("attacks") or {}).get(name) if latest else None
    if ran and latest:
        headline = latest["headline"]
        found = given.get("arms") or {} if given else _detail_arms(name, details, headline)
        arms = {arm: figure_of(found.get(arm)) for arm in "OUNR"}
        found = given.get("plain") or {} if given else _detail_arms(name, details, PLAIN)
        plain = {arm: figure_of(found.get(arm)) for arm in "OUNR"}
        residual = _given_residual(given.get("residual")) if given else None
        stress = _stress(given.get("stress")) if given else None
        if not any(arms.values()):
            open_ = latest["not_resolvable"]
            why = open_.get(latest["headline"]) or next(iter(open_.values()), None)
            reason = reason or (f"not resolvable: {why}" if why else None)
    if ran and metric and not any(arms.values()):
        given = (paired.get("arms") or {}).get(metric) or {}
        level = measured_arms(measured, metric)
        arms = {arm: figure_of(given.get(arm)) or level[arm] for arm in "OUNR"}
        residual = _residual(arms, given.get("residual"))
    return {
        "name": name,
        "goal": attack.get("goal") or "unspecified",
        "access": attack.get("access") or "unspecified",
        "budget": attack.get("budget"),
        "status": "run" if ran else "not_run",
        "reason": reason,
        "metric": metric or None,
        "arms": arms,
        "plain": plain,
        "residual": residual,
        "stress": stress,
    }


def _detail_arms(name: str, details: Json, key: str | None) -> Json:
    """A figure of each stage, and of the control set on the checkpoint under judgement."""

    def figure(stage: str, part: str) -> Json | None:
        detail = (details[stage] or {}).get(name) or {}
        found: Json | None = (detail.get(part) or {}).get(key)
        return found

    level = figure("after" if (details["after"] or {}).get(name) else "before", "control")
    return {arm: figure(*place) for arm, place in ARM_PLACES.items()} | {"N": level}


def _stress(given: Any) -> Json | None:
    """What an attack on the edit itself showed; None for other attacks, and in run folders without it.

    Raises:
        ValueError: if its status is none of `STRESS_STATUSES`.
    """
    if not isinstance(given, dict):
        return None
    if given.get("status") not in STRESS_STATUSES:
        raise ValueError("expected a status out of recovers, resists, undecided, re-teaches, not testable")
    return {
        "status": given["status"],
        "reason": text_of(given.get("reason")) or "no reason was recorded",
        **{key: float_of(given.get(key)) for key in ("low", "high", "level")},
        **{key: figure_of(given.get(key)) for key in ("over_reference", "teaches")},
    }


def _given_residual(given: Any) -> Json | None:
    """A residual as the run computed it; one that is not testable has no value."""
    figure = figure_of(given)
    if figure is None:
        return None
    open_ = given.get("status") == "not testable"
    blank = {"value": None, "ci_low": None, "ci_high": None} if open_ else {}
    return figure | blank | {"status": "not testable" if open_ else "ok", "reason": text_of(given.get("reason"))}


def _residual(arms: Json, given: Any) -> Json | None:
    """(U - N) / (O - N), "not testable" where the records stood out by less than 0.2 before; None without three arms.

    For a figure where higher is better (a loss), O - N is negative when a record stands out, so the gap takes the
    figure's direction into account.
    """
    original, edited, control = ((arms[arm] or {}).get("value") for arm in "OUN")
    if original is None or edited is None or control is None:
        return None
    gap = (original - control) * (-1 if arms["O"]["direction"] == "higher" else 1)
    figure = figure_of(given) or {
        "value": finite((edited - control) / (original - control)) if original != control else None,
        "unit": "ratio",
        "n": arms["U"]["n"],
        "ci_low": None,
        "ci_high": None,
        "ci_level": None,
        "direction": "lower",
    }
    given = given if isinstance(given, dict) else {}
    if gap < RESIDUAL_FLOOR:
        reason = f"before the edit the records stood out from control by {gap:.3f}, less than {RESIDUAL_FLOOR}"
        blank = {"value": None, "ci_low": None, "ci_high": None}
        return figure | blank | {"status": "not testable", "reason": text_of(given.get("reason")) or reason}
    status = "not testable" if given.get("status") == "not testable" else "ok"
    return figure | {"status": status, "reason": text_of(given.get("reason"))}


def _stage(run: Path, stage: str) -> Json | None:
    found = {}
    for path in sorted((run / stage / "attacks").glob("*.json")):
        where = f"{stage}/attacks/{clean(path.name)}"
        raw = read(run, f"{stage}/attacks/{path.name}")
        if (raw.get("schema"), raw.get("attack")) != (SCHEMA, path.stem):
            raise ReportError(f"expected schema {SCHEMA} and the attack of the file's name in {where}, found others", 4)
        found[clean(path.stem)] = _detail(raw)
    return found or None


def _detail(raw: Json) -> Json:
    ran = raw.get("status") == "run"
    cost = raw.get("cost") or {}
    return {
        "settings": tree(dict(raw.get("settings") or {})),
        "status": "run" if ran else "not_run",
        "reason": text_of(raw.get("reason")) or (None if ran else "no reason was recorded"),
        "headline": text_of(raw.get("headline")),
        "figures": _figures(raw.get("figures")),
        "control": _figures(raw.get("control")),
        "titles": _words(raw.get("titles")),
        "not_resolvable": _words(raw.get("not_resolvable")),
        "curves": [_curve(row) for row in raw.get("curves") or []],
        "tables": [_table(row) for row in raw.get("tables") or []],
        "column": text_of(raw.get("column")),
        "pvalue": float_of(raw.get("pvalue")),
        "pvalue_holm": float_of(raw.get("pvalue_holm")),
        "confounded": text_of(raw.get("confounded")),
        "cost": {key: float_of(cost.get(key)) for key in _COSTS},
        "notes": _sentences(raw.get("notes")),
    }


def _figures(raw: Any) -> Json:
    found = ((clean(str(key)), figure_of(value)) for key, value in (raw or {}).items())
    return {key: figure for key, figure in found if figure is not None}


def _words(raw: Any) -> Json:
    return {clean(str(key)): clean(str(value)) for key, value in (raw or {}).items()}


def _sentences(raw: Any) -> list[str]:
    if not isinstance(raw or [], list):
        raise ValueError("expected a list of sentences")
    return [clean(str(text)) for text in raw or []]


def _curve(raw: Json) -> Json:
    if raw["kind"] not in ("roc", "line"):
        raise ValueError("expected a curve of kind roc or line")
    return {
        "kind": raw["kind"],
        "title": clean(str(raw["title"])),
        "x": _axis(raw.get("x")),
        "y": _axis(raw.get("y")),
        "series": [_series(row) for row in raw.get("series") or []],
    }


def _axis(raw: Any) -> Json:
    raw = raw or {}
    return {"label": text_of(raw.get("label")) or "", "scale": "log" if raw.get("scale") == "log" else "linear"}


def _series(raw: Json) -> Json:
    """One line, without the places where a coordinate is no number; the band is null where it has none.

    Raises:
        ValueError: if the lists differ in length.
    """
    x, y = raw.get("x") or [], raw.get("y") or []
    low, high = (raw.get(side) or [None] * len(x) for side in ("low", "high"))
    points = [[float_of(value) for value in point] for point in zip(x, y, low, high, strict=True)]
    kept = [point for point in points if point[0] is not None and point[1] is not None]
    band = any(point[2] is not None and point[3] is not None for point in kept)
    return {
        "name": clean(str(raw.get("name") or "")),
        "x": [point[0] for point in kept],
        "y": [point[1] for point in kept],
        "low": [point[2] for point in kept] if band else None,
        "high": [point[3] for point in kept] if band else None,
    }


def _table(raw: Json) -> Json:
    """A table whose rows are as wide as its heading.

    Raises:
        ValueError: if one is not.
    """
    columns = [clean(str(name)) for name in raw.get("columns") or []]
    rows = [[_entry(value) for value in row] for row in raw.get("rows") or []]
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("expected rows as wide as the heading")
    return {"title": clean(str(raw["title"])), "columns": columns, "rows": rows}


def _entry(value: Any) -> Any:
    """A number, an answer, a cleaned word or nothing."""
    if isinstance(value, list | dict):
        raise ValueError("expected a word or a number")
    return tree(value)
