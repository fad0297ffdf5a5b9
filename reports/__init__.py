"""Run folder in, documents out: report.json and from it HTML and Markdown, byte for byte reproducible.

    from reports import check, write
    paths = write(run_folder, audience="regulator")
    problems = check(run_folder)  # [] while every document is what the run renders to

Imports none of the toolkit's other packages and no model library.
"""

from __future__ import annotations

from reports.build import build
from reports.documents import AUDIENCES, FORMATS, check, load_report, write
from reports.reading import ReportError
from reports.schema import ATTACK_SCHEMA, PROBE_SCHEMA, SCHEMA, attack_schema, probe_schema, report_schema

__all__ = [
    "ATTACK_SCHEMA",
    "AUDIENCES",
    "FORMATS",
    "PROBE_SCHEMA",
    "SCHEMA",
    "ReportError",
    "attack_schema",
    "build",
    "check",
    "load_report",
    "probe_schema",
    "report_schema",
    "write",
]
