"""Near-verbatim mass against the sum over every sequence of a tiny vocabulary."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Hamming, Levenshtein

from attacks.extraction import beam
from attacks.extraction.beam import near_verbatim_mass
from attacks.extraction.sampled import sampled
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import SamplingScheme, score
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests import tiny

VOCAB, LENGTH = 6, 4
EVERY = list(product(range(VOCAB), repeat=LENGTH))
PROMPT = (4, 2, 5)
GOLD = ((3, 5, 5, 1), (0, 4, 3, 2), (2, 2, 2, 2))
SCHEMES = (SamplingScheme(), SamplingScheme(0.8, top_k=3), SamplingScheme(1.0, top_p=0.7))
DISTANCE = {"levenshtein": Levenshtein.distance, "hamming": Hamming.distance}


def record(completion: tuple[int, ...], prompt: tuple[int, ...] = PROMPT) -> TokenRecord:
    return TokenRecord("r", (*prompt, *completion), len(prompt), 5)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.causal_lm("llama", vocab=VOCAB).double()


@pytest.fixture(scope="module")
def log_p(model: torch.nn.Module) -> np.ndarray:
    """[sequences, schemes] log-probability of every sequence of the completion's length."""
    table = score(model, [record(sequence) for sequence in EVERY], schemes=SCHEMES)
    return sampled(table).log_p_z


def brute(log_p: np.ndarray, gold: tuple[int, ...], metric: str, distance: int) -> float:
    near = [i for i, sequence in enumerate(EVERY) if DISTANCE[metric](sequence, gold) <= distance]
    return float(np.exp(log_p[near]).sum())


@pytest.mark.parametrize("metric", ["levenshtein", "hamming"])
@pytest.mark.parametrize("s", range(len(SCHEMES)))
def test_a_search_wide_enough_equals_the_sum_over_every_sequence(
    model: torch.nn.Module, log_p: np.ndarray, metric: beam.Metric, s: int
) -> None:
    for gold in GOLD:
        found = near_verbatim_mass(model, record(gold), distance=4, metric=metric, width=1300, scheme=SCHEMES[s])
        assert found.complete
        for distance, value in enumerate(found.by_distance):
            assert math.exp(value) == pytest.approx(brute(log_p[:, s], gold, metric, distance), rel=1e-9, abs=1e-300)
        assert found.log_mass == found.by_distance[-1]
        assert found.found == np.isfinite(log_p[:, s]).sum()  # distance 4 of 4 tokens: everything possible


@pytest.mark.parametrize("metric", ["levenshtein", "hamming"])
def test_a_narrow_search_is_a_lower_bound_that_grows_with_width_and_distance(
    model: torch.nn.Module, log_p: np.ndarray, metric: beam.Metric
) -> None:
    strict = 0
    for gold in GOLD:
        exact = float(log_p[EVERY.index(gold), 0])
        bounds = {
            (distance, width): near_verbatim_mass(model, record(gold), distance=distance, metric=metric, width=width)
            for distance in range(4)
            for width in (1, 2, 3, 5, 8, 20, 60, 200)
        }
        for (distance, width), found in bounds.items():
            truth = brute(log_p[:, 0], gold, metric, distance)
            assert math.exp(found.log_mass) <= truth * (1 + 1e-9)
            assert found.log_exact == pytest.approx(exact, rel=1e-9)
            assert found.log_mass >= found.log_exact
            assert found.found <= 1 + distance * width
            assert found.complete == (math.exp(found.log_mass) == pytest.approx(truth, rel=1e-9))
            for d in range(distance):  # a larger distance only adds to what a smaller one finds
                assert found.by_distance[d] == pytest.approx(bounds[d, width].log_mass, rel=1e-9)
            strict += not found.complete
        for distance in range(4):
            by_width = [bounds[distance, width].log_mass for width in (1, 2, 3, 5, 8, 20, 60, 200)]
            assert all(a <= b + 1e-12 for a, b in pairwise(by_width))
        for width in (1, 5, 20):
            assert all(bounds[d, width].log_mass <= bounds[d + 1, width].log_mass + 1e-12 for d in range(3))
    assert strict > 20


