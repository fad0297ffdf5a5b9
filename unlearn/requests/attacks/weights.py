"""Attacks that change the weights a little: rounding, pruning, noise, mixtures of both checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt

from unlearn.requests.attacks.declaration import BOTH, RUN, Count, Declaration, Number, Share, Size
from unlearn.requests.yamlfile import Schema

Scheme = Literal[
    "int8",
    "int4",
    "int3",
    "int8-asymmetric",
    "int4-asymmetric",
    "int3-asymmetric",
    "nf4",
    "gguf:Q4_0",
    "gguf:Q4_1",
    "gguf:Q5_0",
    "gguf:Q5_1",
    "gguf:Q8_0",
    "bnb:nf4",
    "bnb:int8",
]
Step = Annotated[float, Field(strict=True, ge=-2, le=2)]


def _some_between(steps: tuple[float, ...]) -> tuple[float, ...]:
    if not any(0 < step < 1 for step in steps):
        raise ValueError("expected a step between 0 and 1, found none")
    return steps


class Quantisation(Schema):
    """Round-to-nearest quantisation of the linear maps of the blocks, and back (arXiv 2410.16454).

    Attributes:
        schemes: grids; the first one stands for the attack, so that none is picked by its outcome.
        group: weights of one output that share a scale in int4 and int3; int8 has one scale for each output.
        head: whether the output head is quantised too.
        records: of each set, drawn by the seed.
    """

    schemes: tuple[Scheme, ...] = Field(default=("int4", "int8", "nf4"), min_length=1)
    group: Annotated[StrictInt, Field(ge=2)] = 128
    head: StrictBool = False
    records: Count = 256


class Pruning(Schema):
    """Weights of the linear maps of the blocks set to zero, without training afterwards.

    Attributes:
        shares: of each tensor's weights, the smallest; the first one stands for the attack.
        two_of_four: whether two of every four weights are kept as well, along the input.
        records: of each set, drawn by the seed.
    """

    shares: tuple[Share, ...] = Field(default=(0.1, 0.3), min_length=1)
    two_of_four: StrictBool = True
    records: Count = 256


class Noise(Schema):
    """Gaussian noise on the linear maps of the blocks, one draw by the seed.

    Attributes:
        sizes: standard deviation over the root mean square of each tensor; the first one stands for the attack.
        records: of each set, drawn by the seed.
    """

    sizes: tuple[Annotated[Number, Field(gt=0, le=10)], ...] = Field(default=(0.05, 0.1), min_length=1)
    records: Count = 256


class Interpolation(Schema):
    """Mixtures of the edited copy (0) and the original (1).

    Attributes:
        steps: towards the original; negative ones go beyond the edit. The first between 0 and 1 stands for the
            attack. Both ends are measured whether they are named or not.
        records: of each set, drawn by the seed.
    """

    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=32), AfterValidator(_some_between)] = (
        -0.5,
        0.1,
        0.2,
        0.3,
        0.5,
        1.0,
    )
    records: Count = 256


def _passes(settings: dict[str, Any], size: Size, variants: int, kind: str) -> dict[str, float]:
    scored = min(settings["records"], size.records) + min(settings["records"], size.control)
    return {"pass": 1.0, f"recovery.{kind}": variants * scored / size.rows}


DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "recovery.quantisation",
        "do the records come back when the weights are quantised?",
        "A2",
        "1 forward pass a record for each scheme",
        RUN + "weights:quantisation",
        Quantisation,
        BOTH,
        cost=lambda s, n: _passes(s, n, len(s["schemes"]), "quantised"),
        stress=True,
    ),
    Declaration(
        "recovery.pruning",
        "do the records come back when small weights are set to zero?",
        "A2",
        "1 forward pass a record for each pattern",
        RUN + "weights:pruning",
        Pruning,
        BOTH,
        cost=lambda s, n: _passes(s, n, len(s["shares"]) + s["two_of_four"], "pruned"),
        stress=True,
    ),
    Declaration(
        "recovery.noise",
        "do the records come back when noise is added to the weights?",
        "A2",
        "1 forward pass a record for each size",
        RUN + "weights:noise",
        Noise,
        BOTH,
        cost=lambda s, n: _passes(s, n, len(s["sizes"]), "noisy"),
        stress=True,
    ),
    Declaration(
        "recovery.interpolation",
        "how far towards the original until the records come back?",
        "A3",
        "1 forward pass a record for each step",
        RUN + "weights:interpolation",
        Interpolation,
        BOTH,
        ("records", "edited"),
        # no stress test: whoever can mix both checkpoints holds the original, and with it the records
        lambda s, n: _passes(s, n, len({1.0, *s["steps"]} - {0.0}), "interpolated"),
    ),
)
