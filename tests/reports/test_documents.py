from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import reports
from reports import ReportError, check, load_report, write
from reports.arms import arms
from reports.render_html import CSP
from reports.sections.measurements import _row
from reports.sections.utility import _row as limit_of
from tests.reports.synthetic import HOSTILE, dump, write_run
from tests.reports.test_build import VARIANTS

# Claims that no evidence of this kind supports; checked in every template, vocabulary and rendered verdict.
FORBIDDEN = re.compile(
    r"gdpr-compliant|\bcertif(y|ied)|\berased\b|\bdeleted\b|\banonym|\bguarantee|\bcompliant\b", re.I
)
TITLES = tuple(
    "Summary;Identity;Request and data;Before and after;Edit;Attacks;Records;Inside the model;Utility;"
    "Forgotten or hidden?;Residual risk and limits;Reproduce;Sign-off".split(";")
)
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str, name: str) -> list[str]:
        return [value for found, key, value in self.attributes if (found, key) == (tag, name)]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("documents")
    made = {name: write_run(root / name, **options) for name, options in VARIANTS.items()}
    for run in made.values():
        for audience in reports.AUDIENCES:
            write(run, audience=audience)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", blocks=2)


def html(run: Path, audience: str = "engineer") -> str:
    name = "report.html" if audience == "engineer" else f"report-{audience}.html"
    return (run / "report" / name).read_text(encoding="utf-8")


