"""Soft prompts, nearby inputs and suffixes as attacks of a run: columns, figures, charts, budgets, what comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

from attacks.elicitation import embedding as nearby
from attacks.elicitation import soft_prompt as prompts
from probes.errors import UsageError
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests import tiny
from tests.attacks.elicitation.hidden import hidden, left_as_found
from tests.attacks.elicitation.test_images import world as picture_world
from tests.conftest import World
from unlearn import api
from unlearn.attacking import elicitation
from unlearn.attacking.result import Result
from unlearn.attacking.stress import rows_of
from unlearn.attacking.views import Views
from unlearn.requests.attacks import attack_settings, catalogue, passes
from unlearn.requests.attacks.declaration import Size
from unlearn.requests.attacks.elicitation import DECLARATIONS

RUNNERS: dict[str, Callable[[Any, dict[str, Any]], Result]] = {
    "elicitation.soft_prompt": elicitation.soft_prompt,
    "elicitation.embedding": elicitation.embedding,
    "elicitation.images": elicitation.images,
    "elicitation.suffix": elicitation.suffix,
}
SMALL: dict[str, dict[str, Any]] = {
    "elicitation.soft_prompt": {"steps": 60, "context": 12},
    "elicitation.embedding": {"marks": [1, 2, 5, 10, 20, 40]},
    "elicitation.images": {"norm": "l2", "step": 0.02, "fpr": 0.1},
    "elicitation.suffix": {"length": 1, "steps": 2, "batch": 6, "candidates": 127, "top_k": 128},
}


class StandIn:
    """What an attack's runner reads of `Views`, on a live model."""

    halves, kept = Views.halves, Views.kept

    def __init__(self, model: nn.Module, sets: dict[str, list[Any]], tokenizer: Any = None) -> None:
        self.model, self.sets, self.tokenizer, self.seed = model, sets, tokenizer, 5
        self.task = "causal_lm" if isinstance(sets["records"][0], TokenRecord) else "image_classification"
        self.model_map = ModelMap.of(model) if self.task == "causal_lm" else None
        self.settings = SimpleNamespace(batch_tokens=None)
        self.seen: list[tuple[int, int]] = []

    def has(self, role: str) -> bool:
        return bool(self.sets.get(role))

    def records(self, role: str = "records") -> list[Any]:
        return self.sets.get(role, [])

    def clusters(self, role: str = "records") -> list[str | None]:
        return [record.group for record in self.records(role)]

    def plain(self, role: str = "records") -> pd.DataFrame:
        return memorised(self.model, self.records(role))

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def run(name: str, views: StandIn, **settings: Any) -> Result:
    checked = attack_settings(name, SMALL[name] | settings)
    with left_as_found(views.model):
        return RUNNERS[name](views, checked)


def texts(
    records: Sequence[TokenRecord] | None = None, controls: Sequence[TokenRecord] | None = None
) -> dict[str, Any]:
    world = hidden()
    return {"records": list(records or world.a + world.b), "control": list(controls or world.controls)}


def column(result: Result, name: str, side: str = "records") -> np.ndarray:
    return np.array(getattr(result, side)[name], dtype=np.float64)


def whole(result: Result, views: StandIn) -> None:
    """What holds of every result: columns as long as their set, finite figures with titles, no lists of vectors."""
    for side, role in (("records", "records"), ("controls", "control")):
        for name, values in getattr(result, side).items():
            assert len(values) == len(views.records(role)), name
            assert all(value is None or math.isfinite(value) for value in values), name
    for part in (result.figures, result.control, result.not_resolvable):
        assert set(part) <= set(result.titles)
    for figure in (*result.figures.values(), *result.control.values()):
        assert math.isfinite(figure["value"])
    json.dumps([result.figures, result.control, result.curves, result.tables, result.notes], allow_nan=False)
    assert views.seen
    for curve in result.curves:
        assert all(len(one["x"]) == len(one["y"]) > 0 for one in curve["series"])
    for table in result.tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


# ---------------------------------------------------------------------------------------------------- declarations


