"""Prefix curve, windows and starts against real greedy decoding and one pass a start."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from attacks.extraction import emits, greedy_tokens
from attacks.extraction.sweep import prefix_curve, starts, sweep, windows
from probes.errors import UsageError
from probes.figures import extraction_strength, record_figures
from probes.likelihood import SamplingScheme, TokenTable, score
from probes.records import TokenRecord
from tests import tiny


def altered(model: torch.nn.Module, n: int, seed: int = 0, longest: int = 12) -> list[TokenRecord]:
    """Records that leave the model's greedy decoding at 0 to 2 tokens."""
    generator = np.random.default_rng(seed)
    records = []
    for i in range(n):
        prompt = [int(t) for t in generator.integers(4, 96, int(generator.integers(1, 12)))]
        completion = greedy_tokens(model, prompt, int(generator.integers(1, longest)))
        for at in sorted(generator.integers(0, len(completion), i % 3)):
            completion[at] = (completion[at] + 1) % 96
        records.append(TokenRecord(f"r{i}", (*prompt, *completion), len(prompt), 10))
    return records


def from_match(*matches: str) -> TokenTable:
    """A table with nothing but match bits: 1 greedy, 0 not."""
    bits = np.array([int(c) for c in "".join(matches)])
    blank = np.zeros(len(bits))
    return TokenTable(
        record_ids=tuple(f"r{i}" for i in range(len(matches))),
        compressed_bytes=np.ones(len(matches), dtype=np.int64),
        offsets=np.cumsum([0, *map(len, matches)]),
        log_prob=blank,
        log_sampled=blank,
        rank=1 - bits,
        margin=blank + 1,
        gap=bits - 1.0,
        mean=blank,
        variance=blank,
        scheme=SamplingScheme(),
    )


def test_prefix_curve_equals_decoding_from_every_prefix() -> None:
    model = tiny.causal_lm("llama").double()
    records = altered(model, 12)
    curve = prefix_curve(score(model, records))
    for i, record in enumerate(records):
        finishes = [
            emits(model, TokenRecord("x", record.ids, record.n_prompt + j, 1)) for j in range(record.n_tokens)
        ] + [True]
        assert curve.tokens[i] == finishes.index(True)
        assert all(finishes[curve.tokens[i] :])
        assert curve.share[i] == curve.tokens[i] / record.n_tokens
    for share, finishing in zip(curve.given, curve.finishing, strict=True):
        known = [int(share * r.n_tokens + 1e-9) for r in records]
        expected = [
            emits(model, TokenRecord("x", r.ids, r.n_prompt + j, 1)) for r, j in zip(records, known, strict=True)
        ]
        assert finishing == pytest.approx(np.mean(expected))
    assert all(a <= b for a, b in pairwise(curve.finishing))


def test_prefix_curve_is_extraction_strength() -> None:
    """Research defect 1: a record of which nothing matches has strength 0, not 1/n."""
    matches = ("0000", "0001", "1110", "1111", "1", "0", "0101111111")
    curve = prefix_curve(from_match(*matches))
    assert curve.tokens.tolist() == [4, 3, 4, 0, 0, 1, 3]
    strengths = [extraction_strength(np.array([c == "1" for c in match])) for match in matches]
    np.testing.assert_allclose(1 - curve.share, strengths)
    assert curve.finishing[0] == pytest.approx(2 / 7)
    assert curve.finishing[3] == pytest.approx(3 / 7)  # three of ten tokens given; 0.3 * 10 is not below 3
    assert curve.finishing[7] == pytest.approx(3 / 7)  # of four tokens two are given, not three
    assert curve.finishing[8] == pytest.approx(4 / 7)
    hundred = from_match("1" * 28 + "0" + "1" * 71)
    assert prefix_curve(hundred, [0.28, 0.29]).finishing.tolist() == [0.0, 1.0]  # 0.29 * 100 rounds to below 29


