"""Attacks that look inside, in a run: on the original, the edited copy and the reference, and alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from probes.errors import UsageError
from probes.inside.patching import depth
from probes.records import TokenRecord
from tests import tiny
from tests.conftest import World
from unlearn import api
from unlearn.attacking import inside
from unlearn.requests.attacks import catalogue
from unlearn.requests.attacks.declaration import Size

NAMES = ("lens", "probe", "patching", "steering")
FAMILY = "hidden_knowledge"
STAGES = ("before", "after", "reference")


@pytest.fixture(scope="module")
def forgotten(world: World, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    folder = tmp_path_factory.mktemp("inside")
    suite = {
        "schema": "unlearn.suite/v1",
        "name": "own",
        "description": "for tests",
        "noise_floor": {"records": 4},
        "attacks": [{"name": "recollection.probability"}],
        "reaudit": [{"name": f"{FAMILY}.{name}"} for name in NAMES],
    }
    (world.folder / "inside.yaml").write_text(yaml.safe_dump(suite))
    request = world.folder / "inside-request.yaml"
    request.write_text(world.request.read_text().replace("suite: quick", "suite: inside.yaml"))
    return api.forget(request, out=folder / "run")


@pytest.fixture(scope="module")
def hiding(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted checkpoint whose last block writes the opposite: what it puts out, and not what is in it, changed."""
    model = AutoModelForCausalLM.from_pretrained(world.planted)
    with torch.no_grad():
        for name, parameter in model.model.layers[-1].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(-8)
    return tiny.save(model, tiny.tokenizer(), tmp_path_factory.mktemp("hiding") / "checkpoint")


def found(run: api.Run, name: str, stage: str = "before") -> dict[str, Any]:
    return run.attack(f"{FAMILY}.{name}", stage)


def columns(run: api.Run, name: str, stage: str = "before", role: str = "records") -> pd.DataFrame:
    table = pd.read_parquet(run.path / stage / "attacks" / f"{role}.parquet")
    own = [column for column in table if column.startswith(f"{FAMILY}.{name}:")]
    return table[own].rename(columns=lambda column: column.partition(":")[2]).apply(pd.to_numeric, errors="coerce")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_has_its_figure_or_a_reason(forgotten: api.Run, name: str, stage: str) -> None:
    row = {row["name"]: row for row in forgotten.metrics(stage)["attacks"]}[f"{FAMILY}.{name}"]
    if name == "patching" and stage != "after":
        assert row["status"] == "not_run"
        assert row["reason"]
        return
    assert row["status"] == "run", row["reason"]
    document = found(forgotten, name, stage)
    key, column = document["headline"], document["column"]
    for role, part in (("records", "figures"), ("control", "control")):
        values = columns(forgotten, name, stage, role)[column].dropna()
        assert len(values) == document[part][key]["n"]
        assert values.mean() == pytest.approx(document[part][key]["value"], abs=1e-9)
        assert values.between(0, 1).all()
    assert {*document["figures"], *document["control"]} <= set(document["titles"])
    for curve in document["curves"]:
        for series in curve["series"]:
            assert len(series["x"]) == len(series["y"]) > 0
            assert all(math.isfinite(value) for value in series["y"])


def test_plain_columns_are_the_one_pass(forgotten: api.Run) -> None:
    for name, role in (("lens", "records"), ("probe", "records"), ("steering", "records"), ("steering", "control")):
        own = columns(forgotten, name, "after", role)["plain"]
        scored = own.notna().to_numpy()
        plain = pd.read_parquet(forgotten.path / "after" / f"{role}.parquet")["probability"]
        np.testing.assert_allclose(own[scored], plain[scored], rtol=1e-9)


def test_an_attack_counts_as_teaching_by_what_it_learned_alone(forgotten: api.Run) -> None:
    """An edit that pushes never-seen records down too must not make a reading of inner layers look like teaching."""
    assert "plain" not in columns(forgotten, "lens", "after", "control")
    table = found(forgotten, "probe", "after")["tables"][0]
    layer = max(table["rows"], key=lambda row: row[1])[0]
    views = columns(forgotten, "probe", "after", "control")
    curve = found(forgotten, "lens", "after")["curves"][0]["series"][1]
    assert curve["name"] == "never seen"
    assert views["plain"].mean() == pytest.approx(curve["y"][curve["x"].index(layer)], rel=1e-6)


def test_what_is_learned_from_is_not_scored(forgotten: api.Run) -> None:
    for name in ("probe", "steering"):
        scored = [columns(forgotten, name, stage)["plain"].notna() for stage in STAGES]
        assert scored[0].sum() == 4  # half of 8
        assert all((one == scored[0]).all() for one in scored)  # the same rows on every arm
        assert columns(forgotten, name, "after", "control")["probability"].notna().all()


