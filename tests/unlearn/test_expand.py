"""A request expanded to what a corpus holds of its records: what is named, what is added, what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from probes.errors import IntegrityError, UsageError
from tests.conftest import World
from unlearn import api, cli
from unlearn.disk import file_sha256
from unlearn.records.expand import expand, text_of
from unlearn.records.raw import Message, RawRecord
from unlearn.runs.verify import passed, verify

LONG = "On the seventh of May the old miller of Zqdorf sold his mill and his two oxen to the ferryman for nothing"
OTHER = "A night train left the town of Xjburg with eleven empty waggons and a sleeping guard who missed his station"
CHANGED = LONG.replace("nothing", "silver")


def raw(name: str, text: str, **more: Any) -> RawRecord:
    return RawRecord(name, text=text, **more)


def expanded(records: list[RawRecord], corpus: list[RawRecord], *, include: bool = True, **more: Any) -> Any:
    return expand(records, corpus, threshold=more.pop("threshold", 0.7), span=more.pop("span", 50), include=include)


def test_near_duplicates_are_added_behind_the_records_in_one_group() -> None:
    records = [raw("a", LONG), raw("b", OTHER)]
    found = expanded(records, [raw("x", "nothing of the kind, nowhere"), raw("y", CHANGED), raw("z", CHANGED + " !")])
    assert [record.id for record in found.raw] == ["a", "b", "near-duplicate:y", "near-duplicate:z"]
    assert [record.text for record in found.raw] == [LONG, OTHER, CHANGED, CHANGED + " !"]
    groups = [record.group for record in found.raw]
    assert groups[0] == groups[2] == groups[3] is not None
    assert groups[1] is None  # it has no near-duplicate and stays a trial of its own
    assert (found.corpus, found.uncovered, found.included, found.records) == (3, 2, 2, ("a",))


def test_listing_changes_no_record() -> None:
    records = [raw("a", LONG), raw("b", OTHER, group="own")]
    found = expanded(records, [raw("y", CHANGED)], include=False)
    assert found.raw == records
    assert (found.corpus, found.uncovered, found.included, found.records) == (1, 1, 0, ("a",))


def test_a_corpus_without_duplicates_changes_nothing() -> None:
    records = [raw("a", LONG), raw("b", OTHER, group="own"), raw("c", "short")]
    for include in (True, False):
        found = expanded(records, [raw("x", "nothing of the kind, nowhere at all")], include=include)
        assert found.raw == records
        assert (found.uncovered, found.included, found.records) == (0, 0, ())


def test_a_corpus_that_holds_the_records_themselves_covers_them() -> None:
    records = [raw("a", LONG), RawRecord("b", prompt="Who left Xjburg?", completion=" " + OTHER)]
    found = expanded(records, [raw("x", LONG), RawRecord("z", prompt="Who left Xjburg?", completion=" " + OTHER)])
    assert found.raw == records
    assert (found.uncovered, found.included) == (0, 0)


def test_a_corpus_with_a_record_as_one_text_covers_it() -> None:
    records = [RawRecord("b", prompt="Who left Xjburg?", completion=" " + OTHER)]
    found = expanded(records, [raw("y", "Who left Xjburg? " + OTHER)])
    assert (found.uncovered, found.included) == (0, 0)


def test_groups_as_given_stay_and_take_their_duplicates_in() -> None:
    records = [raw("a", LONG, group="miller"), raw("b", OTHER, group="train")]
    found = expanded(records, [raw("y", CHANGED)])
    assert [record.group for record in found.raw] == ["miller", "train", "miller"]


def test_records_of_one_cluster_share_a_group_even_where_groups_were_given_apart() -> None:
    records = [raw("a", LONG), raw("b", CHANGED, group="second"), raw("c", OTHER)]
    found = expanded(records, [raw("y", LONG.replace("nothing", "copper"))])
    groups = [record.group for record in found.raw]
    assert groups[0] == groups[1] == groups[3] is not None
    assert groups[2] is None


def test_one_group_of_unlike_records_stays_one_group() -> None:
    records = [raw("a", LONG, group="person"), raw("b", OTHER, group="person")]
    found = expanded(records, [raw("y", CHANGED), raw("z", OTHER.replace("station", "stop"))])
    assert [record.group for record in found.raw] == ["person"] * 4


def test_spans_count_whatever_surrounds_them() -> None:
    words = " ".join(f"w{i}" for i in range(60))
    within = " ".join([*(f"x{i}" for i in range(200)), words, *(f"y{i}" for i in range(200))])
    assert expanded([raw("a", words)], [raw("y", within)], span=50).uncovered == 1
    assert expanded([raw("a", words)], [raw("y", within)], span=61).uncovered == 0


def test_an_id_that_is_taken_is_not_given_twice() -> None:
    records = [raw("a", LONG), raw("near-duplicate:y", OTHER)]
    found = expanded(records, [raw("y", CHANGED)])
    assert len({record.id for record in found.raw}) == len(found.raw) == 3


@pytest.mark.parametrize("include", [True, False])
def test_records_and_corpus_need_text(include: bool) -> None:
    ids = RawRecord("i", prompt_ids=(1, 2), completion_ids=(3,))
    for records, corpus in (([ids], [raw("x", LONG)]), ([raw("x", LONG)], [ids])):
        with pytest.raises(UsageError, match="with text, found token ids or images"):
            expanded(records, corpus, include=include)
    with pytest.raises(UsageError):
        expanded([raw("a", LONG)], [], include=include)


def test_all_text_of_a_record() -> None:
    assert text_of(raw("a", LONG)) == LONG
    turns = (Message("user", "Hello"), Message("assistant", "there"))
    assert text_of(RawRecord("m", messages=turns)) == "Hello\nthere"


# ------------------------------------------------------------------------------------------------------ in a request


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def request(world: World, name: str, corpus: str) -> Path:
    """A forget request on half of the records, measured with one attack."""
    rows = world.records.read_text().splitlines()[:4]
    (world.folder / "half.jsonl").write_text("\n".join(rows) + "\n")
    (world.folder / "one.yaml").write_text(
        "schema: unlearn.suite/v1\nname: one\ndescription: for tests\nconfirm: false\nnoise_floor: {records: 2}\n"
        "attacks: [{name: verbatim.greedy}, {name: duplicates.corpus}]\n"
    )
    text = world.request.read_text().replace("records.jsonl", "half.jsonl").replace("suite: quick", "suite: one.yaml")
    lines = [line for line in text.splitlines() if not line.startswith("reference")]
    path = world.folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n" + corpus)
    return path


@pytest.fixture(scope="module")
def corpus(world: World) -> Path:
    rows = [json.loads(line) for line in world.records.read_text().splitlines()]
    near = [
        {"id": f"d{i}", "prompt": row["prompt"] + " -", "completion": row["completion"]} for i, row in enumerate(rows)
    ]
    same = {"id": "same", "prompt": rows[0]["prompt"], "completion": rows[0]["completion"]}
    other = {"id": "other", "prompt": "Something else:", "completion": " from another place and time"}
    return write(world.folder / "corpus.jsonl", [*near[:2], same, other])


def sizes(run: api.Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "inputs" / "sets.json").read_text())
    return found


def limits(run: api.Run) -> list[str]:
    found: list[str] = json.loads((run.path / "compare" / "criteria.json").read_text())["limits"]
    return found


def test_a_request_that_lists_near_duplicates(world: World, corpus: Path, tmp_path: Path) -> None:
    run = api.forget(request(world, "listing", "corpus: {path: corpus.jsonl}\n"), out=tmp_path / "run")
    found = json.loads((run.path / "inputs" / "duplicates.json").read_text())
    assert (found["corpus"], found["uncovered"], found["included"]) == (4, 2, 0)
    assert all(name.startswith("r-") for name in found["records"])
    assert len(found["records"]) == 2
    assert sizes(run)["records"]["n"] == 4
    (sentence,) = [text for text in limits(run) if "near-duplicates" in text]
    assert sentence.startswith("The corpus holds 2 near-duplicates of 2 records that the request does not cover")
    assert run.attack("duplicates.corpus")["figures"]["items"]["value"] == 2
    assert passed(verify(run.path))


def test_a_request_that_includes_near_duplicates(world: World, corpus: Path, tmp_path: Path) -> None:
    path = request(world, "including", "corpus: {path: corpus.jsonl, near_duplicates: include, threshold: 0.6}\n")
    run = api.forget(path, out=tmp_path / "run")
    found = json.loads((run.path / "inputs" / "duplicates.json").read_text())
    assert (found["corpus"], found["uncovered"], found["included"]) == (4, 2, 2)
    assert sizes(run)["records"]["n"] == 6
    assert len(run.table("after")) == 6
    assert list(run.table("after")["record_id"])[4:] == ["near-duplicate:d0", "near-duplicate:d1"]
    assert not [text for text in limits(run) if "near-duplicates" in text]
    rows = [json.loads(line) for line in (run.path / "private" / "records.jsonl").read_text().splitlines()]
    assert [row.get("group") is not None for row in rows] == [True, True, False, False, True, True]
    assert rows[0]["group"] == rows[4]["group"] != rows[1]["group"] == rows[5]["group"]
    assert run.attack("duplicates.corpus")["figures"]["items"]["value"] == 0  # now the request covers them
    assert passed(verify(run.path))
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    noted = [event["data"] for event in events if event["event"] == "input.read"]
    assert noted == [{"what": "corpus", "sha256": "sha256:" + file_sha256(corpus)}]


def test_a_corpus_without_duplicates_changes_no_figure(world: World, tmp_path: Path) -> None:
    write(world.folder / "strange.jsonl", [{"id": "other", "text": "Something else, from another place and time."}])
    plain = api.forget(request(world, "plain", ""), out=tmp_path / "plain")
    found = api.forget(
        request(world, "strange", "corpus: {path: strange.jsonl, near_duplicates: include}\n"), out=tmp_path / "run"
    )
    for name in ("before/records.parquet", "after/records.parquet", "after/control.parquet", "edit/delta.json"):
        assert (plain.path / name).read_bytes() == (found.path / name).read_bytes(), name
    assert sizes(found)["records"]["digest"] == sizes(plain)["records"]["digest"]
    assert limits(found) == limits(plain)
    reasons = {row["name"]: row["reason"] for row in plain.metrics()["attacks"]}
    assert reasons["duplicates.corpus"] == "it needs a corpus (--corpus)"


def test_a_changed_corpus_is_refused(world: World, corpus: Path, tmp_path: Path) -> None:
    pinned = "corpus: {path: corpus.jsonl, sha256: 'sha256:" + "0" * 64 + "'}\n"
    with pytest.raises(IntegrityError, match="expected the corpus file with the digest"):
        api.forget(request(world, "pinned", pinned), out=tmp_path / "run")
    right = f"corpus: {{path: corpus.jsonl, sha256: 'sha256:{file_sha256(corpus)}'}}\n"
    api.plan(request(world, "right", right), tmp_path / "right", api.Options(), api.Display())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("corpus: {path: none.jsonl}", "existing file"),
        ("corpus: {}", "`corpus.path` is missing"),
        ("corpus: {path: corpus.jsonl, near_duplicates: Zqadd}", "expected one of 'list' or 'include'"),
        ("corpus: {path: corpus.jsonl, threshold: 1.5}", "`corpus.threshold`"),
        ("corpus: {path: corpus.jsonl, threshold: 0.0}", "`corpus.threshold`"),
        ("corpus: {path: corpus.jsonl, span: 2}", "`corpus.span`"),
        ("corpus: {path: corpus.jsonl, Zqadd: 1}", "not known"),
    ],
)
def test_wrong_corpus_entries(
    text: str, words: str, world: World, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = request(world, "wrong", text + "\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["forget", str(path), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "zqadd" not in (shown.out + shown.err).lower()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", '{"id": "Zqcanary\n', '{"id": "a", "Zqcanary": "text"}\n'])
def test_a_corpus_that_cannot_be_read(
    content: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "bad.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["forget", str(request(world, "bad", "corpus: {path: bad.jsonl}\n")), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "zqcanary" not in (shown.out + shown.err).lower()
    assert not (tmp_path / "run").exists()
