"""Reports of runs with a ledger: the chain of edits, what came back, the requests of a batch; and the active blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import reports
from reports import ReportError, build, check, report_schema, write
from reports.build import dumps
from reports.figures import Link, chain
from reports.history import CAME_BACK
from reports.sections.active import active_blocks, groups_of
from tests.reports.synthetic import HOSTILE, dump, write_run
from tests.reports.synthetic_history import (
    BACK,
    GONE,
    QUIET,
    REASON,
    Request,
    write_groups_run,
    write_history_run,
)
from tests.reports.test_documents import FORBIDDEN, TITLES, Page, section

Json = dict[str, Any]
BATCH = (("req-a", 12, "criteria met"), (None, 8, "inconclusive"))
RUNS: dict[str, Json] = {
    "quiet": {"earlier": QUIET},
    "came back": {"earlier": BACK},
    "purged": {"earlier": GONE},
    "all purged": {"earlier": GONE[:1], "verdict": "inconclusive"},
    "undecided": {"earlier": (Request(3, 2, "inconclusive"),), "verdict": "inconclusive"},
    "first": {"earlier": ()},
    "stopped": {"earlier": QUIET, "judged": False},
    "batch": {"earlier": BACK, "batch": BATCH},
    "batch stopped": {"earlier": (), "batch": BATCH, "judged": False},
    "images": {"earlier": (Request(3, 4, "not met", after=3), Request(5, 2)), "task": "image_classification"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("history")
    made = {name: write_history_run(root / name, **options) for name, options in RUNS.items()}
    made["no ledger"] = write_run(root / "no ledger")
    for run in made.values():
        for audience in reports.AUDIENCES:
            write(run, audience=audience)
    return made


def document(run: Path, audience: str = "engineer", suffix: str = "md") -> str:
    name = "report" if audience == "engineer" else f"report-{audience}"
    return (run / "report" / f"{name}.{suffix}").read_text(encoding="utf-8")


def flat(text: str) -> str:
    return " ".join(text.replace("\\", "").split())


def part(run: Path, audience: str = "engineer") -> str:
    text = flat(section(document(run, audience), "Forgotten or hidden?"))
    return text[text.index("Earlier requests") :]


def rows_of(text: str, caption: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = text[text.index(caption) :].split("\n\n")[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", [*RUNS, "no ledger"])
def test_reports_match_the_schema_and_the_documents_are_whole(runs: dict[str, Path], name: str) -> None:
    report = json.loads(dumps(build(runs[name])))
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(report)] == []
    assert ("history" in report) == (name != "no ledger")
    assert check(runs[name]) == []
    for audience in reports.AUDIENCES:
        Page(document(runs[name], audience, "html"))
        for suffix in ("html", "md"):
            assert not FORBIDDEN.search(document(runs[name], audience, suffix))
    titles = re.findall(r"^## \d+ (.+)$", document(runs[name]), re.M)
    if "stopped" not in name:
        assert tuple(titles) == TITLES


def test_a_run_without_a_ledger_reads_as_before(runs: dict[str, Path]) -> None:
    run = runs["no ledger"]
    for audience in reports.AUDIENCES:
        for suffix in ("html", "md"):
            assert "earlier request" not in document(run, audience, suffix).lower()
    bare = write_history_run(run.parent / "bare", ())
    (bare / "inputs/history.json").unlink()
    decided = json.loads((bare / "compare/criteria.json").read_text())
    assert decided.pop("earlier") is None
    dump(bare / "compare/criteria.json", decided)
    write(bare)
    assert document(bare, suffix="html") == document(run, suffix="html")
    assert document(bare) == document(run)


def test_the_figures_of_each_earlier_request(runs: dict[str, Path]) -> None:
    found = build(runs["came back"])["history"]
    assert [found[key] for key in ("status", "margin", "measure")] == ["not met", 0.05, "emitted"]
    keys = ("n", "records", "found_then", "found_before", "found_after", "found_again", "status", "missing")
    assert [tuple(row[key] for key in keys) for row in found["earlier"]] == [
        (3, 2, 0, 0, 2, 2, "not met", None),
        (5, 3, 0, 0, 0, 0, "met", None),
        (7, 4, 0, 0, 0, 0, "inconclusive", None),
    ]
    assert found["earlier"][0]["again"] == BACK[0].names
    quiet = build(runs["quiet"])["history"]["earlier"][1]
    assert [quiet[f"found_{when}"] for when in ("then", "before", "after", "again")] == [1, 1, 1, 0]
    purged = build(runs["purged"])["history"]["earlier"]  # the tables hold the second request's records alone
    assert [row["found_after"] for row in purged] == [None, 0]
    assert [row["status"] for row in purged] == [None, "met"]


def test_what_came_back_stands_in_the_table_with_its_reason(runs: dict[str, Path]) -> None:
    engineer, regulator = (
        rows_of(document(runs["came back"], a), "Earlier requests, oldest") for a in reports.AUDIENCES[:2]
    )
    assert [row[0] for row in engineer] == ["3", "5", "7"]
    assert engineer[0][1] == "2"
    assert engineer[0][3:8] == ["0", "0", "2", "2", "✕ came back"]
    assert REASON["not met"] in engineer[0][8]
    assert [row[7] for row in regulator] == ["✕ came back", "✓ did not come back", "? not decided"]
    assert regulator[0][8] == "2 of 2 records written out word for word again"
    assert not any(REASON[status] in flat(document(runs["came back"], "regulator")) for status in REASON)
    text = part(runs["came back"])
    assert "1 of 3 earlier requests came back (entry 3). This fails the run, whatever its own criteria say." in text
    assert all(name in text for name in BACK[0].names)
    assert BACK[1].names[0] not in text


@pytest.mark.parametrize("audience", reports.AUDIENCES)
def test_the_verdict_banner_says_that_records_came_back(runs: dict[str, Path], audience: str) -> None:
    said = CAME_BACK[audience].format(entries="entry 3")
    for name in ("came back", "images", "batch"):
        text = flat(document(runs[name], audience))
        assert f"> **{said}**" in text
        assert text.index(said) < text.index("## ")
        page = Page(document(runs[name], audience, "html"))
        assert said in page.text
        assert "note" in page.all("p", "role")
    for name in ("quiet", "purged", "undecided", "first", "stopped", "no ledger"):
        assert said.split("(")[0] not in flat(document(runs[name], audience))


def test_the_sentence_beside_the_verdict_counts_earlier_requests(runs: dict[str, Path]) -> None:
    said = {
        "came back": "Of 3 earlier requests: 1 came back, 1 did not come back, 1 not decided.",
        "quiet": "Of 2 earlier requests: 2 did not come back.",
        "purged": "Of 2 earlier requests: 1 not asked again, 1 did not come back.",
        "all purged": "Of 1 earlier request: 1 not asked again.",
        "batch": "1 not decided. Of 2 requests in this edit: 1 criteria met, 1 inconclusive.",
    }
    for name, words in said.items():
        assert words in flat(document(runs[name])).split("Claim level")[0]
    for name in ("first", "stopped", "batch stopped"):
        assert "Of 2 earlier" not in flat(document(runs[name]))
        assert "in this edit" not in flat(document(runs[name]))


def test_every_outcome_has_its_note(runs: dict[str, Path]) -> None:
    said = {
        "quiet": "None of 2 earlier requests asked again came back.",
        "purged": "None of 1 earlier request asked again came back. 1 earlier request could not be asked again; the",
        "all purged": "Not decided: no earlier request could be asked again.",
        "undecided": "Not decided: none was shown to have come back, and 1 may have.",
        "first": "No request was carried out earlier on the way to this checkpoint",
        "stopped": "not run: the run stopped before the earlier requests were judged.",
    }
    for name, words in said.items():
        for audience in ("engineer", "regulator"):
            assert words in part(runs[name], audience), (name, audience)
    for audience in ("engineer", "regulator"):
        assert "| not asked again | its private" in part(runs["purged"], audience)
        assert "its private folder was purged" in part(runs["purged"], audience)
    assert "| not judged yet | not judged in this run |" in part(runs["stopped"])
    assert "Chain" not in document(runs["first"])


def test_the_chain_leads_from_the_original_to_this_copy(runs: dict[str, Path]) -> None:
    report = build(runs["came back"])
    html = document(runs["came back"], suffix="html")
    alt = html.split("Chain of 5 checkpoints.")[1].split("</p>")[0]
    digests = [report["history"]["root"], *(row["checkpoint"] for row in report["history"]["earlier"])]
    digests.append(report["checkpoint"]["after"]["tensor_digest"])
    places = [alt.index(value[:19]) for value in digests]
    assert places == sorted(places)
    assert "Copy of entry 3 " in alt
    assert "✕ came back" in alt
    assert "This copy" in alt
    assert "Chain of 3 checkpoints" in document(runs["stopped"], suffix="html")  # no copy was measured


def test_a_long_chain_is_cut_in_the_middle() -> None:
    links = [Link("N", f"Copy {i}.", "sha256:0", "", "") for i in range(30)]
    drawn = chain("c", "title", links)
    assert [int(n) for n in re.findall(r">Copy (\d+)\.<", drawn)] == [0, 1, 2, 3, *range(22, 30)]
    assert "18 more copies" in drawn
    assert "more copies" not in chain("c", "title", links[:12])


def test_what_the_own_run_found_is_not_known_where_it_is_gone(runs: dict[str, Path], tmp_path: Path) -> None:
    run = write_history_run(tmp_path / "run", (Request(3, 2, then=1, before=1, after=1), Request(5, 3, known=False)))
    write(run)
    cells = rows_of(document(run), "Earlier requests, oldest")
    assert [row[3:6] for row in cells] == [["1", "1", "1"], ["not known", "0", "0"]]
    assert [row[3] for row in rows_of(document(runs["purged"]), "Earlier requests, oldest")] == ["not known", "0"]
    assert "after its own run" not in part(runs["stopped"])  # nothing was judged
    alone = write_history_run(tmp_path / "alone", (Request(3, 2, known=False),))
    write(alone)
    assert [row[3] for row in rows_of(document(alone), "Earlier requests, oldest")] == ["not known"]


def test_images_count_predicted_labels(runs: dict[str, Path]) -> None:
    found = build(runs["images"])["history"]
    assert found["measure"] == "correct"
    assert [row["found_after"] for row in found["earlier"]] == [3, 0]
    text = part(runs["images"])
    assert "Label predicted" in text
    assert "since its own run" not in text
    assert "since its own run" in part(runs["quiet"])
    assert "the model is surer of these records than the checks allow" in part(runs["images"], "regulator")


def test_each_request_of_a_batch_has_its_verdict(runs: dict[str, Path]) -> None:
    first, second = rows_of(document(runs["batch"]), "Verdict of each request")
    assert (first[0], first[1], first[2], first[3], first[4]) == ("1 (req-a)", "12", "✓ criteria met", "3 of 3", "none")
    assert (second[0], second[2], second[4]) == ("2 (no id given)", "? inconclusive", "C1 inconclusive")
    assert build(runs["batch"])["history"]["requests"][1]["criteria"][0]["status"] == "inconclusive"
    assert "not judged yet" in part(runs["batch stopped"])
    assert "carried out together" not in document(runs["quiet"])


def test_the_subject_reads_nothing_about_other_people(runs: dict[str, Path]) -> None:
    text = flat(document(runs["batch"], "subject"))
    assert "2 requests were carried out together, yours among them." in text
    assert "has come back, so this copy did not pass" in text
    assert "was not found to have come back" in flat(document(runs["quiet"], "subject"))
    assert "without a clear answer" in flat(document(runs["undecided"], "subject"))
    assert "For some earlier requests this could not be looked at again." in flat(document(runs["purged"], "subject"))
    report = build(runs["batch"])
    others = [row["checkpoint"] for row in report["history"]["earlier"]] + BACK[0].names
    for words in ("req-a", "entry", "ledger", *(value[:19] for value in others)):
        for suffix in ("md", "html"):
            body = Page(document(runs["batch"], "subject", suffix)).text if suffix == "html" else text
            assert words not in body, words


def test_time_and_method_of_an_earlier_request_are_shown_where_they_were_recorded(tmp_path: Path) -> None:
    row = Request(3, 2, method="gs_lora", finished="2026-11-20T08:30:11Z")
    run = write_history_run(tmp_path / "run", (row, Request(5, 2)))
    write(run)
    cells = rows_of(document(run), "Earlier requests, oldest")
    assert [line[0].replace("\\", "") for line in cells] == ["3 (2026-11-20 08:30 UTC; gs_lora)", "5"]


def test_tables_that_do_not_fit_the_history_give_no_counts(tmp_path: Path) -> None:
    run = write_history_run(tmp_path / "run", QUIET)
    (run / "after/earlier.parquet").unlink()
    found = build(run)["history"]["earlier"]
    assert [row["found_after"] for row in found] == [None, None]
    assert [row["found_before"] for row in found] == [0, 1]


def test_requests_that_were_not_judged_are_not_said_to_be_fine(tmp_path: Path) -> None:
    run = write_history_run(tmp_path / "run", QUIET, verdict="inconclusive")
    (run / "compare/earlier.json").unlink()
    decided = json.loads((run / "compare/criteria.json").read_text())
    dump(run / "compare/criteria.json", decided | {"earlier": decided["earlier"] | {"status": "inconclusive"}})
    write(run)
    assert "Not decided: none was shown to have come back, and 2 may have." in part(run)
    assert "did not come back" not in part(run)


def test_several_that_came_back_are_all_named(tmp_path: Path) -> None:
    run = write_history_run(tmp_path / "run", [Request(n, 2, "not met", after=1) for n in (3, 5)])
    write(run)
    assert "2 of 2 earlier requests came back (entries 3, 5)." in part(run)
    assert CAME_BACK["engineer"].format(entries="entries 3, 5") in flat(document(run))


def test_a_damaged_history_is_refused_without_its_text(tmp_path: Path) -> None:
    run = write_history_run(tmp_path / "run", QUIET)
    dump(run / "inputs/history.json", {"earlier": [{"n": "secret"}]})
    with pytest.raises(ReportError) as caught:
        build(run)
    assert caught.value.exit_code == 4
    assert "secret" not in str(caught.value)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    rows = [Request(n, 1, missing=text, method=text) for n, text in enumerate(HOSTILE, 1)]
    run = write_history_run(tmp_path / "run", (*rows, Request(90, 2)))
    write(run)
    page = Page(document(run, suffix="html"))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert HOSTILE[0] in page.text
    assert "secret/model" not in page.text
    assert check(run) == []


# -- the blocks that an editor with groups changed ---------------------------------------------------------------------

GROUPS = [(f"model.layers.{block}", block, 0.0 if block in (0, 2) else 0.5 + block) for block in range(4)]


def edit_part(run: Path, audience: str = "engineer") -> str:
    return flat(section(document(run, audience), "Edit"))


@pytest.mark.parametrize("audience", ["engineer", "regulator"])
def test_active_blocks_are_drawn_and_listed(tmp_path: Path, audience: str) -> None:
    run = write_groups_run(tmp_path / "run", GROUPS)
    write(run, audience=audience)
    text = edit_part(run, audience)
    assert "2 of 4 blocks with adapters active" in text
    table = rows_of(document(run, audience), "Blocks of the edit")
    assert [(row[0], row[1]) for row in table] == [("0", "zero"), ("1", "active"), ("2", "zero"), ("3", "active")]
    assert [row[2] for row in table] == ["0", "1.500", "0", "3.500"]
    assert "Groups of the edit" not in text
    assert "Active: block 1 1.500, block 3 3.500." in flat(document(run, audience, "html"))
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(build(run))] == []


def test_groups_finer_than_blocks_are_put_together(tmp_path: Path) -> None:
    groups = [("b.1.up", 1, 3.0), ("b.1.down", 1, 4.0), ("b.0.up", 0, 0.0), ("b.0.down", 0, 0.0)]
    run = write_groups_run(tmp_path / "run", groups)
    for audience in ("engineer", "regulator"):
        write(run, audience=audience)
    assert "1 of 2 blocks with adapters active, 2 of 4 groups" in edit_part(run)
    assert rows_of(document(run), "Blocks of the edit") == [
        ["0", "zero", "0", "2", "0"],
        ["1", "active", "2", "2", "5.000"],
    ]
    assert len(rows_of(document(run), "Groups of the edit")) == 4
    assert "Groups of the edit" not in edit_part(run, "regulator")


def test_an_edit_that_emptied_every_group_says_none(tmp_path: Path) -> None:
    run = write_groups_run(tmp_path / "run", [(name, block, 0.0) for name, block, _ in GROUPS])
    write(run)
    assert "0 of 4 blocks with adapters active" in edit_part(run)
    assert "Active: none." in flat(document(run, suffix="html"))


@pytest.mark.parametrize(
    "statistics",
    [
        {},
        {"groups": 3},
        {"groups": []},
        {"groups": [{"name": "a", "block": None, "norm": 1.0}]},
        {"groups": [{"name": "a", "block": 0, "norm": None}]},
        {"groups": ["a"]},
    ],
    ids=["none", "a number", "empty", "outside the blocks", "not a number", "names"],
)
def test_other_editors_have_no_such_figure(statistics: Json) -> None:
    assert groups_of(statistics) == []
    assert active_blocks(statistics, "engineer") == []
