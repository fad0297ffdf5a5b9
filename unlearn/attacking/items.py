"""The records that a surface attack asks for: prompt and completion as text, tokenised as one.

Of a `text` record the first half of its words is the prompt and the rest is looked for; of a conversation the last
turn before the answer is what is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from probes.errors import UsageError
from probes.figures import record_figures
from probes.memorised import of_texts
from probes.records import TokenRecord
from unlearn.attacking.stress import rows_of
from unlearn.attacking.views import ROLES, Views
from unlearn.records.raw import Message, RawRecord

FIGURES = ("probability", "accuracy", "extracted")


@dataclass(frozen=True, slots=True, repr=False)
class Item:
    """One record that is asked for.

    Attributes:
        raw: the record.
        row: its number in the set.
        prompt: what is changed.
        completion: what is looked for, with the blank that parts it from the prompt.
        cluster: near-duplicate cluster, for intervals.
        kin: the same, a drafted control record with its original: what must not stand in front of it.
    """

    raw: RawRecord
    row: int
    prompt: str
    completion: str
    cluster: str | None
    kin: str | None

    def put(self, prompt: str) -> RawRecord:
        """The record with another prompt."""
        messages = self.raw.messages
        if messages is not None:
            changed = Message(messages[-2].role, prompt)
            return replace(self.raw, messages=(*messages[:-2], changed, messages[-1]))
        return replace(self.raw, text=None, prompt=prompt, completion=self.completion)


Sets = dict[str, list[Item]]


def asked_for(views: Views, most: int | None, among: Mapping[str, np.ndarray] | None = None) -> Sets:
    """The records that are asked for, of each set.

    Args:
        views: the model under attack.
        most: how many of each set, drawn by the seed; None for all.
        among: by set, row numbers to draw from.

    Raises:
        UsageError: no record with a prompt and a completion.
    """
    sets: Sets = {}
    for role in ROLES:
        usable = all_of(views, role)
        if among is not None:
            wanted = set(among[role].tolist())
            usable = [item for item in usable if item.row in wanted]
        chosen = set(rows_of(views, role, most, np.array([item.row for item in usable], dtype=np.int64)).tolist())
        sets[role] = [item for item in usable if item.row in chosen]
    if not sets["records"]:
        raise UsageError("expected records with a prompt and a completion, found none; texts of one word have none")
    return sets


def all_of(views: Views, role: str) -> list[Item]:
    """Every record of a set that has a prompt and a completion; none where the set is missing or came without text."""
    raw = (views.raw(role) if views.has(role) else None) or []
    if not raw:
        return []
    kin = views.paired_clusters()[ROLES.index(role)] if role in ROLES else views.clusters(role)
    found = zip(raw, map(parts_of, raw), views.clusters(role), kin, strict=True)
    return [Item(record, i, *part, *groups) for i, (record, part, *groups) in enumerate(found) if part is not None]


def parts_of(record: RawRecord) -> tuple[str, str] | None:
    """Prompt and completion; None for a text that cannot be split between words."""
    if record.messages is not None:
        return record.messages[-2].content, " " + record.messages[-1].content
    if record.prompt is not None and record.completion is not None:
        return (record.prompt, record.completion) if record.prompt.strip() else None
    text = record.text or ""
    gaps = [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not gaps:
        return None
    cut = min(gaps, key=lambda at: abs(at - len(text) // 2))
    return text[:cut], text[cut:]


def encoded(views: Views, raw: RawRecord) -> TokenRecord | None:
    """One record as the model takes it; None where it is longer than the model has positions, or cannot be rendered."""
    try:
        return views.encode([raw])[0]
    except UsageError:
        return None


def known_mean(values: np.ndarray) -> float | None:
    """Mean of what is no NaN; None where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def scored(views: Views, raws: Sequence[RawRecord]) -> np.ndarray:
    """[len(raws), 3] probability, accuracy, extracted; NaN where a record could not be tokenised."""
    found = [encoded(views, raw) for raw in raws]
    known = [record for record in found if record is not None]
    out = np.full((len(raws), len(FIGURES)), np.nan)
    if known:
        frame = of_texts(record_figures(views.score(known)))
        out[[record is not None for record in found]] = frame[list(FIGURES)].to_numpy(dtype=np.float64)
    return out


def frame_of(values: np.ndarray) -> pd.DataFrame:
    """`FIGURES` [n, 3] as `probes.memorised` gives them."""
    frame = pd.DataFrame(values, columns=list(FIGURES))
    return frame.astype({"extracted": bool})


def plain_of(views: Views, role: str, items: Sequence[Item]) -> pd.DataFrame:
    """The figures of the same completions behind their own prompts."""
    if all(item.raw.text is None for item in items):
        return views.plain(role).iloc[[item.row for item in items]].reset_index(drop=True)
    return frame_of(np.nan_to_num(scored(views, [item.put(item.prompt) for item in items])))
