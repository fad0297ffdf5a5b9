"""The run folder: atomic files, stages that are done once, a chain nobody can edit unseen, one writer at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from probes.errors import IntegrityError, ResourceError, UsageError
from unlearn.runs import folder as runfolder
from unlearn.runs.folder import RunFolder, check_chain, digest, jsonable, read_header

HEADER = {"kind": "audit"}


def make(path: Path) -> RunFolder:
    return RunFolder.create(path, HEADER, [])


def test_a_stage_is_done_once_and_survives_resume(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with run.stage("before"):
        run.write_json("before/metrics.json", {"b": 1, "a": float("nan")})
    assert (tmp_path / "run/before/metrics.json").read_text() == '{\n  "a": null,\n  "b": 1\n}\n'
    run.close()
    again = RunFolder.resume(tmp_path / "run")
    assert again.done("before")
    assert not again.done("after")


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(RuntimeError), run.stage("before"):
        run.write_json("before/metrics.json", {})
        raise RuntimeError
    assert not run.done("before")


def test_a_changed_output_is_refused_on_resume(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with run.stage("before"):
        path = run.write_json("before/metrics.json", {"a": 1})
    run.close()
    path.write_text('{"a": 2}\n')
    with pytest.raises(IntegrityError, match=r"before/metrics\.json"):
        RunFolder.resume(tmp_path / "run").done("before")


def test_the_chain_breaks_at_the_altered_line(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for i in range(4):
        run.event("note", number=i)
    run.close()
    path = tmp_path / "run/events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(check_chain(b"".join(lines))) == 5
    for altered in (
        [*lines[:2], lines[2].replace(b'"number": 1', b'"number": 9'), *lines[3:]],  # edited
        [*lines[:2], *lines[3:]],  # removed
        [lines[1], lines[0], *lines[2:]],  # reordered
        [*lines[:2], b"{}\n", *lines[3:]],  # replaced
        [*lines[:2], b"\xff\xfe\n", *lines[3:]],  # junk
    ):
        with pytest.raises(IntegrityError, match="event chain"):
            check_chain(b"".join(altered))
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(IntegrityError, match="event chain"):
        RunFolder.resume(tmp_path / "run")


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.event("note", number=1)
    run.close()
    path = tmp_path / "run/events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "2026-')
    again = RunFolder.resume(tmp_path / "run")
    assert [event["event"] for _, event in check_chain(path.read_bytes())] == ["run.created", "note", "run.resumed"]
    assert again.last_event("note") == {"number": 1}


def test_one_writer(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(UsageError, match="in use by another process"):
        RunFolder.resume(tmp_path / "run")
    run.close()
    RunFolder.resume(tmp_path / "run").close()


def test_private_is_private(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert (tmp_path / "run/private").stat().st_mode & 0o777 == 0o700


def test_an_existing_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run").close()  # empty is fine
    with pytest.raises(UsageError, match="new or empty"):
        make(tmp_path / "run")


@pytest.mark.parametrize("where", ["ckpt", "ckpt/run", "other/../ckpt/deep/run", "link/run"])
def test_output_inside_the_input_is_refused(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match="apart from the input"):
        RunFolder.create(Path(where), HEADER, [tmp_path / "ckpt"])
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "run")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with run.stage("before"):
        run.write_json("before/metrics.json", {"a": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="disk space"):
            run.write_json("before/metrics.json", {"a": 2})
        monkeypatch.undo()
    assert json.loads((tmp_path / "run/before/metrics.json").read_text()) == {"a": 1}


def test_tables_are_the_same_bytes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"record_id": ["r-1", "r-2"], "loss": [0.5, float("inf")]})
    run = make(tmp_path / "run")
    with run.stage("before"):
        first = run.write_table("before/records.parquet", frame).read_bytes()
        assert run.write_table("before/records.parquet", frame.copy()).read_bytes() == first
    pd.testing.assert_frame_equal(run.read_table("before/records.parquet"), frame)


@pytest.mark.parametrize("content", [None, b"\x00\x01junk", b"[]", b'{"schema": "other/v1"}'])
def test_no_run_folder(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"expected (a run folder|run\.json)"):
        read_header(tmp_path)


def test_digests_do_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert jsonable({"x": (1, float("-inf"))}) == {"x": [1, None]}


def test_heartbeats_are_rate_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "run")
    saved: list[int] = []
    monkeypatch.setattr(runfolder.RunFolder, "_save_header", lambda self: saved.append(1))
    for _ in range(100):
        run.heartbeat()
    assert len(saved) == 1
