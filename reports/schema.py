"""The JSON Schemas of report.json (`unlearn.report/v1`) and of a probe run's probe.json (`unlearn.probe-report/v1`).

Both are draft 2020-12 and stand in one file beside this module: the second is its `$defs/probe_report`.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

SCHEMA = "unlearn.report/v1"
PROBE_SCHEMA = "unlearn.probe-report/v1"


def report_schema() -> dict[str, Any]:
    """The schema of report.json as a dictionary, for any JSON Schema validator."""
    text = resources.files("reports").joinpath("report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def probe_schema() -> dict[str, Any]:
    """The schema of probe.json as a dictionary, for any JSON Schema validator."""
    whole = report_schema()
    return {"$schema": whole["$schema"], "$ref": "#/$defs/probe_report", "$defs": whole["$defs"]}
