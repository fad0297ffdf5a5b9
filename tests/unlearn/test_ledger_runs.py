"""Forget runs and their ledger: what is entered, what is not run twice, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from probes.errors import IntegrityError, ResourceError, UsageError
from tests.unlearn.ledger_world import IMPOSSIBLE, Requests, flushes, forked, quick, rows
from unlearn import cli
from unlearn.api import Run, forget, plan
from unlearn.ledger.chain import Ledger
from unlearn.ledger.checking import verify
from unlearn.ledger.history import states
from unlearn.runs.job import Options
from unlearn.runs.verify import passed
from unlearn.runs.verify import verify as verify_run
from unlearn.summary import plan_text
from unlearn.terminal import Display


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Requests]:
    found = Requests.make(tmp_path_factory.mktemp("requests"))
    with quick():
        yield found


@pytest.fixture
def world(made: Requests, tmp_path: Path) -> Requests:
    shutil.copytree(made.folder, tmp_path / "w")
    return Requests(tmp_path / "w")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "store")


def go(path: Path | list[Path], ledger: Ledger, **options: object) -> Run:
    return forget(path, ledger=ledger.folder, **options)  # type: ignore[arg-type]


def events(ledger: Ledger) -> list[str]:
    return [entry.event for entry in ledger.entries()]


def change(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})


def test_a_chain_of_three_requests(world: Requests, ledger: Ledger) -> None:
    runs = [go(world.request(name, to), ledger, chain=True) for name, to in (("a", "e1"), ("b", "e2"), ("c", "e3"))]
    entries = [entry.data for entry in ledger.entries() if entry.event == "finished"]
    assert [entry["run"] for entry in entries] == [run.path.name for run in runs]
    assert [entry["parent"] for entry in entries[1:]] == [entry["checkpoint"] for entry in entries[:-1]]
    assert [[row["n"] for row in entry["earlier"]] for entry in entries] == [[], [3], [3, 5]]
    sets = json.loads((runs[2].path / "inputs/sets.json").read_text())
    assert sets["earlier"]["n"] == 4
    assert [row.state for row in states(ledger)] == ["finished"] * 3
    assert all(passed(verify_run(run.path)) for run in runs)
    assert passed(verify(ledger))
    text = ledger.path.read_text()
    assert "word" not in text
    assert str(world.folder) not in text
    assert json.loads((runs[0].path / "run.json").read_text())["ledger"]["folder"] == ".."


@pytest.mark.parametrize(
    ("method", "passes"),
    [  # two records to forget and two to keep; of 200 steps each takes two, two and the four forgotten earlier
        ("{name: gs_lora}", {"forward": 2 + 2 * 4, "forward_backward": 200 * (2 + 2 + 4)}),
        ("{name: gs_lora, overrides: {earlier_weight: 0.0}}", {"forward": 2, "forward_backward": 200 * (2 + 2)}),
        ("{name: gs_lora, overrides: {steps: 0}}", {"forward": 0, "forward_backward": 0}),
        ("{name: ssd}", {"forward": 0, "forward_backward": 2 + 2}),  # runs no earlier record
    ],
)
def test_a_plan_counts_the_passes_over_earlier_records(
    method: str, passes: dict[str, int], world: Requests, ledger: Ledger, tmp_path: Path
) -> None:
    for name, to in (("a", "e1"), ("b", "e2")):
        go(world.request(name, to), ledger, chain=True)
    request = world.request("c", "e3")
    text = request.read_text()
    request.write_text(re.sub("method: {.*}}", f"method: {method}", text))
    before = ledger.path.read_bytes()

    def planned(name: str, **options: Any) -> dict[str, Any]:
        return plan([request], tmp_path / name, Options(), Display(), ledger=ledger.folder, **options)

    found = planned("p1", chain=True)
    assert found["records"] == {"records": 2, "control": 4, "retain": 2, "earlier": 4}
    assert found["passes"] == passes
    assert (found["earlier_gone"], found["carried_out"]) == (0, None)
    assert "earlier" not in planned("p2")["records"]  # nothing led to the checkpoint that the request names
    shutil.rmtree(ledger.folder / ledger.entries()[1].data["run"])
    found = planned("p3", chain=True)
    assert (found["records"]["earlier"], found["earlier_gone"]) == (2, 2)
    assert "gone        2 records forgotten earlier" in plan_text(found)
    with pytest.raises(IntegrityError, match="--complete-history"):
        planned("p4", chain=True, complete_history=True)
    assert ledger.path.read_bytes() == before


def test_a_plan_says_what_was_carried_out_before(
    world: Requests, ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = world.request("a", "e1")
    go(request, ledger)
    found = plan(request, tmp_path / "p", Options(), Display(), ledger=ledger.folder)
    assert found["carried_out"] == ledger.entries()[-1].n
    assert f"carried out before, entry {found['carried_out']} of the ledger" in plan_text(found)
    with suppress(SystemExit):
        cli.main(
            [
                "forget",
                str(request),
                "--plan-only",
                "--chain",
                "--ledger",
                str(ledger.folder),
                "--out",
                str(tmp_path / "p2"),
            ]
        )
    assert f"entry {found['carried_out']} of the ledger" in capsys.readouterr().out
    assert plan(request, tmp_path / "q", Options(), Display(), ledger="")["carried_out"] is None  # no ledger is kept
    with pytest.raises(UsageError, match="expected a ledger"):
        plan(request, tmp_path / "r", Options(), Display(), ledger="", chain=True)


def test_the_same_request_is_reported_not_repeated(world: Requests, ledger: Ledger) -> None:
    request = world.request("a", "e1", criteria=IMPOSSIBLE)
    first = go(request, ledger)
    n = len(ledger.entries())
    renamed = world.folder / "renamed.yaml"
    renamed.write_text(request.read_text() + "answered_time: 2026-11-03T09:12:00Z\n")
    second = go(renamed, ledger)
    assert (second.path, second.exit_code) == (first.path, 1)
    assert len(ledger.entries()) == n
    shutil.copytree(world.folder / "root", world.folder / "elsewhere")
    assert go(world.request("a", "e1", criteria=IMPOSSIBLE, checkpoint="elsewhere"), ledger).path == first.path
    again = go(request, ledger, again=True)
    assert again.path != first.path
    assert [row.state for row in states(ledger)] == ["superseded", "finished"]
    named = forget(request, out=ledger.folder / "by name")  # the default ledger is that of the folder around it
    assert named.path.name == "by name"
    assert events(ledger).count("finished") == 3


def test_another_request_is_run(world: Requests, ledger: Ledger) -> None:
    first = go(world.request("a", "e1"), ledger)
    assert go(world.request("a", "e2"), ledger).path != first.path
    world.records("a", rows("changed"))
    assert go(world.request("a", "e1"), ledger).path != first.path
    assert len({row.key["content"] for row in states(ledger)}) == 2


def test_a_parent_that_changed_is_refused(world: Requests, ledger: Ledger) -> None:
    run = go(world.request("a", "e1"), ledger)
    assert run.checkpoint is not None
    before = ledger.path.read_bytes()
    change(world.folder / "root")
    with pytest.raises(IntegrityError, match="entry 2 of the ledger started from"):
        go(world.request("b", "e2"), ledger)
    from unlearn.checkpoints.manifest import identify

    digest = identify(world.folder / "root").tensor_digest
    request = world.request("b", "e2")
    stated = request.read_text().replace("/root}", f"/root, tensor_digest: '{digest}'}}")
    request.write_text(stated)
    assert go(request, ledger).verdict == "criteria met"  # changed on purpose, and said so
    change(run.checkpoint)
    with pytest.raises(IntegrityError, match="entry 3 of the ledger wrote"):
        go(world.request("c", "e3", checkpoint=run.checkpoint), ledger)
    assert ledger.path.read_bytes().startswith(before)
    assert {row.name: row.status for row in verify(ledger)}["checkpoints"] == "failed"


def test_the_newest_checkpoint_of_a_chain_that_changed_or_went_is_refused(world: Requests, ledger: Ledger) -> None:
    run = go(world.request("a", "e1"), ledger, chain=True)
    copy = run.path / "edit" / "checkpoint"
    copy.rename(world.folder / "moved")
    with pytest.raises(UsageError, match="put it back"):
        go(world.request("b", "e2"), ledger, chain=True)
    (world.folder / "moved").rename(copy)
    change(copy)
    with pytest.raises(IntegrityError, match="entry 3 of the ledger wrote"):
        go(world.request("b", "e2"), ledger, chain=True)
    assert events(ledger) == ["created", "opened", "finished"]


def test_an_altered_ledger_refuses_every_run(world: Requests, ledger: Ledger) -> None:
    go(world.request("a", "e1"), ledger)
    raw = ledger.path.read_bytes()
    altered = raw.replace(b'"claim_level": "E1"', b'"claim_level": "E4"').replace(b'"root": "sha', b'"root": "SHA')
    ledger.path.write_bytes(altered)
    with pytest.raises(IntegrityError, match=r"line 3 of ledger\.jsonl"):
        go(world.request("b", "e2"), ledger)
    assert ledger.path.read_bytes() == altered
    assert len([path for path in ledger.folder.iterdir() if path.is_dir()]) == 1
    assert [row.status for row in verify(ledger)] == ["failed"]


def test_verify_finds_what_a_chain_alone_cannot(world: Requests, ledger: Ledger) -> None:
    run = go(world.request("a", "e1"), ledger)
    raw = ledger.path.read_bytes()

    def failing() -> set[str]:
        return {row.name for row in verify(ledger) if row.status == "failed"}

    assert failing() == set()
    ledger.path.write_bytes(b"".join(raw.splitlines(keepends=True)[:-1]))  # an entry cut off the end
    assert failing() == {"end of the chain"}
    ledger.path.write_bytes(raw.replace(b'"method": "given"', b'"method": "other"'))  # in the last line
    assert failing() == {"end of the chain"}
    ledger.path.write_bytes(raw)
    for name, check in (
        ("compare/criteria.json", "runs"),
        ("edit/delta.json", "runs"),
        ("events.jsonl", "runs"),
        ("private/records.jsonl", "records"),
    ):
        file = run.path / name
        content = file.read_text()
        file.write_text(content.replace("criteria met", "inconclusive").replace("e", "3", 1))
        assert check in failing(), name
        file.write_text(content)
    shutil.rmtree(run.path / "private")
    assert failing() == set()
    shutil.rmtree(run.path)
    assert {row.name: row.status for row in verify(ledger)}["runs"] == "skipped"


def test_purged_records_are_a_limit_or_an_error(world: Requests, ledger: Ledger) -> None:
    first = go(world.request("a", "e1"), ledger, chain=True)
    shutil.rmtree(first.path / "private")
    with pytest.raises(IntegrityError, match="2 gone"):
        go(world.request("b", "e2"), ledger, chain=True, complete_history=True)
    second = go(world.request("b", "e2"), ledger, chain=True)
    history = json.loads((second.path / "run.json").read_text())["ledger"]["earlier"]
    assert [row["missing"] for row in history] == ["its private folder was purged"]
    assert "earlier" not in json.loads((second.path / "inputs/sets.json").read_text())


def test_sets_that_hold_forgotten_records_are_refused(world: Requests, ledger: Ledger) -> None:
    go(world.request("a", "e1"), ledger, chain=True)
    world.records("retain", [*rows("retain"), rows("a")[0] | {"id": "under another id"}])
    world.records("control", [*rows("control"), *(row | {"id": "x" + row["id"]} for row in rows("a"))])
    with pytest.raises(UsageError, match="2 in control, 1 in retain"):
        go(world.request("b", "e2"), ledger, chain=True)


def test_a_failed_run_is_entered_without_its_message(
    world: Requests, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn.evidence import measure

    def broken(*arguments: object) -> None:
        raise ValueError("the secret is 4711")

    monkeypatch.setattr(measure, "measure", broken)
    with pytest.raises(ValueError, match="4711"):
        go(world.request("a", "e1"), ledger)
    last = ledger.entries()[-1]
    assert (last.event, last.data["error"], last.data["exit_code"]) == ("failed", "ValueError", 5)
    assert "4711" not in ledger.path.read_text()
    run = ledger.folder / last.data["run"]
    monkeypatch.undo()
    assert forget(resume=run).verdict == "criteria met"
    assert [row.state for row in states(ledger)] == ["superseded", "finished"]
    assert passed(verify(ledger))


def test_two_processes_at_the_same_request(world: Requests, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn import api

    request = world.request("a", "e1")
    real = api.Pipeline.execute
    outcomes: list[int] = []

    def execute(pipeline: api.Pipeline) -> str:
        def second() -> int:
            api.Pipeline.execute = real  # type: ignore[method-assign]
            try:
                go(request, ledger)
            except ResourceError:
                return 5
            return 0

        outcomes.append(os.waitstatus_to_exitcode(forked(second)))
        assert [row.state for row in states(ledger)] == ["running"]
        return real(pipeline)

    monkeypatch.setattr(api.Pipeline, "execute", execute)
    go(request, ledger)
    assert outcomes == [5]
    assert events(ledger) == ["created", "opened", "finished"]
    assert len([path for path in ledger.folder.iterdir() if path.is_dir()]) == 1


def test_two_processes_at_the_same_link_of_a_chain(
    world: Requests, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn import api

    a, b = world.request("a", "e1"), world.request("b", "e2")
    real = api.Pipeline.execute

    def execute(pipeline: api.Pipeline) -> str:
        monkeypatch.undo()
        with pytest.raises(ResourceError, match="nothing else adds to"):
            go(b, ledger, chain=True)
        assert events(ledger) == ["created", "opened"]
        go(b, ledger)  # beside the chain, but on its newest checkpoint
        return real(pipeline)

    monkeypatch.setattr(api.Pipeline, "execute", execute)
    first = go(a, ledger, chain=True)
    assert [row.state for row in states(ledger)] == ["finished", "finished"]
    assert os.WIFSIGNALED(forked(lambda: go(world.request("c", "e3"), ledger, chain=True) and 0, 20))
    run = next(row.run for row in states(ledger) if row.state == "open")
    go(b, ledger, chain=True, out=ledger.folder / "moved on", again=True)
    assert first.path.is_dir()
    with pytest.raises(ResourceError, match="moved it on"):
        forget(resume=ledger.folder / run)


def test_kill_9_at_the_writes_around_the_entries(world: Requests, tmp_path: Path) -> None:
    request = world.request("a", "e1")
    total = flushes(lambda: go(request, Ledger(tmp_path / "whole")))
    last = (total - 3, total - 2)  # the finished entry, the run's note of it
    for at in (4, *last):  # 4: the opened entry
        store = tmp_path / f"killed-{at}"
        assert os.WIFSIGNALED(forked(lambda store=store: go(request, Ledger(store)) and 0, at))
        run = next(path for path in store.iterdir() if path.is_dir())
        if json.loads((run / "run.json").read_text())["status"] != "done":
            assert forget(resume=run).verdict == "criteria met"
        kept = Ledger(store)
        assert events(kept) == ["created", "opened", "finished"], at
        assert [row.state for row in states(kept)] == ["finished"]
        assert passed(verify(kept))
        assert passed(verify_run(run))


def test_resume_goes_by_what_the_request_asks_for(world: Requests, ledger: Ledger) -> None:
    request = world.request("a", "e1")
    assert os.WIFSIGNALED(forked(lambda: go(request, ledger, chain=True) and 0, 20))
    run = next(path for path in ledger.folder.iterdir() if path.is_dir())
    assert [row.state for row in states(ledger)] == ["open"]
    with pytest.raises(IntegrityError, match="found another"):
        forget(world.request("b", "e1"), resume=run)
    renamed = request.rename(world.folder / "renamed.yaml")
    assert forget(renamed, resume=run).verdict == "criteria met"


def test_a_run_belongs_to_the_store_it_lies_in(world: Requests, ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inside the run store"):
        go(world.request("a", "e1"), ledger, out=tmp_path / "elsewhere")
    run = go(world.request("a", "e1"), ledger)
    following = world.request("b", "e2", checkpoint=run.checkpoint or "")
    with pytest.raises(UsageError, match="inside the run store"):  # its history lies in that store
        forget(following, out=tmp_path / "elsewhere")
    assert forget(following).path.parent.resolve() == ledger.folder.resolve()


def test_a_ledger_can_be_switched_off(world: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_LEDGER", "")
    forget(world.request("a", "e1"), out=tmp_path / "runs" / "one")
    assert not (tmp_path / "runs" / "ledger.jsonl").exists()
    with pytest.raises(UsageError, match="expected a ledger for a chain"):
        forget(world.request("b", "e2"), chain=True)
    monkeypatch.setenv("UNLEARN_LEDGER", str(tmp_path / "named"))
    assert forget(world.request("a", "e1")).path.parent == tmp_path / "named"


# -- batches ----------------------------------------------------------------------------------------------------------


def test_two_requests_in_one_edit(world: Requests, ledger: Ledger) -> None:
    both = [world.request("a", "e1"), world.request("b", "e1")]
    run = go(both, ledger)
    assert len(run.records) == 4
    entry = ledger.entries()[-1].data
    assert [request["records"] for request in entry["requests"]] == [2, 2]
    assert [row.state for row in states(ledger)] == ["finished", "finished"]
    assert go(both[::-1], ledger).path == run.path
    assert go(both[1], ledger).path == run.path
    with pytest.raises(UsageError, match="request 1 of them was"):
        go([both[0], world.request("c", "e1")], ledger)


def test_requests_that_differ_are_refused_with_every_difference(world: Requests, ledger: Ledger) -> None:
    a = world.request("a", "e1")
    b = world.request("b", "e2", checkpoint="e3", criteria=IMPOSSIBLE)
    world.records("other", rows("other", 4))
    b.write_text(
        b.read_text().replace("control.jsonl", "other.jsonl").replace(str(world.folder / "small.yaml"), "quick")
    )
    with pytest.raises(UsageError) as error:
        go([a, b], ledger)
    assert "a.yaml and b.yaml differ in checkpoint, method, criteria, suite, control;" in str(error.value)
    with pytest.raises(UsageError, match="given twice"):
        go([a, a], ledger)
    assert not ledger.exists()


def test_the_same_ids_in_two_requests(world: Requests, ledger: Ledger) -> None:
    world.records(
        "b", [row | {"id": other["id"], "group": "g"} for row, other in zip(rows("b"), rows("a"), strict=True)]
    )
    run = go([world.request("a", "e1"), world.request("b", "e1")], ledger)
    assert run.records["record_id"].tolist() == ["1/a0", "1/a1", "2/a0", "2/a1"]
    frozen = [json.loads(line) for line in (run.path / "private/records.jsonl").read_text().splitlines()]
    assert [row.get("group") for row in frozen] == [None, None, "2/g", "2/g"]


def test_texts_of_a_batch_are_split_as_their_requests_say(world: Requests, ledger: Ledger) -> None:
    requests = []
    for name in "ab":
        texts = [{"id": row["id"], "text": row["prompt"] + row["completion"]} for row in rows(name)]
        world.records(name, texts)
        requests.append(world.request(name, "e1"))
        requests[-1].write_text(requests[-1].read_text().replace(".jsonl}", ".jsonl, text_prompt_tokens: 3}", 1))
    run = go(requests, ledger)
    job = json.loads((run.path / "private/job.json").read_text())
    assert job["sources"]["records"]["text_prompt_tokens"] == 3
    requests[1].write_text(requests[1].read_text().replace("text_prompt_tokens: 3", "text_prompt_tokens: 4"))
    with pytest.raises(UsageError, match=r"differ in data\.text_prompt_tokens"):
        go(requests, ledger, again=True)


def test_a_changed_record_file_of_a_batch_is_refused(world: Requests, ledger: Ledger) -> None:
    a, b = world.request("a", "e1"), world.request("b", "e1")
    b.write_text(b.read_text().replace("/b.jsonl}", f"/b.jsonl, sha256: 'sha256:{'0' * 64}'}}"))
    with pytest.raises(IntegrityError, match="was it changed"):
        go([a, b], ledger)


def test_an_interrupted_batch_is_resumed(world: Requests, ledger: Ledger) -> None:
    both = [world.request("a", "e1"), world.request("b", "e1")]
    assert os.WIFSIGNALED(forked(lambda: go(both, ledger) and 0, 20))
    run = next(path for path in ledger.folder.iterdir() if path.is_dir())
    assert forget(both, resume=run).verdict == "criteria met"
    assert events(ledger) == ["created", "opened", "finished"]


def test_each_request_of_a_batch_is_judged_on_its_own_records() -> None:
    import pandas as pd

    from unlearn.evidence.criteria import Evidence, evaluate
    from unlearn.evidence.measure import Measured
    from unlearn.ledger.batch import judge_requests
    from unlearn.requests.presets import Criterion

    def measured(emitted: list[bool]) -> Measured:
        table = pd.DataFrame({"emitted": emitted, "loss": [float(hit) for hit in emitted]})
        retain = pd.DataFrame({"emitted": [False] * 4, "loss": [2.0] * 4})
        return Measured("causal_lm", "d", {"records": table, "retain": retain}, {}, {})

    criteria = [
        Criterion(id="C1", metric="extraction.greedy", aggregate="rate", test="point", max=0.3),
        Criterion(id="C2", metric="loss", test="point", max=1.0, set="retain", required=False),
    ]
    emitted = [False, False, False, True, True, False]  # the last one a near-duplicate that was included
    evidence = Evidence("causal_lm", measured(emitted), measured([True] * 6), None, seed=0)
    whole = [evaluate(criterion, evidence) for criterion in criteria]
    first, second = judge_requests(criteria, evidence, [3, 2], whole)
    assert [row["verdict"] for row in (first, second)] == ["criteria met", "criteria not met"]
    assert [row["criteria"][0]["observed"]["value"] for row in (first, second)] == [0.0, 1.0]
    assert first["criteria"][1] == whole[1]
    back = {"id": "earlier requests", "status": "not met", "required": True}  # no request is served by such an edit
    assert judge_requests(criteria, evidence, [3, 2], whole, [back])[0]["verdict"] == "criteria not met"
    with pytest.raises(UsageError, match="fewer"):
        judge_requests(criteria, evidence, [3, 4], whole)
