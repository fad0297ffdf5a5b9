"""Section 6 for the engineer: each attack in full, with its figures, curves, tables and notes.

What a page can hold is bounded: `Room` counts what was drawn so far, and what finds no place is counted and
left to the JSON document.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.arms import edited
from reports.attacks import STAGES
from reports.blocks import Block, Cell, Chart, Items, Line, Part, Prose, Table, figure_cell, number_cell, table
from reports.durability import line_curve
from reports.figures.curves import COLOURS
from reports.sections.attack_charts import ROWS, NamedSeries, line_chart, roc_chart
from reports.text import (
    Json,
    attack_label,
    attack_order,
    number,
    plain,
    plural,
    sentence_case,
    short,
    unit_words,
    words_of,
)

COLUMNS = 12  # of a table
MARKUP = 60  # characters of markup around a cell
COSTS = {  # for one, for more
    "passes": ("forward pass of the model per record", "forward passes of the model per record"),
    "generated_tokens": ("generated token", "generated tokens"),
    "reference_passes": ("forward pass of the reference per record", "forward passes of the reference per record"),
}
SETTING_WORDS = {"fprs": "false-positive rates", "q": "bound on false discoveries", "top_k": "top-k", "top_p": "top-p"}


@dataclass
class Room:
    """What is left of the page: charts, and characters of everything; `refused` counts what found no place."""

    charts: int = 20
    letters: int = 400_000
    refused: dict[str, int] = field(default_factory=dict)

    def take(self, kind: str, blocks: Sequence[Block]) -> list[Block]:
        """The blocks, if there is room for all of them; kind is what they count as if there is none."""
        charts, letters = sum(isinstance(block, Chart) for block in blocks), sum(map(_letters, blocks))
        if charts > self.charts or letters > self.letters:
            self.refuse(kind)
            return []
        self.charts, self.letters = self.charts - charts, self.letters - letters
        return list(blocks)

    def refuse(self, kind: str) -> None:
        """Count what is not even drawn."""
        self.refused[kind] = self.refused.get(kind, 0) + 1


def _letters(block: Block) -> int:
    """About how much of the page a block fills."""
    if isinstance(block, Chart):
        return len(block.svg) + len(block.caption) + len(block.alt) + MARKUP
    if isinstance(block, Table):
        return sum(len(cell.text) + len(cell.detail) + MARKUP for line in block.lines for cell in line.cells)
    return sum(len(text) for text in block.items) if isinstance(block, Items) else MARKUP


def details(
    report: Json,
    apart: Collection[str] = (),
    *,
    only: Collection[str] | None = None,
    drawn: str | None = None,
    room: Room | None = None,
) -> list[Block]:
    """A part for every attack with a result of its own, in the order of the table; then what found no room.

    Args:
        report: what `build` returns.
        apart: attacks whose details stand elsewhere.
        only: the attacks to show; all when None.
        drawn: an attack whose first line chart stands in section 10.
        room: what may be drawn.
    """
    stages = {stage: report["run"]["attacks"][stage] or {} for stage in STAGES}
    listed = {row["name"]: (row["access"], index) for index, row in enumerate(report["attacks"])}
    names = sorted(
        {name for found in stages.values() for name in found},
        key=lambda name: (*attack_order(name), listed.get(name, ("", len(listed))), name),
    )
    room, blocks = room or Room(), []
    for index, name in enumerate(names, 1):
        if name not in apart and (only is None or name in only):
            found = {stage: stages[stage][name] for stage in STAGES if name in stages[stage]}
            blocks += _attack(f"attack-{index}", name, found, stage_words(report), room, elsewhere=name == drawn)
    left = [plural(count, kind) for kind, count in sorted(room.refused.items())]
    more = [Prose(f"Left to the JSON document for want of room: {' and '.join(left)}.")] if left else []
    return [*blocks, *more]


def stage_words(report: Json) -> dict[str, str]:
    """What a stage is called; without an edit, the checkpoint audited."""
    return {"before": "Before" if edited(report) else "Audited", "after": "After", "reference": "Reference"}


def _attack(
    id_: str, name: str, found: dict[str, Json], words: dict[str, str], room: Room, *, elsewhere: bool
) -> list[Block]:
    latest = found.get("after") or next(iter(found.values()))
    blocks: list[Block] = [Part(attack_label(name))]
    for text in dict.fromkeys(detail["confounded"] for detail in found.values() if detail["confounded"]):
        blocks.append(Prose(f"Confounded: {text}", "open"))
    for stage, detail in found.items():
        if detail["status"] == "not_run":
            blocks.append(Prose(f"not run, {words[stage].lower()}: {detail['reason']}."))
    blocks += [*_settings(latest), *_tests(found, words)]
    blocks += _figures(name, found, words, room)
    shown = (line_curve(found.get("after")) or {}).get("title") if elsewhere else None
    blocks += _curves(id_, name, found, words, room, shown)
    blocks += _tables(name, found, words, room)
    notes = list(dict.fromkeys(text for detail in found.values() for text in detail["notes"]))
    more = [f"{plural(len(notes) - ROWS, 'more note')} in the JSON document."] if len(notes) > ROWS else []
    return [*blocks, *(room.take("list", [Items("Notes", [*notes[:ROWS], *more])]) if notes else [])]


def _settings(detail: Json) -> list[Block]:
    """Settings and cost in a paragraph: there are many attacks."""
    given = {SETTING_WORDS.get(key, key): value for key, value in _given(detail["settings"]).items()}
    cost = [(detail["cost"][key], words) for key, words in COSTS.items() if detail["cost"][key]]
    spent = [
        f"{number(int(value)) if value == int(value) else plain(value)} {words[value != 1]}" for value, words in cost
    ]
    sentences = [f"Settings: {short(plain(given), 400)}."] if given else []
    sentences += [f"Cost: {', '.join(spent)}."] if spent else []
    return [Prose(" ".join(sentences))] if sentences else []


def _given(settings: Any) -> Any:
    """Settings without those that were left open."""
    if isinstance(settings, dict):
        kept = {key: _given(value) for key, value in settings.items()}
        return {key: value for key, value in kept.items() if value not in (None, [], {})}
    return [_given(value) for value in settings] if isinstance(settings, list) else settings


def _tests(found: dict[str, Json], words: dict[str, str]) -> list[Block]:
    """The p-values of the stages, before and after adjustment for the number of scores."""
    said = []
    for stage, detail in found.items():
        if detail["pvalue"] is not None:
            holm = f", {number(detail['pvalue_holm'])} adjusted (Holm)" if detail["pvalue_holm"] is not None else ""
            said.append(f"{words[stage].lower()} p = {number(detail['pvalue'])}{holm}")
    return [Prose(f"Test that the records do not stand out from control: {'; '.join(said)}.")] if said else []


def _figures(name: str, found: dict[str, Json], words: dict[str, str], room: Room) -> list[Block]:
    """Every figure, records against control, stage by stage; those that cannot be given, with the reason."""
    places = [
        (stage, part)
        for stage, detail in found.items()
        for part in ("figures", "control")
        if detail[part] or (part == "figures" and detail["control"])
    ]
    first = [detail["headline"] for detail in found.values()]
    keys = sorted(
        {key for stage, part in places for key in found[stage][part]}
        | {key for detail in found.values() for key in detail["not_resolvable"]},
        key=lambda key: (key not in first, key),
    )
    titles = {key: text for detail in found.values() for key, text in detail["titles"].items()}
    lines = []
    for key in keys:
        shown = [found[stage][part].get(key) for stage, part in places]
        unit = next((unit_words(figure["unit"]) for figure in shown if figure), "")
        head = Cell(short(sentence_case(titles.get(key) or words_of(key)), 120), unit)
        if any(shown):
            reasons = [found[stage]["not_resolvable"].get(key) if part == "figures" else None for stage, part in places]
            cells = (_cell(figure, key, why) for figure, why in zip(shown, reasons, strict=True))
            lines.append(Line([head, *cells]))
        else:
            given = (detail["not_resolvable"].get(key) for detail in found.values())
            reason = next((text for text in given if text), "no reason was recorded")
            lines.append(Line([head, Cell(f"not resolvable: {reason}", tone="muted")], "span" if places else "row"))
    if not lines:
        return []
    heads = {"figures": "Records", "control": "Control"}
    both = any(part == "control" for _, part in places)
    columns = ["Figure", *(heads[part] if both or len(found) == 1 else words[at] for at, part in places)]
    groups = [
        ("", 1),
        *((words[stage], sum(at == stage for at, _ in places)) for stage in found if _any(places, stage)),
    ]
    made = table(
        f"{attack_label(name)}: figures",
        columns if places else ["Figure", "Value"],
        lines,
        _source(name, found),
        groups=groups if len(found) > 1 and both else (),
        most=2 * ROWS,
    )
    return room.take("table", [made])


def _cell(figure: Json | None, key: str, reason: str | None) -> Cell:
    """A figure, or why there is none."""
    if figure is None and reason:
        return Cell("not resolvable", short(reason, 160), tone="muted")
    return figure_cell(figure, key)


def _any(places: Sequence[tuple[str, str]], stage: str) -> bool:
    return any(at == stage for at, _ in places)


def _source(name: str, found: dict[str, Json]) -> str:
    stage = next(iter(found)) if len(found) == 1 else "*"
    return f"run.attacks.{stage}.{short(name, 40)}"


def _curves(
    id_: str, name: str, found: dict[str, Json], words: dict[str, str], room: Room, shown: str | None
) -> list[Block]:
    """A chart for each curve, with the stages as lines of the same chart, and the table of its data.

    `shown` is the title of a line chart that stands in section 10.
    """
    kinds = dict.fromkeys((row["kind"], row["title"]) for detail in found.values() for row in detail["curves"])
    blocks: list[Block] = []
    for index, (kind, title) in enumerate(kinds, 1):
        if (kind, title) == ("line", shown):
            blocks.append(Prose(f"{sentence_case(short(title, 100))}: the curve is in section 10."))
            continue
        same = {
            stage: row
            for stage, detail in found.items()
            for row in reversed(detail["curves"])
            if (row["kind"], row["title"]) == (kind, title)
        }
        lines = _lines(same, words)
        if not any(series["x"] for _, series in lines):
            continue
        if not room.charts:
            room.refuse("figure")
            continue
        draw = roc_chart if kind == "roc" else line_chart
        total = sum(len(row["series"]) for row in same.values())
        more = [Prose(f"{len(lines)} of {total:,} lines drawn; the JSON document has all.")] * (total > len(lines))
        drawn = draw(
            f"{id_}-{index}", f"{attack_label(name)}: {title}", next(iter(same.values())), lines, _source(name, found)
        )
        blocks += room.take("figure", [*drawn, *more])
    return blocks


def _lines(same: dict[str, Json], words: dict[str, str]) -> list[NamedSeries]:
    """The series that are drawn, the first of each stage, named by stage, by series or by both."""
    share = max(COLOURS // max(len(same), 1), 1)
    several = any(len(row["series"]) > 1 for row in same.values())
    lines = []
    for stage, row in same.items():
        for series in row["series"][: share if len(same) > 1 else COLOURS]:
            own = series["name"] or row["title"]
            label = own if len(same) == 1 else f"{words[stage]}, {own}" if several else words[stage]
            lines.append((short(label, 40), series))
    return lines


def _tables(name: str, found: dict[str, Json], words: dict[str, str], room: Room) -> list[Block]:
    blocks: list[Block] = []
    for stage, detail in found.items():
        for row in detail["tables"]:
            if not row["rows"]:
                continue
            when = f", {words[stage].lower()}" if len(found) > 1 else ""
            numeric = [
                at
                for at in range(len(row["columns"]))
                if at and all(value is None or isinstance(value, int | float) for value in (r[at] for r in row["rows"]))
            ]
            lines = [[_entry(value) for value in entries[:COLUMNS]] for entries in row["rows"]]
            made = table(
                f"{row['title']}{when}",
                [sentence_case(column) for column in row["columns"][:COLUMNS]],
                lines,
                f"run.attacks.{stage}.{short(name, 40)}",
                [at for at in numeric if at < COLUMNS],
                most=ROWS,
            )
            blocks += room.take("table", [made])
    return blocks


def _entry(value: object) -> Cell:
    return Cell(short(value, 120)) if isinstance(value, str) else number_cell(value)
