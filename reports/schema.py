"""The JSON Schemas of report.json (`unlearn.report/v1`), of a probe run's probe.json (`unlearn.probe-report/v1`) and of
an attack run's attack.json (`unlearn.attack-report/v1`).

All are draft 2020-12 and stand in one file beside this module: the latter two are its `$defs/probe_report` and
`$defs/attack_report`.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

SCHEMA = "unlearn.report/v1"
PROBE_SCHEMA = "unlearn.probe-report/v1"
ATTACK_SCHEMA = "unlearn.attack-report/v1"


def report_schema() -> dict[str, Any]:
    """The schema of report.json as a dictionary, for any JSON Schema validator."""
    text = resources.files("reports").joinpath("report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def probe_schema() -> dict[str, Any]:
    """The schema of probe.json as a dictionary, for any JSON Schema validator."""
    return _part("probe_report")


def attack_schema() -> dict[str, Any]:
    """The schema of attack.json as a dictionary, for any JSON Schema validator."""
    return _part("attack_report")


def _part(name: str) -> dict[str, Any]:
    whole = report_schema()
    return {"$schema": whole["$schema"], "$ref": f"#/$defs/{name}", "$defs": whole["$defs"]}
