"""A folder of requests: in order, each once, whatever one of them does, two processes or a kill at any point."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from probes.errors import IntegrityError, ResourceError, UsageError
from tests.unlearn.ledger_world import IMPOSSIBLE, Requests, begin, forked, quick
from unlearn import api, cli
from unlearn.ledger.chain import Ledger
from unlearn.ledger.checking import verify
from unlearn.ledger.history import states
from unlearn.ledger.queue import LOCK, Settings, process
from unlearn.runs.verify import passed

CHAIN = Settings(chain=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Requests]:
    found = Requests.make(tmp_path_factory.mktemp("requests"))
    with quick():
        yield found


@pytest.fixture
def world(made: Requests, tmp_path: Path) -> Requests:
    shutil.copytree(made.folder, tmp_path / "w")
    (tmp_path / "w" / "q").mkdir()
    return Requests(tmp_path / "w")


def add(world: Requests, name: str, to: str, **options: Any) -> Path:
    return world.request(name, to, into=world.folder / "q", **options)


def queue(world: Requests) -> Path:
    return world.folder / "q"


def ledger(world: Requests) -> Ledger:
    return Ledger(world.folder / "q" / "runs")


def column(summary: dict[str, Any], name: str) -> list[Any]:
    return [row.get(name) for row in summary["requests"]]


def test_a_chain_goes_on_whatever_one_request_does(world: Requests) -> None:
    add(world, "1", "e1", records="a")
    add(world, "2-fails", "e2", records="b", criteria=IMPOSSIBLE)
    (queue(world) / "3-bad.yaml").write_text("schema: unlearn.request/v1\n")
    add(world, "4", "e3", records="c")
    (queue(world) / "notes.txt").write_text("not a request\n")
    found = process(queue(world), settings=CHAIN)
    assert column(found, "file") == ["1.yaml", "2-fails.yaml", "3-bad.yaml", "4.yaml"]
    assert column(found, "state") == ["finished", "finished", "invalid", "finished"]
    assert column(found, "exit_code") == [0, 1, 2, 3]  # too few earlier records to rule out that they came back
    assert found["exit_code"] == 2
    entries = [entry.data for entry in ledger(world).entries() if entry.event == "finished"]
    first = entries[0]["checkpoint"]
    assert [entry["parent"] for entry in entries[1:]] == [first, first]  # a copy that failed is no parent
    assert found["chain"][0]["checkpoint"] == entries[2]["checkpoint"]
    assert found["requests"][3]["earlier"] == {"asked_again": [3], "came_back": [], "not_audited": []}
    # a second pass repeats nothing, not even the one that failed
    (queue(world) / "3-bad.yaml").unlink()
    n = len(ledger(world).entries())
    again = process(queue(world), settings=CHAIN)
    assert column(again, "state") == ["carried out before"] * 3
    assert column(again, "run") == [entry["run"] for entry in entries]
    assert (again["exit_code"], len(ledger(world).entries())) == (1, n)
    assert passed(verify(ledger(world)))
    json.dumps(found)


def test_without_a_chain_each_starts_from_what_it_names(world: Requests) -> None:
    add(world, "1", "e1", records="a")
    add(world, "2", "e2", records="b")
    found = process(queue(world), world.folder / "named")
    kept = Ledger(world.folder / "named")
    entries = [entry.data for entry in kept.entries() if entry.event == "finished"]
    assert entries[0]["parent"] == entries[1]["parent"]
    assert found["chain"] is None
    assert not (queue(world) / "runs").exists()
    # made a chain of afterwards: what lies beside it is carried out on it
    chained = process(queue(world), world.folder / "named", CHAIN)
    assert column(chained, "state") == ["finished", "carried out before"]
    assert chained["chain"][0]["run"] == chained["requests"][0]["run"]


def test_a_file_that_arrives_meanwhile_is_taken(world: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    add(world, "5", "e1", records="a")
    real = api.carry_out

    def arriving(*arguments: Any, **options: Any) -> Any:
        if not (queue(world) / "2.yaml").exists():
            add(world, "2", "e2", records="b")
        return real(*arguments, **options)

    monkeypatch.setattr(api, "carry_out", arriving)
    assert column(process(queue(world), settings=CHAIN), "file") == ["5.yaml", "2.yaml"]


def test_a_run_that_breaks_does_not_stop_the_others_and_goes_on_next_time(
    world: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(world, "1", "e1", records="a")
    add(world, "2", "e2", records="b")
    real, broken = api.Pipeline._compare, []

    def compare(pipeline: api.Pipeline) -> None:
        if not broken:
            broken.append(pipeline.run.path.name)
            raise ValueError("the secret is 4711")
        real(pipeline)

    monkeypatch.setattr(api.Pipeline, "_compare", compare)
    found = process(queue(world))
    assert column(found, "state") == ["failed", "finished"]
    assert found["exit_code"] == 5
    assert "4711" not in json.dumps(found)
    assert "ValueError at test_queue.py" in found["requests"][0]["error"]
    again = process(queue(world))
    assert column(again, "state") == ["finished", "carried out before"]
    assert again["requests"][0]["run"] == broken[0]  # resumed, not begun anew


def test_two_processes_at_once(world: Requests, tmp_path: Path) -> None:
    for name, to in (("a", "e1"), ("b", "e2")):
        add(world, name, to)
    children = []
    for number in range(2):
        child = os.fork()
        if not child:

            def work(number: int = number) -> int:
                found = process(queue(world), settings=CHAIN, wait=True)
                (tmp_path / f"{number}.json").write_text(json.dumps(column(found, "state")))
                return 0

            begin(work)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    states_of = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert sorted(states_of) == [["carried out before"] * 2, ["finished"] * 2]
    assert [entry.event for entry in ledger(world).entries()] == ["created", *["opened", "finished"] * 2]
    assert passed(verify(ledger(world)))


def test_a_second_process_leaves_with_code_5(world: Requests) -> None:
    import fcntl

    with (queue(world) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process"):
            process(queue(world))
    assert process(queue(world))["requests"] == []


def test_kill_9_and_again(world: Requests) -> None:
    for name, to in (("a", "e1"), ("b", "e2")):
        add(world, name, to)
    child = os.fork()
    if not child:
        begin(lambda: process(queue(world), settings=CHAIN) and 0)
    deadline = time.monotonic() + 120
    while not [row for row in states(ledger(world)) if row.n > 2] and time.monotonic() < deadline:
        time.sleep(0.02)  # until the second request has begun
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = {row.run: row.state for row in states(ledger(world))}
    assert sorted(before.values()) == ["finished", "open"]
    found = process(queue(world), settings=CHAIN)
    assert column(found, "state") == ["carried out before", "finished"]
    assert set(column(found, "run")) == set(before)  # the one that was begun was gone on with
    assert passed(verify(ledger(world)))


def test_an_unfinished_run_on_an_outdated_checkpoint_is_abandoned(world: Requests) -> None:
    first = add(world, "a", "e1")
    assert os.WIFSIGNALED(forked(lambda: process(queue(world), settings=CHAIN) and 0, 20))
    first.rename(world.folder / "later.yaml")
    add(world, "b", "e2")
    process(queue(world), settings=CHAIN)
    (world.folder / "later.yaml").rename(first)
    process(queue(world), settings=CHAIN)
    assert [row.state for row in states(ledger(world))] == ["abandoned", "finished", "finished"]
    shutil.rmtree(ledger(world).folder / states(ledger(world))[0].run)  # nothing needs it
    assert passed(verify(ledger(world)))


def test_an_altered_ledger_stops_the_queue(world: Requests) -> None:
    add(world, "a", "e1", criteria=IMPOSSIBLE)
    (queue(world) / "runs").mkdir()
    ledger(world).path.write_text("{}\n")
    with pytest.raises(IntegrityError, match="line 1"):
        process(queue(world))
    assert ledger(world).path.read_text() == "{}\n"


def test_no_folder_and_no_ledger(world: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="folder of request files"):
        process(world.folder / "nowhere")
    monkeypatch.setenv("UNLEARN_LEDGER", "")
    with pytest.raises(UsageError, match="none kept"):
        process(queue(world))


def test_on_the_command_line(world: Requests, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    add(world, "a", "e1", criteria=IMPOSSIBLE)
    code, out, err = run("queue", queue(world), "--chain", "--display", "json")
    assert code == 1
    summary = json.loads(out)
    assert summary["schema"] == "unlearn.queue/v1"
    assert all(json.loads(line) for line in err.splitlines())
    code, out, err = run("queue", queue(world), "--chain", "--exit-zero", "--display", "plain")
    assert code == 0
    assert "carried out before" in out
    assert run("queue", queue(world), "--advance", "always")[0] == 2
    store = queue(world) / "runs"
    code, out, _ = run("ledger", "list", "--ledger", store)
    assert (code, out.splitlines()[1].split()[:2]) == (0, ["2", "finished"])
    assert json.loads(run("ledger", "list", "--ledger", store, "--display", "json")[1])["requests"][0]["n"] == 2
    assert run("ledger", "show", "3", "--ledger", store)[0] == 0
    assert run("ledger", "show", "77", "--ledger", store)[0] == 2
    assert run("ledger", "verify", "--ledger", store)[0] == 0
    path = store / "ledger.jsonl"
    path.write_text(path.read_text().replace("criteria not met", "criteria met", 1))
    code, out, _ = run("ledger", "verify", "--ledger", store, "--display", "json")
    assert (code, json.loads(out)["sound"]) == (4, False)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace("run", "RUN"), *lines[2:]]))
    assert run("ledger", "verify", "--ledger", store)[0] == 4
    code, _, err = run("ledger", "list", "--ledger", store)
    assert (code, "line 3" in err) == (4, True)
    code, _, err = run("queue", queue(world))
    assert (code, "line 3" in err) == (4, True)
    code, _, err = run("ledger", "list", "--ledger", world.folder)
    assert (code, len(err.splitlines())) == (2, 1)
