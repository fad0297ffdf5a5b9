"""Attacks that search for an input which brings records back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictInt

from unlearn.requests.attacks.declaration import RUN, SCORED, Count, Declaration, Number, Share, Size
from unlearn.requests.yamlfile import Schema

Positive = Annotated[Number, Field(gt=0)]


def _ascending(marks: tuple[int, ...]) -> tuple[int, ...]:
    if list(marks) != sorted(set(marks)):
        raise ValueError("expected numbers of steps in ascending order, each once")
    return marks


Marks = Annotated[tuple[Count, ...], Field(min_length=1, max_length=16), AfterValidator(_ascending)]


class SoftPrompt(Schema):
    """A universal soft prompt, trained on half of the records and tried on the other half.

    Attributes:
        length: vectors in front of each prompt.
        steps: training steps.
        batch: records a step.
        learning_rate: of Adam, in root mean squares of the embedding table.
        context: most tokens of other records in front while training; drawn anew in every step.
        initial: what the vectors start from: the mean embedding, or the embeddings of random tokens.
        scored: records of each set, drawn by the seed.
    """

    length: Annotated[StrictInt, Field(ge=1, le=256)] = 5
    steps: Count = 60
    batch: Count = 8
    learning_rate: Positive = 0.1
    context: Annotated[StrictInt, Field(ge=0)] = 16
    initial: Literal["mean", "tokens"] = "mean"
    scored: Count = 64


class Nearby(Schema):
    """What both searches for a nearby input share.

    Attributes:
        marks: numbers of steps, one of which becomes the budget; the last one ends the search.
        step: length of a step as a share of the radius.
        restarts: searches a record; the first starts at the record itself.
        fpr: share of never-seen records that may succeed within the budget, of those that do not succeed at once.
        threshold: probability that counts as a success, as every token being the argmax does.
        scored: records of each set, drawn by the seed; of the control set, as many again to calibrate on.
    """

    marks: Marks = (1, 2, 5, 10)
    step: Share = 0.2
    restarts: Annotated[StrictInt, Field(ge=1, le=32)] = 1
    fpr: Share = 0.05
    threshold: Share = 0.5
    scored: Count = 32


class Embedding(Nearby):
    """Embeddings of each prompt's own tokens, moved within a radius.

    Attributes:
        radius: most a token moves, in mean nearest-neighbour distances of the embedding table.
    """

    radius: Positive = 0.5


class Images(Nearby):
    """Pixels of each image, moved within a radius.

    Attributes:
        radius: most a pixel (linf), or the root mean square of all (l2), moves, as a share of each channel's range.
        norm: which.
    """

    radius: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.03
    norm: Literal["linf", "l2"] = "linf"
    marks: Marks = (1, 2, 5, 10, 20)
    step: Share = 0.05
    scored: Count = 64


class Suffix(Schema):
    """A universal suffix by greedy coordinate gradient, trained on half of the records and tried on the other half.

    Attributes:
        length: tokens between prompt and completion.
        steps: gradient steps.
        batch: records a step.
        candidates: replacements evaluated a step.
        top_k: replacements considered for each position.
        scored: records of each set, drawn by the seed.
    """

    length: Annotated[StrictInt, Field(ge=1, le=256)] = 10
    steps: Count = 100
    batch: Count = 4
    candidates: Count = 64
    top_k: Count = 64
    scored: Count = 64


# A backward pass to the inputs, past frozen weights, costs about one forward pass.
_ROUND = 2


def _soft_prompt(settings: dict[str, Any], size: Size) -> dict[str, float]:
    trained = 2 * _ROUND * settings["steps"] * settings["batch"]  # on the records, and on never-seen ones
    scored = 2 * _half(settings, size.records) + 2 * _half(settings, size.control)
    return {"pass": 1.0, "elicitation.soft_prompt": (trained + scored) / size.rows}


def _nearby(settings: dict[str, Any], size: Size) -> dict[str, float]:
    searched = min(settings["scored"], size.records) + 2 * _half(settings, size.control)
    rounds = settings["restarts"] * (_ROUND * settings["marks"][-1] + 1)
    return {"pass": 1.0, "elicitation.nearby": searched * rounds / size.rows}


def _suffix(settings: dict[str, Any], size: Size) -> dict[str, float]:
    searched = settings["steps"] * settings["batch"] * (settings["candidates"] + _ROUND)
    searched += (settings["steps"] // 5 + 2) * size.records / 2
    scored = _half(settings, size.records) + _half(settings, size.control)
    return {"pass": 1.0, "elicitation.suffix": (searched + scored) / size.rows}


def _half(settings: dict[str, Any], records: int) -> int:
    return min(int(settings["scored"]), -(-records // 2))


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "elicitation.soft_prompt",
        "does a soft prompt trained on half of the records bring the other half back?",
        "A2",
        "training of a few vectors on half of the records, and again on half of the control set",
        RUN + "elicitation:soft_prompt",
        SoftPrompt,
        needs=SCORED,
        cost=_soft_prompt,
        stress=True,
    ),
    Declaration(
        "elicitation.embedding",
        "does a small move of a prompt's embeddings bring its record back sooner than never-seen ones?",
        "A2",
        "gradient steps for each record, as many as never-seen records withstand",
        RUN + "elicitation:embedding",
        Embedding,
        needs=SCORED,
        cost=_nearby,
        stress=True,
    ),
    Declaration(
        "elicitation.images",
        "does a small move of its pixels bring an image's label back sooner than never-seen ones'?",
        "A2",
        "gradient steps for each image, as many as never-seen images withstand",
        RUN + "elicitation:images",
        Images,
        ("image_classification",),
        SCORED,
        _nearby,
        stress=True,
    ),
    Declaration(
        "elicitation.suffix",
        "does a suffix found on half of the records bring the other half back?",
        "A2",
        "greedy coordinate gradient on half of the records",
        RUN + "elicitation:suffix",
        Suffix,
        needs=SCORED,
        cost=_suffix,
        stress=True,
    ),
)
