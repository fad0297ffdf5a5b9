"""Results of attacks in the report of an audit or forget run, and the documents of a run of one attack."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from jsonschema import Draft202012Validator
from markupsafe import Markup

import reports
from reports import ReportError, attack_schema, build, check, load_report, report_schema, write
from reports.blocks import Chart, Items
from reports.build import dumps
from reports.sections.attack_charts import ROWS
from reports.sections.attack_details import Room
from tests.reports.synthetic import HOSTILE, PROBES, digest, dump, write_attack_run, write_probe_run, write_run
from tests.reports.synthetic_attacks import (
    ATTACKS,
    CONFOUNDED,
    NOT_RUN,
    curve,
    figure,
    listed,
    result,
    write_attacks,
)
from tests.reports.test_documents import FORBIDDEN, Page, section

Json = dict[str, Any]
EVERY = tuple(ATTACKS)
RUNS: dict[str, dict[str, Any]] = {
    "forget": {"attacked": EVERY, "n": 60, "residue": 0.1},
    "confounded": {"attacked": EVERY, "confounded": True},
    "audit": {"kind": "audit", "attacked": EVERY},
    "old": {},
    "attack": {"kind": "attack", "attacked": ("membership.loss",), "confounded": True},
    "sweep": {"kind": "attack", "attacked": ("verbatim.sweep",)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("attacks")
    made = {name: write_run(root / name, blocks=2, **options) for name, options in RUNS.items()}
    for name, run in made.items():
        write(run)
        if RUNS[name].get("kind") != "attack":
            write(run, audience="regulator")
            write(run, audience="subject")
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", blocks=2, attacked=EVERY)


def document(run: Path, name: str) -> str:
    return (run / "report" / name).read_text(encoding="utf-8")


def change(run: Path, attack: str, edit: Callable[[Json], object], stage: str = "before") -> None:
    """Alter one result file."""
    path = run / stage / "attacks" / f"{attack}.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def validated(run: Path) -> Json:
    report: Json = json.loads(dumps(build(run)))
    schema = attack_schema() if report["run"]["kind"] == "attack" else report_schema()
    assert [error.message for error in Draft202012Validator(schema).iter_errors(report)] == []
    return report


def row_of(report: Json, name: str) -> Json:
    found: Json = next(row for row in report["attacks"] if row["name"] == name)
    return found


def line_of(text: str, start: str) -> list[str]:
    """Cells of the first table row that begins with these words."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_matches_its_schema(runs: dict[str, Path], name: str) -> None:
    Draft202012Validator.check_schema(attack_schema())
    report = validated(runs[name])
    found = report["run"]["attacks"]
    assert tuple(found) == ("after", "before", "reference")
    stages = [stage for stage in ("before", "after", "reference") if found[stage]]
    expected = {"audit": ["before", "reference"], "old": [], "attack": ["before"], "sweep": ["before"]}
    assert stages == expected.get(name, ["before", "after", "reference"])
    for stage in stages:
        assert sorted(found[stage]) == sorted(RUNS[name]["attacked"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("membership.loss", "figures", "auc"), 0.9),
        (("membership.loss", "figures", "auc", "ci_low"), "low"),
        (("membership.loss", "surprise"), 1),
        (("membership.loss", "status"), "skipped"),
        (("membership.loss", "curves", 0, "kind"), "pie"),
        (("membership.loss", "curves", 0, "x", "scale"), "cubic"),
        (("membership.loss", "curves", 0, "series", 0, "x"), [None]),
        (("membership.loss", "notes"), "a note"),
        (("membership.loss", "cost", "watts"), 1.0),
        (("duplicates.corpus", "tables", 0, "rows", 0, 0), ["a list"]),
    ],
)
def test_the_schema_refuses(runs: dict[str, Path], path: tuple[Any, ...], value: object) -> None:
    report = json.loads(dumps(build(runs["forget"])))
    place = report["run"]["attacks"]["before"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert not Draft202012Validator(report_schema()).is_valid(report)


def test_details_are_required_and_null_where_a_stage_has_none(runs: dict[str, Path]) -> None:
    report = json.loads(dumps(build(runs["old"])))
    assert report["run"]["attacks"] == {"before": None, "after": None, "reference": None}
    assert not any("hits" in (row[stage] or {}) for row in report["records"] for stage in ("before", "after"))
    del report["run"]["attacks"]
    assert not Draft202012Validator(report_schema()).is_valid(report)


def test_the_numbers_are_those_of_the_files(runs: dict[str, Path]) -> None:
    report = build(runs["forget"])
    for stage in ("before", "after", "reference"):
        for name in EVERY:
            raw = json.loads((runs["forget"] / stage / f"attacks/{name}.json").read_text())
            shown = report["run"]["attacks"][stage][name]
            assert set(shown) == set(raw) - {"schema", "attack"}
            for key in ("headline", "titles", "not_resolvable", "column", "notes"):
                assert shown[key] == raw[key]
            for part in ("figures", "control"):
                assert shown[part].keys() == raw[part].keys()
                for key, value in raw[part].items():
                    expected = value["value"] if value["value"] is None else pytest.approx(value["value"], rel=1e-8)
                    assert shown[part][key]["value"] == expected
            for got, given in zip(shown["curves"], raw["curves"], strict=True):
                for a, b in zip(got["series"], given["series"], strict=True):
                    assert a["x"] == pytest.approx(b["x"], rel=1e-8)
                    assert a["y"] == pytest.approx(b["y"], rel=1e-8)


def test_an_attack_with_a_result_takes_its_arms_from_the_comparison(runs: dict[str, Path], run: Path) -> None:
    paired = json.loads((run / "compare/paired.json").read_text())
    given = paired["attacks"]["verbatim.sweep"]
    given["arms"]["U"] = figure(0.123, 20)
    given["arms"]["R"] = None
    given["residual"] = figure(0.456, 20, 0.1, "ratio") | {"status": "ok", "reason": None}
    dump(run / "compare/paired.json", paired)
    report = validated(run)
    row = row_of(report, "verbatim.sweep")
    assert row["arms"]["U"]["value"] == 0.123
    assert row["arms"]["R"] is None
    assert row["residual"]["value"] == 0.456
    assert row["metric"] == "best_start"
    one_pass = row_of(report, "verbatim.greedy")  # no result of its own: as before
    assert (
        one_pass["arms"]["O"]
        == report["run"]["measurements"]["before"]["sets"]["records"]["figures"]["extraction.greedy"]
    )
    assert one_pass["metric"] == "extraction.greedy"


def test_without_a_comparison_the_arms_are_the_headlines(run: Path) -> None:
    paired = json.loads((run / "compare/paired.json").read_text())
    del paired["attacks"]
    dump(run / "compare/paired.json", paired)
    report = validated(run)
    details, row = report["run"]["attacks"], row_of(report, "near_verbatim.greedy")
    for arm, stage in (("O", "before"), ("U", "after"), ("R", "reference")):
        assert row["arms"][arm] == details[stage]["near_verbatim.greedy"]["figures"]["near_copies"]
    assert row["arms"]["N"] == details["after"]["near_verbatim.greedy"]["control"]["near_copies"]
    assert row["residual"] is None


def test_an_attack_that_never_asks_the_model_counts_as_run_after_the_edit(run: Path) -> None:
    """The pipeline runs it once, on the checkpoint as given; another attack that did not run again has not run."""
    metrics = json.loads((run / "after/metrics.json").read_text())
    for row in metrics["attacks"]:
        if row["name"] in ("duplicates.corpus", "verbatim.sweep"):
            row |= {"status": "not_run", "reason": "see the checkpoint as given", "detail": False}
    dump(run / "after/metrics.json", metrics)
    for name in ("duplicates.corpus", "verbatim.sweep"):
        (run / f"after/attacks/{name}.json").unlink()
    report = validated(run)
    row = row_of(report, "duplicates.corpus")
    assert (row["status"], row["reason"], row["arms"]["O"]["value"]) == ("run", None, 30.0)
    row = row_of(report, "verbatim.sweep")
    assert (row["status"], row["reason"]) == ("not_run", "see the checkpoint as given")
    assert row["arms"] == dict.fromkeys("OUNR")


def test_a_residual_may_be_a_reason_alone(run: Path) -> None:
    paired = json.loads((run / "compare/paired.json").read_text())
    paired["attacks"]["membership.loss"]["residual"] = {"status": "not testable", "reason": "no fixed range"}
    dump(run / "compare/paired.json", paired)
    found = row_of(validated(run), "membership.loss")["residual"]
    assert (found["status"], found["value"], found["reason"]) == ("not testable", None, "no fixed range")
    write(run)
    text = section(document(run, "report.md"), "Attacks")
    assert line_of(text, "Membership: loss")[-1] == "not testable (no fixed range)"


def test_p_values_are_printed_with_their_adjustment(runs: dict[str, Path]) -> None:
    text = section(document(runs["forget"], "report.md"), "Attacks")
    said = "before p = 4.0e−4, 0.002 adjusted (Holm); after p = 0.310, 1.000 adjusted (Holm)"
    assert said in text.split("### Membership: loss\n")[1].split("### ")[0]


def test_a_residual_the_run_left_open_has_no_value(run: Path) -> None:
    paired = json.loads((run / "compare/paired.json").read_text())
    residual = figure(3.0, 20, 0.1, "ratio") | {"status": "not testable", "reason": "the gap is uncertain"}
    paired["attacks"]["memory.recognition"]["residual"] = residual
    dump(run / "compare/paired.json", paired)
    found = row_of(validated(run), "memory.recognition")["residual"]
    assert (found["status"], found["value"], found["reason"]) == ("not testable", None, "the gap is uncertain")


def test_a_headline_that_cannot_be_given_says_why(run: Path) -> None:
    def unresolved(found: Json) -> None:
        found["figures"].pop("auc")
        found["not_resolvable"]["auc"] = "8 non-members; 50 resolve an area"

    for stage in ("before", "after", "reference"):
        change(run, "membership.loss", unresolved, stage)
    paired = json.loads((run / "compare/paired.json").read_text())
    paired["attacks"]["membership.loss"] = {"arms": dict.fromkeys("OUNR"), "residual": None}
    dump(run / "compare/paired.json", paired)
    change(run, "membership.loss", lambda found: found["control"].update(auc=figure(0.5, 80, 0.1, "AUC")))
    row = row_of(validated(run), "membership.loss")
    assert row["reason"] == "not resolvable: 8 non-members; 50 resolve an area"
    write(run)
    text = section(document(run, "report.md"), "Attacks")
    assert line_of(text, "Membership: loss")[2] == "not resolvable: 8 non-members; 50 resolve an area"
    part = text.split("### Membership: loss\n")[1].split("### ")[0]
    cells = line_of(part, "AUC")  # the level of a score that separates nothing is known all the same
    assert cells[1] == "not resolvable (8 non-members; 50 resolve an area)"
    assert cells[2].startswith("0.500")


def test_missing_parts_and_numbers_that_are_none(run: Path) -> None:
    def bare(found: Json) -> None:
        for key in set(found) - {"schema", "attack", "status"}:
            del found[key]

    def broken(found: Json) -> None:
        series = found["curves"][0]["series"][0]
        series |= {"x": [0.1, math.nan, 0.3], "y": [math.inf, 0.2, 0.3], "low": [None, 0.1, None], "high": None}
        found["figures"]["best_start"] = figure(math.nan, 20, math.inf)
        found["cost"] = {"passes": math.nan}
        found["settings"] = {"share": math.nan}
        found["not_resolvable"] = {"longest_run": ""}

    for stage in ("before", "after", "reference"):
        change(run, "verbatim.sampled", bare, stage)
        change(run, "verbatim.sweep", broken, stage)
        change(run, "memory.recognition", lambda found: found.update(status="not_run"), stage)
    report = validated(run)
    shown = report["run"]["attacks"]["before"]["verbatim.sweep"]
    assert shown["curves"][0]["series"][0] == {"name": "records", "x": [0.3], "y": [0.3], "low": None, "high": None}
    assert shown["figures"]["best_start"]["value"] is None
    assert report["run"]["attacks"]["before"]["memory.recognition"]["reason"] == "no reason was recorded"
    write(run)
    Page(document(run, "report.html"))
    assert "not run, before: no reason was recorded." in document(run, "report.md")
    assert "not resolvable: no reason was recorded" in document(run, "report.md")
    for name in ("report.md", "report.html"):
        assert not re.search(r"\b(nan|inf|None|null)\b", document(run, name).partition("</style>")[2])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attacks/membership.loss.json", b"\xff secret"),
        ("attacks/membership.loss.json", b'["secret"]'),
        ("attacks/membership.loss.json", b'{"schema": "secret", "attack": "membership.loss"}'),
        ("attacks/membership.loss.json", b'{"schema": "unlearn.attack/v1", "attack": "membership.zlib"}'),
        ("attacks/secret.json", b'{"schema": "unlearn.attack/v1", "attack": "secret", "figures": ["secret"]}'),
        ("attacks/x.json", b'{"schema": "unlearn.attack/v1", "attack": "x", "notes": "secret"}'),
        ("attacks/x.json", b'{"schema": "unlearn.attack/v1", "attack": "x", "settings": ["secret"]}'),
        ("attacks/x.json", b'{"schema": "unlearn.attack/v1", "attack": "x", "curves": [{"kind": "secret"}]}'),
        (
            "attacks/x.json",
            b'{"schema": "unlearn.attack/v1", "attack": "x", "curves": [{"kind": "line", "title": "t", "series": '
            b'[{"name": "secret", "x": [1, 2], "y": [1]}]}]}',
        ),
        (
            "attacks/x.json",
            b'{"schema": "unlearn.attack/v1", "attack": "x", "tables": [{"title": "secret", "columns": ["a"], '
            b'"rows": [[1, 2]]}]}',
        ),
        (
            "attacks/x.json",
            b'{"schema": "unlearn.attack/v1", "attack": "x", "tables": [{"title": "t", "columns": ["a"], '
            b'"rows": [[["secret"]]]}]}',
        ),
        ("attacks/records.parquet", b"PAR1 secret"),
    ],
)
def test_a_damaged_result_is_one_clear_line(run: Path, name: str, content: bytes) -> None:
    (run / "before" / name).write_bytes(content)
    with pytest.raises(ReportError) as caught:
        build(run)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value).replace("attacks/secret.json", "")
    assert str(caught.value).startswith("expected ")


