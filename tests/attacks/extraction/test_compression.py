"""Planted records compress and random strings do not; the search over lengths against every possible answer."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from attacks.extraction import compression, gcg
from attacks.extraction.compression import Compression, adversarial_compression, bits_saved, compression_frame
from attacks.extraction.greedy import greedy_tokens
from probes.errors import UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests import tiny

CHEAP = {"steps": 12, "candidates": 48, "top_k": 24, "tries": 1}


def strings(n: int, seed: int, length: int = 14) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [tuple(map(int, generator.integers(4, 96, length))) for _ in range(n)]


def record(ids: tuple[int, ...], n_prompt: int = 4) -> TokenRecord:
    return TokenRecord("a record", ids, n_prompt, 9)


@pytest.fixture(scope="module")
def planted() -> tuple[torch.nn.Module, list[tuple[int, ...]]]:
    sequences = strings(4, 1, 18)
    model = tiny.causal_lm("llama")
    tiny.train(model, sequences, steps=70)
    return model, sequences


def test_planted_records_compress(planted: tuple[torch.nn.Module, list[tuple[int, ...]]]) -> None:
    model, sequences = planted
    for ids in sequences[:2]:
        result = adversarial_compression(model, record(ids), **CHEAP)
        assert result.found
        assert result.memorised
        assert result.prompt is not None
        assert greedy_tokens(model, result.prompt, 14) == list(ids[4:])
        assert result.prompt_length == len(result.prompt) <= 4
        assert result.ratio == 14 / result.prompt_length
        assert result.bits_saved is not None
        assert result.bits_saved > 60
        assert result.status == "ok"
        assert result.reason is None


def test_random_strings_and_untrained_models_do_not(planted: tuple[torch.nn.Module, list[tuple[int, ...]]]) -> None:
    model, sequences = planted
    cases = [(model, record(ids)) for ids in strings(2, 9, 12)]
    cases.append((tiny.causal_lm("llama"), record(sequences[0][:12])))
    for candidate, never_seen in cases:
        result = adversarial_compression(candidate, never_seen, **{**CHEAP, "steps": 4})
        assert not result.found
        assert result.prompt_length is result.ratio is result.bits_saved is result.prompt is None
        assert [length for length, _ in result.lengths] == [1, 2, 4, 7]
        assert result.steps == 16


def test_the_records_own_prompt_runs_first(planted: tuple[torch.nn.Module, list[tuple[int, ...]]]) -> None:
    model, sequences = planted
    result = adversarial_compression(model, record(sequences[0]), **{**CHEAP, "steps": 0})
    assert result.found
    assert result.steps == 0
    ends = [
        length
        for length in range(1, 5)
        if greedy_tokens(model, sequences[0][4 - length : 4], 14) == list(sequences[0][4:])
    ]
    assert result.prompt_length is not None
    assert result.prompt_length <= min(ends)


def test_what_stands_before_does_not_count() -> None:
    sequences = [(2, *ids) for ids in strings(3, 4, 14)]
    model = tiny.causal_lm("llama")
    tiny.train(model, sequences, steps=60)
    target = TokenRecord("a", sequences[0], 4, 9)
    result = adversarial_compression(model, target, before=(2,), **CHEAP)
    assert result.prompt is not None
    assert greedy_tokens(model, (2, *result.prompt), 11) == list(sequences[0][4:])
    assert result.ratio == 11 / len(result.prompt)


def test_each_search_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    whole = gcg.optimise

    def watch(*arguments: Any, **options: Any) -> gcg.Gcg:
        seen.append(options)
        return whole(*arguments, **options)

    monkeypatch.setattr(compression, "optimise", watch)
    tokens = gcg.Tokens(np.arange(10, 60), lambda ids: ids[-1] != 10)
    options = {"steps": 1, "candidates": 5, "top_k": 3, "tries": 2, "batch_tokens": 64}
    adversarial_compression(tiny.causal_lm("llama"), record(strings(1, 3, 9)[0]), before=(2,), tokens=tokens, **options)
    assert len(seen) == 2 * 3  # lengths 1, 2 and 4
    for each in seen:
        assert (each["before"], each["tokens"]) == ((2,), tokens)
        assert [each[name] for name in ("steps", "candidates", "top_k", "batch_tokens")] == [1, 5, 3, 64]
    assert len({each["seed"] for each in seen}) == 6
    assert [each["initial"] is None for each in seen] == [True, True, False, True, False, True]
    assert all(tokens.survives(each["initial"]) for each in seen if each["initial"])


# --- the search over lengths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortest", range(1, 14))
def test_every_shortest_length_is_found(shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(model: object, target: object, length: int, **options: Any) -> gcg.Gcg:
        asked.append(length)
        prompt = tuple(options["initial"] or range(4, 4 + length))
        assert len(prompt) == length
        return gcg.Gcg(prompt, 1.0, length >= shortest, 1, (1.0,), 2, 1)

    monkeypatch.setattr(compression, "optimise", pretend)
    monkeypatch.setattr(compression.Rows, "confirmed", lambda self, prompt: False)  # nothing found is shortened
    result = adversarial_compression(tiny.causal_lm("llama"), record(strings(1, 0, 18)[0]), tries=1)
    assert result.prompt_length == (shortest if shortest < 14 else None)
    assert result.found == (shortest < 14)
    assert len(asked) == len(set(asked)) <= 2 * math.ceil(math.log2(14))
    assert result.steps == len(asked)


def test_no_length_is_tried_twice_or_beyond_the_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def never(model: object, target: object, length: int, **options: Any) -> gcg.Gcg:
        asked.append(length)
        return gcg.Gcg(tuple(range(4, 4 + length)), 1.0, False, 3, (1.0,), 2, 1)

    monkeypatch.setattr(compression, "optimise", never)
    for tokens in range(2, 40):
        asked.clear()
        ids = tuple(range(4, 5 + tokens))
        result = adversarial_compression(tiny.causal_lm("llama"), record(ids, 1), tries=2)
        lengths = [length for length, _ in result.lengths]
        assert lengths == sorted(set(lengths))
        assert lengths[0] == 1
        assert lengths[-1] == tokens - 1
        assert asked == [length for length in lengths for _ in range(2)]


def searching(model: torch.nn.Module, target: tuple[int, ...], tokens: gcg.Tokens) -> compression._Search:
    rows = gcg.Rows(model, ModelMap.of(model), (), (), target, None)
    return compression._Search(tokens, rows, steps=0, candidates=1, top_k=1, tries=1, max_rows=None, seed=0)


def test_what_is_left_after_dropping_a_token_can_be_written() -> None:
    search = searching(tiny.causal_lm("llama"), (7, 8), gcg.Tokens(np.arange(4, 9), lambda ids: ids != (6, 5)))
    assert search._without_one((5, 6, 5)) == [(5, 5), (5, 6)]
    search.best = (6, 5, 5)
    assert search._start(2, (), 0) == (5, 5)


def test_dropping_tokens_keeps_the_completion(planted: tuple[torch.nn.Module, list[tuple[int, ...]]]) -> None:
    model, sequences = planted
    target = sequences[1][4:]
    long = (*strings(1, 77, 3)[0], *sequences[1][:4])
    search = searching(model, target, gcg.every_token(96))
    search.best = long if greedy_tokens(model, long, 14) == list(target) else sequences[1][:4]
    start = len(search.best or ())
    search._shorten()
    assert search.best is not None
    assert len(search.best) <= start
    assert greedy_tokens(model, search.best, 14) == list(target)
    for i in range(len(search.best)):  # no single token more can go
        if len(search.best) > 1:
            assert greedy_tokens(model, (*search.best[:i], *search.best[i + 1 :]), 14) != list(target)


def test_what_a_batch_claims_is_confirmed_by_greedy_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(self: gcg.Rows, prompts: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(prompts)), np.ones(len(prompts), dtype=bool)

    monkeypatch.setattr(gcg.Rows, "evaluate", lie)
    options = {**CHEAP, "steps": 1, "candidates": 4}
    assert not adversarial_compression(tiny.causal_lm("llama"), record(strings(1, 3, 9)[0]), **options).found


@pytest.mark.parametrize("limit", [0, 1, 60, 400])
def test_a_limit_on_rows_ends_the_search(limit: int) -> None:
    model = tiny.causal_lm("llama")
    result = adversarial_compression(model, record(strings(1, 3, 18)[0]), **CHEAP, max_rows=limit)
    assert result.forwards <= limit
    assert result.reason == f"stopped at the limit of {limit} rows"
    assert not result.found
    full = adversarial_compression(model, record(strings(1, 3, 18)[0]), **{**CHEAP, "steps": 1}, max_rows=10_000)
    assert full.reason is None


def test_the_seed_decides(planted: tuple[torch.nn.Module, list[tuple[int, ...]]]) -> None:
    model, sequences = planted
    options = {**CHEAP, "steps": 3}
    first = adversarial_compression(model, record(sequences[2]), **options, seed=5)
    assert adversarial_compression(model, record(sequences[2]), **options, seed=5) == first


def test_prompts_survive_tokenisation() -> None:
    tokenizer = tiny.tokenizer(vocab=98, merges=[("a", "b"), ("b", "a")])
    a, b, ab = (tokenizer.convert_tokens_to_ids(x) for x in ("a", "b", "ab"))
    model = tiny.causal_lm("llama", vocab=98)
    ids = (a, b, *strings(1, 6, 10)[0])  # its own prompt is one that nobody can type
    tiny.train(model, [ids], steps=60)
    tokens = gcg.writable(tokenizer, 98)
    assert not tokens.survives((a, b))
    result = adversarial_compression(model, TokenRecord("a", ids, 2, 9), tokens=tokens, **CHEAP)
    assert result.prompt is not None
    assert tokens.survives(result.prompt)
    assert ab in tokens.usable


# --- what chance would do -------------------------------------------------------------------------------------------


def test_bits_saved_counts_prompts_against_strings() -> None:
    for k, length, v, u in itertools.product((2, 5, 30), (1, 2, 4), (2, 96), (2, 50)):
        exact = Fraction(v**k, sum(u**n for n in range(1, length + 1)))
        assert bits_saved(k, length, v, u) == pytest.approx(math.log2(exact), abs=1e-9)
    assert bits_saved(10, 10, 96) < 0
    assert bits_saved(500, 200, 50_000) == pytest.approx(300 * math.log2(50_000), abs=1)


def test_no_more_strings_follow_short_prompts_than_the_count_allows() -> None:
    model = tiny.causal_lm("llama", vocab=96)
    emitted = {tuple(greedy_tokens(model, [token], 3)) for token in range(96)}
    assert len(emitted) / 96**3 <= 2 ** -bits_saved(3, 1, 96)


# --- edges ----------------------------------------------------------------------------------------------------------


def test_a_completion_of_one_token_is_not_resolvable() -> None:
    result = adversarial_compression(tiny.causal_lm("llama"), TokenRecord("a", (5, 6), 1, 9))
    assert result.status == "not resolvable"
    assert result.reason == "a completion of one token has no shorter prompt"
    assert result.forwards == 0
    assert not result.memorised


def test_two_tokens_have_one_length_to_try() -> None:
    result = adversarial_compression(tiny.causal_lm("llama"), TokenRecord("a", (5, 6, 7), 1, 9), **CHEAP)
    assert {length for length, _ in result.lengths} <= {1}


def test_bad_input_is_refused() -> None:
    model = tiny.causal_lm("llama")
    with pytest.raises(UsageError, match="one try"):
        adversarial_compression(model, record(strings(1, 0)[0]), tries=0)
    with pytest.raises(UsageError, match="negative limit"):
        adversarial_compression(model, record(strings(1, 0)[0]), max_rows=-1)
    with pytest.raises(UnsupportedError, match="vocabulary size 96"):
        adversarial_compression(model, record((5, 6, 7, 8, 96, 9)))


def test_the_frame_has_a_row_a_record_and_no_nan() -> None:
    found = Compression("a", 12, "ok", None, True, 3, 4.0, 50.0, ((1, False), (3, True)), 7, 99, (91, 92, 93))
    missed = Compression("b", 1, "not resolvable", "why", False, None, None, None, (), 0, 0, None)
    frame = compression_frame([found, missed])
    assert frame["record_id"].tolist() == ["a", "b"]
    assert frame["memorised"].tolist() == [True, False]
    assert frame["ratio"].tolist() == [4.0, None]
    assert frame["prompt_length"].tolist() == [3, None]
    assert "prompt" not in frame
    assert compression_frame([]).empty
    assert "91" not in repr(found)
