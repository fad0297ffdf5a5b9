"""Attacks that hold the checkpoint from before the edit as well.

Neither decides whether the edit hid the records: the original knows them, and gives them away beside a model that was
retrained without them as well.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictInt

from unlearn.requests.attacks.declaration import BOTH, RUN, Count, Declaration, Number, Size
from unlearn.requests.yamlfile import Schema


def _apart(weights: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(weights)) < len(weights):
        raise ValueError("expected each weight once")
    return weights


Weight = Annotated[Number, Field(ge=-10, le=10)]


class Readout(Schema):
    """The edit read off the weights, and the forget set off the losses.

    Attributes:
        largest: smaller side of a matrix up to which all singular values are computed; of larger ones the top 32 are.
        shown: tensors listed, the largest change first.
    """

    largest: Annotated[StrictInt, Field(ge=1, le=16384)] = 1024
    shown: Annotated[StrictInt, Field(ge=1, le=200)] = 12


class Guidance(Schema):
    """Reversed model guidance (2505.24379).

    Attributes:
        records: of each set, drawn by the seed.
        weight: 0 is the edited model, 1 the original, above 1 beyond it; this one is reported with intervals.
        others: further weights, for the curve.
        keep: tokens less probable under the original than this share of its likeliest one are not emitted.
    """

    records: Count = 64
    weight: Weight = 1.5
    others: Annotated[tuple[Weight, ...], AfterValidator(_apart), Field(max_length=16)] = (0.0, 0.5, 1.0, 2.0)
    keep: Annotated[Number, Field(ge=0, le=1)] = 0.1


def _guided(settings: dict[str, Any], size: Size) -> dict[str, float]:
    scored = min(settings["records"], size.records) + min(settings["records"], size.control)
    return {"pass": 1.0, "guidance": 2.0 * scored / size.rows}


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "edit_difference.readout",
        "do both checkpoints together show what was removed?",
        "A3",
        "read off the weights and the one pass of both",
        RUN + "difference:readout",
        Readout,
        BOTH,
        ("records", "edited"),
    ),
    Declaration(
        "edit_difference.guidance",
        "does the original, steering the edited model, bring the records back?",
        "A3",
        "1 forward pass of each checkpoint",
        RUN + "difference:guidance",
        Guidance,
        needs=("records", "edited"),
        cost=_guided,
    ),
)