def test_columns_of_the_attacks_join_the_records(run: Path) -> None:
    path = run / "after/attacks/records.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    for row in rows:
        row |= {"x.y:hit": None, "x.y:rank": 3, "x.y:share": math.nan, "x.y:word": "text", "x.y:sure": True}
    rows[0] |= {"x.y:hit": True, "verbatim.sweep:hit": True, "membership.flagged:hit": True}
    rows[0] |= {"near_verbatim.greedy:hit": False, "verbatim.sampled:hit": False}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = {row["id"]: row for row in validated(run)["records"]}
    assert len(found) == len(rows)
    for row in rows:
        after = found[row["record_id"]]["after"]
        assert after["verbatim.sweep:score"] == pytest.approx(row["verbatim.sweep:score"], rel=1e-8)
        assert (after["x.y:rank"], after["x.y:share"], after["x.y:sure"]) == (3, None, True)
        assert "x.y:word" not in after
        assert not [key for key in after if key.endswith(":hit")]
        assert "greedy" in after  # the audit's own figures stay
    assert found[rows[0]["record_id"]]["after"]["hits"] == ["membership.flagged", "verbatim.sweep", "x.y"]
    assert "x.y" not in found[rows[1]["record_id"]]["after"]["hits"]


def test_without_an_answer_for_single_records_nothing_is_counted(run: Path) -> None:
    for stage in ("before", "after", "reference"):
        path = run / stage / "attacks/records.parquet"
        rows = [{"record_id": row["record_id"], "a:b": 1.0} for row in pyarrow.parquet.read_table(path).to_pylist()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert not any("hits" in row["after"] for row in validated(run)["records"])
    write(run)
    assert "at least one attack" not in section(document(run, "report.md"), "Records")


def test_control_records_enter_without_their_ids(runs: dict[str, Path]) -> None:
    control = pyarrow.parquet.read_table(runs["forget"] / "before/attacks/control.parquet").to_pylist()
    text = dumps(build(runs["forget"])).decode()
    assert control
    assert not any(row["record_id"] in text for row in control)


def test_records_are_worst_first_by_the_attacks_that_hit(runs: dict[str, Path], run: Path) -> None:
    rank = {"extracted": 0, "uncertain": 1, "not": 2}
    for name, stage in (("forget", "after"), ("audit", "before")):
        rows = build(runs[name])["records"]
        order = [(-len(r[stage]["hits"]), rank[r[stage]["greedy"]], -r[stage]["probability"]) for r in rows]
        assert order == sorted(order)
        assert order[0][0] < order[-1][0]
    after = pyarrow.parquet.read_table(run / "after/records.parquet").to_pylist()
    hits = pyarrow.parquet.read_table(run / "after/attacks/records.parquet").to_pylist()
    for row in hits:
        row |= {key: False for key in row if key.endswith(":hit")}
    after[0] |= {"greedy": "not", "probability": 0.01}
    hits[0] |= {"verbatim.sweep:hit": True}
    after[1] |= {"greedy": "extracted", "probability": 0.99}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(after), run / "after/records.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hits), run / "after/attacks/records.parquet")
    assert [row["id"] for row in build(run)["records"][:2]] == [after[0]["record_id"], after[1]["record_id"]]


def test_the_records_section_names_the_attacks_that_hit(runs: dict[str, Path]) -> None:
    report = build(runs["forget"])
    text = section(document(runs["forget"], "report.md"), "Records")
    worst = report["records"][0]
    cells = line_of(text.split("**Attacks that hit, worst record first**")[1], f"`{worst['id']}`")
    stages = [worst[stage]["hits"] for stage in ("after", "before", "reference")]
    assert cells[1:4] == [str(len(hits)) for hits in stages]
    assert cells[4] == "Verbatim: sampled; Verbatim: sweep; Near-verbatim: greedy; Membership: flagged"
    counts = [sum(bool(row[stage]["hits"]) for row in report["records"]) for stage in ("before", "after", "reference")]
    assert f"flagged as seen: {counts[0]} before, {counts[1]} after, {counts[2]} from the reference." in text
    assert f"hit by {len(stages[0])} attacks" in section(document(runs["forget"], "report.md"), "Summary")
    assert f"hit by {len(stages[0])} attacks" in document(runs["forget"], "report-regulator.md")
    audit = section(document(runs["audit"], "report.md"), "Records")
    assert "| Record | Attacks | Reference | Which |" in audit
    assert "before" not in audit
    for row in report["records"]:  # ids only: no control record, nothing but pseudonyms
        assert row["id"].startswith("r-")


def test_attacks_are_grouped_by_family_and_access(runs: dict[str, Path]) -> None:
    text = section(document(runs["forget"], "report.md"), "Attacks").split("### ")[0]
    heads = re.findall(r"^\| \*\*(.*?)\*\* \|", text, re.M)
    expected = ["Verbatim extraction", "Recollection", "Near-verbatim extraction", "Untargeted extraction"]
    expected += ["Exposure of canaries", "Personal data", "Membership inference", "Memory", "Near-duplicates"]
    expected += ["Attacks on the edit itself: 0 run, 2 not run; figures and outcomes in section 10"]
    assert heads == [*expected, f"Not run: {3 + len(NOT_RUN)} attacks"]
    group = text.split("| **Verbatim extraction** |")[1].split("| **")[0]
    names = re.findall(r"^\| (Verbatim: \w+).*?\| (A\d) \|", group, re.M)
    assert names == [
        ("Verbatim: greedy", "A0"),
        ("Verbatim: sweep", "A0"),
        ("Verbatim: strength", "A1"),
        ("Verbatim: sampled", "A1"),
    ]
    cells = line_of(text, "Exposure: canaries")
    assert cells[2] == "Exposure (bits)"
    assert cells[3] == "14.20 (95 % CI 13.10 to 15.30, n\u00a0=\u00a012)"
    rest = text.split("| **Not run")[1]
    assert "| not run: it needs a reference that never held the records | Membership: reference (A1); " in rest
    assert rest.count("| not run: ") == 4  # one row a reason


def test_a_long_list_of_attacks_is_whole_in_every_format(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", blocks=1)
    rows = [listed(("verbatim.sweep",))[0] | {"name": f"verbatim.a{i}", "figure": "loss"} for i in range(60)]
    for stage in ("before", "after"):
        metrics = json.loads((run / stage / "metrics.json").read_text())
        dump(run / stage / "metrics.json", metrics | {"attacks": [row | {"detail": False} for row in rows]})
    write(run)
    for name in ("report.md", "report.html"):
        text = document(run, name)
        assert len(set(re.findall(r"Verbatim: a\d+", text))) == 60


def test_the_banner_stands_above_membership_and_beside_each_figure(runs: dict[str, Path]) -> None:
    names = ("report.md", "report-regulator.md", "report.html", "report-regulator.html")
    for name in names:
        text = document(runs["confounded"], name)
        banner = f"Membership figures are confounded: {CONFOUNDED}"
        plain = text.replace("\\", "")
        assert banner in plain
        assert plain.index(banner) < plain.index("Attacks by goal and access")
    text = section(document(runs["confounded"], "report.md"), "Attacks")
    for score in ("loss", "zlib", "Min-K%", "ReCaLL", "flagged"):
        assert "confounded" in line_of(text, f"Membership: {score}")[2]
        assert f"Confounded: {CONFOUNDED}" in text.split(f"### Membership: {score}\n")[1].split("### ")[0].replace(
            "\\", ""
        )
    assert "confounded" not in line_of(text, "Membership: blind")[2]
    assert "confounded" not in line_of(text, "Verbatim: sweep")[2]
    assert "confounded" in section(document(runs["confounded"], "report.md"), "Residual risk and limits")
    assert "what they flag is no evidence" in section(document(runs["confounded"], "report.md"), "Records")
    for name in names:
        body = document(runs["forget"], name).partition("Appendix")[0]
        assert "confounded" not in body.lower()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "Membership figures are confounded: the sets differ, AUC 0.8 [0.7, 0.9].",
            "the sets differ, AUC 0.8 [0.7, 0.9]",
        ),
        ("the sets differ", "the sets differ, AUC 0.700 [0.640, 0.760]"),
    ],
)
def test_the_banner_repeats_nothing_and_lacks_nothing(run: Path, said: str, shown: str) -> None:
    change(run, "membership.loss", lambda found: found.update(confounded=said))
    change(run, "membership.blind", lambda found: found["figures"].update(auc=figure(0.7, 80, 0.06, "AUC")))
    write(run)
    text = document(run, "report.md").replace("\\", "")
    assert f"\nMembership figures are confounded: {shown}. They do not show" in text


