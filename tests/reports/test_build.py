from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from jsonschema import Draft202012Validator

from reports import ReportError, build, report_schema
from reports.arms import arms
from reports.build import dumps
from tests.reports.synthetic import HOSTILE, PROBES, dump, figure, write_run
from tests.reports.synthetic_attacks import ATTACKS

KEYS = set(
    "schema tool run checkpoint request subject method records attacks utility robustness criteria verdict "
    "claim_level limits custody".split()
)
VARIANTS: dict[str, dict[str, Any]] = {
    "audit": {"kind": "audit", "verdict": "criteria not met"},
    "forget": {},
    "no-reference": {"reference": False, "residue": 0.4, "verdict": "criteria not met"},
    "images": {"task": "image_classification", "verdict": "inconclusive"},
    "stopped": {"stages": ("before",), "reference": False},
    "probed": {"probes": PROBES, "blocks": 6},
    "attacked": {"attacked": tuple(ATTACKS), "confounded": True, "residue": 0.1, "verdict": "criteria not met"},
    "hostile": {"name": HOSTILE[0], "ids": HOSTILE, "request": {"manner": HOSTILE[4], "ground": HOSTILE[2]}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: write_run(root / name, **options) for name, options in VARIANTS.items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", blocks=2)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_matches_the_schema(runs: dict[str, Path], name: str) -> None:
    report = json.loads(dumps(build(runs[name])))
    Draft202012Validator.check_schema(report_schema())
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(report)] == []
    assert set(report) == KEYS
    assert not any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves(report))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "erased"),
        (("claim_level",), "E5"),
        (("attacks", 0, "status"), "skipped"),
        (("surprise",), 1),
        (("records", 0, "flags"), "none"),
        (("attacks", -1, "reason"), None),
        (("utility", "figures", "retain.loss", "difference", "ci_low"), "low"),
    ],
)
def test_the_schema_refuses(runs: dict[str, Path], path: tuple[Any, ...], value: object) -> None:
    report = json.loads(dumps(build(runs["forget"])))
    place = report
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert not Draft202012Validator(report_schema()).is_valid(report)


def test_nothing_about_the_machine_enters(runs: dict[str, Path]) -> None:
    header = json.loads((runs["forget"] / "run.json").read_text())
    before = dumps(build(runs["forget"]))
    dump(runs["forget"] / "run.json", header | {"status": "interrupted", "argv": ["--resume", "/x/y"], "started": "z"})
    assert dumps(build(runs["forget"])) == before
    assert b"somebody" not in before
    assert str(runs["forget"]).encode() not in before


def test_same_bytes_in_another_process_with_another_hash_seed(runs: dict[str, Path]) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path; from reports.documents import _renderer\n"
        "for run in sys.argv[1:]:\n"
        "    stem, render = _renderer(Path(run))\n"
        "    names = [f'{stem}.json', f'{stem}.html', f'{stem}.md']\n"
        "    names += ['report-regulator.html', 'report-subject.md'] if stem == 'report' else []\n"
        "    print([hashlib.sha256(render(name)).hexdigest() for name in names])\n"
        "assert 'torch' not in sys.modules\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, *map(str, runs.values())],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count(b"[") == len(runs)


def test_records_are_worst_first_on_the_latest_checkpoint(runs: dict[str, Path]) -> None:
    rank = {"extracted": 0, "uncertain": 1, "not": 2}
    for name, stage in (("audit", "before"), ("no-reference", "after")):
        rows = build(runs[name])["records"]
        order = [(rank[row[stage]["greedy"]], -row[stage]["probability"]) for row in rows]
        assert order == sorted(order)
        assert order[0][0] == 0
    images = [row["after"]["label_probability"] for row in build(runs["images"])["records"]]
    assert images == sorted(images, reverse=True)


def test_an_extracted_record_is_worse_than_a_likely_one(run: Path) -> None:
    after = pyarrow.parquet.read_table(run / "after/records.parquet").to_pylist()
    after[0] |= {"greedy": "not", "probability": 0.99}
    after[1] |= {"greedy": "uncertain", "probability": 0.5}
    after[2] |= {"greedy": "extracted", "probability": 0.1}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(after), run / "after/records.parquet")
    assert [row["id"] for row in build(run)["records"][:3]] == [after[i]["record_id"] for i in (2, 1, 0)]


