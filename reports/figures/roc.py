"""ROC curves on logarithmic axes: what share of the members is found at what share of false alarms.

The false-positive rate of n records never seen is a multiple of 1/n, so the axes begin there, at the smallest rate
above zero that the curves hold; what is found without any false alarm is drawn at that edge. Between two thresholds
nothing is interpolated: a curve is a staircase below the attainable points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from reports.figures.curves import MOST_POINTS, Axis, Curve, curves

STEPS = MOST_POINTS // 2 - 2  # two corners a step, and both ends
LOWEST = 1e-6  # no axis of more than six decades
Points = Sequence[tuple[float, float]]


def roc(name: str, title: str, lines: Sequence[tuple[str, Points]], x: str, y: str) -> Markup:
    """Staircases on logarithmic axes, with the line of chance.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        lines: (label, (false-positive rate, true-positive rate) in ascending order); at most `curves.COLOURS` are told
            apart by colour as well.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    low = min(resolution([points for _, points in lines]) or 0.1, 0.1)
    drawn = [Curve(label, _stairs(points, low)) for label, points in lines]
    chance = Curve("chance", [(low, low), (1.0, 1.0)])
    across, up = (Axis(label, log=True, low=low, high=1.0) for label in (x, y))
    return curves(name, title, drawn, across, up, guide=chance)


def resolution(lines: Iterable[Points]) -> float | None:
    """The smallest false-positive rate above zero in any curve, 1/n of the records never seen; None without one."""
    found = min((rate for points in lines for rate, _ in points if rate > 0), default=None)
    return None if found is None else max(found, LOWEST)


def found_at(points: Points, rate: float) -> float | None:
    """True-positive rate at a false-positive rate: that of the last threshold which does not exceed it.

    None where the curve cannot tell, because a single false alarm is already more than that rate.
    """
    smallest = resolution([points])
    if smallest is None or rate < smallest * (1 - 1e-9):
        return None
    return max((found for at, found in points if at <= rate * (1 + 1e-9)), default=None)


def _stairs(points: Points, low: float) -> list[tuple[float, float]]:
    """Corners of the staircase from the left edge to 1; steps too narrow to be seen are left out."""
    highest: dict[float, float] = {}
    for at, found in points:
        edge = max(at, low) if at > 0 else 0.0
        highest[edge] = max(found, highest.get(edge, 0.0))
    if not highest:
        return []
    width = (1 / low) ** (1 / STEPS)  # of the narrowest step, as a factor
    level = highest.pop(0.0, 0.0)
    corners, last = [(low, level)], 0.0
    for at in sorted(highest):
        level = max(level, highest[at])
        if at >= last * width or at == max(highest):
            corners += [(at, corners[-1][1]), (at, level)]
            last = at
    return [*corners, (1.0, level)]
