"""Style of what a model writes: does it repeat itself, grow short or poor in words, or fail to end?

For each generation of n tokens, up to and without its end token:

    repetition    1 - distinct 4-grams / 4-grams: 0 for fresh text, near 1 for a loop; None below 4 tokens
    distinct_1    distinct tokens / tokens; distinct_2 likewise of 2-grams; None where there are none
    length        n
    ended         whether an end token came within what was generated

Generations are lists of token ids made elsewhere, all with the same limit on their length.

Limits: symptoms of a broken model, not a judgement of its text; a shorter text repeats itself less.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probes.errors import UsageError
from probes.statistics import Clusters, Interval, difference_interval

GRAM = 4
FIGURES = ("repetition", "distinct_1", "distinct_2", "length", "ended")


@dataclass(frozen=True, slots=True)
class Change:
    """How one figure moved: mean after minus mean before, over records that have it both times.

    Attributes:
        figure: one of `FIGURES`.
        interval: paired, by cluster; None below two records.
        n: records.
    """

    figure: str
    interval: Interval | None
    n: int


def style(generations: Sequence[Sequence[int]], *, end: Collection[int] = ()) -> pd.DataFrame:
    """Figures of each generation, in order.

    Args:
        generations: token ids.
        end: end tokens; what follows the first of them is not looked at.

    Returns:
        A frame with `FIGURES` as numbers; NaN where a generation is too short for a figure.
    """
    rows = []
    for ids in generations:
        stop = next((i for i, token in enumerate(ids) if token in end), None)
        body = list(ids if stop is None else ids[:stop])
        fresh = {size: _distinct(body, size) for size in (1, 2, GRAM)}
        rows.append((1.0 - fresh[GRAM], fresh[1], fresh[2], float(len(body)), float(stop is not None)))
    return pd.DataFrame(np.array(rows, dtype=np.float64).reshape(-1, len(FIGURES)), columns=list(FIGURES))


def changes(
    before: pd.DataFrame, after: pd.DataFrame, *, clusters: Clusters = None, level: float = 0.95, seed: int = 0
) -> tuple[Change, ...]:
    """How each figure moved between two models on the same prompts.

    Args:
        before: from `style`, of one model.
        after: of the other, rows in the same order.
        clusters: of the prompts' records.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        UsageError: frames of different lengths.
    """
    if len(before) != len(after):
        raise UsageError(
            f"expected generations from the same prompts, found {len(before)} and {len(after)}; generate both again"
        )
    found = []
    for figure in FIGURES:
        x, y = after[figure].to_numpy(dtype=np.float64), before[figure].to_numpy(dtype=np.float64)
        kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        interval = None
        if len(kept) >= 2:
            interval = difference_interval(
                x[kept],
                y[kept],
                paired=True,
                clusters=None if clusters is None else [clusters[int(i)] for i in kept],
                level=level,
                bounds=None if figure == "length" else (0.0, 1.0),
                seed=seed,
            )
        found.append(Change(figure, interval, len(kept)))
    return tuple(found)


def _distinct(ids: Sequence[int], size: int) -> float:
    """Share of distinct n-grams; NaN without any."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")
