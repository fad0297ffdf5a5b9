"""What the catalogue has to know about the attack. `unlearn ls attacks` imports this: no model library here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictInt

from unlearn.requests.attacks import Declaration
from unlearn.requests.yamlfile import Schema


class FirstTokens(Schema):
    """Settings, as a suite or `--set` gives them.

    Attributes:
        tokens: how many tokens of the completion; all of a shorter one.
    """

    tokens: Annotated[StrictInt, Field(ge=1)] = 4


FIRST_TOKENS = Declaration(
    name="example.first_tokens",
    goal="are the first tokens of the record what the model would say?",
    access="A0",
    budget="read off the one pass",
    runner="unlearn_first_tokens.runner:first_tokens",
    settings=FirstTokens,
    tasks=("causal_lm",),
    needs=("records",),
    cost=lambda settings, size: {"pass": 1.0},  # the pass every audit makes anyway: nothing is added
)
