"""Attacks that ask whether the records were in training, and how far the model remembers them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt

from unlearn.requests.attacks.declaration import (
    BOTH,
    LANGUAGE,
    RUN,
    SCORED,
    Access,
    Cost,
    Count,
    Declaration,
    Number,
    Plain,
    Share,
    also,
    one_pass,
    text_only,
)
from unlearn.requests.yamlfile import Schema


class Membership(Schema):
    """One membership score, evaluated against the control set.

    Attributes:
        fprs: false-positive rates at which the true-positive rate is wanted.
    """

    fprs: tuple[Share, ...] = (0.01, 0.05)


class MinK(Membership):
    """Min-K% and Min-K%++.

    Attributes:
        share: of the tokens, those with the lowest score.
    """

    share: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.2


class Recall(Membership):
    """ReCaLL (2406.15968).

    Attributes:
        shots: never-seen records in front of each record; they are not scored.
    """

    shots: Annotated[StrictInt, Field(ge=1, le=32)] = 4


class Rmia(Membership):
    """RMIA, offline, with the reference (2312.03262).

    Attributes:
        gamma: by what factor a member must beat a member of the population.
        a: how the reference stands in for a model that saw the record.
    """

    gamma: Annotated[Number, Field(ge=1)] = 1.0
    a: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.3


class Flagged(Schema):
    """A list of records flagged as members with a bounded false-discovery rate (2510.09717).

    Attributes:
        q: the bound.
        score: which score decides; null takes the reference ratio where there is a reference, the loss otherwise.
    """

    q: Share = 0.05
    score: str | None = None


class Dataset(Schema):
    """Dataset inference (2406.06443).

    Attributes:
        splits: random halves whose p-values are combined.
    """

    splits: Annotated[StrictInt, Field(ge=1, le=200)] = 10


class Bits(Schema):
    """Learned bits (2404.05405).

    Attributes:
        prior: what a reader without the model would pay: the reference, or the same number of bits for every token.
    """

    prior: Literal["reference", "uniform"] = "uniform"


class Counterfactual(Schema):
    """Counterfactual memorisation from fine-tunes on random halves (Feldman and Zhang 2020).

    Attributes:
        runs: fine-tunes, in pairs that split the records between them.
        epochs: passes of each over its half.
        learning_rate: of AdamW.
        batch: records a step.
    """

    runs: Annotated[StrictInt, Field(ge=4, multiple_of=2)] = 16
    epochs: Count = 10
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    batch: Count = 8


class OneRun(Schema):
    """A lower bound on epsilon from one training run (2305.08846).

    Attributes:
        randomised: say true where a fair coin decided, record by record, what went into training (records) and what
            stayed out (control); without that the bound means nothing.
        guesses: share of the records guessed on, the most certain ones on either side.
        delta: of the differential-privacy statement.
    """

    randomised: StrictBool = False
    guesses: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.5
    delta: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0


def _membership(
    name: str,
    what: str,
    access: Access,
    settings: type[Schema],
    needs: tuple[str, ...] = (),
    cost: Cost = one_pass,
    **more: Any,
) -> Declaration:
    return Declaration(
        f"membership.{name}",
        f"can members be told from never-seen records by {what}?",
        access,
        more.pop("budget", "read off the one pass"),
        RUN + "membership:score",
        settings,
        more.pop("tasks", LANGUAGE),
        (*SCORED, *needs),
        cost,
    )


DECLARATIONS = (
    Declaration(
        "membership.blind",
        "can the records be told from the control set without the model?",
        "A0",
        "text only",
        RUN + "membership:blind",
        Plain,
        BOTH,
        SCORED,
        text_only,
        once=True,
    ),
    _membership("loss", "their loss", "A1", Membership, tasks=BOTH),
    _membership("zlib", "loss per compressed byte", "A1", Membership),
    _membership("min_k", "their least likely tokens", "A1", MinK),
    _membership("min_k_plus_plus", "their least likely tokens, standardised", "A1", MinK),
    _membership("surprising", "unlikely tokens where the model is sure", "A1", Membership),
    _membership("margin", "the margin of the label", "A1", Membership, tasks=("image_classification",)),
    _membership("entropy", "the entropy of the prediction", "A1", Membership, tasks=("image_classification",)),
    _membership(
        "lowercase",
        "what lower case does to their loss",
        "A1",
        Membership,
        ("text",),
        also(lower=1.0),
        budget="1 more forward pass",
    ),
    _membership(
        "recall",
        "what a never-seen prefix does to their loss",
        "A1",
        Recall,
        (),
        lambda s, n: {"pass": 1.0, f"prefixed.{s['shots']}": 1.1},
        budget="1 forward pass behind a prefix",
    ),
    _membership("reference", "the ratio to the reference", "A1", Membership, ("reference",), tasks=BOTH),
    _membership("windows", "sliding windows against the reference", "A1", Membership, ("reference",)),
    _membership("rmia", "RMIA with the reference", "A1", Rmia, ("reference",), tasks=BOTH),
    _membership(
        "gradient_norm",
        "the norm of their gradient",
        "A2",
        Membership,
        (),
        lambda s, n: {"gradient": 3.0},
        budget="1 forward and backward pass",
        tasks=BOTH,
    ),
    Declaration(
        "membership.flagged",
        "which records can be called members with few false discoveries?",
        "A1",
        "read off the scores",
        RUN + "membership:flagged",
        Flagged,
        BOTH,
        SCORED,
        one_pass,
    ),
    Declaration(
        "membership.dataset",
        "was the set as a whole in training?",
        "A1",
        "read off the scores",
        RUN + "membership:dataset",
        Dataset,
        LANGUAGE,
        SCORED,
        one_pass,
    ),
    Declaration(
        "memory.recognition",
        "is a record recognised against a never-seen one, whether or not it is recalled?",
        "A1",
        "read off the one pass",
        RUN + "memory:recognition",
        Plain,
        LANGUAGE,
        SCORED,
    ),
    Declaration(
        "memory.bits",
        "how many bits of the records does the model hold?",
        "A1",
        "read off the one pass",
        RUN + "memory:bits",
        Bits,
    ),
    Declaration(
        "memory.counterfactual",
        "how much does seeing a record change the model on it?",
        "A4",
        "fine-tunes on random halves of the records",
        RUN + "memory:counterfactual",
        Counterfactual,
        cost=lambda s, n: {"training": s["runs"] * (1.5 * s["epochs"] + 1.0) * n.records / n.rows},
    ),
    Declaration(
        "privacy_bound.one_run",
        "what lower bound on epsilon do planted records give?",
        "A4",
        "read off the one pass",
        RUN + "membership:one_run",
        OneRun,
        BOTH,
        SCORED,
    ),
)
