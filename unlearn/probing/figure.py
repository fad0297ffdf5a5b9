"""Estimates as a report holds them."""

from __future__ import annotations

from typing import Any

from probes.statistics import Interval


def figure(interval: Interval, unit: str) -> dict[str, Any]:
    """`{value, unit, n, ci_low, ci_high, ci_level, direction}`; whether more is better is not for a probe to say."""
    return {
        "value": interval.value,
        "unit": unit,
        "n": interval.n,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "ci_level": interval.level,
        "direction": "none",
    }
