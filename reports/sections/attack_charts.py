"""The charts of the attacks: ROC curves and lines, each followed by the table of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reports import figures
from reports.blocks import Block, Cell, Chart, number_cell, table
from reports.figures import Axis, Curve
from reports.text import Json, number, sentence_case

ROWS = 12  # of a table
RATES = (0.001, 0.01, 0.05, 0.1, 0.5)
NamedSeries = tuple[str, Json]  # label, series


def roc_chart(id_: str, title: str, curve: Json, lines: Sequence[NamedSeries], source: str) -> list[Block]:
    """ROC curves on logarithmic axes, and the true-positive rates at the false-positive rates that can be told apart.

    Args:
        id_: prefix of the element ids.
        title: caption and text alternative.
        curve: what names the axes.
        lines: the curves.
        source: place in the JSON document.
    """
    points = [(label, list(zip(series["x"], series["y"], strict=True))) for label, series in lines]
    x = curve["x"]["label"] or "false-positive rate"
    y = curve["y"]["label"] or "true-positive rate"
    smallest = figures.resolution(found for _, found in points)
    rates = [smallest] if smallest is not None and smallest < 1 else []
    rates += [rate for rate in RATES if smallest is not None and rate > smallest * (1 + 1e-9)]
    cells = [[figures.found_at(found, rate) for _, found in points] for rate in rates]
    said = "; ".join(
        f"{label}: " + ", ".join(f"{number(row[at])} at {number(rate)}" for rate, row in zip(rates, cells, strict=True))
        for at, (label, _) in enumerate(points)
    )
    caption = (
        f"{title}. Both axes are logarithmic and begin at the smallest false-positive rate that can be told apart."
    )
    svg = figures.roc(id_, f"{title}; the table below holds the data", points, x, y)
    rows = [
        [Cell(number(rate)), *(number_cell(value) for value in row)] for rate, row in zip(rates, cells, strict=True)
    ]
    columns = (sentence_case(x), *(label for label, _ in lines))
    data = table(f"{title}: {y} by {x}", columns, rows, source, range(1, len(columns)))
    return [Chart(svg, caption, f"{title}. {sentence_case(y)} at a {x}: {said or 'none'}."), data]


def line_chart(
    id_: str,
    title: str,
    curve: Json,
    lines: Sequence[NamedSeries],
    source: str,
    *,
    dashes: Sequence[int] = (),
    intervals: bool = False,
    share: bool = False,
    from_zero: bool = False,
    guide: Curve | None = None,
) -> list[Block]:
    """Lines with their bands, and the table of their values at `ROWS` places at most, evenly spread.

    Args:
        id_: prefix of the element ids.
        title: caption and text alternative.
        curve: what names the axes.
        lines: the series.
        source: place in the JSON document.
        dashes: the pattern of each line; solid where there is none.
        intervals: the table gives each value's interval as well.
        share: the axis runs from 0 to 1 where all values lie there, so that a small rise looks small.
        from_zero: the axis begins at 0 where no value is below.
        guide: a level to read the lines against, which the caption names.
    """
    patterns = [*dashes, *[0] * len(lines)][: len(lines)]
    drawn = [
        Curve(
            label,
            list(zip(series["x"], series["y"], strict=True)),
            band=[(x, low, high) for x, (low, high) in _ends(series).items()],
            dash=dash,
        )
        for (label, series), dash in zip(lines, patterns, strict=True)
    ]
    x, y = (Axis(curve[axis]["label"], log=curve[axis]["scale"] == "log") for axis in ("x", "y"))
    if share and all(0 <= up <= 1 for line in drawn for _, up in line.points):
        y = replace(y, low=0.0, high=1.0)
    elif from_zero and all(up >= 0 for line in drawn for _, up in line.points):
        y = replace(y, low=0.0)
    places = sorted({at for line in drawn for at, _ in line.points})
    whole = all(float(at).is_integer() for at in places)
    step = max(len(places) - 1, 1) / (ROWS - 1)
    kept = places if len(places) <= ROWS else [places[round(index * step)] for index in range(ROWS)]
    values = [dict(line.points) for line in drawn]
    around = [_ends(series) if intervals else {} for _, series in lines]
    rows = [
        [
            Cell(_place(at, whole)),
            *(_value(value.get(at), ends.get(at)) for value, ends in zip(values, around, strict=True)),
        ]
        for at in kept
    ]
    said = "; ".join(
        f"{line.label}: from {number(line.points[0][1])} at {_place(line.points[0][0], whole)} "
        f"to {number(line.points[-1][1])} at {_place(line.points[-1][0], whole)}"
        for line in drawn
        if line.points
    )
    shaded = " Shaded: the intervals." if any(line.band for line in drawn) else ""
    columns = (sentence_case(x.label) or "x", *(label for label, _ in lines))
    data = table(f"{title}: {y.label or 'values'}", columns, rows, source, range(1, len(columns)))
    data = replace(data, omitted=len(places) - len(kept), total=len(places))
    level = f" Dashed: {guide.label} {number(guide.points[0][1])}." if guide and guide.points else ""
    svg = figures.curves(id_, f"{title}; the table below holds the data", drawn, x, y, guide=guide)
    return [Chart(svg, f"{title}.{shaded}{level}", f"{title}. {y.label} by {x.label}: {said}.{level}"), data]


def _ends(series: Json) -> dict[float, tuple[float, float]]:
    """Place -> interval, where a series has one."""
    if not series["low"] or not series["high"]:
        return {}
    triples = zip(series["x"], series["low"], series["high"], strict=True)
    return {x: (low, high) for x, low, high in triples if low is not None and high is not None}


def _place(at: float, whole: bool) -> str:
    """A place on the x axis: steps and counts without decimals."""
    return number(int(at)) if whole else number(at)


def _value(value: float | None, ends: tuple[float, float] | None) -> Cell:
    cell = number_cell(value)
    return replace(cell, detail=f"{number(ends[0])} to {number(ends[1])}") if ends and value is not None else cell
