"""Exposure: spaces by enumeration, ranks by brute force, and the law of never-seen canaries by simulation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from attacks import exposure as exposure_module
from attacks.exposure import Exposure, Space, combine, exposure, exposures
from probes import sharedprefix
from probes.errors import UnlearnError, UnsupportedError, UsageError
from probes.records import TokenRecord
from tests import tiny

TOKENIZER = tiny.tokenizer()
PROMPT = "The code of the door is "


def canary(prompt: str = PROMPT, after: str = "") -> Callable[[str], TokenRecord]:
    head = TOKENIZER(prompt).input_ids

    def make(fill: str) -> TokenRecord:
        return TokenRecord("canary", tuple(TOKENIZER(prompt + fill + after).input_ids), len(head), 0)

    return make


def brute_force(model: torch.nn.Module, record: TokenRecord) -> float:
    """log p of the completion from one unbatched, uncached float64 forward pass."""
    ids = torch.tensor([record.ids])
    with torch.no_grad():
        log_probs = copy.deepcopy(model).double()(ids).logits[0].log_softmax(-1)
    return float(sum(log_probs[t - 1, record.ids[t]] for t in range(record.n_prompt, len(record.ids))))


# --- spaces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{digits:2}", [f"{i:02d}" for i in range(100)]),
        ("{choice:red,green,blue}", ["red", "green", "blue"]),
        ("a{choice:x,y}-{digits:1}b", [f"a{c}-{d}b" for c in "xy" for d in range(10)]),
        ("{{{choice:p,q}}}", ["{p}", "{q}"]),
        ("{hex:1}{letters:1}", [a + b for a, b in product("0123456789abcdef", "abcdefghijklmnopqrstuvwxyz")]),
        ("{choice:Ann,Anna} {digits:1}", [f"{n} {d}" for n in ("Ann", "Anna") for d in range(10)]),
        ("{digits:1}{choice:a,ab}", [f"{d}{c}" for d in range(10) for c in ("a", "ab")]),
    ],
)
def test_space_enumerates_indexes_and_holds_exactly_its_texts(template: str, expected: list[str]) -> None:
    space = Space.of(template)
    assert list(space.enumerate()) == expected
    assert space.size == len(expected) == len(set(expected))
    assert [space.index(text) for text in expected] == list(range(space.size))
    assert [space.nth(i) for i in range(space.size)] == expected
    for text in (*expected[:5], ""):
        for wrong in (text + "0", "0" + text, text[:-1], text.upper() + "!"):
            assert (wrong in space) == (wrong in expected)
    assert 5 not in space


def test_space_larger_than_64_bits() -> None:
    space = Space.of("{hex:32}")
    assert space.size == 16**32
    assert space.index("f" * 32) == space.size - 1
    drawn = space.draw(50, seed=1)
    assert len(set(drawn)) == 50
    assert all(text in space for text in drawn)


def test_draw_is_seeded_uniform_and_without_repetition() -> None:
    space = Space.of("{digits:2}")
    assert space.draw(30, seed=3) == space.draw(30, seed=3) != space.draw(30, seed=4)
    assert sorted(space.draw(100, seed=0)) == list(space.enumerate())
    assert sorted(space.draw(98, seed=0, exclude=["00", "99"])) == list(space.enumerate())[1:-1]
    counts = np.zeros(100)
    for seed in range(400):
        counts[[int(text) for text in space.draw(10, seed=seed)]] += 1  # the path that rejects repetitions
    assert stats.chisquare(counts).pvalue > 1e-4
    assert counts.min() > 0


@pytest.mark.parametrize(
    "template",
    "|1234|{digits:0}|{digits:}|{digits:x}|{dozens:3}|{digits:3|digits:3}|{choice:}|{choice:a}|{choice:a,a}|{choice:a,,b}|"
    "{choice:a,ab}{choice:b,bb}|{digits:99999999}|{}|{d{e}f}".split("|"),
)
def test_format_errors_are_clear_and_quote_nothing(template: str) -> None:
    with pytest.raises(UsageError, match="expected") as caught:
        Space.of(template)
    assert "\n" not in str(caught.value)
    if "dozens" in template:
        assert "dozens" not in str(caught.value)


def test_space_bounds() -> None:
    space = Space.of("{digits:1}")
    with pytest.raises(UsageError, match="below 10"):
        space.nth(10)
    with pytest.raises(UsageError, match="at most 9"):
        space.draw(10, seed=0, exclude=["3"])
    assert "digits" not in repr(Space.of("{digits:1}-{choice:alpha,beta}"))
    assert "alpha" not in repr(Space.of("{digits:1}-{choice:alpha,beta}"))


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("prompt", [PROMPT, "No "])  # run once for all fills; too short for that
def test_exact_rank_is_the_brute_force_rank(arch: str, prompt: str) -> None:
    model, space, make = tiny.causal_lm(arch), Space.of("{digits:2}"), canary(prompt, after=".")
    scores = {text: brute_force(model, make(text)) for text in space.enumerate()}
    extremes = (max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__))
    secrets = list(dict.fromkeys(["07", "42", "99", *extremes]))
    found = exposures(model, make, secrets, space, n=100)
    for secret, result in zip(secrets, found, strict=True):
        rank = sum(score >= scores[secret] for score in scores.values())
        assert (result.rank, result.size, result.exact) == (rank, 100, True)
        assert result.log_prob == pytest.approx(scores[secret], rel=1e-5)
        assert result.bits == pytest.approx(math.log2(100) - math.log2(rank))
        assert result.pvalue == pytest.approx(rank / 100)
        assert result.max_bits == pytest.approx(math.log2(100))


def test_sampled_rank_counts_the_fills_drawn() -> None:
    model, space, make = tiny.causal_lm("llama"), Space.of("{digits:4}"), canary()
    result = exposure(model, make, "1234", space, n=50, seed=5)
    fills = space.draw(50, f"5|{[1234]}", exclude=["1234"])
    own = brute_force(model, make("1234"))
    rank = 1 + sum(brute_force(model, make(fill)) >= own for fill in fills)
    assert (result.rank, result.size, result.exact, result.space_size) == (rank, 51, False, 10_000)
    assert result.pvalue == pytest.approx(rank / 51)


def test_a_shared_prefix_is_run_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space, make = tiny.causal_lm("llama"), Space.of("{digits:3}"), canary("x" * 60)
    tokens: list[int] = []
    model.model.register_forward_pre_hook(lambda _m, _a, k: tokens.append(k["input_ids"].numel()), with_kwargs=True)
    cached = exposures(model, make, ["123", "456"], space, n=300, seed=1)
    cost = sum(tokens)
    tokens.clear()
    monkeypatch.setattr(sharedprefix, "MIN_SHARED", 10_000)
    plain = exposures(model, make, ["123", "456"], space, n=300, seed=1)
    assert [result.rank for result in cached] == [result.rank for result in plain]
    assert np.allclose([r.log_prob for r in cached], [r.log_prob for r in plain], rtol=1e-6)
    assert cost < sum(tokens) / 10


def test_a_cache_that_changes_figures_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space, make = tiny.causal_lm("llama"), Space.of("{digits:2}"), canary("x" * 20)
    right = exposure(model, make, "42", space)
    monkeypatch.setattr(sharedprefix._Cached, "_batch", lambda self, records: np.zeros(len(records)))
    assert exposure(model, make, "42", space) == right


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("mamba", {"state_size": 8}),  # a recurrent state instead of keys and values
        (
            "lfm2",
            {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"layer_types": ["conv", "full_attention"]},
        ),  # some of both
    ],
)
def test_models_without_a_cache_of_keys_and_values(arch: str, settings: dict[str, object]) -> None:
    model = tiny.causal_lm(arch, hidden_size=32, num_hidden_layers=2, **settings)
    space, make = Space.of("{digits:1}"), canary()
    scores = {text: brute_force(model, make(text)) for text in space.enumerate()}
    result = exposure(model, make, "4", space)
    assert result.rank == sum(score >= scores["4"] for score in scores.values())


def test_memory_errors_halve_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space, make = tiny.causal_lm("llama"), Space.of("{digits:2}"), canary()
    right = exposure(model, make, "42", space)
    run = sharedprefix._Cached._batch

    def small_only(self: sharedprefix._Cached, records: list[TokenRecord]) -> np.ndarray:
        if len(records) > 7:
            raise MemoryError
        return run(self, records)

    monkeypatch.setattr(sharedprefix._Cached, "_batch", small_only)
    assert exposure(model, make, "42", space).rank == right.rank


def test_results_repeat_and_follow_the_secrets() -> None:
    model, space, make = tiny.causal_lm("llama"), Space.of("{digits:5}"), canary()
    first = exposures(model, make, ["00001", "00002"], space, n=64, seed=2)
    assert first == exposures(model, make, ["00001", "00002"], space, n=64, seed=2)
    assert first != exposures(model, make, ["00001", "00002"], space, n=64, seed=3)
    assert [first[0].size, first[1].size] == [65, 65]


def test_ties_count_against_the_finding() -> None:
    model, space = tiny.causal_lm("llama"), Space.of("{digits:3}")
    same = canary()("777")
    result = exposure(model, lambda fill: same, "123", space, n=200)
    assert (result.rank, result.size, result.bits, result.pvalue) == (201, 201, 0.0, 1.0)


def test_the_model_is_left_as_found() -> None:
    model, space = tiny.causal_lm("gpt2"), Space.of("{digits:2}")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    exposure(model, canary(), "42", space)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- the law of never-seen canaries ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sampled", "exact"])
def never_seen(request: pytest.FixtureRequest) -> list[list[Exposure]]:
    """48 groups of 6 canaries, each group with its own sentence, on a model that was never trained."""
    model = tiny.causal_lm("llama", seed=11)
    space = Space.of("{digits:6}" if request.param == "sampled" else "{digits:2}")
    groups = []
    for group in range(48):
        secrets = space.draw(6, seed=f"secrets {group}")
        prompt = f"Sentence {group:02d} holds the number "
        groups.append(exposures(model, canary(prompt), secrets, space, n=99, seed=0))
    return groups


def test_law_of_never_seen_canaries(never_seen: list[list[Exposure]]) -> None:
    results = [result for group in never_seen for result in group]
    n = len(results)
    assert n == 288 >= 200
    for cut in (50, 25, 10, 5, 2, 1):  # exposure >= log2(100 / cut) is rank <= cut of 100
        bits = math.log2(100 / cut)
        hits = sum(result.bits >= bits - 1e-12 for result in results)
        assert stats.binomtest(hits, n, 2.0**-bits).pvalue > 0.001
    joint = np.array([result.joint_rank / result.joint_size for result in results])
    assert stats.kstest(joint, "uniform").pvalue > 0.001
    combined = combine(results)
    assert combined.compatible
    assert combined.canaries == n
    assert combined.mean_bits == pytest.approx(1 / math.log(2), abs=0.35)  # standard error 1.44 / sqrt(288) = 0.085


def test_combined_pvalues_of_groups_are_uniform(never_seen: list[list[Exposure]]) -> None:
    """Canaries of a group share their fills: combining their own ranks would not be a test, the joint ranks are."""
    combined = [combine(group) for group in never_seen]
    assert stats.kstest([c.pvalue for c in combined], "uniform").pvalue > 0.001
    assert stats.binomtest(sum(not c.compatible for c in combined), 48, 0.05, "greater").pvalue > 0.001


def test_joint_ranks_combine_validly_where_own_ranks_do_not() -> None:
    """100 never-seen canaries ranked against the same 99 fills, 1,000 times."""
    source = np.random.default_rng(0)
    found = np.array([exposure_module._ranks(source.normal(size=199), 100, exact=False) for _ in range(1000)])
    own = (found[..., 0] - source.random(found.shape[:2])) / found[..., 1]  # [1000, 100], made continuous
    joint = (found[..., 2] - source.random(found.shape[:2])) / found[..., 3]
    p_own, p_joint = (stats.chi2.sf(-2 * np.log(p).sum(axis=1), 200) for p in (own, joint))
    assert (p_own <= 0.05).mean() > 0.08  # the mistake: the fills are common to all
    assert abs((p_joint <= 0.05).mean() - 0.05) <= 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert stats.kstest(p_joint, "uniform").pvalue > 0.001
    assert np.abs(np.corrcoef(joint.T) - np.eye(100)).mean() < 0.03
    assert np.corrcoef(own.T)[np.triu_indices(100, 1)].mean() > 0.005


def test_joint_ranks_of_a_whole_space_are_independent() -> None:
    source = np.random.default_rng(1)
    found = np.array([exposure_module._ranks(source.permutation(20.0 + np.arange(20)), 10, True) for _ in range(4000)])
    assert (found[..., 1] == 20).all()
    assert (found[..., 3] == 20 - np.arange(10)).all()
    for i in range(10):
        counts = np.bincount(found[:, i, 2] - 1, minlength=20 - i)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert np.abs(np.corrcoef(found[..., 2].T)[np.triu_indices(10, 1)]).max() < 0.06  # own ranks: -1 / 19


def test_planted_canaries_stand_out_and_controls_do_not() -> None:
    model = tiny.causal_lm("llama", seed=5, initializer_range=0.05)
    space, make = Space.of("{digits:6}"), canary("pin ")
    secrets, controls = space.draw(4, seed="planted"), space.draw(8, seed="never planted")
    tiny.train(model, [make(secret).ids for secret in secrets] * 2, steps=80, lr=1e-2)
    planted = exposures(model, make, secrets, space, n=511, seed=1)
    assert all(result.bits == result.max_bits == 9.0 or result.rank <= 4 for result in planted)
    assert combine(planted).pvalue < 1e-6
    assert not combine(planted).compatible
    assert combine(exposures(model, make, controls, space, n=511, seed=2)).pvalue > 0.001


# --- extrapolation --------------------------------------------------------------------------------------------------


def test_extrapolation_matches_a_known_tail() -> None:
    source = np.random.default_rng(1)
    reference = source.normal(-40, 3, size=5000)
    own = -40 + 3 * stats.norm.isf(2.0**-20)
    assert exposure_module._extrapolate(float(own), reference) == pytest.approx(20, abs=3)
    assert exposure_module._extrapolate(-1.0, np.full(100, -2.0)) is None
    assert exposure_module._extrapolate(-1.0, reference[:10]) is None


def test_extrapolation_only_on_request() -> None:
    model, space = tiny.causal_lm("llama"), Space.of("{digits:6}")
    assert exposure(model, canary(), "123456", space, n=60).extrapolated_bits is None
    labelled = exposure(model, canary(), "123456", space, n=60, extrapolate=True)
    assert labelled.extrapolated_bits is not None
    assert labelled.extrapolated_bits >= 0
    assert labelled.bits == exposure(model, canary(), "123456", space, n=60).bits


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_a_clear_usage_error_without_the_secret() -> None:
    model, space = tiny.causal_lm("llama"), Space.of("{digits:4}")

    def broken(fill: str) -> TokenRecord:
        return TokenRecord("one token", tuple(TOKENIZER(fill).input_ids)[:1], 1, 0)

    cases: list[Callable[[], object]] = [
        lambda: exposures(model, canary(), [], space),
        lambda: exposure(model, canary(), "98765", space),
        lambda: exposures(model, canary(), ["9876", "9876"], space),
        lambda: exposure(model, canary(), "9876", space, n=0),
        lambda: exposure(model, broken, "9876", space),
        lambda: exposure(model, lambda fill: None, "9876", space),  # type: ignore[arg-type,return-value]
        lambda: combine([]),
        lambda: combine([exposure(model, canary(), "9876", space, n=9)], level=1.0),
    ]
    for case in cases:
        with pytest.raises(UsageError, match="expected") as caught:
            case()
        assert "9876" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_foreign_token_ids_and_broken_models() -> None:
    model, space = tiny.causal_lm("llama"), Space.of("{digits:2}")
    with pytest.raises(UnsupportedError, match="vocabulary"):
        exposure(model, lambda fill: TokenRecord("r", (1, 2, 1000 + int(fill)), 1, 0), "42", space)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UnlearnError):
        exposure(model, canary(), "42", space)


def test_two_texts_are_space_enough() -> None:
    result = exposure(tiny.causal_lm("llama"), canary(), "no", Space.of("{choice:yes,no}"))
    assert result.exact
    assert result.size == 2
    assert result.rank in (1, 2)
    assert combine([result]).pvalue == pytest.approx(result.pvalue)
