"""Every error as an exit code and one line, for the command line and for a queue that goes on after one."""

from __future__ import annotations

import os
from pathlib import Path

from probes.errors import UnlearnError


def explain(error: BaseException) -> tuple[int, str]:
    """The documented exit code of an error, and a line that says what was expected, found, and can be done.

    An error that is none of ours is named by its type and place alone: its text may quote a record.
    """
    if isinstance(error, UnlearnError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; `unlearn forget --resume RUN` goes on"
    if isinstance(error, MemoryError):
        return 5, "expected more memory, found too little; use a smaller --batch-size or dtype"
    if isinstance(error, OSError):
        reason = os.strerror(error.errno or 0)
        return 5, f"expected a working file system, found {type(error).__name__} ({reason})"
    where = _last_frame(error)
    what = f"internal error: {type(error).__name__} at {where}"
    return 5, f"{what}; UNLEARN_TRACEBACK=1 shows it (and may show records)"


def _last_frame(error: BaseException) -> str:
    trace = error.__traceback__
    where = "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where
