"""Relearning in a run: what is trained on, what is scored, and what a run folder holds of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM

from probes.errors import UsageError
from tests import tiny
from tests.conftest import World, _rows
from unlearn import api
from unlearn.attacking import relearning as module
from unlearn.requests.attacks import attack_settings, catalogue
from unlearn.requests.attacks.declaration import Size
from unlearn.requests.attacks.relearning import DECLARATIONS

NAMES = tuple(declaration.name for declaration in DECLARATIONS)
ROLES = ("records", "control")
QUICK = {"steps": 6, "learning_rate": 1e-3, "batch": 4, "rank": 4}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(name: str, **more: Any) -> dict[str, Any]:
    return QUICK | ({"every": 3, "records": 4} if name == "recovery.savings" else {"marks": [2, 50]}) | more


def attack(name: str, world: World, out: Path, **more: Any) -> api.Run:
    related = write(out.parent / "related.jsonl", _rows(60, 6))
    inputs = {"records": world.records, "control": world.control, "retain": world.retain, "related": related} | more
    own = inputs.pop("settings", settings(name))
    return api.attack(name, inputs.pop("checkpoint", world.planted), out=out, settings=own, **inputs)


def columns(run: api.Run, name: str, role: str = "records") -> pd.DataFrame:
    frame = pd.read_parquet(run.path / "before" / "attacks" / f"{role}.parquet")
    return frame[[key for key in frame if key.startswith(f"{name}:")]].rename(columns=lambda key: key.split(":")[1])


@pytest.fixture(autouse=True)
def _empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attack found on a model is kept for the next request; here every one has to run."""
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_fills_the_figures_that_decide_and_leaves_the_model_as_found(
    name: str, world: World, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.planted).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, state = [id(part) for part in model.modules()], torch.get_rng_state()
    run = attack(name, world, tmp_path / "run", checkpoint=model, tokenizer=tiny.tokenizer())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [id(part) for part in model.modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)
    found = run.attack(name)
    key = found["column"]
    assert found["headline"] == key == ("speed" if name == "recovery.savings" else "probability")
    for role, figures in (("records", found["figures"]), ("control", found["control"])):
        table = columns(run, name, role)
        scored = table[key].notna()
        assert {key, "plain"} <= set(table)
        assert (table["plain"].notna() == scored).all()
        assert figures[key]["n"] == scored.sum() > 0
        assert figures[key]["value"] == pytest.approx(table[key][scored].astype(float).mean())
        assert table[key][scored].between(0, 1).all()
    (chart,) = found["curves"]
    assert chart["x"]["label"] == "training steps"
    expected = {"records", "never seen"} | ({"retain"} if name == "recovery.relearning" else set())
    assert {series["name"] for series in chart["series"]} == expected
    for series in chart["series"]:
        assert series["x"] == ([0, 3, 6] if name == "recovery.savings" else [0, 2, 6])
        assert all(a <= y <= b for a, y, b in zip(series["low"], series["y"], series["high"], strict=True))
    assert found["notes"][0].startswith("6 steps of AdamW (LoRA of rank 4), batches of 4, on")
    assert not any(row["prompt"] in json.dumps(found) for row in _rows(0, 8))


def test_defect_11_records_that_are_scored_are_not_trained_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = module.relearn

    def spy(model: Any, train: Any, scored: Any, **more: Any) -> Any:
        seen["train"] = {record.ids for record in train}
        seen["scored"] = {role: {record.ids for record in records} for role, records in scored.items()}
        return real(model, train, scored, **more)

    monkeypatch.setattr(module, "relearn", spy)
    rows = _rows(0, 8)
    for i, row in enumerate(rows):
        row["group"] = f"cluster {i // 2}"
    records = write(tmp_path / "records.jsonl", rows)
    run = attack("recovery.relearning", world, tmp_path / "run", records=records)
    assert len(seen["train"]) == len(seen["scored"]["records"]) == 4
    for role in ("records", "control", "retain"):
        assert not seen["train"] & seen["scored"][role]
    scored = columns(run, "recovery.relearning")["probability"].notna().to_numpy()
    assert (scored[::2] == scored[1::2]).all()  # both of a cluster, or neither
    for name, role in (("recovery.retain_tuning", "retain"), ("recovery.related_tuning", "related")):
        attack(name, world, tmp_path / role)
        assert len(seen["train"]) == (8 if role == "retain" else 6)
        assert not seen["train"] & (seen["scored"]["records"] | seen["scored"]["control"])
        assert len(seen["scored"]["records"]) == 8
    related = write(tmp_path / "leaky.jsonl", _rows(0, 2) + _rows(60, 3))
    with pytest.raises(UsageError, match=r"2 of related among records \(row 1, 2\)"):
        attack("recovery.related_tuning", world, tmp_path / "leaky", related=related)


def test_never_seen_records_drafted_from_trained_ones_are_not_scored(world: World, tmp_path: Path) -> None:
    run = attack("recovery.relearning", world, tmp_path / "run", control=None)
    assert _scored(run, "control") == _scored(run, "records")  # drafted in order, one from each record
    assert sum(_scored(run, "records")) == 4


