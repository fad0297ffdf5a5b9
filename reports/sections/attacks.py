"""Section 6: what was tried to get the records out, and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reports.arms import arm_words, edited, present_arms
from reports.attacks import STAGES
from reports.blocks import Block, Cell, Line, Prose, Table, figure_cell, table
from reports.durability import collateral, on_the_edit, relearning_curve
from reports.sections.attack_details import Room, details
from reports.text import (
    ACCESS,
    Json,
    attack_label,
    attack_order,
    family_label,
    family_of,
    figure_parts,
    metric_label,
    number,
    plain,
    plural,
    sentence_case,
    short,
    stress_group,
    unit_words,
)

MOST = 200
CONFOUNDED = "Membership figures are confounded"


def attacks(report: Json, audience: str) -> list[Block] | str:
    """Every attack by goal and access, its figure on each arm, or the reason why it did not run; then each in detail.

    Args:
        report: what `build` returns.
        audience: engineer (with the details of each attack) or regulator.
    """
    if not report["attacks"]:
        return "no attack was planned or reported in this run"
    reading = _reading(report)
    blocks: list[Block] = [*confounded_note(report), _by_goal(report), *([Prose(reading)] if reading else [])]
    if audience != "engineer":
        return blocks
    on_edit = {row["name"] for row in on_the_edit(report)}
    apart = on_edit | {row["name"] for row in collateral(report)}
    room = Room(charts=12, letters=120_000)  # of their own, or a long suite would leave none
    tested = details(report, only=on_edit, drawn=relearning_curve(report), room=room) if on_edit else []
    return [*blocks, *details(report, apart), *tested]


def confounded(report: Json) -> dict[str, str]:
    """Attacks whose figures do not show membership, since a test without the model tells the sets apart as well."""
    found = {}
    for stage in STAGES:
        for name, detail in (report["run"]["attacks"][stage] or {}).items():
            if detail["confounded"]:
                found[name] = detail["confounded"]
    return found


def confounded_note(report: Json) -> list[Block]:
    """What stands above every membership figure when the blind test beats chance."""
    reasons = list(dict.fromkeys(confounded(report).values()))
    if not reasons:
        return []
    prefix = f"{CONFOUNDED}:"
    said = [text[len(prefix) :].strip() if text.lower().startswith(prefix.lower()) else text for text in reasons]
    text = f"{prefix} {'; '.join(short(words, 300) for words in said)}{_blind(report, said)}".rstrip(".")
    return [Prose(f"{text}. They do not show that the model has seen the records.", "open")]


def _blind(report: Json, said: Sequence[str]) -> str:
    """The AUC of the blind test, unless the reasons give one already."""
    if any("AUC" in text for text in said):
        return ""
    for stage in STAGES:
        for name, detail in (report["run"]["attacks"][stage] or {}).items():
            auc = detail["figures"].get("auc") if name.endswith(".blind") else None
            if auc and auc["value"] is not None:
                ends = (number(auc[end]) for end in ("ci_low", "ci_high"))
                return f", AUC {number(auc['value'])} [{', '.join(ends)}]"
    return ""


def not_run(rows: Sequence[Json]) -> dict[str, str]:
    """Reason -> the attacks that did not run for it, with their access."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "run":
            found.setdefault(row["reason"], []).append(f"{attack_label(row['name'])} ({row['access']})")
    return {reason: "; ".join(names) for reason, names in found.items()}


def _reading(report: Json) -> str:
    """How to read the table: access levels, control, residual."""
    used = sorted({row["access"] for row in report["attacks"]} & set(ACCESS))
    sentences = [f"Access: {'; '.join(f'{level} = {ACCESS[level]}' for level in used)}."] if used else []
    if edited(report):
        sentences.append(
            "Residual = (After − Control) / (Before − Control): 0 is the level of records never seen, 1 the level "
            "before the edit. It is not testable where the records did not stand out by 0.2 before."
        )
    return " ".join(sentences)


