"""Records forgotten earlier are asked for again in the same pass, and a run that brings them back fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.unlearn.ledger_world import Requests, flushes, forked, quick, rows
from unlearn.api import Run, forget
from unlearn.disk import file_sha256
from unlearn.ledger.chain import Ledger
from unlearn.ledger.history import states
from unlearn.ledger.queue import Settings, process
from unlearn.runs.verify import passed, verify
from unlearn.summary import summary


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Requests]:
    from unlearn.demo.planting import Planting, plant
    from unlearn.records.tokens import records_from, tokenise

    found = Requests.make(tmp_path_factory.mktemp("requests"))
    model, tokenizer = tiny.causal_lm("llama", hidden_size=48, intermediate_size=64), tiny.tokenizer()
    tiny.save(model, tokenizer, found.folder / "e1")  # never held a record
    tiny.save(tiny.causal_lm("llama", 5, hidden_size=48, intermediate_size=64), tokenizer, found.folder / "e2")
    records = tokenise(records_from([*rows("a"), *rows("b")]), tokenizer, max_length=None)
    plant(model, records, Planting(epochs=150, learning_rate=5e-3, batch_size=4, loss_below=0.01))
    tiny.save(model, tokenizer, found.folder / "root")
    with quick():
        yield found


@pytest.fixture
def world(made: Requests, tmp_path: Path) -> Requests:
    shutil.copytree(made.folder, tmp_path / "w")
    (tmp_path / "w" / "q").mkdir()
    return Requests(tmp_path / "w")


def go(world: Requests, *names: tuple[str, str]) -> list[Run]:
    store = world.folder / "store"
    return [forget(world.request(name, to), ledger=store, chain=True) for name, to in names]


def decided(run: Run) -> dict[str, object]:
    found: dict[str, object] = json.loads((run.path / "compare/criteria.json").read_text())
    return found


def test_earlier_records_that_come_back_fail_the_run(world: Requests) -> None:
    first, second = go(world, ("a", "e1"), ("b", "root"))  # the second edit puts the first one's records back
    assert decided(first)["earlier"] is None
    assert second.table("before", "earlier")["emitted"].tolist() == [False, False]
    assert second.table("after", "earlier")["emitted"].tolist() == [True, True]
    earlier = decided(second)["earlier"]
    assert isinstance(earlier, dict)
    assert (earlier["status"], second.verdict, second.exit_code) == ("not met", "criteria not met", 1)
    judged = json.loads((second.path / "compare/earlier.json").read_text())["requests"]
    pseudonyms = [json.loads(line)["pseudonym"] for line in (first.path / "private/subjects.jsonl").open()]
    assert [(row["n"], row["emitted_again"], row["again"]) for row in judged] == [(3, 2, pseudonyms)]
    assert passed(verify(second.path))
    shown = summary(second).splitlines()
    assert "not met       earlier requests" in shown
    assert any("came back: entry 3" in line for line in shown)
    kept = Ledger(world.folder / "store")
    assert [row.state for row in states(kept)] == ["resurfaced", "finished"]
    assert kept.entries()[-1].data["earlier"] == [{"n": 3, "records": 2, "status": "not met", "emitted_again": 2}]
    (third,) = go(world, ("c", "e2"))  # the chain did not go on from the copy that failed
    assert [row["n"] for row in kept.entries()[-1].data["earlier"]] == [3]
    assert [row.state for row in states(kept)] == ["finished", "finished", "finished"]
    assert decided(third)["earlier"]["status"] != "not met"  # type: ignore[index]


def test_a_run_by_itself_cannot_say_met_where_its_own_criteria_are(world: Requests) -> None:
    """The second request's own records were never held: only the earlier ones speak against the copy."""
    _, second = go(world, ("a", "e1"), ("c", "root"))
    rows_ = decided(second)["criteria"]
    assert isinstance(rows_, list)
    assert {row["status"] for row in rows_} == {"met"}
    assert second.verdict == "criteria not met"


def test_purged_records_are_named_in_the_limits(world: Requests) -> None:
    (first,) = go(world, ("a", "e1"))
    shutil.rmtree(first.path / "private")
    (second,) = go(world, ("b", "e2"))
    found = decided(second)
    assert "could not be asked again: its private folder was purged" in " ".join(found["limits"])  # type: ignore[call-overload]
    assert found["earlier"]["not_audited"] == [3]  # type: ignore[index]
    assert second.verdict == "inconclusive"


def test_the_queue_names_what_came_back(world: Requests) -> None:
    for name, to in (("a", "e1"), ("b", "root")):
        world.request(name, to, into=world.folder / "q")
    found = process(world.folder / "q", settings=Settings(chain=True))
    assert [row["exit_code"] for row in found["requests"]] == [0, 1]
    assert found["requests"][1]["earlier"] == {"asked_again": [3], "came_back": [3], "not_audited": []}


def test_each_request_of_a_batch_has_its_verdict(world: Requests) -> None:
    store = world.folder / "store"
    run = forget([world.request("a", "e1"), world.request("b", "e1")], ledger=store)
    judged = json.loads((run.path / "compare/requests.json").read_text())
    assert [row["verdict"] for row in judged] == ["criteria met"] * 2
    assert [len(row["criteria"]) for row in judged] == [1, 1]
    assert passed(verify(run.path))


def test_a_resumed_run_with_a_history_ends_with_the_same_bytes(world: Requests) -> None:
    def files(folder: Path) -> dict[str, str]:
        free = {"run.json", "events.jsonl", "private/lock"}
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: file_sha256(path) for name, path in found.items() if name not in free}

    go(world, ("a", "e1"))
    request, store = world.request("b", "e2"), world.folder / "store"
    total = flushes(lambda: forget(request, ledger=store, chain=True, out=store / "whole"))
    expected = files(store / "whole")
    assert any(name.startswith("private/earlier/") for name in expected)
    shutil.copytree(store, world.folder / "other", ignore=shutil.ignore_patterns("whole"))
    kept = Ledger(world.folder / "other")
    lines = kept.path.read_bytes().splitlines(keepends=True)
    kept.path.write_bytes(b"".join(lines[:3]))  # as it was before the second request
    out = kept.folder / "whole"
    status = forked(lambda: forget(request, ledger=kept.folder, chain=True, out=out) and 0, total // 2)
    assert os.WIFSIGNALED(status)
    assert forget(resume=kept.folder / "whole").verdict
    found = files(kept.folder / "whole")
    differing = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    assert differing <= {"private/job.json"}  # it names where the store lies
