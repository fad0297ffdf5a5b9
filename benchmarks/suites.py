"""Forward passes of the audited model that a suite takes, per record: shared passes against each attack alone.

Tokens are counted by a hook on the model's backbone, so padding, repeated prompts, decoding and the noise floor all
count. One bare pass is every token of the records and the control set once. For "alone" every attack of the suite runs
by itself, as `unlearn attack NAME` does, with nothing kept from the others. The store of earlier measurements is off.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.subject import Subject
from probes.records import TokenRecord
from unlearn import attack, audit
from unlearn.records.files import records_from
from unlearn.records.tokens import tokenise
from unlearn.requests.attacks import catalogue
from unlearn.requests.presets import load_suite

RECORDS = 1000
WORDS = (
    "the of and to in is was for on that by with from at his her it as an be which were are this also had has".split()
)


@dataclass(frozen=True, slots=True)
class Count:
    """Passes of one suite.

    Attributes:
        case: suite and size.
        passes: tokens through the audited model over tokens of the sets.
        alone: the same with each attack run by itself; None where it was not measured.
        target: at most this many passes, or None.
        note: attacks that ran.
    """

    case: str
    passes: float
    alone: float | None
    target: str
    note: str

    @property
    def median(self) -> float:
        return self.passes

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def run(subject: Subject) -> Iterator[Count]:
    n = 24 if subject.tiny else RECORDS
    os.environ["UNLEARN_CACHE"] = ""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for name, size in (("records", n), ("control", n)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(name, size)))
        for suite, count, goal in (
            ("quick", n, "at most 1.3"),
            ("standard", max(24, n // 5), "alone at least 5 times"),
        ):
            yield _suite(subject, folder, suite, count, goal)


def _suite(subject: Subject, folder: Path, suite: str, n: int, goal: str) -> Count:
    sets = {}
    for name in ("records", "control"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()[:n]
        sets[name] = folder / f"{suite}-{name}.jsonl"
        sets[name].write_text("\n".join(lines) + "\n")
    tokens = sum(len(record.ids) for path in sets.values() for record in _tokenised(subject, path))
    counter = _Counter(subject)
    reference = _nearby(subject)
    shared = folder / f"{suite}-shared"
    with counter:
        made = audit(
            subject.model,
            sets["records"],
            control=sets["control"],
            reference=reference,
            suite=suite,
            tokenizer=subject.tokenizer,
            out=shared,
        )
    passes = counter.tokens / tokens
    ran = [row["name"] for row in made.metrics()["attacks"] if row["status"] == "run"]
    alone = None
    if suite == "standard":
        entries = {entry.name: entry.model_dump(mode="json") for entry in load_suite(suite).attacks}
        total = 0
        for name in ran:
            settings = {key: value for key, value in entries[name].items() if key != "name"}
            with counter:
                attack(
                    name,
                    subject.model,
                    records=sets["records"],
                    control=sets["control"],
                    reference=reference,
                    settings=settings,
                    tokenizer=subject.tokenizer,
                    out=folder / f"alone-{name}",
                )
            total += counter.tokens
        alone = total / tokens
    text = sum(not sum(catalogue()[name].cost(_defaults(name), _size(n)).values()) for name in ran)
    return Count(f"{suite}, {n} records and {n} controls", passes, alone, goal, f"{len(ran)} attacks, {text} text only")


def table(rows: list[Count]) -> str:
    """One line a suite."""
    cells = [["case", "passes", "each alone", "ratio", "target", "note"]]
    for row in rows:
        ratio = "" if row.alone is None else f"{row.alone / row.passes:.1f}"
        alone = "" if row.alone is None else f"{row.alone:.2f}"
        cells.append([row.case, f"{row.passes:.2f}", alone, ratio, row.target, row.note])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


class _Counter:
    """Tokens that pass through the model while it is entered."""

    def __init__(self, subject: Subject) -> None:
        self.backbone = subject.model_map.backbone(subject.model)
        self.tokens = 0

    def __enter__(self) -> None:
        self.tokens = 0
        self._hook = self.backbone.register_forward_pre_hook(self._count, with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else kwargs["inputs_embeds"]
        self.tokens += given.shape[0] * given.shape[1]


def _nearby(subject: Subject) -> Any:
    """A reference: the same model with a little noise in one matrix. Its passes are not counted."""
    other = copy.deepcopy(subject.model)
    weight = other.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight.add_(0.01 * torch.randn(weight.shape, generator=generator).to(weight.device))
    return other


def _defaults(name: str) -> dict[str, Any]:
    return dict(catalogue()[name].settings().model_dump(mode="json"))


def _size(n: int) -> Any:
    from unlearn.requests.attacks import Size

    return Size(n, n)


def _tokenised(subject: Subject, path: Path) -> list[TokenRecord]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return tokenise(records_from(rows), subject.tokenizer, max_length=None)


def _rows(name: str, n: int) -> Iterator[dict[str, str]]:
    """Sentences that no model was trained on: common words in random order, about 50 of them after a prompt of 20."""
    chance = random.Random(name)
    for i in range(n):
        words = [chance.choice(WORDS) for _ in range(chance.randint(50, 90))]
        yield {"id": f"{name}-{i}", "prompt": " ".join(words[:20]), "completion": " " + " ".join(words[20:])}
