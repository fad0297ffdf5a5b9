"""What the sections on curvature and the other probes share: settings, warnings, cells, which curves fit a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reports.blocks import Block, Cell, Facts, Prose, fact_pairs, percent_cell
from reports.figures.curves import COLOURS
from reports.text import Json, number, short_digest

DRAWN = COLOURS  # curves in one chart
WARNINGS = 10
OVERLAPS = ("overlap_a", "overlap_g")
OVERLAP = 0.8  # below this, two halves of the data disagree on which directions matter
SETTING_WORDS = {
    "rho": "Mass to keep",
    "memory_mb": "Memory limit, MB",
    "records": "Records at most",
    "k": "Eigenvalues an end",
    "samples": "Random vectors",
    "max_products": "Products at most",
}
DATA_WORDS = {"n_records": "Records", "n_tokens": "Tokens", "n_positions": "Positions"}


def about(result: Json) -> Facts:
    """The settings of a probe that were given a value, and the data it ran on."""
    data = result["data"]
    given = {key: value for key, value in result["settings"].items() if value not in (None, [])}
    pairs = fact_pairs({SETTING_WORDS.get(key, key): value for key, value in given.items()})
    pairs += [(words, Cell(number(data[key]))) for key, words in DATA_WORDS.items() if data[key] is not None]
    if data["digest"]:
        pairs.append(("Digest of the data", Cell(short_digest(data["digest"]), style="code")))
    return Facts(pairs or [("Settings", Cell("none"))], "Settings and data")


def warnings(result: Json) -> list[Block]:
    """A probe's own warnings as notes, the rest counted."""
    found = result["warnings"]
    more = [f"{len(found) - WARNINGS:,} more warnings are in the JSON document."] if len(found) > WARNINGS else []
    return [*(Prose(f"Warning: {text}", "open") for text in found[:WARNINGS]), *(Prose(text) for text in more)]


def strongest(rows: Sequence[Json], size: Callable[[Json], float | None], most: int = DRAWN) -> list[Json]:
    """The rows that are drawn as curves: the largest of them, in their own order."""
    order = sorted(range(len(rows)), key=lambda index: (-(size(rows[index]) or 0.0), index))
    return [rows[index] for index in sorted(order[:most])]


def part_cell(part: int | None, whole: int | None) -> Cell:
    """A count of a larger one, with the share below."""
    share = f"of {number(whole)}, {percent_cell(part / whole).text}" if part is not None and whole else ""
    return Cell(number(part), share, "num", "" if part is not None else "muted")


def overlap_cell(value: float | None) -> Cell:
    """Agreement of two halves of the data on the leading directions, marked where it is low."""
    low = value is not None and value < OVERLAP
    return Cell(number(value), "", "num", "muted" if value is None else "open" if low else "")