def _by_goal(report: Json) -> Table:
    """Attacks that ran under the heading of their family, by access; those on the edit itself by name alone, since
    they have their own section; at the end those that did not run, by reason.
    """
    words, present = arm_words(report), present_arms(report)
    on_edit = on_the_edit(report)
    elsewhere = {row["name"] for row in (*on_edit, *collateral(report))}
    here = [row for row in report["attacks"] if row["name"] not in elsewhere]
    rows = sorted(  # stable: the suite's order within one access
        (row for row in here if row["status"] == "run"),
        key=lambda row: (*attack_order(row["name"]), row["access"]),
    )
    doubtful = confounded(report)
    lines: list[Line] = []
    for index, row in enumerate(rows):
        family = family_of(row["name"])
        if not index or family_of(rows[index - 1]["name"]) != family:
            lines.append(Line([Cell(family_label(family))], "group"))
        lines.append(_line(report, row, present, doubtful.get(row["name"])))
    lines += _pointers(on_edit)
    absent = not_run(here)
    count = sum(row["status"] != "run" for row in here)
    if absent:
        lines.append(Line([Cell(f"Not run: {plural(count, 'attack')}")], "group"))
    for reason, names in absent.items():
        lines.append(Line([Cell(f"not run: {short(reason, 300)}", tone="muted"), Cell(names)], "span"))
    heads = (words[arm][0] for arm in present)
    columns = ("Attack", "Access", "Figure", *heads, *(["Residual"] if edited(report) else []))
    return table("Attacks by goal and access", columns, lines, "attacks[]", most=MOST, brief=False)


def _pointers(rows: Sequence[Json]) -> list[Line]:
    """A line for each kind of attack on the edit: their names, their figures are in section 10."""
    if not rows:
        return []
    ran = sum(row["status"] == "run" for row in rows)
    spared = f", {len(rows) - ran} not run" if ran < len(rows) else ""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(stress_group(row["name"])[0], []).append(f"{attack_label(row['name'])} ({row['access']})")
    heading = f"Attacks on the edit itself: {ran} run{spared}; figures and outcomes in section 10"
    return [
        Line([Cell(heading)], "group"),
        *(Line([Cell(kind), Cell("; ".join(names))], "span") for kind, names in kinds.items()),
    ]


def _line(report: Json, row: Json, present: str, doubt: str | None) -> Line:
    head = [Cell(short(attack_label(row["name"]), 60), purpose(row)), Cell(short(row["access"], 20))]
    if all(row["arms"][arm] is None for arm in present):
        reason = row["reason"] or "run; it yields no figure on these arms"
        return Line([*head, Cell(short(reason, 300), tone="muted")], "span")
    notes = [_unit(row), "confounded: the blind test tells the sets apart" if doubt else ""]
    figure = Cell(short(sentence_case(figure_title(report, row)), 100), "\n".join(text for text in notes if text))
    cells = [_arm_cell(row, arm) for arm in present]
    return Line([*head, figure, *cells, *([residual_cell(row["residual"])] if edited(report) else [])])


def _arm_cell(row: Json, arm: str) -> Cell:
    """A figure over its interval; after that without the attack, where the attack gives both."""
    cell = figure_cell(row["arms"][arm], row["metric"] or "")
    before = (row["plain"][arm] or {}).get("value")
    return cell if before is None else replace(cell, text=f"{number(before)} → {cell.text}")


def figure_title(report: Json, row: Json) -> str:
    """What the headline figure is called: by the attack's own result, or by the figure's name."""
    for stage in reversed(STAGES):
        detail = (report["run"]["attacks"][stage] or {}).get(row["name"])
        if detail and row["metric"] in detail["titles"]:
            return str(detail["titles"][row["metric"]])
    return metric_label(row["metric"] or "figure")


def _unit(row: Json) -> str:
    unit = next((row["arms"][arm]["unit"] for arm in "OUNR" if row["arms"][arm]), "")
    return unit_words(unit)


def purpose(row: Json, *, budget: bool = True) -> str:
    """Goal and budget on the second line."""
    spent = row["budget"] if budget else None
    words = f"{number(spent)} queries" if isinstance(spent, int | float) else plain(spent) if spent else ""
    goal = "" if row["goal"] == "unspecified" else row["goal"]
    return " ".join(short(text[0].upper() + text[1:], 120) for text in (goal, words) if text)


def residual_cell(residual: Json | None) -> Cell:
    """A residual over its interval, or why it has none."""
    if residual is None:
        return Cell("n/a", tone="muted")
    if residual["status"] != "ok":
        return Cell("not testable", short(residual["reason"] or "", 160), tone="muted")
    return Cell(*figure_parts(residual))
