"""Probe results in the report of an audit or forget run, and the documents of a run that only probed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from jsonschema import Draft202012Validator

import reports
from reports import ReportError, build, check, load_report, probe_schema, report_schema, write
from reports.build import dumps
from reports.sections.kfac import BINS
from reports.sections.probes import TITLES
from tests.reports.synthetic import HOSTILE, PROBES, digest, dump, kfac_result, write_probe_run, write_run
from tests.reports.test_documents import FORBIDDEN, Page, section

Json = dict[str, Any]
RUNS: dict[str, dict[str, Any]] = {
    "all": {"blocks": 6},
    "kfac": {"probes": ["kfac"], "blocks": 3},
    "condition": {"probes": ["condition"], "blocks": 3},
    "stopped": {"probes": []},
    "hostile": {"name": HOSTILE[0], "ids": HOSTILE, "blocks": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("probes")
    made = {name: write_probe_run(root / name, **options) for name, options in RUNS.items()}
    made["audit"] = write_run(root / "audit", "audit", probes=PROBES, blocks=6)
    for run in made.values():
        write(run)
    write(made["audit"], audience="regulator")
    write(made["audit"], audience="subject")
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_probe_run(tmp_path / "run", blocks=2)


def document(run: Path, name: str) -> str:
    return (run / "report" / name).read_text(encoding="utf-8")


def change(run: Path, probe: str, edit: Callable[[Json], object]) -> None:
    """Alter one result file."""
    path = run / f"probes/{probe}.json"
    result = json.loads(path.read_text())
    edit(result)
    path.write_text(json.dumps(result))


def validated(run: Path) -> Json:
    report: Json = json.loads(dumps(build(run)))
    schema = probe_schema() if report["run"]["kind"] == "probe" else report_schema()
    assert [error.message for error in Draft202012Validator(schema).iter_errors(report)] == []
    return report


@pytest.mark.parametrize("name", [*RUNS, "audit"])
def test_every_run_matches_its_schema(runs: dict[str, Path], name: str) -> None:
    Draft202012Validator.check_schema(probe_schema())
    found = validated(runs[name])["run"]["probes"]
    assert tuple(sorted(found)) == tuple(sorted(PROBES))
    ran = RUNS.get(name, {}).get("probes", PROBES)
    assert [probe for probe in PROBES if found[probe]] == list(ran)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kfac", "modules", 0, "mass"), "much"),
        (("kfac", "modules", 0, "surprise"), 1),
        (("kfac", "modules", -3, "cut", "kept_pairs"), 0.5),
        (("kfac", "records", "auc"), 0.9),
        (("spectrum", "operators", 0, "trace", "n"), None),
        (("spectrum", "operators", 0, "density", "y"), None),
        (("localise", "records", 0, "ablation", "top"), "a word"),
        (("localise", "text"), "a word"),
        (("condition", "tensors", 0, "shape"), "2 x 2"),
        (("more",), {}),
    ],
)
def test_the_schema_refuses(runs: dict[str, Path], path: tuple[Any, ...], value: object) -> None:
    for name, schema in (("all", probe_schema()), ("audit", report_schema())):
        report = json.loads(dumps(build(runs[name])))
        place = report["run"]["probes"]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        assert not Draft202012Validator(schema).is_valid(report)


def test_probes_are_required_and_null_where_they_did_not_run(runs: dict[str, Path], tmp_path: Path) -> None:
    report = build(write_run(tmp_path / "run", "audit"))
    assert report["run"]["probes"] == dict.fromkeys(PROBES)
    del report["run"]["probes"]["kfac"]
    assert not Draft202012Validator(report_schema()).is_valid(report)


def test_the_numbers_are_those_of_the_files(runs: dict[str, Path]) -> None:
    raw = json.loads((runs["all"] / "probes/kfac.json").read_text())
    shown = build(runs["all"])["run"]["probes"]["kfac"]
    assert len(shown["modules"]) == len(raw["modules"])
    for got, given in zip(shown["modules"], raw["modules"], strict=True):
        assert got["mass"] == pytest.approx(given["mass"], rel=1e-8)
        assert got["spectrum"]["index"] == given["spectrum"]["index"]
        assert got["spectrum"]["eigenvalue"] == pytest.approx(given["spectrum"]["eigenvalue"], rel=1e-8)
        assert (got["cut"] or {}).get("kept_pairs") == (given["cut"] or {}).get("kept_pairs")


def test_curvature_figures_join_the_records_of_an_audit(runs: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "audit", probes=["kfac"], blocks=1)
    rows = pyarrow.parquet.read_table(run / "probes/records.parquet").to_pylist()
    plain = {row["id"]: row for row in build(write_run(tmp_path / "plain", "audit"))["records"]}
    rows[0] |= {"loss": 99.0, "note": "text", "low_energy": math.nan}
    stranger = rows[1] | {"record_id": "r-elsewhere"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, stranger]), run / "probes/records.parquet")
    report = validated(run)
    assert [row["id"] for row in report["records"]] == list(plain)
    for row in report["records"]:
        for key, value in plain[row["id"]]["before"].items():
            assert row["before"][key] == value  # the audit's own figures stay, whatever the probe calls its columns
    found = {row["id"]: row["before"] for row in report["records"]}
    for row in rows:
        assert found[row["record_id"]]["memorisation_score"] == pytest.approx(row["memorisation_score"], rel=1e-8)
        assert found[row["record_id"]].get("note") is None
    assert found[rows[0]["record_id"]]["low_energy"] is None


def test_control_records_enter_without_their_ids(runs: dict[str, Path]) -> None:
    control = pyarrow.parquet.read_table(runs["all"] / "probes/control.parquet").to_pylist()
    text = dumps(build(runs["all"])).decode()
    assert not any(row["record_id"] in text for row in control)
    scores = build(runs["all"])["run"]["probes"]["kfac"]["records"]["scores"]
    assert scores["control"] == pytest.approx(sorted(row["memorisation_score"] for row in control), rel=1e-8)


def test_missing_parts_and_numbers_that_are_none(run: Path) -> None:
    def bare(result: Json) -> None:
        for row in result["modules"]:
            row |= {"curve": None, "spectrum": None, "cut": None, "mass": math.nan, "overlap_g": None, "block": None}
        result["records"] = None
        del result["data"]
        del result["settings"]

    change(run, "kfac", bare)

    def empty(result: Json) -> None:
        for row in result["operators"]:
            row |= {"trace": None, "density": None, "nodes": [], "weights": [], "largest": [], "smallest": []}
            row |= {"negative_share": None, "residuals": [math.inf]}

    change(run, "spectrum", empty)

    def none(result: Json) -> None:
        for row in result["records"]:
            row |= {"ablation": None, "influence": None, "prompt": [], "log_prob": None, "completeness_gap": None}
        result["heat"] = [{"block": 0, "module": "attention", "score": None}]

    change(run, "localise", none)
    blank = {"kappa": None, "kappa_relative": None, "stable_rank": None, "stable_rank_share": None}
    change(run, "condition", lambda result: [row.update(blank | {"role": None}) for row in result["tensors"]])
    for name in ("records", "control"):
        (run / f"probes/{name}.parquet").unlink()
    report = validated(run)
    assert report["run"]["probes"]["spectrum"]["operators"][0]["residuals"] == []
    write(run)
    Page(document(run, "probe.html"))
    text = document(run, "probe.md")
    for words in (
        "Spectra not run: no eigenvalues were listed.",
        "Scores of single records not run",
        "Density not run",
        "Map over layers not run",
    ):
        assert words in text
    assert "rank deficient" in text
    for shown in (text, document(run, "probe.html").partition("</style>")[2]):
        assert not re.search(r"\b(nan|inf|None|null)\b", shown)


@pytest.mark.parametrize("probe", PROBES)
def test_lists_may_be_empty_or_absent(run: Path, probe: str) -> None:
    dump(run / f"probes/{probe}.json", {"schema": "unlearn.probe/v1", "probe": probe})
    validated(run)
    write(run)
    assert "not run: " in document(run, "probe.md") or "not run: no" in document(run, "probe.html")


def test_a_score_nobody_has_is_not_drawn(run: Path) -> None:
    for name in ("records", "control"):
        rows = pyarrow.parquet.read_table(run / f"probes/{name}.parquet").to_pylist()
        table = pyarrow.Table.from_pylist([row | {"memorisation_score": math.nan} for row in rows])
        pyarrow.parquet.write_table(table, run / f"probes/{name}.parquet")
    write(run)
    assert "Distribution not run" in document(run, "probe.md")
    assert "highest memorisation score first" not in document(run, "probe.md")


def test_equal_scores_are_one_bin(run: Path) -> None:
    for name in ("records", "control"):
        rows = pyarrow.parquet.read_table(run / f"probes/{name}.parquet").to_pylist()
        table = pyarrow.Table.from_pylist([row | {"memorisation_score": 0.5} for row in rows])
        pyarrow.parquet.write_table(table, run / f"probes/{name}.parquet")
    write(run)
    rows = document(run, "probe.md").split("**Records by memorisation score**")[1].split("**")[0]
    assert [line.split("|")[2:4] for line in rows.splitlines() if " to " in line] == [[" 20 ", " 20 "]]


def test_the_bins_hold_every_record(runs: dict[str, Path]) -> None:
    rows = document(runs["all"], "probe.md").split("**Records by memorisation score**")[1].split("**")[0]
    counts = [[int(cell) for cell in line.split("|")[2:4]] for line in rows.splitlines() if " to " in line]
    assert len(counts) <= BINS
    assert [sum(column) for column in zip(*counts, strict=True)] == [20, 20]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("probes/kfac.json", b"\xff secret"),
        ("probes/kfac.json", b'["secret"]'),
        ("probes/kfac.json", b'{"schema": "secret", "probe": "kfac"}'),
        ("probes/spectrum.json", b'{"schema": "unlearn.probe/v1", "probe": "kfac"}'),
        ("probes/spectrum.json", b'{"schema": "unlearn.probe/v1", "probe": "spectrum", "operators": [{"secret": 1}]}'),
        ("probes/localise.json", b'{"schema": "unlearn.probe/v1", "probe": "localise", "records": ["secret"]}'),
        ("probes/condition.json", b'{"schema": "unlearn.probe/v1", "probe": "condition", "tensors": "secret"}'),
        ("probes/records.parquet", b"PAR1 secret"),
        ("inputs/sets.json", b'{"records": "secret"}'),
    ],
)
def test_a_damaged_result_is_one_clear_line(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(ReportError) as caught:
        build(run)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith("expected ")


def test_lists_that_belong_together_have_one_length(run: Path) -> None:
    change(run, "kfac", lambda result: result["modules"][0]["spectrum"]["index"].pop())
    with pytest.raises(ReportError) as caught:
        build(run)
    assert caught.value.exit_code == 4


def test_a_run_without_probes_says_so_under_its_heading(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "audit")
    write(run)
    text = section(document(run, "report.md"), "Inside the model")
    assert text.strip() == "not run: no probe looked inside the model in this run."


def test_a_report_names_the_probes_that_did_not_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "audit", probes=["condition"], blocks=1)
    write(run)
    text = section(document(run, "report.md"), "Inside the model")
    assert f"### {TITLES['condition']}" in text
    assert text.strip().splitlines()[-1].startswith("not run: Curvature")
    assert TITLES["spectrum"] in text.strip().splitlines()[-1]


def test_editions_of_a_report_differ_in_the_tables_per_weight(runs: dict[str, Path]) -> None:
    engineer, regulator, subject = (
        Page(document(runs["audit"], f"report{name}.html")).text for name in ("", "-regulator", "-subject")
    )
    for title in TITLES.values():
        assert title in engineer
        assert title in regulator
    for words in ("model.layers.5.mlp.up_proj", "Matrices with the lowest stable rank"):
        assert words in engineer
        assert words not in regulator
    for words in ("Curvature mass by block", "Relative condition number by block", "highest memorisation score first"):
        assert words in regulator
    for words in ("Inside the model", "Hessian", "curvature"):
        assert words not in subject


def test_a_low_overlap_is_marked(run: Path) -> None:
    change(run, "kfac", lambda result: result["modules"][0].update(overlap_a=0.5, overlap_g=0.8))
    write(run)
    cells = re.findall(r'<td class="num" data-tone="open">.*?<bdi>(.*?)</bdi>', document(run, "probe.html"))
    assert "0.500" in cells
    assert "0.800" not in cells


def test_the_cut_is_drawn_where_the_edit_keeps_and_drops(tmp_path: Path) -> None:
    run = write_probe_run(tmp_path / "run", ["kfac"], blocks=1)

    def alone(result: Json) -> None:
        module = result["modules"][4]
        module["spectrum"] = {"index": [1, 10, 100, 1000, 10000], "eigenvalue": [1.0, 0.1, 0.01, 0.001, 1e-4]}
        module["cut"] |= {"kept_pairs": 100, "pairs": 10000, "threshold": 0.01}
        result["modules"] = [module]

    change(run, "kfac", alone)
    write(run)
    svg = re.findall(r"<svg .*?</svg>", document(run, "probe.html"), re.S)[0]
    cut = re.search(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)" y2="[\d.]+" class="limit"', svg)
    assert cut
    assert cut[1] == cut[2] == "330"  # half way between 64 and 596, as 100 is between 1 and 10,000
    assert ">kept<" in svg
    assert ">dropped<" in svg
    table = document(run, "probe.md").split("**Eigenvalue products")[1].split("**")[1]
    row = next(line for line in table.splitlines() if "block 0" in line).split("|")
    assert [cell.strip() for cell in row[2:-1]] == ["1.000", "0.100", "0.010", "0.001", "0.001", "0.010", "1.0e−4"]


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_may_count_from_zero_or_one(tmp_path: Path, first: int) -> None:
    run = write_probe_run(tmp_path / "run", ["kfac"], blocks=1)

    def shift(result: Json) -> None:
        for row in result["modules"]:
            row["spectrum"] = {"index": [first, first + 9], "eigenvalue": [1.0, 0.5]}

    change(run, "kfac", shift)
    write(run)
    svg = re.findall(r"<svg .*?</svg>", document(run, "probe.html"), re.S)[0]
    assert {re.match(r"M([\d.]+) ", steps)[1] for steps in re.findall(r'<path d="([^"]*)"', svg)} == {"64"}  # type: ignore[index]


def test_modules_with_a_cut_are_drawn_first(runs: dict[str, Path]) -> None:
    text = document(runs["all"], "probe.md")
    assert "6 of 42 modules, those an edit cuts" in text
    assert "Dashed: the cut at 60 % of the curvature mass." in text
    first = text.split("**Modules, those with a cut first")[1].splitlines()[4:10]
    assert all(re.search(r"\.(gate|up)\\?_proj", line) for line in first)


def test_experts_add_up_in_the_map_and_keep_their_own_rows(tmp_path: Path) -> None:
    run = write_probe_run(tmp_path / "run", ["kfac"], blocks=1)

    def experts(result: Json) -> None:
        row = result["modules"][4] | {"role": "gate_up", "mass": 2.0}
        result["modules"] = [row | {"module": f"mlp.experts.gate_up_proj.{e}", "expert": e} for e in range(3)]

    change(run, "kfac", experts)
    write(run)
    text = document(run, "probe.md")
    assert "| 0 | 6.000 |" in text.split("**Curvature mass by block**")[1]
    assert "block 0 feed-forward gate up, expert 2" in text


def test_huge_results_are_capped_and_counted(tmp_path: Path) -> None:
    run = write_probe_run(tmp_path / "run", blocks=128, n=300)
    change(run, "kfac", lambda result: result.update(warnings=["x"] * 5000))
    write(run)
    source = document(run, "probe.html")
    assert len(source.encode()) < 1_000_000
    page = Page(source).text
    assert "50 of 896 rows shown; the other 846 are in probe.json (run.probes.kfac.modules[])" in page
    assert "50 of 300 rows shown; the other 250 are in probe.json (records[].before)" in page
    assert "50 of 300 rows shown; the other 250 are in probe.json (run.probes.localise.records[])" in page
    assert "12 of 896 rows shown" in page
    assert "4,990 more warnings" in page
    assert "270 more in probe.json" in document(run, "probe.md")
    assert len(document(run, "probe.md")) < 100_000
    assert len(load_report(run)["run"]["probes"]["kfac"]["modules"]) == 896


def test_a_report_with_huge_probes_stays_under_a_megabyte(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", probes=PROBES, n=100, blocks=100)
    write(run)
    assert (run / "report/report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["all", "kfac", "condition"])
def test_figures_have_a_text_alternative_and_a_table(runs: dict[str, Path], name: str) -> None:
    source = document(runs[name], "probe.html")
    page = Page(source)
    described = page.all("figure", "aria-describedby")
    assert len(described) == source.count("<figure") == {"all": 9, "kfac": 4, "condition": 1}[name]
    for reference in described:
        alternative = re.search(rf'id="{reference}">(.*?)</p>', source, re.S)
        assert alternative
        assert len(alternative[1]) > 80
        assert re.search(r"\d", alternative[1])
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', source)
    assert len(labels) == len(described)
    for figure in re.findall(r"</figure>\s*<(\w+)", source):
        assert figure == "div"  # the table with the figure's data


def test_the_page_of_a_probe_run(runs: dict[str, Path]) -> None:
    run = runs["all"]
    assert sorted(path.name for path in (run / "report").iterdir()) == ["probe.html", "probe.json", "probe.md"]
    text, page = document(run, "probe.md"), Page(document(run, "probe.html"))
    heads = re.findall(r"^## \d+ (.*)$", text, re.M)
    assert heads == ["Checkpoint and data", *TITLES.values(), "Limits", "Reproduce"]
    assert "Probe report" in page.text
    assert not re.search(r"verdict:|claim level|criteria (not )?met|inconclusive", page.text, re.I)
    assert "there is no verdict" in page.text
    assert "report.json" not in page.text
    assert "The control set was drafted by the tool." in section(text, "Limits")
    assert digest("before") in page.text
    for command in (
        "unlearn probe kfac CHECKPOINT --records records.jsonl --data data.jsonl --training training.jsonl --seed 0",
        "unlearn report RUN --check",
    ):
        assert command in page.text
    for term in ("A and G", "Hessian", "Influence", "Stable rank", "Memorisation score"):
        assert f"| {term} |" in text
    assert "Stable rank" not in document(runs["kfac"], "probe.md").split("Appendix")[1]


def test_a_probe_without_data_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    run = write_probe_run(tmp_path / "run", ["condition"], blocks=1)
    dump(run / "inputs/sets.json", {"records": {"n": 0, "source": "none", "limits": [], "digest": None, "tokens": 0}})
    change(run, "condition", lambda result: result.pop("data"))
    write(run)
    assert "No record was used: only the weights were looked at." in document(run, "probe.md")
    assert "- Settings: none" in document(run, "probe.md")


def test_a_stopped_probe_run_says_so(runs: dict[str, Path]) -> None:
    text = document(runs["stopped"], "probe.md")
    assert section(text, "Inside the model").strip() == "not run: the run stopped before a probe had finished."
    assert "stopped before a probe had finished" in section(text, "Limits")


@pytest.mark.parametrize("name", RUNS)
def test_pages_are_static_well_formed_and_claim_nothing(runs: dict[str, Path], name: str) -> None:
    source = document(runs[name], "probe.html")
    page = Page(source)
    assert not {"script", "iframe", "object", "form", "link", "img", "details"} & set(page.tags)
    assert not [key for _, key, _ in page.attributes if key.startswith("on") or key in ("src", "srcdoc", "action")]
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.all("a", "href")} <= set(ids)
    for path in (runs[name] / "report").iterdir():
        assert not FORBIDDEN.search(path.read_text(encoding="utf-8")), path.name


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    run = write_probe_run(tmp_path / "run", name=HOSTILE[0], ids=HOSTILE, blocks=2)

    def hostile(result: Json) -> None:
        result["warnings"] = list(HOSTILE)
        result["settings"] = {HOSTILE[2]: HOSTILE[0]}
        for row, text in zip(result.get("modules", []) + result.get("tensors", []), HOSTILE, strict=False):
            row["module" if "module" in row else "name"] = text
            row |= {"block": None, "role": HOSTILE[3]} if len(text) % 2 else {"role": HOSTILE[8]}
        for row, text in zip(result.get("operators", []), HOSTILE, strict=False):
            row["name"] = text
        for row in result.get("heat", []):
            row["module"] = HOSTILE[6]

    for probe in PROBES:
        change(run, probe, hostile)
    validated(run)
    write(run)
    source = document(run, "probe.html")
    page = Page(source)
    assert "<script" not in source
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    for name in ("probe.html", "probe.md", "probe.json"):
        text = document(run, name)
        assert not {"\u202e", "\x1b", "\u200b"} & set(text)
        assert "/home/somebody" not in text
        assert "x" * 700 not in text
    for line in document(run, "probe.md").splitlines():
        outside_code = re.sub(r"`[^`]*`", "", line)
        assert "<" not in outside_code
        assert "://" not in outside_code


def test_same_files_same_bytes(tmp_path: Path) -> None:
    first, second = (write_probe_run(tmp_path / name, blocks=2) for name in ("a", "b"))
    header = json.loads((second / "run.json").read_text())
    dump(second / "run.json", header | {"status": "interrupted", "argv": ["--resume", "/x/y"], "started": "z"})
    one, two = ([path.read_bytes() for path in write(run)] for run in (first, second))
    assert one == two
    assert [path.read_bytes() for path in write(first)] == one
    assert b"somebody" not in b"".join(one)


def test_check_notices_an_edited_or_missing_document(run: Path) -> None:
    assert [problem.split()[0] for problem in check(run)] == ["report/probe.json"]
    write(run)
    assert check(run) == []
    page = run / "report/probe.html"
    page.write_bytes(page.read_bytes().replace(b"20", b"21", 1))
    assert [problem.split()[0] for problem in check(run)] == ["report/probe.html"]
    change(run, "condition", lambda result: result["tensors"].pop())
    assert len(check(run)) == 3


def test_formats_and_editions_of_a_probe_run(run: Path) -> None:
    assert [path.name for path in write(run, ["md"])] == ["probe.json", "probe.md"]
    assert load_report(run)["schema"] == "unlearn.probe-report/v1"
    for audience in ("regulator", "subject"):
        with pytest.raises(ReportError, match="one edition") as caught:
            write(run, audience=audience)
        assert caught.value.exit_code == 2
    (run / "report/probe.json").write_text("{}")
    with pytest.raises(ReportError, match="render it again"):
        load_report(run)


def test_custody_lists_the_results(runs: dict[str, Path]) -> None:
    custody = build(runs["all"])["custody"]
    assert {"probes/kfac.json", "probes/records.parquet", "inputs/sets.json"} <= {
        row["path"] for row in custody["files"]
    }
    assert custody["tensor_digest_in"] == digest("before")
    assert custody["tensor_digest_out"] is None


def test_an_edit_alone_has_no_report(run: Path) -> None:
    header = json.loads((run / "run.json").read_text())
    dump(run / "run.json", header | {"kind": "edit"})
    for call in (build, write, check):
        with pytest.raises(ReportError, match="an edit alone, which tested nothing; audit its checkpoint") as caught:
            call(run)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("form", ["list", "by module"])
def test_statistics_per_module_are_a_table(tmp_path: Path, form: str) -> None:
    run = write_run(tmp_path / "run", blocks=2)
    rows = [
        {
            "rho": 0.6,
            "kept_pairs": 1000 + index,
            "pairs": 4000,
            "mass": None,
            "kept_norm": 0.71,
            "predicted_rise": 0.0123,
            "n_positions": 900,
            "overlap_a": 0.95,
            "overlap_g": 0.62,
        }
        for index in range(70)
    ]
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(70)]
    modules: Any = dict(zip(names, rows, strict=True))
    if form == "list":
        modules = [{"module": name} | row for name, row in modules.items()]
    delta = json.loads((run / "edit/delta.json").read_text())
    dump(run / "edit/delta.json", delta | {"statistics": {"measured_rise": 0.02, "modules": modules}})
    validated(run)
    write(run)
    write(run, audience="regulator")
    text = section(document(run, "report.md"), "Edit")
    assert "- Measured rise: 0.02" in text
    assert "kept pairs: 1,000" not in text  # not one long fact
    table = text.split("**Modules of the edit**")[1]
    head, _, first = table.strip().splitlines()[:3]
    assert head.startswith(
        "| Module | Mass to keep | Pairs kept | Norm kept | Predicted loss rise | Overlap A | Overlap G |"
    )
    for words in (
        "model.layers.0.mlp.up\\_proj",
        "60.00 %",
        "1,000 (of 4,000, 25.00 %)",
        "71.00 %",
        "0.012",
        "? 0.620",
    ):
        assert words in first.replace("`model.layers.0.mlp.up_proj`", "model.layers.0.mlp.up\\_proj")
    assert "40 more in report.json" in table
    regulator = document(run, "report-regulator.md")
    assert "Modules of the edit" not in regulator
    assert "- Modules: 70" in regulator


def test_data_behind_an_edit_is_a_table_of_plain_values(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", blocks=2)
    plan = json.loads((run / "edit/plan.json").read_text())
    factors = {
        "schema": "unlearn.factors/v1",
        "tensor_digest": digest("before"),
        "digest": digest("data"),
        "labels": "sampled",
        "n_records": 400,
        "versions": {"torch": "2.13.0"},
    }
    dump(run / "edit/plan.json", plan | {"importances": {"factors": factors}})
    write(run)
    table = section(document(run, "report.md"), "Edit").split("**Data behind the edit**")[1].strip().splitlines()
    assert table[0] == "| Set | Labels | N records | Digest |"
    assert "| factors | sampled | 400 |" in table[2]


def test_the_subject_page_is_the_same_with_and_without_probes(tmp_path: Path) -> None:
    pages = []
    for name, probes in (("with", PROBES), ("without", ())):
        run = write_run(tmp_path / name, probes=probes, blocks=2)
        write(run, ["html"], "subject")
        pages.append(re.sub(r"sha256:\w+", "", document(run, "report-subject.html")))
    assert pages[0] == pages[1]


def test_what_the_package_offers() -> None:
    for name in reports.__all__:
        assert hasattr(reports, name)
    assert {"PROBE_SCHEMA", "probe_schema"} <= set(reports.__all__)


def test_the_synthetic_probe_is_seeded() -> None:
    import random

    names = {"records": ["a"], "control": ["b"], "retain": []}
    assert kfac_result(random.Random(1), names, 1) == kfac_result(random.Random(1), names, 1)
