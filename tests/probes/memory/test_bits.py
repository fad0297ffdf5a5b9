"""Learned bits: exact answers where the entropy is known, and never more than there is."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from probes.errors import UsageError
from probes.likelihood import score
from probes.memory import bits, parameter_count, uniform_prior, unigram_prior
from tests import tiny
from tests.probes.memory import biographies
from tests.probes.memory.biographies import ENTROPY, SIZES
from tests.probes.memory.tables import table_of

PEOPLE = 24


def untrained() -> torch.nn.Module:
    return tiny.causal_lm("llama", vocab=biographies.VOCAB, hidden_size=64, intermediate_size=96, head_dim=16)


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    model = untrained()
    tiny.train(model, [record.ids for record in biographies.people(PEOPLE)], steps=150)
    return model


def entropies(n: int = PEOPLE) -> np.ndarray:
    return np.full(n, ENTROPY)


@pytest.mark.parametrize("known", range(len(SIZES) + 1))
def test_a_lookup_table_of_some_attributes_has_exactly_their_bits(known: int) -> None:
    """Markers are certain, the first attributes are known, the others uniform: no more and no less is learned."""
    rows = [x for a, size in enumerate(SIZES) for x in (0.0, 0.0 if a < known else -math.log(size))]
    found = bits(table_of([rows] * 5), entropies(5), parameters=10)
    expected = sum(math.log2(size) for size in SIZES[:known])
    assert found.frame["learned_bits"].to_numpy() == pytest.approx(np.full(5, expected))
    assert found.total == pytest.approx(5 * expected)
    assert found.per_parameter == pytest.approx(expected / 2)
    assert found.prior_total == pytest.approx(5 * ENTROPY)


def test_the_corpus_is_the_same_everywhere() -> None:
    assert biographies.digest(biographies.people(5)) == biographies.digest(biographies.people(9)[:5])
    assert biographies.digest(biographies.people(100))[:16] == "8ad5e2bd5c0409b3"


def test_nothing_is_learned_from_what_was_not_read(trained: torch.nn.Module) -> None:
    """An untrained model, and a trained one on people of its kind that it never read, are no better than the prior."""
    strangers = biographies.people(PEOPLE + 40)[PEOPLE:]
    for model in (untrained(), trained):
        found = bits(score(model, strangers), entropies(40))
        assert found.total < 0
        assert found.per_record.interval is not None
        assert found.per_record.interval.high < 0


def test_training_learns_up_to_the_entropy_and_never_beyond(trained: torch.nn.Module) -> None:
    people = biographies.people(PEOPLE)
    found = bits(score(trained, people), entropies(), parameters=parameter_count(trained))
    assert (found.frame["learned_bits"] <= ENTROPY).all()
    assert 0.95 * found.prior_total < found.total <= found.prior_total
    assert found.per_parameter == found.total / sum(p.numel() for p in trained.parameters())
    assert found.ruled_out == 0


def test_bits_grow_with_training() -> None:
    model, people, totals = untrained(), biographies.people(PEOPLE), []
    for _ in range(3):
        tiny.train(model, [record.ids for record in people], steps=15)
        totals.append(bits(score(model, people), entropies()).total)
    assert totals == sorted(totals)
    assert all(total <= PEOPLE * ENTROPY for total in totals)


def test_eight_bit_weights_keep_what_was_learned(trained: torch.nn.Module) -> None:
    rounded = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:
                step = parameter.abs().amax(dim=1, keepdim=True) / 127
                parameter.copy_((parameter / step).round() * step)
    people = biographies.people(PEOPLE)
    full, short = (bits(score(model, people), entropies()).total for model in (trained, rounded))
    assert full != short
    assert short == pytest.approx(full, rel=0.02)


def test_a_reference_model_as_the_prior(trained: torch.nn.Module) -> None:
    people = biographies.people(6)
    table, before = score(trained, people), score(untrained(), people)
    found = bits(table, before)
    for i in range(6):
        rows = table.rows(i)
        expected = (table.log_prob[rows].astype(float) - before.log_prob[rows]).sum() / math.log(2)
        assert found.frame["learned_bits"][i] == pytest.approx(expected)
    assert bits(table, table).total == 0.0


def test_the_prior_cancels_between_two_models(trained: torch.nn.Module) -> None:
    people = biographies.people(PEOPLE)
    after, before = score(trained, people), score(untrained(), people)
    priors = (entropies(), uniform_prior(after, 96), unigram_prior(people, biographies.people(99, seed=5), 96))
    gains = [bits(after, prior).total - bits(before, prior).total for prior in priors]
    assert gains == pytest.approx([gains[0]] * 3)


def test_uniform_and_unigram_priors_by_hand() -> None:
    people, corpus = biographies.people(3), biographies.people(4, seed=7)
    table = table_of([[-1.0] * record.n_tokens for record in people])
    assert uniform_prior(table, 96).tolist() == [12 * math.log2(96)] * 3
    tokens = [t for record in corpus for t in record.completion]
    for i, code in enumerate(unigram_prior(people, corpus, 96)):
        shares = [(tokens.count(t) + 0.5) / (len(tokens) + 48) for t in people[i].completion]
        assert code == pytest.approx(-sum(math.log2(share) for share in shares))


def test_a_token_ruled_out_counts_nothing_and_is_counted() -> None:
    found = bits(table_of([[-np.inf, -1.0], [-math.log(2), 0.0]]), [8.0, 8.0])
    assert found.ruled_out == 1
    assert found.frame["code_bits"].tolist() == [None, 1.0]
    assert found.frame["learned_bits"].tolist() == [0.0, 7.0]
    assert "NaN" not in json.dumps(found.frame.to_dict("records"))


def test_a_record_of_one_token_and_none_at_all() -> None:
    one = bits(table_of([[-math.log(4)]]), [5.0])
    assert one.total == pytest.approx(3.0)
    none = bits(table_of([]), np.zeros(0), parameters=7)
    assert (none.total, none.per_parameter, none.per_record.status) == (0.0, 0.0, "not resolvable")


def test_bad_arguments() -> None:
    table = table_of([[-1.0]] * 2)
    for prior in ([1.0], [1.0, -1.0], [1.0, np.inf], [1.0, np.nan]):
        with pytest.raises(UsageError, match="prior bits"):
            bits(table, prior)
    with pytest.raises(UsageError, match="same 2 records"):
        bits(table, table_of([[-1.0, -1.0]] * 2))
    with pytest.raises(UsageError, match="one parameter"):
        bits(table, [1.0, 1.0], parameters=0)
    with pytest.raises(UsageError, match="corpus"):
        unigram_prior(biographies.people(1), [], 96)
    with pytest.raises(UsageError, match="below 30"):
        unigram_prior(biographies.people(1), biographies.people(1), 30)
    with pytest.raises(UsageError, match="vocabulary"):
        uniform_prior(table, 0)


def test_tied_parameters_count_once() -> None:
    model = tiny.causal_lm("gpt2")
    assert parameter_count(model) == sum(p.numel() for p in set(model.parameters()))
    assert parameter_count(model) < sum(p.numel() for p in model.state_dict().values())


def test_coverage_for_records_of_a_known_law() -> None:
    """200 draws of 40 records that the model writes in an exponential number of bits around a known mean."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        code = rng.exponential(5.0, 40)
        found = bits(table_of([[-x * math.log(2)] for x in code]), np.full(40, 20.0))
        assert found.per_record.interval is not None
        missed += not found.per_record.interval.low <= 15.0 <= found.per_record.interval.high
    assert missed <= 10 + 3 * math.sqrt(10)


def test_no_text_in_a_repr() -> None:
    assert repr(bits(table_of([[-1.0]]), [2.0])).startswith("Bits(records=1")
