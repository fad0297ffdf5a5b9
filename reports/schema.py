"""The JSON Schema of report.json (`unlearn.report/v1`, draft 2020-12), shipped beside this module."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

SCHEMA = "unlearn.report/v1"


def report_schema() -> dict[str, Any]:
    """The schema as a dictionary, for any JSON Schema validator."""
    text = resources.files("reports").joinpath("report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
