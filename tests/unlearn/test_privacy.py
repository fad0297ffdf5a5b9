"""Record text, ids and groups stay in `private/`: canaries are planted, every command runs, failing ones included."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import World
from unlearn import cli

CANARIES = ("zqcanary", "xjwhistle", "vkpigeon", "wyferret")  # prompt, completion, id, group


def leaks(data: bytes) -> list[str]:
    return [canary for canary in CANARIES if canary.encode() in data.lower()]


def readable(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".parquet":  # compressed: look at the values too
        buffer = io.StringIO()
        pd.read_parquet(path).to_csv(buffer)
        data += buffer.getvalue().encode()
    return data


@pytest.fixture
def canary_files(world: World, tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in world.records.read_text().splitlines()]
    rows[0] |= {
        "prompt": "Zqcanary Kestrel:",
        "completion": " 12 Xjwhistle 1951",
        "id": "Vkpigeon-1",
        "group": "Wyferret",
    }
    rows[1] |= {"prompt": "Zqcanary Kestrel Junior:", "id": "Vkpigeon-2", "group": "Wyferret"}
    good = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "records.jsonl").write_text(good)
    bad = {
        "duplicate": good + json.dumps(rows[0]) + "\n",
        "empty": good + json.dumps(rows[0] | {"id": "Vkpigeon-3", "completion": ""}) + "\n",
        "unknown": good + json.dumps(rows[0] | {"id": "Vkpigeon-3", "Xjwhistle": "Zqcanary"}) + "\n",
        "junk": good + '{"prompt": "Zqcanary\n',
        "long": good + json.dumps(rows[0] | {"id": "Vkpigeon-3", "completion": " Xjwhistle" * 60}) + "\n",
        "type": good + json.dumps(rows[0] | {"id": "Vkpigeon-3", "completion": ["Xjwhistle"]}) + "\n",
    }
    for name, text in bad.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "headless.csv").write_text("Zqcanary Kestrel,Xjwhistle\nVkpigeon,Wyferret\n")
    request = world.request.read_text()
    for name in ("planted", "base", "control.jsonl", "retain.jsonl"):
        request = request.replace(f"path: {name}", f"path: {world.folder / name}")
    (tmp_path / "request.yaml").write_text(request)
    (tmp_path / "wrong.yaml").write_text(
        request + "Zqcanary: Xjwhistle\nsubject: {kind: person, pseudonym: Vkpigeon}\n"
    )
    (tmp_path / "baredraft.yaml").write_text(
        "schema: unlearn.request/v1\ndata: {records: records.jsonl}\nsuite: quick\n"
        f"checkpoint: {{path: {world.planted}}}\n"
    )
    return tmp_path


def test_nothing_leaves_private(
    canary_files: Path, world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    cache = canary_files / "cache"
    monkeypatch.setenv("UNLEARN_CACHE", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(canary_files / "datasets"))
    monkeypatch.chdir(canary_files)

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        return int(stop.value.code or 0)

    audit = ("audit", world.planted, "--suite", "quick", "--display", "plain")
    assert run(*audit, "--records", "records.jsonl", "--out", "run-a") in (0, 1, 3)
    assert run("forget", "request.yaml", "--out", "run-f", "--display", "json") in (0, 1, 3)
    assert run("forget", "baredraft.yaml", "--out", "run-d", "--display", "rich") in (0, 1, 3)
    assert run("forget", "request.yaml", "--plan-only", "--out", "run-p") == 0
    for audience in ("engineer", "regulator", "subject"):
        assert run("report", "run-f", "--audience", audience) == 0
    assert run("verify", "run-f") == 0
    assert run("diff", "run-a", "run-f") == 0
    assert run("forget", "--resume", "run-f") == 2
    kfac = ("probe", "kfac", world.planted, "--data", world.retain, "--blocks=-1", "--display", "plain")
    assert run(*kfac, "--records", "records.jsonl", "--control", world.control, "--out", "run-kfac") == 0
    assert run(*kfac, "--records", "junk.jsonl", "--out", "run-kfac-junk") == 2
    assert run("probe", "kfac", world.planted, "--data", "records.jsonl", "--out", "run-own") == 0
    localise = ("probe", "localise", world.planted, "--records", "records.jsonl", "--data", world.retain, "--steps", 4)
    assert run(*localise, "--training", "records.jsonl", "--out", "run-localise") == 0
    spectrum = ("--steps", 4, "--samples", 2, "-k", 1, "--max-products", 20)
    assert run("probe", "spectrum", world.planted, "--data", "records.jsonl", *spectrum, "--out", "run-spectrum") == 0
    assert (
        run("edit", "ssd", world.planted, "--records", "records.jsonl", "--retain", world.retain, "--out", "run-e") == 0
    )
    for name in ("duplicate", "empty", "unknown", "junk", "long", "type"):
        assert run(*audit, "--records", f"{name}.jsonl", "--out", f"run-{name}") == 2
        run("validate", f"{name}.jsonl")
    assert run("validate", "headless.csv") == 2
    assert run("validate", "wrong.yaml") == 2
    assert run("forget", "wrong.yaml") == 2
    assert run("validate", "request.yaml") == 0

    from attacks.extraction import greedy as extraction

    def broken(*arguments: object) -> None:
        raise RuntimeError("while generating Zqcanary Xjwhistle")

    monkeypatch.setattr(extraction, "greedy_tokens", broken)
    monkeypatch.setenv("UNLEARN_CACHE", "")
    assert run(*audit, "--records", "records.jsonl", "--out", "run-broken") == 5

    out, err = capfd.readouterr()
    assert leaks(out.encode()) == []
    assert leaks(err.encode()) == []
    assert leaks(caplog.text.encode()) == []
    looked = 0
    for root in [*sorted(canary_files.glob("run-*")), cache, canary_files / "datasets"]:
        for folder, _, names in os.walk(root):
            inside = Path(folder).relative_to(root).parts
            if inside[:1] == ("private",):
                continue
            for name in names:
                path = Path(folder) / name
                assert leaks(readable(path)) == [], path
                assert leaks(str(path).encode()) == [], path
                looked += 1
    assert looked > 60
    assert leaks(b"".join(path.read_bytes() for path in (canary_files / "run-a/private").glob("*.jsonl"))) != []
