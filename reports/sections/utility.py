"""Section 9: what the edit cost elsewhere, as paired differences."""

from __future__ import annotations

from collections.abc import Sequence

from reports import figures
from reports.arms import edited, present_arms
from reports.blocks import Block, Cell, Chart, Line, Prose, figure_cell, number_cell, table
from reports.durability import collateral
from reports.figures import Mark, Row
from reports.sections.attack_details import Room, details
from reports.sections.attacks import figure_title, not_run, purpose
from reports.text import Json, metric_label, sentence_case, short, signed, unit_words

DRAWN = 16


def utility(report: Json, audience: str) -> list[Block] | str:
    """Differences with intervals against the margins of the criteria, whether the edit overshot, what else it changed.

    Args:
        report: what `build` returns.
        audience: engineer (with the details of what else changed) or regulator.
    """
    others = _collateral(report, engineer=audience == "engineer") if edited(report) else []
    if report["utility"]["status"] == "not_run":
        reason = str(report["utility"]["reason"])
        return [Prose(f"not run: {reason}."), *over_forgetting(report), *others] if others else reason
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
        *others,
    ]


def _collateral(report: Json, *, engineer: bool) -> list[Block]:
    """What else the edit changed: one figure each before and after, then those that did not run."""
    rows = collateral(report)
    if not rows:
        return []
    reference = "R" in present_arms(report)
    lines = []
    for row in (row for row in rows if row["status"] == "run"):
        before, after, other = (row["arms"][arm] for arm in "OUR")
        shown = next((figure for figure in (after, before, other) if figure), {"unit": "", "direction": "none"})
        better = f"{shown['direction']} is better" if shown["direction"] != "none" else ""
        notes = (purpose(row, budget=False), unit_words(shown["unit"]), better)
        title = sentence_case(figure_title(report, row))
        lines.append(
            Line(
                [
                    Cell(short(title, 100), "\n".join(text for text in notes if text)),
                    figure_cell(before),
                    figure_cell(after),
                    *([figure_cell(other)] if reference else []),
                    number_cell(None) if None in (_value(before), _value(after)) else _difference(before, after),
                ]
            )
        )
    for reason, names in not_run(rows).items():
        lines.append(Line([Cell(f"not run: {short(reason, 300)}", tone="muted"), Cell(names)], "span"))
    columns = ("Figure", "Before", "After", *(["Reference"] if reference else []), "Difference")
    parts = details(report, only=[row["name"] for row in rows], room=Room(charts=4, letters=40_000)) if engineer else []
    return [
        table("What else the edit changed", columns, lines, "attacks[]", (len(columns) - 1,)),
        Prose("A difference here is that of the two figures before it, without an interval of its own."),
        *parts,
    ]


def _value(figure: Json | None) -> float | None:
    return figure["value"] if figure else None


def _difference(before: Json, after: Json) -> Cell:
    return Cell(signed(after["value"] - before["value"]), style="num")


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
