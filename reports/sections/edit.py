"""Section 5: the method, its parameters and where in the model the weights changed."""

from __future__ import annotations

from typing import Any

from reports.blocks import (
    Block,
    Cell,
    Facts,
    Prose,
    Table,
    fact_pairs,
    number_cell,
    percent_cell,
    shape_cell,
    table,
)
from reports.sections.active import active_blocks, groups_of
from reports.sections.grid import grid, role_words
from reports.sections.probe_parts import OVERLAPS, overlap_cell, part_cell
from reports.sections.training import training_curves
from reports.text import Json, number, plain, sentence_case, short, short_digest, words_of

# Columns of an editor's own tables in reading order; a name that is not here is printed as it is and comes last.
COLUMN_WORDS = {
    "module": "Module",
    "rho": "Mass to keep",
    "fraction": "Fraction to keep",
    "kept_pairs": "Pairs kept",
    "kept_rank": "Rank kept",
    "kept_norm": "Norm kept",
    "predicted_rise": "Predicted loss rise",
    "overlap_a": "Overlap A",
    "overlap_g": "Overlap G",
}
WHOLES = {"kept_pairs": "pairs", "kept_rank": "rank"}  # printed with the part, in one cell
SHARES = ("rho", "fraction", "kept_norm")
MOST_COLUMNS = 8
ELSEWHERE = ("digest", "schema", "tensor_digest")  # the digest has its own column, the others their own section


def extent(report: Json) -> str:
    """How much changed: `140 of 272 tensors changed, 5,489,234 of 134,515,008 elements (4.081 %).`"""
    edit = report["method"]["edit"]
    if report["method"]["inference_time"] and not edit["changed_elements"]:
        return _beside(edit["statistics"].get("added_elements"))
    changed = sum(row["changed"] > 0 for row in edit["tensors"])
    total = report["checkpoint"]["before"]["tensors"]
    text = f"{changed:,}{f' of {total:,}' if total else ''} tensors changed"
    if edit["changed_elements"] is not None and edit["total_elements"]:
        share = 100 * edit["changed_elements"] / edit["total_elements"]
        text += f", {edit['changed_elements']:,} of {edit['total_elements']:,} elements ({number(share)} %)"
    left = ", ".join(short(name, 60) for name in edit["left_out"][:8])
    return f"{text}. Left out, being second copies of the weights: {left}." if left else f"{text}."


def _beside(added: Any) -> str:
    """The extent of an edit at inference time: nothing in the weights, and what was put beside them."""
    beside = f"; {number(added)} elements were added beside them" if isinstance(added, int) and added else ""
    return (
        f"No weight of the original was changed: the copy's files hold them all{beside}. Where the copy answers "
        "otherwise, its own program does it when it is asked; its weights are the same."
    )


def edit_section(report: Json, audience: str) -> list[Block] | str:
    """Parameters, statistics and their data, warnings, the heat map with its table; for the engineer, the tensors."""
    method = report["method"]
    if method is None:
        return "an audit edits nothing" if report["run"]["kind"] == "audit" else "no edit was planned in this run"
    edit = method["edit"]
    name = Cell(f"{method['name']} {method['version'] or ''}".strip(), method["paper"] or "")
    blocks: list[Block] = [Facts([("Method", name), *fact_pairs(method["parameters"])], "Method and parameters")]
    if edit:
        curves, rest = training_curves(edit["statistics"], method["parameters"])
        blocks += [*_statistics(rest, audience), *curves, *active_blocks(edit["statistics"], audience)]
    blocks += _data(method["importances"])
    blocks += [Prose(f"Warning: {text}", "open") for text in method["warnings"][:10]]
    if edit is None:
        return [*blocks, Prose("not run: the edit was planned and not applied.", "open")]
    blocks.append(Prose(extent(report)))
    if method["inference_time"] and not edit["changed_elements"]:
        return blocks
    blocks += _heat(edit)
    return [*blocks, _tensors(edit)] if audience == "engineer" else blocks