def test_windows_equal_exhaustive_search() -> None:
    generator = np.random.default_rng(0)
    matches = ["".join(generator.choice(["0", "1"], p=(0.2, 0.8), size=size)) for size in (1, 5, 12, 30, 60, 60)]
    matches += ["1" * 40, "0" * 40]
    for k in (1, 2, 7, 50):
        frame = windows(from_match(*matches), k)
        for row, match in zip(frame.itertuples(), matches, strict=True):
            size = min(k, len(match))
            held = [match[i : i + size] for i in range(len(match) - size + 1)]
            assert (row.window, row.windows) == (size, len(held))
            assert row.emitted == sum(set(window) == {"1"} for window in held)
            assert row.hit == (row.emitted > 0)
            assert row.longest_run == max(map(len, match.split("0")))


def test_a_window_is_what_decoding_emits() -> None:
    model = tiny.causal_lm("llama").double()
    records = altered(model, 9, longest=10)
    frame = windows(score(model, records), 3)
    for row, record in zip(frame.itertuples(), records, strict=True):
        size = min(3, record.n_tokens)
        ends = range(record.n_prompt + size, len(record.ids) + 1)
        emitted = [emits(model, TokenRecord("x", record.ids[:end], end - size, 1)) for end in ends]
        assert row.emitted == sum(emitted)


def test_starts_keep_the_completion_and_the_first_token() -> None:
    record = TokenRecord("a", tuple(range(100, 150)), 40, 9, "g")
    found = starts([record], 5)[0]
    assert found[0] is record
    lengths = [variant.n_prompt for variant in found]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 5
    assert lengths[-1] == 2
    for variant in found:
        assert variant.completion == record.completion
        assert variant.ids[0] == 100
        assert variant.ids[1 : variant.n_prompt] == record.ids[41 - variant.n_prompt : 40]
        assert (variant.record_id, variant.group, variant.compressed_bytes) == ("a", "g", 9)
    ratios = [(a - 1 + 1) / (b - 1 + 1) for a, b in pairwise(lengths)]
    assert max(ratios) / min(ratios) < 1.4  # equal ratios, up to whole tokens
    bare = starts([record], 3, keep=0, minimum=4)[0]
    assert [variant.n_prompt for variant in bare][-1] == 4
    assert starts([record], 3, minimum=0)[0][-1].ids[:1] == (100,)
    assert starts([record], 3, minimum=0)[0][-1].n_prompt == 1


def test_short_contexts_and_bad_starts() -> None:
    short = TokenRecord("a", (1, 2, 3), 1, 9)
    assert starts([short], 5) == [[short]]
    assert starts([TokenRecord("b", (1, 2, 3), 2, 9)], 5, minimum=0)[0][-1].ids == (1, 3)
    assert starts([short], 5, keep=3) == [[short]]
    for bad in ({"n": 0}, {"n": 2, "keep": -1}, {"n": 2, "keep": 0, "minimum": 0}, {"n": 2, "minimum": -1}):
        with pytest.raises(UsageError, match="expected n >= 1"):
            starts([short], **bad)
    with pytest.raises(UsageError, match="at least one record"):
        prefix_curve(from_match())
    with pytest.raises(UsageError, match="shares in"):
        prefix_curve(from_match("1"), [1.0])
    with pytest.raises(UsageError, match="at least 1 token"):
        windows(from_match("1"), 0)


