"""Section 4: every figure on every arm, with its interval and the level it is read against."""

from __future__ import annotations

from collections.abc import Sequence

from reports import figures
from reports.arms import arm_words, arms, edited, known_metrics, present_arms
from reports.blocks import Block, Cell, Chart, Prose, figure_cell, table
from reports.figures import Mark, Row
from reports.text import METRICS, Json, figure_parts, metric_label, number, plural

# Between 0 and 1 by nature; every other figure gets its own axis, wherever its values happen to fall.
SHARES = {
    "extraction.greedy",
    "extraction.sampled",
    "probability",
    "token_accuracy",
    "extraction_strength",
    "correct",
    "label_probability",
}
DRAWN = 12


def measurements(report: Json) -> list[Block] | str:
    """Bars for the figures between 0 and 1, markers for the others, the table of all, and the noise floor."""
    rows = {name: _row(report, name) for name in known_metrics(report)}
    rows = {name: row for name, row in rows.items() if row.marks}
    if not rows:
        return "no stage of this run measured the records"
    shares = [row for name, row in rows.items() if name in SHARES]
    others = [row for name, row in rows.items() if name not in SHARES]
    level = "The shaded band is the 95 % interval of the control: the level of records never seen."
    if edited(report):
        band = "reference" if report["run"]["measurements"]["reference"] else "control"
        level = f"The shaded band is the 95 % interval of the {band}: the level to return to, neither above nor below."
    blocks: list[Block] = []
    if shares:
        blocks.append(
            _chart("shares", "Figures between 0 and 1, with 95 % intervals", level, shares[:DRAWN], unit=True)
        )
    if others:
        title = "Figures on their own scales, with 95 % intervals"
        blocks.append(_chart("others", title, "" if shares else level, others[:DRAWN], unit=False))
    present = present_arms(report)
    words = arm_words(report)
    lines = [
        [Cell(metric_label(name)), *(figure_cell(arms(report, name)[arm], name) for arm in present)] for name in rows
    ]
    columns = ("Figure", *(words[arm][0] for arm in present))
    blocks.append(table("Figures on each arm", columns, lines, "run.measurements"))
    blocks.append(Prose(f"{'; '.join(f'{words[arm][0]}: {words[arm][1]}' for arm in present)}."))
    return [*blocks, Prose(_noise(report["run"]["measurements"]))]


def _row(report: Json, name: str) -> Row:
    words = arm_words(report)
    found = arms(report, name)
    marks = [
        Mark(arm, words[arm][0], figure["value"], figure["ci_low"], figure["ci_high"], figure_parts(figure, name)[0])
        for arm, figure in found.items()
        if figure and figure["value"] is not None
    ]
    # Without an edit the question is what the checkpoint makes of records it has never seen; after one, what a
    # checkpoint without the records would make of them.
    level = (found["R"] or found["N"]) if edited(report) else found["N"]
    whole = level and level["ci_low"] is not None and level["ci_high"] is not None
    band = (level["ci_low"], level["ci_high"]) if level and whole else None
    return Row(metric_label(name), "" if name in SHARES else (found["O"] or {}).get("unit", ""), marks, band)


def _chart(name: str, title: str, note: str, rows: Sequence[Row], *, unit: bool) -> Chart:
    svg = figures.bars(name, f"{title}; the table below holds the data", rows, unit=unit)
    return Chart(svg, f"{title}. {note}".strip(), f"{title}. {figures.describe(rows)}.")


def _noise(measured: Json) -> str:
    """The A/A noise floor and the confirmation of the greedy verdicts, in words."""
    floor = (measured["before"] or {}).get("noise_floor") or {}
    order = {name: index for index, name in enumerate(METRICS)}
    listed = [
        f"{metric_label(name).lower()} {number(float(floor[name])) if floor[name] else 0}"
        for name in sorted(floor, key=lambda name: (order.get(name, len(order)), name))
        if isinstance(floor[name], int | float)
    ]
    sentences = ["Noise floor: not measured."]
    if listed:
        sentences = [
            "Noise floor, the largest difference between two measurements of the same checkpoint in another batch "
            f"order: {', '.join(listed[:8])}."
        ]
    for stage in ("before", "after"):
        engine = (measured[stage] or {}).get("engine") or {}
        if engine.get("confirmed"):
            when = f"{stage.capitalize()} the edit, " if measured["after"] else ""
            text = (
                f"{when}{plural(engine['confirmed'], 'greedy verdict')} confirmed by generating at batch size 1, "
                f"with {plural(engine.get('disagreements') or 0, 'disagreement')}."
            )
            sentences.append(text[0].upper() + text[1:])
    return " ".join(sentences)
