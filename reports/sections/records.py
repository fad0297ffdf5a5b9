"""Section 7: which attacks hit which record, and one row per record under its pseudonym, worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from reports import figures
from reports.arms import arm_words, arms, edited
from reports.blocks import Block, Cell, Chart, Prose, Table, number_cell, table
from reports.figures import Mark
from reports.sections.attacks import CONFOUNDED, confounded
from reports.text import Json, attack_label, attack_order, metric_label, number, plural, short

DRAWN = 24
NAMED = 8  # attacks named in one cell
Stages = Sequence[tuple[str, str]]  # (stage, arm)


def records(report: Json) -> list[Block] | str:
    """Which attacks hit, a line per record on one axis, and the table; capped, with the rest counted."""
    rows = report["records"]
    if not rows:
        return "no per-record figures were written"
    stages = [(stage, arm) for stage, arm in (("before", "O"), ("after", "U"), ("reference", "R")) if _any(rows, stage)]
    image = any("label_probability" in (row[stage] or {}) for row in rows[:1] for stage, _ in stages)
    column = "label_probability" if image else "probability"
    flags = Counter(flag for row in rows for flag in _flags(report, row))
    tally = ", ".join(f"{count:,} {flag}" for flag, count in flags.items()) or "none flagged"
    intro = f"{plural(len(rows), 'record')}, worst first, under keyed pseudonyms; no text is printed. Flags: {tally}."
    hits = _hits(report, stages)
    measured = any(column in (row[stage] or {}) for row in rows for stage, _ in stages)
    shown = [*_chart(report, stages, column), _table(report, stages, column, image=image)] if measured else []
    return [Prose(intro), *hits, *shown]


def _hits(report: Json, stages: Stages) -> list[Block]:
    """The attacks that hit each record, most first; nothing where no attack reported on single records."""
    tried = [(stage, arm) for stage, arm in stages if any("hits" in (row[stage] or {}) for row in report["records"])]
    if not tried:
        return []
    words, rows = arm_words(report), report["records"]
    counts = [sum(bool((row[stage] or {}).get("hits")) for row in rows) for stage, _ in tried]
    places = {"O": "before" if edited(report) else "from this checkpoint", "U": "after", "R": "from the reference"}
    tally = ", ".join(f"{count:,} {places[arm]}" for (_, arm), count in zip(tried, counts, strict=True))
    text = f"Of {plural(len(rows), 'record')}, at least one attack got out, or flagged as seen: {tally}."
    names = {name for row in rows for stage, _ in tried for name in (row[stage] or {}).get("hits") or ()}
    if names & confounded(report).keys():
        text += f" {CONFOUNDED} (section Attacks): what they flag is no evidence."
    teaching = sorted(names & set((report.get("robustness") or {}).get("re_teaching") or ()))
    if teaching:
        labels = ", ".join(attack_label(name) for name in teaching[:NAMED])
        text += f" Never-seen records rose as well under {labels}: what they get out is no evidence."
    if not any(counts):
        return [Prose(text)]
    tried.sort(key=lambda item: "UORN".index(item[1]))  # the state that decides the order comes first
    lines = []
    for row in rows:
        found = [(row[stage] or {}).get("hits") for stage, _ in tried]
        if any(found):
            counts_of = [number_cell(None if hits is None else len(hits)) for hits in found]
            lines.append([Cell(short(row["id"], 40), style="code"), *counts_of, _named(found[0])])
    heads = [words[arm][0] if edited(report) or arm == "R" else "Attacks" for _, arm in tried]
    which = f"Which, {words[tried[0][1]][0].lower()}" if edited(report) else "Which"
    numeric = range(1, len(heads) + 1)
    columns = ("Record", *heads, which)
    return [Prose(text), table("Attacks that hit, worst record first", columns, lines, "records[]", numeric)]


def _named(hits: Sequence[str] | None) -> Cell:
    """The attacks that hit, the rest counted."""
    if not hits:
        return Cell("n/a" if hits is None else "none", tone="muted")
    names = [attack_label(name) for name in sorted(hits, key=lambda name: (*attack_order(name), name))[:NAMED]]
    names += [f"{len(hits) - NAMED:,} more"] if len(hits) > NAMED else []
    return Cell("; ".join(names))


def _flags(report: Json, row: Json) -> list[str]:
    """A record's flags; "before" says nothing where there is no after."""
    return [flag if edited(report) else flag.removesuffix(" before") for flag in row["flags"]]


def _any(rows: Sequence[Json], stage: str) -> bool:
    return any(row[stage] for row in rows)


def _chart(report: Json, stages: Stages, column: str) -> list[Block]:
    words = arm_words(report)
    drawn = []
    for row in report["records"][:DRAWN]:
        values = [(arm, (row[stage] or {}).get(column)) for stage, arm in stages]
        marks = [Mark(arm, words[arm][0], value, None, None, "") for arm, value in values if value is not None]
        if marks:
            drawn.append((row["id"], marks))
    if not drawn:
        return []
    control = (arms(report, column)["N"] or {}).get("value")
    legend = [(arm, words[arm][0]) for _, arm in stages]
    legend += [("-", "Mean of control")] if control is not None else []
    which = "every record" if len(drawn) == len(report["records"]) else f"the {len(drawn)} worst records"
    title = f"{metric_label(column)} of {which}"
    values_in_words = ". ".join(
        f"{short(name, 40)}: {', '.join(f'{mark.label.lower()} {number(mark.value)}' for mark in marks)}"
        for name, marks in drawn
    )
    svg = figures.dumbbells("records", f"{title}; the table below holds the data", drawn, control)
    return [Chart(svg, f"{title}.", f"{title}. {values_in_words}.", figures.key(legend))]


def _table(report: Json, stages: Stages, column: str, *, image: bool) -> Table:
    words = arm_words(report)
    verdict, extra = ("correct", "margin") if image else ("greedy", "extraction_strength")
    heads = ["Record"] if image else ["Record", "Tokens"]
    titles = ("Label predicted", "Probability", "Margin") if image else ("Verbatim", "Probability", "Strength")
    lines = []
    for row in report["records"]:
        figures_at = [row[stage] or {} for stage, _ in stages]
        lines.append(
            [
                Cell(short(row["id"], 40), style="code"),
                *([] if image else [number_cell(row["n_tokens"])]),
                *(_verdict(found.get(verdict)) for found in figures_at),
                *(number_cell(found.get(name)) for name in (column, extra) for found in figures_at),
                Cell("; ".join(_flags(report, row)) or "none", tone="" if row["flags"] else "muted"),
            ]
        )
    first, width = len(heads), len(stages)
    columns = [*heads, *(words[arm][0] for _ in titles for _, arm in stages), "Flags"]
    groups = [("", first), *((title, width) for title in titles), ("", 1)]
    numeric = [*range(1, first), *range(first + width, first + 3 * width)]
    return table("Records, worst first", columns, lines, "records[]", numeric, groups)


def _verdict(value: object) -> Cell:
    """A greedy verdict or a predicted label as yes or no."""
    if value is None:
        return Cell("n/a", tone="muted")
    if isinstance(value, bool):
        return Cell(number(value))
    text = {"extracted": "yes", "not": "no"}.get(str(value), short(str(value), 16))
    return Cell(text, tone={"extracted": "bad", "uncertain": "open"}.get(str(value), ""))
