"""The localisation probe: which prompt positions, layers and neurons a completion goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reports.blocks import Block, Cell, Prose, Table, number_cell, percent_cell, table
from reports.sections.grid import grid, role_words
from reports.sections.probe_parts import about, warnings
from reports.text import Json, number, short, signed

TITLE = "Localisation"
SHOWS = (
    "Attribution divides the log-probability of a record's completion among the positions of its prompt and the layers "
    "it passes through. Setting the neurons with the most attribution to an ordinary value tests it: the "
    "log-probability should then drop by more than without as many random ones."
)
SHOWS_NOT = (
    "It does not show where a record is stored, nor that removing these parts would remove it: attribution is not "
    "unique, and other parts can take over. Influence orders the training records that were given; the cause may be "
    "none of them."
)
SOURCE = "run.probes.localise.records[]"
INFLUENTIAL = 3


def localise(result: Json) -> list[Block]:
    """Blocks of the localisation probe.

    Args:
        result: `run.probes.localise`.
    """
    blocks: list[Block] = [
        about(result),
        Prose(f"{SHOWS} {SHOWS_NOT}"),
        *warnings(result),
        *_parts(result["parts"]),
        *_heat(result["heat"]),
    ]
    rows = sorted(result["records"], key=lambda row: (-(_per_token(row) or 0.0), row["id"]))
    return [*blocks, _table(rows)] if rows else [*blocks, Prose("Records not run: none was listed.")]


def _parts(parts: Sequence[Json]) -> list[Block]:
    """By how much more the records lose than ordinary data when one part of a block says what it says on average."""
    contrasts = {
        (row["module"] or "other", row["block"]): row["contrast"]
        for row in parts
        if row["block"] is not None and row["contrast"] is not None
    }
    if not contrasts:
        return [Prose("Ablation of parts not run: it needs ordinary data to compare with.")]
    (module, block), largest = max(contrasts.items(), key=lambda item: (item[1], item[0]))
    caption = (
        "Ablation of parts: by how many nats a token the records lose more than ordinary data when a part's output is "
        "set to its ordinary mean. The best guide to where records of this kind sit."
    )
    alt = f"{caption} Largest: {number(largest)} in block {block}, {role_words(module)}."
    return grid(
        "localise-parts",
        {place: max(value, 0.0) for place, value in contrasts.items()},
        caption=caption,
        alt=alt,
        title="Ablation of parts, contrast to ordinary data, nats a token; parts without one are left out",
        source="run.probes.localise.parts[]",
        cell=number_cell,
        cold="none",
        high=f"up to {number(max(largest, 0.0))}",
    )


def _heat(heat: Sequence[Json]) -> list[Block]:
    """Share of all attribution by block and kind of layer, whatever its sign."""
    cells: dict[tuple[str, int], float] = {}
    for row in heat:
        if row["block"] is not None and row["score"] is not None:
            place = (row["module"] or "other", row["block"])
            cells[place] = cells.get(place, 0.0) + abs(row["score"])
    total = sum(cells.values())
    if not total:
        return [Prose("Map over layers not run: no attribution to layers was listed.")]
    shares = {place: value / total for place, value in cells.items()}
    (module, block), largest = max(shares.items(), key=lambda item: (item[1], item[0]))
    caption = "Share of the attribution by block and layer, mean over the records, whatever its sign."
    alt = f"{caption} Largest: {number(100 * largest)} % in block {block}, {role_words(module)}."
    return grid(
        "localise-heat",
        shares,
        caption=caption,
        alt=alt,
        title="Share of the attribution by block",
        source="run.probes.localise.heat[]",
        cell=percent_cell,
        cold="none",
        high=f"up to {number(100 * largest)} %",
    )


def _per_token(row: Json) -> float | None:
    """Geometric mean probability of a token of the completion."""
    if row["log_prob"] is None or not row["n_tokens"]:
        return None
    return math.exp(min(row["log_prob"] / row["n_tokens"], 0.0))


def _table(rows: Sequence[Json]) -> Table:
    lines = []
    for row in rows:
        ablation = row["ablation"] or {}
        lines.append(
            [
                Cell(short(row["id"], 40), style="code"),
                number_cell(row["n_tokens"]),
                number_cell(_per_token(row)),
                _strongest(row["prompt"]),
                *(_drop(ablation, key) for key in ("top", "random", "ordinary")),
                _influence(row["influence"]),
                number_cell(row["completeness_gap"]),
            ]
        )
    columns = (
        "Record",
        "Tokens",
        "Probability",
        "Prompt position",
        "Strongest",
        "Random",
        "Ordinary data",
        "Training records",
        "Gap",
    )
    groups = [("", 3), ("Strongest", 1), ("Drop without neurons", 3), ("Influential", 1), ("Completeness", 1)]
    title = "Attribution of each record, likeliest first; drops and gaps of the log-probability in nats"
    return table(title, columns, lines, SOURCE, (1, 2, 4, 5, 6, 8), groups)


def _strongest(prompt: Sequence[Json]) -> Cell:
    """The prompt position whose occlusion costs most; without occlusion the one with most attribution."""
    occluded = [(row["occlusion"], row["position"]) for row in prompt if row["occlusion"] is not None]
    if occluded:
        drop, position = max(occluded, key=lambda item: item[0])
        return Cell(f"position {number(position)}, from 0", f"{number(drop)} nats by occlusion")
    found = [(abs(row["score"]), row["position"]) for row in prompt if row["score"] is not None]
    total = sum(score for score, _ in found)
    if not total:
        return Cell("n/a", tone="muted")
    score, position = max(found, key=lambda item: item[0])
    where = f"position {number(position)}, from 0" if position is not None else ""
    return Cell(percent_cell(score / total).text, where)


def _drop(ablation: Json, key: str) -> Cell:
    """By how much the log-probability drops without k neurons."""
    value = ablation.get(key)
    if value is None:
        return Cell("n/a", tone="muted")
    k = ablation.get("k")
    return Cell(number(value), f"{number(k)} neurons" if k is not None else "", "num")


def _influence(found: Sequence[Json] | None) -> Cell:
    """The training records with the largest scores, by pseudonym."""
    if found is None:
        return Cell("not run", tone="muted")
    rows = sorted((row for row in found if row["score"] is not None), key=lambda row: (-row["score"], row["id"]))
    if not rows:
        return Cell("none", tone="muted")
    lines = [f"{short(row['id'], 22)} {signed(row['score'])}" for row in rows[:INFLUENTIAL]]
    more = [f"and {len(rows) - INFLUENTIAL:,} more"] if len(rows) > INFLUENTIAL else []
    return Cell(lines[0], "\n".join([*lines[1:], *more]))
