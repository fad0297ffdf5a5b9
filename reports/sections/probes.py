"""Section 8: inside the model, what each probe that ran has found."""

from __future__ import annotations

from collections.abc import Callable

from reports.blocks import Block, Part, Prose
from reports.sections import condition, kfac, localise, spectrum
from reports.text import Json

TITLES = {
    "kfac": kfac.TITLE,
    "spectrum": spectrum.TITLE,
    "localise": localise.TITLE,
    "condition": condition.TITLE,
}


def probes(report: Json, audience: str) -> list[Block] | str:
    """The blocks of every probe that ran, one after the other, and which did not run."""
    found = {name: blocks_of(report, name, audience) for name in TITLES}
    if not any(found.values()):
        return "no probe looked inside the model in this run"
    absent = [TITLES[name] for name, blocks in found.items() if not blocks]
    note = [Prose(f"not run: {'; '.join(absent)}. Where one was planned, the limits of this run say why.")]
    parts = [[Part(TITLES[name]), *blocks] for name, blocks in found.items() if blocks]
    return [block for part in parts for block in part] + (note if absent else [])


def blocks_of(report: Json, name: str, audience: str) -> list[Block]:
    """The blocks of one probe; none if it did not run."""
    result = report["run"]["probes"][name]
    if result is None:
        return []
    views: dict[str, Callable[[], list[Block]]] = {
        "kfac": lambda: kfac.kfac(result, report["records"], audience),
        "spectrum": lambda: spectrum.spectrum(result),
        "localise": lambda: localise.localise(result),
        "condition": lambda: condition.condition(result, audience),
    }
    return views[name]()