def test_a_wider_search_keeps_what_a_narrow_one_found() -> None:
    # Keeping the best children of all beams loses up to 6.5 nats here when the width grows.
    model = tiny.causal_lm("llama", vocab=VOCAB, initializer_range=0.6).double()
    model_map = ModelMap.of(model)
    for gold in ((2, 5, 3, 0, 4, 4, 5, 1), (5, 0, 3, 4, 5, 3, 2, 1), (3, 2, 1, 2, 5, 5, 0, 3)):
        bounds = [
            near_verbatim_mass(
                model, record(gold), distance=3, metric="hamming", width=width, model_map=model_map
            ).by_distance
            for width in (1, 2, 3, 4, 5, 6, 8)
        ]
        assert (np.diff(bounds, axis=0) > -1e-9).all()


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
def test_every_summand_is_exact_on_long_completions(arch: str) -> None:
    # Too many sequences to enumerate: the likeliest one-token changes are enumerated instead.
    model = tiny.causal_lm(arch, vocab=12).double()
    generator = np.random.default_rng(0)
    gold = tuple(int(t) for t in generator.integers(0, 12, 24))
    changed = [(*gold[:i], token, *gold[i + 1 :]) for i in range(len(gold)) for token in range(12) if token != gold[i]]
    table = score(model, [record(c) for c in [gold, *changed]])
    truth = np.exp(sampled(table).log_p_z[:, 0])
    found = near_verbatim_mass(model, record(gold), distance=1, metric="hamming", width=len(changed))
    assert found.complete
    assert found.found == 1 + len(changed)
    assert math.exp(found.log_exact) == pytest.approx(truth[0], rel=1e-6)
    assert math.exp(found.log_mass) == pytest.approx(truth.sum(), rel=1e-6)
    best = near_verbatim_mass(model, record(gold), distance=1, metric="hamming", width=20)
    assert best.log_exact < best.log_mass < found.log_mass


def test_a_shift_costs_what_levenshtein_says() -> None:
    """A model that surely drops the first gold token: nothing within Hamming 2, everything within Levenshtein 2."""
    gold, spoken = (10, 11, 12, 13, 14, 15), (11, 12, 13, 14, 15, 16)
    model = tiny.causal_lm("llama")
    tiny.train(model, [(*PROMPT, *spoken)], steps=120)
    near = near_verbatim_mass(model, record(gold), distance=2)
    far = near_verbatim_mass(model, record(gold), distance=2, metric="hamming")
    assert math.exp(near.by_distance[1]) < 0.01
    assert math.exp(near.log_mass) > 0.9
    assert math.exp(far.log_mass) < 0.01


def test_a_scheme_that_cannot_emit_the_record_gives_zero_and_no_nan(model: torch.nn.Module) -> None:
    greedy = SamplingScheme(top_k=1)
    impossible = next(g for g in GOLD if near_verbatim_mass(model, record(g), distance=0, scheme=greedy).found == 0)
    found = near_verbatim_mass(model, record(impossible), distance=0, scheme=greedy)
    assert found.log_mass == found.log_exact == -math.inf
    assert found.complete
    certain = near_verbatim_mass(model, record(impossible), distance=4, scheme=greedy)
    assert (certain.log_mass, certain.found, certain.log_exact) == (0.0, 1, -math.inf)


def test_steps_and_memory(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    model_map = ModelMap.of(model)
    hook = model_map.backbone().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = near_verbatim_mass(model, record(GOLD[0]), distance=2, width=3, model_map=model_map)
    hook.remove()
    assert len(rows) == LENGTH  # a cache: the prompt once, then one token a beam
    assert found.steps == sum(rows)
    assert max(rows) <= 1 + 2 * 3
    assert near_verbatim_mass(model, record(GOLD[0]), distance=2, width=3) == found

    def starved(*arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(beam, "_extend", starved)
    with pytest.raises(ResourceError, match="smaller width or distance"):
        near_verbatim_mass(model, record(GOLD[0]), distance=2, width=3)


def test_a_record_of_one_token_and_bad_input(model: torch.nn.Module) -> None:
    one = near_verbatim_mass(model, record((3,)), distance=1, width=VOCAB)
    assert one.log_mass == pytest.approx(0.0, abs=1e-12)
    assert one.found == VOCAB
    training = model.training
    for bad in ({"distance": -1}, {"distance": 1, "width": 0}, {"distance": 1, "metric": "cosine"}):
        with pytest.raises(UsageError, match="expected"):
            near_verbatim_mass(model, record(GOLD[0]), **bad)
    with pytest.raises(UnsupportedError, match="vocabulary size 6"):
        near_verbatim_mass(model, record((6,)), distance=1)
    assert model.training == training
