"""Refusals: what counts, what does not."""

from __future__ import annotations

import pytest

from probes.collateral.refusals import PHRASES, UNSAFE, WINDOW, refuses
from probes.errors import UsageError


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "  I\n can’t   say.",
        "I’M SORRY, BUT no.",
        "Well. As an AI, I do not do this.",
        "I don't know who that is.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses([text]).tolist() == [True]


@pytest.mark.parametrize(
    "text",
    ["", "The capital is Paris.", "Hawaii cannot vote", "i cannotate", "x" * WINDOW + " I cannot help with that."],
)
def test_control_no_refusals(text: str) -> None:
    assert refuses([text]).tolist() == [False]


def test_a_list_of_your_own() -> None:
    assert refuses(["Nein, danke.", "I cannot."], ["nein"]).tolist() == [True, False]
    assert refuses([]).tolist() == []
    for phrases in ([], [" "]):
        with pytest.raises(UsageError, match="phrases"):
            refuses(["a"], phrases)


def test_the_lists() -> None:
    assert all(phrase == phrase.casefold() for phrase in PHRASES)
    assert len(set(PHRASES)) == len(PHRASES)
    assert len(set(UNSAFE)) == len(UNSAFE) >= 10
    assert not refuses(UNSAFE).any()
