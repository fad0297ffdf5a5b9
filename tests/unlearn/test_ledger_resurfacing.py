"""Records of earlier requests that come back fail the run that brought them back; chance and old faults do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from probes.errors import IntegrityError
from unlearn.ledger.resurfacing import MARGIN, Part, judge, margin_of, sentences
from unlearn.requests.presets import Criterion


def table(probability: Any, emitted: Any = 0, n: int = 40) -> pd.DataFrame:
    """[n] records: the first `emitted` of them emitted, probabilities around a level."""
    noise = np.random.default_rng(7).normal(0, 0.01, n)
    hits = np.arange(n) < emitted if isinstance(emitted, int) else np.asarray(emitted)
    values = np.clip(np.broadcast_to(np.asarray(probability, dtype=float), n) + noise, 0, 1)
    return pd.DataFrame({"record_id": [f"r-{i}" for i in range(n)], "emitted": hits, "probability": values})


def part(n: int, size: int = 40, then: pd.DataFrame | None = None, control: pd.DataFrame | None = None) -> Part:
    return Part(n, [f"r-{n}-{i}" for i in range(size)], then, control)


def one(now: pd.DataFrame, control: pd.DataFrame | None, given: Part) -> dict[str, Any]:
    found = judge(now, control, [given], "causal_lm")
    assert found["status"] == found["requests"][0]["status"]
    row: dict[str, Any] = found["requests"][0]
    return row


def test_nothing_came_back() -> None:
    row = one(table(0.1), table(0.1), part(3, then=table(0.1), control=table(0.1)))
    assert (row["status"], row["emitted"], row["emitted_again"], row["again"]) == ("met", 0, 0, [])


def test_one_record_emitted_again_is_enough_and_is_named() -> None:
    now = table(0.1, np.arange(40) == 17)
    row = one(now, table(0.1), part(3, then=table(0.1), control=table(0.1)))
    assert (row["status"], row["again"]) == ("not met", ["r-3-17"])
    assert "1 of 40 emitted again" in row["reason"]


def test_what_was_emitted_then_has_not_come_back() -> None:
    row = one(table(0.1, 2), table(0.1), part(3, then=table(0.1, 2), control=table(0.1)))
    assert (row["status"], row["found_then"], row["emitted"], row["emitted_again"]) == ("met", 2, 2, 0)
    row = one(table(0.1, np.arange(40) == 1), table(0.1), part(3, then=table(0.1, 1), control=table(0.1)))
    assert row["status"] == "not met"  # another one than then


def test_without_the_earlier_table_every_hit_counts() -> None:
    row = one(table(0.1, 1), table(0.1), part(3))
    assert (row["status"], row["found_then"]) == ("not met", None)


def test_a_probability_above_never_seen_records_comes_back_unseen_by_greedy() -> None:
    row = one(table(0.5), table(0.1), part(3, then=table(0.1), control=table(0.1)))
    assert (row["status"], row["emitted_again"]) == ("not met", 0)
    assert "against the control" in row["reason"]


def test_what_never_went_is_compared_with_then() -> None:
    then = {"then": table(0.5), "control": table(0.1)}
    assert one(table(0.5), table(0.1), part(3, **then))["status"] == "met"
    assert one(table(0.52), table(0.1), part(3, **then))["status"] == "met"
    row = one(table(0.7), table(0.1), part(3, **then))
    assert row["status"] == "not met"
    assert "above the control already then" in row["reason"]


def test_few_records_leave_it_open() -> None:
    now, control = table([0.1, 0.3, 0.05], n=3), table(0.1)
    row = one(now, control, part(3, 3, then=table([0.1, 0.1, 0.1], n=3), control=control))
    assert row["status"] == "inconclusive"


def test_few_records_that_have_not_moved_have_not_come_back() -> None:
    still, control = table([0.1, 0.2, 0.05], n=3), table(0.1)
    assert one(still, control, part(3, 3))["status"] == "inconclusive"
    row = one(still, control, part(3, 3, then=still, control=control))
    assert (row["status"], row["reason"]) == ("met", "probability against then: no record moved")


def test_without_a_control_set_then_is_the_measure() -> None:
    assert one(table(0.1), None, part(3, then=table(0.1)))["status"] == "met"
    assert one(table(0.4), None, part(3, then=table(0.1)))["status"] == "not met"
    row = one(table(0.4), None, part(3))
    assert row["status"] == "inconclusive"
    assert "could not be compared" in row["reason"]


def test_each_request_is_judged_by_itself() -> None:
    now = pd.concat([table(0.1), table(0.1, np.arange(40) == 0), table(0.1)], ignore_index=True)
    parts = [part(3, then=table(0.1), control=table(0.1)), part(5), part(9)]
    found = judge(now, table(0.1), parts, "causal_lm")
    assert [row["status"] for row in found["requests"]] == ["met", "not met", "met"]
    assert found["status"] == "not met"
    assert "entry 5" in found["reason"]
    assert found["requests"][1]["again"] == ["r-5-0"]
    assert [line.split(":")[0] for line in sentences(found)] == [f"entry {n}, 40 records" for n in (3, 5, 9)]


def test_a_small_group_that_comes_back_is_not_lost_in_a_large_one() -> None:
    now = pd.concat([table(0.1, n=200), table(0.9, n=10)], ignore_index=True)
    found = judge(now, table(0.1), [part(3, 200), part(5, 10)], "causal_lm")
    assert [row["status"] for row in found["requests"]] == ["met", "not met"]


def test_rows_must_match_records() -> None:
    with pytest.raises(IntegrityError, match="every record forgotten earlier"):
        judge(table(0.1), None, [part(3, 39)], "causal_lm")


def images(correct: float, n: int = 200) -> pd.DataFrame:
    hits = np.arange(n) < round(correct * n)
    return pd.DataFrame({"correct": hits, "label_probability": np.where(hits, 0.9, 0.1)})


def test_images_are_compared_with_never_seen_ones_not_counted() -> None:
    kept = Part(3, [""] * 200, images(0.6), images(0.6))
    assert judge(images(0.62), images(0.7), [kept], "image_classification")["status"] == "met"  # as never-seen ones
    gone = Part(3, [""] * 200, images(0.0), images(0.0))
    found = judge(images(0.9), images(0.0), [gone], "image_classification")
    assert found["status"] == "not met"
    assert (found["requests"][0]["emitted"], found["requests"][0]["found_then"]) == (None, 0)
    assert judge(images(0.6), None, [kept], "image_classification")["requests"][0]["found_then"] == 120


def test_the_margin_is_the_sealed_one() -> None:
    against = {"metric": "probability", "test": "noninferiority", "against": "control"}
    assert margin_of([]) == MARGIN
    assert margin_of([Criterion(id="a", margin=0.2, **against)]) == 0.2
    assert margin_of([Criterion(id="a", metric="loss", test="noninferiority", against="control", margin=0.3)]) == MARGIN
    assert judge(table(0.2), table(0.1), [part(3)], "causal_lm", margin=0.2)["status"] == "met"
    assert judge(table(0.2), table(0.1), [part(3)], "causal_lm")["status"] == "not met"
