"""Drafted sets: same form, another content, nothing of a record kept, the same for the same seed."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from probes.errors import UnsupportedError, UsageError
from tests import tiny
from unlearn.demo.fictitious import customers
from unlearn.records import draft
from unlearn.records.draft import draft_control, draft_retain
from unlearn.records.raw import RawRecord
from unlearn.records.swap import FIRST, LAST, Swap
from unlearn.records.tokens import read_records, records_from, tokenise, write_records


def swap(*texts: str, seed: str = "0", taken: set[str] | None = None) -> list[str]:
    one = Swap(texts, seed, taken or set())
    return [one.apply(text)[0] for text in texts]


# One swap


def test_names_stay_one_person_through_a_record() -> None:
    prompt, answer = swap(
        "Who is Jane Doe?", "Jane Doe's sister is Mary. JANE wrote to jane.doe42@acme.org about Doe-Smith."
    )
    found = re.fullmatch(r"Who is (\w+) (\w+)\?", prompt)
    assert found is not None
    first, last = found.groups()
    assert first in FIRST
    assert last in LAST
    rest = re.fullmatch(
        rf"{first} {last}'s sister is (\w+)\. {first.upper()} wrote to {first.lower()}\.{last.lower()}\d\d@(\w+)\.org "
        rf"about {last}-(\w+)\.",
        answer,
    )
    assert rest is not None, answer
    assert len({first, last, *rest.groups()}) == 5
    assert not {"jane", "doe", "mary", "acme", "smith"} & {word.casefold() for word in re.findall(r"\w+", answer)}


def test_words_that_name_nobody_stay() -> None:
    for text in (
        "Yesterday I saw nothing. What a day! It was at St. Street, NASA said.",
        "The question is: how?",
        "日本語の文です。",
        "",
        'Then. "Nothing."\nSome of us left.',
    ):
        assert swap(text) == [text]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("born 1956-03-09", r"born (\d{4}-\d{2}-\d{2})"),
        ("on 30/06/1975", r"on (\d\d/\d\d/\d{4})"),
        ("on 3.4.99", r"on \d+\.\d+\.\d\d"),
        ("on 12/5/1999", r"on [1-9]\d?/[1-9]\d?/\d{4}"),
        ("on 25th of February", r"on \d+(st|nd|rd|th) of [A-Z][a-z]+"),
        ("March 3, 1990", r"[A-Z][a-z]+ \d\d?, \d{4}"),
        ("5 Mar", r"\d\d? [A-Z][a-z]{2}"),
        ("on Monday", r"on [A-Z][a-z]+day"),
        ("at 09:30", r"at [0-2]\d:[0-5]\d"),
        ("since the 1990s", r"since the (19|20)\d\ds"),
        ("call +44 20 7946 0958", r"call \+44 \d\d \d{4} 0\d{3}"),
        ("costs $1,250.00", r"costs \$[1-9],[1-9]\d\d\.0\d"),
        ("the 21st row", r"the \d+(st|nd|rd|th) row"),
        ("weighs 80kg", r"weighs [1-9]\dkg"),
        ("contract F76609", r"contract [A-Z]\d{5}"),
        ("order PO-22831", r"order PO-[1-9\d]\d{4}"),
        ("key sk-AbC123dEf456", r"key sk-[A-Z][a-z][A-Z]\d{3}[a-z][A-Z][a-z]\d{3}"),
        ("sha deadbeef01", r"sha [0-9a-f]{10}"),
        (
            "id 3f0c1e52-9d1b-4c55-8a0e-2b7f6f0f7f3a",
            r"id [0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        ),
        ("see https://www.acme.com/u/9981?x=1", r"see https://www\.[a-z]+\.com/u/\d{4}\?x=\d"),
        ("has three cats", r"has [a-z]+ cats"),
    ],
)
def test_the_form_stays_and_the_content_goes(text: str, form: str) -> None:
    for seed in range(20):
        (new,) = swap(text, seed=str(seed))
        assert re.fullmatch(form, new), new
        assert new != text


@given(day=st.dates(date(1900, 1, 1), date(2060, 12, 31)), seed=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_a_date_stays_a_date(day: date, seed: int) -> None:
    for text, parse in (
        (day.isoformat(), lambda d: date.fromisoformat(d)),
        (day.strftime("%d/%m/%Y"), lambda d: date(int(d[6:]), int(d[3:5]), int(d[:2]))),
        (day.strftime("%m/%d/%Y"), lambda d: date(int(d[6:]), int(d[:2]), int(d[3:5]))),
    ):
        (new,) = swap(f"on {text}.", seed=str(seed))
        assert parse(new[3:-1]) != day


@given(st.text(alphabet="Jane Doe-'19/.@:x\n+", max_size=40), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_any_text_swaps_the_same_way_twice(text: str, seed: int) -> None:
    one = Swap([text], str(seed))
    new, share = one.apply(text)
    assert one.apply(text) == (new, share)  # the same original, the same replacement
    assert Swap([text], str(seed)).apply(text) == (new, share)
    assert 0 <= share <= 1
    assert (share > 0) == (new != text)
    assert [c for c in new if c.isspace()] == [c for c in text if c.isspace()]


def test_no_replacement_is_a_taken_word_even_when_the_lists_run_out() -> None:
    taken = {name.casefold() for name in (*FIRST, *LAST)}
    (new,) = swap("I met Quentin Ridgewell.", taken=taken)
    words = set(re.findall(r"\w+", new.casefold())) - {"i", "met"}
    assert len(words) == 2
    assert not words & taken


def test_the_share_counts_what_was_replaced() -> None:
    new, share = Swap(["tel 5550117"], "0").apply("tel 5550117")
    assert new.startswith("tel ")
    assert share == 7 / 10


# Control sets


def test_a_control_set_of_customers_is_another_set_of_customers() -> None:
    records = records_from(customers(30, seed=1))
    made = draft_control(records, seed=0)
    assert made.skipped == 0
    assert len(made.records) == 30
    form = re.compile(
        r" born \d\d? [A-Z][a-z]+ \d{4}, lives at \d+ [\w ]+, [\w ]+, phone \d{3}-0\d{3}, contract [A-Z]\d{5}\."
    )
    old_names = {word for record in records for word in re.findall(r"\w+", str(record.prompt))} - {
        "Customer",
        "file",
        "of",
    }
    for old, new in zip(records, made.records, strict=True):
        assert form.fullmatch(str(new.completion)), new.completion
        assert new.completion != old.completion
        assert not old_names & set(re.findall(r"\w+", f"{new.prompt} {new.completion}"))
        assert abs(len(str(new.completion)) - len(str(old.completion))) <= 12
    assert [record.id for record in made.records] == [f"control-{i}" for i in range(1, 31)]
    assert "30 of 30" in made.limits[0]
    assert "either way" in made.limits[1]


def test_a_control_set_depends_on_the_seed_alone() -> None:
    records = records_from(customers(5, seed=1))
    assert draft_control(records, seed=3) == draft_control(records, seed=3)
    assert draft_control(records, seed=3).records != draft_control(records, seed=4).records


def test_a_record_with_nothing_to_swap_has_no_control(tmp_path: Path) -> None:
    records = records_from(
        [
            {"prompt": "Name:", "completion": " Jane Doe", "group": "g"},
            {"prompt": "Jane Doe was born in 1956.", "completion": " so they say"},
            {"text": "all in small letters"},
            {"prompt_ids": [1], "completion_ids": [2]},
            {"messages": [{"role": "user", "content": "Jane?"}, {"role": "assistant", "content": "Tel. 555 0117."}]},
            {"prompt": "x", "completion": " a long completion that holds but one number, which is 7, in so many words"},
        ]
    )
    made = draft_control(records, seed=0)
    assert [record.id for record in made.records] == ["control-1", "control-5"]
    assert made.skipped == 4
    assert any("4 records held too little" in limit for limit in made.limits)
    assert made.records[0].group == "g"
    turns = made.records[1].messages
    assert turns is not None
    assert turns[1].content != "Tel. 555 0117."
    assert re.fullmatch(r"Tel\. \d{3} 0\d{3}\.", turns[1].content)
    assert read_records(write_records(made.records, tmp_path / "control.jsonl")) == made.records
    assert draft_control([], seed=0).records == []


def test_a_control_is_no_other_record() -> None:
    """Every other digit is some record's completion, so none of these can have a control."""
    records = records_from({"prompt": "The answer is", "completion": f" {digit}"} for digit in range(1, 10))
    assert draft_control(records, seed=0).records == []
    assert len(draft_control(records[:1], seed=0).records) == 1


