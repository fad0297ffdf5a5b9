"""What an editor may touch: parameters by name, linear maps by block, role or name, and a value for each of them.

Editors that treat weights one by one choose parameters (`select_parameters`). Those that treat a weight as a matrix
choose linear maps (`select_maps`): blocks and roles as the model map has them, so that one setting fits every
architecture, or globs of module paths instead.

The blocks of `auto` were fixed beforehand, not tuned: the published edit of OLMo-2-7B (arXiv 2510.24256) is of blocks
23 to 25 of 32, which as a share of the depth is [23/32, 26/32). A language model's blocks whose middle lies in there
are taken, or the one in which the range's own middle lies. Of an image classifier they are the first and the last
block, as published for a ViT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from probes.errors import UsageError
from unlearn.requests.yamlfile import Schema

if TYPE_CHECKING:
    from probes.modelmap import ModelMap
    from probes.taps import Site

DEPTH = (23 / 32, 26 / 32)  # of the published edit
LANGUAGE_ROLES = ("gate", "up", "gate_up")
IMAGE_ROLES = ("up", "down")


def select_parameters(
    names: Sequence[str], default_exclude: Iterable[str], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Names of the parameters to edit, in the order of `names`.

    Args:
        names: all of the model's.
        default_exclude: left alone unless `include` is given.
        include: globs; where given they replace the default selection.
        exclude: globs taken away from it.

    Raises:
        UsageError: if a glob matches nothing, or nothing is left.
    """
    for glob in (*include, *exclude):
        _expect_match(glob, names, "parameter names")
    skipped = set(default_exclude)
    chosen = [n for n in names if (any(fnmatchcase(n, g) for g in include) if include else n not in skipped)]
    chosen = [n for n in chosen if not any(fnmatchcase(n, g) for g in exclude)]
    if not chosen:
        raise UsageError("expected parameters left to edit, found none; loosen include or exclude")
    return chosen


def _expect_match(glob: str, names: Sequence[str], what: str) -> None:
    if not any(fnmatchcase(name, glob) for name in names):
        close = get_close_matches(glob, names, n=3, cutoff=0.3)
        raise UsageError(
            f"expected a glob of {what}, found {glob!r} which matches none"
            + (f"; close names: {', '.join(close)}" if close else "")
        )


# -------------------------------------------------------------------------------------------------------- linear maps


def _auto_or_list(kind: type, what: str) -> BeforeValidator:
    """One mistake for a value that is neither: a plain union of types would report one for each member."""

    def check(value: object) -> object:
        listed = isinstance(value, list | tuple) and len(value) > 0 and all(type(item) is kind for item in value)
        if value != "auto" and not listed:
            raise ValueError(f"expected auto, or a list of {what}")
        return value

    return BeforeValidator(check)


class MapParameters(Schema):
    """Which linear maps to edit.

    Attributes:
        blocks: indices in depth order, negative ones from the end; "auto" as above.
        roles: roles of the model map (gate, up, gate_up, down, q, k, v, qkv, o, conv, ...); "auto" takes gate, up and
            gate_up of a language model and up and down of an image classifier, or all of its blocks' maps where they
            have neither.
        include: globs of module keys, in place of blocks and roles. A key is a module's path, or for expert e of a
            stacked parameter `<parameter>.<e>`.
        exclude: globs of module keys to leave alone.
    """

    blocks: Annotated[tuple[int, ...] | Literal["auto"], _auto_or_list(int, "block numbers")] = "auto"
    roles: Annotated[tuple[str, ...] | Literal["auto"], _auto_or_list(str, "roles")] = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.include and (self.blocks != "auto" or self.roles != "auto"):
            raise ValueError("expected `include`, or `blocks` and `roles`, found both")
        return self


