"""Share of records whose first tokens are the model's own first choices, one after the other.

Read off the per-token table of the one pass: a completion's token of rank 0 is what greedy decoding would emit after
the tokens before it, so a run of k such tokens from the start is what greedy decoding begins with.

Limit: a record that begins as any text of its kind would is counted too. Compare with the never-seen records.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unlearn.attacking.result import Result
from unlearn.attacking.views import Views


def first_tokens(views: Views, settings: dict[str, Any]) -> Result:
    """The attack.

    Args:
        views: the model under attack, its records and what other attacks have computed of them.
        settings: the suite's entry, checked, with defaults.

    Returns:
        The share with its interval, the same on the control set where there is one, and a column `hit`.
    """
    k = settings["tokens"]
    result = Result(headline="begun", column="hit")
    hits = _hits(views, "records", k)
    never = _hits(views, "control", k) if views.has("control") else []
    result.rate(
        "begun",
        f"records whose first {k} tokens are the model's choice",
        hits,
        views.clusters(),
        never,
        views.clusters("control"),
    )
    result.records["hit"] = hits
    result.controls["hit"] = never
    return result


def _hits(views: Views, role: str, k: int) -> list[bool]:
    table = views.table(role)
    starts, ends = table.offsets[:-1], table.offsets[1:]
    ranks = table.rank  # [N] of all completion tokens; record i has those from offsets[i] on
    return [bool(np.all(ranks[start : min(start + k, end)] == 0)) for start, end in zip(starts, ends, strict=True)]
