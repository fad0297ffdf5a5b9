r"""report.md: the same sections as the page, short enough for the summary of a CI job.

Every expression of the template is escaped on output unless it was made here as `Trusted`, so a model name holding
`|`, `[x](y)` or `<script>` prints as those characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports.blocks import Cell, Line, Table
from reports.text import Json
from reports.view import page

ROWS = 30
_SPECIAL = re.compile(r"([\\`*_\[\]{}#|~!$])")
_LIST_MARK = re.compile(r"^(\d+(?=[.)]\s)|(?=[-+]\s))")
_PLAIN_CODE = re.compile(r"[\w.:/+=,@ ()<>…-]+", re.ASCII)


class Trusted(str):
    """Markdown that needs no escaping."""

    __slots__ = ()


def escape(text: Any) -> Trusted:
    """Plain text as Markdown: special characters escaped, `<`, `>` and `&` as entities, nothing becomes a link."""
    if isinstance(text, Trusted):
        return text
    entities = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = _LIST_MARK.sub(r"\1\\", _SPECIAL.sub(r"\\\1", entities))
    return Trusted(escaped.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;"))


def code(text: str) -> Trusted:
    """A code span; text that could end the span is escaped as prose instead."""
    return Trusted(f"`{text}`") if _PLAIN_CODE.fullmatch(text.replace("…", "")) else escape(text)


def cell(value: Cell) -> Trusted:
    """A table cell on one line: symbol, text, detail in brackets."""
    text = code(value.text) if value.style == "code" else escape(value.text)
    if value.symbol:
        text = Trusted(f"{value.symbol} {text}")
    return Trusted(f"{text} ({escape('; '.join(value.details))})") if value.detail else text


def lines(table: Table) -> list[list[Trusted]]:
    """The rows of a table, each padded to its width, capped at `ROWS` if it is brief and no fixed text."""
    width = len(table.columns)
    rows = []
    for line in _shown(table):
        cells = [cell(value) for value in line.cells]
        if line.form == "group":
            cells = [Trusted(f"**{cells[0]}**")]
        rows.append(cells + [Trusted("")] * (width - len(cells)))
    return rows


def omitted(table: Table) -> int:
    """How many rows a capped table leaves to report.json."""
    return table.total - sum(line.form != "group" for line in _shown(table))


def _shown(table: Table) -> Sequence[Line]:
    return table.lines[:ROWS] if table.source and table.brief else table.lines


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports", "templates"),
        autoescape=False,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "code": code, "lines": lines, "omitted": omitted}
    return environment


def render_markdown(report: Json, audience: str, digest: str, signoffs: Sequence[Json] = ()) -> str:
    """The Markdown of a report for an audience (see `reports.view.page`)."""
    shown = page(report, audience, digest, signoffs)
    text = _environment().get_template("report.md.j2").render(page=shown)
    return re.sub(r"\n{3,}", "\n\n", text)
