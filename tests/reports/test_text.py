from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.text import (
    attack_label,
    attack_order,
    clean,
    family_label,
    figure_parts,
    figure_text,
    finite,
    metric_label,
    number,
    plain,
    sentence_case,
    signed,
    tree,
    unit_words,
    when,
)
from tests.reports.synthetic import figure, rate

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text())
def test_clean_leaves_one_visible_line(text: str) -> None:
    cleaned = clean(text, 80)
    assert len(cleaned) <= 80
    assert not any(unicodedata.category(char) in HIDDEN for char in cleaned)
    cleaned.encode("utf-8")


def test_clean_spells_out_what_it_replaces() -> None:
    assert clean("a\u202eb\x00c") == "a⟨U+202E⟩b⟨U+0000⟩c"
    assert clean("two\nlines\tand\r\nmore") == "two lines and more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/somebody/models/llama", "llama"),
        ("read from /data/private/records.jsonl, 3 lines", "read from records.jsonl, 3 lines"),
        ("~/models/llama", "llama"),
        (r"C:\Users\somebody\llama", "llama"),
        ("organisation/model", "organisation/model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("[/foo] and/or", "[/foo] and/or"),
    ],
)
def test_clean_cuts_absolute_paths(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_tree_makes_any_value_safe_and_finite() -> None:
    value = tree({"a\u200b": [math.nan, math.inf, 1, True, None, "x\x07"], "b": {"c": 0.1}})
    assert value == {"a⟨U+200B⟩": [None, None, 1, True, None, "x⟨U+0007⟩"], "b": {"c": 0.1}}


def test_finite_keeps_nine_digits_and_no_negative_zero() -> None:
    assert finite(0.12345678949) == 0.123456789
    assert math.copysign(1, finite(-0.0) or 1.0) == 1.0
    assert finite(-math.inf) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.0, "0.000"),
        (0.5, "0.500"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (12345.6, "12,346"),
        (0.00012, "1.2e−4"),
        (-0.25, "−0.250"),
        (1e12, "1.0e12"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text


def test_signed() -> None:
    assert [signed(0.5), signed(-0.5), signed(0.0), signed(None)] == ["+0.500", "−0.500", "0.000", "n/a"]


def test_no_event_reads_as_an_upper_bound_and_never_as_a_point() -> None:
    assert figure_text(rate(0, 20), "extraction.greedy") == "0 of 20 (95 % CI up to 0.168)"
    assert figure_text(rate(20, 20), "extraction.greedy") == "20 of 20 (95 % CI from 0.832)"
    assert figure_text(rate(7, 20), "extraction.greedy").startswith("7 of 20 (0.350, 95 % CI ")
    assert figure_parts(rate(0, 0), "extraction.greedy") == ("n/a", "n\u00a0=\u00a00")
    degenerate = figure(0.0, 20, 0.0, 0.0, "share")
    for metric in ("extraction.greedy", "extraction_strength"):
        assert "no interval" in figure_text(degenerate, metric)
        assert "0.000 to 0.000" not in figure_text(degenerate, metric)


def test_only_yes_or_no_figures_are_counts() -> None:
    zero = rate(0, 20)
    assert figure_parts(zero, "extraction_strength")[0] == "0.000"
    assert figure_parts(zero, "retain.correct")[0] == "0 of 20"
    assert figure_parts(figure(0.1, 20, 0.05, 0.15, "share"), "correct", difference=True)[0] == "+0.100"
    assert figure_parts(figure(0.123, 20, 0.05, 0.15, "share"), "correct")[0] == "0.123"
    assert figure_parts(None) == ("n/a", "")


def test_words() -> None:
    assert metric_label("retain.loss") == "Loss, retain set"
    assert metric_label("some_new.metric") == "Some new.metric"
    symbols = ("p-value", "p_z", "n = 1", "")
    assert [sentence_case(text) for text in ("web form", *symbols)] == ["Web form", *symbols]
    assert metric_label("membership.rmia") == "Membership: RMIA"
    assert when("2026-11-03T09:12:00Z") == "2026-11-03 09:12 UTC"
    assert when("2026-11-03") == "2026-11-03"
    assert when("soon") == "soon"
    assert plain({"a_b": [1, None, 0.5e-7], "c": {}}) == "a b: 1, n/a, 5e−8; c: none"


@pytest.mark.parametrize(
    ("name", "label", "family"),
    [
        ("verbatim.greedy", "Verbatim: greedy", "Verbatim extraction"),
        ("near_verbatim.mass", "Near-verbatim: mass", "Near-verbatim extraction"),
        ("pii.inference", "PII: inference", "Personal data"),
        ("membership.min_k_plus_plus", "Membership: Min-K%++", "Membership inference"),
        ("hidden_knowledge", "Hidden knowledge", "Knowledge inside the model"),
        ("my_own.attack_two", "My own: attack two", "My own"),
    ],
)
def test_attacks_have_names_for_people(name: str, label: str, family: str) -> None:
    assert attack_label(name) == label
    assert family_label(name.partition(".")[0]) == family


def test_known_families_come_first_and_others_by_name() -> None:
    names = ["zebra.a", "membership.loss", "ape.b", "recovery.pruning", "verbatim.greedy"]
    expected = ["verbatim.greedy", "membership.loss", "recovery.pruning", "ape.b", "zebra.a"]
    assert sorted(names, key=attack_order) == expected


def test_a_unit_is_printed_where_the_name_does_not_say_it() -> None:
    assert [unit_words(unit) for unit in ("share", "probability", "AUC", "bits", "")] == ["", "", "", "bits", ""]
