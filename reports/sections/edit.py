"""Section 5: the method, its parameters and where in the model the weights changed."""

from __future__ import annotations

from reports import figures
from reports.blocks import Block, Cell, Chart, Facts, Prose, Table, number_cell, percent_cell, table
from reports.text import Json, number, plain, short, short_digest, words_of

ATTENTION = ("qkv", "q", "k", "v", "o")
FEED_FORWARD = ("router", "gate_up", "gate", "up", "down")
ROLES = (*ATTENTION, *FEED_FORWARD, "conv")


def extent(report: Json) -> str:
    """How much changed: `140 of 272 tensors changed, 5,489,234 of 134,515,008 elements (4.081 %).`"""
    edit = report["method"]["edit"]
    changed = sum(row["changed"] > 0 for row in edit["tensors"])
    total = report["checkpoint"]["before"]["tensors"]
    text = f"{changed:,}{f' of {total:,}' if total else ''} tensors changed"
    if edit["changed_elements"] is not None and edit["total_elements"]:
        share = 100 * edit["changed_elements"] / edit["total_elements"]
        text += f", {edit['changed_elements']:,} of {edit['total_elements']:,} elements ({number(share)} %)"
    left = ", ".join(short(name, 60) for name in edit["left_out"][:8])
    return f"{text}. Left out, being second copies of the weights: {left}." if left else f"{text}."


def edit_section(report: Json, audience: str) -> list[Block] | str:
    """Parameters, importances, warnings, the heat map with its table and, for the engineer, the tensors."""
    method = report["method"]
    if method is None:
        return "an audit edits nothing" if report["run"]["kind"] == "audit" else "no edit was planned in this run"
    edit = method["edit"]
    name = Cell(f"{method['name']} {method['version'] or ''}".strip(), method["paper"] or "")
    blocks: list[Block] = [Facts([("Method", name), *_facts(method["parameters"])], "Method and parameters")]
    if edit and edit["statistics"]:
        blocks.append(Facts(_facts(edit["statistics"]), "Measured while editing"))
    blocks += _importances(method["importances"])
    blocks += [Prose(f"Warning: {text}", "open") for text in method["warnings"][:10]]
    if edit is None:
        return [*blocks, Prose("not run: the edit was planned and not applied.", "open")]
    blocks += [Prose(extent(report)), *_heat(edit)]
    return [*blocks, _tensors(edit)] if audience == "engineer" else blocks


def _facts(values: Json) -> list[tuple[str, Cell]]:
    return [(words_of(key).capitalize(), Cell(short(plain(value), 200))) for key, value in list(values.items())[:30]]


def _importances(importances: Json) -> list[Block]:
    rows = {name: row for name, row in importances.items() if isinstance(row, dict)}
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows.values() for key in row if key != "digest"))[:5]
    lines = [
        [
            Cell(name),
            *(Cell(short(plain(row.get(key)), 60)) for key in keys),
            Cell(short_digest(row.get("digest")), style="code"),
        ]
        for name, row in rows.items()
    ]
    columns = ("Set", *(words_of(key).capitalize() for key in keys), "Digest")
    return [table("Importances", columns, lines, "method.importances")]


def _heat(edit: Json) -> list[Block]:
    """Heat map over layers and modules, and the same numbers per block."""
    cells: dict[tuple[str, int], float] = {}
    outside = []
    for row in edit["tensors"]:
        if isinstance(row["block"], int):
            place = (row["role"] or "other", row["block"])
            cells[place] = max(cells.get(place, 0.0), row["rel_norm"] or 0.0)
        elif row["changed"]:
            outside.append(f"{short(row['name'], 60)} {percent_cell(row['rel_norm']).text}")
    beyond: list[Block] = [Prose(f"Changed outside the blocks: {', '.join(outside[:12])}.")] if outside else []
    if not cells:
        return [Prose("Map over layers not run: no tensor inside a block was listed."), *beyond]
    found = {role for role, _ in cells}
    roles = [role for role in ROLES if role in found] + sorted(found - set(ROLES))
    (role, block), largest = max(cells.items(), key=lambda item: (item[1], item[0]))
    alt = (
        f"Relative change of the weights by block and module. Largest: {number(100 * largest)} % in block {block}, "
        f"{_role_words(role)}. {sum(value > 0 for value in cells.values())} of {len(cells)} cells changed."
    )
    svg = figures.heat_map(
        "heat",
        alt,
        {(_role_words(role), block): value for (role, block), value in cells.items()},
        [_role_words(role) for role in roles],
        max(block for _, block in cells) + 1,
    )
    caption = "Relative change ‖ΔW‖ / ‖W‖ by block and module; a cell with several tensors shows the largest."
    shown = roles[:8]
    lines = [
        [Cell(str(block)), *(percent_cell(cells.get((role, block))) for role in shown)]
        for block in sorted({block for (_, block), value in cells.items() if value})
    ]
    columns = ("Block", *(words_of(role) for role in shown))
    title = "Relative change by block; blocks not listed were not changed"
    data = table(title, columns, lines, "method.edit.tensors[]", range(1, len(columns)))
    return [Chart(svg, caption, alt), data, *beyond]


def _role_words(role: str) -> str:
    kind = "attention " if role in ATTENTION else "feed-forward " if role in FEED_FORWARD else ""
    return f"{kind}{words_of(role)}"


def _tensors(edit: Json) -> Table:
    lines = [
        (
            Cell(short(row["name"], 80), style="code"),
            number_cell(row["block"]),
            Cell(row["role"] or "other"),
            Cell(" × ".join(number(size) for size in row["shape"])),
            Cell(row["dtype"] or "n/a"),
            number_cell(row["changed"]),
            percent_cell(row["rel_norm"]),
        )
        for row in edit["tensors"]
        if row["changed"]
    ]
    columns = ("Tensor", "Block", "Role", "Shape", "Type", "Elements changed", "‖ΔW‖ / ‖W‖")
    return table("Changed tensors, largest relative change first", columns, lines, "method.edit.tensors[]", (1, 5, 6))
