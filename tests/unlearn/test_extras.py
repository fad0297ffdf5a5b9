"""Files of canaries and of candidates: what is read, and every mistake by line without a word of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from probes.errors import UsageError
from tests.conftest import World
from unlearn import api
from unlearn.disk import file_sha256
from unlearn.records.extras import Canary, read_canaries, read_candidates, read_paraphrases

CANARY = {"id": "Vkpigeon", "prompt": "Zqcanary:", "format": "{digits:3}", "secret": "417"}
SECRETS = ("zqcanary", "vkpigeon", "xjwhistle", "417")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(read: Any, path: Path) -> str:
    with pytest.raises(UsageError) as stop:
        read(path)
    words = str(stop.value)
    assert [secret for secret in SECRETS if secret in words.lower()] == []
    return words


def test_canaries_in_the_order_of_the_file(tmp_path: Path) -> None:
    second = CANARY | {"id": "other", "prompt": " \u00e9:", "secret": "\u2028 5"}  # a line separator is no new line
    path = write(tmp_path / "c.jsonl", CANARY, "", "   ", second)
    path.write_text(path.read_text() + json.dumps(CANARY | {"id": "third", "prompt": "Third:"}, ensure_ascii=False))
    found = read_canaries(path)
    assert found[:2] == [Canary(**CANARY), Canary(**second)]
    assert found[2].id == "third"
    assert "Zqcanary" not in repr(found)
    assert "417" not in repr(found)


def test_candidates_by_record(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"id": "a", "candidates": ["x", "y"]}, {"id": "b", "candidates": ["z"]})
    assert read_candidates(path) == {"a": ["x", "y"], "b": ["z"]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"id": "Zqcanary', "one JSON object a line"),
        ('["Zqcanary"]', "one JSON object a line"),
        ("null", "one JSON object a line"),
        ({key: CANARY[key] for key in ("id", "prompt", "secret")}, "expected the fields id, prompt, format, secret"),
        (CANARY | {"Xjwhistle": 1}, "expected the fields"),
        (CANARY | {"id": ""}, "`id`"),
        (CANARY | {"id": 7}, "`id`"),
        (CANARY | {"prompt": None}, "`prompt`"),
        (CANARY | {"format": ["{digits:3}"]}, "`format`"),
        (CANARY | {"secret": 417}, "`secret`"),
    ],
)
def test_wrong_canaries_by_line(row: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.jsonl", CANARY | {"id": "good"}, "", row)
    message = refused(read_canaries, path)
    assert words in message
    assert "wrong.jsonl:3: " in message
    assert message.startswith("canaries: 1 mistake\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "b", "candidates": []}, "non-empty list of texts"),
        ({"id": "b", "candidates": "Xjwhistle"}, "non-empty list of texts"),
        ({"id": "b", "candidates": ["Xjwhistle", "Xjwhistle"]}, "different non-empty texts"),
        ({"id": "b", "candidates": ["Xjwhistle", ""]}, "different non-empty texts"),
        ({"id": "b", "candidates": ["Xjwhistle", 417]}, "different non-empty texts"),
        ({"id": "b", "candidates": [["Xjwhistle"]]}, "different non-empty texts"),
        ({"id": "a", "candidates": ["Xjwhistle"]}, "no earlier line"),
        ({"id": "b"}, "expected the fields id, candidates"),
    ],
)
def test_wrong_candidates_by_line(row: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.jsonl", {"id": "a", "candidates": ["x"]}, row)
    message = refused(read_candidates, path)
    assert words in message
    assert "wrong.jsonl:2: " in message


def test_paraphrases_by_record(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "a", "prompts": ["x?", "\u00bfx?"]}, "", {"id": "b", "prompts": ["y?"]})
    assert read_paraphrases(path) == {"a": ["x?", "\u00bfx?"], "b": ["y?"]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "b", "prompts": []}, "non-empty list of texts"),
        ({"id": "b", "prompts": "Xjwhistle"}, "non-empty list of texts"),
        ({"id": "b", "prompts": ["Xjwhistle", "Xjwhistle"]}, "different non-empty texts"),
        ({"id": "b", "prompts": ["Xjwhistle", " \n"]}, "different non-empty texts"),
        ({"id": "b", "prompts": ["Xjwhistle", 417]}, "different non-empty texts"),
        ({"id": "a", "prompts": ["Xjwhistle"]}, "no earlier line"),
        ({"id": "b", "candidates": ["Xjwhistle"]}, "expected the fields id, prompts"),
    ],
)
def test_wrong_paraphrases_by_line(row: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.jsonl", {"id": "a", "prompts": ["x"]}, "", row)
    message = refused(read_paraphrases, path)
    assert words in message
    assert "wrong.jsonl:3: " in message
    assert message.startswith("paraphrases: 1 mistake\n")


def test_every_mistake_at_once(tmp_path: Path) -> None:
    rows = [CANARY | {"id": f"c{i}", "secret": i} for i in range(60)]
    message = refused(read_canaries, write(tmp_path / "wrong.jsonl", *rows))
    assert message.startswith("canaries: 60 mistakes\n")
    assert message.endswith("and 10 more")


@pytest.mark.parametrize("read", [read_canaries, read_candidates, read_paraphrases])
def test_files_that_cannot_be_read(read: Any, tmp_path: Path) -> None:
    assert "found none that can be read" in refused(read, tmp_path / "Zqcanary-absent.jsonl")
    assert "found none that can be read" in refused(read, tmp_path)
    assert "found an empty file" in refused(read, write(tmp_path / "empty.jsonl", "", "  "))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "Zqc\u00e4nary"}\n'.encode("latin-1"))
    assert "UTF-8" in refused(read, latin)


def test_endless_nesting_is_a_mistake(tmp_path: Path) -> None:
    assert "mistake" in refused(read_canaries, write(tmp_path / "deep.jsonl", "[" * 100_000))


@pytest.mark.parametrize(
    "name",
    [
        "canaries",
        "candidates",
    ],
)  # fmt: skip
def test_an_audit_refuses_malformed_files_before_a_model_runs(name: str, world: World, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "schema: unlearn.suite/v1\nname: own\ndescription: for tests\nconfirm: false\nnoise_floor: {records: 2}\n"
        "attacks: [{name: pii.inference}, {name: exposure.canaries, n: 20}]\n"
    )
    wrong = write(tmp_path / "wrong.jsonl", {"id": "a"})
    with pytest.raises(UsageError, match="expected the fields"):
        api.audit(
            world.planted, world.records, control=world.control, suite=suite, out=tmp_path / "run", **{name: wrong}
        )
    assert not (tmp_path / "run" / "before").exists()


@pytest.mark.parametrize("name", ["canaries", "candidates", "corpus"])
def test_absent_files_are_refused_at_once(name: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"expected a file of {name}, found none"):
        api.audit(world.planted, world.records, out=tmp_path / "run", **{name: tmp_path / "absent.jsonl"})
    assert not (tmp_path / "run").exists()


def test_what_was_read_is_noted_by_its_digest(world: World, tmp_path: Path) -> None:
    canaries = write(tmp_path / "c.jsonl", CANARY | {"format": " {digits:3}", "secret": " 417"})
    run = api.attack("exposure.canaries", world.planted, canaries=canaries, settings={"n": 20}, out=tmp_path / "run")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    noted = [event["data"] for event in events if event["event"] == "input.read"]
    assert noted == [{"what": "canaries", "sha256": "sha256:" + file_sha256(canaries)}]
