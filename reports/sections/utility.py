"""Section 9: what the edit cost elsewhere, as paired differences."""

from __future__ import annotations

from collections.abc import Sequence

from reports import figures
from reports.blocks import Block, Cell, Chart, Prose, figure_cell, number_cell, table
from reports.figures import Mark, Row
from reports.text import Json, metric_label, signed

DRAWN = 16


def utility(report: Json) -> list[Block] | str:
    """Differences with intervals against the margins of the criteria, and whether the edit overshot."""
    if report["utility"]["status"] == "not_run":
        return str(report["utility"]["reason"])
    margins = {
        f"{row['set'] or 'records'}.{row['metric']}": abs(row["margin"])
        for row in report["criteria"]
        if row["margin"] is not None
    }
    rows, lines = [], []
    for name, row in report["utility"]["figures"].items():
        change, margin = row["difference"], margins.get(name)
        if change and change["value"] is not None:
            rows.append(_row(name, change, margin))
        cells = [
            figure_cell(row["before"], name),
            figure_cell(row["after"], name),
            figure_cell(change, difference=True),
        ]
        lines.append([Cell(metric_label(name)), *cells, number_cell(margin)])
    columns = ("Figure", "Before", "After", "Change", "Margin")
    return [
        *_chart(rows[:DRAWN]),
        table("Paired differences", columns, lines, "utility", (4,)),
        *over_forgetting(report),
    ]


def over_forgetting(report: Json) -> list[Block]:
    """The statement on overshooting the never-seen level, as a note when it is flagged."""
    over = report["utility"]["over_forgetting"]
    if not over or not over["statement"]:
        return []
    return [Prose(f"Over-forgetting: {over['statement']}", "open" if over["flag"] else "")]


def _row(name: str, change: Json, margin: float | None) -> Row:
    worse = {"lower": 1, "higher": -1}.get(change["direction"])
    better = f"{change['direction']} is better" if worse else ""
    mark = Mark("U", "Change", change["value"], change["ci_low"], change["ci_high"], signed(change["value"]))
    return Row(
        metric_label(name.removeprefix("retain.")),
        better,
        [mark],
        None,
        worse * margin if worse and margin is not None else None,
    )


def _chart(rows: Sequence[Row]) -> list[Block]:
    if not rows:
        return []
    title = "Change of the retained behaviour, after minus before, with 95 % intervals"
    svg = figures.bars("utility", f"{title}; the table below holds the data", rows, unit=False, differences=True)
    dashed = "; dashed: the margin of the criterion" if any(row.limit is not None for row in rows) else ""
    return [Chart(svg, f"{title}{dashed}.", f"{title}. {figures.describe(rows)}.")]
