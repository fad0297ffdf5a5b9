"""The one door to the `reports` package: render a run, check its documents, read its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import reports
from probes.errors import IntegrityError, ResourceError, UnlearnError, UsageError

T = TypeVar("T")
_BY_CODE: dict[int, type[UnlearnError]] = {2: UsageError, 4: IntegrityError, 5: ResourceError}


def _call(function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    except reports.ReportError as error:
        raise _BY_CODE.get(error.exit_code, UnlearnError)(str(error)) from None


def write(run: Path, formats: Sequence[str] = reports.FORMATS, audience: str = "engineer") -> list[Path]:
    """Write the documents of a run; see `reports.write`.

    Raises:
        UsageError: for an unknown format or audience, or no run folder.
        IntegrityError: for a damaged run folder.
        ResourceError: if a document cannot be written.
    """
    return _call(reports.write, run, formats, audience)


def check(run: Path) -> list[str]:
    """Documents that differ from what the run renders to; see `reports.check`."""
    return _call(reports.check, run)


def load(run: Path) -> dict[str, Any]:
    """`report.json` of a run, as `reports.load_report` reads it."""
    return _call(reports.load_report, run)
