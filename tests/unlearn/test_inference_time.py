"""Edits that act at inference time: what runs on the copy, what is judged without running, and what is said.

The editors here are stand-ins: they hand in another model as the copy and declare that its files hold the original's
weights, so that what the copy answers is known (`tests.hidden`), and every statement about the files has to come from
the declaration alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from probes.errors import UsageError
from tests import hidden, tiny
from tests.unlearn.test_criteria import measured, table
from tests.unlearn.test_stress import arms
from unlearn import attack, audit, edit, forget
from unlearn.api import Run
from unlearn.checkpoints.checkpoint import write_edited
from unlearn.editing import INFERENCE_TIME, UNCHANGED
from unlearn.editors import base
from unlearn.editors.base import EditContext, EditResult
from unlearn.editors.given import GivenEditor
from unlearn.evidence.criteria import Evidence, claim_level, evaluate
from unlearn.evidence.stress import Judged, judge, summarise
from unlearn.pipeline import INFERENCE_TIME as LIMIT
from unlearn.pipeline import INFERENCE_TIME_AUDIT
from unlearn.requests.presets import Criterion
from unlearn.runs.verify import passed, verify
from unlearn.summary import plan_text, result_text, summary, summary_data

SUITE = """\
schema: unlearn.suite/v1
name: inference
description: attacks of every access, for a tiny model
confirm: false
noise_floor: {records: 4}
attacks:
  - {name: verbatim.greedy}
  - {name: recollection.probability}
  - {name: membership.gradient_norm}
  - {name: collateral.induction}
reaudit:
  - {name: regurgitation.spelling}
  - {name: recovery.quantisation, schemes: [int4], group: 32}
  - {name: recovery.interpolation}
  - {name: edit_difference.readout}
"""
REQUEST = """\
schema: unlearn.request/v1
data: {records: forget.jsonl}
checkpoint: {path: planted, trained_on_records: known}
REFERENCE
control: {path: control.jsonl}
retain: {path: retain.jsonl}
method: {name: given, overrides: {path: EDIT}}
suite: suite.yaml
criteria:
  - {id: C1, metric: extraction.greedy, aggregate: rate, test: upper95, max: 0.15}
  - {id: C4, metric: residual, attack: all, test: upper95, max: 0.10}
  - {id: C5, metric: residual, attack: regurgitation.spelling, test: upper95, max: 0.10, required: false}
  - {id: C6, metric: residual, attack: recovery.quantisation, test: upper95, max: 0.10, required: false}
"""
EQUIVALENT = "  - {id: C7, metric: probability, aggregate: mean, test: equivalence, against: reference, margin: 0.10}\n"
REASON = "an inference-time method: the folder holds the original's weights; whoever has them has arm O"
HERE = "tests.unlearn.test_inference_time"
WEIGHTS = {"membership.gradient_norm", "collateral.induction", "recovery.quantisation", "recovery.interpolation"}
WEIGHTS |= {"edit_difference.readout"}


class Masked(GivenEditor):
    """Another model as the copy, declared to answer so while its files hold the original's weights."""

    inference_time: ClassVar[bool] = True