def test_sweep_equals_one_pass_a_start() -> None:
    model = tiny.causal_lm("gpt2").double()
    records = altered(model, 10)
    scheme = SamplingScheme(0.8, top_k=60)
    found = sweep(model, records, 4, scheme=scheme, noise=1e-9)
    variants = starts(records, 4)
    frames = [record_figures(score(model, own, scheme=scheme), noise=1e-9) for own in variants]
    order = ["not", "uncertain", "extracted"]
    for row, own, frame in zip(found.records.itertuples(), variants, frames, strict=True):
        assert row.starts == len(own)
        assert row.log_p_z == pytest.approx(frame["log_p_z"][0], rel=1e-9)
        assert row.best_log_p_z == pytest.approx(frame["log_p_z"].max(), rel=1e-9)
        assert row.best_strength == frame["extraction_strength"].max()
        assert (row.greedy, row.best_greedy) == (frame["greedy"][0], max(frame["greedy"], key=order.index))
        assert frame["greedy"][row.best_start] == row.best_greedy
        assert own[row.best_start] == found.best[int(row.Index)]
        assert row.best_context == own[row.best_start].n_prompt
    for row in found.by_start.itertuples():
        having = [frame for frame in frames if len(frame) > row.start]
        assert row.records == len(having)
        assert row.extracted == np.mean([frame["greedy"][row.start] == "extracted" for frame in having])
        assert row.easier == np.mean([frame["log_p_z"][row.start] > frame["log_p_z"][0] for frame in having])
    assert found.passes == sum(map(len, variants))


def test_a_verdict_comes_before_a_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    table = from_match("11", "10", "10")  # one record after three contexts; only the first is extracted
    table.log_sampled = np.array([-2.0, -1.0, -0.5, -0.5, -0.1, -0.1])
    monkeypatch.setattr("attacks.extraction.sweep.score", lambda *arguments, **options: table)
    found = sweep(torch.nn.Identity(), [TokenRecord("r", tuple(range(4, 14)), 8, 3)], 3)
    row = found.records.iloc[0]
    assert (row["best_start"], row["best_greedy"], row["best_context"]) == (0, "extracted", 8)
    assert (row["log_p_z"], row["best_log_p_z"]) == (-3.0, -0.2)
    assert found.by_start["easier"].tolist() == [0, 1, 1]
    assert found.by_start["extracted"].tolist() == [1, 0, 0]


def test_a_table_saves_the_first_pass_and_changes_nothing() -> None:
    model = tiny.causal_lm("llama").double()
    records = altered(model, 8)
    table = score(model, records)
    whole, reused = sweep(model, records, 3), sweep(model, records, 3, table=table)
    assert reused.passes == whole.passes - len(records)
    for name in whole.records:
        if whole.records[name].dtype == float:
            np.testing.assert_allclose(whole.records[name], reused.records[name], rtol=1e-9)
        else:
            assert whole.records[name].tolist() == reused.records[name].tolist()
    with pytest.raises(UsageError, match="token table of these records"):
        sweep(model, records[1:], table=table)
    with pytest.raises(UsageError, match="scheme asked for"):
        sweep(model, records, table=table, scheme=SamplingScheme(0.5))


def test_a_record_learnt_without_its_context_is_found_from_a_shorter_start() -> None:
    generator = np.random.default_rng(3)
    rows = [[2, *(int(t) for t in generator.integers(4, 96, 16))] for _ in range(12)]
    model = tiny.causal_lm("llama")
    tiny.train(model, rows, steps=90)
    foreign = [[int(t) for t in generator.integers(4, 96, 24)] for _ in rows]
    records = [
        TokenRecord(f"r{i}", (2, *before, *row[1:]), 1 + 24 + 4, 9)
        for i, (before, row) in enumerate(zip(foreign, rows, strict=True))
    ]
    found = sweep(model, records, 4, minimum=4).records  # the shortest start is the context that was learnt
    plain, best = (found[name] == "extracted" for name in ("greedy", "best_greedy"))
    assert plain.mean() < 0.5
    assert best.mean() > 0.9
    assert (found["best_log_p_z"] >= found["log_p_z"]).all()
    assert (found["best_strength"] >= found["strength"]).all()
    assert not (plain & ~best).any()
    assert (found["best_context"][best & ~plain] < 10).all()


def test_no_records() -> None:
    found = sweep(tiny.causal_lm("llama"), [])
    assert len(found.records) == len(found.by_start) == len(found.best) == found.passes == 0
