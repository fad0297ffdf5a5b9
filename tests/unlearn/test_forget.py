"""`forget` end to end on a checkpoint with a known truth, and killed at every durable write."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.errors import IntegrityError, UsageError
from probes.records import ImageRecord
from tests.conftest import World
from unlearn import audit, forget
from unlearn.api import Run, plan
from unlearn.disk import file_sha256
from unlearn.runs.job import Options
from unlearn.runs.verify import passed, verify
from unlearn.terminal import Display
from unlearn.workspace import Workspace

VOLATILE = {"run.json", "events.jsonl", "private/lock"}


def files(folder: Path) -> dict[str, str]:
    return {
        name: file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in VOLATILE
    }


@pytest.fixture(scope="module")
def forgotten(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return forget(world.request, out=tmp_path_factory.mktemp("forget") / "run")


def test_every_arm_is_measured(forgotten: Run) -> None:
    arms = json.loads((forgotten.path / "compare/paired.json").read_text())["arms"]
    greedy = arms["extraction.greedy"]
    assert greedy["O"]["value"] == 1.0
    assert greedy["N"]["value"] == 0.0
    assert greedy["R"]["value"] == 0.0
    assert greedy["U"]["value"] < 1.0  # the edit did something
    assert arms["probability"]["residual"]["status"] == "ok"
    assert forgotten.verdict in ("criteria met", "criteria not met", "inconclusive")
    assert forgotten.claim_level in ("E0", "E1")


def test_the_copy_is_a_checkpoint_and_the_input_is_untouched(forgotten: Run, world: World, tmp_path: Path) -> None:
    assert forgotten.checkpoint is not None
    again = audit(forgotten.checkpoint, world.records, control=world.control, suite="quick", out=tmp_path / "run")
    assert again.table()["loss"].equals(forgotten.table("after")["loss"])
    assert {p.name for p in forgotten.checkpoint.iterdir()} == {p.name for p in world.planted.iterdir()}
    for path in world.planted.iterdir():
        if path.suffix != ".safetensors":
            assert (forgotten.checkpoint / path.name).read_bytes() == path.read_bytes()


def test_the_edit_is_described(forgotten: Run) -> None:
    plan = json.loads((forgotten.path / "edit/plan.json").read_text())
    assert plan["method"]["name"] == "ssd"
    assert isinstance(plan["method"]["parameters"]["alpha"], float)  # the automatic choice, resolved
    delta = json.loads((forgotten.path / "edit/delta.json").read_text())
    assert 0 < delta["changed_elements"] < delta["total_elements"]
    assert all(row["block"] is not None for row in delta["tensors"] if row["changed"] and row["role"] != "head")


def test_criteria_are_sealed_before_a_model_is_loaded(forgotten: Run) -> None:
    events = [json.loads(line) for line in (forgotten.path / "events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.index("criteria.sealed") < names.index("stage.done")
    assert passed(verify(forgotten.path))


def test_an_edited_criterion_or_weight_is_found(world: World, tmp_path: Path) -> None:
    run = forget(world.request, out=tmp_path / "run")
    judged = run.path / "compare/criteria.json"
    content = judged.read_text()
    judged.write_text(content.replace('"max": 0.1', '"max": 1.0'))
    assert {c.name: c.status for c in verify(run.path)}["criteria"] == "failed"
    judged.write_text(content)
    weights = next(run.path.glob("edit/checkpoint/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert {c.name: c.status for c in verify(run.path)}["edited checkpoint"] == "failed"


def test_a_second_request_reads_no_retain_data(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn.editors import ssd

    seen: list[list[str]] = []
    real = ssd.importance

    def counted(model, records, **options):
        seen.append([record.record_id for record in records])
        return real(model, records, **options)

    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ssd, "importance", counted)
    forget(world.request, out=tmp_path / "first")
    assert len(seen) == 2
    rows = world.records.read_text().splitlines()
    (world.folder / "other.jsonl").write_text("\n".join(rows[:3]) + "\n")
    request = world.folder / "other.yaml"
    request.write_text(world.request.read_text().replace("records.jsonl", "other.jsonl"))
    run = forget(request, out=tmp_path / "second")
    assert len(seen) == 3
    assert len(seen[2]) == 3  # the three records to forget, and no retain record
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert {"retain": True, "forget": False} in [event["data"] for event in events if event["event"] == "importances"]
    monkeypatch.setenv("UNLEARN_CACHE", "")
    fresh = forget(request, out=tmp_path / "third")
    for name in ("edit/delta.json", "edit/plan.json", "report/report.json", "report/report.html"):
        assert (fresh.path / name).read_bytes() == (run.path / name).read_bytes(), name


def test_one_model_is_in_memory(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that outlives a stage holds on to its model: not the layout of its checkpoint, not a cycle."""
    real, models, alive = Workspace.load, [], []

    def load(workspace: Workspace, which: str) -> Any:
        alive.append([which for which, model in models if model() is not None])
        loaded = real(workspace, which)
        models.append((which, weakref.ref(loaded.model)))
        return loaded

    monkeypatch.setattr(Workspace, "load", load)
    monkeypatch.setenv("UNLEARN_CACHE", "")
    gc.disable()
    try:
        forget(world.request, out=tmp_path / "run")
    finally:
        gc.enable()
    assert [which for which, _ in models] == ["reference", "checkpoint", "edited"]
    assert alive == [[], [], []]


