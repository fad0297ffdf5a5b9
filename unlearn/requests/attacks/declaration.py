"""What an attack declares: its goal, what an attacker must hold, what it needs, what it costs, its settings.

Access: A0 text, A1 log-probabilities, A2 weights, A3 both checkpoints, A4 training. A cost is counted in forward
passes of the audited model per record, by the pass that yields it, so that attacks which share a pass share its cost.
Nothing here loads a model library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from unlearn.requests.yamlfile import Schema

Task = Literal["causal_lm", "image_classification"]
Access = Literal["A0", "A1", "A2", "A3", "A4"]
LANGUAGE: tuple[Task, ...] = ("causal_lm",)
BOTH: tuple[Task, ...] = ("causal_lm", "image_classification")
PLANNED = "not part of this version"
SCORED = ("records", "control")
RUN = "unlearn.attacking."

Number = Annotated[float, Field(strict=True)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
Count = Annotated[StrictInt, Field(ge=1)]

# What an attack may need, in words for "not run: it needs ...".
NEEDS = {
    "records": "records",
    "control": "a control set of never-seen records",
    "reference": "a reference that never held the records",
    "text": "records as text",
    "corpus": "a corpus (--corpus)",
    "canaries": "canaries with their format (--canaries)",
    "candidates": "candidates for each record (--candidates)",
    "chat_template": "a tokenizer with a chat template",
    "retain": "a retain set",
    "related": "related text that is none of the records (--related)",
    "paraphrases": "paraphrases or translations of each prompt (--paraphrases)",
    "edited": "an edited copy beside the original",
}


class Plain(Schema):
    """An attack without settings."""


@dataclass(frozen=True, slots=True)
class Size:
    """What costs depend on: numbers of records and controls, mean tokens of one, canaries."""

    records: int
    control: int = 0
    tokens: float = 50.0
    canaries: int = 0

    @property
    def rows(self) -> int:
        """Records and controls."""
        return max(1, self.records + self.control)


Cost = Callable[[dict[str, Any], Size], dict[str, float]]


def one_pass(settings: dict[str, Any], size: Size) -> dict[str, float]:
    """Read off the one pass."""
    return {"pass": 1.0}


def text_only(settings: dict[str, Any], size: Size) -> dict[str, float]:
    """No pass."""
    return {}


def also(**views: float) -> Cost:
    """The one pass, and others by name."""
    return lambda settings, size: {"pass": 1.0} | views


def generated(settings: dict[str, Any], size: Size) -> dict[str, float]:
    """Free samples."""
    tokens = settings["n"] * settings["length"]
    return {f"samples.{settings['n']}.{settings['length']}": 2 * tokens / (size.rows * size.tokens)}


@dataclass(frozen=True, slots=True)
class Declaration:
    """One attack.

    Attributes:
        name: family, dot, attack.
        goal: the question it answers.
        access: the least an attacker must hold.
        budget: queries in words, for reports.
        runner: `module:function` that runs it; None where it is not part of this version.
        settings: schema of its settings; defaults fill in what a suite leaves out.
        tasks: kinds of model it is defined for.
        needs: keys of `NEEDS`.
        cost: forward passes of the audited model per record, by the pass they come from.
        reason: why there is no runner.
        once: whether the outcome does not depend on the model; it then runs for the checkpoint as given alone.
        stress: whether its residual decides, after an edit, if the records were hidden (`unlearn.evidence.stress`).
        collateral: whether it is no attack but a look at what else an edit changed.
    """

    name: str
    goal: str
    access: Access
    budget: str = ""
    runner: str | None = None
    settings: type[Schema] = Plain
    tasks: tuple[Task, ...] = LANGUAGE
    needs: tuple[str, ...] = ("records",)
    cost: Cost = field(default=one_pass)
    reason: str = PLANNED
    once: bool = False
    stress: bool = False
    collateral: bool = False

    @property
    def family(self) -> str:
        """First part of the name."""
        return self.name.partition(".")[0]
