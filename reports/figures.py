"""Figures of the report as inline SVG: no script, no font file, colours from the page's CSS variables.

Every function is pure: the same numbers give the same bytes. Colours come from a colour-blind-safe set and each arm
has its own fill pattern and marker as well, so that print in grey and any colour vision can tell them apart. All text
is escaped. The width is fixed at 840 units: a little enlarged on a screen, a little reduced on A4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from reports.text import number, short, signed

WIDTH = 840


@dataclass(frozen=True)
class Mark:
    """One arm's value with its interval, and the words printed beside it."""

    arm: str  # O, U, N or R
    label: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Row:
    """One metric: its marks from top to bottom, and the band they are read against."""

    label: str
    note: str
    marks: Sequence[Mark]
    band: tuple[float, float] | None = None
    limit: float | None = None


def _svg(name: str, height: float, title: str, body: Sequence[str], width: float = WIDTH) -> Markup:
    """Wrap shapes in an SVG with the patterns they use; ids carry `name`, since a page holds several figures."""
    patterns = (
        f'<defs><pattern id="{name}-O" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)">'
        '<rect width="5" height="5" class="f-o0"/><rect width="2.2" height="5" class="f-o"/></pattern>'
        f'<pattern id="{name}-R" width="4" height="4" patternUnits="userSpaceOnUse">'
        '<rect width="4" height="4" class="f-r0"/><circle cx="2" cy="2" r="1" class="f-r"/></pattern></defs>'
    )
    return Markup(
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{patterns}{"".join(body)}</svg>'
    )


