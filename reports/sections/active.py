"""Part of section 5: which blocks of the model an editor with groups changed, and which it left alone.

Such an editor (GS-LoRA) puts its adapters into groups, each inside one block, and sets whole groups to exactly zero;
`edit/delta.json` lists them under `statistics.groups` with the norm of each one's change of the weights.
"""

from __future__ import annotations

from reports import figures
from reports.blocks import Block, Cell, Chart, Table, number_cell, table
from reports.figures import Mark
from reports.text import Json, number, plural, short

SOURCE = "method.edit.statistics.groups"


def groups_of(statistics: Json) -> list[Json]:
    """The groups of an edit, in depth order; [] for an editor that reports none, or none that lie in blocks."""
    rows = statistics.get("groups")
    if not isinstance(rows, list) or not rows:
        return []
    fits = all(isinstance(row, dict) and _block(row) and _norm(row) and "name" in row for row in rows)
    return sorted(rows, key=lambda row: row["block"]) if fits else []


def _block(row: Json) -> bool:
    return isinstance(row.get("block"), int) and not isinstance(row["block"], bool) and row["block"] >= 0


def _norm(row: Json) -> bool:
    return isinstance(row.get("norm"), int | float) and row["norm"] >= 0


def active_blocks(statistics: Json, audience: str) -> list[Block]:
    """A column for each block, the same numbers as a table, and for the engineer the groups where they are finer.

    The norm of a block is that of all its groups together: the root of the sum of their squares.
    """
    groups = groups_of(statistics)
    if not groups:
        return []
    by_block: dict[int, list[Json]] = {}
    for row in groups:
        by_block.setdefault(row["block"], []).append(row)
    norms = {block: sum(row["norm"] ** 2 for row in rows) ** 0.5 for block, rows in by_block.items()}
    active = [block for block, norm in norms.items() if norm]
    finer = len(groups) > len(by_block)
    count = f"{len(active)} of {plural(len(by_block), 'block')} with adapters active"
    if finer:
        count += f", {sum(bool(row['norm']) for row in groups)} of {plural(len(groups), 'group')}"
    caption = f"{count}: size of the change in each block. In a block that is not active nothing was changed."
    listed = ", ".join(f"block {block} {number(float(norms[block]))}" for block in active) or "none"
    marks = [Mark("U", str(block), norm, None, None, number(float(norm))) for block, norm in norms.items()]
    svg = figures.columns("active", f"{caption} The table below holds the data", marks, "norm of the change")
    blocks: list[Block] = [Chart(svg, caption, f"{caption} Active: {listed}.")]
    blocks.append(_by_block(by_block, norms, finer=finer))
    return [*blocks, _by_group(groups)] if finer and audience == "engineer" else blocks


def _by_block(by_block: dict[int, list[Json]], norms: dict[int, float], *, finer: bool) -> Table:
    lines = []
    for block, rows in by_block.items():
        parts = [number_cell(sum(bool(row["norm"]) for row in rows)), number_cell(len(rows))] if finer else []
        lines.append([Cell(str(block)), _state(norms[block]), *parts, _size(norms[block])])
    columns = ("Block", "State", *(("Groups active", "Groups") if finer else ()), "Norm of the change")
    return table("Blocks of the edit", columns, lines, SOURCE, range(2, len(columns)))


def _by_group(groups: list[Json]) -> Table:
    lines = [
        [
            Cell(short(str(row["name"]), 80), style="code"),
            Cell(str(row["block"])),
            _state(row["norm"]),
            _size(row["norm"]),
        ]
        for row in groups
    ]
    return table("Groups of the edit", ("Group", "Block", "State", "Norm of the change"), lines, SOURCE, (3,))


def _size(norm: float) -> Cell:
    return number_cell(float(norm) if norm else 0)


def _state(norm: float) -> Cell:
    return Cell("active") if norm else Cell("zero", tone="muted")
