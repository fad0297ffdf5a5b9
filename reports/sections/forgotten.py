"""Section 10: has the edit forgotten the records or hidden them? The finding, the residual under each attack on the
edit, the relearning curve, and how to read them.

Nothing here says that information is gone: a status speaks of the attack in its line, the finding of those in the
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reports.arms import arm_words, edited, present_arms
from reports.attacks import PLAIN, STAGES
from reports.blocks import Block, Cell, Items, Line, Prose, Table, figure_cell, table
from reports.durability import RELEARNING, line_curve, on_the_edit, relearning_curve
from reports.inference_time import acts
from reports.sections.attack_charts import NamedSeries, line_chart
from reports.sections.attacks import figure_title, not_run, purpose, residual_cell
from reports.text import (
    FINDINGS,
    STRESS_STATUSES,
    Json,
    attack_label,
    number,
    plural,
    sentence_case,
    short,
    stress_group,
    two,
)

DASH = {"after": (0, 1, 2), "before": (4,), "reference": (3,)}  # pattern of each line of the relearning curve
SILENT = ("re-teaches", "not testable")  # outcomes that say nothing of the edit
MOST = 200


def forgotten_or_hidden(report: Json, audience: str) -> list[Block] | str:
    """The finding, the table of residuals, the relearning curve and how to read them; or why there is nothing.

    Args:
        report: what `build` returns.
        audience: engineer (with the bounds behind each status) or regulator.
    """
    part = report["robustness"]
    rows = on_the_edit(report)
    kept = acts(report)  # the original's weights, in the copy's files: a finding that takes no attack
    if not rows and not kept:
        return str(part["reason"] or "the run stopped before the edited copy was attacked")
    engineer = audience == "engineer"
    blocks: list[Block] = [*finding(report)]
    if part["status"] == "not_run" and part["reason"]:
        blocks.append(Prose(f"not run: {part['reason']}."))
    blocks += _with_the_files(report, rows) if kept else []
    if not rows:
        return blocks
    blocks.append(_residuals(report, rows, engineer=engineer))
    blocks += _relearning(report)
    if engineer:
        blocks += _bounds(report, rows)
    return [*blocks, *_reading(report, rows)]


def finding(report: Json, where: str = "") -> list[Block]:
    """The finding as a note: `Finding: hidden. 2 of 7 attacks ...`; nothing in a run that has none.

    Args:
        report: what `build` returns.
        where: words that name the section, for a note that stands elsewhere.
    """
    part = report["robustness"]
    if part["finding"] is None or not edited(report):
        return []
    tone, words = FINDINGS[part["finding"]]
    statement = sentence_case((part["statement"] or "").rstrip("."))
    sentences = [f"{where}{words}", *([statement] if statement else [])]
    silent = sum(bool(row["stress"]) and row["stress"]["status"] in SILENT for row in on_the_edit(report))
    if silent and part["finding"] != "not tested":
        sentences.append(f"{plural(silent, 'more attack')} that ran could not be read (re-teaches, or not testable)")
    if part["finding"] == "not hidden":
        sentences.append("Attacks other than those tested may give another result")
    return [Prose(" ".join(f"{text}." for text in sentences), tone)]


def _residuals(report: Json, rows: Sequence[Json], *, engineer: bool) -> Table:
    """A line for each attack that ran, by kind; those that did not, by reason, at the end."""
    words, present = arm_words(report), present_arms(report)
    ran = [row for row in rows if row["status"] == "run"]
    lines: list[Line] = []
    for index, row in enumerate(ran):
        heading = stress_group(row["name"])[0]
        if not index or stress_group(ran[index - 1]["name"])[0] != heading:
            lines.append(Line([Cell(heading)], "group"))
        lines.append(_outcome_line(report, row, present, engineer=engineer))
    absent = not_run(rows)
    if absent:
        lines.append(Line([Cell(f"Not run: {plural(len(rows) - len(ran), 'attack')}")], "group"))
    for reason, names in absent.items():
        lines.append(Line([Cell(f"not run: {short(reason, 300)}", tone="muted"), Cell(names)], "span"))
    columns = ("Attack", "Access", *(words[arm][0] for arm in present), "Residual", "Outcome")
    caption = "Figures without the attack → under it, and the residual"
    return table(caption, columns, lines, "attacks[]", most=MOST, brief=False)


def _with_the_files(report: Json, rows: Sequence[Json]) -> list[Block]:
    """What attacks on the weights get out of the original, and so out of the copy's files: arm O stands for arm U.

    Shown beside the finding and never as a residual: no attack ran on the copy's files.
    """
    said = (
        "Attacks that take the weights (A2, A3) did not run on the copy: its files hold the original's weights, so for "
        "whoever has the files the residual is that of the original by construction. This is a statement about the "
        "method and no measured figure."
    )
    found = report["run"]["attacks"]["before"] or {}
    lines = []
    for row in rows:
        detail = found.get(row["name"])
        if row["status"] == "run" or not detail or detail["figures"].get(detail["headline"]) is None:
            continue
        title = detail["titles"].get(detail["headline"]) or ""
        cells = (
            moved_cell(detail[part].get(PLAIN), detail[part].get(detail["headline"]), interval=True)
            for part in ("figures", "control")
        )
        name = Cell(short(attack_label(row["name"]), 60), short(sentence_case(title), 80), style="wide")
        lines.append([name, Cell(row["access"]), *cells])
    shown = table(
        "The original under attack, which is what the copy's files give: figures without the attack → under it",
        ("Attack", "Access", "Records", "Never seen"),
        lines,
        "run.attacks.before",
        most=MOST,
    )
    return [Prose(said, "bad"), *([shown] if lines else [])]


def _outcome_line(report: Json, row: Json, present: str, *, engineer: bool) -> Line:
    title = figure_title(report, row)
    detail = "\n".join(text for text in (purpose(row, budget=False), short(sentence_case(title), 80)) if text)
    head = [Cell(short(attack_label(row["name"]), 60), detail, style="wide"), Cell(short(row["access"], 20))]
    stress = row["stress"]
    arms = [row[part][arm] for part in ("arms", "plain") for arm in present]
    if not any(arms) and not stress:
        reason = row["reason"] or "run; it yields no figure on these arms"
        return Line([*head, Cell(short(reason, 300), tone="muted")], "span")
    cells = [moved_cell(row["plain"][arm], row["arms"][arm], interval=engineer) for arm in present]
    return Line([*head, *cells, _bounded(row), _outcome(stress)])


def moved_cell(plain: Json | None, attacked: Json | None, *, interval: bool) -> Cell:
    """`0.33 → 0.61`: a figure without the attack and under it, over the interval of the latter."""
    if attacked is None or attacked["value"] is None:
        return Cell("n/a", tone="muted")
    text = two(attacked) if plain is None or plain["value"] is None else f"{two(plain)} → {two(attacked)}"
    ends = attacked["ci_low"], attacked["ci_high"]
    detail = f"{number(ends[0])} to {number(ends[1])}" if interval and None not in ends else ""
    return Cell(text, detail, style="whole")


def _bounded(row: Json) -> Cell:
    """The residual over the bounds that decide its status: those that hold for all attacks at once.

    Where the attack teaches, or the records did not stand out, a residual would mislead; the outcome says why.
    """
    stress, residual = row["stress"], row["residual"]
    if not stress:
        return residual_cell(residual)
    if stress["status"] in SILENT:
        return Cell("not counted" if stress["status"] == "re-teaches" else "n/a", tone="muted")
    if None in (stress["low"], stress["high"]) or not residual or residual["value"] is None:
        return residual_cell(residual)
    return Cell(number(residual["value"]), f"{number(stress['low'])} to {number(stress['high'])}", style="whole")


def _outcome(stress: Json | None) -> Cell:
    if stress is None:
        return Cell("not judged", "this run compared no arms for it", tone="muted")
    tone, mark, _ = STRESS_STATUSES[stress["status"]]
    reason = short(sentence_case(stress["reason"]), 240)
    return Cell(stress["status"], reason, tone=tone, mark=mark, style="wide")


def _relearning(report: Json) -> list[Block]:
    """Steps of training against probability: all series of the edited copy, the first of the other checkpoints."""
    name = relearning_curve(report)
    if name is None:
        return []
    found = {stage: (report["run"]["attacks"][stage] or {}).get(name) for stage in STAGES}
    latest = line_curve(found["after"])
    assert latest is not None  # by the choice of the name
    lines: list[NamedSeries] = []
    dashes: list[int] = []
    for stage, arm in (("after", "U"), ("before", "O"), ("reference", "R")):
        curve = line_curve(found[stage], latest["title"])
        for dash, series in zip(DASH[stage], (curve or {"series": []})["series"], strict=False):
            if series["x"]:
                lines.append((short(f"{arm_words(report)[arm][0]}: {series['name'] or latest['title']}", 40), series))
                dashes.append(dash)
    title = f"{attack_label(name)}: {latest['title']}"
    source = f"run.attacks.*.{short(name, 40)}"
    chart = line_chart("relearning", title, latest, lines, source, dashes=dashes, intervals=True, share=True)
    said = (
        "Training on half of the records, scored on the other half. A line of the edited copy that climbs back towards "
        "the original's, away from the never-seen records and from the reference, shows what was hidden."
    )
    return [*chart, Prose(said)] if name == RELEARNING else chart


def _bounds(report: Json, rows: Sequence[Json]) -> list[Block]:
    """What each status was decided by, besides the bounds of the residual."""
    judged = [row for row in rows if row["stress"]]
    if not judged:
        return []
    lines = [
        [
            Cell(short(attack_label(row["name"]), 60)),
            replace(found, detail="") if (found := residual_cell(row["residual"])).tone else found,  # said above
            figure_cell(row["stress"]["over_reference"], difference=True),
            figure_cell(row["stress"]["teaches"], difference=True),
        ]
        for row in judged
    ]
    columns = ("Attack", "Residual, by itself", "After minus reference", "Rise of never-seen records")
    return [table("Behind the outcomes", columns, lines, "attacks[].stress", most=MOST)]


def _reading(report: Json, rows: Sequence[Json]) -> list[Block]:
    """How to read the table: arms, residual, why never-seen records are attacked too, margin, statuses."""
    words, present, part = arm_words(report), present_arms(report), report["robustness"]
    arms = "; ".join(f"{words[arm][0]}: {words[arm][1]}" for arm in present)
    items = [
        f"{arms}. A cell reads: figure without the attack → under it, on the same rows.",
        "Residual = (After − Control) / (Before − Control), all under the attack: 0 is the level of records never "
        "seen, 1 that of the original. It is not testable where they stood out by less than 0.2 in the original.",
        "Never-seen records are attacked as well, since training or a strong prompt can also teach. If they move, the "
        "outcome is “re-teaches”, which speaks neither for nor against the edit.",
    ]
    if part["margin"] is not None:
        items.append(
            f"The margin is a residual of {number(part['margin'])}: no measurement can show that nothing at all is "
            "left, so “resists” means less than that share of what stood out, and not nothing."
        )
    if part["level"] is not None:
        items.append(
            "The bounds below a residual hold for all these attacks at once, either side at "
            f"{number(round(100 * part['level']))} %, so that trying many attacks does not by itself find something."
        )
    shown = {row["stress"]["status"] for row in rows if row["stress"]}
    items += [
        f"{mark} {status}: {meaning}." for status, (_, mark, meaning) in STRESS_STATUSES.items() if status in shown
    ]
    return [Items("How to read this", items)]