def test_editions_differ_in_the_details_of_each_attack(runs: dict[str, Path]) -> None:
    engineer, regulator, subject = (
        Page(document(runs["forget"], f"report{name}.html")).text for name in ("", "-regulator", "-subject")
    )
    for words in (
        "Membership: loss: figures",
        "Membership: loss: ROC",
        "True positives at 1 % false ones",
        "Sampling rules",
    ):
        assert words in engineer
        assert words not in regulator
    for words in ("Attacks by goal and access", "Attacks that hit, worst record first", "Membership: loss"):
        assert words in regulator
    for words in ("Membership", "AUC", "attack"):
        assert words not in subject


def test_the_subject_learns_that_more_effort_got_a_record_out(run: Path) -> None:
    words = "With more effort, at least one of the records, or a close copy of it, was still got out."
    write(run, ["html"], "subject")
    report = load_report(run)
    assert not any("extracted after" in row["flags"] for row in report["records"])
    hits = {name for row in report["records"] for name in row["after"]["hits"]}
    assert ("near_verbatim.greedy" in hits) == (words in Page(document(run, "report-subject.html")).text) is True
    path = run / "after/attacks/records.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    kept = [{key: value for key, value in row.items() if "verbatim" not in key} for row in rows]
    kept[0]["membership.flagged:hit"] = True  # flagged as seen is not got out
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), path)
    write(run, ["html"], "subject")
    assert words not in Page(document(run, "report-subject.html")).text