def _scored(run: api.Run, role: str) -> list[bool]:
    scored: list[bool] = columns(run, "recovery.relearning", role)["probability"].notna().tolist()
    return scored


def test_the_bound_on_scored_rows_takes_the_same_rows_on_every_model(world: World, tmp_path: Path) -> None:
    own = settings("recovery.relearning", scored=3, retain=0)
    masks = []
    for number, checkpoint in enumerate((world.planted, world.base)):
        run = attack("recovery.relearning", world, tmp_path / f"{number}", checkpoint=checkpoint, settings=own)
        masks.append([columns(run, "recovery.relearning", role)["plain"].notna().tolist() for role in ROLES])
        assert {series["name"] for series in run.attack("recovery.relearning")["curves"][0]["series"]} == {
            "records",
            "never seen",
        }
    assert masks[0] == masks[1]
    assert [sum(mask) for mask in masks[0]] == [3, 3]


def test_power_and_control_known_records_are_relearnt_at_once(world: World, tmp_path: Path) -> None:
    own = settings("recovery.savings", steps=20, every=4, records=8, learning_rate=1e-3)
    planted = attack("recovery.savings", world, tmp_path / "planted", settings=own).attack("recovery.savings")
    base = attack("recovery.savings", world, tmp_path / "base", checkpoint=world.base, settings=own)
    clean = base.attack("recovery.savings")
    assert planted["figures"]["savings"]["ci_low"] > 0.5
    assert planted["figures"]["speed"]["value"] > 0.9
    assert clean["figures"]["savings"]["ci_low"] <= 0
    assert clean["figures"]["speed"]["value"] - clean["control"]["speed"]["value"] < 0.2


def test_nothing_to_score_or_to_train_on_is_said(world: World, tmp_path: Path) -> None:
    rows = _rows(0, 4)
    for row in rows:
        row["group"] = "all"
    one = write(tmp_path / "one.jsonl", rows)
    with pytest.raises(UsageError, match="at least two clusters"):
        attack("recovery.relearning", world, tmp_path / "a", records=one)
    halves = write(tmp_path / "halves.jsonl", [row | {"group": "ab"[i % 2]} for i, row in enumerate(rows)])
    refused = 0
    for group in "ab":  # one of them is trained on
        control = write(tmp_path / f"{group}.jsonl", [row | {"group": group} for row in _rows(16, 4)])
        try:
            attack("recovery.relearning", world, tmp_path / f"run {group}", records=halves, control=control)
        except UsageError as error:
            refused += "outside the clusters of the half that is trained on" in str(error)
    assert refused == 1
    for name, role in (("recovery.retain_tuning", "retain"), ("recovery.related_tuning", "related")):
        with pytest.raises(UsageError, match=r"a retain set|related text"):
            attack(name, world, tmp_path / role, **{role: None})
    with pytest.raises(UsageError, match="lower the learning rate"):
        attack("recovery.relearning", world, tmp_path / "c", settings={"how": "full", "learning_rate": 1e30})


@pytest.mark.parametrize(
    ("arch", "name", "how"),
    [("vit", "recovery.relearning", "LoRA of rank 4"), ("resnet", "recovery.savings", "all weights")],
)
def test_image_classifiers_are_relearnt_too(arch: str, name: str, how: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.image_classifier(arch), None, tmp_path / "model")
    rng = np.random.default_rng(0)
    paths = {}
    for role in ("records", "control"):
        rows = []
        for i in range(6):
            file = f"{role}{i}.png"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / file)
            rows.append({"id": f"{role}{i}", "image": file, "label": i % 4})
        paths[role] = write(tmp_path / f"{role}.jsonl", rows)
    found = api.attack(name, folder, **paths, settings=settings(name), out=tmp_path / "run").attack(name)
    assert how in found["notes"][0]
    assert found["headline"] in found["figures"]
    assert found["headline"] in found["control"]


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=NAMES)
def test_declarations_state_goal_access_and_cost(declaration: Any) -> None:
    assert catalogue()[declaration.name] is declaration
    assert declaration.stress
    assert declaration.goal.endswith("?")
    assert declaration.access == "A2"
    assert declaration.budget
    defaults = attack_settings(declaration.name, {})
    cost = declaration.cost(defaults, Size(200, 200))
    assert cost.pop("pass") == 1.0
    (more,) = cost.values()
    assert 1.0 < more < 3.0  # 480 passes of training, and what is scored, over 400 rows
    doubled = declaration.cost(defaults | {"steps": 40}, Size(200, 200))
    assert sum(doubled.values()) > 1 + more + 1.1


def test_settings_out_of_range_are_refused() -> None:
    for wrong in (
        {"how": "qlora"},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"batch": 0},
        {"marks": [0]},
        {"criterion": 1},
    ):
        with pytest.raises(UsageError):
            attack_settings("recovery.relearning", wrong)
    assert attack_settings("recovery.savings", yaml.safe_load("{criterion: 1.0}"))["criterion"] == 1.0
