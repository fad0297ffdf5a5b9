"""The condition probe: how evenly each weight matrix treats its directions, compared with a random one of its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reports.blocks import Block, Cell, Prose, Table, number_cell, shape_cell, table
from reports.sections.grid import grid, place_words, role_words
from reports.sections.probe_parts import about, warnings
from reports.text import Json, number, short

TITLE = "Condition of the weight matrices"
SHOWS = (
    "The condition number κ is the largest singular value over the smallest. Its usual size depends on a matrix's "
    "shape, so it is also printed relative to that of a random Gaussian matrix of the same shape: about 1 means like "
    "noise. The stable and the effective rank say in how many directions a matrix is large; relative values below 1 "
    "mean that few directions dominate."
)
SHOWS_NOT = "All of this comes from the weights alone, without any data, so it says nothing about a record."
MOST = 12  # rows of each table
SOURCE = "run.probes.condition.tensors[]"


def condition(result: Json, audience: str) -> list[Block]:
    """Blocks of the condition probe.

    Args:
        result: `run.probes.condition`.
        audience: the tables per matrix are for the engineer.
    """
    rows = result["tensors"]
    blocks: list[Block] = [about(result), Prose(f"{SHOWS} {SHOWS_NOT}"), *warnings(result)]
    if not rows:
        return [*blocks, Prose("Matrices not run: none was listed.")]
    blocks += _heat(rows)
    if audience != "engineer":
        return blocks
    return [*blocks, *_tables(rows)]


def _heat(rows: Sequence[Json]) -> list[Block]:
    """Relative condition number by block and module."""
    cells: dict[tuple[str, int], float | None] = {}
    for row in rows:
        if row["block"] is not None:
            place, value = (row["role"] or "other", row["block"]), row["kappa_relative"]
            known = cells.get(place, 0.0)
            cells[place] = None if value is None or known is None else max(known, value)
    held = {place: value for place, value in cells.items() if value}
    if not cells:
        return []
    caption = (
        "Relative condition number by block and module, on a logarithmic scale; a cell with several matrices shows the "
        "largest."
    )
    alt = f"{caption} No matrix has full rank."
    if held:
        (role, block), largest = max(held.items(), key=lambda item: (item[1], item[0]))
        lowest = min(held.values())
        alt = f"{caption} Largest: {number(largest)} in block {block}, {role_words(role)}; smallest: {number(lowest)}."
    return grid(
        "condition-heat",
        cells,
        caption=caption,
        alt=alt,
        title="Relative condition number by block",
        source=SOURCE,
        cell=lambda value: number_cell(value) if value is not None else Cell("deficient", tone="open"),
        cold="not probed",
        low=f"from {number(lowest)}" if held else "",
        high=f"to {number(largest)}" if held else "no full rank",
        log=True,
        missing="rank deficient",
    )


def _tables(rows: Sequence[Json]) -> list[Block]:
    """The matrices furthest from a random one, and those whose norm sits in the fewest directions."""
    extreme = sorted(rows, key=lambda row: (-_distance(row), row["name"]))
    flat = [row for row in rows if row["stable_rank_share"] is not None]
    flat.sort(key=lambda row: (row["stable_rank_share"], row["name"]))
    return [
        _table("Matrices whose condition is furthest from a random one's", extreme),
        *([_table("Matrices with the lowest stable rank relative to noise", flat)] if flat else []),
    ]


def _distance(row: Json) -> float:
    """How far from a random matrix, in either direction; rank deficient is furthest."""
    value = row["kappa_relative"]
    return math.inf if value is None or value <= 0 else abs(math.log(value))


def _table(title: str, rows: Sequence[Json]) -> Table:
    lines = [
        [
            Cell(short(row["name"], 80), place_words(row, row["name"]), "code"),
            shape_cell(row["shape"]),
            number_cell(row["kappa"]) if row["kappa"] is not None else Cell("rank deficient", tone="open"),
            number_cell(row["kappa_relative"]),
            number_cell(row["stable_rank"]),
            number_cell(row["stable_rank_share"]),
            number_cell(row["effective_rank"]),
            number_cell(row["effective_rank_share"]),
        ]
        for row in rows
    ]
    columns = ("Matrix", "Shape", "κ", "Relative", "Stable rank", "Relative", "Effective rank", "Relative")
    return table(title, columns, lines, SOURCE, range(2, len(columns)), most=MOST)
