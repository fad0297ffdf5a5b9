"""Curves on linear or logarithmic axes, each named at its end, with its band, and a mark where it is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from reports.figures.shapes import WIDTH, decade, px, rule, svg, tick, ticks, words
from reports.text import short

MOST_POINTS = 160  # a longer curve is thinned out: more than one point every three units is never seen
COLOURS = 6
DASHES = 5  # patterns of lines, the solid one first
NEAR = 40.0  # a line that ends within this distance of the right edge is joined with its name


@dataclass(frozen=True)
class Axis:
    """What an axis shows, its ends, and whether it is logarithmic.

    On a logarithmic axis, values that are not positive are left out; values beyond a given end are drawn at that end.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """One line; beyond `cut`, a place on the x axis, it is drawn dotted; `band` holds (x, low, high) around it.

    `dash` is one of `DASHES` patterns, so that lines differ without colour where they cross; 0 is a solid line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    cut: float | None = None
    band: Sequence[tuple[float, float, float]] = ()
    dash: int = 0


def curves(
    name: str,
    title: str,
    lines: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    kept: str = "",
    dropped: str = "",
    guide: Curve | None = None,
) -> Markup:
    """Lines over one plane, named at their ends so that colour is not needed to tell them apart.

    A line that ends at the right edge is joined with its name; one that ends before carries a letter there.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        lines: at most `COLOURS` are told apart by colour as well.
        x: horizontal axis.
        y: vertical axis.
        kept: words left of the cut, written where a single line has one.
        dropped: words right of it.
        guide: a level to read the lines against, drawn dashed; its points count for the ends of the axes.
    """
    left, right, top, bottom = 64.0, 596.0, 22.0, 250.0
    drawn = [(line, _inside(line.points, x, y)) for line in lines]
    bands = [_band(line.band, x, y) for line in lines]
    level = _inside(guide.points, x, y) if guide else []
    every = [point for _, points in drawn for point in points]
    every += [(across, up) for band in bands for across, *ends in band for up in ends]
    every += level if every else []
    if not every:
        return svg(name, 40, title, [words(left, 20, "nothing to draw", "soft")])
    across, up = _scale(x, [point[0] for point in every]), _scale(y, [point[1] for point in every])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + (right - left) * across.share(point[0]), bottom - (bottom - top) * up.share(point[1])

    body = [words(left, 11, y.label, "tick"), words(right, bottom + 32, x.label, "tick", "end")]
    for value in across.ticks:
        at = place((value, up.low))[0]
        text = decade(value) if x.log else tick(value)
        body += [rule(at, top, at, bottom, "grid"), words(at, bottom + 15, text, "tick", "middle")]
    for value in up.ticks:
        at = place((across.low, value))[1]
        text = decade(value) if y.log else tick(value)
        body += [rule(left, at, right, at, "grid"), words(left - 8, at + 4, text, "tick", "end")]
    body += [rule(left, bottom, right, bottom, "axis"), rule(left, top, left, bottom, "axis")]
    if not x.log and across.low < 0 < across.high:
        body.append(rule(place((0.0, up.low))[0], top, place((0.0, up.low))[0], bottom, "zero"))
    if guide and level:
        body += _guide([place(point) for point in level], guide.label)
    for index, band in enumerate(bands):
        edges = [place((across, up)) for across, up, _ in band] + [place((at, up)) for at, _, up in reversed(band)]
        corners = " ".join(f"{px(across)},{px(up)}" for across, up in edges)
        body += [f'<polygon points="{corners}" class="spread c{index % COLOURS}"/>'] if len(band) > 1 else []
    ends, cuts = [], []
    for index, (line, points) in enumerate(drawn):
        if not points:
            continue
        placed = [place(point) for point in points]
        colour = _kind(index, line.dash)
        edge = place((line.cut, up.low))[0] if line.cut is not None and (line.cut > 0 or not x.log) else None
        first, second = _split(placed, edge)
        body += [_path(first, colour), _path(second, f"{colour} dropped")]
        if edge is not None and first:
            cuts.append((first[-1] if second else (min(edge, right), placed[-1][1]), index))
        ends.append((placed[-1], index, line.label))
    alone = len(cuts) == 1 and len(ends) == 1
    for (at_x, at_y), index in cuts:
        body.append(rule(at_x, top if alone else at_y, at_x, bottom, "limit" if alone else "edge"))
        body.append(f'<circle cx="{px(at_x)}" cy="{px(at_y)}" r="3.6" class="cut c{index % COLOURS}"/>')
        if alone:
            body += [words(at_x - 7, top + 12, kept, "soft", "end"), words(at_x + 7, top + 12, dropped, "soft")]
    key = 26 if any(line.dash for line in lines) else 14  # long enough to show a pattern
    heights = _apart([end_y for (_, end_y), _, _ in ends], top, bottom)
    for height, ((end_x, end_y), index, label) in zip(heights, ends, strict=True):
        letter = "" if right - end_x <= NEAR else f"{'abcdef'[index % COLOURS]}: "
        if letter:
            body.append(words(end_x + 3, end_y - 4, letter[0], "strong"))
        else:
            body.append(rule(end_x + 3, end_y, right + 14, height, "leader"))
        body.append(rule(right + 16, height, right + 16 + key, height, _kind(index, lines[index].dash)))
        body.append(words(right + 22 + key, height + 4, short(f"{letter}{label}", 34), "soft"))
    return svg(name, bottom + 40, title, body, WIDTH)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool
    ticks: Sequence[float]

    def share(self, value: float) -> float:
        """Where a value lies between the ends, from 0 to 1."""
        low, high = (math.log10(end) if self.log else end for end in (self.low, self.high))
        at = math.log10(value) if self.log else value
        return min(max((at - low) / (high - low), 0.0), 1.0)


def _scale(axis: Axis, values: Sequence[float]) -> _Scale:
    """An axis from the smallest to the largest value, or where the axis says it ends."""
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if not axis.log:
        if high <= low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        return _Scale(low, high, log=False, ticks=ticks(low, high, 5))
    if high / low < 10:  # at least one decade, so that there is a tick to read
        low, high = (low / math.sqrt(10), high * math.sqrt(10)) if axis.low is None else (low, 10 * low)
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 8))
    return _Scale(low, high, log=True, ticks=[10.0**power for power in range(first, last + 1, step)])


def _inside(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float]]:
    """The points that the axes can show, thinned out to `MOST_POINTS` with both ends kept."""
    return [(across, up) for across, up, _ in _band([(across, up, up) for across, up in points], x, y)]


def _band(points: Sequence[tuple[float, float, float]], x: Axis, y: Axis) -> list[tuple[float, float, float]]:
    """The ends of a band that the axes can show, thinned out in the same way."""
    lowest = 0.0 if y.low is None else y.low
    shown = [
        (across, max(low, lowest), max(high, lowest)) if y.log else (across, low, high)
        for across, low, high in points
        if (across > 0 or not x.log) and (max(low, lowest) > 0 or not y.log)
    ]
    if len(shown) <= MOST_POINTS:
        return shown
    step = (len(shown) - 1) / (MOST_POINTS - 1)
    return [shown[round(index * step)] for index in range(MOST_POINTS)]


def _kind(index: int, dash: int) -> str:
    """The classes that draw a line: its colour, and its pattern unless it is solid."""
    return f"curve c{index % COLOURS}" + (f" d{dash % DASHES}" if dash % DASHES else "")


def _guide(placed: Sequence[tuple[float, float]], text: str) -> list[str]:
    """A dashed line, its name below it at three quarters of its last stretch."""
    (x1, y1), (x2, y2) = placed[-2] if len(placed) > 1 else placed[-1], placed[-1]
    return [_path(placed, "curve guide"), words(x1 + 0.75 * (x2 - x1) + 8, y1 + 0.75 * (y2 - y1) + 12, text, "tick")]


def _split(
    placed: Sequence[tuple[float, float]], edge: float | None
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """A drawn line in two at a place on the x axis, meeting there."""
    if edge is None or edge >= placed[-1][0]:
        return list(placed), []
    if edge <= placed[0][0]:
        return [placed[0]], list(placed)
    for index, (before, after) in enumerate(pairwise(placed)):
        if before[0] <= edge < after[0]:
            share = (edge - before[0]) / (after[0] - before[0])
            middle = (edge, before[1] + share * (after[1] - before[1]))
            return [*placed[: index + 1], middle], [middle, *placed[index + 1 :]]
    return list(placed), []


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    if len(points) < 2:
        return ""
    steps = "L".join(f"{px(x)} {px(y)}" for x, y in points)
    return f'<path d="M{steps}" class="{kind}"/>'


def _apart(heights: Sequence[float], top: float, bottom: float, gap: float = 16.0) -> list[float]:
    """Heights of the labels: as near to the lines' ends as a gap between them allows."""
    order = sorted(range(len(heights)), key=lambda index: (heights[index], index))
    placed: list[float] = []
    for index in order:
        placed.append(max(heights[index], placed[-1] + gap if placed else top))
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], (placed[index + 1] if index + 1 < len(placed) else bottom + gap) - gap)
    result = [0.0] * len(heights)
    for position, index in enumerate(order):
        result[index] = placed[position]
    return result
