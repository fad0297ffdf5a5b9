"""Linear probes: the closed forms against direct solves, and what they find in models that hide records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.errors import UsageError
from probes.inside import linear
from probes.inside.lens import lens
from probes.inside.linear import LayerProbe, Probe, fit_probe, score_probe
from probes.inside.states import readout
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests.planted import planted
from tests.probes.inside.world import F64, double, forget, hiding, left_as_found, slow_states, texts
from tests.tiny import causal_lm


def halves() -> tuple[list[TokenRecord], list[TokenRecord]]:
    return forget()[::2], forget()[1::2]


@pytest.mark.parametrize("n", [20, 60])
def test_the_ridge_is_the_direct_solution(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 32, dtype=F64, generator=generator) * torch.arange(1, 33) + 5
    x[:, 3] = 2.0  # a constant says nothing
    y = torch.randn(n, 7, dtype=F64, generator=generator) + 1
    ridge, penalty = linear._Ridge.of(x, y), 0.3
    kept = [i for i in range(32) if i != 3]
    z = ((x - x.mean(0)) / x.std(0, unbiased=False))[:, kept]
    values = torch.linalg.svdvals(z)
    amount = penalty * values[values > 1e-6].square().mean()
    direct = torch.linalg.solve(z.T @ z + amount * torch.eye(31, dtype=F64), z.T @ (y - y.mean(0)))
    torch.testing.assert_close(ridge.predict(x, penalty), z @ direct + y.mean(0), rtol=0, atol=1e-9)
    weight, bias = ridge.map(penalty)
    torch.testing.assert_close(x @ weight + bias, ridge.predict(x, penalty), rtol=0, atol=1e-9)
    assert not weight[3].any()


@pytest.mark.parametrize("arch", ["llama", "gemma2"])  # gemma2 caps its logits
def test_what_is_regressed_on_is_the_gradient_of_each_positions_loss(arch: str) -> None:
    model = double(arch)
    model_map = ModelMap.of(model)
    hidden = torch.randn(9, 32, dtype=F64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(9) * 10
    with left_as_found(model):
        found = linear._directions(model_map, hidden, targets)
    leaf = hidden.clone().requires_grad_()
    log_p = model_map.logits(leaf).log_softmax(-1)[torch.arange(9), targets].sum()
    torch.testing.assert_close(found, torch.autograd.grad(log_p, leaf)[0], rtol=0, atol=1e-12)
    if arch == "llama":
        embedding = model.get_submodule("lm_head").weight.detach()  # type: ignore[union-attr]
        mean = model_map.logits(hidden).softmax(-1) @ embedding
        torch.testing.assert_close(found, (embedding[targets] - mean).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_completions_are_scored_through_the_map(arch: str) -> None:
    model, records = double(arch), texts()
    model_map, generator = ModelMap.of(model), torch.Generator().manual_seed(2)
    weight = torch.randn(32, 32, dtype=F64, generator=generator) / 8
    bias = torch.randn(32, dtype=F64, generator=generator)
    probe = Probe((LayerProbe(1, weight, bias, 1.0, 1.0, 0.0),))
    with left_as_found(model):
        found = score_probe(model, probe, records, batch_tokens=24)
    apply = readout(model_map)
    for i, record in enumerate(records):
        state = slow_states(model, record)[1][record.n_prompt - 1 : -1]
        targets = torch.tensor(record.completion)
        with torch.no_grad():
            log_p = model_map.logits(apply(state) + state @ weight + bias).log_softmax(-1)
        gold = log_p[torch.arange(len(targets)), targets]
        assert found.probability[i, 0] == pytest.approx(float(gold.mean().exp()), rel=1e-9)
        assert found.accuracy[i, 0] == pytest.approx(float((log_p.argmax(-1) == targets).double().mean()))


def test_a_probe_that_adds_nothing_is_the_logit_lens() -> None:
    model, records = causal_lm("llama"), texts()
    nothing = Probe(tuple(LayerProbe(i, torch.zeros(32, 32), torch.zeros(32), 1.0, 0.0, 0.0) for i in range(3)))
    found, plain = score_probe(model, nothing, records), lens(model, records)
    np.testing.assert_array_equal(found.probability, plain.probability)
    np.testing.assert_array_equal(found.accuracy, plain.accuracy)


def test_the_step_is_0_where_what_was_held_out_gains_nothing() -> None:
    model = causal_lm("llama", dtype=F64)
    model_map = ModelMap.of(model)
    hidden = torch.randn(40, 32, dtype=F64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(40) * 2
    with torch.no_grad():
        better = linear._directions(model_map, hidden, targets)
        at_0 = model_map.logits(hidden).log_softmax(-1)[torch.arange(40), targets].mean()
    step, value = linear._best_step(model_map, hidden, -better, targets, 1.0)
    assert (step, value) == (0.0, pytest.approx(float(at_0)))
    step, value = linear._best_step(model_map, hidden, better, targets, 1.0)
    assert step > 0
    for other in (step / 2, 2 * step):
        with torch.no_grad():
            moved = model_map.logits(hidden + other * better).log_softmax(-1)[torch.arange(40), targets].mean()
        assert value >= float(moved)


def test_folds_keep_near_duplicates_together() -> None:
    records = [replace(record, group=f"g{i % 5}") for i, record in enumerate(texts(23))]
    folds = linear._folds(records, 4, seed=0)
    assert set(folds) == {0, 1, 2, 3}
    assert all(len({folds[i] for i in range(23) if i % 5 == group}) == 1 for group in range(5))
    assert set(linear._folds(records, 40, seed=0)) == {0, 1, 2, 3, 4}
    with pytest.raises(UsageError, match="at least 2 clusters"):
        linear._folds([replace(record, group="one") for record in records], 4, seed=0)
    with pytest.raises(UsageError, match="at least 2 folds"):
        linear._folds(records, 1, seed=0)


def test_a_probe_recovers_what_the_output_hides() -> None:
    world, model, (first, second) = planted(), hiding(), halves()
    with left_as_found(model):
        probe = fit_probe(model, first)
        seen, never = (score_probe(model, probe, records) for records in (second, world.controls))
    place = probe.best
    assert memorised(model, second)["probability"].mean() < 0.05
    assert seen.probability[:, place].mean() > 0.25
    assert seen.probability[:, place].mean() > 4 * never.probability[:, place].mean()
    assert seen.probability[:, place].mean() > lens(model, second).best.mean()  # the map says more than the lens
    assert probe.layers[place].step > 0
    wrong = fit_probe(model, first, layers=[probe.layers[place].layer], shuffled=True)
    assert score_probe(model, wrong, second).probability.mean() < 0.6 * seen.probability[:, place].mean()


def test_a_probe_finds_nothing_in_a_model_that_never_saw_the_records() -> None:
    world, (first, second) = planted(), halves()
    for model in (world.without, world.untrained):
        probe = fit_probe(model, first)
        seen, never = (score_probe(model, probe, r).probability[:, probe.best] for r in (second, world.controls))
        assert abs(seen.mean() - never.mean()) < 0.03


def test_nothing_but_the_first_half_decides_and_the_same_bytes_come_out() -> None:
    model, (first, second) = hiding(), halves()
    one, other = (fit_probe(model, first, layers=[0]) for _ in range(2))
    assert torch.equal(one.layers[0].weight, other.layers[0].weight)
    assert one.layers[0].held_out == other.layers[0].held_out
    scored = score_probe(model, one, second).probability
    assert scored.tobytes() == score_probe(model, other, second).probability.tobytes()
    alone = np.concatenate([score_probe(model, one, [record]).probability for record in second])
    np.testing.assert_allclose(alone, scored, rtol=1e-4)  # a record's figure depends on no other scored record


def test_held_out_likelihood_is_of_records_that_the_map_did_not_see() -> None:
    """On random records there is nothing to learn: what the map fits on itself must not count as found."""
    records = texts(24, seed=5)
    model = causal_lm("llama", dtype=F64)
    probe = fit_probe(model, records, layers=[1])
    fitted = np.log(score_probe(model, probe, records).probability[:, 0]).mean()
    held_out, fresh = (
        probe.layers[0].held_out,
        np.log(score_probe(model, probe, texts(24, seed=6)).probability).mean(),
    )
    assert held_out - fresh < 0.3
    assert fitted >= held_out - 0.1


def test_bad_input_is_refused() -> None:
    model = causal_lm("llama")
    with pytest.raises(UsageError, match="at least 2 clusters"):
        fit_probe(model, texts(1))
    with pytest.raises(UsageError, match="expected layers"):
        fit_probe(model, texts(4), layers=[9])
    with pytest.raises(UsageError, match="at least one record"):
        score_probe(model, fit_probe(model, texts(4), layers=[0]), [])
