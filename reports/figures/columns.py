"""Columns: one a block with whiskers, or two sets of values counted in the same bins, mirrored."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from reports.figures.shapes import WIDTH, Mark, rect, rule, svg, tick, ticks, words
from reports.text import number


def columns(name: str, title: str, marks: Sequence[Mark], label: str) -> Markup:
    """One column per block from zero, upwards or downwards, with its interval.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        marks: one per column from left to right; the label is printed below it.
        label: what the height shows, with its unit.
    """
    left, right, top, bottom = 64.0, float(WIDTH) - 8, 22.0, 190.0
    values = [0.0, *(v for mark in marks for v in (mark.value, mark.low, mark.high) if v is not None)]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0

    def place(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    body = [words(left, 11, label, "tick")]
    for value in ticks(low, high):
        body += [
            rule(left, place(value), right, place(value), "grid"),
            words(left - 8, place(value) + 4, tick(value), "tick", "end"),
        ]
    width = min(34.0, (right - left) / max(len(marks), 1))
    every = next((step for step in (1, 2, 5, 10, 20, 50) if step * width >= 22), 100)
    for index, mark in enumerate(marks):
        middle = left + (index + 0.5) * width
        ends = sorted((place(mark.value), place(0.0)))
        body.append(rect(middle - 0.36 * width, ends[0], 0.72 * width, max(ends[1] - ends[0], 0.5), 'class="f-u"'))
        if mark.low is not None and mark.high is not None:
            body.append(rule(middle, place(mark.low), middle, place(mark.high), "halo"))
            body.append(rule(middle, place(mark.low), middle, place(mark.high), "whisker"))
        if index % every == 0:
            body.append(words(middle, bottom + 15, mark.label, "tick", "middle"))
    body += [
        rule(left, place(0.0), right, place(0.0), "axis"),
        words(left - 8, bottom + 15, "block", "tick", "end"),
    ]
    return svg(name, bottom + 22, title, body)


def histogram(
    name: str, title: str, upper: tuple[str, Sequence[int]], lower: tuple[str, Sequence[int]], edges: Sequence[float]
) -> Markup:
    """Two sets of values in the same bins, one upwards and one downwards, each as a share of its set.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        upper: (words, count per bin) of the set drawn upwards.
        lower: the same of the set drawn downwards; its counts may all be zero.
        edges: ends of the bins, ascending, one more than there are bins.
    """
    left, right, half = 118.0, 700.0, 84.0
    shares = [[count / max(sum(counts), 1) for count in counts] for _, counts in (upper, lower)]
    peak = max(max(side, default=0.0) for side in shares) or 1.0
    two = sum(lower[1]) > 0
    middle, bottom = 10 + half, 10 + half * (2 if two else 1)
    body = []

    def place(value: float) -> float:
        return left + (right - left) * (value - edges[0]) / (edges[-1] - edges[0])

    for value in ticks(edges[0], edges[-1], 6):
        body += [
            rule(place(value), 10, place(value), bottom, "grid"),
            words(place(value), bottom + 15, tick(value), "tick", "middle"),
        ]
    fills = (f'fill="url(#{name}-O)"', 'class="f-n"')
    for side, (start, share) in enumerate(zip((-1, 1), shares, strict=True)):
        for index, value in enumerate(share):
            x, width, height = place(edges[index]), place(edges[index + 1]) - place(edges[index]), half * value / peak
            if value:
                body.append(rect(x + 0.8, middle - height if start < 0 else middle, width - 1.6, height, fills[side]))
    body.append(rule(left, middle, right, middle, "axis"))
    for (label, counts), y in zip((upper, lower), (middle - half / 2, middle + half / 2), strict=True):
        if sum(counts):
            body += [
                words(left - 10, y, label, "soft", "end"),
                words(left - 10, y + 15, f"n = {number(sum(counts))}", "tick", "end"),
            ]
    body.append(words(right + 12, 20, f"tallest: {number(100 * peak)} %", "tick"))
    return svg(name, bottom + 22, title, body)