def test_each_attack_shows_records_against_control(runs: dict[str, Path]) -> None:
    text = section(document(runs["forget"], "report.md"), "Attacks")
    part = text.split("### Near-verbatim: greedy\n")[1].split("### ")[0]
    head = line_of(part, "Figure")
    assert head[1:5] == ["Before, records", "Before, control", "After, records", "After, control"]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| Emitted up to a quarter of edits |")  # the headline leads
    assert line_of(part, "Longest common span (tokens)")[2] == "n/a"
    assert "Settings: similarity: 0.75. Cost: 2.4 forward passes of the model per record, 4,096 generated tokens." in (
        part.replace("\\", "")
    )
    audit = section(document(runs["audit"], "report.md"), "Attacks").split("### Verbatim: sweep\n")[1].split("### ")[0]
    assert line_of(audit, "Figure")[1:] == [
        "Audited, records",
        "Audited, control",
        "Reference, records",
        "Reference, control",
    ]
    assert "not resolvable: no record has 50 tokens" in audit
    assert "Cost: 1 forward pass of the model per record." in audit
    notes = text.split("### Verbatim: sampled\n")[1].split("### ")[0]
    assert "Settings: samples: 1, 100, 1,000; schemes: temperature: 1. Cost" in notes  # nothing left open is named
    assert notes.count("p\\_z is exact under the rule") == 1  # said once, though every stage says it
    assert "**Sampling rules, before**" in notes
    assert "**Sampling rules, after**" in notes


