"""Reports: the lists that training editors leave, drawn over steps, with their tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from reports import build, report_schema, write
from reports.sections.training import training_curves
from tests.reports.synthetic import dump, write_run
from tests.reports.test_history import document, edit_part, flat, rows_of

Json = dict[str, Any]
STEPS = {
    "steps": 3,
    "stopped": True,
    "objective": [4.0, 3.0, 2.5],
    "forget_loss": [1.0, 2.0, 3.25],
    "retain_loss": [0.5, 0.75, 0.5],
    "active": [6, 6, 4],
    "earlier": {"records": 2, "pushed": 1, "loss": [5.0, 4.5, 5.0]},
    "earlier_edits": {"edits": 1, "penalty": [0.0, 0.125, 0.25]},
}
HELD_OUT = {"held_out_forget_loss": [3.0, 2.0, 2.5, 2.25], "held_out_retain_divergence": [0.5, 0.25, 0.5, 0.5]}


def trained(run: Path, statistics: Json, parameters: Json | None = None) -> Path:
    """A forget run whose editor left these statistics."""
    write_run(run)
    delta = json.loads((run / "edit/delta.json").read_text())
    dump(run / "edit/delta.json", delta | {"statistics": statistics})
    plan = json.loads((run / "edit/plan.json").read_text())
    plan["method"]["parameters"] |= parameters or {}
    dump(run / "edit/plan.json", plan)
    return run


@pytest.mark.parametrize("audience", ["engineer", "regulator"])
def test_losses_and_groups_are_drawn_over_steps_and_listed(tmp_path: Path, audience: str) -> None:
    run = trained(tmp_path / "run", STEPS, {"bound": 3.0})
    write(run, audience=audience)
    assert rows_of(document(run, audience), "Losses in training: mean of the step's batch, nats") == [
        ["1", "1.000", "0.500", "5.000", "4.000"],
        ["2", "2.000", "0.750", "4.500", "3.000"],
        ["3", "3.250", "0.500", "5.000", "2.500"],
    ]
    listed = rows_of(document(run, audience), "Groups of adapters that are not zero: groups")
    assert [row[1] for row in listed] == ["6", "6", "4"]
    listed = rows_of(document(run, audience), "Penalty on changing earlier edits again: penalty")
    assert [float(row[1]) for row in listed] == [0, 0.125, 0.25]
    html = flat(document(run, audience, "html"))
    assert "records forgotten earlier: from 5.000 at 1 to 5.000 at 3" in html
    assert "Dashed: bound 3.000." in html
    text = edit_part(run, audience)
    assert "1, 2, 3.25" not in text  # no longer as bare numbers among the facts
    assert "pushed: 1; records: 2" in text
    assert [error.message for error in Draft202012Validator(report_schema()).iter_errors(build(run))] == []


def test_looks_at_rows_held_out_have_an_axis_of_their_own(tmp_path: Path) -> None:
    losses = {"forget_loss": [3.0, 2.0], "retain_divergence": [0.5, 0.25]}
    run = trained(tmp_path / "run", {"forget_divergence": [2.0, 1.0], "assistant": losses | HELD_OUT})
    write(run)
    text = document(run)
    assert rows_of(text, "Losses in training: mean of the step's batch, nats") == [["1", "2.000"], ["2", "1.000"]]
    assert rows_of(text, "Losses in training of the assistant: mean of the step's batch, nats") == [
        ["1", "3.000", "0.500"],
        ["2", "2.000", "0.250"],
    ]
    assert [row[0] for row in rows_of(text, "Losses on wordings held out of the assistant: mean, nats")] == [
        "0", "1", "2", "3",
    ]  # fmt: skip
    assert 'id="training-assistant' in document(run, suffix="html")


def test_groups_that_never_changed_are_said_not_drawn(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", STEPS | {"active": [6, 6, 6]})
    write(run)
    assert "Groups of adapters that are not zero: 6 at every one of 3 steps." in edit_part(run)
    assert "Groups of adapters that are not zero: groups" not in document(run)


def test_lists_of_unlike_length_are_put_side_by_side(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", {"forget_loss": [1.0, 2.0, 3.0], "retain_loss": [0.5, 0.25]})
    write(run)
    rows = rows_of(document(run), "Losses in training: mean of the step's batch, nats")
    assert rows[-1] == ["3", "3.000", "n/a"]


@pytest.mark.parametrize(
    "statistics",
    [
        {"forget_loss": 1.0},
        {"forget_loss": [1.0]},
        {"forget_loss": [1.0, math.inf]},
        {"forget_loss": [1.0, None]},
        {"forget_loss": ["1", "2"]},
        {"active": [True, False]},
        {"earlier": 3},
        {"earlier": {"loss": []}},
        {"losses": [1.0, 2.0]},
    ],
)
def test_what_cannot_be_drawn_stays_as_it_was(statistics: Json) -> None:
    assert training_curves(statistics, {"bound": "auto"}) == ([], statistics)


def test_the_statistics_themselves_are_not_changed() -> None:
    given = json.loads(json.dumps(STEPS))
    blocks, rest = training_curves(given, {})
    assert given == STEPS
    assert len(blocks) == 6  # three charts, each with its table
    assert rest == {
        "steps": 3, "stopped": True, "earlier": {"records": 2, "pushed": 1}, "earlier_edits": {"edits": 1},
    }  # fmt: skip
