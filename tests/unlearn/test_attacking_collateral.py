"""What else an edit changed, in a run: the looks on the original and the edited copy, and lm_eval by a stand-in."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from probes.collateral.refusals import refuses
from probes.collateral.style import style
from probes.errors import ResourceError, UsageError
from probes.modelmap import ModelMap
from tests import tiny
from tests.conftest import World
from tests.probes.collateral.test_induction import wired
from unlearn import api
from unlearn.attacking import collateral
from unlearn.attacking.result import Result
from unlearn.requests.attacks import catalogue

LOOKS = {
    "collateral.induction": {"sequences": 6, "length": 20},
    "collateral.calibration": {"bins": 4},
    "collateral.generation": {"records": 5, "length": 12},
    "collateral.refusals": {"records": 4, "length": 8, "unsafe": ["Do it.", "Do that."], "phrases": ["a", "e"]},
    "collateral.neighbours": {},
}
EVERYWHERE = [name for name in LOOKS if name != "collateral.neighbours"]


@dataclass(frozen=True)
class Found:
    """Documents of one forget run."""

    run: api.Run

    def document(self, name: str, stage: str = "after") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run.path / stage / "attacks" / f"{name}.json").read_text())
        return found

    def private(self, name: str, stage: str) -> list[dict[str, Any]]:
        text = (self.run.path / "private" / "attacks" / f"{stage}-{name}.jsonl").read_text()
        return [json.loads(row) for row in text.splitlines()]


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("collateral")
    document = {
        "schema": "unlearn.suite/v1",
        "name": "own",
        "description": "for tests",
        "noise_floor": {"records": 2},
        "attacks": [{"name": name} | settings for name, settings in LOOKS.items()],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(document))
    request = yaml.safe_load(world.request.read_text())
    for part, key in (("data", "records"), ("checkpoint", "path"), ("reference", "path"), ("retain", "path")):
        request[part][key] = str(world.folder / request[part][key])
    request["control"]["path"] = str(world.control)
    request["suite"] = str(folder / "suite.yaml")
    (folder / "request.yaml").write_text(yaml.safe_dump(request))
    return Found(api.forget(folder / "request.yaml", out=folder / "run"))


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_look_runs_on_every_model_and_changes_on_the_edited_copy(found: Found, name: str) -> None:
    for stage in ("before", "after", "reference"):
        document = found.document(name, stage)
        assert document["headline"]
        assert document["headline"] in document["figures"] or document["not_resolvable"]
        moved = [key for key in (*document["figures"], *document["not_resolvable"]) if key.startswith("change.")]
        assert bool(moved) == (stage == "after")
        assert set(document["figures"]) | set(document["not_resolvable"]) <= set(document["titles"])
        assert all(figure["value"] is not None for figure in document["figures"].values())


@pytest.mark.parametrize(("name", "column"), [("collateral.induction", "copying"), ("collateral.calibration", "brier")])
def test_the_change_is_that_of_the_same_items(found: Found, name: str, column: str) -> None:
    rows = {stage: [row[column] for row in found.private(name, stage)] for stage in ("before", "after")}
    moved = found.document(name)["figures"][f"change.{column}"]
    assert moved["value"] == pytest.approx(np.mean(rows["after"]) - np.mean(rows["before"]))
    assert moved["ci_low"] <= moved["value"] <= moved["ci_high"]
    if column == "copying":
        for stage, values in rows.items():
            assert found.document(name, stage)["figures"]["copying"]["value"] == pytest.approx(np.mean(values))


def test_the_same_random_sequences_on_every_model(found: Found) -> None:
    """So that the reference, which is another model, differs, and a change is none of the draw."""
    notes = {
        stage: found.document("collateral.induction", stage)["notes"] for stage in ("before", "after", "reference")
    }
    assert notes["before"] == notes["after"] == notes["reference"]
    values = {stage: [r["copying"] for r in found.private("collateral.induction", stage)] for stage in notes}
    assert values["before"] != values["reference"]
    assert all("prefix" in row for row in found.private("collateral.induction", "before"))
    assert "change.prefix" in found.document("collateral.induction")["figures"]


def test_style_of_what_was_written(found: Found) -> None:
    rows = found.private("collateral.generation", "after")
    assert len(rows) == 5
    tokenizer = tiny.tokenizer()
    again = style([tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in rows])
    for row, own in zip(rows, again.itertuples(), strict=True):  # one token a character here
        if not row["ended"] and own.length == 12:
            assert row["repetition"] == pytest.approx(own.repetition)
            assert row["distinct_2"] == pytest.approx(own.distinct_2)
    assert found.document("collateral.generation")["cost"]["generated_tokens"] == 60


def test_refusals_by_the_phrases_given(found: Found) -> None:
    for stage in ("before", "after"):
        rows = found.private("collateral.refusals", stage)
        assert [row["kind"] for row in rows] == ["benign"] * 4 + ["unsafe"] * 2
        assert [row["declined"] for row in rows] == refuses([row["text"] for row in rows], ["a", "e"]).tolist()
        figures = found.document("collateral.refusals", stage)["figures"]
        assert figures["over_refusal"]["value"] == pytest.approx(np.mean([row["declined"] for row in rows[:4]]))
        assert figures["refused_unsafe"]["n"] == 2


def test_neighbours_need_the_edited_copy(found: Found) -> None:
    assert not (found.run.path / "before/attacks/collateral.neighbours.json").exists()
    document = found.document("collateral.neighbours")
    after, before = (pd.read_parquet(found.run.path / stage / "retain.parquet") for stage in ("after", "before"))
    rises = (after["loss"] - before["loss"]).to_numpy()
    figures = document["figures"]
    near = max(1, -(-len(rises) // 4))
    mean = (near * figures["near"]["value"] + (len(rises) - near) * figures["far"]["value"]) / len(rises)
    assert mean == pytest.approx(rises.mean())
    assert figures["difference"]["value"] == pytest.approx(figures["near"]["value"] - figures["far"]["value"])


def look(model: torch.nn.Module, folder: Path, stage: str) -> Result:
    """Induction on a model as one stage of a run; what it leaves is kept for the next."""
    seen: Any = SimpleNamespace(
        model=model,
        model_map=ModelMap.of(model),
        tokenizer=None,
        stage=stage,
        edited=stage == "after",
        seed=0,
        max_length=32,
        settings=SimpleNamespace(batch_tokens=None),
        workspace=SimpleNamespace(run=SimpleNamespace(file=lambda name: folder / name)),
        records=lambda role="records": [],
    )
    result = collateral.induction(seen, {"name": "collateral.induction", "sequences": 40, "length": 14})
    path = folder / "private" / "attacks" / f"{stage}-collateral.induction.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in result.private))
    return result


def test_an_edit_that_breaks_the_induction_head_is_seen_and_none_is_not(tmp_path: Path) -> None:
    model = wired()
    before = look(model, tmp_path, "before")
    assert before.figures["copying"]["value"] < -3
    same = look(model, tmp_path, "after").figures  # the same sequences, so not the least change
    assert same["change.copying"]["value"] == same["change.prefix"]["value"] == 0
    with torch.no_grad():
        model.get_parameter("transformer.h.0.attn.c_proj.weight").zero_()
    broken = look(model, tmp_path, "after").figures
    assert broken["change.copying"]["ci_low"] > 2
    assert broken["change.prefix"]["value"] < -0.5
    assert broken["change.prefix"]["ci_high"] < 0


def test_what_a_look_lacks_is_said() -> None:
    seen: Any = SimpleNamespace(edited=False, tokenizer=None)
    with pytest.raises(UsageError, match="edited copy"):
        collateral.neighbours(seen, {"share": 0.25})
    with pytest.raises(UsageError, match="tokenizer"):
        collateral.refusals(seen, {"phrases": ()})


def test_items_that_cannot_be_compared_give_no_change() -> None:
    for before, after in (([{"x": 1.0}] * 3, [{"x": 1.0}] * 2), ([{"x": None}] * 3, [{"x": 1.0}] * 3)):
        result = Result()
        collateral._change(result, "x", "some figure", before, after, 0)
        assert not result.figures
        assert result.not_resolvable["change.x"]


def test_the_looks_are_no_attacks(found: Found) -> None:
    for name in (*LOOKS, "collateral.lm_eval"):
        assert catalogue()[name].collateral
        assert not catalogue()[name].stress


def test_no_text_outside_the_private_folder(found: Found) -> None:
    texts = {row["text"] for name in LOOKS for row in _rows_of(found, name) if len(row.get("text", "")) > 6}
    assert texts
    for path in found.run.path.rglob("*"):
        if path.is_file() and "private" not in path.parts and path.suffix in (".json", ".jsonl", ".html", ".md"):
            content = path.read_text(errors="ignore")
            assert not any(text in content for text in texts), path.name


def _rows_of(found: Found, name: str) -> list[dict[str, Any]]:
    path = found.run.path / "private" / "attacks" / f"after-{name}.jsonl"
    return found.private(name, "after") if path.exists() else []


# --- lm_eval --------------------------------------------------------------------------------------------------------


class Wrapped:
    """Stands in for HFLM: it puts the model into training mode and out of it, as wrappers may."""

    def __init__(self, pretrained: torch.nn.Module, tokenizer: Any, batch_size: int) -> None:
        pretrained.train()
        self.model = pretrained


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    made: list[dict[str, Any]] = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        made.append(given | {name: os.environ.get(name) for name in collateral.OFFLINE})
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return {
            "results": {
                "arc": {
                    "alias": "arc",
                    "sample_len": 50,
                    "acc,none": 0.5,
                    "acc_stderr,none": 0.1,
                    "acc_norm,none": 0.25,
                },
                "odd": {"alias": "odd", "f1,none": float("nan")},
            },
            "n-samples": {"arc": {"original": 50, "effective": 10}},
        }

    package, inner, models, tasks = (
        ModuleType("lm_eval"),
        ModuleType("lm_eval.models"),
        ModuleType("lm_eval.models.huggingface"),
        ModuleType("lm_eval.tasks"),
    )
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models.HFLM = Wrapped  # type: ignore[attr-defined]
    tasks.TaskManager = lambda: SimpleNamespace(all_tasks=["arc", "odd"])  # type: ignore[attr-defined]
    for module in (package, inner, models, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def views() -> Any:
    return SimpleNamespace(model=tiny.causal_lm("llama"), tokenizer=tiny.tokenizer(), seed=3)


SETTINGS = {"name": "collateral.lm_eval", "tasks": ("arc", "odd"), "limit": 10, "shots": None, "batch": 4}


def test_lm_eval_runs_without_its_caches_and_offline(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request cache is keyed without the model: the edited copy would be given the original's answers."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    seen = views()
    before = {n: p.clone() for n, p in seen.model.named_parameters()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    result = collateral.lm_eval(seen, SETTINGS)
    (call,) = calls
    assert call["use_cache"] is None
    assert call["cache_requests"] is False
    assert all(call[name] == "1" for name in collateral.OFFLINE)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["HF_DATASETS_OFFLINE"] == "0"
    assert call["tasks"] == ["arc", "odd"]
    assert call["limit"] == 10
    assert call["model"].model is seen.model
    assert result.headline == "arc.acc"
    assert result.figures["arc.acc"]["value"] == 0.5
    assert result.figures["arc.acc"]["n"] == 10
    assert set(result.figures) == {"arc.acc", "arc.acc_norm"}
    assert ["arc", "acc", 0.5, 0.1, 10] in result.tables[0]["rows"]
    assert not seen.model.training
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in seen.model.named_parameters())


@pytest.mark.parametrize(
    ("task", "message"), [("ark", "expected tasks of lm_eval by name"), ("/nowhere/arc.yaml", "found nothing at")]
)
def test_a_task_that_lm_eval_does_not_know(calls: list[dict[str, Any]], task: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        collateral.lm_eval(views(), SETTINGS | {"tasks": ("arc", task)})
    assert not calls


TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_the_real_package_with_a_task_of_ones_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Against the same choice made by hand: the option with the larger summed log-probability."""
    pytest.importorskip("lm_eval")
    items = [
        {"question": f"{'abcdefg'[i]} b", "choices": [" c d", " e", " f g a"], "gold": (i * i) % 3} for i in range(7)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "words.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl", cache=tmp_path / "cache"))
    seen = views()
    right = 0
    for item in items:
        sums = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            prompt = seen.tokenizer(item["question"], add_special_tokens=False)["input_ids"]
            ids = seen.tokenizer(f"{item['question']}{choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                table = seen.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(table[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        right += int(np.argmax(sums)) == item["gold"]
    result = collateral.lm_eval(seen, SETTINGS | {"tasks": (str(tmp_path / "words.yaml"),), "limit": None})
    assert set(result.figures) == {"words.acc"}
    assert result.figures["words.acc"]["value"] == pytest.approx(right / 7)
    assert result.figures["words.acc"]["n"] == 7
    assert "".join(capfd.readouterr()) == ""


def test_lm_eval_that_fails_leaves_everything_as_it_was(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**given: Any) -> None:
        raise RuntimeError("Zqcanary")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", fails)
    seen, state = views(), torch.get_rng_state()
    with pytest.raises(ResourceError, match="RuntimeError") as error:
        collateral.lm_eval(seen, SETTINGS)
    assert "Zqcanary" not in str(error.value)
    assert not seen.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_lm_eval_not_installed_or_without_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match="pip install"):
        collateral.lm_eval(views(), SETTINGS)
    with pytest.raises(UsageError, match="tasks"):
        collateral.lm_eval(views(), SETTINGS | {"tasks": ()})
