"""Maps over layers and modules: the figure and the table that holds its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reports import figures
from reports.blocks import Block, Cell, Chart, table
from reports.text import Json, short, words_of

ATTENTION = ("qkv", "q", "k", "v", "o")
FEED_FORWARD = ("router", "gate_up", "gate", "up", "down")
ROLES = (*ATTENTION, *FEED_FORWARD, "conv")
LAYERS = {"feed_forward": "feed-forward"}
SHOWN_ROLES = 8

Cells = Mapping[tuple[str, int], float | None]  # value by (role, block); None: measured, and not a number


def grid(
    name: str,
    cells: Cells,
    *,
    caption: str,
    alt: str,
    title: str,
    source: str,
    cell: Callable[[float | None], Cell],
    cold: str,
    high: str,
    low: str = "",
    log: bool = False,
    missing: str = "",
) -> list[Block]:
    """A map over layers and modules, and the same numbers per block.

    Args:
        name: prefix of the element ids.
        cells: value by (role, block).
        caption: what the map shows.
        alt: text alternative of the map.
        title: caption of the table; blocks whose cells are all zero are left out of it.
        source: place of the numbers in report.json.
        cell: how the table prints a value.
        cold: what an outlined cell means, as the other options in `figures.heat_map`.
        high: words after the scale.
        low: words before it.
        log: whether the scale is logarithmic.
        missing: what a hatched cell means.
    """
    found = {role for role, _ in cells}
    roles = [role for role in ROLES if role in found] + sorted(found - set(ROLES))
    svg = figures.heat_map(
        name,
        alt,
        {(role_words(role), block): value for (role, block), value in cells.items()},
        [role_words(role) for role in roles],
        max(block for _, block in cells) + 1,
        cold=cold,
        low=low,
        high=high,
        log=log,
        missing=missing,
    )
    shown = roles[:SHOWN_ROLES]
    absent = Cell("n/a", style="num", tone="muted")
    lines = [
        [Cell(str(block)), *(cell(cells[role, block]) if (role, block) in cells else absent for role in shown)]
        for block in sorted({block for (_, block), value in cells.items() if value is None or value})
    ]
    columns = ("Block", *(LAYERS.get(role) or words_of(role) for role in shown))
    return [Chart(svg, caption, alt), table(title, columns, lines, source, range(1, len(columns)))]


def role_words(role: str) -> str:
    """`up` as `feed-forward up`."""
    kind = "attention " if role in ATTENTION else "feed-forward " if role in FEED_FORWARD else ""
    return f"{kind}{LAYERS.get(role) or words_of(role)}"


def place_words(row: Json, name: str) -> str:
    """Where a weight is: `block 3 feed-forward up, expert 2`; its name where it is outside the blocks."""
    if row["block"] is None:
        return short(name, 34)
    expert = f", expert {row['expert']}" if row["expert"] is not None else ""
    return short(f"block {row['block']} {role_words(row['role'] or 'other')}{expert}", 60)
