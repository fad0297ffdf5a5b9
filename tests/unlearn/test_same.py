"""Records that are the same: sets that must share none are refused, and repeats within a set are one cluster."""

from __future__ import annotations

import pytest
import torch

from probes.errors import UsageError
from probes.records import ImageRecord, TokenRecord
from unlearn.records.same import clustered, expect_apart


def texts(*rows: tuple[int, ...], n_prompt: int = 1) -> list[TokenRecord]:
    return [TokenRecord(f"zq-{i}", row, n_prompt, 3) for i, row in enumerate(rows)]


def images(*values: float, label: int = 0) -> list[ImageRecord]:
    return [ImageRecord(f"zq-{i}", torch.full((1, 2, 2), value), label) for i, value in enumerate(values)]


def test_sets_with_nothing_in_common_pass() -> None:
    expect_apart({})
    expect_apart({"records": texts((1, 2)), "control": texts((2, 1)), "retain": texts((1, 2, 3))})
    expect_apart({"records": images(0.0), "retain": images(1.0), "control": images(0.0, label=1)})
    same = texts((4, 5))
    expect_apart({"records": texts((1, 2)), "retain": same, "related": same})  # trained on, both of them


@pytest.mark.parametrize(
    ("role", "other"),
    [
        ("control", "records"),
        ("retain", "records"),
        ("related", "records"),
        ("retain", "control"),
        ("related", "control"),
    ],
)
def test_a_shared_record_is_named_by_its_row(role: str, other: str) -> None:
    sets = {role: texts((9, 9), (1, 2, 3), (8, 8)), other: texts((7, 7), (1, 2, 3), n_prompt=1)}
    with pytest.raises(UsageError, match=rf"found 1 of {role} among {other} \(row 2\); take them out") as found:
        expect_apart(sets)
    assert "zq" not in str(found.value)


def test_another_split_is_the_same_text() -> None:
    with pytest.raises(UsageError, match="1 of control among records"):
        expect_apart({"records": texts((1, 2, 3)), "control": texts((1, 2, 3), n_prompt=2)})


def test_every_pair_and_the_first_rows() -> None:
    rows = tuple((i, i) for i in range(7))
    with pytest.raises(UsageError) as found:
        expect_apart({"records": texts(*rows), "control": texts((0, 0)), "retain": texts(*rows)})
    said = "1 of control among records (row 1); 7 of retain among records (row 1, 2, 3, 4, 5, ...); 1 of retain among"
    assert said in str(found.value)
    with pytest.raises(UsageError, match="1 of retain among records"):
        expect_apart({"records": images(0.5, 1.0), "retain": images(1.0)})


def test_repeats_are_one_cluster() -> None:
    rows = texts((1, 2), (3, 4), (1, 2), (5, 6), (5, 6))
    rows[4] = TokenRecord("zq", (5, 6), 1, 3, group="a person")
    found, repeated = clustered(rows)
    assert [record.group for record in found] == [
        "row 1 and the same",
        None,
        "row 1 and the same",
        "a person",
        "a person",
    ]
    assert repeated == 2
    assert [(r.record_id, r.ids) for r in found] == [(r.record_id, r.ids) for r in rows]
    assert clustered(found) == (found, 2)
    assert clustered(texts((1, 2), (2, 1))) == (texts((1, 2), (2, 1)), 0)
    pictures, repeated = clustered([*images(0.5, 1.0, 0.5), *images(0.5, label=1)])
    assert [record.group for record in pictures] == ["row 1 and the same", None, "row 1 and the same", None]
    assert repeated == 1
    stated = [TokenRecord("x", (1, 2), 1, 3, group=name) for name in ("a", "b")]
    assert clustered(stated) == (stated, 1)  # what a user says of groups stays
