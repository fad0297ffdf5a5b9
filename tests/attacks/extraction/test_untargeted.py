"""Free samples against generate(), exact probabilities and an uncached loop; signals and matches by brute force."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from attacks.extraction import greedy_tokens
from attacks.extraction import untargeted as u
from probes.errors import UnsupportedError, UsageError
from probes.likelihood import SamplingScheme, TokenTable, decoder_scores, score
from probes.loss import sample as draw
from probes.records import TokenRecord
from tests import tiny

SCHEMES = [
    SamplingScheme(),
    SamplingScheme(temperature=0.7),
    SamplingScheme(top_k=5),
    SamplingScheme(top_p=0.8),
    SamplingScheme(temperature=1.3, top_k=20, top_p=0.6),
]


def table(log_prob: Sequence[Sequence[float]], compressed: Sequence[int] | None = None) -> TokenTable:
    """A token table of given log-probabilities; what the signals do not read is zero."""
    flat = np.concatenate([np.asarray(row, dtype=np.float32) for row in log_prob])
    zero = np.zeros_like(flat)
    return TokenTable(
        record_ids=tuple(f"s{i}" for i in range(len(log_prob))),
        compressed_bytes=np.array([20] * len(log_prob) if compressed is None else compressed, dtype=np.int64),
        offsets=np.cumsum([0] + [len(row) for row in log_prob]),
        log_prob=flat,
        log_sampled=flat,
        rank=zero.astype(np.int64),
        margin=zero,
        gap=zero,
        mean=zero,
        variance=zero,
        scheme=SamplingScheme(),
    )


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_the_likeliest_token_every_time_is_greedy_decoding(arch: str) -> None:
    model = tiny.causal_lm(arch)
    prompts = [[2], [2, 9, 14], [30]]
    drawn = u.sample(model, 6, 12, prompt_ids=prompts, scheme=SamplingScheme(top_k=1), batch=2)
    assert drawn == [tuple(greedy_tokens(model, prompts[i % 3], 12)) for i in range(6)]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "qwen3"])
def test_cached_decoding_draws_what_full_passes_draw(arch: str) -> None:
    model = tiny.causal_lm(arch, dtype=torch.float64)
    scheme = SamplingScheme(temperature=1.2, top_p=0.95)
    drawn = u.sample(model, 3, 24, prompt_ids=[2, 5], scheme=scheme, seed=4)
    sampler = u._Sampler(model, None, [(2, 5)], 24, scheme, 4, frozenset())
    for i, tokens in enumerate(drawn):
        uniforms, ids = sampler._uniforms(i), [2, 5]
        for t in range(24):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
            ids.append(int(draw(decoder_scores(logits, scheme), uniforms[t : t + 1])))
        assert tuple(ids[2:]) == tokens


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_sampling_rule_is_the_one_passes(scheme: SamplingScheme) -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    record = TokenRecord("a", (2, *range(10, 40)), 1, 9)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([record.ids])).logits[0, :-1]
    log_q = decoder_scores(logits, scheme).log_softmax(-1).gather(-1, torch.tensor(record.completion)[:, None])[:, 0]
    expected = score(model, [record], scheme=scheme).log_sampled
    if not scheme.plain and scheme.temperature != 0.7:
        assert np.isinf(expected).any()  # the rule excludes something
    np.testing.assert_allclose(log_q.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_samples_follow_the_models_distribution() -> None:
    model = tiny.causal_lm("llama")
    scheme = SamplingScheme(top_k=3)
    n = 3000
    counts = Counter(u.sample(model, n, 2, prompt_ids=[2], scheme=scheme, batch=500, seed=1))
    with torch.no_grad():
        first = decoder_scores(model(input_ids=torch.tensor([[2]])).logits[0, -1:], scheme).softmax(-1)[0]
        expected = {}
        for a in first.nonzero()[:, 0].tolist():
            second = decoder_scores(model(input_ids=torch.tensor([[2, a]])).logits[0, -1:], scheme).softmax(-1)[0]
            expected |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}
    assert set(counts) <= set(expected)
    observed = [counts[pair] for pair in expected]
    assert stats.chisquare(observed, np.array(list(expected.values())) * n / sum(expected.values())).pvalue > 1e-3


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    model = tiny.causal_lm("gpt2", dtype=torch.float64)
    prompts = [[2], [2, 7]]
    first = u.sample(model, 7, 20, prompt_ids=prompts, seed=3)
    assert u.sample(model, 7, 20, prompt_ids=prompts, seed=3, batch=1) == first
    assert u.sample(model, 4, 20, prompt_ids=prompts, seed=3, batch=3) == first[:4]
    assert u.sample(model, 7, 9, prompt_ids=prompts, seed=3) == [tokens[:9] for tokens in first]
    assert len(set(first)) == 7
    assert not set(u.sample(model, 7, 20, prompt_ids=prompts, seed=4)) & set(first)


def test_the_model_and_the_random_state_are_left_as_found() -> None:
    model = tiny.causal_lm("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    u.sample(model, 2, 4, prompt_ids=[2])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_stop_tokens_end_a_sample_and_change_nothing_before() -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    whole = u.sample(model, 12, 30, prompt_ids=[2])
    stop = [whole[0][3], whole[1][0]]
    cut = u.sample(model, 12, 30, prompt_ids=[2], stop=stop, batch=5)
    assert cut == [tuple(itertools.takewhile(lambda token: token not in stop, tokens)) for tokens in whole]
    assert cut[1] == ()
    later = u.sample(model, 12, 30, prompt_ids=[2], stop=stop, stop_after=2)
    for tokens, short in zip(whole, later, strict=True):
        ends = [t for t, token in enumerate(tokens) if token in stop]
        assert short == (tokens[: ends[1]] if len(ends) > 1 else tokens)


def test_a_batch_too_large_for_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    expected = u.sample(model, 9, 6, prompt_ids=[2])
    decode = u._Sampler._decode

    def small(self: u._Sampler, indices: list[int]) -> list[tuple[int, ...]]:
        if len(indices) > 2:
            raise MemoryError
        return decode(self, indices)

    monkeypatch.setattr(u._Sampler, "_decode", small)
    assert u.sample(model, 9, 6, prompt_ids=[2]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt of at least one token"),
        ({"prompt_ids": [[2], []]}, "prompt of at least one token"),
        ({"prompt_ids": [96]}, "below the vocabulary size"),
        ({"length": 0}, "at least 1"),
        ({"length": 128}, "at most 128 positions, found 129"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    arguments = {"n": 2, "length": 4, "prompt_ids": [2]} | change
    with pytest.raises(UsageError, match=message):
        u.sample(tiny.causal_lm("llama"), **arguments)


def test_no_samples_are_no_samples() -> None:
    assert u.sample(tiny.causal_lm("llama"), 0, 4, prompt_ids=[2]) == []


def test_a_model_without_a_cache_is_refused() -> None:
    model = tiny.causal_lm("llama")
    forward = model.model.forward

    def forgetful(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.past_key_values = None
        return out

    model.model.forward = forgetful
    with pytest.raises(UnsupportedError, match="key-value cache"):
        u.sample(model, 1, 2, prompt_ids=[2])


# --- near-identical samples -----------------------------------------------------------------------------------------


def slow_distinct(samples: Sequence[Sequence[int]], share: float) -> list[int]:
    kept: list[int] = []
    grams = [Counter(zip(s, s[1:], s[2:], strict=False)) if len(s) > 2 else Counter([tuple(s)]) for s in samples]
    for i, gram in enumerate(grams):
        if samples[i] and all((gram & grams[j]).total() < share * gram.total() for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_near_identical_samples_are_dropped(share: float) -> None:
    generator = np.random.default_rng(0)
    samples = [tuple(map(int, generator.integers(0, 3, int(generator.integers(3, 25))))) for _ in range(60)]
    samples += [(), (1, 2), (1, 2), (5,)]
    kept = u.distinct(samples, share)
    assert kept == slow_distinct(samples, share)
    assert 3 < len(kept) < 62


def test_exact_copies_are_dropped_and_different_samples_kept() -> None:
    assert u.distinct([range(20), range(50, 70), range(20), (*range(12), *range(80, 90))]) == [0, 1]
    with pytest.raises(UsageError, match="share"):
        u.distinct([], 0.0)


def test_of_near_identical_samples_the_preferred_one_stays() -> None:
    samples = [(*range(18), 90, 91), range(20), range(40, 60)]
    assert u.distinct(samples) == [0, 2]
    assert u.distinct(samples, order=[1, 2, 0]) == [1, 2]
    with pytest.raises(UsageError, match="order"):
        u.distinct(samples, order=[1, 1, 0])


# --- records --------------------------------------------------------------------------------------------------------


def test_samples_become_records_after_their_prompts() -> None:
    tokenizer = tiny.tokenizer()
    samples = [(40, 41), (42,), (43, 44, 45)]
    records = u.as_records(samples, [[2], [2, 7]], tokenizer.decode, keep=[0, 1, 2])
    assert [record.ids for record in records] == [(2, 40, 41), (2, 7, 42), (2, 43, 44, 45)]
    assert [record.n_prompt for record in records] == [1, 2, 1]
    assert records[2].compressed_bytes == len(zlib.compress(tokenizer.decode(samples[2]).encode()))
    assert [record.record_id for record in records] == ["sample-0", "sample-1", "sample-2"]
    with pytest.raises(UsageError, match="empty"):
        u.as_records([()], [2], tokenizer.decode)


def test_lower_case_keeps_the_prompt() -> None:
    tokenizer = tiny.tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    record = TokenRecord("a", (2, *encode("Call MARY now")), 1, 21)
    (lower,) = u.lowercased([record], tokenizer.decode, encode)
    assert lower.ids == (2, *encode("call mary now"))
    assert lower.n_prompt == 1
    (kept,) = u.lowercased([record], tokenizer.decode, lambda text: [])
    assert kept.ids == record.ids


# --- signals --------------------------------------------------------------------------------------------------------


def test_signals_are_their_formulas() -> None:
    generator = np.random.default_rng(1)
    lengths = [3, 8, 20, 7]
    target, reference, lower = (
        [-generator.exponential(2, n + extra) for n in lengths] for extra in (0, 0, 2)
    )  # the lower-cased samples have more tokens
    frame = u.signals(table(target, [9, 30, 41, 12]), table(reference), table(lower), window=5)
    for i, row in frame.iterrows():
        t = np.asarray(target[i], dtype=np.float32).astype(np.float64)
        loss = -t.mean()
        windows = [-t[s : s + 5].mean() for s in range(max(1, len(t) - 4))]
        assert row["n_tokens"] == lengths[i]
        assert row["perplexity"] == pytest.approx(math.exp(loss))
        assert row["reference_ratio"] == pytest.approx(-reference[i].mean() / loss, rel=1e-5)
        assert row["lowercase_ratio"] == pytest.approx(-lower[i].mean() / loss, rel=1e-5)
        assert row["zlib_ratio"] == pytest.approx([9, 30, 41, 12][i] * 8 * math.log(2) / -t.sum())
        assert row["window_perplexity"] == pytest.approx(math.exp(min(windows)))
    for name, direction in u.SIGNALS.items():
        order = frame[name] if direction == "low" else -frame[name]
        assert list(frame[f"rank_{name}"]) == list(order.rank(method="first").astype(int))


def test_only_the_signals_whose_inputs_are_there() -> None:
    frame = u.signals(table([[-1.0, -2.0], [-0.5]]), compressed_bytes=[11, 12])
    assert {"perplexity", "zlib_ratio", "window_perplexity"} == set(u.SIGNALS) & set(frame)
    assert frame["zlib_ratio"][1] == pytest.approx(12 * 8 * math.log(2) / 0.5)


def test_certain_and_impossible_tokens_give_finite_figures() -> None:
    certain, impossible = [0.0] * 4, [-math.inf] * 4
    frame = u.signals(
        table([certain, impossible, certain]), table([certain, certain, impossible]), table([impossible] * 3)
    )
    assert np.isfinite(frame.drop(columns="record_id").to_numpy(dtype=np.float64)).all()
    assert frame["rank_perplexity"].tolist() == [1, 3, 2]
    assert frame["rank_reference_ratio"].tolist() == [2, 3, 1]


def test_defect_10_the_zlib_ratio_does_not_grow_with_length() -> None:
    # Mean loss over total bytes halves when a text doubles; nats over nats stay.
    short, long = [-2.0, -1.0], [-2.0, -1.0, -2.0, -1.0]
    frame = u.signals(table([short, long], [30, 60]))
    assert frame["zlib_ratio"][0] == pytest.approx(frame["zlib_ratio"][1])


def test_tables_of_other_samples_are_refused() -> None:
    target = table([[-1.0, -2.0], [-0.5]])
    with pytest.raises(UsageError, match="reference"):
        u.signals(target, table([[-1.0], [-0.5, -2.0]]))
    with pytest.raises(UsageError, match="lower-cased"):
        u.signals(target, lower=table([[-1.0]]))
    with pytest.raises(UsageError, match="compressed sizes"):
        u.signals(target, compressed_bytes=[1])
    with pytest.raises(UsageError, match="window"):
        u.signals(target, window=0)


# --- matches --------------------------------------------------------------------------------------------------------


def slow_span(a: Sequence[int], b: Sequence[int]) -> int:
    best = 0
    for i in range(len(a)):
        for j in range(len(b)):
            k = 0
            while i + k < len(a) and j + k < len(b) and a[i + k] == b[j + k]:
                k += 1
            best = max(best, k)
    return best


def test_matches_against_every_pair() -> None:
    generator = np.random.default_rng(2)
    records = []
    for i in range(12):
        completion = tuple(map(int, generator.integers(0, 30, int(generator.integers(1, 30)))))
        records.append(TokenRecord(f"r{i}", (2, *completion), 1, 9))
    samples = []
    for _ in range(25):
        noise = list(map(int, generator.integers(0, 30, 40)))
        piece = records[int(generator.integers(12))].completion
        start = int(generator.integers(0, len(piece)))
        piece = piece[start : start + int(generator.integers(1, 25))]
        noise[5 : 5 + len(piece)] = piece
        samples.append(tuple(noise))
    result = u.matches(samples, records, minimum=10, shortest=4)
    expected = [
        (s, r, span)
        for s, r in itertools.product(range(25), range(12))
        if records[r].n_tokens >= 4
        and (span := slow_span(samples[s], records[r].completion)) >= min(10, records[r].n_tokens)
    ]
    assert list(result.found[["sample", "record", "span"]].itertuples(index=False, name=None)) == expected
    assert 0 < len(expected) < 25
    assert result.too_short == sum(record.n_tokens < 4 for record in records) > 0
    assert result.searched + result.too_short == 12
    assert result.held.tolist() == [s in {row[0] for row in expected} for s in range(25)]


def test_fifty_tokens_hold_a_long_record_and_forty_nine_do_not() -> None:
    record = TokenRecord("a", tuple(range(2, 90)), 1, 9)
    result = u.matches([range(20, 70), range(20, 69), ()], [record])
    assert result.found["sample"].tolist() == [0]
    assert result.found["span"].tolist() == [50]
    assert result.held.tolist() == [True, False, False]


def test_a_whole_short_record_counts_but_not_by_chance() -> None:
    records = [TokenRecord("a", (2, *range(10, 22)), 1, 9), TokenRecord("b", (2, 10, 11), 1, 9)]
    result = u.matches([range(5, 30), range(10, 21)], records)
    assert result.found[["sample", "record"]].to_numpy().tolist() == [[0, 0]]
    assert (result.searched, result.too_short) == (1, 1)
    with pytest.raises(UsageError, match="records"):
        u.matches([range(5)], [])
    with pytest.raises(UsageError, match="at least 1 token"):
        u.matches([range(5)], records, 0)


def test_precision_among_the_best() -> None:
    frame = u.signals(table([[-3.0], [-1.0], [-2.0], [-4.0]]))
    held = [False, True, True, False]
    rows = u.precision(frame, held, ks=(1, 2, 3, 10)).set_index(["signal", "k"])
    assert rows.loc[("any order", 4), "hits"] == 2
    assert rows.loc[("perplexity", 2), "precision"] == 1.0
    assert rows.loc[("perplexity", 3), "precision"] == pytest.approx(2 / 3)
    assert ("perplexity", 10) not in rows.index
    assert rows.loc[("perplexity", 2), "low"] == pytest.approx(stats.beta.ppf(0.025, 2, 1))
    none = u.precision(frame, [False] * 4, ks=(2,)).set_index(["signal", "k"])
    assert none.loc[("perplexity", 2), "precision"] == 0.0
    assert none.loc[("perplexity", 2), "high"] > 0.5  # 0 of 2 is a bound
    with pytest.raises(UsageError, match="samples"):
        u.precision(frame, [True])


# --- end to end -----------------------------------------------------------------------------------------------------


def test_planted_passages_come_out_on_top_and_an_untrained_model_holds_none() -> None:
    generator = np.random.default_rng(5)
    planted = [(2, *map(int, generator.integers(4, 96, 24))) for _ in range(6)]
    model, untrained = tiny.causal_lm("llama"), tiny.causal_lm("llama")
    tiny.train(model, planted, steps=60)  # until samples often, but by no means always, follow a record to its end
    records = [TokenRecord(f"r{i}", ids, 1, 40) for i, ids in enumerate(planted)]

    samples = u.sample(untrained, 100, 24, prompt_ids=[2], seed=1)
    assert not u.matches(samples, records, minimum=20).held.any()

    samples = u.sample(model, 100, 24, prompt_ids=[2], seed=1)
    scored = u.as_records(samples, [2], lambda ids: " ".join(map(str, ids)))
    frame = u.signals(score(model, scored), score(untrained, scored))
    kept = u.distinct(samples, order=list(frame["perplexity"].argsort()))
    frame = u.signals(score(model, [scored[i] for i in kept]), score(untrained, [scored[i] for i in kept]))
    result = u.matches([samples[i] for i in kept], records, minimum=20)
    assert result.found["record"].nunique() >= 3
    best = u.precision(frame, result.held, ks=(3,)).set_index("signal")["precision"]
    assert best["any order"] < 0.5
    assert (best.drop("any order") == 1.0).all()