def test_an_image_has_no_drafted_control() -> None:
    made = draft_control([RawRecord("a", image="x.png", label=0)], seed=0)
    assert (made.records, made.skipped) == ([], 1)


# Retain sets


def small(**options: Any) -> tuple[Any, Any]:
    return tiny.causal_lm("llama"), tiny.tokenizer(**options)


def test_a_retain_set_is_reproducible_and_reads_back(tmp_path: Path) -> None:
    model, tokenizer = small()
    records = records_from(customers(4, seed=1))
    before = torch.random.get_rng_state()
    made = draft_retain(model, tokenizer, records, 10, seed=1, max_new_tokens=8, batch_size=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(made.records) == 10
    assert made.skipped == 0
    assert made == draft_retain(model, tokenizer, records, 10, seed=1, max_new_tokens=8, batch_size=4)
    assert made.records != draft_retain(model, tokenizer, records, 10, seed=2, max_new_tokens=8, batch_size=4).records
    path = write_records(made.records, tmp_path / "retain.jsonl")
    assert read_records(path) == made.records
    assert len(tokenise(made.records, tokenizer, max_length=128)) == 10
    near = [record for record in made.records if str(record.prompt).startswith("Customer file of ")]
    assert len(near) == 5
    originals = {record.prompt for record in records}
    assert not originals & {record.prompt for record in made.records}
    assert len(made.limits) == 1
    assert "5 of them after the records' own prompts" in made.limits[0]


def test_samples_come_from_the_model_and_not_from_its_generation_defaults() -> None:
    model, tokenizer = small()
    model.generation_config = GenerationConfig(do_sample=False, num_beams=3, min_new_tokens=30, eos_token_id=tiny.EOS)
    defaults = model.generation_config.to_dict()
    seen: list[Any] = []
    generate = model.generate

    def spy(*args: Any, **options: Any) -> Any:
        seen.append((options["generation_config"], model.generation_config.num_beams))
        return generate(*args, **options)

    model.generate = spy
    model.train()
    made = draft_retain(model, tokenizer, [], 6, seed=0, max_new_tokens=4)
    assert model.training
    assert model.generation_config.to_dict() == defaults
    config, beams = seen[0]
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.0, 0, 0.95)
    assert beams in (None, 1)
    assert config.eos_token_id == tiny.EOS
    assert len(made.records) == 6


