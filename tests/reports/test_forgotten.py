"""Forgotten or hidden: attacks on an edit in report.json, and the section, notes and tables made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import reports
from reports import ReportError, build, report_schema, write
from reports.build import dumps
from reports.text import FINDINGS, STRESS_STATUSES, stress_group, two
from tests.reports.synthetic import dump, figure, write_attack_run, write_run
from tests.reports.synthetic_attacks import curve, result
from tests.reports.synthetic_stress import ATTACKS, COLLATERAL, NOT_RUN, SCENARIOS, STATEMENTS, write_stress_run
from tests.reports.test_documents import FORBIDDEN, Page, section

Json = dict[str, Any]
TITLE = "Forgotten or hidden?"
RUNS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "not hidden": {"scenario": "not hidden"},
    "undecided": {"scenario": "undecided"},
    "not tested": {"scenario": "not tested"},
    "no reference": {"reference": False},
    "no retain": {"retain": False},
    "images": {"task": "image_classification"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stress")
    made = {name: write_stress_run(root / name, **options) for name, options in RUNS.items()}
    made["audit"] = write_run(root / "audit", "audit", blocks=2)
    made["old"] = write_run(root / "old", blocks=2)
    for run in made.values():
        for audience in reports.AUDIENCES:
            write(run, audience=audience)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_stress_run(tmp_path / "run")


def document(run: Path, name: str) -> str:
    return (run / "report" / name).read_text(encoding="utf-8")


def markdown(run: Path, title: str = TITLE, audience: str = "") -> str:
    return section(document(run, f"report{audience}.md"), title)


def line_of(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def validated(run: Path) -> Json:
    report: Json = json.loads(dumps(build(run)))
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(report)] == []
    return report


def paired(run: Path) -> Json:
    found: Json = json.loads((run / "compare/paired.json").read_text())
    return found


@pytest.mark.parametrize("name", [*RUNS, "audit", "old"])
def test_every_run_matches_the_schema(runs: dict[str, Path], name: str) -> None:
    report = validated(runs[name])
    part = report["robustness"]
    assert part["finding"] == {"audit": None, "old": None}.get(name, RUNS.get(name, {}).get("scenario", "hidden"))
    assert part["status"] == ("run" if name in RUNS else "not_run")
    for row in report["attacks"]:
        assert tuple(row["plain"]) == ("N", "O", "R", "U")
        assert (row["stress"] is None) == (row["name"] not in ATTACKS or row["status"] == "not_run")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("attacks", 0, "stress"), {"status": "resists"}),
        (("attacks", 0, "plain"), None),
        (("robustness", "finding"), "forgotten"),
        (("robustness", "recovering"), "recovery.relearning"),
        (("robustness", "level"), "high"),
        (("criteria", 0, "attack"), 1),
    ],
)
def test_the_schema_refuses(runs: dict[str, Path], path: tuple[Any, ...], value: object) -> None:
    report = json.loads(dumps(build(runs["hidden"])))
    place = report
    for part in path[:-1]:
        place = place[part]
    assert path[-1] in place if isinstance(place, dict) else True
    place[path[-1]] = value
    assert not Draft202012Validator(report_schema()).is_valid(report)


def test_a_status_outside_the_vocabulary_is_refused(run: Path) -> None:
    for change in ({"status": "secret"}, {"status": "forgotten"}):
        document = paired(run)
        document["attacks"]["recovery.pruning"]["stress"] |= change
        dump(run / "compare/paired.json", document)
        with pytest.raises(ReportError, match="damaged") as caught:
            build(run)
        assert caught.value.exit_code == 4
        assert "secret" not in str(caught.value)


def test_a_finding_outside_the_vocabulary_is_refused(run: Path) -> None:
    document = paired(run)
    document["stress"]["finding"] = "forgotten"
    dump(run / "compare/paired.json", document)
    with pytest.raises(ReportError, match="damaged"):
        build(run)


def test_the_numbers_are_those_of_the_comparison(runs: dict[str, Path]) -> None:
    given, report = paired(runs["hidden"]), build(runs["hidden"])
    rows = {row["name"]: row for row in report["attacks"]}
    for name in ATTACKS:
        for part in ("arms", "plain"):
            for arm in "OUNR":
                assert rows[name][part][arm]["value"] == pytest.approx(given["attacks"][name][part][arm]["value"])
        expected = given["attacks"][name]["stress"]
        assert rows[name]["stress"]["status"] == expected["status"]
        for key in ("low", "high"):
            assert rows[name]["stress"][key] == (
                expected[key] if expected[key] is None else pytest.approx(expected[key], rel=1e-8)
            )
    part = report["robustness"]
    for key in ("recovering", "re_teaching", "undecided", "not_run", "margin", "level", "finding", "statement"):
        assert part[key] == given["stress"][key]
    assert set(part["attacks"]) == set(ATTACKS) | set(NOT_RUN)
    criterion = report["criteria"][-1]
    assert (criterion["metric"], criterion["attack"]) == ("residual", "all")
    assert report["criteria"][0]["attack"] is None


def test_an_older_run_folder_still_builds(runs: dict[str, Path], tmp_path: Path) -> None:
    part = build(runs["old"])["robustness"]
    assert part["attacks"] == ["recovery.relearning", "recovery.quantisation"]
    assert (part["statement"], part["margin"], part["recovering"], part["not_run"]) == (None, None, [], [])
    run = write_stress_run(tmp_path / "run")
    document = paired(run)
    del document["stress"]
    for row in document["attacks"].values():
        del row["plain"], row["stress"]
    dump(run / "compare/paired.json", document)
    report = validated(run)
    assert not any(row["stress"] or any(row["plain"].values()) for row in report["attacks"])
    write(run)
    cells = line_of(markdown(run), "Recovery: quantisation")
    assert cells[3].startswith("0.33 (")
    assert cells[-1].startswith("not judged")
    assert "Finding" not in markdown(run)


@pytest.mark.parametrize("name", RUNS)
def test_the_finding_leads_with_its_tone(runs: dict[str, Path], name: str) -> None:
    finding = RUNS[name].get("scenario", "hidden")
    tone, words = FINDINGS[finding]
    statement = STATEMENTS[finding][:1].upper() + STATEMENTS[finding][1:]
    for audience in ("", "-regulator"):
        assert markdown(runs[name], audience=audience).lstrip().startswith(f"{words}. {statement}.")
        source = document(runs[name], f"report{audience}.html")
        part = source.split('<section id="robustness">')[1]
        first = re.search(r"<p.*?</p>", part, re.S)
        assert first
        assert f'data-tone="{tone}"' in first[0]
        assert "Forgotten or hidden (section 10)? " + words in Page(source).text


def test_the_finding_counts_what_could_not_be_read(runs: dict[str, Path]) -> None:
    assert "2 more attacks that ran could not be read" in markdown(runs["hidden"])
    assert "could not be read (" not in markdown(runs["not hidden"])
    assert "Attacks other than those tested may give another result." in markdown(runs["not hidden"])


def test_every_status_has_its_word_its_symbol_and_its_reason(runs: dict[str, Path]) -> None:
    text, source = markdown(runs["hidden"]), document(runs["hidden"], "report.html")
    for name, (status, *_) in SCENARIOS["hidden"].items():
        family, _, attack = name.partition(".")
        cells = line_of(text, f"{family.capitalize()}: {attack}".replace("_", " "))
        mark = STRESS_STATUSES[status][1]
        assert cells[-1].startswith(f"{mark} {status} (")
        assert len(cells[-1]) > len(status) + 20
        assert f'<span class="symbol" aria-hidden="true">{mark}</span> <bdi>{status}</bdi>' in source
    assert len({mark for _, mark, _ in STRESS_STATUSES.values()}) == len(STRESS_STATUSES)


def test_arms_are_printed_without_and_under_the_attack(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"])
    head = line_of(text, "Attack |")
    assert head == ["Attack", "Access", "Before", "After", "Control", "Reference", "Residual", "Outcome"]
    cells = line_of(text, "Recovery: relearning (")
    assert cells[2:6] == [
        "0.90 → 0.90 (0.850 to 0.950)",
        "0.33 → 0.61 (0.561 to 0.661)",
        "0.09 → 0.12 (0.070 to 0.170)",
        "0.05 → 0.09 (0.036 to 0.136)",
    ]
    assert cells[6] == "0.630 (0.470 to 0.790)"  # the bounds that decide, not those of the attack by itself
    short = line_of(markdown(runs["hidden"], audience="-regulator"), "Recovery: relearning (")
    assert short[3] == "0.33 → 0.61"
    assert "Does training on half of the records bring the other half back?" in cells[0]


def test_a_residual_that_would_mislead_is_not_printed(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"])
    assert line_of(text, "Elicitation: soft prompt")[6] == "not counted"
    assert line_of(text, "Regurgitation: styles")[6] == "n/a"


def test_attacks_are_grouped_and_those_not_run_come_last(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"])
    heads = re.findall(r"^\| \*\*(.*?)\*\* \|", text, re.M)
    groups = ["Relearning", "Changed weights", "Re-triggering", "Other wordings", "Inside the model"]
    assert heads == [*groups, "Both checkpoints", "Not run: 2 attacks"]
    rest = text.split("**Not run")[1]
    assert "| not run: it needs paraphrases of the records | Regurgitation: paraphrases (A0) |" in rest
    assert "| not run: it is beyond the budget of 400 passes a record | Elicitation: suffix (A2) |" in rest


def test_groups_of_names() -> None:
    found = {
        "recovery.relearning": "Relearning",
        "recovery.relearning_related": "Relearning",
        "recovery.quantisation": "Changed weights",
        "elicitation.suffix": "Re-triggering",
        "exfiltration.prompts": "Other wordings",
        "hidden_knowledge": "Inside the model",
        "edit_difference.reversed_guidance": "Both checkpoints",
        "my_own.attack": "Other attacks",
    }
    assert {name: stress_group(name)[0] for name in found} == found


def test_two_decimals() -> None:
    assert two(figure(0.333, 9, None, None, "share")) == "0.33"
    assert two(figure(0.0, 9, None, None, "share")) == "0.00"
    assert two(figure(0.001, 9, None, None, "probability")) == "< 0.01"
    assert two(figure(0.5, 9, None, None, "bits")) == "0.500"
    assert two(figure(-0.25, 9, None, None, "share")) == "−0.250"
    assert two(None) == two(figure(None, 9, None, None, "share")) == "n/a"


@pytest.mark.parametrize("name", RUNS)
def test_the_relearning_curve_has_the_lines_of_all_checkpoints(runs: dict[str, Path], name: str) -> None:
    source = document(runs[name], "report.html")
    part = re.search(r'<section id="robustness">.*?</section>', source, re.S)
    assert part
    (svg,) = re.findall(r"<svg .*?</svg>", part[0], re.S)
    expected = ["After: records (half B)", "After: never seen", "After: retained", "Before: records (half B)"]
    expected += ["Reference: records (half B)"]
    absent = {"no reference": {expected[4]}, "no retain": {expected[2]}}.get(name, set())
    assert {label for label in expected if f">{label}<" in svg} == set(expected) - absent
    lines = re.findall(r'<path d="M[^"]*" class="curve (c\d(?: d\d)?)"/>', svg)
    assert len(lines) == len(set(lines)) == 5 - len(absent)
    assert len({kind.partition(" ")[2] for kind in lines}) == len(lines)  # told apart without colour
    assert svg.count("<polygon") == len(lines)
    alternative = re.search(r'<p class="alt" id="robustness-\d+-alt">(.*?)</p>', part[0], re.S)
    assert alternative
    if name == "hidden":
        assert "After: records (half B): from 0.330 at 0 to 0.611 at 20" in alternative[1]
        assert "Reference: records (half B): from 0.052 at 0 to 0.086 at 20" in alternative[1]
        table = markdown(runs[name]).split("**Recovery: relearning: probability by steps of training: ")[1]
        assert line_of(table, "20")[:2] == ["20", "0.611 (0.561 to 0.661)"]
    ends = re.findall(r'class="tick" text-anchor="end">([^<]+)</text>', svg)
    assert {"0", "1"} <= set(ends)  # the whole range, so that a small rise looks small


def test_the_curve_is_drawn_once_and_others_stay_in_the_details(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"], "Attacks")
    part = text.split("### Recovery: relearning\n")[1].split("### ")[0]
    assert "Probability by steps of training: the curve is in section 10." in part
    assert "*Figure in" not in part
    assert "*Figure in" in text.split("### Recovery: relearning retain\n")[1].split("### ")[0]
    assert "**By number of bits, after**" in text.split("### Recovery: quantisation\n")[1].split("### ")[0]
    assert "### " not in markdown(runs["hidden"], "Attacks", "-regulator")


def test_without_relearning_another_curve_of_its_kind_or_none_is_drawn(run: Path) -> None:
    for stage in ("before", "after", "reference"):
        path = run / stage / "attacks/recovery.relearning.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"curves": []}))
    write(run)
    assert "*Figure in report.html*: Recovery: relearning retain: probability by steps" in markdown(run)
    for stage in ("before", "after", "reference"):
        path = run / stage / "attacks/recovery.relearning_retain.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"curves": []}))
    write(run)
    assert "*Figure in" not in markdown(run)


def test_how_to_read_stands_in_both_editions(runs: dict[str, Path]) -> None:
    for audience in ("", "-regulator"):
        text = markdown(runs["hidden"], audience=audience)
        part = text.split("**How to read this**")[1]
        assert "Residual = (After − Control) / (Before − Control)" in part
        assert "The margin is a residual of 0.100" in part
        assert "another may bring back more" in part
        for status in STRESS_STATUSES:
            assert f"{status}: " in part
    clean = markdown(runs["not hidden"]).split("**How to read this**")[1]
    assert "recovers: " not in clean  # only what the table shows
    assert "Behind the outcomes" in markdown(runs["hidden"])
    assert "Behind the outcomes" not in markdown(runs["hidden"], audience="-regulator")


def test_the_table_of_attacks_names_them_once_without_figures(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"], "Attacks").split("### ")[0]
    assert "**Attacks on the edit itself: 9 run, 2 not run; figures and outcomes in section 10**" in text
    assert line_of(text, "Relearning")[1] == "Recovery: relearning (A2); Recovery: relearning retain (A2)"
    names = ("Recovery: relearning (", "Elicitation: soft prompt", "Elicitation: suffix", "Edit difference: read out")
    for name in names:
        assert text.count(name) == 1
    assert "Collateral" not in text
    assert {row["name"] for row in build(runs["hidden"])["attacks"]} >= set(ATTACKS) | set(NOT_RUN) | set(COLLATERAL)


def test_what_did_not_run_is_a_channel_not_tested(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"], "Residual risk and limits")
    assert "It needs paraphrases of the records: Regurgitation: paraphrases (A0)" in text.replace("\\", "")


def test_the_utility_section_shows_what_else_changed(runs: dict[str, Path]) -> None:
    text = markdown(runs["hidden"], "Utility")
    table = text.split("**What else the edit changed**")[1]
    assert line_of(table, "Figure") == ["Figure", "Before", "After", "Reference", "Difference"]
    cells = line_of(table, "Expected calibration error (")
    assert (cells[1][:5], cells[2][:5], cells[4]) == ("0.040", "0.090", "+0.050")
    assert "lower is better" in cells[0]
    assert "**Parts of calibration, after**" in text
    short = markdown(runs["hidden"], "Utility", "-regulator")
    assert "What else the edit changed" in short
    assert "Parts of calibration" not in short
    head = line_of(markdown(runs["no reference"], "Utility").split("**What else")[1], "Figure")
    assert head == ["Figure", "Before", "After", "Difference"]


def test_what_else_changed_is_shown_without_a_retain_set(runs: dict[str, Path]) -> None:
    text = markdown(runs["no retain"], "Utility")
    assert text.lstrip().startswith("not run: no retain figures were compared.")
    assert "What else the edit changed" in text


def test_collateral_that_did_not_run_says_why(run: Path) -> None:
    for stage in ("before", "after", "reference"):
        path = run / stage / "metrics.json"
        metrics = json.loads(path.read_text())
        for row in metrics["attacks"]:
            if row["name"] == "collateral.induction":
                row |= {"status": "not_run", "reason": "it needs a tokenizer"}
        dump(path, metrics)
    write(run)
    cells = line_of(markdown(run, "Utility").split("**What else")[1], "not run: it needs a tokenizer")
    assert cells[1] == "Collateral: induction (A2)"
    assert "it needs a tokenizer" not in markdown(run, "Attacks").split("### ")[0]
    assert "it needs a tokenizer" not in markdown(run, "Residual risk and limits").lower()


def test_a_criterion_on_the_residual_reads_as_such(runs: dict[str, Path], run: Path) -> None:
    text = markdown(runs["hidden"], "Summary")
    assert "Residual under every attack on the edit: upper 95 % bound at most 0.100" in text
    criteria = json.loads((run / "compare/criteria.json").read_text())
    criteria["criteria"][-1]["attack"] = "recovery.quantisation"
    dump(run / "compare/criteria.json", criteria)
    write(run)
    assert "Residual under Recovery: quantisation: upper 95 % bound" in markdown(run, "Summary")


def test_the_subject_learns_by_what_it_could_be_brought_back(runs: dict[str, Path]) -> None:
    words = "The information, or part of it, could be brought back by training the model a little further, or by "
    assert (
        words + "rounding or altering the numbers the model is made of."
        in Page(document(runs["hidden"], "report-subject.html")).text
    )
    for name in ("not hidden", "undecided", "not tested", "audit", "old"):
        text = Page(document(runs[name], "report-subject.html")).text
        assert "brought back" not in text
        assert "attack" not in text


def test_an_audit_says_that_nothing_was_edited(runs: dict[str, Path]) -> None:
    assert markdown(runs["audit"]).strip() == "not run: an audit edits nothing."
    assert "Finding" not in document(runs["audit"], "report.md")
    assert "section 10)?" not in document(runs["audit"], "report.md")


def test_a_run_that_stopped_before_the_edited_copy_was_attacked_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=("before",), reference=False, blocks=1)
    metrics = json.loads((run / "before/metrics.json").read_text())
    for row in metrics["attacks"]:
        if row["name"].startswith("recovery."):
            row |= {"status": "run", "reason": None, "figure": "probability"}
    dump(run / "before/metrics.json", metrics)
    write(run)
    assert markdown(run).strip() == "not run: the run stopped before the edited copy was attacked."
    assert line_of(markdown(run, "Attacks"), "Recovery: relearning")[1] == "A4"


def test_hits_of_an_attack_that_teaches_are_no_evidence(run: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    ids = [row["record_id"] for row in pyarrow.parquet.read_table(run / "after/records.parquet").to_pylist()]
    rows = [{"record_id": name, "elicitation.soft_prompt:hit": True} for name in ids]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), run / "after/attacks/records.parquet")
    write(run)
    text = markdown(run, "Records")
    assert "Never-seen records rose as well under Elicitation: soft prompt: what they get out is no evidence." in text


def test_one_attack_alone_shows_its_figure_with_and_without(tmp_path: Path) -> None:
    run = write_attack_run(tmp_path / "run", ("verbatim.sweep",))
    found = result(
        "recovery.relearning",
        headline="probability",
        figures={"probability": figure(0.61, 50, 0.5, 0.7, "share"), "plain": figure(0.33, 50, 0.2, 0.4, "share")},
        control={"probability": figure(0.12, 50, 0.1, 0.2, "share"), "plain": figure(0.09, 50, 0.0, 0.1, "share")},
        titles={"probability": "probability after relearning", "plain": "before"},
        curves=[curve("line", "steps", "steps", "probability", [{"name": "a", "x": [0, 5], "y": [0.3, 0.6]}])],
    )
    (run / "before/attacks/verbatim.sweep.json").unlink()
    dump(run / "before/attacks/recovery.relearning.json", found)
    write(run)
    report = json.loads(document(run, "attack.json"))
    assert [error.message for error in Draft202012Validator(reports.attack_schema()).iter_errors(report)] == []
    row = report["attacks"][0] if len(report["attacks"]) == 1 else report["attacks"][-1]
    assert (row["plain"]["O"]["value"], row["plain"]["N"]["value"], row["stress"]) == (0.33, 0.09, None)
    text = section(document(run, "attack.md"), "Attack")
    cells = line_of(text, "Recovery: relearning")
    assert cells[3].startswith("0.330 → 0.610 (")
    assert "*Figure in attack.html*: Recovery: relearning: steps" in text
    assert "section 10" not in document(run, "attack.md")


@pytest.mark.parametrize("name", [*RUNS, "audit", "old"])
def test_pages_are_well_formed_and_claim_nothing(runs: dict[str, Path], name: str) -> None:
    for path in (runs[name] / "report").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not FORBIDDEN.search(text), path.name
        assert not re.search(r"\b(nan|inf)\b|\bNone\b(?! of)", text.partition("</style>")[2] or text), path.name
        if path.suffix == ".html":
            page = Page(text)
            ids = [value for _, key, value in page.attributes if key == "id"]
            assert len(ids) == len(set(ids))
            assert not {"script", "img", "details"} & set(page.tags)
            assert len(text.encode()) < 1_000_000


def test_the_glossary_holds_the_words_of_the_section(runs: dict[str, Path]) -> None:
    glossary = document(runs["hidden"], "report.md").split("Appendix B Glossary")[1]
    for term in ("Residual", "Re-teaches", "Relearning", "Quantisation", "Pruning", "Re-triggering", "Logit lens"):
        assert glossary.count(f"\n| {term} |") == 1, term
    old = document(runs["old"], "report.md").split("Appendix B Glossary")[1]
    for term in ("Relearning", "Quantisation", "Re-teaches"):
        assert f"\n| {term} |" not in old


def test_hostile_words_stay_text(run: Path) -> None:
    from tests.reports.synthetic import HOSTILE

    document_ = paired(run)
    for row, words in zip(document_["attacks"].values(), HOSTILE * 3, strict=False):
        if row["stress"]:
            row["stress"]["reason"] = words
    document_["stress"]["statement"] = HOSTILE[0]
    document_["stress"]["recovering"] = [HOSTILE[1]]
    dump(run / "compare/paired.json", document_)
    for audience in reports.AUDIENCES:
        write(run, audience=audience)
    validated(run)
    for path in (run / "report").iterdir():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".html":
            page = Page(text)
            assert not {"script", "img"} & set(page.tags)
        assert "\u202e" not in text
        assert "/home/somebody" not in text


def test_a_huge_run_stays_under_a_megabyte(run: Path) -> None:
    steps = [float(at) for at in range(200)]
    series = [{"name": f"series {i}", "x": steps, "y": steps, "low": steps, "high": steps} for i in range(7)]
    rows = [[f"row {i}", *([i / 7] * 19)] for i in range(50)]
    document_ = paired(run)
    for group in ("recovery", "elicitation", "collateral"):
        for index in range(15):
            name = f"{group}.made_{index}"
            like = "collateral.induction" if group == "collateral" else "recovery.quantisation"
            document_["attacks"][name] = document_["attacks"][like]
            for stage in ("before", "after", "reference"):
                found = json.loads((run / stage / f"attacks/{like}.json").read_text()) | {"attack": name}
                found["figures"] |= {f"f{i}": figure(0.5, 300, 0.4, 0.6, "share") for i in range(40)}
                found["curves"] = [curve("line", "Long", "x", "y", series)]
                found["tables"] = [{"title": "t", "columns": [f"c{j}" for j in range(20)], "rows": rows}]
                dump(run / stage / "attacks" / f"{name}.json", found)
                path = run / stage / "metrics.json"
                metrics = json.loads(path.read_text())
                row = next(row for row in metrics["attacks"] if row["name"] == like)
                dump(path, metrics | {"attacks": [*metrics["attacks"], row | {"name": name}]})
    dump(run / "compare/paired.json", document_)
    write(run)
    source = document(run, "report.html")
    assert len(source.encode()) < 500_000
    assert source.count("Left to the JSON document for want of room") == 2
    assert len(set(re.findall(r"Elicitation: made (\d+)", Page(source).text))) == 15


def test_writing_again_changes_no_byte(run: Path) -> None:
    first = [path.read_bytes() for path in write(run)]
    assert [path.read_bytes() for path in write(run)] == first
