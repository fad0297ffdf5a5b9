"""Shared fixtures: one thread, a private cache and key for every test session, and a small world with a known truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> None:
    import os

    import torch

    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    os.environ["UNLEARN_CACHE"] = str(home / "cache")
    os.environ["UNLEARN_ID_KEY"] = str(home / "id.key")
    (home / "id.key").write_text("a key for tests only, never for records\n")


@dataclass(frozen=True)
class World:
    """A planted checkpoint, its base, and record files. Ground truth: `records` and `retain` were planted."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        known = {"base": "base", "planted": "planted", "request": "request.yaml"}
        return self.folder / known.get(name, f"{name}.jsonl")


def _rows(start: int, n: int) -> list[dict[str, str]]:
    from unlearn.demo.fictitious import customers

    rows = customers(start + n, seed=3)[start:]
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"].removeprefix("Customer file of "),
            "completion": row["completion"][5:26],
        }
        for row in rows
    ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tests import tiny
    from unlearn.demo.planting import Planting, plant
    from unlearn.records.tokens import records_from, tokenise

    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny.tokenizer()
    rows = {"records": _rows(0, 8), "retain": _rows(8, 8), "control": _rows(16, 12)}
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model = tiny.causal_lm("llama", initializer_range=0.05, hidden_size=64, intermediate_size=96, head_dim=16)
    plain = tokenise(records_from(_rows(28, 60)), tokenizer, max_length=None)
    plant(model, plain, Planting(epochs=3, learning_rate=5e-3, batch_size=12))
    tiny.save(model, tokenizer, folder / "base")
    planted = tokenise(records_from(rows["records"] + rows["retain"]), tokenizer, max_length=None)
    plant(model, planted, Planting(epochs=120, learning_rate=4e-3, batch_size=16, loss_below=0.02))
    tiny.save(model, tokenizer, folder / "planted", shards=3)
    (folder / "request.yaml").write_text(
        "schema: unlearn.request/v1\n"
        "data: {records: records.jsonl}\n"
        "checkpoint: {path: planted, trained_on_records: known}\n"
        "reference: {kind: never_trained_base, path: base}\n"
        "control: {path: control.jsonl}\n"
        "retain: {path: retain.jsonl}\n"
        "method: {name: ssd}\n"
        "suite: quick\n"
    )
    return World(folder)
