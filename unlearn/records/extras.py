"""What some attacks need beside record sets: canaries with their format, candidates for an attribute, paraphrases.

All are JSON lines. A canary is `{"id", "prompt", "format", "secret"}`: `secret` is what was planted after `prompt`,
`format` the form it was drawn from (`{digits:9}`, see `attacks.exposure`). Candidates are `{"id", "candidates"}`: `id`
is that of a record, whose personal data is asked for among the candidates. Paraphrases are `{"id", "prompts"}`: `id` is
that of a record of the forget set or the control set, and each prompt asks for its completion in other words or in
another language, as the model is to see it: no template is put around it. Nothing here quotes a value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.errors import UsageError
from unlearn.mistakes import Mistakes

MAX_LINES = 1_000_000


@dataclass(frozen=True, slots=True, repr=False)
class Canary:
    """One planted secret."""

    id: str
    prompt: str
    format: str
    secret: str


def read_canaries(path: str | Path) -> list[Canary]:
    """Canaries of a JSONL file.

    Raises:
        UsageError: with every mistake, by line.
    """
    rows = _rows(path, "canaries", {"id": str, "prompt": str, "format": str, "secret": str})
    found = [Canary(**row) for row in rows]
    different = {(canary.prompt, canary.format, canary.secret) for canary in found}
    if again := len(found) - len(different):
        raise UsageError(f"expected different canaries, found {again} that repeat an earlier one under another id")
    return found


def read_candidates(path: str | Path) -> dict[str, list[str]]:
    """Candidates by record id.

    Raises:
        UsageError: with every mistake, by line.
    """
    return {row["id"]: row["candidates"] for row in _rows(path, "candidates", {"id": str, "candidates": list})}


def read_paraphrases(path: str | Path) -> dict[str, list[str]]:
    """Other prompts for the same completion, by record id.

    Raises:
        UsageError: with every mistake, by line.
    """
    return {row["id"]: row["prompts"] for row in _rows(path, "paraphrases", {"id": str, "prompts": list})}


def _rows(path: str | Path, what: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UsageError(f"expected a file of {what}, found none that can be read; give a JSONL file") from None
    except UnicodeDecodeError:
        raise UsageError(f"expected {what} in UTF-8, found other bytes; convert the file") from None
    mistakes, rows = Mistakes(what), []
    seen: set[str] = set()
    for number, line in enumerate(lines[:MAX_LINES], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if problem := _problem(row, fields, seen):
            mistakes.add(source.name, number, problem)
            continue
        seen.add(row["id"])
        rows.append(row)
    mistakes.raise_any()
    if not rows:
        raise UsageError(f"expected {what}, found an empty file")
    return rows


def _problem(row: Any, fields: dict[str, type], seen: set[str]) -> str | None:
    if not isinstance(row, dict):
        return "expected one JSON object a line"
    if set(row) != set(fields):
        return f"expected the fields {', '.join(fields)}, found others or not all of them"
    for name, kind in fields.items():
        if not isinstance(row[name], kind) or not row[name]:
            return f"expected `{name}` to be a non-empty {'list of texts' if kind is list else 'text'}"
    for name in (name for name, kind in fields.items() if kind is list):
        texts = row[name]
        if any(not isinstance(text, str) or not text.strip() for text in texts) or len(set(texts)) < len(texts):
            return f"expected `{name}` to be different non-empty texts"
    return "expected an `id` that no earlier line has" if row["id"] in seen else None