def test_flags(run: Path) -> None:
    after = pyarrow.parquet.read_table(run / "after/records.parquet").to_pylist()
    after[0] |= {"greedy": "extracted"}
    after[1] |= {"greedy": "uncertain"}
    after[2] |= {"loss": 99.0}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(after), run / "after/records.parquet")
    flags = {row["id"]: row["flags"] for row in build(run)["records"]}
    assert "extracted after" in flags[after[0]["record_id"]]
    assert "uncertain" in flags[after[1]["record_id"]]
    assert [name for name, found in flags.items() if "over-forgotten" in found] == [after[2]["record_id"]]
    assert sum("extracted before" in found for found in flags.values()) == 16


def test_infinite_and_missing_numbers_become_null(run: Path) -> None:
    metrics = json.loads((run / "before/metrics.json").read_text())
    metrics["sets"]["records"]["figures"]["loss"] = figure(math.nan, 20, -math.inf, math.inf, "nats")
    dump(run / "before/metrics.json", metrics)
    report = build(run)
    shown = report["run"]["measurements"]["before"]["sets"]["records"]["figures"]["loss"]
    assert [shown[key] for key in ("value", "ci_low", "ci_high")] == [None, None, None]
    assert report["records"][0]["after"]["n_for_p50"] is None


def test_a_residual_needs_a_gap(run: Path) -> None:
    paired = json.loads((run / "compare/paired.json").read_text())
    row = paired["arms"]["probability"]
    row["O"]["value"], row["N"]["value"], row["U"]["value"] = 0.25, 0.1, 0.1
    del paired["arms"]["extraction.greedy"]["residual"]
    dump(run / "compare/paired.json", paired)
    residuals = {row["metric"]: row["residual"] for row in build(run)["attacks"] if row["status"] == "run"}
    assert residuals["probability"]["status"] == "not testable"
    assert residuals["probability"]["value"] is None
    assert "less than 0.2" in residuals["probability"]["reason"]
    assert residuals["extraction.greedy"]["status"] == "ok"
    assert residuals["extraction.greedy"]["value"] == 0.0


def test_a_residual_of_a_loss_counts_a_low_value_as_standing_out(run: Path) -> None:
    for stage in ("before", "after"):
        metrics = json.loads((run / stage / "metrics.json").read_text())
        metrics["attacks"].append(metrics["attacks"][0] | {"name": "membership.loss", "figure": "loss"})
        dump(run / stage / "metrics.json", metrics)
    paired = json.loads((run / "compare/paired.json").read_text())
    for original, status in ((0.5, "ok"), (2.9, "not testable"), (9.0, "not testable")):
        row = paired["arms"]["loss"]
        row["O"]["value"], row["N"]["value"] = original, 3.0
        dump(run / "compare/paired.json", paired)
        assert build(run)["attacks"][-1]["residual"]["status"] == status


def test_a_residual_the_run_left_open_stays_open(run: Path) -> None:
    paired = json.loads((run / "compare/paired.json").read_text())
    paired["arms"]["probability"]["residual"] = {"status": "not testable", "reason": "the gap is uncertain"}
    dump(run / "compare/paired.json", paired)
    found = next(row["residual"] for row in build(run)["attacks"] if row["metric"] == "probability")
    assert (found["status"], found["value"], found["reason"]) == ("not testable", None, "the gap is uncertain")


def test_an_attack_that_did_not_run_keeps_its_reason(runs: dict[str, Path]) -> None:
    rows = [row for row in build(runs["forget"])["attacks"] if row["status"] == "not_run"]
    assert {row["reason"] for row in rows} == {"not part of this version"}
    assert all(set(row["arms"].values()) == {None} and row["residual"] is None for row in rows)