def markdown(run: Path) -> str:
    return (run / "report/report.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """One section of report.md."""
    found = re.search(rf"^## \d+ {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, title
    return found[1]


def test_write_returns_what_it_wrote(run: Path) -> None:
    assert [path.name for path in write(run)] == ["report.json", "report.html", "report.md"]
    assert [path.name for path in write(run, ["md"], "regulator")] == ["report.json", "report-regulator.md"]
    present = sorted(path.name for path in (run / "report").iterdir())
    assert present == ["report-regulator.md", "report.html", "report.json", "report.md"]
    assert load_report(run)["schema"] == "unlearn.report/v1"
    assert check(run) == []


def test_writing_again_changes_no_byte(run: Path) -> None:
    first = [path.read_bytes() for path in write(run)]
    assert [path.read_bytes() for path in write(run)] == first


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json", "report-subject.html"])
def test_check_notices_an_edited_document(run: Path, name: str) -> None:
    write(run)
    write(run, ["html"], "subject")
    path = run / "report" / name
    path.write_bytes(path.read_bytes().replace(b"20", b"21", 1))
    assert [problem.split()[0] for problem in check(run)] == [f"report/{name}"]


def test_check_notices_a_changed_run_and_a_missing_report(run: Path) -> None:
    write(run)
    (run / "report/report.md").unlink()
    assert check(run) == []  # a format nobody asked for is no problem
    criteria = json.loads((run / "compare/criteria.json").read_text())
    dump(run / "compare/criteria.json", criteria | {"verdict": "inconclusive"})
    assert len(check(run)) == 2
    (run / "report/report.json").unlink()
    assert check(run)[-1].startswith("report/report.json is missing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((["pdf"],), "formats out of json, html, md"), ((["html"], "press"), "audience out of engineer")],
)
def test_unknown_choices_are_usage_errors(run: Path, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ReportError, match=message) as caught:
        write(run, *arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert not (run / "report").exists()


def test_load_report_names_the_remedy(run: Path) -> None:
    with pytest.raises(ReportError, match="run `unlearn report RUN`"):
        load_report(run)
    (run / "report").mkdir()
    for content in ("{", "[]", '{"schema": "unlearn.report/v9"}'):
        (run / "report/report.json").write_text(content)
        with pytest.raises(ReportError) as caught:
            load_report(run)
        assert caught.value.exit_code == 4


def test_report_json_has_sorted_keys(run: Path) -> None:
    def is_sorted(pairs: list[tuple[str, object]]) -> dict[str, object]:
        assert [key for key, _ in pairs] == sorted(key for key, _ in pairs)
        return dict(pairs)

    json.loads(write(run)[0].read_text(encoding="utf-8"), object_pairs_hook=is_sorted)


def test_a_failed_write_leaves_the_old_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(run)[1].read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reports.documents.os.replace", full)
    with pytest.raises(ReportError, match="No space left") as caught:
        write(run)
    assert caught.value.exit_code == 5
    assert (run / "report/report.html").read_bytes() == old
    assert not [path for path in (run / "report").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("audience", reports.AUDIENCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_pages_are_static_well_formed_and_self_contained(runs: dict[str, Path], name: str, audience: str) -> None:
    source = html(runs[name], audience)
    page = Page(source)
    assert not {"script", "iframe", "object", "form", "link", "img", "details"} & set(page.tags)
    assert CSP in page.all("meta", "content")
    assert not [key for _, key, _ in page.attributes if key.startswith("on") or key in ("src", "srcdoc", "action")]
    assert all(target.startswith("#") for target in page.all("a", "href"))
    assert "url(http" not in source
    assert "@import" not in source
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.all("a", "href")} <= set(ids)


@pytest.mark.parametrize("name", ["forget", "no-reference", "images", "probed", "hostile"])
def test_every_section_is_there_in_order(runs: dict[str, Path], name: str) -> None:
    page = Page(html(runs[name]))
    places = [page.text.index(f"{number} {title}") for number, title in enumerate(TITLES, 1)]
    assert places == sorted(places)
    heads = re.findall(r"^## \d+ (.*)$", markdown(runs[name]), re.M)
    assert tuple(heads) == TITLES
    for title in ("Crosswalk", "Glossary", "Data"):
        assert title in page.text


def test_sections_with_nothing_in_them_say_why(runs: dict[str, Path]) -> None:
    audit, stopped = markdown(runs["audit"]), markdown(runs["stopped"])
    assert section(audit, "Request and data").strip().startswith("not run: audit only")
    assert section(audit, "Edit").strip() == "not run: an audit edits nothing."
    assert section(audit, "Utility").strip() == "not run: an audit edits nothing."
    assert section(stopped, "Utility").strip() == "not run: no retain figures were compared."
    assert "not run: no criterion was decided" in section(stopped, "Summary")
    assert "none of the planned attacks on the edit ran" in section(markdown(runs["forget"]), "Forgotten or hidden?")


def test_an_empty_run_still_has_all_its_sections(tmp_path: Path) -> None:
    run = tmp_path / "run"
    dump(run / "run.json", {"kind": "audit", "seed": 0})
    dump(run / "inputs/checkpoint.json", {})
    write(run)
    text = markdown(run)
    assert text.count("not run: ") >= 8
    assert "no stage of this run measured the records" in section(text, "Measurements")
    assert "no attack was planned" in section(text, "Attacks")
    assert "no per-record figures" in section(text, "Records")
    assert section(text, "Residual risk and limits").count("- ") >= 6
    Page(html(run))


def test_numbers_agree_between_json_html_and_markdown(runs: dict[str, Path]) -> None:
    page, text = Page(html(runs["forget"])), markdown(runs["forget"])
    for words in ("16 of 20", "95 % CI up to 0.168", "Statistically equivalent"):
        assert words in page.text
        assert words in text or words[1:] in text
    worst = load_report(runs["forget"])["records"][0]
    shown = f"{worst['after']['probability']:.3f}"
    assert shown in section(text, "Records").split(worst["id"])[1].splitlines()[0]
    assert "[0, 0]" not in page.text


def test_figures_have_a_text_alternative_and_a_table(runs: dict[str, Path]) -> None:
    source = html(runs["forget"])
    page = Page(source)
    figures = re.findall(r"<figure.*?</figure>(.*?)(?=<figure|<section|\Z)", source, re.S)
    assert len(figures) == 5
    described = page.all("figure", "aria-describedby")
    assert len(described) == 5
    for reference in described:
        alternative = re.search(rf'id="{reference}">(.*?)</p>', source, re.S)
        assert alternative
        assert len(alternative[1]) > 80
    assert source.count('role="img"') == 5
    for title in ("Figures on each arm", "Relative change by block", "Records, worst first", "Paired differences"):
        assert f"<caption>{title}" in source


def test_colour_is_never_alone(runs: dict[str, Path]) -> None:
    source = html(runs["no-reference"])
    for tone, symbol in (("good", "✓"), ("bad", "✕")):
        cells = re.findall(rf'<td data-tone="{tone}">(.*?)</td>', source)
        assert cells
        assert all(symbol in cell for cell in cells)
    assert 'fill="url(#shares-O)"' in source  # bars differ by pattern as well


@pytest.mark.parametrize("name", VARIANTS)
def test_verdict_and_claim_are_printed_with_their_meaning(runs: dict[str, Path], name: str) -> None:
    report = load_report(runs[name])
    for text in (Page(html(runs[name])).text, markdown(runs[name])):
        assert report["verdict"] in text
        assert "Not a legal conclusion" in text
        if report["claim_level"] == "E2":
            assert "equivalent to the reference, within a margin fixed beforehand" in text


@pytest.mark.parametrize("name", VARIANTS)
def test_no_document_claims_too_much(runs: dict[str, Path], name: str) -> None:
    for path in (runs[name] / "report").iterdir():
        assert not FORBIDDEN.search(path.read_text(encoding="utf-8")), path.name


def test_no_source_of_words_claims_too_much() -> None:
    root = Path(reports.__file__).parent
    for path in root.rglob("*"):
        if path.suffix in (".py", ".j2", ".css", ".json"):
            assert not FORBIDDEN.search(path.read_text(encoding="utf-8")), path.name


def test_the_forbidden_words_are_recognised() -> None:
    for words in ("GDPR-compliant", "certified", "erased", "Deleted", "anonymous", "guaranteed", "is compliant"):
        assert FORBIDDEN.search(words)
    assert not FORBIDDEN.search("an erasure request")


def test_audiences_differ_as_documented(runs: dict[str, Path]) -> None:
    engineer, regulator, subject = (Page(html(runs["forget"], audience)).text for audience in reports.AUDIENCES)
    assert "Changed tensors" in engineer
    assert "Files of the run folder" in engineer
    assert "Changed tensors" not in regulator
    assert "Residual risk and limits" in regulator
    for heading in ("asked", "changed", "tested"):
        assert f"What was {heading}" in subject
    assert "Your right to complain" in subject
    assert "data protection authority" in subject
    assert "16 of 20 records were repeated word for word" in subject
    assert "after it, none" in subject
    for jargon in ("95 %", "CI", "log", "tensor", "checkpoint", "E2", "r-"):
        assert jargon not in subject.partition("unlearn-audit")[0], jargon


def test_the_subject_learns_what_is_still_possible(runs: dict[str, Path]) -> None:
    assert "can still repeat at least one" in Page(html(runs["no-reference"], "subject")).text
    assert "Nothing in it was changed" in Page(html(runs["audit"], "subject")).text
    assert "has been tested yet" in Page(html(runs["stopped"], "subject")).text


def test_an_attack_that_did_not_run_says_why(runs: dict[str, Path]) -> None:
    text = section(markdown(runs["forget"]), "Attacks")
    row = next(line for line in text.splitlines() if line.startswith("| not run: not part of this version |"))
    for name in ("Regurgitation: rewrites (A0)", "Membership inference (A1)"):
        assert name in row
    assert "| **Not run: 3 attacks** |" in text
    assert "Recovery: relearning (A4)" in text  # by name; the reason is in section 10
    assert Page(html(runs["forget"])).text.count("not run: not part of this version") == 2


def test_an_audit_has_no_before(runs: dict[str, Path]) -> None:
    records = section(markdown(runs["audit"]), "Records")
    assert "Flags: 16 extracted, 1 uncertain." in records
    assert "before" not in records
    assert "interval of the control" in section(markdown(runs["audit"]), "Measurements")
    assert "interval of the reference" in section(markdown(runs["forget"]), "Before and after")
    assert "interval of the control" in section(markdown(runs["no-reference"]), "Before and after")


def test_the_band_is_the_level_it_is_said_to_be(runs: dict[str, Path]) -> None:
    for name, arm in (("audit", "N"), ("forget", "R"), ("no-reference", "N")):
        report = load_report(runs[name])
        level = arms(report, "loss")[arm]
        assert level
        assert _row(report, "loss").band == (level["ci_low"], level["ci_high"])


def test_a_margin_is_drawn_on_the_worse_side(runs: dict[str, Path]) -> None:
    report = load_report(runs["forget"])
    row = report["utility"]["figures"]["retain.loss"]["difference"]
    for better, limit in (("lower", 0.1), ("higher", -0.1), ("none", None)):
        assert limit_of("retain.loss", row | {"direction": better}, 0.1).limit == limit


def test_a_criterion_on_a_rate_shows_the_count(runs: dict[str, Path]) -> None:
    criteria = section(markdown(runs["forget"]), "Summary").split("**Criteria**")[1]
    assert "0 of 20 (95 % CI up to 0.168) | ✓ met" in criteria
    assert "+0.004 (95 % CI −0.012 to +0.021" in criteria


def test_a_stopped_run_does_not_speak_of_an_edited_checkpoint(runs: dict[str, Path]) -> None:
    text = markdown(runs["stopped"])
    assert "edited checkpoint on" not in text
    assert "| Figure | Records | Control |" in text


def test_five_thousand_records_stay_under_a_megabyte(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", n=5000, blocks=120)
    write(run)
    assert len(load_report(run)["records"]) == 5000
    assert (run / "report/report.html").stat().st_size < 1_000_000
    assert (run / "report/report.md").stat().st_size < 100_000
    assert "50 of 5,000 rows shown; the other 4,950 are in report.json (records[])" in Page(html(run)).text
    assert "4,970 more in report.json" in markdown(run)


def test_hostile_strings_stay_text_in_html(runs: dict[str, Path]) -> None:
    source = html(runs["hostile"])
    page = Page(source)  # an injected tag would not nest or would be counted
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert "49" not in re.findall(r"Request id.{0,60}", page.text)
    assert "\u202e" not in source
    assert "\x1b" not in source


def test_hostile_strings_stay_text_in_markdown(runs: dict[str, Path]) -> None:
    text = markdown(runs["hostile"])
    assert "**&lt;/script&gt;" in text.splitlines()[2]
    table = section(text, "Records").split("**Records, worst first**")[1]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    outside_code = [re.sub(r"`[^`]*`", "", line) for line in rows]
    assert len(rows) == 22
    for line in outside_code:
        assert len(re.findall(r"(?<!\\)\|", line)) == 13  # 12 columns, whatever the ids hold
        assert "<" not in line
        assert "://" not in line
        assert not re.search(r"(?<!\\)[\[\]*_]", line)


def test_signoffs_are_printed_and_leave_report_json_alone(run: Path) -> None:
    before = write(run)[0].read_bytes()
    (run / "attest").mkdir()
    row = {"role": "reviewer", "name": "A. <b>Person</b>", "decision": "approve", "date": "2026-11-22", "sig": "x"}
    (run / "attest/signoffs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert len(check(run)) == 2  # the page and the Markdown have to be rendered again
    assert write(run)[0].read_bytes() == before
    page = Page(html(run))
    assert "A. <b>Person</b>" in page.text
    assert "Decisions recorded with the run" in page.text
    (run / "attest/signoffs.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ReportError, match=r"signoffs\.jsonl"):
        write(run)


def test_importing_reports_is_light() -> None:
    unwanted = "torch transformers pandas pyarrow matplotlib pydantic jinja2 unlearn probes attacks"
    code = f"import sys, reports; print(sorted(set({unwanted!r}.split()) & set(sys.modules)))"
    root = Path(reports.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
