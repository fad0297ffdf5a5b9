"""What a probe run is asked for: the settings of each probe, as a suite writes them and the command line fills them in.

Checked without a model library; the defaults are the settings of `unlearn probe`. Installed packages add probes through
the entry-point group `unlearn.probes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt

from probes.errors import UsageError
from unlearn.mistakes import Mistakes
from unlearn.requests.plugins import entry, others
from unlearn.requests.yamlfile import Document, Schema, parse

GROUP = "unlearn.probes"
Count = Annotated[StrictInt, Field(ge=1)]


def _blocks(*words: str) -> BeforeValidator:
    """One mistake for what is neither one of the words nor a list of block indices."""

    def check(value: object) -> object:
        if isinstance(value, str) and value in words:
            return value
        if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            return tuple(value)
        raise ValueError(f"expected {', '.join(words)}, or a list of block indices")

    return BeforeValidator(check)


@BeforeValidator
def _rho(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 < value <= 1):  # type: ignore[operator]
        raise ValueError("expected a share above 0 and up to 1, or auto")
    return value


class KfacProbe(Schema):
    """Kronecker-factored curvature: spectra with the cut an edit would make, and a score for each record.

    Attributes:
        blocks: "auto" for those the kfac editor would edit, "all", or indices (negative ones count from the end).
        roles: projections of the blocks by role; empty for the editor's choice.
        modules: globs of module paths, instead of blocks and roles.
        labels: drawn from the model (the Fisher information) or the data's own.
        positions: which activations count.
        rho: share of the curvature mass below which component pairs are cut off; "auto" is the editor's.
        correction: "ekfac" measures the eigenvalues in a second pass.
        batch_tokens: padded tokens a batch.
        autocast: "bfloat16" runs the passes for the factors in it; sums stay in fp32.
        memory_mb: memory for the factors; modules that do not fit together take further passes.
    """

    blocks: Annotated[Literal["auto", "all"] | tuple[int, ...], _blocks("auto", "all")] = "auto"
    roles: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    labels: Literal["sampled", "gold"] = "sampled"
    positions: Literal["all", "predicting", "first"] = "all"
    rho: Annotated[float | Literal["auto"], _rho] = "auto"
    correction: Literal["none", "ekfac"] = "none"
    batch_tokens: Count | None = None
    autocast: Literal["none", "bfloat16"] = "none"
    memory_mb: Count | None = None


class SpectrumProbe(Schema):
    """Eigenvalues, density and trace of the Hessian or the generalised Gauss-Newton matrix.

    Attributes:
        operator: "ggn" (positive semi-definite) or "hessian".
        blocks: "model" for all weights at once, "all" for each block by itself, or indices.
        k: eigenvalues at each end; the GGN has no negative ones and gives the largest alone.
        samples: random vectors for density, negative share and trace.
        steps: Lanczos steps a vector.
        max_products: about the most products with a vector that the eigenvalues of one end may take.
        records: how many records of the data are used, from the first on.
        memory_mb: for the Lanczos vectors.
    """

    operator: Literal["ggn", "hessian"] = "ggn"
    blocks: Annotated[Literal["model", "all"] | tuple[int, ...], _blocks("model", "all")] = (-1,)
    k: Count = 5
    samples: Annotated[StrictInt, Field(ge=2)] = 4
    steps: Annotated[StrictInt, Field(ge=2)] = 20
    max_products: Count = 200
    records: Count = 16
    memory_mb: Count = 4096


class LocaliseProbe(Schema):
    """Which prompt positions, layers and neurons bring a record out, and which training records lie behind it.

    Attributes:
        records: how many, those the model finds most probable first.
        steps: of the integrated gradients.
        neurons: how many of the strongest feed-forward neurons are listed and ablated.
        draws: random sets of neurons to compare the ablation with.
        influence: how many training records are listed, where a training set is given.
    """

    records: Count = 8
    steps: Annotated[StrictInt, Field(ge=2)] = 32
    neurons: Count = 20
    draws: Annotated[StrictInt, Field(ge=2)] = 5
    influence: Count = 5


class ConditionProbe(Schema):
    """Condition number, stable and effective rank of every weight matrix; needs no data."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One probe.

    Attributes:
        name: as suites and the command line write it.
        what: one line.
        runner: `module:function`; it takes the workspace and the settings and returns the result.
        settings: their schema; defaults fill in what a suite leaves out.
        needs: record sets it cannot do without, among `retain` (ordinary data) and `records`.
    """

    name: str
    what: str
    runner: str
    settings: type[Schema]
    needs: tuple[str, ...] = ()


BUILT_IN = (
    Declaration(
        "kfac",
        "Kronecker-factored curvature: spectra, the cut of an edit, a score per record",
        "unlearn.probing.kfac:run",
        KfacProbe,
        ("retain",),
    ),
    Declaration(
        "spectrum",
        "eigenvalues, density and trace of the Hessian or Gauss-Newton matrix",
        "unlearn.probing.spectrum:run",
        SpectrumProbe,
        ("retain",),
    ),
    Declaration(
        "localise",
        "prompt positions, layers and neurons behind a record; influence of training",
        "unlearn.probing.localise:run",
        LocaliseProbe,
        ("records",),
    ),
    Declaration(
        "condition",
        "condition number, stable and effective rank of every weight matrix",
        "unlearn.probing.condition:run",
        ConditionProbe,
    ),
)


@cache
def _others() -> tuple[dict[str, Declaration], dict[str, str]]:
    return others(GROUP, Declaration, {declaration.name for declaration in BUILT_IN})


@cache
def catalogue() -> Mapping[str, Declaration]:
    """Every probe of this installation by name: the built-in ones, then those of other packages."""
    return {declaration.name: declaration for declaration in BUILT_IN} | _others()[0]


def broken() -> tuple[str, ...]:
    """One line for each entry point that is no probe, or cannot be loaded."""
    return tuple(f"{name}: {problem}" for name, problem in sorted(_others()[1].items()))


def once_each(probes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a probe named twice.

    Raises:
        ValueError: in words for `unlearn.requests.yamlfile`.
    """
    if len({probe.name for probe in probes}) < len(probes):
        raise ValueError("expected each probe once")
    return probes


ENTRIES = {name: entry(name, declaration.settings) for name, declaration in catalogue().items()}

if TYPE_CHECKING:
    Probes = tuple[Any, ...]
else:
    Probes = Annotated[
        tuple[Annotated[Union[tuple(ENTRIES.values())], Field(discriminator="name")], ...],  # noqa: UP007
        AfterValidator(once_each),
    ]


def probe_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings of one probe, defaults filled in, as a suite would hold them.

    Raises:
        UsageError: an unknown probe, or every mistake in its settings.
    """
    if name not in catalogue():
        raise UsageError(
            f"expected a probe among {', '.join(catalogue())}, found another name; see `unlearn ls probes`"
        )
    document = Document(name, Path(), {"name": name} | settings, {}, Mistakes(name))
    return parse(document, ENTRIES[name]).model_dump(mode="json")
