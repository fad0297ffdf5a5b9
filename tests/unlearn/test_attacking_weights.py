"""Quantisation, pruning, noise and interpolation as attacks of a run: columns, figures, tables, what comes back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks.recovery.interpolate import STEPS
from attacks.recovery.prune import noise
from attacks.recovery.quantise import SCHEMES, diagnostics, quantisation, quantised
from attacks.recovery.weights import targets
from probes.errors import UsageError
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import ImageRecord
from tests import tiny
from tests.attacks.recovery.hiding import hide, holding, left_alone, random_records
from tests.conftest import World
from unlearn import api
from unlearn.attacking import weights
from unlearn.attacking.result import Result
from unlearn.requests.attacks import attack_settings, catalogue, passes
from unlearn.requests.attacks.declaration import Size
from unlearn.requests.attacks.weights import DECLARATIONS, Interpolation, Scheme

NAMES = ("recovery.quantisation", "recovery.pruning", "recovery.noise", "recovery.interpolation")
RUNNERS = dict(zip(NAMES, (weights.quantisation, weights.pruning, weights.noise, weights.interpolation), strict=True))


class StandIn:
    """What an attack's runner reads of `Views`, on a live model."""

    def __init__(self, model: nn.Module, sets: dict[str, list[Any]], original: nn.Module | None = None) -> None:
        self.model, self.sets, self.original = model, sets, original
        self.model_map = ModelMap.of(model)
        self.task = self.model_map.task
        self.seed = 5
        self.settings = SimpleNamespace(batch_tokens=None)
        self.edited = original is not None
        self.seen: list[tuple[int, int]] = []
        self._plain = {role: memorised(model, records) for role, records in sets.items() if role != "retain"}

    def has(self, role: str) -> bool:
        return bool(self.sets.get(role))

    def records(self, role: str = "records") -> list[Any]:
        return self.sets.get(role, [])

    def clusters(self, role: str = "records") -> list[str | None]:
        return [record.group for record in self.records(role)]

    def frame(self, role: str = "records") -> pd.DataFrame:
        return self._plain.get(role, pd.DataFrame())

    def plain(self, role: str = "records") -> pd.DataFrame:
        return self._plain[role]

    def original_tensor(self, name: str) -> Tensor:
        assert self.original is not None
        return self.original.get_parameter(name).detach().clone()

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def run(name: str, views: StandIn, **settings: Any) -> Result:
    checked = attack_settings(name, settings)
    runner: Callable[[Any, dict[str, Any]], Result] = RUNNERS[name]
    with left_alone(views.model):
        return runner(views, checked)


def column(result: Result, name: str, side: str = "records") -> np.ndarray:
    return np.array(getattr(result, side)[name], dtype=np.float64)


def edited_pair() -> tuple[nn.Module, nn.Module]:
    """A model that holds the records, and a copy that has lost them to a change of every matrix."""
    held = holding()
    boxes = {n: torch.full_like(p, 0.01) for n, p in held.model.named_parameters() if p.ndim == 2}
    return held.model, hide(held.model, held.records, {n: box.detach() for n, box in boxes.items()}, steps=6)


def texts(retain: bool = False) -> dict[str, list[Any]]:
    held = holding()
    sets: dict[str, list[Any]] = {"records": held.records, "control": held.controls}
    return sets | ({"retain": random_records(4, 9)} if retain else {})


# ---------------------------------------------------------------------------------------------------- declarations


