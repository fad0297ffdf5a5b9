"""Sampling figures against exact decimals, one pass a scheme, and a decoder that really samples."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import GenerationConfig

from attacks.extraction import neutral_generation
from attacks.extraction.sampled import emitted_within, sampled
from probes.errors import UsageError
from probes.figures import record_figures
from probes.likelihood import SamplingScheme, inference, score
from probes.records import TokenRecord
from tests import tiny

getcontext().prec = 400


@pytest.mark.parametrize("n", [1, 2, 100, 1000, 10**9])
def test_emitted_within_equals_exact_decimals(n: int) -> None:
    logs = np.array([0.0, -1e-17, -1e-9, -1e-3, -0.3, -0.6931, -0.694, -0.9, -1.1, -5, -40, -300, -699, -701, -740])
    found = emitted_within(logs, n)
    for value, log_p in zip(found, logs, strict=True):
        expected = 1 - (1 - Decimal(float(log_p)).exp()) ** n
        assert float(value) == pytest.approx(float(expected), rel=1e-12, abs=1e-320)
    assert emitted_within(np.array([-math.inf, -2000.0]), n).tolist() == [0.0, 0.0]
    assert emitted_within(np.array([1e-7]), n).tolist() == [1.0]  # rounding just above 0


def records(seed: int = 0) -> list[TokenRecord]:
    generator = np.random.default_rng(seed)
    lengths = [(3, 1), (2, 4), (1, 9), (6, 2)]
    return [
        TokenRecord(f"r{i}", tuple(int(t) for t in generator.integers(4, 96, p + c)), p, 9)
        for i, (p, c) in enumerate(lengths)
    ]


def test_figures_equal_those_of_one_pass_a_scheme() -> None:
    model = tiny.causal_lm("llama").double()
    schemes = (SamplingScheme(), SamplingScheme(0.5), SamplingScheme(1.0, top_k=10), SamplingScheme(0.8, top_p=0.9))
    found = sampled(score(model, records(), schemes=schemes))
    assert found.schemes == schemes
    assert found.log_p_z.shape == (4, 4)
    for s, scheme in enumerate(schemes):
        frame = record_figures(score(model, records(), scheme=scheme))
        np.testing.assert_array_equal(found.log_p_z[:, s], frame["log_p_z"])
        np.testing.assert_array_equal(found.n_for_p50[:, s], frame["n_for_p50"])
        np.testing.assert_array_equal(found.n_for_p90[:, s], frame["n_for_p90"])
    for n in (1, 100, 1000):
        p = np.exp(found.log_p_z)
        np.testing.assert_allclose(found.within[n], 1 - (1 - p) ** n, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found.share[n], found.within[n].mean(axis=0))
    assert (found.share[1] <= found.share[100]).all()
    assert not any(np.isnan(array).any() for array in (found.log_p_z, found.n_for_p50, *found.within.values()))


def test_a_table_without_further_schemes_reports_its_own() -> None:
    scheme = SamplingScheme(0.9, top_k=3)
    table = score(tiny.causal_lm("llama"), records(), scheme=scheme)
    found = sampled(table, queries=(7,))
    assert found.schemes == (scheme,)
    assert set(found.share) == {7}
    impossible = found.log_p_z == -math.inf  # random tokens are rarely among the three likeliest
    assert impossible.any()
    assert (found.n_for_p50[impossible] == math.inf).all()
    assert (found.within[7][impossible] == 0).all()


def test_a_sampling_decoder_emits_completions_as_often_as_predicted() -> None:
    model = tiny.causal_lm("gpt2")
    scheme, samples = SamplingScheme(0.7, top_k=6, top_p=0.8), 4000
    prompt, ids = (9, 4, 30), torch.tensor([[9, 4, 30]])
    config = GenerationConfig(
        do_sample=True,
        temperature=scheme.temperature,
        top_k=scheme.top_k,
        top_p=scheme.top_p,
        max_new_tokens=2,
        num_return_sequences=samples,
        eos_token_id=None,
        pad_token_id=0,
    )
    with tiny.seeded(1), neutral_generation(model), inference(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    drawn = [tuple(row) for row in out[:, 3:].tolist()]
    seen = sorted(set(drawn), key=drawn.count)[-4:]
    found = sampled(score(model, [TokenRecord("r", (*prompt, *two), 3, 1) for two in seen], schemes=(scheme,)))
    for two, log_p in zip(seen, found.log_p_z[:, 0], strict=True):
        assert binomtest(drawn.count(two), samples, math.exp(log_p)).pvalue > 1e-4


def test_no_records_and_no_samples_are_usage_errors() -> None:
    model = tiny.causal_lm("llama")
    with pytest.raises(UsageError, match="at least one record"):
        sampled(score(model, []))
    with pytest.raises(UsageError, match="at least 1 sample"):
        sampled(score(model, records()), queries=(0,))
