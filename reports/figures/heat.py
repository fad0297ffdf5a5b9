"""Layer by module maps: one cell per block and module, darker = more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from reports.figures.shapes import WIDTH, rect, svg, words
from reports.text import short

_COLD = 'class="cold"'
FAINTEST = 0.12  # opacity of the smallest value that is drawn at all


def heat_map(
    name: str,
    title: str,
    cells: Mapping[tuple[str, int], float | None],
    roles: Sequence[str],
    blocks: int,
    *,
    cold: str,
    low: str = "",
    high: str,
    log: bool = False,
    missing: str = "",
) -> Markup:
    """Layer by module map: darker = a larger value; an outlined cell holds nothing.

    Args:
        name: prefix of the element ids.
        title: text alternative.
        cells: value by (role, block index); absent or not positive: outlined; None: hatched.
        roles: row labels from top to bottom.
        blocks: number of columns.
        cold: what an outlined cell means.
        low: words before the scale; empty where it starts at nothing.
        high: words after the scale, with its largest value.
        log: shades follow the logarithm, from the smallest to the largest value, for values over many orders.
        missing: what a hatched cell means; named in the legend where there is one.
    """
    left, top, height = 118.0, 20.0, 21.0
    width = min(30.0, (WIDTH - left - 4) / max(blocks, 1))
    values = [value for value in cells.values() if value is not None and value > 0]
    smallest, largest = min(values, default=0.0), max(values, default=0.0)

    def shade(value: float) -> float:
        share = value / largest
        if log:
            reach = math.log(largest) - math.log(smallest)
            share = (math.log(value) - math.log(smallest)) / reach if reach > 0 else 1.0
        return FAINTEST + (1 - FAINTEST) * share

    every = next((step for step in (1, 2, 5, 10, 20, 50) if step * width >= 22), 100)
    body = [
        words(left + (block + 0.5) * width, top - 7, str(block), "tick", "middle") for block in range(0, blocks, every)
    ]
    body.append(words(left - 10, top - 7, "block", "tick", "end"))
    gap = 1.0 if width > 8 else 0.3
    for index, role in enumerate(roles):
        y = top + index * height
        body.append(words(left - 10, y + 14.5, short(role, 18), "soft", "end"))
        for block in range(blocks):
            value = cells.get((role, block), 0.0)
            box = (left + block * width + gap, y + gap, width - 2 * gap, height - 2 * gap)
            if value is None:
                body.append(rect(*box, f'fill="url(#{name}-O)"'))
            else:
                body.append(rect(*box, f'class="heat" fill-opacity="{shade(value):.2f}"' if value > 0 else _COLD))
    y = top + len(roles) * height + 18
    body += [rect(left + 1, y - 10, 14, 13, _COLD), words(left + 21, y + 1, cold, "tick")]
    x = left + max(110.0, 42 + 5.8 * len(cold))
    if low:
        body.append(words(x, y + 1, low, "tick"))
        x += 5.8 * len(low) + 10
    for index in range(5):
        step = FAINTEST + (1 - FAINTEST) * (index / 4 if log else (index + 1) / 5)
        body.append(rect(x + 26 * index, y - 10, 25, 13, f'class="heat" fill-opacity="{step:.2f}"'))
    body.append(words(x + 138, y + 1, high, "tick"))
    if missing and None in cells.values():
        x += 158 + 5.8 * len(high)
        body += [rect(x, y - 10, 14, 13, f'fill="url(#{name}-O)"'), words(x + 20, y + 1, missing, "tick")]
    return svg(name, y + 8, title, body)