def test_declarations() -> None:
    assert {d.name for d in DECLARATIONS} == set(RUNNERS)
    for declaration in DECLARATIONS:
        assert catalogue()[declaration.name] is declaration
        assert declaration.stress
        assert declaration.access == "A2"
        assert declaration.needs == ("records", "control")
        assert declaration.runner == f"unlearn.attacking.elicitation:{declaration.name.partition('.')[2]}"
        images = declaration.name == "elicitation.images"
        assert declaration.tasks == (("image_classification",) if images else ("causal_lm",))
        assert declaration.goal.endswith("?")


def test_costs_are_those_of_the_rows_that_are_run() -> None:
    size = Size(records=200, control=100)

    def cost(name: str, **settings: Any) -> float:
        return passes([{"name": name} | attack_settings(name, settings)], size)[1]

    # two prompts of 60 steps of 8 rows, forward and backward; then four sets are scored
    assert cost("elicitation.soft_prompt") == pytest.approx(1 + (2 * 2 * 60 * 8 + 2 * 64 + 2 * 50) / 300)
    # 32 records and twice 32 controls, 10 steps forward and backward and one forward
    assert cost("elicitation.embedding") == pytest.approx(1 + 96 * 21 / 300)
    assert cost("elicitation.embedding", restarts=3) == pytest.approx(1 + 3 * 96 * 21 / 300)
    assert cost("elicitation.images") == pytest.approx(1 + (64 + 2 * 50) * 41 / 300)
    assert cost("elicitation.suffix") > cost("elicitation.suffix", steps=50) > 20


def test_settings_are_checked() -> None:
    for name, wrong in (
        ("elicitation.soft_prompt", {"length": 0}),
        ("elicitation.soft_prompt", {"learning_rate": 0.0}),
        ("elicitation.embedding", {"marks": [5, 2]}),
        ("elicitation.embedding", {"radius": 0.0}),
        ("elicitation.images", {"norm": "l1"}),
        ("elicitation.suffix", {"candidates": 0}),
    ):
        with pytest.raises(UsageError):
            attack_settings(name, wrong)


# ----------------------------------------------------------------------------------------------------- soft prompts


def test_a_soft_prompt_is_scored_on_the_other_half() -> None:
    back = {}
    for name, model in (("hidden", hidden().hidden), ("cleared", hidden().cleared)):
        views = StandIn(model, texts())
        result = run("elicitation.soft_prompt", views)
        whole(result, views)
        assert (result.headline, result.column) == ("probability", "probability")
        for role, side in (("records", "records"), ("control", "controls")):
            b = views.halves(role)[1]
            scored = np.flatnonzero(np.isfinite(column(result, "probability", side)))
            assert scored.tolist() == b.tolist()
            plain = views.plain(role)["probability"].to_numpy()
            np.testing.assert_allclose(column(result, "plain", side)[b], plain[b])
            assert result.records["hit"][int(views.halves("records")[0][0])] is None
        back[name] = [result.figures[key]["value"] for key in ("probability", "plain")]
        back[name].append(result.control["probability"]["value"])
        rows = {(row[0], row[1]): row[2:] for row in result.tables[0]["rows"]}
        assert rows["records, half A", "records, half B"][2] == pytest.approx(back[name][0])
        assert rows["records, half A", "never seen, half B"][2] == pytest.approx(back[name][2])
        assert rows["never seen, half A", "never seen, half B"][2] < 0.05
        assert rows["records, half A", "records, half A"][2] >= back[name][0]
    assert back["hidden"][0] > back["hidden"][1] + 0.3
    assert max(back["hidden"][2], back["cleared"][0], back["cleared"][2]) < 0.05


def test_training_never_sees_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [replace(record, group=f"g{i // 3}") for i, record in enumerate(hidden().a + hidden().b)]
    views = StandIn(hidden().hidden, texts(groups))
    trained, whole_train = [], prompts.train

    def listen(model: nn.Module, records: Sequence[TokenRecord], **options: Any) -> prompts.SoftPrompt:
        trained.append({record.record_id for record in records})
        return whole_train(model, records, **options)

    monkeypatch.setattr(prompts, "train", listen)
    result = run("elicitation.soft_prompt", views, steps=1)
    scored = {r.record_id: r.group for r, v in zip(groups, result.records["probability"], strict=True) if v is not None}
    learned = {record.record_id: record.group for record in groups if record.record_id in trained[0]}
    assert len(trained) == 2  # on the records, and on never-seen ones
    assert not set(scored) & set(learned)
    assert not set(scored.values()) & set(learned.values())  # clusters stay whole


