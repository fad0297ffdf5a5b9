"""Attacks that look inside the model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictInt

from unlearn.requests.attacks.declaration import RUN, SCORED, Count, Declaration, Number, Size
from unlearn.requests.yamlfile import Schema

# Of a forward pass: the output head on the completion's positions, in a model of a hundred million weights.
_HEAD = 0.13
_EVALUATIONS = 8  # of the head while a probe is fitted to one layer


class Lens(Schema):
    """The logit lens (2309.17410).

    Attributes:
        records: how many records of each set, drawn by the seed.
        layers: evenly spaced layers to read, the last one among them; null for all.
        top: candidates that a layer offers for a token.
    """

    records: Count = 64
    layers: Count | None = 12
    top: Count = 10


class Probe(Schema):
    """A linear map for each layer, learned on half of the records (2402.16835).

    Attributes:
        records: how many records to learn from, to score, and of the control set, drawn by the seed.
        layers: evenly spaced layers to try, the last one among them; the best is chosen on the half learned from.
    """

    records: Count = 64
    layers: Annotated[StrictInt, Field(ge=1, le=64)] = 4


class Patching(Schema):
    """Activation patching depth score (2605.24614).

    Attributes:
        records: how many records of each set, drawn by the seed.
        layers: evenly spaced layers to patch, the last one among them; null for all.
        minimum: nats per token that the reference's state has to cost before a layer counts.
    """

    records: Count = 16
    layers: Count | None = 8
    minimum: Annotated[Number, Field(gt=0)] = 0.05


class Steering(Schema):
    """Steering by anonymised activations (2411.02631).

    Attributes:
        records: how many records to learn from, to score, and of the control set, drawn by the seed.
        layers: evenly spaced layers to try; the best is chosen on the half learned from.
        coefficients: how far to push; no push at all is always tried too.
    """

    records: Count = 32
    layers: Annotated[StrictInt, Field(ge=1, le=64)] = 4
    coefficients: tuple[Annotated[Number, Field(gt=0)], ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)


def _share(settings: dict[str, Any], size: Size) -> tuple[float, float, float]:
    """Half A, half B, and both sets whole as far as they are used, over all rows."""
    most = settings["records"]
    half = min(most, size.records / 2)
    control = min(most, size.control)
    return half / size.rows, (half + control) / size.rows, (min(most, size.records) + control) / size.rows


def _lens(settings: dict[str, Any], size: Size) -> dict[str, float]:
    layers = settings["layers"] or 32
    return {"pass": 1.0, f"lens.{settings['records']}.{layers}": (1 + _HEAD * layers) * _share(settings, size)[2]}


def _probe(settings: dict[str, Any], size: Size) -> dict[str, float]:
    fitted, scored, _ = _share(settings, size)
    layers = settings["layers"]
    fit = fitted * (2 + _HEAD * (3 + _EVALUATIONS) * (layers + 1))
    return {"pass": 1.0, f"probe.{settings['records']}.{layers}": fit + scored * (2 + _HEAD * (layers + 1))}


def _patching(settings: dict[str, Any], size: Size) -> dict[str, float]:
    layers = settings["layers"] or 32
    return {"pass": 1.0, f"patching.{settings['records']}.{layers}": (3 + 2 * layers) * _share(settings, size)[2]}


def _steering(settings: dict[str, Any], size: Size) -> dict[str, float]:
    fitted, scored, _ = _share(settings, size)
    tried = settings["layers"] * len(settings["coefficients"])
    return {"pass": 1.0, f"steering.{settings['records']}.{tried}": (3 + tried) * fitted + 2 * scored}


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "hidden_knowledge.lens",
        "does an inner layer, read through the model's own head, name what the output hides?",
        "A2",
        "1 forward pass a record, the head once for each layer",
        RUN + "inside:lens",
        Lens,
        needs=SCORED,
        cost=_lens,
        stress=True,
    ),
    Declaration(
        "hidden_knowledge.probe",
        "does a linear map of an inner layer, learned on half of the records, recover the other half?",
        "A2",
        "2 forward passes of half A, 2 of the records scored, and the head some 11 times for each layer",
        RUN + "inside:probe",
        Probe,
        needs=SCORED,
        cost=_probe,
        stress=True,
    ),
    Declaration(
        "hidden_knowledge.patching",
        "are the edited model's inner states still enough for the original to recall the records?",
        "A3",
        "1 forward pass of the edited copy and of the reference each, and 2 of the original for each layer",
        RUN + "inside:patching",
        Patching,
        needs=(*SCORED, "reference", "edited"),
        cost=_patching,
        stress=True,
    ),
    Declaration(
        "hidden_knowledge.steering",
        "does pushing inner states towards what the names in the prompts add bring the records back?",
        "A2",
        "3 forward passes of half A and 1 for each layer and coefficient, and 2 of the records scored",
        RUN + "inside:steering",
        Steering,
        needs=(*SCORED, "text"),
        cost=_steering,
        stress=True,
    ),
)