def test_declarations() -> None:
    assert tuple(d.name for d in DECLARATIONS) == NAMES
    for declaration in DECLARATIONS:
        assert catalogue()[declaration.name] is declaration
        assert declaration.stress == (declaration.access == "A2")
        assert declaration.tasks == ("causal_lm", "image_classification")
        assert declaration.runner == f"unlearn.attacking.weights:{declaration.name.partition('.')[2]}"
        assert declaration.access == ("A3" if "edited" in declaration.needs else "A2")
    assert get_args(Scheme) == SCHEMES  # spelled out there, since a request is read without a model library
    assert Interpolation().steps == STEPS


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("recovery.quantisation", {}, 3),
        ("recovery.quantisation", {"schemes": ["int4"]}, 1),
        ("recovery.pruning", {}, 3),
        ("recovery.pruning", {"shares": [0.5], "two_of_four": False}, 1),
        ("recovery.noise", {}, 2),
        ("recovery.interpolation", {}, 6),
        ("recovery.interpolation", {"steps": [0.0, 0.5]}, 2),
    ],
)
def test_the_stated_cost_is_what_is_run(name: str, settings: dict[str, Any], expected: int) -> None:
    entry = {"name": name} | attack_settings(name, settings)
    assert passes([entry], Size(100, 50))[0] == pytest.approx(1 + expected)
    assert passes([entry], Size(1000, 1000))[0] == pytest.approx(1 + expected * 0.256)
    original, edited = edited_pair()
    views = StandIn(edited, texts(), original if name.endswith("interpolation") else None)
    run(name, views, **settings)
    assert views.seen == [(i + 1, expected) for i in range(expected)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("recovery.quantisation", {"schemes": ["int5"]}),
        ("recovery.quantisation", {"schemes": []}),
        ("recovery.quantisation", {"group": 1}),
        ("recovery.pruning", {"shares": [1.0]}),
        ("recovery.noise", {"sizes": [0.0]}),
        ("recovery.interpolation", {"steps": [-0.5, 1.0]}),
        ("recovery.interpolation", {"steps": [0.5, 3.0]}),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        attack_settings(name, settings)


# ------------------------------------------------------------------------------------------------- variants, tables


def test_the_scheme_named_first_stands_for_the_attack_whatever_comes_out() -> None:
    held = holding()
    views = StandIn(held.model, texts())
    for schemes in (["int3", "int8"], ["int8", "int3"]):
        result = run("recovery.quantisation", views, schemes=schemes, group=16)
        expected = {}
        for scheme in schemes:
            with quantisation(held.model, scheme, 16 if scheme == "int3" else None):
                expected[scheme] = memorised(held.model, held.records), memorised(held.model, held.controls)
        for i, side in enumerate(("records", "controls")):
            for scheme in schemes:
                found = column(result, f"probability.{scheme}", side)
                assert found == pytest.approx(expected[scheme][i]["probability"].to_numpy(), abs=1e-12)
            assert (column(result, "probability", side) == column(result, f"probability.{schemes[0]}", side)).all()
            assert column(result, "plain", side) == pytest.approx(views.plain(["records", "control"][i])["probability"])
        assert result.headline == result.column == "probability"
        assert result.figures["probability"]["value"] == pytest.approx(column(result, "probability").mean())
        assert result.figures["probability.int8"]["value"] == pytest.approx(column(result, "probability.int8").mean())
        (table,) = result.tables
        assert [row[0] for row in table["rows"]] == [
            "as it is",
            *("int3, groups of 16" if scheme == "int3" else scheme for scheme in schemes),
        ]
        assert table["rows"][1][1] == pytest.approx(column(result, "probability").mean())
        assert table["rows"][1][3] == pytest.approx(column(result, "probability", "controls").mean())
        assert table["rows"][0][2] == 1.0
        assert table["rows"][0][4] == 0.0


def test_pruning_and_noise_name_their_variants() -> None:
    views = StandIn(holding().model, texts())
    found = run("recovery.pruning", views, shares=[0.3, 0.05])
    assert [key for key in found.figures if key.startswith("probability.")] == [
        "probability.smallest_0_3",
        "probability.smallest_0_05",
        "probability.two_of_four",
    ]
    assert (column(found, "probability") == column(found, "probability.smallest_0_3")).all()
    found = run("recovery.noise", views, sizes=[0.1, 1.0])
    assert found.figures["probability.noise_1"]["value"] < found.figures["probability.noise_0_1"]["value"]
    again = run("recovery.noise", views, sizes=[1.0, 0.1])
    assert again.records["probability"] == found.records["probability.noise_1"]  # order changes no draw
    with noise(views.model, 0.1, seed=views.seed):
        expected = memorised(views.model, views.records())["probability"]
    assert column(found, "probability") == pytest.approx(expected.to_numpy(), abs=1e-12)


def test_without_control_and_with_few_of_many() -> None:
    held = holding()
    alone = run("recovery.quantisation", StandIn(held.model, {"records": held.records}), schemes=["int4"])
    assert not alone.control
    assert not alone.controls
    assert alone.tables[0]["columns"] == ["weights", "probability, records", "extracted, records"]
    few = run("recovery.quantisation", StandIn(held.model, texts()), schemes=["int4"], records=3)
    assert np.isfinite(column(few, "probability")).sum() == 3
    assert (np.isfinite(column(few, "probability.int4")) == np.isfinite(column(few, "plain"))).all()
    shown = np.isfinite(column(few, "plain"))
    plain = memorised(held.model, held.records)["probability"].to_numpy()
    assert not shown[:3].all()  # drawn, not the first
    assert column(few, "plain")[shown] == pytest.approx(plain[shown])
    assert few.figures["probability"]["n"] == 3
    assert few.notes == ["3 of 8 (records), drawn by the seed.", "3 of 8 (never seen), drawn by the seed."]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_finite_or_missing(name: str) -> None:
    original, edited = edited_pair()
    result = run(name, StandIn(edited, texts(retain=True), original))
    document = result.document(name, {}, {}, None)
    json.dumps(document, allow_nan=False)
    for side in (result.records, result.controls):
        for values in side.values():
            assert all(v is None or math.isfinite(v) for v in values)
    keys = {*result.figures, *result.control, *result.not_resolvable}
    assert keys <= set(result.titles)
    for table in result.tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


# --------------------------------------------------------------------------------------------- what is left of an edit


def test_what_is_left_of_an_edit_is_only_told_where_there_is_one() -> None:
    original, edited = edited_pair()
    without = run("recovery.quantisation", StandIn(edited, texts()), schemes=["int4", "nf4"])
    assert len(without.tables) == 1
    found = run("recovery.quantisation", StandIn(edited, texts(), original), schemes=["int4", "nf4"])
    _, totals, blocks = found.tables
    assert [row[0] for row in totals["rows"]] == ["int4", "nf4"]
    assert [row[0] for row in blocks["rows"]] == ["0", "1", "2"]
    places = targets(ModelMap.of(edited))
    for row, block in [(totals["rows"][0], None), *((row, int(row[0])) for row in blocks["rows"])]:
        changed, n, overlap, edit = 0, 0, 0.0, 0.0
        for name, place in places.items():
            if block not in (None, place.block):
                continue
            one = diagnostics(original.get_parameter(name), edited.get_parameter(name), "int4", 128, place.in_axis)
            changed, n = changed + (one.changed or 0), n + one.weights
            overlap, edit = overlap + one.overlap, edit + one.edit
        assert row[1:3] == pytest.approx([changed / n, overlap / edit])
    headed = run("recovery.quantisation", StandIn(edited, texts(), original), schemes=["int4"], head=True)
    assert [row[0] for row in headed.tables[2]["rows"]] == ["0", "1", "2", "head"]
    assert headed.figures["probability"]["value"] != found.figures["probability"]["value"]
    same = run("recovery.quantisation", StandIn(original, texts(), copy.deepcopy(original)), schemes=["int4"])
    assert same.notes == ["The edit changed none of the weights that are quantised."]


# -------------------------------------------------------------------------------------------------- power, control


def test_power_and_control_of_quantisation() -> None:
    """An edit below half a bin of the grid: the records come back, never-seen ones do not, and no codes changed."""
    held = holding()
    model = copy.deepcopy(held.model)
    boxes = {}
    with torch.no_grad():
        for name, place in targets(ModelMap.of(model)).items():
            weight = model.get_parameter(name)
            values, codes = quantised(weight, "int4", 16, place.in_axis)
            weight.copy_(values)
            assert codes is not None
            scale = (values.abs().reshape(-1, 16).amax(-1, keepdim=True) / 7).expand(-1, 16).reshape(weight.shape)
            boxes[name] = (0.45 * scale).masked_fill(codes.abs() == 7, 0.0)
    edited = hide(model, held.records, boxes)
    result = run("recovery.quantisation", StandIn(edited, texts(), model), schemes=["int4"], group=16)
    assert result.figures["plain"]["value"] < 0.2
    assert result.figures["probability"]["value"] > 0.9
    assert result.figures["extracted"]["value"] == 1.0
    assert result.control["probability"]["value"] < 0.01
    assert result.tables[1]["rows"][0][1:3] == [0.0, 0.0]
    control = run("recovery.quantisation", StandIn(held.without, texts()), schemes=["int4"], group=16)
    assert control.figures["probability"]["value"] < 0.01


def test_power_and_control_of_interpolation() -> None:
    original, edited = edited_pair()
    result = run("recovery.interpolation", StandIn(edited, texts(retain=True), original))
    held = holding()
    expected = memorised(original, held.records)["probability"].to_numpy()
    assert column(result, "original") == pytest.approx(expected, abs=1e-6)
    assert result.figures["original"]["value"] == pytest.approx(expected.mean(), abs=1e-6)
    assert result.figures["plain"]["value"] < 0.05
    for name in ("probability", "accuracy", "extracted"):
        assert 0 < result.figures[f"returns.{name}"]["value"] < 1
    probability, extracted = result.curves
    assert [series["name"] for series in probability["series"]] == ["records", "never seen", "retain"]
    assert probability["series"][0]["x"] == [-0.5, 0.0, 0.1, 0.2, 0.3, 0.5, 1.0]
    values = dict(zip(probability["series"][0]["x"], probability["series"][0]["y"], strict=True))
    assert values[0.0] == pytest.approx(result.figures["plain"]["value"])
    assert values[0.1] == pytest.approx(result.figures["probability"]["value"])  # the first step above 0
    assert values[1.0] == pytest.approx(expected.mean(), abs=1e-6)
    assert max(probability["series"][1]["y"]) < 0.01
    assert extracted["series"][0]["y"][-1] == 1.0
    assert result.figures["barrier"]["value"] >= 0
    assert result.figures["barrier.retain"]["n"] == 4
    other = run("recovery.interpolation", StandIn(edited, texts(), original), steps=[0.5, 0.1])
    assert other.figures["probability"]["value"] == pytest.approx(values[0.5])  # the first in the order given
    # an edit of a model that never held the records: nothing to come back to
    never = run("recovery.interpolation", StandIn(edited, {"records": held.controls}, original), steps=[0.5])
    assert never.figures["probability"]["value"] < 0.01
    assert "original's own extraction is 0" in never.not_resolvable["returns.extracted"]


@pytest.mark.parametrize("name", NAMES)
def test_images(name: str) -> None:
    original, edited = (tiny.image_classifier("vit", seed=seed) for seed in (0, 1))
    with tiny.seeded(2):
        sets = {
            role: [ImageRecord(f"{role}-{i}", torch.randn(3, tiny.IMAGE, tiny.IMAGE), i % 4) for i in range(4)]
            for role in ("records", "control")
        }
    result = run(name, StandIn(edited, sets, original))
    assert result.titles["probability"].startswith("probability of the label")
    assert np.isfinite(column(result, "probability")).all()
    if name.endswith("interpolation"):
        expected = memorised(original, sets["records"])["probability"]
        assert column(result, "original") == pytest.approx(expected.to_numpy(), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- in a run


def write_suite(path: Path, names: Sequence[str]) -> Path:
    entries = "".join(f"  - {{name: {name}}}\n" for name in names)
    path.write_text(
        f"schema: unlearn.suite/v1\nname: own\ndescription: for tests\nnoise_floor: {{records: 4}}\nattacks:\n{entries}"
    )
    return path


@pytest.fixture(scope="module")
def forgotten(world: World, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    folder = tmp_path_factory.mktemp("weights")
    write_suite(world.folder / "weights-suite.yaml", NAMES)
    request = world.folder / "weights-request.yaml"
    request.write_text(world.request.read_text().replace("suite: quick", "suite: weights-suite.yaml"))
    return api.forget(request, out=folder / "run")


def test_in_a_forget_run(forgotten: api.Run) -> None:
    for stage, expected in (("before", NAMES[:3]), ("after", NAMES), ("reference", NAMES[:3])):
        found = {path.stem for path in (forgotten.path / stage / "attacks").glob("*.json")}
        assert found == set(expected), stage
    after = forgotten.attack("recovery.quantisation", "after")
    assert "What quantisation leaves of the edit" in {table["title"] for table in after["tables"]}
    assert len(forgotten.attack("recovery.quantisation", "before")["tables"]) == 1
    paired = json.loads((forgotten.path / "compare" / "paired.json").read_text())["attacks"]
    assert paired["recovery.interpolation"]["stress"] is None
    for name in NAMES:
        if name != "recovery.interpolation":
            assert paired[name]["stress"]["status"] in ("recovers", "resists", "undecided", "not testable")
        assert paired[name]["arms"]["O"] is not None
        assert paired[name]["residual"] is not None
    # the far end of the path is the checkpoint before the edit, read tensor by tensor from its files
    frame = pd.read_parquet(forgotten.path / "after" / "attacks" / "records.parquet")
    plain = pd.read_parquet(forgotten.path / "before" / "records.parquet")
    ends = frame["recovery.interpolation:original"].to_numpy()
    assert ends == pytest.approx(plain["probability"].to_numpy(), rel=1e-4)


def test_alone_on_a_checkpoint(world: World, tmp_path: Path) -> None:
    run_ = api.attack(
        "recovery.quantisation",
        world.planted,
        records=world.records,
        control=world.control,
        settings={"schemes": ["int8"]},
        out=tmp_path / "run",
    )
    found = run_.attack("recovery.quantisation")
    assert found["figures"]["probability"]["value"] > 0.8
    assert found["control"]["probability"]["value"] < 0.3
    with pytest.raises(UsageError, match="unlearn forget"):
        api.attack("recovery.interpolation", world.planted, records=world.records, out=tmp_path / "other")
