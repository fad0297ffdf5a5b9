"""One line per record: its value on every arm, joined by a rule; and the legend of the markers."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from reports.figures.shapes import Mark, marker, rule, svg, words
from reports.text import number, short


def dumbbells(name: str, title: str, rows: Sequence[tuple[str, Sequence[Mark]]], never_seen: float | None) -> Markup:
    """One line per record on an axis from 0 to 1: its value before, after and under the reference, joined by a rule.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        rows: (record id, marks), worst first.
        never_seen: mean level of never-seen control records, drawn as a dashed line; None if there is none.
    """
    left, right, line = 180.0, 680.0, 17.0
    body = []

    def place(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0), 1.0)

    bottom = 8 + line * len(rows)
    for at in (0.0, 0.25, 0.5, 0.75, 1.0):
        body += [
            rule(place(at), 4, place(at), bottom, "grid"),
            words(place(at), bottom + 15, f"{at:g}", "tick", "middle"),
        ]
    if never_seen is not None:
        body.append(rule(place(never_seen), 0, place(never_seen), bottom + 4, "limit"))
    for index, (label, marks) in enumerate(rows):
        y = 8 + line * (index + 0.5)
        body.append(words(left - 12, y + 4, short(label, 22), "mono", "end"))
        values = [place(mark.value) for mark in marks]
        if len(values) > 1:
            body.append(rule(min(values), y, max(values), y, "join"))
        # the latest state is drawn last, so that it is never hidden
        body += [
            marker(mark.arm, place(mark.value), y) for mark in sorted(marks, key=lambda mark: "NROU".index(mark.arm))
        ]
        body.append(
            words(right + 14, y + 4, " → ".join(number(mark.value) for mark in marks if mark.arm in "OU"), "value")
        )
    return svg(name, bottom + 22, title, body)


def key(arms: Sequence[tuple[str, str]]) -> Markup:
    """Legend of markers: (arm, words) side by side."""
    items = []
    for arm, meaning in arms:
        shape = rule(2, 7, 16, 7, "limit") if arm == "-" else marker(arm, 9, 7)
        items.append(
            f'<span class="key"><svg viewBox="0 0 18 14" width="18" height="14" aria-hidden="true">{shape}</svg>'
            f"{escape(meaning)}</span>"
        )
    return Markup("".join(items))
