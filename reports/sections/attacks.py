"""Sections 6 and 10: what was tried to get the records out, and what was not."""

from __future__ import annotations

from collections.abc import Sequence

from reports.arms import arm_words, edited, present_arms
from reports.blocks import Block, Cell, Line, Prose, Table, figure_cell, table
from reports.text import ACCESS, Json, attack_label, figure_parts, number, plain, short


def attacks(report: Json) -> list[Block] | str:
    """Every attack with its goal and access, its figure on each arm, or the reason why it did not run."""
    if not report["attacks"]:
        return "no attack was planned or reported in this run"
    used = sorted({row["access"] for row in report["attacks"]} & set(ACCESS))
    sentences = [f"Access: {'; '.join(f'{level} = {ACCESS[level]}' for level in used)}."] if used else []
    if edited(report):
        sentences.append(
            "Residual = (After − Control) / (Before − Control): 0 is the level of records never seen, 1 the level "
            "before the edit. It is not testable where the records did not stand out by 0.2 before."
        )
    return [_table(report, report["attacks"], "Attacks by goal and access"), Prose(" ".join(sentences))]


def robustness(report: Json) -> list[Block] | str:
    """The attacks on the edit's durability; the reason alone when none was planned."""
    part = report["robustness"]
    rows = [row for row in report["attacks"] if row["name"] in part["attacks"]]
    if not rows or not edited(report):
        return str(part["reason"])
    blocks: list[Block] = [Prose(f"not run: {part['reason']}.")] if part["status"] == "not_run" else []
    return [*blocks, _table(report, rows, "Attacks on the edit's durability")]


def _table(report: Json, rows: Sequence[Json], caption: str) -> Table:
    """Attacks that ran, then those that did not; each part under its own heading when there are both."""
    words, present = arm_words(report), present_arms(report)
    ran = [row for row in rows if row["status"] == "run"]
    other = [row for row in rows if row["status"] != "run"]
    lines = []
    for heading, part in (("Run", ran), ("Not run", other)):
        lines += [Line([Cell(heading)], "group")] if ran and other else []
        lines += [_line(row, present, residual=edited(report)) for row in part]
    columns = ("Attack", "Access", *(words[arm][0] for arm in present), *(["Residual"] if edited(report) else []))
    return table(caption, columns, lines, "attacks[]")


def _line(row: Json, present: str, *, residual: bool) -> Line:
    head = [Cell(short(attack_label(row["name"]), 60), _purpose(row)), Cell(short(row["access"], 20))]
    if row["status"] == "not_run":
        return Line([*head, Cell(f"not run: {short(row['reason'], 300)}", tone="muted")], "span")
    if all(row["arms"][arm] is None for arm in present):
        reason = row["reason"] or "run; it yields no figure on these arms"
        return Line([*head, Cell(short(reason, 300), tone="muted")], "span")
    cells = [figure_cell(row["arms"][arm], row["metric"] or "") for arm in present]
    return Line([*head, *cells, *([_residual(row["residual"])] if residual else [])])


def _purpose(row: Json) -> str:
    """Goal and budget on the second line."""
    budget = row["budget"]
    words = f"{number(budget)} queries" if isinstance(budget, int | float) else plain(budget) if budget else ""
    return " ".join(short(text[0].upper() + text[1:], 120) for text in (row["goal"], words) if text)


def _residual(residual: Json | None) -> Cell:
    if residual is None:
        return Cell("n/a", tone="muted")
    if residual["status"] != "ok":
        return Cell("not testable", short(residual["reason"] or "", 160), tone="muted")
    return Cell(*figure_parts(residual))
