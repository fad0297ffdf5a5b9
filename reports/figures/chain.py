"""A chain of checkpoints from top to bottom: what it began with, what each edit left, the newest copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.figures.shapes import marker, rule, svg, words
from reports.text import number, short

STEP = 30.0
ENDS = (4, 8)  # links drawn at the top and at the bottom of a chain that is too long


@dataclass(frozen=True)
class Link:
    """One checkpoint of a chain: how it is marked, its name, its digest, what led to it, what came of that."""

    arm: str  # O: the original, N: an earlier copy, U: the newest copy
    label: str
    digest: str
    note: str
    outcome: str


def chain(name: str, title: str, links: Sequence[Link]) -> Markup:
    """Checkpoints below one another, joined by a rule; of a chain with more than 12, the first 4 and the last 8.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        links: from the original to the newest copy.
    """
    first, last = ENDS
    left_out = len(links) - first - last
    rows: list[Link | None] = list(links) if left_out <= 0 else [*links[:first], None, *links[-last:]]
    middle = [12 + STEP * index for index in range(len(rows))]
    body = [rule(12, middle[0], 12, middle[-1], "join")]
    for y, link in zip(middle, rows, strict=True):
        if link is None:
            body.append(words(34, y + 4, f"{number(left_out)} more copies", "soft"))
            continue
        body += [
            marker(link.arm, 12, y),
            words(34, y + 4, short(link.label, 26), "strong"),
            words(206, y + 4, link.digest, "mono"),
            words(368, y + 4, short(link.note, 44), "soft"),
            words(630, y + 4, short(link.outcome, 30), "value"),
        ]
    return svg(name, middle[-1] + 14, title, body)
