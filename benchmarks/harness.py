"""Interleaved timing, ratios with their spread, and the table they are printed in."""

from __future__ import annotations

import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.subject import Subject


@dataclass(frozen=True, slots=True)
class Ratio:
    """One line of the table: `over` divided by `under`, repetition by repetition.

    `target` is an upper bound, or a lower bound where `at_least`; None where nothing was promised.
    """

    case: str
    over: Sequence[float]
    under: Sequence[float]
    target: float | None = None
    at_least: bool = False
    note: str = ""
    unit: str = "s"

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.over, self.under, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def outcome(self) -> str:
        if self.target is None:
            return ""
        met = self.median >= self.target if self.at_least else self.median <= self.target
        return f"{'>=' if self.at_least else '<='} {self.target:g} {'met' if met else 'MISSED'}"

    def cells(self) -> list[str]:
        over, under = (f"{statistics.median(side):.4g} {self.unit}" for side in (self.over, self.under))
        spread = f"{min(self.ratios):.3g} .. {max(self.ratios):.3g}"
        return [self.case, over, under, f"{self.median:.3g}", spread, self.outcome, self.note]

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "unit": self.unit,
            "over": list(self.over),
            "under": list(self.under),
            "ratio": self.median,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "target": self.target,
            "outcome": self.outcome,
            "note": self.note,
        }


def processor_time() -> float:
    """Seconds of processor time of this process and of the children it has waited for."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, who))


def interleave(sides: Mapping[str, Callable[[], object]], subject: Subject) -> dict[str, list[float]]:
    """Seconds of each side, run in turn (A B A B ...) after one untimed round, so that a drift of the machine hits all.

    Results are dropped inside the timed span: releasing what a side allocated is part of its cost.
    """
    clock = {"wall": time.perf_counter, "cpu": processor_time}[subject.clock]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(subject.repeats + 1):
        for name, side in sides.items():
            gc.collect()
            start = clock()
            side()
            if subject.device != "cpu":
                torch.accelerator.synchronize()
            if repetition:
                seconds[name].append(clock() - start)
    return seconds


def table(rows: Sequence[Ratio]) -> str:
    cells = [["case", "over", "under", "ratio", "min .. max", "target", "note"], *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def environment(device: str) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _cpu() -> str:
    """The processor's name, with its widest vector instructions: they decide what a forward pass costs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