def test_missing_sets_are_drafted(world: World, tmp_path: Path) -> None:
    request = world.folder / "bare.yaml"
    request.write_text(
        "schema: unlearn.request/v1\ndata: {records: records.jsonl}\ncheckpoint: {path: planted}\nsuite: quick\n"
    )
    run = forget(request, out=tmp_path / "run")
    sets = json.loads((run.path / "inputs/sets.json").read_text())
    assert {role: sets[role]["source"] for role in sets} == {
        "records": "given",
        "control": "drafted",
        "retain": "drafted",
    }
    limits = " ".join(json.loads((run.path / "compare/criteria.json").read_text())["limits"])
    assert "control set was drafted" in limits
    assert "retain set was drafted" in limits
    assert run.claim_level in ("E0", "E1")


def test_stated_digests_are_checked(world: World, tmp_path: Path) -> None:
    text = world.request.read_text()
    request = world.folder / "pinned.yaml"
    request.write_text(text.replace("path: planted,", f"path: planted, tensor_digest: 'sha256:{'0' * 64}',"))
    with pytest.raises(IntegrityError, match="tensor digest"):
        forget(request, out=tmp_path / "a")
    request.write_text(text.replace("records.jsonl}", f"records.jsonl, sha256: 'sha256:{'0' * 64}'}}", 1))
    with pytest.raises(IntegrityError, match="was it changed"):
        forget(request, out=tmp_path / "b")


def test_sets_without_the_templates_of_the_records_are_refused(world: World, tmp_path: Path) -> None:
    """Measured beside each other, they would differ by what stands around the prompt."""
    framed = "{records: records.jsonl, prompt_template: 'Q: {prompt}', completion_template: ' {completion}'}"
    text = world.request.read_text().replace("{records: records.jsonl}", framed)
    (world.folder / "framed.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"control: 12 of 12 prompts; retain: 8 of 8 prompts\)"):
        plan(world.folder / "framed.yaml", tmp_path / "bare", Options(), Display())
    for role in ("control", "retain"):  # said to have none
        stated = f"{{path: {role}.jsonl, prompt_template: '{{prompt}}', completion_template: '{{completion}}'}}"
        text = text.replace(f"{{path: {role}.jsonl}}", stated)
    (world.folder / "stated.yaml").write_text(text)
    found = plan(world.folder / "stated.yaml", tmp_path / "stated", Options(), Display())
    assert found["records"]["retain"] == 8


def test_records_among_the_sets_beside_them_are_refused(world: World, tmp_path: Path) -> None:
    rows = (
        world.retain.read_text() + world.records.read_text().splitlines()[3].replace('"id": "', '"id": "other-') + "\n"
    )
    (world.folder / "everything.jsonl").write_text(rows)
    (world.folder / "shared.yaml").write_text(world.request.read_text().replace("retain.jsonl", "everything.jsonl"))
    with pytest.raises(UsageError, match=r"1 of retain among records \(row 9\)"):
        forget(world.folder / "shared.yaml", out=tmp_path / "forgotten")
    assert not (tmp_path / "forgotten/edit").exists()
    with pytest.raises(UsageError, match=r"8 of control among records"):
        audit(world.planted, records=world.records, control=world.records, out=tmp_path / "audited")


def test_plan_only_edits_nothing(world: World, tmp_path: Path) -> None:
    from unlearn import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["forget", str(world.request), "--plan-only", "--out", str(tmp_path / "run"), "--display", "json"])
        raise SystemExit(0)
    assert stop.value.code == 0
    assert not (tmp_path / "run/edit").exists()
    assert not (tmp_path / "run/before").exists()


