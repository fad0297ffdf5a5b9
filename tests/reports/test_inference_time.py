"""Reports on an edit that acts at inference time: the files hold the original's weights, and every edition says so.

Each sentence is looked for where it has to stand, and looked for in vain in the reports of other edits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import reports
from reports import build, report_schema, write
from reports.build import dumps
from reports.inference_time import ADVICE, AUDITED, FILES, HOLDS, SAID, banner
from tests.reports.synthetic import dump, write_run
from tests.reports.synthetic_stress import AT_INFERENCE_TIME, write_inference_time_run, write_stress_run
from tests.reports.test_documents import FORBIDDEN, Page, section

Json = dict[str, Any]
RUNS: dict[str, dict[str, Any]] = {
    "at inference time": {},
    "no attacks": {"suite": False},
    "still emitted": {"silent": False},
    "images": {"task": "image_classification"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inference")
    made = {name: write_inference_time_run(root / name, **options) for name, options in RUNS.items()}
    made["weights"] = write_stress_run(root / "weights")
    for run in made.values():
        for audience in reports.AUDIENCES:
            write(run, audience=audience)
    return made


def document(run: Path, audience: str = "engineer", suffix: str = "md") -> str:
    name = "report" if audience == "engineer" else f"report-{audience}"
    return (run / "report" / f"{name}.{suffix}").read_text(encoding="utf-8")


def flat(text: str) -> str:
    return " ".join(text.replace("\\", "").split())


@pytest.mark.parametrize("name", RUNS)
def test_the_report_matches_the_schema_and_says_what_the_edit_is(runs: dict[str, Path], name: str) -> None:
    report = json.loads(dumps(build(runs[name])))
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(report)] == []
    assert report["method"]["inference_time"] is True
    assert report["checkpoint"]["after"]["inference_time"] is True
    assert report["checkpoint"]["before"]["inference_time"] is False
    assert report["robustness"]["finding"] == "hidden"
    for row in report["attacks"]:
        if row["access"] in ("A2", "A3") and row["status"] == "run":
            pytest.fail(f"{row['name']} ran on a copy that holds the original's weights")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("audience", reports.AUDIENCES)
def test_every_edition_says_it_beside_the_verdict(runs: dict[str, Path], name: str, audience: str) -> None:
    said = HOLDS if audience == "engineer" else f"{SAID[name != 'still emitted']} {FILES} {ADVICE[audience]}"
    text = flat(document(runs[name], audience))
    assert f"> **{said}**" in text
    assert text.index(said) < text.index("## ")
    page = Page(document(runs[name], audience, "html"))
    assert said in page.text
    assert "note" in page.all("p", "role")
    if audience != "subject":
        assert page.text.index(said) < page.text.index("Verdict")
    assert not FORBIDDEN.search(document(runs[name], audience, "html"))


@pytest.mark.parametrize("audience", reports.AUDIENCES)
def test_other_edits_do_not_say_it(runs: dict[str, Path], audience: str) -> None:
    for words in ("inference time", FILES, "its own program"):
        assert words not in flat(document(runs["weights"], audience)), words
    assert 'class="note banner"' not in document(runs["weights"], audience, "html")


def test_what_was_changed_is_said_in_words_and_not_as_a_map(runs: dict[str, Path]) -> None:
    text = flat(section(document(runs["at inference time"]), "Edit"))
    assert "No weight of the original was changed" in text
    assert "1,474,560 elements were added beside them" in text
    assert "0 of 272 tensors changed" not in text
    assert "Map over layers" not in text
    assert "Changed tensors" not in text
    identity = flat(section(document(runs["at inference time"]), "Identity"))
    assert "No weight of the original was changed" in identity
    assert "No weight of the original was changed" not in document(runs["weights"])


def test_an_edit_at_inference_time_that_also_changed_weights_lists_them(tmp_path: Path) -> None:
    run = write_inference_time_run(tmp_path / "run")
    delta = json.loads((run / "edit/delta.json").read_text())
    row = {"name": "w", "dtype": "F32", "shape": [2], "changed": 2, "rel_norm": 0.5, "block": 0, "role": "up"}
    dump(run / "edit/delta.json", delta | {"tensors": [row], "changed_elements": 2})
    write(run)
    text = document(run)
    assert "1 of 272 tensors changed" in text
    assert "No weight of the original was changed" not in text


def test_section_ten_states_and_does_not_measure(runs: dict[str, Path]) -> None:
    text = flat(section(document(runs["at inference time"]), "Forgotten or hidden?"))
    assert "Finding: hidden." in text
    assert "This is a statement about the method and no measured figure" in text
    assert f"not run: {AT_INFERENCE_TIME}" in text
    original = text.split("The original under attack")[1].split("Figures without the attack")[0]
    assert "| Recovery: relearning (Probability per token after relearning) | A2 |" in original
    assert "0.90 → 0.90" in original
    assert "Regurgitation" not in original  # it ran on the copy, and stands in the table of residuals
    outcomes = text.split("**Figures without the attack → under it, and the residual**")[1]
    assert "✓ resists" in outcomes
    without = flat(section(document(runs["no attacks"]), "Forgotten or hidden?"))
    assert "Finding: hidden." in without
    assert "This is a statement about the method and no measured figure" in without
    assert "The original under attack" not in without


def test_a_suite_without_any_attack_on_edits_still_has_the_finding(tmp_path: Path) -> None:
    run = write_inference_time_run(tmp_path / "run", suite=False)
    for stage in ("before", "after", "reference"):
        path = run / stage / "metrics.json"
        metrics = json.loads(path.read_text())
        rows = [row for row in metrics["attacks"] if not row["name"].startswith("recovery.")]
        dump(path, metrics | {"attacks": rows})
    write(run)
    text = flat(section(document(run), "Forgotten or hidden?"))
    assert "Finding: hidden." in text
    assert "no relearning, quantisation" in text
    assert "How to read this" not in text


def test_the_subject_reads_what_changed_and_what_remains(runs: dict[str, Path]) -> None:
    text = flat(document(runs["at inference time"], "subject"))
    assert "Its numbers stayed as they were; a program that belongs to the copy changes its answers." in text
    assert "0 tables of numbers" not in text
    assert f"- {FILES}" in text
    assert "The original was left as it was." in text
    assert "of numbers inside the model changed" in flat(document(runs["weights"], "subject"))


def test_runs_of_earlier_versions_read_as_edits_of_weights(tmp_path: Path) -> None:
    run = write_stress_run(tmp_path / "run")
    assert "inference_time" not in json.loads((run / "edit/plan.json").read_text())["method"]
    report = build(run)
    assert report["method"]["inference_time"] is False
    assert banner(report, "engineer") == ""
    old = json.loads(dumps(report))
    del old["method"]["inference_time"]
    for checkpoint in old["checkpoint"].values():
        del checkpoint["inference_time"]
    assert Draft202012Validator(report_schema()).is_valid(old)  # a report.json written before there was the key


def test_an_edit_that_was_only_planned_has_no_banner(tmp_path: Path) -> None:
    run = write_inference_time_run(tmp_path / "run")
    (run / "edit/delta.json").unlink()
    assert banner(build(run), "subject") == ""


def test_an_audit_of_such_a_checkpoint_has_a_banner_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "audit")
    path = run / "inputs/checkpoint.json"
    dump(path, json.loads(path.read_text()) | {"inference_time": True})
    for audience in reports.AUDIENCES:
        write(run, audience=audience)
        assert AUDITED in flat(document(run, audience))
    assert AUDITED not in flat(document(write_with(tmp_path / "other"), "engineer"))


def write_with(run: Path) -> Path:
    write_run(run, "audit")
    write(run)
    return run
