"""Part of section 5: what an editor that trains noted at each step, drawn as lines.

`edit/delta.json` has lists under `statistics`: a value for each step (the losses of its batches before the update, the
objective, the groups of adapters that are not zero) or for each look at rows that were held out. Which editor wrote
them does not matter: a list is drawn where its name is known and it holds two finite numbers at least.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from reports.blocks import Block, Prose
from reports.figures import Curve
from reports.sections.attack_charts import NamedSeries, line_chart
from reports.text import Json, number, plural

# name of a list, or of one inside a part, -> what it is called in the figure
LOSSES = {
    "forget_loss": "records to forget",
    "forget_divergence": "records to forget: divergence",
    "retain_loss": "records to keep",
    "retain_divergence": "records to keep: divergence",
    "earlier.loss": "records forgotten earlier",
    "objective": "objective",
}
COUNTS = {"active": "groups not zero"}
HELD_OUT = {
    "held_out_forget_loss": "wordings to forget",
    "held_out_retain_divergence": "wordings to keep: divergence",
    "held_out_divergence": "both, weighted",
}
PENALTIES = {"earlier_edits.penalty": "penalty"}
BOUNDS = {"bound": "bound", "max_forget_loss": "max_forget_loss"}  # parameters that the loss is read against
SOURCE = "method.edit.statistics"


def training_curves(statistics: Json, parameters: Json, part: str = "") -> tuple[list[Block], Json]:
    """Figures with their tables, and the statistics without the lists that they show.

    Args:
        statistics: of the edit.
        parameters: of the method, for the level that the losses are read against.
        part: name of a part of the edit with steps of its own; "" for the edit itself.
    """
    of, place = (f" of the {part}", f"{SOURCE}.{part}") if part else ("", SOURCE)
    name = f"training-{part}" if part else "training"
    blocks: list[Block] = []
    rest = dict(statistics)
    charts = (
        ("", f"Losses in training{of}", "step", "mean of the step's batch, nats", LOSSES, 1),
        ("-active", f"Groups of adapters that are not zero{of}", "step", "groups", COUNTS, 1),
        ("-penalty", f"Penalty on changing earlier edits again{of}", "step", "penalty", PENALTIES, 1),
        ("-held-out", f"Losses on wordings held out{of}", "look", "mean, nats", HELD_OUT, 0),
    )
    for suffix, title, across, up, known, first in charts:
        lines: list[NamedSeries] = []
        for key, label in known.items():
            values = _taken(rest, key)
            if values:
                steps = list(range(first, first + len(values)))
                lines.append((label, {"x": steps, "y": values, "low": None, "high": None}))
        if not lines:
            continue
        if known is COUNTS and len(set(lines[0][1]["y"])) == 1:
            values = lines[0][1]["y"]
            blocks.append(Prose(f"{title}: {number(values[0])} at every one of {plural(len(values), 'step')}."))
            continue
        axes = {"x": {"label": across, "scale": "linear"}, "y": {"label": up, "scale": "linear"}}
        ends = (1, max(len(series["x"]) for _, series in lines))
        blocks += line_chart(
            name + suffix,
            title,
            axes,
            lines,
            place,
            dashes=range(len(lines)),
            from_zero=True,
            guide=_bound(parameters, ends) if known is LOSSES and not part else None,
        )
    for key, value in rest.items():
        if not part and isinstance(value, dict) and isinstance(value.get("forget_loss"), list):
            more, rest[key] = training_curves(value, {}, key)
            blocks += more
    return blocks, rest


def _taken(statistics: Json, key: str) -> list[float]:
    """A list that can be drawn, which is taken out of the statistics; [] for anything else, which stays."""
    outer, _, inner = key.partition(".")
    holder = statistics.get(outer) if inner else statistics
    values = holder.get(inner or outer) if isinstance(holder, dict) else None
    if not isinstance(values, list) or len(values) < 2 or not all(_finite(value) for value in values):
        return []
    if inner:
        statistics[outer] = {name: value for name, value in statistics[outer].items() if name != inner}
    else:
        del statistics[outer]
    return values


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bound(parameters: Json, ends: tuple[int, int]) -> Curve | None:
    """The level that the loss of the records to forget is pushed to, or at which training ends."""
    for key, label in BOUNDS.items():
        level = parameters.get(key)
        if _finite(level) and level > 0:
            return Curve(label, [(float(at), float(level)) for at in ends])
    return None
