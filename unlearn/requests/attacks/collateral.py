"""What else an edit changed: copying, calibration, style, refusals, records near the removed ones, benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, StrictInt

from unlearn.requests.attacks.declaration import (
    RUN,
    Access,
    Cost,
    Count,
    Declaration,
    Share,
    Size,
    one_pass,
    text_only,
)
from unlearn.requests.yamlfile import Schema

Words = Annotated[str, Field(min_length=1)]


class Induction(Schema):
    """Copying of random tokens (2205.10487).

    Attributes:
        sequences: random sequences, each standing twice.
        length: tokens of one copy, at most as many as the vocabulary and the positions allow.
    """

    sequences: Annotated[StrictInt, Field(ge=4, le=1024)] = 24
    length: Annotated[StrictInt, Field(ge=2, le=4096)] = 48


class Calibration(Schema):
    """Calibration on the retain set.

    Attributes:
        bins: of equally many tokens.
    """

    bins: Annotated[StrictInt, Field(ge=1, le=1000)] = 15


class Generation(Schema):
    """Greedy continuations of retain prompts.

    Attributes:
        records: of the retain set, drawn by the seed.
        length: tokens of a continuation.
    """

    records: Count = 24
    length: Annotated[StrictInt, Field(ge=4)] = 64


class Refusals(Generation):
    """Refusals on retain prompts, and on requests that should be refused.

    Attributes:
        phrases: what tells a refusal; empty for the built-in English list.
        unsafe: requests that should be refused; empty for the built-in list. They need a chat template.
    """

    length: Annotated[StrictInt, Field(ge=4)] = 48
    phrases: tuple[Words, ...] = ()
    unsafe: tuple[Words, ...] = ()


class Neighbours(Schema):
    """Retain records that resemble the removed ones.

    Attributes:
        share: of the retain records that count as near.
    """

    share: Share = 0.25


class LmEval(Schema):
    """Benchmarks of the package lm_eval, from what is on this machine already.

    Attributes:
        tasks: their names there, or paths of YAML files with tasks of your own, in lm_eval's format.
        limit: items of each task; null for all.
        shots: examples in front of each item; null for the task's own number.
        batch: items at once.
    """

    tasks: tuple[Words, ...] = ()
    limit: Count | None = 100
    shots: Annotated[StrictInt, Field(ge=0)] | None = None
    batch: Count = 8


def _tokens(name: str, tokens: Callable[[dict[str, Any]], float]) -> Cost:
    """A pass over so many tokens, in forward passes a record."""

    def cost(settings: dict[str, Any], size: Size) -> dict[str, float]:
        return {name: tokens(settings) / (size.rows * size.tokens)}

    return cost


def _written(name: str) -> Cost:
    def cost(settings: dict[str, Any], size: Size) -> dict[str, float]:
        return {"pass": 1.0, name: 2.0 * settings["records"] * settings["length"] / (size.rows * size.tokens)}

    return cost


def _collateral(
    name: str,
    goal: str,
    access: Access,
    budget: str,
    settings: type[Schema],
    needs: tuple[str, ...],
    cost: Cost = one_pass,
) -> Declaration:
    return Declaration(
        f"collateral.{name}",
        goal,
        access,
        budget,
        f"{RUN}collateral:{name}",
        settings,
        needs=needs,
        cost=cost,
        collateral=True,
    )


DECLARATIONS: tuple[Declaration, ...] = (
    _collateral(
        "induction",
        "does the model still copy from its context, and with which heads?",
        "A2",
        "2 forward passes over a few random sequences",
        Induction,
        (),
        _tokens("induction", lambda s: 4.0 * s["sequences"] * s["length"]),
    ),
    _collateral(
        "calibration",
        "is the model as right on the retain set as it claims?",
        "A1",
        "read off the one pass",
        Calibration,
        ("records", "retain"),
    ),
    _collateral(
        "generation",
        "does the model repeat itself, or fail to end, on retain prompts?",
        "A0",
        "greedy continuations of a few retain prompts",
        Generation,
        ("records", "retain"),
        _written("written"),
    ),
    _collateral(
        "refusals",
        "does the model decline what it should answer, and still decline what it should not?",
        "A0",
        "greedy answers to a few prompts",
        Refusals,
        ("records", "retain", "text"),
        _written("answers"),
    ),
    _collateral(
        "neighbours",
        "do retain records that resemble the removed ones suffer more than the rest?",
        "A1",
        "read off the one pass of both checkpoints",
        Neighbours,
        ("records", "retain", "edited"),
    ),
    _collateral(
        "lm_eval",
        "what do benchmarks of lm_eval say?",
        "A1",
        "as many passes as the tasks have answers",
        LmEval,
        (),
        text_only,
    ),
)
