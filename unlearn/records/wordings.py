"""Other wordings of records that a user supplies, for editors that train on more than the records themselves.

JSON lines, several of one record where there are several:

    {"id": "a1", "prompt": "...", "completion": "..."}     for a record with a prompt, or a conversation: its last turns
    {"id": "a1", "prompts": ["...", "..."]}                the same with the record's own completion
    {"id": "a2", "text": "..."}                            for a record without a prompt

Every text stands as a model is to see it, templates and leading blanks included. The prompts must not be among the
paraphrases that an attack scores: training on them would be training on the examination. Nothing here quotes a value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attacks.duplicates import words
from probes.errors import UsageError
from unlearn.mistakes import Mistakes
from unlearn.records.draft import texts_of
from unlearn.records.extras import MAX_LINES
from unlearn.records.raw import Message, RawRecord
from unlearn.records.wronganswers import answered

_FORMS = ({"id", "prompt", "completion"}, {"id", "prompts"}, {"id", "text"})


@dataclass(frozen=True, slots=True)
class Supplied:
    """Wordings of one file.

    Attributes:
        sha256: of the file, `sha256:<hex>`.
        wordings: by record id, in the order of the file.
    """

    sha256: str
    wordings: Mapping[str, tuple[RawRecord, ...]] = field(repr=False)


def read_wordings(path: str | Path, records: Sequence[RawRecord], scored: Iterable[str] = ()) -> Supplied:
    """Wordings of a JSONL file.

    Args:
        path: the file.
        records: the records they are of.
        scored: prompts that an attack scores.

    Raises:
        UsageError: with every mistake, by line.
    """
    source = Path(path)
    try:
        data = source.read_bytes()
        lines = data.decode("utf-8").split("\n")
    except OSError:
        raise UsageError("expected a file of paraphrases, found none that can be read; give a JSONL file") from None
    except UnicodeDecodeError:
        raise UsageError("expected paraphrases in UTF-8, found other bytes; convert the file") from None
    known = {record.id: record for record in records}
    kept = {" ".join(words(prompt)) for prompt in scored}
    seen = {record.id: {_texts(record)} for record in records}
    mistakes = Mistakes("paraphrases to train on")
    found: dict[str, list[RawRecord]] = {}
    for number, line in enumerate(lines[:MAX_LINES], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        problem = _problem(row, known)
        if problem is not None:
            mistakes.add(source.name, number, problem)
            continue
        record = known[str(row["id"])]
        for prompt in row.get("prompts", [row.get("prompt")]):
            new = _reworded(record, prompt, row.get("completion"), row.get("text"))
            if prompt is not None and " ".join(words(prompt)) in kept:
                mistakes.add(source.name, number, "expected training paraphrases apart from those that are scored")
            elif _texts(new) in seen[record.id]:
                mistakes.add(source.name, number, "expected other words than the record's and those of earlier lines")
            else:
                seen[record.id].add(_texts(new))
                found.setdefault(record.id, []).append(replace(new, where=f"{source.name}:{number}"))
    mistakes.raise_any()
    if not found:
        raise UsageError("expected paraphrases to train on, found an empty file")
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Supplied(digest, {name: tuple(rows) for name, rows in found.items()})


def reworded(record: RawRecord, prompt: str, completion: str | None = None) -> RawRecord:
    """A record with another prompt: of a conversation, another last turn of the user; and another completion, if any.

    Raises:
        ValueError: a conversation without a turn of the user before the answer, or a record without a prompt.
    """
    if record.messages is not None:
        turns = list(record.messages)
        last = next((i for i in range(len(turns) - 2, -1, -1) if turns[i].role == "user"), None)
        if last is None:
            raise ValueError("expected a turn of the user, found none")
        turns[last] = Message("user", prompt)
        record = replace(record, messages=tuple(turns))
    elif record.prompt is not None:
        record = replace(record, prompt=prompt)
    else:
        raise ValueError("expected a record with a prompt, found none")
    return record if completion is None else answered(record, completion)


def prompt_of(record: RawRecord) -> str | None:
    """What of a record is reworded as its prompt: of a conversation, the last turn of the user before the answer."""
    if record.messages is not None:
        return next((turn.content for turn in reversed(record.messages[:-1]) if turn.role == "user"), None)
    return record.prompt


def _reworded(record: RawRecord, prompt: str | None, completion: str | None, text: str | None) -> RawRecord:
    return answered(record, str(text)) if prompt is None else reworded(record, prompt, completion)


def _texts(record: RawRecord) -> tuple[str, ...]:
    """What two wordings are compared by."""
    return tuple(text.strip() for text in texts_of(record))


def _problem(row: Any, known: Mapping[str, RawRecord]) -> str | None:
    if not isinstance(row, dict):
        return "expected one JSON object a line"
    if set(row) not in _FORMS:
        forms = ", or ".join(" + ".join(f"`{name}`" for name in sorted(form)) for form in _FORMS)
        return f"expected {forms}, found other fields or not all of them"
    identifier = row["id"]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or not str(identifier).strip():
        return "expected `id` to be that of a record"
    for name in set(row) - {"id", "prompts"}:
        if not _is_text(row[name]):
            return f"expected `{name}` to be a non-empty text"
    if "prompts" in row:
        texts = row["prompts"]
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            return "expected `prompts` to be non-empty texts in a list"
    record = known.get(str(identifier))
    if record is None:
        return "expected the `id` of a record that is to be forgotten, found another"
    if not texts_of(record):
        return "expected the `id` of a record with text, found one of another form"
    if record.text is not None:
        return None if "text" in row else "expected `text` for a record without a prompt"
    if "text" in row:
        return "expected `prompt` and `completion`, or `prompts`, for a record with a prompt"
    return None if prompt_of(record) is not None else "expected a record with a turn of the user, found none"


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # an unpaired surrogate is no text
        return False
    return True
