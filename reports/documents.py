"""Write the documents of a run, check that they are what the run renders to, read the report back.

report.json is the source of the other formats and is always written with them. The engineer's page is report.html; the
other audiences have their own file (report-regulator.html), so that all can lie side by side and be checked by name.
The documents of a probe run are probe.json, probe.html and probe.md, those of an attack run attack.json, attack.html
and attack.md, both in one edition.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from reports.build import build, dumps
from reports.reading import ReportError
from reports.schema import ATTACK_SCHEMA, PROBE_SCHEMA, SCHEMA
from reports.text import Json, clean

FORMATS = ("json", "html", "md")
AUDIENCES = ("engineer", "regulator", "subject")
STEMS = {SCHEMA: "report", PROBE_SCHEMA: "probe", ATTACK_SCHEMA: "attack"}  # of the documents' names


def write(run: Path, formats: Sequence[str] = FORMATS, audience: str = "engineer") -> list[Path]:
    """Render a run folder into its report/ folder; each file appears whole or not at all.

    Args:
        run: run folder.
        formats: any of json, html, md; the JSON document is written in any case.
        audience: engineer, regulator or subject; report.json is the same for all. A probe run and an attack run have
            no other edition than the engineer's.

    Returns:
        The files written, the JSON document first.

    Raises:
        ReportError: for an unknown format or audience, or a run folder that cannot be read or measured nothing.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ReportError(f"expected formats out of {', '.join(FORMATS)}, found {clean(unknown[0], 40)!r}")
    if audience not in AUDIENCES:
        raise ReportError(f"expected an audience out of {', '.join(AUDIENCES)}, found {clean(audience, 40)!r}")
    run = Path(run)
    stem, render = _renderer(run)
    if stem != "report" and audience != "engineer":
        raise ReportError(
            f"expected no audience for a run of kind {stem}, which has one edition, found {audience!r}; leave it out"
        )
    names = [_name(stem, audience, suffix) for suffix in FORMATS if suffix in (*formats, "json")]
    contents = [(name, render(name)) for name in names]
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    for name, content in contents:
        _replace(folder / name, content)
    return [folder / name for name in names]


def check(run: Path) -> list[str]:
    """Differences between the documents in report/ and what the run renders to now.

    Returns:
        One line per document that differs in any byte, or is missing (the JSON one); empty if all are as rendered.

    Raises:
        ReportError: if the run folder cannot be read.
    """
    run = Path(run)
    stem, render = _renderer(run)
    audiences = AUDIENCES if stem == "report" else AUDIENCES[:1]
    known = {_name(stem, audience, suffix) for audience in audiences for suffix in FORMATS}
    problems = []
    for name in sorted(known):
        path = run / "report" / name
        if not path.is_file():
            if name == f"{stem}.json":
                problems.append(f"report/{name} is missing; run `unlearn report RUN`")
        elif path.read_bytes() != render(name):
            problems.append(f"report/{name} differs from what this run renders to; it was edited or the run changed")
    return problems


def load_report(run: Path) -> Json:
    """report/report.json of a run folder; of a probe run, report/probe.json; of an attack run, report/attack.json.

    Raises:
        ReportError: if it is absent, damaged or of another schema.
    """
    folder = Path(run) / "report"
    names = {f"{stem}.json": schema for schema, stem in STEMS.items()}
    name = next((name for name in names if (folder / name).is_file()), "report.json")
    schema = names[name]
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"expected report/{name} in the run folder, found none; run `unlearn report RUN`") from None
    except (OSError, ValueError):
        raise ReportError(f"expected readable JSON in report/{name}, found none; render it again", 4) from None
    if not isinstance(report, dict) or report.get("schema") != schema:
        raise ReportError(f"expected schema {schema} in report/{name}, found another; render it again", 4)
    return report


def _name(stem: str, audience: str, suffix: str) -> str:
    return f"{stem}.{suffix}" if suffix == "json" or audience == "engineer" else f"{stem}-{audience}.{suffix}"


def _renderer(run: Path) -> tuple[str, Callable[[str], bytes]]:
    """The stem of the documents' names and a function from a name to its bytes, sharing one reading of the run."""
    report = build(run)
    stem = STEMS[report["schema"]]
    source = dumps(report)
    digest = f"sha256:{hashlib.sha256(source).hexdigest()}"
    signoffs = _signoffs(run)

    def render(name: str) -> bytes:
        from reports.render_html import render_html
        from reports.render_markdown import render_markdown

        base, _, suffix = name.rpartition(".")
        if suffix == "json":
            return source
        audience = base.removeprefix(stem).removeprefix("-") or "engineer"
        function = render_html if suffix == "html" else render_markdown
        return function(report, audience, digest, signoffs).encode()

    return stem, render


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
