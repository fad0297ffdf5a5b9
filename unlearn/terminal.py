"""What a person sees: progress on stderr, results on stdout, in one of five displays.

`rich` draws live bars, `plain` one line a stage, `json` one JSON object a stage, `none` nothing; `auto` is `rich` on a
terminal and `plain` elsewhere. No display changes a result or an exit code, and none is ever given record text.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from probes.errors import UsageError

DISPLAYS = ("auto", "rich", "plain", "json", "none")
Update = Callable[[int, int], None]


def duration(seconds: float) -> str:
    """`12.3 s` or `6 m 09 s`."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} m {int(seconds % 60):02d} s"


class Display:
    """Quiet display, and the interface of the others."""

    name = "none"

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[Update]:
        """Announce a stage; the yielded function takes (done, total)."""
        yield lambda done, total: None

    def note(self, text: str) -> None:
        """Say one line about progress."""

    def part(self, name: str) -> None:
        """Say which part of a stage is under way, where that can be taken back."""

    def skipped(self, name: str) -> None:
        """Say that a stage was finished by an earlier run."""

    def result(self, text: str, data: dict[str, Any]) -> None:
        """Print the outcome on stdout."""


class PlainDisplay(Display):
    """One line a stage, for logs and pipes."""

    name = "plain"

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[Update]:
        start, last, count = time.monotonic(), [time.monotonic()], [0]

        def update(done: int, total: int) -> None:
            count[0] = done
            if time.monotonic() - last[0] > 10 and done < total:
                last[0] = time.monotonic()
                left = (last[0] - start) / max(done, 1) * (total - done)
                self._line(f"{'':>2}{name:<10} {done}/{total}, {duration(left)} left")

        yield update
        elapsed = time.monotonic() - start
        rate = f", {count[0] / elapsed:.1f}/s" if count[0] and elapsed > 1 else ""
        self._line(f"ok {name:<10} {detail:<48} {duration(elapsed)}{rate}".rstrip())

    def note(self, text: str) -> None:
        self._line(f"   {text}")

    def skipped(self, name: str) -> None:
        self._line(f"ok {name:<10} finished by the earlier run")

    def result(self, text: str, data: dict[str, Any]) -> None:
        print(text, flush=True)

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class JsonDisplay(Display):
    """JSON lines on stderr, one JSON object on stdout."""

    name = "json"

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[Update]:
        start = time.monotonic()
        self._line({"stage": name, "status": "started"})
        yield lambda done, total: None
        self._line({"stage": name, "status": "done", "seconds": round(time.monotonic() - start, 3)})

    def note(self, text: str) -> None:
        self._line({"note": text})

    def skipped(self, name: str) -> None:
        self._line({"stage": name, "status": "skipped"})

    def result(self, text: str, data: dict[str, Any]) -> None:
        print(json.dumps(data, sort_keys=True, ensure_ascii=False), flush=True)

    def _line(self, value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), file=sys.stderr, flush=True)


class RichDisplay(PlainDisplay):
    """Live bars on a terminal."""

    name = "rich"
    _live: Any = None

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[Update]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        start = time.monotonic()
        columns = (
            TextColumn("   {task.fields[stage]:<10}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("", total=None, stage=name, rate="")
            self._live = (bars, task)

            def update(done: int, total: int) -> None:
                elapsed = max(time.monotonic() - start, 1e-6)
                bars.update(task, completed=done, total=total, rate=f"{done / elapsed:.1f}/s")

            yield update
        self._live = None
        self._line(f"ok {name:<10} {detail:<48} {duration(time.monotonic() - start)}")

    def part(self, name: str) -> None:
        if self._live is not None:
            bars, task = self._live
            bars.update(task, stage=name)


def make_display(name: str) -> Display:
    """The display of that name.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in DISPLAYS:
        raise UsageError(f"expected --display to be one of {', '.join(DISPLAYS)}, found another word")
    if name == "auto":
        name = "rich" if sys.stderr.isatty() else "plain"
    return {"rich": RichDisplay, "plain": PlainDisplay, "json": JsonDisplay, "none": Display}[name]()
