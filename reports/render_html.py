"""report.html: one static file with inline CSS and SVG, no script, light and dark, printable on A4.

Autoescaping is on and undefined names are errors. The only trusted markup is what `reports.figures` draws, which
escapes its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports.text import Json
from reports.view import page

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_html(report: Json, audience: str, digest: str, signoffs: Sequence[Json] = ()) -> str:
    """The HTML page of a report for an audience (see `reports.view.page`)."""
    template = _environment().get_template("report.html.j2")
    return template.render(page=page(report, audience, digest, signoffs), report=report, csp=CSP)