def test_stages_are_lines_of_one_chart(runs: dict[str, Path]) -> None:
    source = document(runs["forget"], "report.html")
    part = source.split('<h3 class="part">Membership: loss</h3>')[1].split('<h3 class="part">')[0]
    (svg,) = re.findall(r"<svg .*?</svg>", part, re.S)
    assert [f">{word}<" in svg for word in ("Before", "After", "Reference", "chance")] == [True] * 4
    assert svg.count('<path d="M') == 4
    caption = re.search(r"<figcaption>(.*?)</figcaption>", part)
    assert caption
    assert "Both axes are logarithmic" in caption[1]


def test_the_table_of_a_roc_holds_the_rates_that_can_be_told_apart(runs: dict[str, Path]) -> None:
    text = section(document(runs["forget"], "report.md"), "Attacks")
    part = text.split("**Membership: loss: ROC: true-positive rate by false-positive rate**")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]
    assert [row[0] for row in rows] == ["0.008", "0.010", "0.050", "0.100", "0.500"]  # 1 of 120 is the first
    series = build(runs["forget"])["run"]["attacks"]["before"]["membership.loss"]["curves"][0]["series"][0]
    for row, rate in zip(rows, (1 / 120, 0.01, 0.05, 0.1, 0.5), strict=True):
        reached = max(y for x, y in zip(series["x"], series["y"], strict=True) if x <= rate + 1e-9)
        assert float(row[1]) == pytest.approx(reached, abs=6e-4)


