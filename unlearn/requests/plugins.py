"""What other packages add to a catalogue through entry points, and the schema of an entry in a suite.

Nothing here loads a model library; a package's declaration should not either.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar

from pydantic import create_model

from unlearn.requests.yamlfile import Schema


class Named(Protocol):
    """A declaration."""

    @property
    def name(self) -> str:
        """As suites write it."""

    @property
    def settings(self) -> Any:
        """Schema of the settings."""


NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
D = TypeVar("D", bound=Named)


def others(group: str, kind: type[D], taken: Collection[str]) -> tuple[dict[str, D], dict[str, str]]:
    """Declarations of other packages.

    Args:
        group: of the entry points.
        kind: what their objects must be.
        taken: names that are in use.

    Returns:
        Declarations by name; and for each entry point that is none, or cannot be loaded, why.
    """
    found: dict[str, D] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=group):
        try:
            declared = point.load()
        except (Exception, SystemExit) as error:  # another package's code may raise anything
            broken[point.name] = f"cannot be loaded ({type(error).__name__})"
            continue
        if not isinstance(declared, kind):
            broken[point.name] = f"is no {kind.__module__.removesuffix('.declaration')}.{kind.__name__}"
        elif not NAME.fullmatch(declared.name):
            broken[point.name] = "has a name with other characters than a to z, 0 to 9, _ and ."
        elif not (isinstance(declared.settings, type) and issubclass(declared.settings, Schema)):
            broken[point.name] = f"has settings that are no {Schema.__module__}.{Schema.__name__}"
        elif declared.name != point.name or declared.name in taken or declared.name in found:
            broken[point.name] = "has another name than its entry point, or one that is taken"
        else:
            found[declared.name] = declared
    return found, broken


def entry(name: str, settings: type[Schema]) -> type[Schema]:
    """The schema of a suite's entry: the settings, and the name that chooses them."""
    field: Any = (Literal[name], name)
    made: type[Schema] = create_model(f"Entry_{name}", __base__=settings, name=field)
    return made