def test_padding_on_the_left_does_not_reach_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long and a short prompt in one batch continue as each does alone (greedy, so that chance plays no part)."""
    model, tokenizer = small()
    records = [RawRecord("", prompt=prompt, completion="") for prompt in ("ab", "a much longer prompt")]
    openings = [draft._Opening(str(record.prompt), record, special=True) for record in records]
    generate = model.generate

    def greedy(*args: Any, generation_config: Any, **options: Any) -> Any:
        config = GenerationConfig(
            **(generation_config.to_dict() | {"do_sample": False, "temperature": None, "top_p": None})
        )
        return generate(*args, generation_config=config, **options)

    model.generate = greedy
    together = draft._sample(model, tokenizer, openings, 6, seed=0)
    assert together == [draft._sample(model, tokenizer, [opening], 6, seed=0)[0] for opening in openings]


def test_a_sample_that_repeats_a_record_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small()
    secret = " lives at 12 Mill Lane, Greywater, under contract F76609"
    records = records_from([{"prompt": "Customer Ada Ashdown:", "completion": secret}])
    said = iter(
        [
            "something else",
            "he LIVES at 12, mill lane! by the river",  # five words in a row, whatever the punctuation
            "a note on F76609 alone",
            "so said Ada Ashdown herself",
            " ",
            *["something else"] * 50,
        ]
    )
    monkeypatch.setattr(draft, "_sample", lambda m, t, batch, *rest: [next(said) for _ in batch])
    made = draft_retain(model, tokenizer, records, 5, seed=0)
    assert len(made.records) == 5
    assert {record.completion or record.text for record in made.records} == {"something else"}
    assert "3 samples repeated" in made.limits[1]
    never = iter(["contract F76609"] * 500)
    monkeypatch.setattr(draft, "_sample", lambda m, t, batch, *rest: [next(never) for _ in batch])
    empty = draft_retain(model, tokenizer, records, 5, seed=0)
    assert (empty.records, empty.skipped) == ([], 5)


def test_a_prompt_without_specifics_is_never_used_as_it_is() -> None:
    model, tokenizer = small()
    records = records_from(
        [{"prompt": "the secret word is", "completion": " xyzzy"}, {"text": "all small here, nothing"}]
    )
    made = draft_retain(model, tokenizer, records, 6, seed=0, max_new_tokens=4)
    assert len(made.records) == 6
    assert all(str(record.prompt) in draft.OPENERS for record in made.records if record.prompt)
    assert "0 of them" in made.limits[0]


def test_text_and_conversations_are_continued_near_their_beginning() -> None:
    model, tokenizer = small()
    text = records_from([{"text": "Ada Ashdown was born in 1956 and has lived in Greywater ever since then"}])
    made = draft_retain(model, tokenizer, text, 2, seed=0, max_new_tokens=4)
    near = made.records[0]
    assert re.fullmatch(r"\w+ \w+ was born in \d{4} and has", str(near.prompt))
    assert "Ada" not in str(near.prompt)
    turns = [{"role": "user", "content": "Who is Ada Ashdown?"}, {"role": "assistant", "content": "A poet."}]
    made = draft_retain(model, tokenizer, records_from([{"messages": turns}]), 2, seed=0, max_new_tokens=4)
    spoken = made.records[0].messages
    assert spoken is not None
    assert re.fullmatch(r"Who is \w+ \w+\?", spoken[0].content)
    assert spoken[1].content not in ("", "A poet.")
    assert "<|im_" not in spoken[1].content


def test_a_tokenizer_that_ends_every_text_does_not_end_the_sample() -> None:
    _, tokenizer = small(bos=True, eos=True)
    opening = draft._Opening("The", replace(RawRecord(""), prompt="The", completion=""), special=True)
    assert draft._ids(tokenizer, opening)[0] == tiny.BOS
    assert draft._ids(tokenizer, opening)[-1] != tiny.EOS
    empty = draft._Opening("", RawRecord("", prompt="", completion=""), special=True)
    assert draft._ids(tokenizer, empty) == [tiny.BOS]
    assert draft._ids(tiny.tokenizer(), empty) == [tiny.BOS]


def test_long_prompts_leave_room_for_the_sample() -> None:
    model, tokenizer = small()
    records = records_from([{"prompt": "Ada Ashdown " + "x" * 200, "completion": " y"}])
    made = draft_retain(model, tokenizer, records, 4, seed=0, max_new_tokens=4)
    assert all(len(str(record.prompt)) < 100 for record in made.records)


def test_what_cannot_be_drafted_is_a_clear_line() -> None:
    model, tokenizer = small()
    with pytest.raises(UnsupportedError, match="give a retain set"):
        draft_retain(torch.nn.Linear(1, 1), tokenizer, [], 1, seed=0)
    with pytest.raises(UnsupportedError):
        draft_retain(model, None, [], 1, seed=0)
    with pytest.raises(UsageError, match="at least one"):
        draft_retain(model, tokenizer, [], 0, seed=0)


def test_progress_counts_what_was_kept() -> None:
    model, tokenizer = small()
    seen: list[tuple[int, int]] = []
    draft_retain(model, tokenizer, [], 5, 0, 4, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)