def _n(value: float) -> str:
    """Coordinates with one decimal at most."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    css = f' class="{kind}"' if kind else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_n(x)}" y="{_n(y)}"{css}{side}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{kind}"/>'


def _rect(x: float, y: float, width: float, height: float, attributes: str) -> str:
    return f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" {attributes}/>'


def _marker(arm: str, x: float, y: float) -> str:
    """Original: open circle; edited: filled circle; control: square; reference: diamond."""
    if arm == "N":
        return _rect(x - 4, y - 4, 8, 8, 'class="m-n"')
    if arm == "R":
        points = f"{_n(x)},{_n(y - 5.5)} {_n(x + 5.5)},{_n(y)} {_n(x)},{_n(y + 5.5)} {_n(x - 5.5)},{_n(y)}"
        return f'<polygon points="{points}" class="m-r"/>'
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="4.5" class="m-{arm.lower()}"/>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    raw = (high - low) / count
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.6g}") + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


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
        body += [_line(place(at), y, place(at), y + height, "grid") for at in grid]
        if row.band:
            start, end = place(row.band[0]), place(row.band[1])
            body.append(_rect(start, y, max(end - start, 2), height, 'class="band"'))
        if row.limit is not None:
            body.append(_line(place(row.limit), y - 2, place(row.limit), y + height + 2, "limit"))
        if differences:
            body.append(_line(place(0), y - 2, place(0), y + height + 2, "zero"))
        body.append(_text(0, y + 14, short(row.label, 26), "strong"))
        if row.note:
            body.append(_text(0, y + 29, short(row.note, 32), "soft"))
        for index, mark in enumerate(row.marks):
            middle = y + height / len(row.marks) * (index + 0.5)
            body.append(_text(left - 10, middle + 4, mark.label, "soft", "end"))
            if unit:
                fill = f'fill="url(#{name}-{mark.arm})"' if mark.arm in "OR" else f'class="f-{mark.arm.lower()}"'
                body.append(_rect(left, middle - 5.5, max(place(mark.value) - left, 1), 11, fill))
            if mark.low is not None and mark.high is not None:
                x1, x2 = place(mark.low), place(mark.high)
                body.append(_line(x1, middle, x2, middle, "halo"))
                body.append(_line(x1, middle, x2, middle, "whisker"))
                body += [_line(x, middle - 3.5, x, middle + 3.5, "whisker") for x in (x1, x2)]
            if not unit:
                body.append(_marker(mark.arm, place(mark.value), middle))
            body.append(_text(right + 14, middle + 4, mark.text, "value"))
        y += height
        if not unit or row is rows[-1]:
            body += [_text(place(at), y + 12, _tick(at, differences), "tick", "middle") for at in grid]
            y += 16
        y += 14
    return _svg(name, y - 6, title, body)


def _tick(value: float, sign: bool) -> str:
    text = f"{value:g}".replace("-", "−")
    return f"+{text}" if sign and value > 0 else text


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


def heat_map(name: str, title: str, cells: dict[tuple[str, int], float], roles: Sequence[str], blocks: int) -> Markup:
    """Layer by module map: darker = larger relative change; an outlined cell was not changed.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        cells: relative change by (role, block index).
        roles: row labels from top to bottom.
        blocks: number of columns.
    """
    left, top, height = 118.0, 20.0, 21.0
    width = min(30.0, (WIDTH - left - 4) / max(blocks, 1))
    largest = max(cells.values(), default=0.0)
    every = next((step for step in (1, 2, 5, 10, 20, 50) if step * width >= 22), 100)
    body = [
        _text(left + (block + 0.5) * width, top - 7, str(block), "tick", "middle") for block in range(0, blocks, every)
    ]
    body.append(_text(left - 10, top - 7, "block", "tick", "end"))
    gap = 1.0 if width > 8 else 0.3
    for index, role in enumerate(roles):
        y = top + index * height
        body.append(_text(left - 10, y + 14.5, short(role, 18), "soft", "end"))
        for block in range(blocks):
            value = cells.get((role, block), 0.0)
            box = (left + block * width + gap, y + gap, width - 2 * gap, height - 2 * gap)
            share = 0.12 + 0.88 * value / largest if value and largest else 0.0
            body.append(_rect(*box, f'class="heat" fill-opacity="{share:.2f}"' if share else 'class="cold"'))
    y = top + len(roles) * height + 18
    body.append(_rect(left + 1, y - 10, 14, 13, 'class="cold"'))
    body.append(_text(left + 21, y + 1, "not changed", "tick"))
    for index in range(5):
        box = (left + 110 + 26 * index, y - 10, 25, 13)
        body.append(_rect(*box, f'class="heat" fill-opacity="{0.12 + 0.88 * (index + 1) / 5:.2f}"'))
    body.append(_text(left + 248, y + 1, f"up to {number(100 * float(largest))} %", "tick"))
    return _svg(name, y + 8, title, body)


def dumbbells(name: str, title: str, rows: Sequence[tuple[str, Sequence[Mark]]], never_seen: float | None) -> Markup:
    """One line per record on an axis from 0 to 1: its value before, after and under the reference, joined by a rule.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        rows: (record id, marks), worst first.
        never_seen: mean level of never-seen control records, drawn as a dashed line; None if there is none.
    """
    left, right, line = 180.0, 680.0, 17.0
    body = []

    def place(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0), 1.0)

    bottom = 8 + line * len(rows)
    for at in (0.0, 0.25, 0.5, 0.75, 1.0):
        body += [
            _line(place(at), 4, place(at), bottom, "grid"),
            _text(place(at), bottom + 15, f"{at:g}", "tick", "middle"),
        ]
    if never_seen is not None:
        body.append(_line(place(never_seen), 0, place(never_seen), bottom + 4, "limit"))
    for index, (label, marks) in enumerate(rows):
        y = 8 + line * (index + 0.5)
        body.append(_text(left - 12, y + 4, short(label, 22), "mono", "end"))
        values = [place(mark.value) for mark in marks]
        if len(values) > 1:
            body.append(_line(min(values), y, max(values), y, "join"))
        # the latest state is drawn last, so that it is never hidden
        body += [
            _marker(mark.arm, place(mark.value), y) for mark in sorted(marks, key=lambda mark: "NROU".index(mark.arm))
        ]
        body.append(
            _text(right + 14, y + 4, " → ".join(number(mark.value) for mark in marks if mark.arm in "OU"), "value")
        )
    return _svg(name, bottom + 22, title, body)


def key(arms: Sequence[tuple[str, str]]) -> Markup:
    """Legend of markers: (arm, words) side by side."""
    items = []
    for arm, words in arms:
        shape = _line(2, 7, 16, 7, "limit") if arm == "-" else _marker(arm, 9, 7)
        items.append(
            f'<span class="key"><svg viewBox="0 0 18 14" width="18" height="14" aria-hidden="true">{shape}</svg>'
            f"{escape(words)}</span>"
        )
    return Markup("".join(items))


def describe(rows: Sequence[Row], *, differences: bool = False) -> str:
    """Text alternative of `bars`: every value in words."""
    show = signed if differences else number
    return ". ".join(
        f"{row.label}: " + ", ".join(f"{mark.label.lower()} {mark.text or show(mark.value)}" for mark in row.marks)
        for row in rows
    )