def test_rows_are_drawn_by_the_seed_and_bounded() -> None:
    views = StandIn(hidden().hidden, texts())
    result = run("elicitation.soft_prompt", views, steps=1, scored=5)
    for role, side in (("records", "records"), ("control", "controls")):
        expected = rows_of(views, role, 5, views.halves(role)[1])  # type: ignore[arg-type]
        assert np.flatnonzero(np.isfinite(column(result, "probability", side))).tolist() == expected.tolist()
        assert len(expected) == 5
    again = run("elicitation.soft_prompt", StandIn(hidden().hidden, texts()), steps=1, scored=5)
    assert again == result


def test_records_too_long_for_the_model_are_left_out_and_counted() -> None:
    model = tiny.causal_lm("gpt2", vocab=128, n_positions=50)
    long = replace(hidden().a[0], ids=hidden().a[0].ids + hidden().a[1].ids[:12])
    views = StandIn(model, texts([long, *hidden().a[1:], *hidden().b]))
    result = run("elicitation.soft_prompt", views, steps=1)
    assert result.records["probability"][0] is None
    assert any(note.startswith("1 records are too long") for note in result.notes)
    with pytest.raises(UsageError, match="at most 10 tokens"):
        run("elicitation.soft_prompt", views, context=35)


@pytest.mark.parametrize("name", ["elicitation.soft_prompt", "elicitation.suffix"])
def test_one_cluster_has_no_halves(name: str) -> None:
    one = [replace(record, group="same") for record in hidden().a]
    with pytest.raises(UsageError, match="other clusters"):
        run(name, StandIn(hidden().hidden, texts(one)))


# ---------------------------------------------------------------------------------------------------- nearby inputs


def test_moved_embeddings_are_read_at_the_calibrated_budget() -> None:
    back = {}
    for name, model in (("hidden", hidden().hidden), ("cleared", hidden().cleared)):
        views = StandIn(model, texts())
        result = run("elicitation.embedding", views)
        whole(result, views)
        steps = int(result.figures["budget"]["value"])
        assert steps in (1, 2, 5, 10, 20)  # not the last one, so that reading the end of the search would show
        at = nearby.perturb(model, views.records(), steps=40, seed=5).at(steps)
        np.testing.assert_allclose(column(result, "probability"), at["probability"], rtol=1e-4)
        assert result.records["hit"] == at["extracted"].tolist()
        never = views.halves("control")[1]
        scored = np.flatnonzero(np.isfinite(column(result, "probability", "controls")))
        assert scored.tolist() == never.tolist()  # those that calibrated are not compared
        by_name = {one["name"]: one for one in result.curves[0]["series"]}
        assert set(by_name) == {"records", "never-seen records", "never-seen records, for the budget"}
        assert by_name["records"]["x"] == list(range(41))
        assert by_name["records"]["y"][steps] == pytest.approx(result.figures["success"]["value"])
        assert by_name["never-seen records"]["y"][steps] == pytest.approx(result.control["success"]["value"])
        assert by_name["never-seen records, for the budget"]["y"][steps] <= 0.05
        assert f"{steps} step" in result.titles["probability"]
        back[name] = (result.figures["success"]["value"], result.control["success"]["value"])
        assert result.figures["probability"]["value"] > result.figures["plain"]["value"]
    assert back["hidden"][0] >= 0.9
    assert max(back["hidden"][1], *back["cleared"]) <= 0.15


def test_no_budget_is_no_figure() -> None:
    views = StandIn(hidden().memorised, {"records": hidden().a, "control": hidden().b})  # a control set that was seen
    result = run("elicitation.embedding", views, marks=[1, 2])
    whole(result, views)
    assert (result.headline, result.column) == ("probability", None)
    assert result.not_resolvable == {"probability": "every never-seen record succeeds without a step"}
    assert result.curves
    document = result.document("elicitation.embedding", {}, {}, None)
    assert document["headline"] == "probability"


