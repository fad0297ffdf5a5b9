"""A YAML file checked against a schema: every mistake at once, by line, quoting neither values nor unknown keys.

The reader is PyYAML's safe one, made stricter: a key given twice, an alias (a way to write gigabytes in a few lines)
and a second document are refused. `1e-3` is read as a number, as everywhere but in YAML 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from probes.errors import UsageError
from unlearn.mistakes import Mistakes, suggestion

MAX_BYTES = 2**20
Loc = tuple[str | int, ...]
M = TypeVar("M", bound="Schema")


class Schema(BaseModel):
    """Base of every file schema: unknown keys refused, immutable, values kept out of error messages."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False, validate_default=True
    )


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Attributes:
        name: file name, for messages.
        folder: what relative paths in the file start from.
        content: the top mapping.
        lines: location -> line number, from 1.
        mistakes: what is wrong whatever the schema: repeated keys, values that are none.
    """

    name: str
    folder: Path
    content: dict[str, Any]
    lines: Mapping[Loc, int]
    mistakes: Mistakes

    def line(self, loc: Loc) -> int:
        """Line of a location, or of the nearest thing around it; 0 for the whole file."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 0)


class _Loader(yaml.SafeLoader):
    """Safe loader without aliases that notes a value it cannot build, keeps its text and reads on."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.unbuilt: list[int] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="alias", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except Exception:  # month 13, a number of a million digits, an unknown or malformed tag
            if not isinstance(node, yaml.ScalarNode):
                raise
            self.unbuilt.append(node.start_mark.line + 1)
            return node.value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_ALIAS = "expected plain YAML, found an alias (*name); write the value out"
_SYNTAX = "expected YAML, found a syntax mistake; check indentation, quotes, colons"
_VALUE = "expected a date, number or text, found a value that is none; put text in quotes"


def read_yaml(path: str | Path) -> Document:
    """Parse one file.

    Raises:
        UsageError: if it is missing, unreadable, not UTF-8, too large, not YAML or not a mapping.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"expected a YAML file, found none at {path}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"expected a readable YAML file, found {type(error).__name__} at {path}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"expected a YAML file of at most {MAX_BYTES} bytes, found {len(data)}; records go elsewhere")
    mistakes = Mistakes(file.name)
    lines: dict[Loc, int] = {}
    content: object = None
    try:
        loader = _Loader(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is not None:
            _walk(node, (), lines, file.name, mistakes)
            content = loader.construct_document(node)
            for line in loader.unbuilt:
                mistakes.add(file.name, line, _VALUE)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        mistakes.add(file.name, line, "expected UTF-8 text, found other bytes")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        mistakes.add(file.name, mark.line + 1 if mark else 0, _ALIAS if error.problem == "alias" else _SYNTAX)
    except Exception:  # control characters, nesting past the interpreter's stack, a collection with a malformed tag
        mistakes.add(file.name, 0, "expected YAML text, found control characters, endless nesting or strange tags")
    if not isinstance(content, dict):
        if not len(mistakes):
            mistakes.add(file.name, 0, "expected `key: value` lines, found something else")
        raise mistakes.error()
    return Document(file.name, file.resolve().parent, content, lines, mistakes)


def _walk(node: yaml.Node, loc: Loc, lines: dict[Loc, int], name: str, mistakes: Mistakes) -> None:
    """Note the line of every location, and keys given twice."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*loc, i)] = item.start_mark.line + 1
            _walk(item, (*loc, i), lines, name, mistakes)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*loc, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                mistakes.add(name, line, f"this key is given twice; first on line {lines[inner]}")
            lines[inner] = line
            _walk(value, inner, lines, name, mistakes)


def parse(document: Document, model: type[M]) -> M:
    """The document as a `model`; relative paths in it start at the document's folder.

    Raises:
        MistakesError: with every mistake, by line.
    """
    mistakes = deepcopy(document.mistakes)
    try:
        parsed = model.model_validate(document.content, context={"folder": document.folder})
    except ValidationError as error:
        for found in error.errors(include_url=False, include_input=False):
            loc, what = _describe(model, found["loc"], found["type"], found.get("ctx", {}))
            mistakes.add(document.name, document.line(loc), what)
        raise mistakes.error() from None
    mistakes.raise_any()
    return parsed


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Schemas mentioned in an annotation such as `tuple[Criterion, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _describe(model: type[BaseModel], loc: Loc, kind: str, context: Mapping[str, Any]) -> tuple[Loc, str]:
    """A pydantic error in words made of schema names alone."""
    current, place = [model], ""
    known: dict[str, Any] = _fields(model)
    for step in loc:
        if isinstance(step, int):
            place += f"[{step + 1}]"
        elif step in known:
            place += f".{step}" if place else step
            current = _models(known[step])
            known = {name: inner for part in current for name, inner in _fields(part).items()}
    subject = f"`{place}`" if place else "the file"
    if kind in ("extra_forbidden", "invalid_key"):
        names = sorted(known)
        listed = suggestion(str(loc[-1]), names) or f"; known: {', '.join(names)}"
        return loc, f"this key is not known {f'in {subject}' if place else 'at the top'}{listed}"
    if kind == "missing":
        return loc, f"{subject} is missing"
    return loc, f"{subject}: {_words(kind, context)}"


_WORDS = {
    "string_type": "expected text; put it in quotes",
    "string_too_short": "expected text, found nothing",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping",
    "timezone_aware": "expected a time with its zone, as in 2026-11-03T09:12:00Z",
    "none_required": "expected nothing",
    "union_tag_not_found": "expected a `name`",
}


def _words(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "value_error":
        return str(context["error"])  # our own validators, which quote nothing
    if kind == "union_tag_invalid":
        return f"expected a `name` among {context['expected_tags']}"
    if kind == "literal_error":
        return f"expected one of {context['expected']}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = kind.replace("_than_equal", " than or equal to").replace("_than", " than")
        return f"expected a value {words} {next(iter(context.values()))}"
    if kind.startswith("datetime") or kind.startswith("date_"):
        return "expected a date, or a time with its zone, as in 2026-11-03T09:12:00Z"
    if kind.startswith("uuid"):
        return "expected a UUID, such as 3f0c1e52-9d1b-4c55-8a0e-2b7f6f0f7f3a"
    return _WORDS.get(kind, "expected another kind of value")