def test_a_line_chart_has_its_band_and_its_data(runs: dict[str, Path]) -> None:
    source = document(runs["sweep"], "attack.html")
    (svg,) = [found for found in re.findall(r"<svg .*?</svg>", source, re.S) if "share of the record given" in found]
    assert svg.count("<polygon") == 1
    assert "Shaded: the intervals." in source
    table = document(runs["sweep"], "attack.md").split(
        "**Verbatim: sweep: Records finished by prefix length: share of"
    )[1]
    series = build(runs["sweep"])["run"]["attacks"]["before"]["verbatim.sweep"]["curves"][0]["series"][0]
    for x, y in zip(series["x"], series["y"], strict=True):
        assert line_of(table, f"{x:.3f}")[1] == f"{y:.3f}"


def test_a_long_line_is_thinned_in_its_table(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run", ("verbatim.sweep",))
    x = [float(i) for i in range(100)]
    series = [{"name": "a", "x": x, "y": x, "low": None, "high": None}]
    change(run, "verbatim.sweep", lambda found: found.update(curves=[curve("line", "Long", "x", "y", series)]))
    write(run)
    table = document(run, "attack.md").split("**Verbatim: sweep: Long: y**")[1]
    shown = [line_of(line, "")[0] for line in table.splitlines() if re.match(r"\| \d", line)][:ROWS]
    assert (len(shown), shown[0], shown[-1]) == (ROWS, "0", "99")
    assert f"{100 - ROWS} more in attack.json." in table


def test_figures_have_a_text_alternative_and_a_table(runs: dict[str, Path]) -> None:
    for name in ("forget", "audit", "attack", "sweep"):
        source = document(runs[name], "attack.html" if name in ("attack", "sweep") else "report.html")
        source = re.search(r'<section id="attacks">.*?</section>', source, re.S)[0]  # type: ignore[index]
        described = re.findall(r'<figure aria-describedby="([^"]+)"', source)
        assert len(described) == source.count("<figure") == (7 if name in ("forget", "audit") else 1)
        for reference in described:
            alternative = re.search(rf'id="{reference}">(.*?)</p>', source, re.S)
            assert alternative
            assert len(alternative[1]) > 60
            assert re.search(r"\d", alternative[1])
        assert re.findall(r"</figure>\s*<(\w+)", source) == ["div"] * len(described)


def test_pattern_ids_of_figures_are_unique(runs: dict[str, Path]) -> None:
    ids = re.findall(r'<pattern id="([^"]+)"', document(runs["forget"], "report.html"))
    assert len(ids) == len(set(ids))
    assert not [found for found in ids if " " in found]


def test_the_glossary_holds_the_words_of_the_attacks_that_ran(runs: dict[str, Path], tmp_path: Path) -> None:
    glossary = document(runs["forget"], "report.md").split("Appendix B Glossary")[1]
    terms = ("Membership inference", "ROC", "Exposure", "p\\_z", "Near-verbatim", "Recognition", "Conformal list")
    for term in (*terms, "Blind test", "AUC", "Canary"):
        assert glossary.count(f"\n| {term} |") == 1, term
    old = document(runs["old"], "report.md").split("Appendix B Glossary")[1]
    for term in ("Membership inference", "ROC", "Exposure", "Recognition"):
        assert f"\n| {term} |" not in old
    run = write_run(tmp_path / "run", "audit", attacked=EVERY, probes=PROBES, blocks=2)
    write(run)
    both = document(run, "report.md").split("Appendix B Glossary")[1]
    assert both.count("\n| AUC |") == 1  # the curvature probe uses the word as well


def test_huge_results_are_capped_and_counted(tmp_path: Path) -> None:
    names = [f"membership.s{i}" for i in range(25)]
    run = write_run(tmp_path / "run", n=150, blocks=20, probes=PROBES)
    x = [i / 100 for i in range(101)]
    series = [{"name": f"series {i}", "x": x, "y": x, "low": x, "high": x} for i in range(7)]
    rows = [[f"row {i}", *([i / 7] * 19)] for i in range(50)]
    for stage in ("before", "after", "reference"):
        (run / stage / "attacks").mkdir()
        for name in names:
            found = result(
                name,
                headline="f0",
                figures={f"f{i}": figure(0.5, 300) for i in range(80)},
                control={f"f{i}": figure(0.5, 300) for i in range(80)},
                curves=[curve(kind, kind, "x", "y", series) for kind in ("roc", "line")],
                tables=[{"title": f"t{i}", "columns": [f"c{j}" for j in range(20)], "rows": rows} for i in range(2)],
                notes=[f"{i} {'note' * 100}" for i in range(90)],
            )
            dump(run / stage / "attacks" / f"{name}.json", found)
    write(run)
    source = document(run, "report.html")
    assert len(source.encode()) < 1_000_000
    page = Page(source)
    assert re.search(r"for want of room: \d+ figures and \d+ lists and \d+ tables\.", page.text)
    assert "24 of 80 rows shown; the other 56 are in report.json (run.attacks.*.membership.s0)" in page.text
    assert "12 of 50 rows shown" in page.text
    assert "6 of 21 lines drawn" in page.text
    assert "78 more notes in the JSON document." in page.text
    assert len(document(run, "report.md")) < 400_000
    write(run, audience="regulator")
    assert len(document(run, "report-regulator.html").encode()) < 700_000


def test_what_finds_no_room_is_counted() -> None:
    chart, notes = Chart(Markup("x" * 600), "", ""), Items("", ["y" * 200])
    room = Room(charts=1, letters=1000)
    assert [room.take("figure", [chart]), room.take("figure", [chart])] == [[chart], []]
    assert [room.take("list", [notes]), room.take("list", [notes])] == [[notes], []]
    assert room.refused == {"figure": 1, "list": 1}


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", blocks=1, attacked=EVERY)
    words = itertools.cycle(HOSTILE)

    def hostile(found: Json) -> None:
        found["titles"] = {key: next(words) for key in found["titles"]}
        found["not_resolvable"] = {next(words): next(words)}
        found["notes"] = list(HOSTILE)
        found["confounded"] = next(words)
        found["settings"] = {next(words): next(words)}
        found["figures"][next(words)] = figure(0.5, 3, 0.1, next(words))
        for row in found["curves"]:
            row |= {"title": next(words)}
            row["x"]["label"], row["y"]["label"] = next(words), next(words)
            for series in row["series"]:
                series["name"] = next(words)
        for row in found["tables"]:
            row |= {"title": next(words), "columns": [next(words) for _ in row["columns"]]}
            row["rows"][0][0] = next(words)

    for stage in ("before", "after", "reference"):
        for name in EVERY:
            change(run, name, hostile, stage)
    path = run / "after/attacks/records.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows = [row | {f"{text}:hit": True for text in HOSTILE[:6]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    validated(run)
    write(run)
    source = document(run, "report.html")
    page = Page(source)
    assert "<script" not in source
    assert not {"script", "img"} & set(page.tags)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    for name in ("report.html", "report.md", "report.json"):
        text = document(run, name)
        assert not {"\u202e", "\x1b", "\u200b"} & set(text)
        assert "/home/somebody" not in text
        assert "x" * 700 not in text
    for line in document(run, "report.md").splitlines():
        outside_code = re.sub(r"`[^`]*`", "", line)
        assert "<" not in outside_code
        assert "://" not in outside_code


@pytest.mark.parametrize("name", RUNS)
def test_pages_are_static_well_formed_and_claim_nothing(runs: dict[str, Path], name: str) -> None:
    for path in (runs[name] / "report").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not FORBIDDEN.search(text), path.name
        if path.suffix == ".html":
            page = Page(text)
            assert not {"script", "iframe", "object", "form", "link", "img", "details"} & set(page.tags)
            ids = [value for _, key, value in page.attributes if key == "id"]
            assert len(ids) == len(set(ids))
            assert {target[1:] for target in page.all("a", "href")} <= set(ids)


def test_the_page_of_an_attack_run(runs: dict[str, Path]) -> None:
    run = runs["attack"]
    assert sorted(path.name for path in (run / "report").iterdir()) == ["attack.html", "attack.json", "attack.md"]
    text, page = document(run, "attack.md"), Page(document(run, "attack.html"))
    heads = re.findall(r"^## \d+ (.*)$", text, re.M)
    assert heads == ["Checkpoint and data", "Attack", "Records", "Limits", "Reproduce"]
    assert "Attack report" in page.text
    assert not re.search(r"verdict:|claim level|criteria (not )?met|inconclusive", page.text, re.I)
    assert "there is no verdict" in page.text
    assert "report.json" not in page.text
    assert "The control set may be easier than the records." in section(text, "Limits")
    assert f"confounded: {CONFOUNDED}" in section(text, "Attack").replace("\\", "")
    assert digest("before") in page.text
    for command in (
        "unlearn attack membership.loss CHECKPOINT --records records.jsonl --control control.jsonl --seed 0",
        "unlearn report RUN --check",
    ):
        assert command in page.text
    glossary = text.split("## Appendix A Glossary")[1]
    for term in ("ROC", "Blind test", "Access A1", "Records", "Control"):
        assert f"| {term} |" in glossary
    for term in ("Exposure", "Access A4", "Level E2", "After"):
        assert f"| {term} |" not in glossary


def test_the_arms_of_an_attack_run_are_those_of_one_checkpoint(runs: dict[str, Path]) -> None:
    report = validated(runs["sweep"])
    detail = report["run"]["attacks"]["before"]["verbatim.sweep"]
    row = row_of(report, "verbatim.sweep")
    assert row["arms"] == {
        "O": detail["figures"]["best_start"],
        "N": detail["control"]["best_start"],
        "U": None,
        "R": None,
    }
    assert row["residual"] is None
    assert report["checkpoint"]["after"] is None
    assert report["custody"]["tensor_digest_in"] == digest("before")
    assert {"before/attacks/verbatim.sweep.json", "inputs/sets.json"} <= {
        row["path"] for row in report["custody"]["files"]
    }


def test_an_attack_run_may_hold_nothing_but_its_result(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run", ("verbatim.sweep",), measured=False)
    report = validated(run)
    assert [row["name"] for row in report["attacks"]] == ["verbatim.sweep"]
    assert report["attacks"][0]["arms"]["O"]["value"] == pytest.approx(0.7)
    assert len(report["records"]) == 20
    write(run)
    text = document(run, "attack.md")
    assert "Attacks that hit, worst record first" in text
    assert "Probability per token" not in section(text, "Records")
    assert "unspecified" not in section(text, "Attack").split("### ")[0].replace("| unspecified |", "")
    Page(document(run, "attack.html"))


def test_an_attack_run_with_a_reference_describes_it(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run")
    other = write_run(tmp_path / "other", attacked=("membership.loss",), blocks=1)
    shutil.copytree(other / "reference", run / "reference")
    dump(run / "inputs/reference.json", {"name": "never-trained base", "tensor_digest": digest("reference")})
    assert validated(run)["checkpoint"]["reference"]["name"] == "never-trained base"
    write(run)
    text = document(run, "attack.md")
    report = validated(run)
    auc = report["run"]["attacks"]["reference"]["membership.loss"]["figures"]["auc"]
    assert row_of(report, "membership.loss")["arms"]["R"] == auc
    assert "| Attack | Access | Figure | Records | Control | Reference |" in text
    assert "| Property | Attacked | Reference |" in text
    assert "--control control.jsonl --reference REFERENCE --seed 0" in text


def test_an_attack_without_records_lists_itself(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run", ("exposure.canaries",), measured=False)
    (run / "before/attacks/records.parquet").unlink()
    (run / "before/attacks.json").write_text(json.dumps(listed(("exposure.canaries",))[:1]))
    report = validated(run)
    assert (report["attacks"][0]["access"], report["records"]) == ("A1", [])
    write(run)
    assert section(document(run, "attack.md"), "Records").strip() == "not run: no per-record figures were written."
    for content in (b'{"secret": 1}', b'["secret"]'):
        (run / "before/attacks.json").write_bytes(content)
        with pytest.raises(ReportError, match=r"a list of objects in before/attacks\.json") as caught:
            build(run)
        assert caught.value.exit_code == 4
        assert "secret" not in str(caught.value)


def test_a_stopped_attack_run_says_so(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run", measured=False)
    for path in (run / "before/attacks").iterdir():
        path.unlink()
    validated(run)
    write(run)
    text = document(run, "attack.md")
    assert section(text, "Attack").strip() == "not run: the run stopped before it had finished."
    assert "stopped before the attack had finished" in section(text, "Limits")


def test_formats_and_editions_of_an_attack_run(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run")
    assert [problem.split()[0] for problem in check(run)] == ["report/attack.json"]
    assert [path.name for path in write(run, ["md"])] == ["attack.json", "attack.md"]
    assert load_report(run)["schema"] == reports.ATTACK_SCHEMA == "unlearn.attack-report/v1"
    assert check(run) == []
    for audience in ("regulator", "subject"):
        with pytest.raises(ReportError, match="one edition") as caught:
            write(run, audience=audience)
        assert caught.value.exit_code == 2
    page = run / "report/attack.md"
    page.write_bytes(page.read_bytes().replace(b"20", b"21", 1))
    assert [problem.split()[0] for problem in check(run)] == ["report/attack.md"]
    (run / "report/attack.json").write_text("{}")
    with pytest.raises(ReportError, match="render it again"):
        load_report(run)


def test_same_files_same_bytes(tmp_path: Path) -> None:
    for kind in ("forget", "attack"):
        first, second = (write_run(tmp_path / kind / name, kind, blocks=1, attacked=EVERY[:8]) for name in ("a", "b"))
        header = json.loads((second / "run.json").read_text())
        dump(second / "run.json", header | {"status": "interrupted", "argv": ["--resume", "/x/y"], "started": "z"})
        one, two = ([path.read_bytes() for path in write(run)] for run in (first, second))
        assert one == two
        assert [path.read_bytes() for path in write(first)] == one
        assert b"somebody" not in b"".join(one)


def test_the_page_is_made_of_report_json_alone(runs: dict[str, Path]) -> None:
    from reports.render_html import render_html
    from reports.render_markdown import render_markdown

    for name, stem in (("confounded", "report"), ("attack", "attack")):
        source = (runs[name] / f"report/{stem}.json").read_bytes()
        import hashlib

        sha = f"sha256:{hashlib.sha256(source).hexdigest()}"
        report = json.loads(source)
        assert render_html(report, "engineer", sha) == document(runs[name], f"{stem}.html")
        assert render_markdown(report, "engineer", sha) == document(runs[name], f"{stem}.md")


def test_the_kinds_of_runs_have_their_own_documents(tmp_path: Path) -> None:
    stems = {}
    for kind in ("audit", "probe", "attack"):
        run = write_probe_run(tmp_path / kind, ["condition"], blocks=1) if kind == "probe" else None
        run = run or write_run(tmp_path / kind, kind, blocks=1)
        stems[kind] = write(run)[0].stem
        assert load_report(run)["run"]["kind"] == kind
    assert stems == {"audit": "report", "probe": "probe", "attack": "attack"}


def test_what_the_package_offers() -> None:
    assert {"ATTACK_SCHEMA", "attack_schema"} <= set(reports.__all__)
    assert all(hasattr(reports, name) for name in reports.__all__)


def test_the_synthetic_attacks_are_seeded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_attacks(tmp_path / name, ["before", "after"], ["r-1", "r-2"], EVERY)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.json")) for n in ("a", "b")]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])
