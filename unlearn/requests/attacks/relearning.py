"""Attacks that train a little, and watch what comes back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from unlearn.requests.attacks.declaration import BOTH, RUN, SCORED, Cost, Count, Declaration, Number, Size
from unlearn.requests.yamlfile import Schema


class Training(Schema):
    """Training on something, and what is scored (arXiv 2410.08827, 2406.13356, 2505.22310).

    Attributes:
        how: lora (adapters on the linear maps of every block), full (all weights), or auto: lora where it has a place.
        steps: training steps.
        marks: further numbers of steps after which to score; those beyond `steps` are left out.
        learning_rate: constant; null takes 3e-4 for lora and 5e-5 for full.
        batch: records a step.
        rank: of lora; its alpha is twice that.
        scored: records scored, and never-seen ones, drawn by the seed where there are more.
    """

    how: Literal["auto", "lora", "full"] = "auto"
    steps: Annotated[StrictInt, Field(ge=1, le=10_000)] = 20
    marks: tuple[Count, ...] = (5,)
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    batch: Count = 8
    rank: Count = 16
    scored: Count = 100


class Relearning(Training):
    """Training on half of the records; the other half is scored.

    Attributes:
        retain: records of the retain set in the curve, where there is one.
    """

    retain: Annotated[StrictInt, Field(ge=0)] = 50


class Savings(Schema):
    """Training on records and as many never-seen ones (Ebbinghaus 1885, arXiv 2303.17557).

    Attributes:
        how: as for recovery.relearning.
        steps: the budget.
        every: steps between two looks.
        criterion: token accuracy at which a record counts as learnt.
        learning_rate: as for recovery.relearning.
        batch: records a step.
        rank: of lora.
        records: records, and as many never-seen ones, drawn by the seed where there are more.
    """

    how: Literal["auto", "lora", "full"] = "auto"
    steps: Annotated[StrictInt, Field(ge=1, le=10_000)] = 20
    every: Count = 4
    criterion: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.9
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    batch: Count = 8
    rank: Count = 16
    records: Count = 16


def _tuned(view: str, halves: bool = False) -> Cost:
    """A step is three passes of its batch; every mark, the last step included, one of what is scored."""

    def cost(settings: dict[str, Any], size: Size) -> dict[str, float]:
        records = size.records / 2 if halves else size.records
        scored = min(settings["scored"], records) + min(settings["scored"], size.control) + settings.get("retain", 0)
        marks = 1 + sum(mark < settings["steps"] for mark in set(settings["marks"]))
        return {"pass": 1.0, view: (3.0 * settings["steps"] * settings["batch"] + marks * scored) / size.rows}

    return cost


def _saved(settings: dict[str, Any], size: Size) -> dict[str, float]:
    scored = 2 * min(settings["records"], size.records)
    marks = -(-settings["steps"] // settings["every"])
    return {"pass": 1.0, "savings": (3.0 * settings["steps"] * settings["batch"] + marks * scored) / size.rows}


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "recovery.relearning",
        "does training on half of the records bring the other half back?",
        "A2",
        "20 training steps of 8 records; half of the records scored twice",
        RUN + "relearning:relearning",
        Relearning,
        BOTH,
        SCORED,
        _tuned("relearning", halves=True),
        stress=True,
    ),
    Declaration(
        "recovery.retain_tuning",
        "does training on the retain set alone bring the records back?",
        "A2",
        "20 training steps of 8 records; the records scored twice",
        RUN + "relearning:retain_tuning",
        Training,
        BOTH,
        (*SCORED, "retain"),
        _tuned("retain_tuning"),
        stress=True,
    ),
    Declaration(
        "recovery.related_tuning",
        "does training on related text, none of it a record, bring the records back?",
        "A2",
        "20 training steps of 8 texts; the records scored twice",
        RUN + "relearning:related_tuning",
        Training,
        BOTH,
        (*SCORED, "related"),
        _tuned("related_tuning"),
        stress=True,
    ),
    Declaration(
        "recovery.savings",
        "are the records learnt again sooner than never-seen ones?",
        "A2",
        "20 training steps of 8 records; a few records scored every 4 steps",
        RUN + "relearning:savings",
        Savings,
        BOTH,
        SCORED,
        _saved,
        stress=True,
    ),
)
