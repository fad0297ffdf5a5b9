"""The one pass against a slow oracle: full logits in float64, one record at a time, no chunking, no padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from probes import likelihood
from probes.errors import ResourceError, UnsupportedError
from probes.figures import record_figures
from probes.likelihood import SamplingScheme, logit_noise, score
from probes.modelmap import ModelMap
from probes.records import TokenRecord, length_batches
from tests import tiny


def make_records(lengths: list[tuple[int, int]], vocab: int = 96, seed: int = 0) -> list[TokenRecord]:
    generator = np.random.default_rng(seed)
    return [
        TokenRecord(f"r{i}", tuple(int(t) for t in generator.integers(4, vocab, p + c)), p, 10 + i)
        for i, (p, c) in enumerate(lengths)
    ]


LENGTHS = [(1, 1), (3, 9), (2, 4), (12, 5), (1, 30), (7, 1), (4, 2), (5, 3), (9, 17)]


def oracle(model: torch.nn.Module, record: TokenRecord) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits = model(torch.tensor([record.ids])).logits[0, record.n_prompt - 1 : -1].double()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    gold = torch.tensor(record.completion)
    mean = (p * log_p).sum(-1)
    ordered = logits.sort(-1, descending=True).values
    return {
        "log_prob": log_p[torch.arange(len(gold)), gold].numpy(),
        "rank": (logits > logits[torch.arange(len(gold)), gold][:, None]).sum(-1).numpy(),
        "margin": (ordered[:, 0] - ordered[:, 1]).numpy(),
        "gap": (logits[torch.arange(len(gold)), gold] - ordered[:, 0]).numpy(),
        "mean": mean.numpy(),
        "variance": (p * (log_p - mean[:, None]) ** 2).sum(-1).numpy(),
    }


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("batching", [{"batch_tokens": 64}, {"batch_size": 4}, {"batch_tokens": 1}])
def test_every_row_equals_the_oracle(arch: str, batching: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 96 * 7)  # seven positions a chunk, so chunks cut records
    monkeypatch.setattr(likelihood, "TILE_ELEMENTS", 96 * 3)  # and tiles cut chunks
    monkeypatch.setattr(likelihood, "BLOCK", 10)  # 96 = 9 blocks and a rest of 6
    # Mixtral's experts run in single precision only; Gemma-2 and its like compute parts of attention in it.
    model = tiny.causal_lm(arch) if arch == "mixtral" else tiny.causal_lm(arch).double()
    tolerance = {"mixtral": 1e-5, "gemma2": 1e-6}.get(arch, 1e-9)
    records = make_records(LENGTHS)
    table = score(model, records, **batching)
    assert table.record_ids == tuple(record.record_id for record in records)
    for i, record in enumerate(records):
        for name, expected in oracle(model, record).items():
            rows = getattr(table, name)[table.rows(i)]
            np.testing.assert_allclose(rows, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def test_float32_is_within_1e_5_of_the_float64_oracle() -> None:
    model, records = tiny.causal_lm("llama"), make_records(LENGTHS)
    table = score(model, records)
    double = tiny.causal_lm("llama").double()
    for i, record in enumerate(records):
        for name, expected in oracle(double, record).items():
            np.testing.assert_allclose(getattr(table, name)[table.rows(i)], expected, atol=1e-5, err_msg=name)


def test_float32_sums_over_a_large_vocabulary_stay_accurate() -> None:
    # A plain softmax sums in an order that loses another digit here.
    logits = 5 * torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0))
    target = torch.arange(20)
    schemes = (SamplingScheme(),)
    single = likelihood._reduce(logits.clone(), target, schemes).double()
    torch.testing.assert_close(single, likelihood._reduce(logits.double(), target, schemes), rtol=0, atol=4e-6)


@pytest.mark.parametrize("vocab", [1, 2, 9, 20, 37])
def test_the_two_largest_are_found_wherever_they_are(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "BLOCK", 5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 30, (4000, vocab), generator=generator).double()  # many ties
    logits[logits < 10] = -math.inf
    top = likelihood._top_two(logits)
    expected = logits.sort(-1, descending=True).values[:, :2]
    torch.testing.assert_close(top[:, : expected.shape[1]], expected, rtol=0, atol=0)
    assert top.shape == (4000, 2)


@pytest.mark.parametrize(
    "scheme",
    [
        SamplingScheme(0.7),
        SamplingScheme(1.0, top_k=5),
        SamplingScheme(1.3, top_k=20, top_p=0.6),
        SamplingScheme(1.0, top_p=0.3),
        SamplingScheme(0.5, top_k=1),
        SamplingScheme(1.0, top_k=1000, top_p=1.0),
    ],
)
def test_sampled_probability_is_what_the_decoder_samples_from(scheme: SamplingScheme) -> None:
    model, records = tiny.causal_lm("gpt2").double(), make_records(LENGTHS)
    table = score(model, records, scheme=scheme)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(scheme.temperature)])
    if scheme.top_k:
        warpers.append(TopKLogitsWarper(min(scheme.top_k, 96)))
    if scheme.top_p:
        warpers.append(TopPLogitsWarper(scheme.top_p))
    for i, record in enumerate(records):
        with torch.no_grad():
            logits = model(torch.tensor([record.ids])).logits[0, record.n_prompt - 1 : -1]
        expected = warpers(None, logits).log_softmax(-1)
        gold = expected[torch.arange(record.n_tokens), torch.tensor(record.completion)]
        np.testing.assert_allclose(table.log_sampled[table.rows(i)], gold.numpy(), rtol=1e-9)


SCHEMES = (
    SamplingScheme(0.7),
    SamplingScheme(1.0, top_k=5),
    SamplingScheme(),
    SamplingScheme(1.3, top_k=20, top_p=0.6),
    SamplingScheme(1.0, top_k=5),
)


def test_several_schemes_in_one_pass_equal_one_pass_each() -> None:
    model, records = tiny.causal_lm("gpt2").double(), make_records(LENGTHS)
    model_map, passes = ModelMap.of(model), []
    handle = model_map.backbone().register_forward_hook(lambda *_: passes.append(1))
    table = score(model, records, scheme=SamplingScheme(0.7), schemes=SCHEMES, batch_size=9, model_map=model_map)
    assert len(passes) == 1
    handle.remove()
    assert table.schemes == SCHEMES
    assert table.log_schemes.shape == (len(table.log_prob), len(SCHEMES))
    for s, scheme in enumerate(SCHEMES):
        alone = score(model, records, scheme=scheme, batch_size=9)
        np.testing.assert_array_equal(table.log_schemes[:, s], alone.log_sampled)
        np.testing.assert_array_equal(table.log_prob, alone.log_prob)
        np.testing.assert_array_equal(table.rank, alone.rank)
    np.testing.assert_array_equal(table.log_sampled, table.log_schemes[:, 0])
    np.testing.assert_array_equal(table.log_schemes[:, 2], table.log_prob)
    np.testing.assert_array_equal(table.log_schemes[:, 4], table.log_schemes[:, 1])


def test_a_scheme_that_repeats_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SamplingScheme] = []
    real = likelihood._sampled_log_prob

    def counted(logits, target, scheme):
        asked.append(scheme)
        return real(logits, target, scheme)

    monkeypatch.setattr(likelihood, "_sampled_log_prob", counted)
    model, records = tiny.causal_lm("llama"), make_records(LENGTHS)
    score(model, records, batch_size=9)
    assert asked == []  # plain sampling needs no distribution of its own
    score(model, records, schemes=SCHEMES, batch_size=9)
    assert sorted(asked, key=repr) == sorted(set(SCHEMES) - {SamplingScheme()}, key=repr)


def test_schemes_without_records_and_records_without_schemes() -> None:
    model = tiny.causal_lm("llama")
    assert score(model, [], schemes=SCHEMES).log_schemes.shape == (0, len(SCHEMES))
    assert score(model, make_records([(2, 3)])).log_schemes.shape == (3, 0)


def test_the_last_token_and_real_padding_ids_are_scored() -> None:
    # Other tools drop the last token, or mask real tokens that share the padding id.
    model = tiny.causal_lm("llama").double()
    record = TokenRecord("a", (5, tiny.PAD, 7, tiny.PAD), 1, 4)
    longer = make_records([(2, 20)])[0]
    table = score(model, [record, longer], batch_size=2)
    np.testing.assert_allclose(table.log_prob[:3], oracle(model, record)["log_prob"], rtol=1e-9)


def test_results_do_not_depend_on_batch_composition_or_training_mode() -> None:
    model, records = tiny.causal_lm("gpt2"), make_records(LENGTHS)
    model.train()  # dropout would make this a coin toss
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first = score(model, records)
    assert model.training
    shuffled = [4, 2, 8, 0, 1, 7, 5, 3, 6]
    second = score(model, records, order=shuffled, batch_size=3)
    np.testing.assert_allclose(first.log_prob, second.log_prob, atol=1e-5)
    assert first.record_ids == second.record_ids


def test_minus_infinity_logits_give_numbers() -> None:
    model = tiny.causal_lm("llama").double()  # untied head
    records = make_records(LENGTHS)
    head = model.get_output_embeddings()
    banned = torch.zeros(96, dtype=torch.bool)
    banned[90:] = True
    head.register_forward_hook(lambda module, args, out: out.masked_fill(banned, -math.inf))
    clean = [
        TokenRecord(r.record_id, tuple(min(t, 80) for t in r.ids), r.n_prompt, r.compressed_bytes) for r in records
    ]
    frame = record_figures(score(model, clean, model_map=ModelMap.of(model)))
    numbers = frame.select_dtypes("number").to_numpy(dtype=float)
    assert np.isfinite(numbers[:, :8]).all()
    impossible = TokenRecord("x", (5, 95, 6), 1, 3)  # the record itself needs a token of probability zero
    frame = record_figures(score(model, [impossible], model_map=ModelMap.of(model)))
    assert not frame.isna().to_numpy().any()
    assert frame["log_prob"][0] == -math.inf
    assert frame["probability"][0] == 0.0
    assert frame["n_for_p50"][0] == math.inf


def test_out_of_memory_halves_batches_without_changing_results(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = tiny.causal_lm("llama"), make_records(LENGTHS)
    whole = score(model, records, batch_size=9)
    real = likelihood._batch_rows

    def starved(model, model_map, batch, scheme):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, model_map, batch, scheme)

    monkeypatch.setattr(likelihood, "_batch_rows", starved)
    split = score(model, records, batch_size=9)
    assert split.splits == 4  # 9 = 5 + 4, 5 = 3 + 2, 4 = 2 + 2, 3 = 2 + 1
    np.testing.assert_allclose(split.log_prob, whole.log_prob, atol=1e-5)

    def always(model, model_map, batch, scheme):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(likelihood, "_batch_rows", always)
    with pytest.raises(ResourceError, match="expected memory for one record"):
        score(model, records)


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(likelihood, "_batch_rows", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        score(tiny.causal_lm("llama"), make_records(LENGTHS))


def test_foreign_token_ids_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="vocabulary size 96"):
        score(tiny.causal_lm("llama"), [TokenRecord("a", (5, 96), 1, 1)])


def test_no_records() -> None:
    table = score(tiny.causal_lm("llama"), [])
    assert len(record_figures(table)) == 0
    assert logit_noise(tiny.causal_lm("llama"), []) == 0.0


def test_nothing_of_batch_tokens_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 96 * 4)
    model, records = tiny.causal_lm("llama"), make_records([(1, 40)] * 6)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    model_map = ModelMap.of(model)
    seen.clear()
    score(model, records, model_map=model_map, batch_size=6)
    assert max(seen) <= 96 * 4
    assert sum(seen) == 96 * 240  # completion positions only, each once


def test_noise_bounds_the_paths_and_grows_in_half_precision() -> None:
    records = make_records(LENGTHS)
    single = logit_noise(tiny.causal_lm("llama"), records)
    assert 0 < single < 1e-4
    half = logit_noise(tiny.causal_lm("llama").to(torch.bfloat16), records)
    assert half > 100 * single


def test_length_batches() -> None:
    records = make_records(LENGTHS)
    batches = length_batches(records, 40)
    assert sorted(i for batch in batches for i in batch) == list(range(len(records)))
    for batch in batches:
        width = max(len(records[i].ids) for i in batch)
        assert len(batch) == 1 or width * len(batch) <= 40
    assert batches == length_batches(records, 40)
    with pytest.raises(ValueError, match="positive token budget"):
        length_batches(records, 0)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_schemes(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SamplingScheme(**bad)


def test_a_record_never_prints_its_tokens() -> None:
    assert "777" not in repr(TokenRecord("secret-id", (5, 777), 1, 1))
    assert "secret" not in repr(TokenRecord("secret-id", (5, 777), 1, 1))
