"""Figures of the report as inline SVG: no script, no font file, colours from the page's CSS variables.

Every function is pure: the same numbers give the same bytes. Colours come from a colour-blind-safe set and each arm
has its own fill pattern and marker as well, so that print in grey and any colour vision can tell them apart; lines of
one chart are named at their ends. All text is escaped. The width is fixed at 840 units: a little enlarged on a screen,
a little reduced on A4.
"""

from __future__ import annotations

from reports.figures.bars import Row, bars, describe
from reports.figures.chain import Link, chain
from reports.figures.columns import columns, histogram
from reports.figures.curves import Axis, Curve, curves
from reports.figures.dots import dumbbells, key
from reports.figures.heat import heat_map
from reports.figures.roc import found_at, resolution, roc
from reports.figures.shapes import WIDTH, Mark, ticks

__all__ = [
    "WIDTH",
    "Axis",
    "Curve",
    "Link",
    "Mark",
    "Row",
    "bars",
    "chain",
    "columns",
    "curves",
    "describe",
    "dumbbells",
    "found_at",
    "heat_map",
    "histogram",
    "key",
    "resolution",
    "roc",
    "ticks",
]
