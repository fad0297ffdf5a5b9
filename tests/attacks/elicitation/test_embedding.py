"""Nearby inputs: steps against whole passes, the radius, and what comes back within the calibrated budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from attacks.elicitation import embedding
from attacks.elicitation.budget import calibrate
from attacks.elicitation.inputs import neighbour_distance
from probes.errors import UsageError
from probes.memorised import memorised
from probes.records import TokenRecord
from tests import tiny
from tests.attacks.elicitation.hidden import hidden, left_as_found
from tests.attacks.elicitation.test_inputs import records


def slow(model: torch.nn.Module, row: TokenRecord, radius: float, step: float, steps: int, keep: int) -> np.ndarray:
    """Probabilities [S + 1], one record at a time, by the model's own logits."""
    most = radius * neighbour_distance(model)
    base = model.get_input_embeddings()(torch.tensor([row.ids])).detach()
    moved, found = torch.zeros_like(base), []
    for _ in range(steps + 1):
        inputs = (base + moved).requires_grad_(True)
        logits = model(inputs_embeds=inputs).logits[0, row.n_prompt - 1 : -1]
        loss = functional.cross_entropy(logits, torch.tensor(row.completion))
        found.append(float(torch.exp(-loss.detach())))
        (slope,) = torch.autograd.grad(loss, inputs)
        for t in range(keep, row.n_prompt):
            new = moved[0, t] - step * most * slope[0, t] / slope[0, t].norm()
            moved[0, t] = new * min(1.0, most / float(new.norm()))
    return np.array(found)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "gpt_neox", "qwen3_moe"])
def test_steps_are_those_of_one_record_at_a_time(arch: str) -> None:
    model = tiny.causal_lm(arch, dtype=torch.float32 if "moe" in arch else torch.float64)
    rows = records(((3, 5), (2, 2), (6, 1)))
    options = {"radius": 0.8, "step": 0.4, "steps": 4, "keep": 1}
    with left_as_found(model):
        found = embedding.perturb(model, rows, **options)
    for i, row in enumerate(rows):
        expected = np.maximum.accumulate(slow(model, row, 0.8, 0.4, 4, 1))
        np.testing.assert_allclose(found.probability[i], expected, rtol=2e-3)
    np.testing.assert_allclose(found.at(0)["probability"], memorised(model, rows)["probability"], rtol=1e-5)
    assert (found.probability[:, -1] > found.probability[:, 0]).all()
    assert found.rows == 15


def test_batches_do_not_change_the_search() -> None:
    model, rows = tiny.causal_lm("llama", dtype=torch.float64), records()
    whole = embedding.perturb(model, rows, steps=3, restarts=2)
    single = embedding.perturb(model, rows, steps=3, restarts=2, batch_tokens=1)
    np.testing.assert_allclose(whole.probability, single.probability, rtol=1e-6)
    assert whole.rows == single.rows == 32


def moves(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, row: TokenRecord, **options: object) -> list:
    seen, whole = [], embedding.final_states

    def listen(mapped: object, inputs: torch.Tensor) -> torch.Tensor:
        own = model.get_input_embeddings()(torch.tensor([row.ids]))
        seen.append((inputs - own)[0].norm(dim=-1).detach().numpy())
        return whole(mapped, inputs)

    monkeypatch.setattr(embedding, "final_states", listen)
    embedding.perturb(model, [row], **options)
    return seen


def test_no_token_leaves_its_radius_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    row = records(((4, 3),))[0]
    most = 0.3 * neighbour_distance(model)
    seen = moves(monkeypatch, model, row, radius=0.3, step=0.5, steps=8, keep=1)
    assert len(seen) == 9
    np.testing.assert_array_equal(seen[0], 0.0)
    np.testing.assert_allclose(seen[1][1:4], 0.5 * most)
    assert max(sizes.max() for sizes in seen) <= most * (1 + 1e-9)
    assert all(not sizes[[0, 4, 5, 6]].any() for sizes in seen)  # what is kept, and the completion


def test_restarts_start_one_step_away_in_other_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    row = records(((4, 3),))[0]
    most = 0.5 * neighbour_distance(model)
    seen = moves(monkeypatch, model, row, steps=1, restarts=3)
    np.testing.assert_array_equal(seen[0], 0.0)
    for start in (seen[2], seen[4]):
        np.testing.assert_allclose(start[:4], 0.2 * most)
    one, many, other = (
        embedding.perturb(model, [row], steps=2, restarts=n, seed=seed) for n, seed in ((1, 0), (3, 0), (3, 1))
    )
    assert (many.probability >= one.probability).all()
    assert not np.array_equal(many.probability, other.probability)
    assert np.array_equal(many.probability, embedding.perturb(model, [row], steps=2, restarts=3).probability)


def test_the_model_is_left_as_found_also_when_it_is_stopped() -> None:
    model, rows = tiny.causal_lm("gpt2").train(), records()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.ln_f.weight.grad = torch.ones_like(model.transformer.ln_f.weight)
    with left_as_found(model):
        embedding.perturb(model, rows, steps=2)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        embedding.perturb(model, rows, steps=2, progress=stop)


# --- what it finds --------------------------------------------------------------------------------------------------


def test_hidden_records_come_back_within_the_budget_and_never_seen_ones_do_not() -> None:
    world = hidden()
    calibration, never = world.controls[:24], world.controls[24:]
    rates = {}
    for name, model in (("hidden", world.hidden), ("cleared", world.cleared)):
        budget = calibrate(embedding.perturb(model, calibration, steps=20))
        assert budget.steps is not None
        rates[name] = [
            embedding.perturb(model, rows, steps=20).success()[:, budget.steps].mean() for rows in (world.b, never)
        ]
    assert memorised(world.hidden, world.b)["probability"].mean() < 0.1
    assert rates["hidden"][0] >= 0.9
    assert rates["hidden"][1] <= 0.15
    assert max(rates["cleared"]) <= 0.15


def test_random_strings_do_not_come_out_within_the_budget_but_do_with_enough_steps() -> None:
    """The defect of attacks without a control: any string comes out in the end (arXiv 2502.15836)."""
    world, generator = hidden(), np.random.default_rng(5)
    budget = calibrate(embedding.perturb(world.hidden, world.controls[:24], steps=20)).steps
    assert budget is not None
    random = [
        replace(row, ids=(*row.ids[: row.n_prompt], *(int(t) for t in generator.integers(96, 128, 6))))
        for row in world.controls[24:36]
    ]
    found = embedding.perturb(world.hidden, random, radius=1.0, steps=60)
    assert embedding.perturb(world.hidden, random, steps=budget).success()[:, budget].mean() <= 0.1
    assert found.success()[:, -1].mean() >= 0.9


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "above 0"),
        ({"step": 0.0}, "above 0"),
        ({"steps": 0}, "above 0"),
        ({"restarts": 0}, "above 0"),
        ({"keep": 1}, "found none in 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        embedding.perturb(tiny.causal_lm("llama"), records(), **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one record"):
        embedding.perturb(tiny.causal_lm("llama"), [])
