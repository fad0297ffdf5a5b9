"""Forward and backward passes of each attack on an edit's durability, per record.

Tokens are counted by a hook on the model's backbone, those of a forward pass that is followed by a backward one apart:
a pass counts as both where its output carries a gradient. One pass is every token of the records and the control set
once. Each attack runs alone, as `unlearn attack NAME` does, with its default settings; `declared` is what the catalogue
says it costs, a training step counted as three passes. The store of earlier measurements is off.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.subject import Subject
from benchmarks.suites import _nearby, _rows, _tokenised
from unlearn import attack
from unlearn.requests.attacks import Size, catalogue

RECORDS = 200


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of one attack.

    Attributes:
        case: the attack.
        forward: tokens through the model over tokens of the sets.
        backward: those of them that a backward pass followed.
        declared: forward passes by the catalogue; a backward one counts two.
    """

    case: str
    forward: float
    backward: float
    declared: float

    @property
    def median(self) -> float:
        return self.forward + 2 * self.backward

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def run(subject: Subject) -> Iterator[Passes]:
    n = 16 if subject.tiny else RECORDS
    os.environ["UNLEARN_CACHE"] = ""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        sets = {}
        for name in ("records", "control", "retain"):
            sets[name] = folder / f"{name}.jsonl"
            sets[name].write_text("".join(json.dumps(row) + "\n" for row in _rows(name, n)))
        rows = {name: _tokenised(subject, path) for name, path in sets.items()}
        tokens = sum(len(record.ids) for name in ("records", "control") for record in rows[name])
        reference = _nearby(subject)
        for name, declaration in catalogue().items():
            possible = {"records", "control", "retain", "text"} >= set(declaration.needs)
            if not declaration.stress or not possible or "causal_lm" not in declaration.tasks:
                continue
            with _Counter(subject) as counter:
                attack(
                    name,
                    subject.model,
                    records=sets["records"],
                    control=sets["control"],
                    retain=sets["retain"],
                    reference=reference if "reference" in declaration.needs else None,
                    tokenizer=subject.tokenizer,
                    out=folder / name,
                )
            settings = declaration.settings().model_dump(mode="json")
            cost = declaration.cost(settings, Size(n, n, tokens / (2 * n)))
            yield Passes(name, counter.forward / tokens, counter.backward / tokens, sum(cost.values()))


def table(rows: list[Passes]) -> str:
    """One line an attack."""
    cells = [["attack", "forward", "with backward", "declared"]]
    cells += [[row.case, f"{row.forward:.2f}", f"{row.backward:.2f}", f"{row.declared:.2f}"] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


class _Counter:
    """Tokens through the model while it is entered, and those whose pass carries a gradient."""

    def __init__(self, subject: Subject) -> None:
        self.backbone = subject.model_map.backbone(subject.model)
        self.forward = self.backward = 0

    def __enter__(self) -> _Counter:
        self._hook = self.backbone.register_forward_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output.last_hidden_state
        tokens = state.shape[0] * state.shape[1]
        self.forward += tokens
        if torch.is_grad_enabled() and state.requires_grad:
            self.backward += tokens
