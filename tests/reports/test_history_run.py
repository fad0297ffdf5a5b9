"""A real run of the pipeline, with a ledger, on a tiny model: what it writes about earlier requests is what a report
reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from jsonschema import Draft202012Validator

from reports import check, report_schema, write
from tests.unlearn.ledger_world import Requests, quick
from unlearn.api import Run, forget


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """One request, and two more in one edit of the copy it left."""
    world = Requests.make(tmp_path_factory.mktemp("requests"))
    store = world.folder / "store"
    with quick():
        first = forget(world.request("a", "e1"), ledger=store)
        batch = [world.request(name, "e2") for name in ("b", "c")]
        return [first, forget(batch, ledger=store, chain=True)]


def report_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report/report.json").read_text())
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(found)] == []
    return found


def test_the_report_of_a_chain_holds_what_the_run_wrote(chained: list[Run]) -> None:
    first, second = (report_of(run.path) for run in chained)
    assert (first["history"]["earlier"], first["history"]["requests"]) == ([], [])
    (earlier,) = second["history"]["earlier"]
    judged = json.loads((chained[1].path / "compare/earlier.json").read_text())["requests"][0]
    assert earlier["n"] == judged["n"] == 3
    assert (earlier["status"], earlier["found_after"]) == (judged["status"], judged["emitted"])
    assert (earlier["records"], earlier["found_before"], earlier["found_again"]) == (2, 0, judged["emitted_again"])
    then = pd.read_parquet(chained[0].path / "after/records.parquet")["emitted"]
    assert earlier["found_then"] == int(then.sum())
    digests = [first["checkpoint"][arm]["tensor_digest"] for arm in ("before", "after")]
    assert [second["history"]["root"], earlier["checkpoint"]] == digests
    assert second["history"]["parent"] == digests[1]
    rows = second["history"]["requests"]
    assert [(row["records"], row["verdict"]) for row in rows] == [
        (2, "inconclusive")
    ] * 2  # as what came of the earlier one is


def test_its_documents_have_the_part_and_render_again_to_the_same_bytes(chained: list[Run]) -> None:
    for audience in ("engineer", "regulator", "subject"):
        write(chained[1].path, audience=audience)
    assert check(chained[1].path) == []
    text = (chained[1].path / "report/report.md").read_text()
    assert "Earlier requests, oldest first" in text
    assert "Verdict of each request" in text
    assert "of 1 earlier request" in text.lower()
