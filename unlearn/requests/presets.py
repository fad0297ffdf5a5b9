"""Policies, suites and method presets: the YAML files that say what is judged, attacked and edited with what.

Each is chosen by name from the shipped `configs/`, or by the path of a file of the user's own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StrictBool,
    StringConstraints,
    model_validator,
)

from unlearn.mistakes import suggestion
from unlearn.requests.attacks import Attacks, Reaudit, Sampling, catalogue
from unlearn.requests.probes import Probes
from unlearn.requests.yamlfile import Schema, parse, read_yaml
from unlearn.resources import config_names, config_path

Task = Literal["causal_lm", "image_classification"]
Number = Annotated[float, Field(strict=True)]  # not strict, `yes` would be 1.0
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

# The metrics of `unlearn.evidence.metrics`, repeated here because a request is checked without loading pandas or torch.
BINARY = {"causal_lm": {"extraction.greedy"}, "image_classification": {"correct"}}
SHARES = {
    "causal_lm": {"extraction.sampled", "extraction_strength", "token_accuracy", "probability"} | BINARY["causal_lm"],
    "image_classification": {"label_probability"} | BINARY["image_classification"],
}
METRICS: dict[Task, set[str]] = {
    "causal_lm": {"loss", "min_k", "min_k_plus_plus", "zlib_ratio"} | SHARES["causal_lm"],
    "image_classification": {"loss", "margin", "entropy"} | SHARES["image_classification"],
}


RESIDUAL = "residual"  # of an attack on an edit's durability: no figure of one checkpoint, so it has no table column


def _known_metric(value: str) -> str:
    known = sorted({RESIDUAL}.union(*METRICS.values()))
    if value not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return value


def _known_attack(value: str) -> str:
    known = sorted(name for name, declaration in catalogue().items() if declaration.stress)
    if value not in ("all", *known):
        raise ValueError(f"expected `all` or one of {', '.join(known)}{suggestion(value, known)}")
    return value


class Criterion(Schema):
    """One condition, written down before any model is loaded.

    `upper95` wants the one-sided 95 % upper bound of the figure at most `max`; `point` the figure itself.
    `noninferiority` wants the one-sided 95 % bound of the worsening against another arm at most `margin`;
    `equivalence` wants the whole difference within +-`margin` (two one-sided tests). The metric `residual` is what an
    edit left under an `attack`, or under the worst of `all` (`unlearn.evidence.stress`).
    """

    id: Annotated[str, Field(min_length=1, max_length=64)]
    metric: Annotated[str, AfterValidator(_known_metric)]
    aggregate: Literal["rate", "mean", "worst"] = "mean"
    test: Literal["upper95", "point", "noninferiority", "equivalence"]
    max: Number | None = None
    margin: Annotated[Number, Field(gt=0)] | None = None
    against: Literal["control", "reference", "before"] | None = None
    set: Literal["records", "retain"] = "records"
    attack: Annotated[str, AfterValidator(_known_attack)] | None = None
    required: StrictBool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = []
        binary = any(self.metric in names for names in BINARY.values())
        if self.aggregate == "rate" and not binary:
            wrong.append("expected `aggregate: mean` or `worst`: a rate needs a yes/no metric")
        if self.test in ("upper95", "point"):
            if self.max is None or self.margin is not None or self.against is not None:
                wrong.append(f"expected `max`, and neither `margin` nor `against`, for `test: {self.test}`")
        else:
            if self.margin is None or self.against is None or self.max is not None:
                wrong.append(f"expected `margin` and `against`, and no `max`, for `test: {self.test}`")
            if self.aggregate == "worst":
                wrong.append("expected `aggregate: rate` or `mean` for a comparison")
        if self.max is not None and any(self.metric in names for names in SHARES.values()) and not 0 <= self.max <= 1:
            wrong.append("expected `max` between 0 and 1 for a share or probability")
        if (self.metric == RESIDUAL) != (self.attack is not None):
            wrong.append("expected `attack` with `metric: residual`, and with no other metric")
        if self.metric == RESIDUAL and (self.test != "upper95" or self.aggregate != "mean" or self.set != "records"):
            wrong.append("expected `test: upper95` on the records, and no `aggregate`, for `metric: residual`")
        if self.set == "retain" and self.against == "control":
            wrong.append("expected `against: before` or `reference` for the retain set")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def distinct(names: Iterable[str], what: str) -> None:
    """Refuse a repeated name.

    Raises:
        ValueError: in words for `unlearn.requests.yamlfile`, without the name.
    """
    if any(count > 1 for count in Counter(names).values()):
        raise ValueError(f"expected a different {what} in each entry, found one twice")


def one_task(criteria: Sequence[Criterion], tasks: Iterable[Task]) -> None:
    """Refuse criteria whose metrics do not belong to one of `tasks`.

    Raises:
        ValueError: in words for `unlearn.requests.yamlfile`.
    """
    metrics = {criterion.metric for criterion in criteria} - {RESIDUAL}
    if not any(metrics <= METRICS[task] for task in tasks):
        raise ValueError(f"expected metrics of one kind of model ({' or '.join(tasks)})")


class TaskCriteria(Schema):
    """Criteria for each kind of model."""

    causal_lm: tuple[Criterion, ...] = ()
    image_classification: tuple[Criterion, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for task, criteria in (("causal_lm", self.causal_lm), ("image_classification", self.image_classification)):
            distinct((criterion.id for criterion in criteria), "id")
            one_task(criteria, (task,))  # type: ignore[arg-type]
        return self


class Policy(Schema):
    """What must hold after `forget`, and in an `audit`; used where a request has no criteria of its own."""

    schema_: Literal["unlearn.policy/v1"] = Field(alias="schema")
    name: Text
    description: Text
    forget: TaskCriteria = TaskCriteria()
    audit: TaskCriteria = TaskCriteria()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        audit = (*self.audit.causal_lm, *self.audit.image_classification)
        if any(criterion.against == "before" or criterion.metric == RESIDUAL for criterion in audit):
            raise ValueError("expected no `against: before` and no residual under `audit`, which edits nothing")
        return self

    def criteria(self, kind: Literal["audit", "forget"], task: Task) -> tuple[Criterion, ...]:
        """The criteria for one kind of run on one kind of model."""
        section = self.audit if kind == "audit" else self.forget
        return section.causal_lm if task == "causal_lm" else section.image_classification


def _count_or_all(value: object) -> object:
    if value == "all":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("expected a whole number from 1, or all")
    return value


class NoiseFloor(Schema):
    """How many records are measured twice for the A/A noise floor; `all` reads as None."""

    records: Annotated[int | None, BeforeValidator(_count_or_all)]


class Suite(Schema):
    """Which attacks and probes run, and how.

    Attributes:
        sampling: the scheme of the criteria's sampled extraction.
        confirm: whether verdicts of the one pass are confirmed with `generate()`.
        noise_floor: how many records are measured twice.
        budget: forward passes of the audited model per record that attacks may take, in the suite's order.
        attacks: names in `unlearn.requests.attacks`, with settings that differ from their defaults.
        reaudit: further ones that run where an edit is judged, in `forget`, on every arm: they test the edit.
        probes: see `unlearn.requests.probes`.
    """

    schema_: Literal["unlearn.suite/v1"] = Field(alias="schema")
    name: Text
    description: Text
    sampling: Sampling = Sampling()
    confirm: StrictBool = True
    noise_floor: NoiseFloor
    budget: Annotated[Number, Field(gt=0)] | None = None
    attacks: Attacks
    reaudit: Reaudit = ()
    probes: Probes = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        distinct((entry.name for entry in (*self.attacks, *self.reaudit)), "attack")
        return self


class MethodPreset(Schema):
    """Parameters of one editor under a name. The editor itself checks their values."""

    schema_: Literal["unlearn.method/v1"] = Field(alias="schema")
    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
    description: Text
    parameters: dict[str, JsonValue]


P = TypeVar("P", Policy, Suite, MethodPreset)


def is_file_name(name: str) -> bool:
    """Whether a preset is given by the path of a file rather than by name."""
    return name.endswith((".yaml", ".yml"))


def _load(model: type[P], kind: str, name: str | Path) -> P:
    path = Path(name) if is_file_name(str(name)) else config_path(kind, str(name))
    return parse(read_yaml(path), model)


def load_policy(name: str | Path = "default") -> Policy:
    """A shipped policy by name, or one from a `.yaml` file.

    Raises:
        UsageError: if there is none, or it holds mistakes.
    """
    return _load(Policy, "policies", name)


def load_suite(name: str | Path) -> Suite:
    """A shipped suite by name, or one from a `.yaml` file.

    Raises:
        UsageError: if there is none, or it holds mistakes.
    """
    return _load(Suite, "suites", name)


def load_method(name: str | Path) -> MethodPreset:
    """A shipped method preset by name, or one from a `.yaml` file.

    Raises:
        UsageError: if there is none, or it holds mistakes.
    """
    return _load(MethodPreset, "methods", name)


def method_names() -> list[str]:
    """Registered methods: those that have a shipped preset."""
    return sorted({load_method(preset).name for preset in config_names("methods")})


def criteria_digest(criteria: Sequence[Criterion]) -> str:
    """`sha256:<hex>` of the criteria as canonical JSON: what is fixed before any model is loaded."""
    rows = [criterion.model_dump(mode="json") for criterion in criteria]
    canonical = json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
