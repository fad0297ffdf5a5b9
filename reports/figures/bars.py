"""Horizontal bars and markers with whiskers: one group per metric, one mark per arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.figures.shapes import Mark, marker, rect, rule, svg, tick, ticks, words
from reports.text import number, short, signed


@dataclass(frozen=True)
class Row:
    """One metric: its marks from top to bottom, and the band they are read against."""

    label: str
    note: str
    marks: Sequence[Mark]
    band: tuple[float, float] | None = None
    limit: float | None = None


def bars(name: str, title: str, rows: Sequence[Row], *, unit: bool, differences: bool = False) -> Markup:
    """Horizontal bars (figures between 0 and 1 on one axis) or markers (each metric on its own axis), with whiskers.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        rows: one group per metric; its band is shaded behind the marks, its limit drawn as a dashed line.
        unit: all figures lie in [0, 1] and share one axis from 0 to 1.
        differences: the axis is symmetrical about 0 and 0 is drawn.
    """
    left, right, line = 274.0, 700.0, 19.0
    body: list[str] = []
    y = 6.0
    for row in rows:
        height = max(line * len(row.marks), 30.0)
        low, high = (0.0, 1.0) if unit else _domain(row, differences)

        def place(value: float, low: float = low, high: float = high) -> float:
            return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

        grid = [0.0, 0.25, 0.5, 0.75, 1.0] if unit else ticks(low, high)
        body += [rule(place(at), y, place(at), y + height, "grid") for at in grid]
        if row.band:
            start, end = place(row.band[0]), place(row.band[1])
            body.append(rect(start, y, max(end - start, 2), height, 'class="band"'))
        if row.limit is not None:
            body.append(rule(place(row.limit), y - 2, place(row.limit), y + height + 2, "limit"))
        if differences:
            body.append(rule(place(0), y - 2, place(0), y + height + 2, "zero"))
        body.append(words(0, y + 14, short(row.label, 26), "strong"))
        if row.note:
            body.append(words(0, y + 29, short(row.note, 32), "soft"))
        for index, mark in enumerate(row.marks):
            middle = y + height / len(row.marks) * (index + 0.5)
            body.append(words(left - 10, middle + 4, mark.label, "soft", "end"))
            if unit:
                fill = f'fill="url(#{name}-{mark.arm})"' if mark.arm in "OR" else f'class="f-{mark.arm.lower()}"'
                body.append(rect(left, middle - 5.5, max(place(mark.value) - left, 1), 11, fill))
            if mark.low is not None and mark.high is not None:
                x1, x2 = place(mark.low), place(mark.high)
                body.append(rule(x1, middle, x2, middle, "halo"))
                body.append(rule(x1, middle, x2, middle, "whisker"))
                body += [rule(x, middle - 3.5, x, middle + 3.5, "whisker") for x in (x1, x2)]
            if not unit:
                body.append(marker(mark.arm, place(mark.value), middle))
            body.append(words(right + 14, middle + 4, mark.text, "value"))
        y += height
        if not unit or row is rows[-1]:
            body += [words(place(at), y + 12, tick(at, sign=differences), "tick", "middle") for at in grid]
            y += 16
        y += 14
    return svg(name, y - 6, title, body)


def _domain(row: Row, differences: bool) -> tuple[float, float]:
    """Axis of one metric: everything drawn, with a little air; symmetrical for differences."""
    values = [v for mark in row.marks for v in (mark.value, mark.low, mark.high) if v is not None]
    values += [*(row.band or ()), *([row.limit] if row.limit is not None else [])]
    if differences:
        reach = max((abs(value) for value in values), default=0.0) * 1.12 or 1.0
        return -reach, reach
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - air, high + air


def describe(rows: Sequence[Row], *, differences: bool = False) -> str:
    """Text alternative of `bars`: every value in words."""
    show = signed if differences else number
    return ". ".join(
        f"{row.label}: " + ", ".join(f"{mark.label.lower()} {mark.text or show(mark.value)}" for mark in row.marks)
        for row in rows
    )
