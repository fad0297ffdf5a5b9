"""What a record is: the five forms, the checked values, and how columns become fields.

Every check raises `Mistake` in words that quote nothing: a value may be what a person asked to have erased.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from probes.errors import UsageError

Form = Literal["text", "completion", "ids", "messages", "image"]

FORMS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "ids": ("prompt_ids", "completion_ids"),
    "messages": ("messages",),
    "image": ("image", "label"),
}
CONTENT = tuple(name for names in FORMS.values() for name in names)
FIELDS = ("id", "group", *CONTENT)
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOKEN_ID = 2**31


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True, slots=True, repr=False)
class RawRecord:
    """One record as it was read; exactly the fields of its form are set.

    Attributes:
        id: the caller's identifier, unique in its file.
        group: near-duplicate cluster or subject.
        image: path (absolute when read from a file), or the encoded bytes.
        label: class index or class name.
        where: `file:line`, for messages; not part of equality.
    """

    id: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    image: str | bytes | None = None
    label: int | str | None = None
    group: str | None = None
    where: str = field(default="", compare=False)

    @property
    def form(self) -> Form:
        """Which of the five forms this record has."""
        return next(form for form, names in FORMS.items() if getattr(self, names[-1]) is not None)

    def __repr__(self) -> str:  # never the content, and not the id either: both may be personal data
        return f"RawRecord(form={self.form!r}, where={self.where!r})"


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """How columns become fields.

    Attributes:
        fields: record field -> column name, for columns that do not carry the field's own name.
        prompt_template: text with `{prompt}` once; put around every prompt.
        completion_template: text with `{completion}` once; put around every completion.
        ignore_unknown: skip columns that are no field instead of reporting them.

    Raises:
        UsageError: if a field is unknown, two fields share a column, or a template lacks its placeholder.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    completion_template: str | None = None
    ignore_unknown: bool = False

    def __post_init__(self) -> None:
        if not set(self.fields) <= set(FIELDS):
            raise UsageError(f"expected `fields` to map names among {', '.join(FIELDS)} to columns, found another name")
        if len(set(self.fields.values())) < len(self.fields):
            raise UsageError("expected one column for each name in `fields`, found a column used twice")
        for name, template in (("prompt", self.prompt_template), ("completion", self.completion_template)):
            if template is not None and template.count(f"{{{name}}}") != 1:
                raise UsageError(f"expected `{name}_template` to contain {{{name}}} exactly once")

    @property
    def by_column(self) -> dict[str, str]:
        """Column name -> record field."""
        mapped = {column: name for name, column in self.fields.items()}
        return mapped | {name: name for name in FIELDS if name not in self.fields and name not in mapped}


def stands_in(text: str, template: str, name: str) -> bool:
    """Whether a text has what a template with `{name}` puts before and after it."""
    before, _, after = template.partition(f"{{{name}}}")
    return text.startswith(before) and text.endswith(after)


class Mistake(Exception):
    """What is wrong with one record, in words that quote nothing."""


def form_of(present: Mapping[str, object]) -> Form:
    """The one form whose fields are all present, and no other's."""
    content = [name for name in CONTENT if name in present]
    for form, names in FORMS.items():
        if content == list(names):
            return form
    for names in FORMS.values():
        if content and set(content) < set(names):
            missing = next(name for name in names if name not in content)
            raise Mistake(f"`{missing}` is missing or empty beside `{content[0]}`")
    wanted = ", or ".join(" + ".join(f"`{name}`" for name in names) for names in FORMS.values())
    if not content:
        raise Mistake(f"expected {wanted}, found none of them")
    raise Mistake(f"expected one of {wanted}, found {' + '.join(f'`{name}`' for name in content)}")


def checked(name: str, value: object, folder: Path | None) -> Any:
    """The value of one field in its final type; relative image paths start at `folder`, and must exist, where given.

    Raises:
        Mistake: if the type or the value is not acceptable.
    """
    if name in ("id", "group"):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise Mistake(f"expected `{name}` to be text or a whole number, found {kind_of(value)}")
        return _text(name, str(value))
    if name in ("prompt_ids", "completion_ids"):
        return _token_ids(name, value)
    if name == "messages":
        return _messages(value)
    if name == "image":
        return _image(value, folder)
    if name == "label":
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise Mistake(f"expected `label` to be a class index or a class name, found {kind_of(value)}")
        if isinstance(value, int) and value < 0:
            raise Mistake("expected `label` to be a class index from 0, found a negative number")
        return _text(name, value) if isinstance(value, str) else value
    return _text(name, value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise Mistake(f"expected `{name}` to be text, found {kind_of(value)}")
    if not value.strip():
        raise Mistake(f"`{name}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Mistake(f"`{name}` holds an unpaired surrogate, which is no text") from None
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise Mistake(f"expected `{name}` to be a list of whole numbers")
    if not value:
        raise Mistake(f"`{name}` is empty")
    if min(value) < 0 or max(value) >= MAX_TOKEN_ID:
        raise Mistake(f"expected `{name}` to be token ids, found a number outside any vocabulary")
    return tuple(value)


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise Mistake("expected `messages` to be a list of mappings with `role` and `content`")
    if len(value) < 2:
        raise Mistake(f"expected `messages` to hold a prompt and an answer, found {len(value)} of them")
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        given = {key: item for key, item in turn.items() if item is not None}
        if set(given) != {"role", "content"}:
            raise Mistake(f"expected message {number} to have exactly `role` and `content`")
        if given["role"] not in ROLES:
            raise Mistake(f"expected the role of message {number} to be one of {', '.join(ROLES)}")
        turns.append(Message(given["role"], _text(f"content of message {number}", given["content"])))
    if turns[-1].role != "assistant":
        raise Mistake("expected the last message to be the assistant's, which is the completion")
    return tuple(turns)


def _image(value: object, folder: Path | None) -> str | bytes:
    """A path, made absolute against the folder of the record file, or encoded bytes (`datasets` images hold either)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise Mistake("expected `image` to be a path or encoded bytes")
    path = Path(value)
    try:
        if folder is not None:
            path = (folder / path).resolve()
            if not path.is_file():
                raise Mistake("the image file does not exist")
    except (OSError, ValueError):
        raise Mistake("the image path cannot be read") from None
    return str(path)


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def kind_of(value: object) -> str:
    """A type in plain words."""
    return _KINDS.get(type(value), "another type")