def _statistics(statistics: Json, audience: str) -> list[Block]:
    """Numbers about the edit; what has an entry per module becomes a table, which the regulator's edition counts."""
    if groups_of(statistics):  # drawn and listed by themselves
        statistics = {key: value for key, value in statistics.items() if key != "groups"}
    parts = {key: rows for key, value in statistics.items() if (rows := _rows(value))}
    pairs = fact_pairs({key: value for key, value in statistics.items() if key not in parts})
    if audience != "engineer":
        pairs += [(sentence_case(words_of(key)), Cell(number(len(rows)))) for key, rows in parts.items()]
        parts = {}
    return [
        *([Facts(pairs, "Measured while editing")] if pairs else []),
        *(_parts(sentence_case(words_of(key)), f"method.edit.statistics.{key}", rows) for key, rows in parts.items()),
    ]


def _rows(value: Any) -> list[Json]:
    """A list of objects, or objects by module, as rows; nothing for any other value."""
    if isinstance(value, dict):
        value = [{"module": name, **row} if isinstance(row, dict) else row for name, row in value.items()]
    return value if isinstance(value, list) and all(isinstance(row, dict) for row in value) else []


def _parts(title: str, source: str, rows: list[Json]) -> Table:
    """An editor's own table: as many columns as fit, those with known headings first."""
    found = dict.fromkeys(key for row in rows for key in row)
    whole = {WHOLES[key] for key in found if key in WHOLES}
    keys = [key for key in COLUMN_WORDS if key in found]
    keys = [*keys, *(key for key in found if key not in {*keys, *whole})][:MOST_COLUMNS]
    lines = [[_value(key, row) for key in keys] for row in rows]
    numeric = [i for i, key in enumerate(keys) if all(not isinstance(row.get(key), str | list | dict) for row in rows)]
    columns = [COLUMN_WORDS.get(key) or sentence_case(words_of(key)) for key in keys]
    return table(f"{title} of the edit", columns, lines, source, numeric)


def _value(key: str, row: Json) -> Cell:
    value = row.get(key)
    if key in WHOLES:
        return part_cell(value, row.get(WHOLES[key]))
    if key in OVERLAPS:
        return overlap_cell(value)
    if isinstance(value, str):
        return Cell(short(value, 80), style="code" if key == "module" else "")
    if key in SHARES:
        return percent_cell(value)
    return Cell(short(plain(value), 60)) if isinstance(value, list | dict) else number_cell(value)


def _data(importances: Json) -> list[Block]:
    """What data the edit's statistics come from, one row per set."""
    rows = {name: row for name, row in importances.items() if isinstance(row, dict)}
    if not rows:
        return []
    scalars = (key for row in rows.values() for key, value in row.items() if not isinstance(value, list | dict))
    keys = [key for key in dict.fromkeys(scalars) if key not in ELSEWHERE][:5]
    lines = [
        [
            Cell(name),
            *(Cell(short(plain(row.get(key)), 60)) for key in keys),
            Cell(short_digest(row.get("digest")), style="code"),
        ]
        for name, row in rows.items()
    ]
    columns = ("Set", *(words_of(key).capitalize() for key in keys), "Digest")
    return [table("Data behind the edit", columns, lines, "method.importances")]


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
    (role, block), largest = max(cells.items(), key=lambda item: (item[1], item[0]))
    alt = (
        f"Relative change of the weights by block and module. Largest: {number(100 * largest)} % in block {block}, "
        f"{role_words(role)}. {sum(value > 0 for value in cells.values())} of {len(cells)} cells changed."
    )
    shown = grid(
        "heat",
        cells,
        caption="Relative change ‖ΔW‖ / ‖W‖ by block and module; a cell with several tensors shows the largest.",
        alt=alt,
        title="Relative change by block; blocks not listed were not changed",
        source="method.edit.tensors[]",
        cell=percent_cell,
        cold="not changed",
        high=f"up to {number(100 * float(largest))} %",
    )
    return [*shown, *beyond]


def _tensors(edit: Json) -> Table:
    lines = [
        (
            Cell(short(row["name"], 80), style="code"),
            number_cell(row["block"]),
            Cell(row["role"] or "other"),
            shape_cell(row["shape"]),
            Cell(row["dtype"] or "n/a"),
            number_cell(row["changed"]),
            percent_cell(row["rel_norm"]),
        )
        for row in edit["tensors"]
        if row["changed"]
    ]
    columns = ("Tensor", "Block", "Role", "Shape", "Type", "Elements changed", "‖ΔW‖ / ‖W‖")
    return table("Changed tensors, largest relative change first", columns, lines, "method.edit.tensors[]", (1, 5, 6))