def select_maps(model_map: ModelMap, parameters: MapParameters) -> list[Site]:
    """Linear maps to edit, in depth order.

    Raises:
        UsageError: a glob, block or role that matches nothing, or nothing is left.
        UnsupportedError: a glob that matches only maps no rule exists for, such as the output head.
    """
    from probes.taps import sites

    if parameters.include:
        chosen = sites(model_map, parameters.include)
    else:
        chosen = _by_role(model_map, parameters)
    keys = [site.key for site in chosen]
    for glob in parameters.exclude:
        _expect_match(glob, keys, "selected module keys")
    chosen = [site for site in chosen if not any(fnmatchcase(site.key, glob) for glob in parameters.exclude)]
    if not chosen:
        raise UsageError("expected linear maps left to edit, found none; loosen exclude")
    return chosen


def _by_role(model_map: ModelMap, parameters: MapParameters) -> list[Site]:
    from probes.taps import sites

    n, language = len(model_map.blocks), model_map.task == "causal_lm"
    blocks = default_blocks(n, language) if parameters.blocks == "auto" else _from_end(parameters.blocks, n)
    present = sites(model_map, None, blocks=blocks)
    if parameters.roles != "auto":
        return sites(model_map, None, blocks=blocks, roles=parameters.roles)
    roles = LANGUAGE_ROLES if language else IMAGE_ROLES
    chosen = [site for site in present if site.projection.role in roles]
    if not chosen and language:
        found = ", ".join(sorted({site.projection.role for site in present}))
        raise UsageError(f"expected maps with role gate, up or gate_up in these blocks, found {found}; name `roles`")
    return chosen or present


def default_blocks(n: int, language: bool) -> tuple[int, ...]:
    """The blocks of `auto` among n: see the module's docstring."""
    if not language:
        return tuple(sorted({0, n - 1}))
    low, high = DEPTH
    middle = tuple(i for i in range(n) if low <= (i + 0.5) / n < high)
    return middle or (int(n * (low + high) / 2),)


def _from_end(blocks: Sequence[int], n: int) -> tuple[int, ...]:
    for index in blocks:
        if not -n <= index < n:
            raise UsageError(f"expected blocks from {-n} to {n - 1}, found {index}")
    return tuple(sorted({index % n for index in blocks}))


def values_of(maps: Sequence[Site], by: Mapping[str, float], default: float, option: str) -> dict[str, float]:
    """A value for every map: the default, or that of the most specific entry that fits.

    An entry is a role, or a glob of module keys. Of several that fit a map the one with most literal characters counts
    (a role has none), whatever their order: a file read again may have lost it.

    Args:
        maps: the maps.
        by: role or glob to value.
        default: for maps that no entry fits.
        option: its name, for messages.

    Returns:
        Key to value, in the order of `maps`.

    Raises:
        UsageError: an entry that fits no map, or two equally specific ones that disagree.
    """
    keys = [site.key for site in maps]
    roles = {site.projection.role for site in maps}
    for entry in by:
        if entry not in roles:
            _expect_match(entry, keys, f"selected module keys in {option}")
    values = {}
    for site in maps:
        fitting = [e for e in by if e == site.projection.role or fnmatchcase(site.key, e)]
        rank = {e: 0 if e == site.projection.role else sum(c not in "*?[]" for c in e) for e in fitting}
        best = {by[e] for e in fitting if rank[e] == max(rank.values())}
        if len(best) > 1:
            raise UsageError(
                f"expected one value for {site.key} in {option}, found two in equally specific entries; drop one"
            )
        values[site.key] = best.pop() if best else default
    return values


# ------------------------------------------------------------------------------------------------------- field types


Share = Annotated[float, Field(strict=True, gt=0, le=1)]


def number_or_auto(accepts: Callable[[float], bool], what: str) -> BeforeValidator:
    """Field of a finite number or "auto", with one mistake for a value that is neither.

    Args:
        accepts: whether a number is in range.
        what: the range in words.
    """

    def check(value: object) -> object:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "auto" and not (number and math.isfinite(value) and accepts(value)):  # type: ignore[arg-type]
            raise ValueError(f"expected {what}, or auto")
        return value

    return BeforeValidator(check)


def count_or_auto(least: int) -> BeforeValidator:
    """Field of a whole number from `least`, or "auto", with one mistake for a value that is neither."""

    def check(value: object) -> object:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"expected a whole number from {least}, or auto")
        return value

    return BeforeValidator(check)
