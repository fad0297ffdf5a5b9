"""The toolkit's passes on a difference: they score, continue and search what `generate()` does with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from attacks.difference import readout
from attacks.extraction import greedy
from attacks.extraction.beam import near_verbatim_mass
from attacks.extraction.continuation import continuations
from attacks.recovery import weights
from probes import condition, likelihood, passes, sharedprefix, taps, targets, training
from probes.curvature.operators import block_parameters
from probes.errors import UnsupportedError
from probes.figures import record_figures
from probes.inside import states
from probes.modelmap import ModelMap
from probes.parts import parts_of
from probes.records import TokenRecord
from tests import tiny
from tests.unlearn.uld_models import Rule, difference, external, model_of, tokens

RULE = Rule(0.75, 0.05, 0.5, "original")


def records(shared: int = 0) -> list[TokenRecord]:
    """Eight records of different lengths; all begin with the same `shared` tokens."""
    out = []
    for i in range(8):
        ids = torch.cat([tokens(1, shared, seed=99)[0], tokens(1, 6 + 2 * i, seed=i)[0]]).tolist()
        out.append(TokenRecord(f"r{i}", tuple(ids), shared + 3, 0))
    return out


def whole_of(arch: str, rule: Rule = RULE) -> torch.nn.Module:
    if arch == "external":
        return external(model_of("gpt2"), tiny.causal_lm("llama", seed=3, hidden_size=16, head_dim=4), rule)  # type: ignore[no-any-return]
    return difference(model_of(arch), rule, 1, 3)  # type: ignore[no-any-return]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "mixtral", "external"])
@torch.no_grad()
def test_the_one_pass_scores_the_models_logits(arch: str) -> None:
    whole = whole_of(arch)
    found = ModelMap.of(whole)
    table = likelihood.score(whole, records(), model_map=found)
    for i, record in enumerate(records()):
        ids = torch.tensor([record.ids])
        logits = whole(ids).logits[0, record.n_prompt - 1 : -1].log_softmax(-1)
        want = logits.gather(-1, ids[0, record.n_prompt :, None])[:, 0]
        np.testing.assert_allclose(table.log_prob[table.rows(i)], want, rtol=1e-5, atol=1e-5)
        rank = (logits > want[:, None]).sum(-1)
        np.testing.assert_array_equal(table.rank[table.rows(i)], rank)
        np.testing.assert_allclose(table.mean[table.rows(i)], (logits.exp() * logits).sum(-1), rtol=1e-5, atol=1e-5)
    assert likelihood.logit_noise(whole, records(), model_map=found) < 1e-3


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "external"])
def test_a_shared_beginning_is_run_once(arch: str) -> None:
    whole, given = whole_of(arch), records(shared=10)
    found = ModelMap.of(whole)
    table = likelihood.score(whole, given, model_map=found)
    want = [table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(8)]
    cached = sharedprefix._Cached.run(whole, found, given, 10, None)
    assert cached is not None
    np.testing.assert_allclose(cached.all(None), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sharedprefix.completion_log_probs(whole, given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "external"])
def test_greedy_continuations_are_those_of_generate(arch: str) -> None:
    whole, given = whole_of(arch), records()
    found = ModelMap.of(whole)
    table = likelihood.score(whole, given, model_map=found)
    got = continuations(whole, given, table, noise=0.0, model_map=found)
    plain = ModelMap.of(whole.target)  # type: ignore[arg-type]
    original = likelihood.score(whole.target, given, model_map=plain)  # type: ignore[arg-type]
    before = continuations(whole.target, given, original, noise=0.0, model_map=plain)  # type: ignore[arg-type]
    assert got != before
    for record, ids in zip(given, got, strict=True):
        assert list(ids) == greedy.greedy_tokens(whole, record.ids[: record.n_prompt], record.n_tokens)
    emitted = [
        TokenRecord(r.record_id, (*r.ids[: r.n_prompt], *ids), r.n_prompt, 0) for r, ids in zip(given, got, strict=True)
    ]
    figures = record_figures(likelihood.score(whole, emitted, model_map=found), noise=1e-6)
    assert (figures["greedy"] == "extracted").all()
    confirmed, summary = greedy.confirm(whole, emitted, figures)
    assert confirmed["emitted"].all()
    assert summary.disagreements == 0


@pytest.mark.parametrize("outside", ["original", "never"])
def test_near_verbatim_mass_is_brute_force(outside: str) -> None:
    whole = whole_of("llama", Rule(0.75, 0.05, 0.5, outside))  # type: ignore[arg-type]
    prompt = tokens(1, 4)[0]
    completion = greedy.greedy_tokens(whole, prompt.tolist(), 2)
    record = TokenRecord("r", (*prompt.tolist(), *completion), 4, 0)
    got = near_verbatim_mass(whole, record, distance=1, metric="hamming", width=200, scheme=likelihood.SamplingScheme())
    with torch.no_grad():
        first = whole(prompt[None]).logits[0, -1].log_softmax(-1)  # [V]
        rows = torch.cat([prompt.expand(96, -1), torch.arange(96)[:, None]], dim=1)  # [V, T + 1]
        second = whole(rows).logits[:, -1].log_softmax(-1)  # [V, V]
    joint = first[:, None] + second  # [V, V]
    near = torch.zeros(96, 96, dtype=torch.bool)
    near[completion[0]] = True
    near[:, completion[1]] = True
    assert got.complete
    assert got.log_mass == pytest.approx(float(joint[near].logsumexp(0)), abs=1e-5)
    assert got.log_exact == pytest.approx(float(joint[completion[0], completion[1]]), abs=1e-5)


@pytest.mark.parametrize(
    "look",
    [
        lambda model, found: states.check_layers(states.language_map(model, found), None),
        lambda model, found: taps.sites(found),
        lambda model, found: passes.losses_of(model, records(), sampled=False, seed=0),
        lambda model, found: list(training.adapters(model, found, rank=2, alpha=2, seed=0).__enter__()),
        lambda model, found: weights.targets(found),
        lambda model, found: condition.condition_table(model),
        lambda model, found: targets.targets_of(found, records()),
        lambda model, found: block_parameters(found),
        lambda model, found: parts_of(found),
        lambda model, found: readout.read_edit(model, model.get_parameter),
    ],
    ids=["lens", "taps", "passes", "adapters", "weights", "condition", "targets", "blocks", "parts", "readout"],
)
def test_what_looks_into_one_models_weights_refuses_a_difference(look: Callable[..., object]) -> None:
    whole = whole_of("llama")
    with pytest.raises(UnsupportedError, match="answers come from two"):
        look(whole, ModelMap.of(whole))
