"""Write the documents of a run, check that they are what the run renders to, read the report back.

report.json is the source of the other formats and is always written with them. The engineer's page is report.html; the
other audiences have their own file (report-regulator.html), so that all can lie side by side and be checked by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from reports.build import ReportError, build, dumps
from reports.schema import SCHEMA
from reports.text import Json, clean

FORMATS = ("json", "html", "md")
AUDIENCES = ("engineer", "regulator", "subject")


def write(run: Path, formats: Sequence[str] = FORMATS, audience: str = "engineer") -> list[Path]:
    """Render a run folder into its report/ folder; each file appears whole or not at all.

    Args:
        run: run folder.
        formats: any of json, html, md; report.json is written in any case.
        audience: engineer, regulator or subject; report.json is the same for all.

    Returns:
        The files written, report.json first.

    Raises:
        ReportError: for an unknown format or audience, or a run folder that cannot be read.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ReportError(f"expected formats out of {', '.join(FORMATS)}, found {clean(unknown[0], 40)!r}")
    if audience not in AUDIENCES:
        raise ReportError(f"expected an audience out of {', '.join(AUDIENCES)}, found {clean(audience, 40)!r}")
    run = Path(run)
    render = _renderer(run)
    names = [_name(audience, suffix) for suffix in FORMATS if suffix in (*formats, "json")]
    contents = [(name, render(name)) for name in names]
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    for name, content in contents:
        _replace(folder / name, content)
    return [folder / name for name in names]


def check(run: Path) -> list[str]:
    """Differences between the documents in report/ and what the run renders to now.

    Returns:
        One line per document that is missing (report.json) or differs in any byte; empty if all are as rendered.

    Raises:
        ReportError: if the run folder cannot be read.
    """
    run = Path(run)
    render = _renderer(run)
    known = {_name(audience, suffix) for audience in AUDIENCES for suffix in FORMATS}
    problems = []
    for name in sorted(known):
        path = run / "report" / name
        if not path.is_file():
            if name == "report.json":
                problems.append("report/report.json is missing; run `unlearn report RUN`")
        elif path.read_bytes() != render(name):
            problems.append(f"report/{name} differs from what this run renders to; it was edited or the run changed")
    return problems


def load_report(run: Path) -> Json:
    """report/report.json of a run folder.

    Raises:
        ReportError: if it is absent, damaged or of another schema.
    """
    try:
        report = json.loads((Path(run) / "report" / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(
            "expected report/report.json in the run folder, found none; run `unlearn report RUN`"
        ) from None
    except (OSError, ValueError):
        raise ReportError("expected readable JSON in report/report.json, found none; render it again", 4) from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ReportError(f"expected schema {SCHEMA} in report/report.json, found another; render it again", 4)
    return report


def _name(audience: str, suffix: str) -> str:
    return f"report.{suffix}" if suffix == "json" or audience == "engineer" else f"report-{audience}.{suffix}"


def _renderer(run: Path) -> Callable[[str], bytes]:
    """A function from a document's name to its bytes, sharing one reading of the run folder."""
    report = build(run)
    source = dumps(report)
    digest = f"sha256:{hashlib.sha256(source).hexdigest()}"
    signoffs = _signoffs(run)

    def render(name: str) -> bytes:
        from reports.render_html import render_html
        from reports.render_markdown import render_markdown

        stem, _, suffix = name.rpartition(".")
        if suffix == "json":
            return source
        audience = stem.removeprefix("report").removeprefix("-") or "engineer"
        function = render_html if suffix == "html" else render_markdown
        return function(report, audience, digest, signoffs).encode()

    return render


def _signoffs(run: Path) -> list[Json]:
    """Decisions in attest/signoffs.jsonl; printed on the page but no part of report.json, which they sign."""
    path = run / "attest" / "signoffs.jsonl"
    if not path.is_file():
        return []
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            keys = ("role", "name", "decision", "date", "key_id")
            rows.append({key: clean(str(row[key]), 120) for key in keys if row.get(key) is not None})
    except (OSError, ValueError, TypeError, AttributeError):
        raise ReportError(
            "expected one JSON object per line in attest/signoffs.jsonl, found something else", 4
        ) from None
    return rows


def _replace(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ReportError(
            f"expected to write report/{path.name}, found: {error.strerror}; free the disk or check rights", 5
        ) from None
