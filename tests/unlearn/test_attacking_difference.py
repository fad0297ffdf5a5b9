"""Both checkpoints in a run: the read-out of the edit, guidance by the original, and what neither may claim."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from probes.errors import UsageError
from probes.modelmap import ModelMap
from tests import tiny
from tests.conftest import World, _rows
from unlearn import api
from unlearn.attacking import difference
from unlearn.requests.attacks import catalogue

READOUT, GUIDANCE = "edit_difference.readout", "edit_difference.guidance"


def suite(folder: Path, entries: list[dict[str, Any]]) -> Path:
    document = {
        "schema": "unlearn.suite/v1",
        "name": "own",
        "description": "for tests",
        "noise_floor": {"records": 2},
        "attacks": entries,
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Found:
    """Documents and tables of one forget run."""

    run: api.Run

    def document(self, name: str, stage: str = "after") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run.path / stage / "attacks" / f"{name}.json").read_text())
        return found

    def table(self, role: str, stage: str = "after") -> pd.DataFrame:
        return pd.read_parquet(self.run.path / stage / "attacks" / f"{role}.parquet")


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """An SSD edit of the planted model, with twenty control records."""
    folder = tmp_path_factory.mktemp("difference")
    lines(folder / "control.jsonl", _rows(100, 20))
    request = yaml.safe_load(world.request.read_text())
    for source in (request["data"], request["checkpoint"], request["reference"], request["retain"]):
        for key in ("records", "path"):
            if key in source:
                source[key] = str(world.folder / source[key])
    request["control"] = {"path": str(folder / "control.jsonl")}
    entries = [{"name": READOUT, "shown": 3}, {"name": GUIDANCE, "records": 6, "others": [0.0, 1.0], "keep": 0.0}]
    request["suite"] = str(suite(folder, entries))
    (folder / "request.yaml").write_text(yaml.safe_dump(request))
    return Found(api.forget(folder / "request.yaml", out=folder / "run"))


def test_they_run_on_the_edited_copy_alone(found: Found) -> None:
    assert not list((found.run.path / "before" / "attacks").glob("*.json"))
    for row in found.run.metrics("before")["attacks"]:
        assert row["status"] == "not_run"
        assert "edited copy" in row["reason"]


def test_the_read_out_agrees_with_the_edit_on_disk(found: Found) -> None:
    document = found.document(READOUT)
    delta = json.loads((found.run.path / "edit/delta.json").read_text())
    assert document["figures"]["changed"]["value"] == pytest.approx(delta["changed_elements"] / delta["total_elements"])
    largest = document["tables"][0]
    assert len(largest["rows"]) == 3
    changed = {row["name"] for row in delta["tensors"] if row["changed"]}
    assert {row[0] for row in largest["rows"]} <= changed
    assert sum(share for _, share in document["tables"][1]["rows"]) == pytest.approx(1)


def test_the_rise_of_the_loss_is_that_of_both_tables(found: Found) -> None:
    for role in ("records", "control"):
        after, before = (pd.read_parquet(found.run.path / stage / f"{role}.parquet") for stage in ("after", "before"))
        rise = found.table(role)[f"{READOUT}:rise"].to_numpy(dtype=float)
        np.testing.assert_allclose(rise, after["loss"] - before["loss"], atol=1e-12)
    figures = found.document(READOUT)["figures"]
    others = found.table("control")[f"{READOUT}:rise"].to_numpy(dtype=float)
    mine = found.table("records")[f"{READOUT}:rise"].to_numpy(dtype=float)
    area = np.mean([(a > b) + 0.5 * (a == b) for a in mine for b in others])
    document = found.document(READOUT)
    if "auc" in figures:
        assert figures["auc"]["value"] == pytest.approx(area)
    else:
        assert document["not_resolvable"]["auc"]
    for key in ("auc", "auc.retain", "auc.over", "auc.reference"):
        assert key in figures or document["not_resolvable"][key]
        assert document["titles"][key]


def test_the_records_that_stand_out_are_named_by_pseudonym(found: Found) -> None:
    table = found.document(READOUT)["tables"][-1]
    own = found.table("records").set_index("record_id")[f"{READOUT}:rise"].astype(float)
    assert [row[0] for row in table["rows"]] == own.sort_values(ascending=False).index[:3].tolist()
    assert [row[3] for row in table["rows"]] == pytest.approx(sorted(own, reverse=True)[:3])
    for _, before, after, rise in table["rows"]:
        assert rise == pytest.approx(after - before)


def test_guidance_by_weight(found: Found) -> None:
    document, table = found.document(GUIDANCE), found.table("records")
    assert document["headline"] == document["column"] == "accuracy"
    scored = table[f"{GUIDANCE}:accuracy"].notna()
    assert scored.sum() == 6
    curve = document["curves"][0]["series"][0]
    assert curve["x"] == [0.0, 1.0, 1.5]
    plain, original = (table.loc[scored, f"{GUIDANCE}:{name}"].astype(float).mean() for name in ("plain", "original"))
    assert curve["y"][:2] == pytest.approx([plain, original])  # 0 is the edited copy, 1 the original
    assert document["figures"]["original"]["value"] == pytest.approx(original)
    before = pd.read_parquet(found.run.path / "before" / "records.parquet")["token_accuracy"]
    assert table.loc[scored, f"{GUIDANCE}:original"].astype(float).tolist() == before[scored.to_numpy()].tolist()


def test_neither_decides_whether_the_records_are_hidden(found: Found) -> None:
    """The original gives the records away beside an exactly retrained model too, so guidance cannot tell."""
    assert not catalogue()[GUIDANCE].stress
    assert not catalogue()[READOUT].stress
    paired = json.loads((found.run.path / "compare/paired.json").read_text())
    assert paired["stress"] is None or not paired["stress"]["recovering"]


def test_no_number_is_missing_without_a_reason(found: Found) -> None:
    for name in (READOUT, GUIDANCE):
        text = (found.run.path / "after" / "attacks" / f"{name}.json").read_text()
        assert "NaN" not in text
        document = found.document(name)
        assert document["headline"]
        for figure in document["figures"].values():
            assert figure["value"] is not None


# --- without a run --------------------------------------------------------------------------------------------------


@dataclass
class Stub:
    """What the read-out asks of its views: an edited image classifier whose removed records lost 2 nats."""

    roles: tuple[str, ...]
    n: int = 60
    edited: bool = True
    seed: int = 0
    has_reference: bool = False
    original: Any = field(default_factory=lambda: tiny.image_classifier("vit"))

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.original)
        with torch.no_grad():
            self.model.get_parameter("classifier.weight")[0] += 0.5
        self.model_map = ModelMap.of(self.model)
        self.workspace = SimpleNamespace(
            run=SimpleNamespace(read_table=lambda name: self.frame(name.split("/")[1].split(".")[0], 0.0)),
            pseudonym=lambda name: f"p{name}",
        )

    def frame(self, role: str, rise: float | None = None) -> pd.DataFrame:
        rng = np.random.default_rng(len(role))
        rise = (2.0 if role == "records" else 0.0) if rise is None else rise
        loss = rng.gamma(2.0, size=self.n)
        return pd.DataFrame({"loss": loss + rise + 0.1 * rng.normal(size=self.n) * (rise != 0)})

    def progress(self, done: int, total: int) -> None:
        """Nobody looks."""

    def original_tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.original.get_parameter(name).detach()
        return found

    def has(self, role: str) -> bool:
        return role in self.roles

    def clusters(self, role: str = "records") -> list[None]:
        return [None] * self.n

    def records(self, role: str = "records") -> list[Any]:
        return [SimpleNamespace(record_id=f"{i}") for i in range(self.n)]


SETTINGS = {"name": READOUT, "largest": 1024, "shown": 5}


def test_an_image_classifier_with_few_sets_and_with_all() -> None:
    views: Any = Stub(("records", "control"))
    result = difference.readout(views, SETTINGS)
    assert result.figures["auc"]["value"] > 0.95
    assert result.control["auc"]["ci_low"] < 0.5 < result.control["auc"]["ci_high"]
    assert result.pvalue is not None
    assert result.pvalue < 0.01
    assert result.not_resolvable["auc.retain"] == "there are no retain records"
    assert result.figures["rise"]["value"] == pytest.approx(2, abs=0.1)
    assert result.tables[0]["rows"][0][:2] == ["classifier.weight", "head"]
    assert [curve["kind"] for curve in result.curves] == ["roc"]  # no block holds a part of this edit
    alone: Any = Stub(("records",))
    result = difference.readout(alone, SETTINGS)
    assert result.headline == "auc"
    assert result.not_resolvable["auc"] == "there are no never-seen records"
    assert result.figures["changed"]["value"] > 0


def test_an_edit_that_changed_nothing_and_one_that_broke_the_weights() -> None:
    views: Any = Stub(("records", "control"))
    views.original = views.model
    result = difference.readout(views, SETTINGS)
    assert result.figures["relative"]["value"] == 0
    assert result.not_resolvable["stable_rank"] == "no matrix changed"
    with torch.no_grad():
        views.model.get_parameter("classifier.weight").fill_(float("nan"))
    with pytest.raises(UsageError, match="finite"):
        difference.readout(views, SETTINGS)


def test_both_need_an_edited_copy() -> None:
    views: Any = SimpleNamespace(edited=False)
    for attack in (difference.readout, difference.guidance):
        with pytest.raises(UsageError, match="edited copy"):
            attack(views, SETTINGS)