def test_an_opening_token_does_not_move_and_a_prompt_of_nothing_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(records: Sequence[TokenRecord]) -> list[TokenRecord]:
        return [replace(r, ids=(tiny.BOS, *r.ids), n_prompt=r.n_prompt + 1) for r in records]

    records = opened(hidden().a)
    records[0] = replace(records[0], n_prompt=1)
    views = StandIn(hidden().hidden, texts(records, opened(hidden().controls)), SimpleNamespace(bos_token_id=tiny.BOS))
    kept, search = [], nearby.perturb

    def listen(*arguments: Any, **options: Any) -> Any:
        kept.append(options["keep"])
        return search(*arguments, **options)

    monkeypatch.setattr(nearby, "perturb", listen)
    result = run("elicitation.embedding", views, marks=[1])
    assert kept == [1, 1, 1]
    assert result.records["probability"][0] is None
    assert all(value is not None for value in result.records["probability"][1:])


def test_moved_pixels_are_read_at_the_calibrated_budget() -> None:
    own = picture_world()
    gain = {}
    for name, model in (("hidden", own.hidden), ("cleared", own.cleared)):
        views = StandIn(model, {"records": own.planted, "control": own.controls})
        result = run("elicitation.images", views)
        whole(result, views)
        values = result.figures
        gain[name] = values["probability"]["value"] - values["plain"]["value"]
        assert result.titles["extracted"].startswith("predicted as labelled")
        assert result.control["probability"]["n"] == 40
    assert gain["hidden"] > 0.25
    assert gain["cleared"] < 0.1


@pytest.mark.parametrize("name", ["elicitation.embedding", "elicitation.images"])
def test_one_never_seen_record_cannot_calibrate_and_be_compared(name: str) -> None:
    own = picture_world()
    sets = texts(controls=hidden().controls[:1])
    if name == "elicitation.images":
        sets = {"records": own.planted, "control": own.controls[:1]}
    with pytest.raises(UsageError, match="two clusters or more"):
        run(name, StandIn(own.hidden if name == "elicitation.images" else hidden().hidden, sets))


# --------------------------------------------------------------------------------------------------------- suffixes


def test_a_suffix_is_scored_on_the_other_half() -> None:
    back = {}
    for name, model in (("hidden", hidden().hidden), ("cleared", hidden().cleared)):
        views = StandIn(model, texts())
        result = run("elicitation.suffix", views, steps=1)
        whole(result, views)
        scored = np.flatnonzero(np.isfinite(column(result, "probability")))
        assert scored.tolist() == views.halves("records")[1].tolist()
        back[name] = (result.figures["probability"]["value"], result.control["probability"]["value"])
        assert set(result.private[0]) == {"suffix_ids"}
        (row,) = result.tables[0]["rows"]
        assert row[0] == 1
        assert row[2] < row[1]
    assert back["hidden"][0] > 0.3
    assert max(back["hidden"][1], *back["cleared"]) < 0.05


def test_a_suffix_can_be_typed_where_there_is_a_tokenizer() -> None:
    tokenizer = tiny.tokenizer(vocab=128)
    views = StandIn(tiny.causal_lm("llama", vocab=128), texts(), tokenizer)
    found = run("elicitation.suffix", views, length=3, candidates=8).private[0]["suffix_ids"]
    assert tokenizer(tokenizer.decode(found), add_special_tokens=False)["input_ids"] == found
    assert len(found) == 3


# --------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("elicitation.soft_prompt", {"steps": 3, "context": 4}),
        ("elicitation.embedding", {"marks": [1, 2]}),
        ("elicitation.suffix", {"length": 2, "steps": 2, "candidates": 4}),
    ],
)
def test_alone_on_a_checkpoint(name: str, settings: dict[str, Any], world: World, tmp_path: Path) -> None:
    found = api.attack(
        name, world.planted, records=world.records, control=world.control, settings=settings, out=tmp_path / "run"
    )
    document, frame = found.attack(name), pd.read_parquet(found.path / "before" / "attacks" / "records.parquet")
    assert document["headline"] == "probability"
    if "probability" in document["figures"]:
        values = frame[f"{name}:probability"].astype(float)
        assert values.mean() == pytest.approx(document["figures"]["probability"]["value"])
    assert document["cost"]["passes"] > 1
    text = json.dumps(document)
    assert not any(json.loads(line)["completion"] in text for line in world.records.read_text().splitlines())
