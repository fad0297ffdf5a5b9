"""Which rows of attacks[] are about the edit itself: attacks that test whether it forgot or hid, and looks at what else
it changed. Both have a section of their own.
"""

from __future__ import annotations

from reports.arms import edited
from reports.text import Json, family_of, stress_group

RELEARNING = "recovery.relearning"
COLLATERAL = "collateral"


def on_the_edit(report: Json) -> list[Json]:
    """The rows that test the edit, in reading order; none in a run without an edited checkpoint."""
    if "robustness" not in report or not edited(report):
        return []
    rows = {row["name"]: row for row in report["attacks"]}
    return [rows[name] for name in report["robustness"]["attacks"]]


def collateral(report: Json) -> list[Json]:
    """The rows on what else the edit changed, which are no attacks; none in a run of one of them alone."""
    if "utility" not in report:
        return []
    return [row for row in report["attacks"] if family_of(row["name"]) == COLLATERAL]


def line_curve(detail: Json | None, title: str = "") -> Json | None:
    """The line chart of a result that has this title, or else its first one; None where it has none."""
    curves = detail["curves"] if detail else []
    lines = [row for row in curves if row["kind"] == "line" and any(series["x"] for series in row["series"])]
    return next((row for row in lines if row["title"] == title), lines[0] if lines else None)


def relearning_curve(report: Json) -> str | None:
    """The attack whose curve stands beside the finding: relearning on half of the records, or else the first."""
    found = report["run"]["attacks"]["after"] or {}
    names = [row["name"] for row in on_the_edit(report) if stress_group(row["name"])[0] == "Relearning"]
    names = [name for name in names if line_curve(found.get(name))]
    return next((name for name in names if name == RELEARNING), names[0] if names else None)
