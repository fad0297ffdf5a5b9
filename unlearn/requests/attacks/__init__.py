"""The catalogue of attacks, a module for each family (`declaration` says what an attack declares).

An attack without a runner is in the catalogue so that a report says what was not tried. Installed packages add their
own through the entry-point group `unlearn.attacks` (docs/suites.md). Nothing here loads a model library.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import AfterValidator, Field

from probes.errors import UsageError
from unlearn.mistakes import Mistakes, suggestion
from unlearn.requests.attacks import (
    collateral,
    difference,
    elicitation,
    extraction,
    inside,
    membership,
    relearning,
    surface,
    weights,
)
from unlearn.requests.attacks.declaration import BOTH, NEEDS, Access, Declaration, Size
from unlearn.requests.attacks.extraction import Sampling
from unlearn.requests.plugins import entry, others
from unlearn.requests.yamlfile import Document, Schema, parse

__all__ = [
    "BUILT_IN",
    "ENTRIES",
    "NEEDS",
    "Access",
    "Attacks",
    "Declaration",
    "Reaudit",
    "Sampling",
    "Size",
    "attack_settings",
    "broken",
    "catalogue",
    "passes",
    "within",
]

GROUP = "unlearn.attacks"

BUILT_IN: tuple[Declaration, ...] = (
    *extraction.DECLARATIONS,
    *membership.DECLARATIONS,
    *surface.DECLARATIONS,
    *relearning.DECLARATIONS,
    *weights.DECLARATIONS,
    *elicitation.DECLARATIONS,
    *inside.DECLARATIONS,
    *difference.DECLARATIONS,
    *collateral.DECLARATIONS,
    Declaration("model_inversion", "can an input be rebuilt from the model's outputs?", "A2", tasks=BOTH),
    Declaration("reconstruction.gradient", "can the records be rebuilt from the weights?", "A2", tasks=BOTH),
)


@cache
def _others() -> tuple[dict[str, Declaration], dict[str, str]]:
    found, wrong = others(GROUP, Declaration, {declaration.name for declaration in BUILT_IN})
    for name, declaration in list(found.items()):
        try:
            sum(declaration.cost(declaration.settings().model_dump(mode="json"), Size(1)).values())
        except Exception as error:
            wrong[name] = f"cannot say what it costs ({type(error).__name__})"
            del found[name]
    return found, wrong


@cache
def catalogue() -> Mapping[str, Declaration]:
    """Every attack of this installation by name: the built-in ones, then those of other packages.

    A package that cannot be loaded, or that takes a name already in use, is left out; `broken` says so.
    """
    return {declaration.name: declaration for declaration in BUILT_IN} | _others()[0]


def broken() -> tuple[str, ...]:
    """One line for each entry point that is no attack, or cannot be loaded."""
    return tuple(f"{name}: {problem}" for name, problem in sorted(_others()[1].items()))


ENTRIES: dict[str, type[Schema]] = {
    name: entry(name, declaration.settings) for name, declaration in catalogue().items()
}


def _some(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("expected at least one entry, found none")
    return entries


def _each_once(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({one.name for one in entries}) < len(entries):
        raise ValueError("expected a different name in each entry, found one twice")
    return entries


if TYPE_CHECKING:
    Attacks = tuple[Any, ...]
    Reaudit = tuple[Any, ...]
else:
    Reaudit = Annotated[
        tuple[Annotated[Union[tuple(ENTRIES.values())], Field(discriminator="name")], ...],  # noqa: UP007
        AfterValidator(_each_once),
    ]
    Attacks = Annotated[Reaudit, AfterValidator(_some)]


def attack_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings of one attack, defaults filled in, as a suite would hold them.

    Raises:
        UsageError: an unknown attack, one that is not part of this version, or every mistake in its settings.
    """
    declaration = catalogue().get(name)
    if declaration is None:
        near = suggestion(name, catalogue())
        raise UsageError(f"expected an attack of `unlearn ls attacks`, found another name{near}")
    if declaration.runner is None:
        raise UsageError(f"expected an attack that can run, found one that is {declaration.reason}")
    document = Document(name, Path(), {"name": name} | settings, {}, Mistakes(name))
    return parse(document, ENTRIES[name]).model_dump(mode="json")


def passes(entries: list[dict[str, Any]], size: Size) -> tuple[float, float]:
    """Forward passes of the audited model per record: with passes shared, and with each attack run alone."""
    shared: dict[str, float] = {}
    alone = 0.0
    for one in entries:
        cost = catalogue()[one["name"]].cost(one, size)
        alone += sum(cost.values())
        for view, amount in cost.items():
            shared[view] = max(shared.get(view, 0.0), amount)
    return sum(shared.values()), alone


def within(entries: list[dict[str, Any]], size: Size, budget: float | None) -> dict[str, float]:
    """Which attacks do not fit a budget, taken in the suite's order, and what each would need.

    Args:
        entries: a suite's attacks that could run.
        size: of the sets.
        budget: forward passes per record; None for no bound.

    Returns:
        Name -> passes per record it would add, for those left out.
    """
    left: dict[str, float] = {}
    taken: list[dict[str, Any]] = []
    for one in entries:
        before = passes(taken, size)[0]
        after = passes([*taken, one], size)[0]
        if budget is not None and after > budget and after > before:
            left[one["name"]] = after - before
        else:
            taken.append(one)
    return left