class Beside(GivenEditor):
    """A plain copy with a note that elements were added beside its weights."""

    inference_time: ClassVar[bool] = True

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Change nothing."""
        deltas = write_edited(context.source, out, lambda name, weight: None)
        return EditResult(deltas=deltas, parameters={}, statistics={"added_elements": 48})


def read(run: Run, name: str) -> Any:
    return json.loads((run.path / name).read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, record files and the suite of one seed."""
    folder, models = tmp_path_factory.mktemp("inference"), hidden.hidden(0)
    for name in ("planted", "retrained"):
        tiny.save(getattr(models, name), models.tokenizer, folder / name)
    for name in ("forget", "retain", "control"):
        rows = models.lines(getattr(models, name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.yaml").write_text(SUITE)
    return folder


def run_of(world: Path, edited: str, editor: str | None, *, reference: bool = False) -> Run:
    """`forget` with one of the models handed in as the edit, by the stand-in or by the editor itself."""
    text = REQUEST.replace("EDIT", edited)
    text = text.replace("REFERENCE", "reference: {kind: retrained_without, path: retrained}" if reference else "")
    name = f"{edited}-{editor}-{reference}"
    (world / f"{name}.yaml").write_text(text + (EQUIVALENT if reference else ""))
    with pytest.MonkeyPatch.context() as patch:
        if editor is not None:
            patch.setitem(base.EDITORS, "given", f"{HERE}:{editor}")
        return forget(world / f"{name}.yaml", out=world / "runs" / name)


@pytest.fixture(scope="module")
def masked(world: Path) -> Run:
    """The retrained model, which resists every attack, as a copy that answers so at inference time."""
    return run_of(world, "retrained", "Masked", reference=True)


@pytest.fixture(scope="module")
def given(world: Path) -> Run:
    """The same model as an ordinary edit."""
    return run_of(world, "retrained", None, reference=True)


@pytest.fixture(scope="module")
def beside(world: Path) -> Run:
    """A plain copy as an edit at inference time."""
    return run_of(world, "planted", "Beside")


# -- what runs --------------------------------------------------------------------------------------------------------


def test_attacks_on_weights_do_not_run_on_the_copy(masked: Run, given: Run) -> None:
    rows = {row["name"]: row for row in read(masked, "after/metrics.json")["attacks"]}
    assert {name for name, row in rows.items() if row["reason"] == REASON} == WEIGHTS
    assert {name for name, row in rows.items() if row["status"] == "run"} == set(rows) - WEIGHTS
    assert not {path.stem for path in (masked.path / "after/attacks").glob("*.json")} & WEIGHTS
    ordinary = {row["name"]: row["status"] for row in read(given, "after/metrics.json")["attacks"]}
    assert {name for name, status in ordinary.items() if status == "run"} >= WEIGHTS


def test_they_run_on_the_original_whose_weights_the_copy_holds(masked: Run) -> None:
    before = {row["name"]: row["status"] for row in read(masked, "before/metrics.json")["attacks"]}
    assert before["recovery.quantisation"] == before["membership.gradient_norm"] == "run"
    found = read(masked, "compare/paired.json")["attacks"]["recovery.quantisation"]
    assert found["arms"]["O"]["value"] > 0.9
    assert found["arms"]["U"] is None
    assert found["residual"] is None
    assert found["stress"] is None


def test_attacks_through_the_program_are_judged_as_on_any_copy(masked: Run, given: Run) -> None:
    ours, theirs = (read(run, "compare/paired.json")["attacks"]["regurgitation.spelling"] for run in (masked, given))
    assert ours["arms"] == theirs["arms"]
    assert ours["residual"] == theirs["residual"]
    assert ours["stress"]["status"] == "resists"


# -- what is judged ---------------------------------------------------------------------------------------------------


def test_a_copy_that_resists_all_that_ran_does_not_meet_the_residual_criterion(masked: Run, given: Run) -> None:
    rows = {row["id"]: row for row in masked.criteria}
    assert rows["C1"]["status"] == "met"
    assert rows["C4"]["status"] == "not met"
    assert rows["C4"]["observed"] is None  # a statement, and no figure
    assert "by construction" in rows["C4"]["reason"]
    assert rows["C5"]["status"] == "met"  # one attack by name is judged by what it found
    assert rows["C6"]["status"] == "inconclusive"  # as for any attack that did not run
    assert masked.verdict == "criteria not met"
    ordinary = {row["id"]: row["status"] for row in given.criteria}
    assert ordinary["C4"] != "not met"
    assert ordinary["C6"] == "met"


def test_the_claim_ends_at_e1_whatever_the_equivalence_tests_say(masked: Run, given: Run) -> None:
    assert {row["status"] for row in masked.criteria if row["id"] == "C7"} == {"met"}
    assert masked.claim_level == "E1"
    assert given.claim_level == "E2"


def test_the_finding_is_hidden_by_construction(masked: Run, given: Run) -> None:
    found = read(masked, "compare/paired.json")["stress"]
    assert found["finding"] == "hidden"
    assert found["recovering"] == []
    assert "by construction and not by measurement" in found["statement"]
    assert set(found["not_run"]) == {"recovery.quantisation"}
    assert read(given, "compare/paired.json")["stress"]["finding"] == "not hidden"


def evidence(*, gap: float = 0.9, emitted: int = 0, control: bool = True, **more: Any) -> Evidence:
    """An edit at inference time with one attack that resists; `gap`: the records above never-seen ones before."""
    sets = {"records": table(40, emitted, 0.05)} | ({"control": table(40)} if control else {})
    before = {"records": table(40, 40, 0.05 + gap)} | ({"control": table(40, probability=0.05)} if control else {})
    judged = judge(arms(u=0.1), None, None, family=1, seed=0)
    assert judged.status == "resists"
    attacks = {
        "regurgitation.spelling": {
            "stress": judged.as_dict(0.95),
            "residual": {"value": 0.0, "unit": "ratio", "n": 40, "ci_low": -0.1, "ci_high": 0.1}
            | {"ci_level": 0.95, "direction": "lower"},
        }
    }
    stress = summarise({"regurgitation.spelling": judged}, ["recovery.quantisation"], inference_time=True)
    found = {"attacks": attacks, "stress": stress, "inference_time": True} | more
    return Evidence("causal_lm", measured("sha256:1", **sets), measured("sha256:0", **before), None, 0, **found)


def residual(found: Evidence, **fields: Any) -> tuple[str, str]:
    criterion = {"id": "C4", "metric": "residual", "attack": "all", "test": "upper95", "max": 0.1} | fields
    row = evaluate(Criterion(**criterion), found)
    return row["status"], row["reason"]


def test_the_residual_criterion_on_every_ground() -> None:
    assert residual(evidence())[0] == "not met"
    assert residual(evidence(inference_time=False))[0] == "met"  # what the attacks that ran would have made of it
    assert residual(evidence(), attack="regurgitation.spelling")[0] == "met"
    assert residual(evidence(), attack="recovery.quantisation") == ("inconclusive", "this attack did not run")
    status, reason = residual(evidence(gap=0.1))
    assert status == "inconclusive"
    assert "0.1" in reason
    assert "less than 0.2" in reason
    status, reason = residual(evidence(control=False))
    assert status == "inconclusive"
    assert "no control set" in reason
    assert residual(evidence(), max=1.0)[0] == "met"  # 1 by construction is at most 1


def test_a_criterion_is_not_met_where_no_attack_ran_at_all() -> None:
    nothing = summarise({}, ["recovery.quantisation"], inference_time=True)
    assert nothing["finding"] == "hidden"
    assert "through the copy's own program" not in nothing["statement"]
    assert residual(evidence(attacks={}, stress=nothing))[0] == "not met"


def test_what_the_attacks_that_ran_say_stays_in_the_statement() -> None:
    one = Judged("recovers", "a reason", 0.4, 0.6)
    found = summarise({"regurgitation.spelling": one}, [], inference_time=True)
    assert found["recovering"] == ["regurgitation.spelling"]
    assert "through the copy's own program: under 1 of 1 attacks more" in found["statement"]
    assert summarise({"a": one}, []) == found | {"statement": summarise({"a": one}, [])["statement"]} | {
        "attacks": ["a"],
        "recovering": ["a"],
    }


def test_a_copy_that_still_emits_a_record_claims_nothing_more() -> None:
    assert claim_level([], evidence(emitted=1)) == "E0"
    assert claim_level([], evidence()) == "E1"
    met = [{"test": "equivalence", "against": "reference", "status": "met"}]
    assert claim_level(met, evidence()) == "E1"
    assert claim_level(met, evidence(inference_time=False, stress=None)) == "E2"


# -- what is said -----------------------------------------------------------------------------------------------------


def test_the_plan_says_so_and_never_that_the_copy_is_the_original(beside: Run, given: Run) -> None:
    plan = read(beside, "edit/plan.json")
    assert plan["method"]["inference_time"] is True
    assert plan["warnings"] == [INFERENCE_TIME]
    assert UNCHANGED not in (beside.path / "report/report.md").read_text()
    plan = read(given, "edit/plan.json")
    assert plan["method"]["inference_time"] is False
    assert INFERENCE_TIME not in plan["warnings"]


def test_the_difference_counts_what_was_added(beside: Run) -> None:
    delta = read(beside, "edit/delta.json")
    model = beside.metrics("before")
    assert model["task"] == "causal_lm"
    assert delta["tensors"] == []
    assert delta["changed_elements"] == 0
    own = read(beside, "inputs/checkpoint.json")["parameters"]
    assert delta["total_elements"] == own + 48


def test_limits_reports_and_summary_say_so(masked: Run, given: Run) -> None:
    limits = read(masked, "compare/criteria.json")["limits"]
    assert limits[0] == LIMIT
    assert LIMIT not in read(given, "compare/criteria.json")["limits"]
    text = summary(masked)
    assert "inference time: the files of the copy hold the original's weights" in text
    part = text.split("attack on the weights")[1].split("forgotten or hidden?")[0]
    assert "recovery.quantisation" in part
    assert "recovery.quantisation" not in text.split("attack on the weights")[0].split("attack on the edit")[0]
    assert max(map(len, part.splitlines())) <= 80
    assert summary_data(masked)["inference_time"] is True
    assert "inference time" not in summary(given)
    assert summary_data(given)["inference_time"] is False
    report = read(masked, "report/report.json")
    assert report["method"]["inference_time"] is True
    assert report["robustness"]["finding"] == "hidden"
    assert LIMIT in report["limits"]
    for name in ("report.html", "report.md"):
        page = (masked.path / "report" / name).read_text()
        assert "The edit acts at inference time" in page
        assert "The edit acts at inference time" not in (given.path / "report" / name).read_text()


def test_the_run_verifies_and_other_editions_render(masked: Run) -> None:
    assert passed(verify(masked.path))
    for audience in ("regulator", "subject"):
        assert "still contain the original model" in masked.report("md", audience=audience).read_text()


def test_an_edit_alone_says_so(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.EDITORS, "given", f"{HERE}:Beside")
    run = edit("given", world / "planted", overrides={"path": str(world / "planted")}, out=tmp_path / "run")
    text = result_text(run)
    assert "given: no weight changed; the method acts at inference time" in text
    assert " ".join(INFERENCE_TIME.split()[:6]) in " ".join(text.split())


def test_a_plan_says_that_the_weights_stay() -> None:
    planned = {"method": "m", "records": {"records": 3}, "tensors": 0, "parameters": 0, "of_parameters": 9}
    planned |= {"passes": {"forward": 1}, "disk_bytes": 1, "drafted": [], "earlier_gone": 0, "carried_out": None}
    assert "the original's stay in the copy's files" in plan_text(planned | {"inference_time": True})
    assert "the original's stay" not in plan_text(planned | {"inference_time": False})


# -- checkpoints that say it of themselves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked(world: Path) -> Path:
    """A checkpoint whose own configuration says that it acts at inference time."""
    folder = world / "marked"
    folder.mkdir()
    for path in (world / "planted").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"inference_time": True}))
    return folder


def test_an_audit_of_such_a_checkpoint_does_not_attack_its_weights(world: Path, marked: Path, tmp_path: Path) -> None:
    run = audit(
        marked, world / "forget.jsonl", control=world / "control.jsonl", suite=world / "suite.yaml",
        out=tmp_path / "run",
    )  # fmt: skip
    rows = {row["name"]: row for row in read(run, "before/metrics.json")["attacks"]}
    for name in ("membership.gradient_norm", "collateral.induction"):
        assert rows[name]["status"] == "not_run"
        assert rows[name]["reason"].startswith("an inference-time method: the folder holds another model's weights")
    assert rows["verbatim.greedy"]["status"] == "run"
    assert read(run, "compare/criteria.json")["limits"][0] == INFERENCE_TIME_AUDIT
    assert run.claim_level is None


def test_an_attack_alone_on_its_weights_is_refused(world: Path, marked: Path, tmp_path: Path) -> None:
    sets = {"records": world / "forget.jsonl", "control": world / "control.jsonl"}
    with pytest.raises(UsageError, match="an inference-time method"):
        attack("recovery.quantisation", marked, **sets, out=tmp_path / "run")