def test_control_is_read_on_the_checkpoint_under_judgement(runs: dict[str, Path]) -> None:
    report = build(runs["forget"])
    measured = report["run"]["measurements"]
    before, after = (measured[stage]["sets"]["control"]["figures"]["loss"] for stage in ("before", "after"))
    assert arms(report, "loss")["N"] == after != before


def test_arms_of_an_audit_come_from_one_checkpoint(runs: dict[str, Path]) -> None:
    report = build(runs["audit"])
    found = report["attacks"][0]["arms"]
    sets = report["run"]["measurements"]["before"]["sets"]
    assert found["O"] == sets["records"]["figures"]["extraction.greedy"]
    assert found["N"] == sets["control"]["figures"]["extraction.greedy"]
    assert found["U"] is None
    assert report["method"] is report["request"] is report["checkpoint"]["after"] is None
    assert report["utility"]["status"] == report["robustness"]["status"] == "not_run"


def test_a_run_without_a_decision_is_inconclusive_and_says_so(runs: dict[str, Path]) -> None:
    report = build(runs["stopped"])
    assert report["verdict"] == "inconclusive"
    assert report["claim_level"] is None
    assert report["limits"] == ["The run stopped before its criteria were decided (no measurements: after)."]


def test_custody_covers_every_file_but_the_excepted(runs: dict[str, Path]) -> None:
    run = runs["forget"]
    (run / "report").mkdir(exist_ok=True)
    (run / "report/report.json").write_text("{}")
    listed = {row["path"] for row in build(run)["custody"]["files"]}
    present = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    excepted = {name for name in present if name.split("/")[0] in ("private", "report", "run.json", "events.jsonl")}
    assert listed == present - excepted
    assert "edit/checkpoint/model.safetensors" in listed


def test_the_edited_checkpoint_is_listed_with_its_files(runs: dict[str, Path]) -> None:
    checkpoint = build(runs["forget"])["checkpoint"]
    assert [row["path"] for row in checkpoint["after"]["files"]] == ["config.json", "model.safetensors"]
    assert checkpoint["after"]["tensor_digest"] != checkpoint["before"]["tensor_digest"]
    assert checkpoint["after"]["tokenizer_digest"] is None  # not described, hence not claimed


def test_hostile_strings_are_visible_and_harmless(runs: dict[str, Path]) -> None:
    text = dumps(build(runs["hostile"])).decode()
    assert "\u202e" not in text
    assert "⟨U+202E⟩" in text
    assert "/home/somebody" not in text
    assert "x" * 700 not in text


def test_links_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (run / "edit/checkpoint/extra.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReportError, match=r"found a link at edit/checkpoint/extra\.bin") as caught:
        build(run)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("run.json", None, 2),
        ("run.json", b'{"kind": "bake"}', 2),
        ("inputs/checkpoint.json", None, 2),
        ("before/metrics.json", b"\xff\xfe secret", 4),
        ("before/metrics.json", b'["secret"]', 4),
        ("before/metrics.json", b'{"sets": ["secret"]}', 4),
        ("after/records.parquet", b"PAR1 secret", 4),
        ("compare/criteria.json", b'{"verdict": "secret"}', 4),
        ("compare/criteria.json", b'{"verdict": "criteria met", "claim_level": "secret"}', 4),
        ("compare/criteria.json", b'{"criteria": ["secret"]}', 4),
    ],
)
def test_a_damaged_run_is_one_clear_line(run: Path, name: str, content: bytes | None, code: int) -> None:
    path = run / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReportError) as caught:
        build(run)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith("expected ")


def test_repeated_ids_are_refused(run: Path) -> None:
    rows = pyarrow.parquet.read_table(run / "before/records.parquet").to_pylist()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0]]), run / "before/records.parquet")
    with pytest.raises(ReportError, match="unique record ids"):
        build(run)
