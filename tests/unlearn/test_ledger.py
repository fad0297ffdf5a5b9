"""The ledger file: nothing is lost by two writers or by a kill, and no line can be changed unseen."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from probes.errors import IntegrityError, ResourceError, UsageError
from unlearn.ledger.chain import NAME, Ledger, closing, mac, parse
from unlearn.runs.pseudonyms import pseudonym

ROOT = Path(__file__).resolve().parents[2]


def append(ledger: Ledger, *names: str) -> None:
    for name in names:
        with ledger.locked() as session:
            session.append(("opened", {"run": name}))


def runs(ledger: Ledger) -> list[str]:
    return [entry.data["run"] for entry in ledger.entries() if entry.event == "opened"]


def test_entries_are_numbered_and_chained(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "store")
    assert not ledger.exists()
    assert ledger.entries() == []
    append(ledger, "a", "b")
    entries = ledger.entries()
    assert [(entry.n, entry.event) for entry in entries] == [(1, "created"), (2, "opened"), (3, "opened")]
    lines = [json.loads(line) for line in ledger.path.read_bytes().splitlines()]
    assert [line["prev_sha256"] for line in lines] == ["0" * 64, entries[0].sha256, entries[1].sha256]
    assert ledger.entries() == entries


def test_several_entries_are_flushed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(descriptor))
    with Ledger(tmp_path).locked() as session:
        added = session.append(("opened", {"run": "a"}), ("failed", {"opened": 2, "run": "a"}))
    assert len(flushed) == 1
    assert [entry.n for entry in added] == [1, 2, 3]
    assert closing(added)[2].event == "failed"


@pytest.mark.parametrize("line", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["changed", "removed", "swapped", "junk", "emptied", "renumbered"])
def test_an_altered_line_is_refused_by_its_number(tmp_path: Path, line: int, how: str) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a", "b", "c", "d")
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    altered = list(lines)
    if how == "changed":
        altered[line] = lines[line].replace(b'"time": "2', b'"time": "1')
    elif how == "removed":
        del altered[line]
    elif how == "swapped":
        altered[line], altered[line + 1] = altered[line + 1], altered[line]
    elif how == "junk":
        altered[line] = b"\xff\x00 no json\n"
    elif how == "emptied":
        altered[line] = b"\n"
    else:
        altered[line] = lines[line].replace(f'"n": {line + 1}'.encode(), b'"n": 9')
    assert altered != lines
    first = line + 2 if how == "changed" else line + 1  # a changed line is found by the next one's digest
    ledger.path.write_bytes(b"".join(altered))
    before = ledger.path.read_bytes()
    with pytest.raises(IntegrityError, match=f"line {first} of {NAME}"):
        ledger.entries()
    with pytest.raises(IntegrityError, match=f"line {first} of {NAME}"), ledger.locked():
        raise AssertionError("nobody may write to an altered ledger")
    assert ledger.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_changed_last_line_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a")
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"n": 2', b'"n": 3'))
    with pytest.raises(IntegrityError, match="line 2"):
        ledger.entries()


@pytest.mark.parametrize("kept", [0, 1, 30, -2])
def test_a_line_cut_by_a_kill_is_kept_aside(tmp_path: Path, kept: int) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a", "b")
    whole = ledger.path.read_bytes()
    append(ledger, "never acknowledged")
    torn = ledger.path.read_bytes()[len(whole) :][: kept or None] if kept else b""
    ledger.path.write_bytes(whole + torn)
    assert runs(ledger) == ["a", "b"]  # a reader changes nothing
    assert ledger.path.read_bytes() == whole + torn
    append(ledger, "c")
    assert runs(ledger) == ["a", "b", "c"]
    assert ledger.path.read_bytes().startswith(whole)
    aside = [path for path in tmp_path.iterdir() if path.name != NAME]
    assert [path.read_bytes() for path in aside] == ([torn] if torn else [])
    assert [entry.data["bytes"] for entry in ledger.entries() if entry.event == "repaired"] == (
        [len(torn)] if torn else []
    )


def test_a_complete_entry_without_its_line_end_is_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a", "b")
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-1])
    append(ledger, "c")
    assert runs(ledger) == ["a", "b", "c"]
    assert ledger.path.read_bytes().startswith(whole)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_first_line_cut_by_a_kill(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.write_bytes(b'{"data": {"id"')
    assert ledger.entries() == []
    append(ledger, "a")
    assert runs(ledger) == ["a"]
    assert len(list(tmp_path.glob("ledger.torn-*"))) == 1


WRITER = """
import sys
from unlearn.ledger.chain import Ledger
ledger = Ledger(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    with ledger.locked() as session:
        session.append(("opened", {"run": f"{sys.argv[2]}-{i}"}))
    print(i, flush=True)
"""


def writer(store: Path, name: str, n: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store), name, str(n)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [writer(tmp_path, name, 40) for name in ("a", "b")]
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        start(process)
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = runs(Ledger(tmp_path))
    assert sorted(found) == sorted(f"{name}-{i}" for name in "ab" for i in range(40))
    for name in "ab":  # each one's own in its order
        assert [run for run in found if run.startswith(name)] == [f"{name}-{i}" for i in range(40)]


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    process = writer(tmp_path, "a", 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    start(process)
    said: list[int] = []
    reading = threading.Thread(target=lambda: said.extend(int(line) for line in process.stdout or ()))
    reading.start()
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reading.join()
    append(Ledger(tmp_path), "afterwards")
    found = runs(Ledger(tmp_path))
    assert len(said) > 3
    assert found[: len(said)] == [f"a-{i}" for i in said]
    assert found[-1] == "afterwards"
    assert len(found) <= len(said) + 2  # at most the one that was being acknowledged


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_kill_9_in_the_middle_of_a_write(tmp_path: Path, fraction: float) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a")
    whole = ledger.path.read_bytes()
    child = os.fork()
    if not child:
        try:
            with ledger.locked() as session:

                def torn(data: bytes) -> None:
                    session._handle.write(data[: int(len(data) * fraction)])
                    session._handle.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

                session._write = torn  # type: ignore[method-assign]
                session.append(("opened", {"run": "b"}))
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    append(ledger, "c")  # the lock went with the process
    assert runs(ledger) == ["a", "c"]
    assert ledger.path.read_bytes().startswith(whole)
    assert len(list(tmp_path.glob("ledger.torn-*"))) == (fraction > 0)


def test_kill_9_in_the_middle_of_a_repair(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a")
    torn = b'{"data": {"run": "torn'
    ledger.path.write_bytes(ledger.path.read_bytes() + torn)
    child = os.fork()
    if not child:
        try:
            real, count = os.fsync, [0]

            def fsync(descriptor: int) -> None:
                real(descriptor)
                count[0] += 1
                os.kill(os.getpid(), signal.SIGKILL)  # the copy aside is on disk, not yet under its name

            os.fsync = fsync
            append(ledger, "b")
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    append(ledger, "c")
    assert runs(ledger) == ["a", "c"]
    assert [path.read_bytes() for path in tmp_path.glob("ledger.torn-*")] == [torn]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    append(ledger, "a")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="free disk space"):
        append(ledger, "b")


def test_another_pseudonym_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "store")
    append(ledger, "a")
    (tmp_path / "other.key").write_text("another key, for this test alone\n")
    monkeypatch.setenv("UNLEARN_ID_KEY", str(tmp_path / "other.key"))
    with pytest.raises(UsageError, match="UNLEARN_ID_KEY"):
        append(ledger, "b")
    assert runs(ledger) == ["a"]  # reading needs no key


def test_a_ledger_of_another_version_is_refused() -> None:
    first = json.dumps({"n": 1, "time": "", "event": "created", "data": {"schema": "x"}, "prev_sha256": "0" * 64})
    with pytest.raises(UsageError, match=r"unlearn\.ledger/v1"):
        parse(first.encode() + b"\n")


def test_macs_need_the_key() -> None:
    assert mac(b"k" * 16, b"short") != mac(b"l" * 16, b"short")
    assert mac(b"k" * 16, b"short").startswith("hmac-sha256:")
    assert pseudonym("short", b"k" * 16)[2:] in mac(b"k" * 16, b"short")