def test_a_live_classifier_forgets_a_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    centres = 2.0 * torch.randn(3, 12)
    images = [
        ImageRecord(f"i{i}", (centres[i % 3] + 0.5 * torch.randn(12)).reshape(3, 2, 2), i % 3) for i in range(240)
    ]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    pixels = torch.stack([image.pixels for image in images])
    labels = torch.tensor([image.label for image in images])
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), labels).backward()
        optimiser.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = forget(
        model=model,
        records=[image for image in images if image.label == 0],
        retain=[image for image in images if image.label != 0],
        overrides={"alpha": 1.5, "estimator": "batch", "batch_size": 40},
        criteria=[
            {"id": "C1", "metric": "correct", "aggregate": "rate", "test": "upper95", "max": 0.1},
            {"id": "C2", "metric": "correct", "aggregate": "rate", "test": "noninferiority", "against": "before",
             "set": "retain", "margin": 0.05},
        ],
        suite="quick",
        out=tmp_path / "run",
    )  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert run.model is not model
    assert run.table("before")["correct"].mean() > 0.95
    assert run.table("after")["correct"].mean() < run.table("before")["correct"].mean()
    assert passed(verify(run.path))


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def run_and_die(request: Path, out: Path, at: int) -> int:
    """Run `forget` in a forked process that kills itself at its `at`-th flush to disk; returns the wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        real, count = os.fsync, [0]

        def fsync(descriptor: int) -> None:
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        os.close(2)
        forget(request, out=out)
    finally:
        os._exit(0)


def stages_of_flushes(request: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The stage that `run.json` names at each flush to disk of a whole run."""
    real, stages = os.fsync, []

    def fsync(descriptor: int) -> None:
        stages.append(stage_of(out) if (out / "run.json").exists() else None)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    forget(request, out=out)
    monkeypatch.undo()
    return stages


def stage_of(run: Path) -> str | None:
    found: str | None = json.loads((run / "run.json").read_text()).get("stage")
    return found


SMALL_SUITE = """\
schema: unlearn.suite/v1
name: killed
description: every stage with little in it, for a run that is made many times
noise_floor: {records: 4}
attacks:
  - {name: verbatim.greedy}
  - {name: recollection.probability}
  - {name: membership.loss}
reaudit:
  - {name: recovery.quantisation, schemes: [int4], records: 4}
  - {name: recovery.relearning, steps: 2, marks: [1], scored: 4}
"""


def killed_and_resumed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, everywhere: bool) -> None:
    """Kill a run at every flush to disk, or in the middle of every stage; resume it, and compare all bytes."""
    monkeypatch.setenv("UNLEARN_CACHE", "")
    (world.folder / "killed-suite.yaml").write_text(SMALL_SUITE)
    request = world.folder / "killed.yaml"
    request.write_text(world.request.read_text().replace("suite: quick", "suite: killed-suite.yaml"))
    at_flush = stages_of_flushes(request, tmp_path / "whole", monkeypatch)
    monkeypatch.setenv("UNLEARN_CACHE", "")
    expected = files(tmp_path / "whole")
    source = files(world.planted)
    every = {"inputs", "sets", "before", "reference", "edit", "after", "compare", "report"}
    assert every <= set(at_flush)
    points: dict[str | None, list[int]] = {}
    for at, stage in enumerate(at_flush, start=1):
        if stage is not None:
            points.setdefault(stage, []).append(at)
    for stage, at in (
        (s, at) for s, found in points.items() for at in (found if everywhere else [found[len(found) // 2]])
    ):
        out = tmp_path / f"killed-{at}"
        status = run_and_die(request, out, at)
        assert os.WIFSIGNALED(status), f"flush {at} of {len(at_flush)} did not kill"
        assert stage_of(out) == stage
        if json.loads((out / "run.json").read_text())["status"] != "done":  # killed after the last word
            run = forget(resume=out)
            assert run.verdict
        assert files(out) == expected, f"killed at flush {at}"
        assert passed(verify(out))
        assert not [path for path in out.rglob(".*") if path.is_file()], "a partial file stayed behind"
    assert files(world.planted) == source


def test_killed_in_every_stage_and_resumed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_and_resumed(world, tmp_path, monkeypatch, everywhere=False)


@pytest.mark.slow
def test_killed_at_every_write_and_resumed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_and_resumed(world, tmp_path, monkeypatch, everywhere=True)


def test_resume_refuses_another_request_a_finished_run_and_changed_evidence(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found a finished one"):
        run = forget(world.request, out=tmp_path / "done")
        forget(resume=run.path)
    status = run_and_die(world.request, tmp_path / "dead", 40)
    assert os.WIFSIGNALED(status)
    other = world.folder / "another.yaml"
    other.write_text(world.request.read_text().replace("quick", "standard"))
    with pytest.raises(IntegrityError, match="found another"):
        forget(other, resume=tmp_path / "dead")
    path = tmp_path / "dead/inputs/sets.json"
    path.write_text(path.read_text().replace("0", "1"))
    with pytest.raises(IntegrityError, match="missing or changed"):
        forget(world.request, resume=tmp_path / "dead")


def test_options_are_part_of_the_run(world: World, tmp_path: Path) -> None:
    run = forget(world.request, out=tmp_path / "run", options=Options(seed=5, device="cpu"))
    assert json.loads((run.path / "run.json").read_text())["seed"] == 5
