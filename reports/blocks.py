"""What a page is made of: prose, tables and figures that know nothing of markup, for HTML and Markdown alike.

Tables are capped at `ROWS` rows and state how many more report.json holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup

from reports.text import Json, figure_parts, number, plain, sentence_case, short, words_of

ROWS = 50
TONES = {"met": "good", "criteria met": "good", "not met": "bad", "criteria not met": "bad", "inconclusive": "open"}
SYMBOLS = {"good": "✓", "bad": "✕", "open": "?"}


@dataclass(frozen=True)
class Cell:
    """One table cell: main text, optional further lines, a style and a tone (good, bad, open, muted).

    Styles: code, num, whole (on one line), wide (at least 15 characters). `mark` takes the place of the tone's symbol.
    """

    text: str
    detail: str = ""
    style: str = ""
    tone: str = ""
    mark: str = ""

    @property
    def symbol(self) -> str:
        """Mark that carries the tone without colour."""
        return self.mark or SYMBOLS.get(self.tone, "")

    @property
    def details(self) -> list[str]:
        """The lines below the main text."""
        return self.detail.split("\n") if self.detail else []

    @property
    def unbroken(self) -> bool:
        """Holds a word so long that it must be broken anywhere, or it would widen its column."""
        return any(len(word) > 28 for word in self.text.split())


@dataclass(frozen=True)
class Line:
    """One table row: an ordinary one, a group heading, or one whose last cell spans the remaining columns."""

    cells: Sequence[Cell]
    form: str = "row"


@dataclass(frozen=True)
class Table:
    """A table with a caption and the place in report.json its numbers come from (none for fixed text).

    `groups` heads neighbouring columns together: (words, number of columns), covering all columns. A table that is not
    `brief` has as many rows in Markdown as on the page.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    lines: Sequence[Line]
    source: str
    omitted: int = 0
    total: int = 0
    numeric: frozenset[int] = frozenset()
    groups: Sequence[tuple[str, int]] = ()
    brief: bool = True

    @property
    def flat_columns(self) -> list[str]:
        """One heading per column, for formats without grouped headings: `Probability, after`."""
        heads = [words for words, span in self.groups for _ in range(span)] or [""] * len(self.columns)
        return [
            f"{head}, {column.lower()}" if head else column for head, column in zip(heads, self.columns, strict=True)
        ]


@dataclass(frozen=True)
class Chart:
    """A figure with its caption and text alternative; the table that follows holds its data."""

    kind: ClassVar[str] = "chart"
    svg: Markup
    caption: str
    alt: str
    legend: Markup = field(default_factory=Markup)


@dataclass(frozen=True)
class Prose:
    """A paragraph; a tone makes it a note."""

    kind: ClassVar[str] = "prose"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Part:
    """The heading of a part of a section."""

    kind: ClassVar[str] = "part"
    title: str


@dataclass(frozen=True)
class Items:
    """A list under a short heading."""

    kind: ClassVar[str] = "items"
    heading: str
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Label and value pairs, under a short heading."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, Cell]]
    heading: str = ""


@dataclass(frozen=True)
class Dates:
    """Points of a timeline: (label, date)."""

    kind: ClassVar[str] = "dates"
    points: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cards:
    """The few numbers to read first: (label, number, lines below it)."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[tuple[str, str, Sequence[str]]]


@dataclass(frozen=True)
class SignOff:
    """Lines to sign on paper, after the decisions already recorded."""

    kind: ClassVar[str] = "signoff"
    blank: int = 3


Block = Table | Chart | Prose | Part | Items | Facts | Dates | Cards | SignOff


@dataclass(frozen=True)
class Section:
    """A numbered part of the report; `not_run` is the reason when there is nothing in it."""

    id: str
    number: str
    title: str
    blocks: Sequence[Block]
    not_run: str = ""


@dataclass(frozen=True)
class Page:
    """Everything a template needs; without a verdict, the page of a run that decided nothing."""

    audience: str
    title: str
    subtitle: str
    meta: Sequence[tuple[str, Cell]]
    verdict: str
    tone: str
    sentence: str
    claim_level: str
    claim: str
    is_text: str
    is_not_text: str
    sections: Sequence[Section]
    appendix: Sequence[Section]
    digest: str
    stem: str = "report"  # of the documents' names: report.json, report.html
    banner: str = ""  # what has to be read with the verdict

    @property
    def symbol(self) -> str:
        """Mark that carries the verdict without colour."""
        return SYMBOLS.get(self.tone, "")


def table(
    caption: str,
    columns: Sequence[str],
    lines: Iterable[Line | Sequence[Cell]],
    source: str = "",
    numeric: Iterable[int] = (),
    groups: Sequence[tuple[str, int]] = (),
    most: int = ROWS,
    brief: bool = True,
) -> Table:
    """A table of `most` rows at most, group headings included; fixed text, which has no source, is never shortened."""
    full = [line if isinstance(line, Line) else Line(line) for line in lines]
    total = sum(line.form != "group" for line in full)
    kept = full[:most] if source else full
    shown = sum(line.form != "group" for line in kept)
    return Table(caption, columns, kept, source, total - shown, total, frozenset(numeric), groups, brief)


def figure_cell(figure: Json | None, metric: str = "", *, difference: bool = False) -> Cell:
    """A figure over its interval."""
    main, detail = figure_parts(figure, metric, difference=difference)
    return Cell(main, detail, tone="muted" if figure is None else "")


def number_cell(value: object) -> Cell:
    """A bare number, right-aligned."""
    return Cell(number(value), style="num", tone="muted" if value is None else "")


def percent_cell(value: float | None) -> Cell:
    """A share of 1 in percent."""
    return Cell(
        "n/a" if value is None else f"{number(100 * value)} %" if value else "0 %", "", "num", "" if value else "muted"
    )


def shape_cell(shape: Sequence[int]) -> Cell:
    """`576 × 1,536`."""
    return Cell(" × ".join(number(size) for size in shape))


def fact_pairs(values: Json) -> list[tuple[str, Cell]]:
    """Settings or statistics as label and value, 30 at most."""
    return [(sentence_case(words_of(key)), Cell(short(plain(value), 200))) for key, value in list(values.items())[:30]]