def test_a_lens_reads_no_less_than_the_output(forgotten: api.Run) -> None:
    for stage in STAGES:
        own = columns(forgotten, "lens", stage)
        assert (own["probability"] >= own["plain"] - 1e-6).all()


def test_patching_says_how_much_is_still_there(forgotten: api.Run) -> None:
    document, own = found(forgotten, "patching", "after"), columns(forgotten, "patching", "after")
    assert own["original"].dropna().eq(1).all()
    assert document["figures"]["original"]["value"] == 1
    assert columns(forgotten, "patching", "after", "control")["still_there"].eq(0).all()
    effect, never = document["figures"]["effect"], document["control"]["effect"]
    assert effect["unit"] == "nats"
    assert effect["value"] > 1
    assert effect["value"] > never["value"] + 1
    assert document["curves"][0]["title"] == "How far each layer is erased"
    judged = json.loads((forgotten.path / "compare" / "paired.json").read_text())
    assert f"{FAMILY}.patching" in json.dumps(judged)


def test_records_that_the_original_did_not_hold_are_not_resolvable() -> None:
    records = [TokenRecord(f"r{i}", (4, 5, 6), 1, 1, group=f"g{i}") for i in range(6)]
    views: Any = SimpleNamespace(records=lambda role: records, clusters=lambda role: [r.group for r in records], seed=0)
    plain, other = np.full(6, 2.0), np.full((6, 3), 2.01)
    nothing = depth(records, [0, 1, 2], plain, other, other)
    result = inside._depth_result(views, {"records": np.arange(6), "control": np.arange(6)}, nothing, nothing)
    assert result.headline in result.not_resolvable
    assert result.headline not in {*result.figures, *result.control}
    assert result.records["still_there"] == result.records["original"] == [None] * 6
    assert not result.curves
    assert "0 of 6" in result.notes[0]


def test_a_checkpoint_that_only_hides_is_seen_through(world: World, hiding: Path, tmp_path: Path) -> None:
    more = {"records": world.records, "control": world.control}
    lens = api.attack(f"{FAMILY}.lens", hiding, out=tmp_path / "lens", **more)
    figures, control = found(lens, "lens")["figures"], found(lens, "lens")["control"]
    assert figures["plain"]["value"] < 0.1
    assert figures["probability"]["value"] > figures["plain"]["value"] + 0.15
    assert figures["probability"]["value"] > control["probability"]["value"] + 0.1
    series = {one["name"]: one for one in found(lens, "lens")["curves"][0]["series"]}
    assert series["records"]["x"] == [0, 1, 2]
    assert max(series["records"]["y"]) == series["records"]["y"][1]  # the block before the one that was exchanged
    base = api.attack(f"{FAMILY}.lens", world.base, out=tmp_path / "base", **more)
    both = (found(base, "lens")[part]["probability"]["value"] for part in ("figures", "control"))
    assert abs(next(both) - next(both)) < 0.05


def test_no_record_text_or_token_leaves_the_private_folder(forgotten: api.Run, world: World) -> None:
    rows = [json.loads(line) for line in world.records.read_text().splitlines()]
    for path in forgotten.path.rglob("*"):
        if path.is_file() and "private" not in path.parts and f"{FAMILY}." in path.name:
            text = path.read_text()
            assert not any(row["prompt"] in text or row["completion"].strip() in text for row in rows)


def test_what_cannot_run_says_why(world: World, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(world.records.read_text().splitlines()[0] + "\n")
    with pytest.raises(UsageError, match="at least 2 clusters"):
        api.attack(f"{FAMILY}.probe", world.base, records=one, control=world.control, out=tmp_path / "a")
    bare = tmp_path / "bare.jsonl"
    bare.write_text(
        "".join(json.dumps({"id": str(i), "prompt": "so it is", "completion": f" {i}"}) + "\n" for i in range(6))
    )
    with pytest.raises(UsageError, match="names, numbers or dates"):
        api.attack(f"{FAMILY}.steering", world.base, records=bare, control=world.control, out=tmp_path / "b")
    with pytest.raises(UsageError):
        api.attack(f"{FAMILY}.patching", world.base, records=world.records, control=world.control, out=tmp_path / "c")


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_positive_and_bounded_by_the_rows(name: str) -> None:
    declaration = catalogue()[f"{FAMILY}.{name}"]
    settings = declaration.settings().model_dump(mode="json")
    small, large = (sum(declaration.cost(settings, Size(n, n)).values()) for n in (8, 4000))
    assert 1 < large < small
    assert declaration.stress
    assert declaration.goal.endswith("?")
