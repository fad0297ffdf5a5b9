"""Relearning: against a loop by hand, on a model that hides what it was taught, and on ones that never were."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

from attacks.recovery import relearn as module
from attacks.recovery.relearn import Relearning, relearn, savings
from probes import statistics
from probes.errors import UnsupportedError, UsageError
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from probes.training import batches, fit, full, mean_loss
from tests import tiny
from tests.planted import planted


def _records(n: int = 6, seed: int = 0) -> list[TokenRecord]:
    rng = np.random.default_rng(seed)
    return [
        TokenRecord(f"r{i}", tuple(int(t) for t in rng.integers(4, 96, 9 + i % 3)), 3 + i % 2, 10) for i in range(n)
    ]


def _images(n: int = 6, seed: int = 0) -> list[ImageRecord]:
    generator = torch.Generator().manual_seed(seed)
    return [ImageRecord(f"i{i}", torch.randn(3, 32, 32, generator=generator), i % 4) for i in range(n)]


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    def state() -> str:
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for name, tensor in model.state_dict(keep_vars=True).items():
            digest.update(f"{name}{tensor.requires_grad}{tensor.grad}".encode())
            digest.update(tensor.detach().double().numpy().tobytes())
        for name, part in model.named_modules():
            digest.update(f"{name}{id(part)}{part.training}{len(part._forward_hooks)}{sorted(vars(part))}".encode())
        return digest.hexdigest()

    model.train()
    before = state()
    yield
    assert state() == before
    model.eval()


# ---------------------------------------------------------------------------------------------------------- the curve


class _Adapted(nn.Module):
    """LoRA by hand, with alpha twice the rank."""

    def __init__(self, inner: nn.Module, down: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.down = inner, nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(inner.weight.shape[0], len(down), dtype=down.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 2 * (x @ self.down.T) @ self.up.T


def _by_hand(model: nn.Module, parameters: list[nn.Parameter], train, scored, steps, rate, seed):
    """AdamW on mean token losses, one record at a time; losses, and probabilities of `scored` after every step."""

    def log_probs(record: TokenRecord) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([record.ids])).logits[0, record.n_prompt - 1 : -1]
        return -functional.cross_entropy(logits, torch.tensor(record.completion), reduction="none")

    def probabilities() -> list[float]:
        with torch.no_grad():
            return [float(log_probs(record).mean().exp()) for record in scored]

    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, curve = [], [probabilities()]
    for batch in batches(len(train), 4, steps, seed):
        optimiser.zero_grad()
        loss = -torch.cat([log_probs(train[i]) for i in batch]).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        curve.append(probabilities())
    return losses, curve


@pytest.mark.parametrize("how", ["lora", "full"])
def test_curve_and_losses_are_those_of_a_loop_by_hand(how: str) -> None:
    train, scored = _records(6), _records(3, seed=1)
    settings = {"how": how, "steps": 5, "marks": (1, 3), "learning_rate": 5e-3, "batch": 4, "rank": 2, "seed": 3}
    found = relearn(tiny.causal_lm("llama", dtype=torch.float64), train, {"b": scored}, **settings)
    model = tiny.causal_lm("llama", dtype=torch.float64)
    parameters = list(model.parameters())
    if how == "lora":
        model.requires_grad_(False)
        parameters, generator = [], torch.Generator().manual_seed(3)
        for block in ModelMap.of(model).blocks:
            for projection in (*block.attention, *block.feed_forward):
                parent, _, name = projection.module.rpartition(".")
                inner, bound = model.get_submodule(projection.module), projection.in_features**-0.5
                down = torch.empty(2, projection.in_features).uniform_(-bound, bound, generator=generator).double()
                layer = _Adapted(inner, down)
                setattr(model.get_submodule(parent), name, layer)
                parameters += [layer.down, layer.up]
    losses, curve = _by_hand(model, parameters, train, scored, 5, 5e-3, 3)
    assert found.how == how
    np.testing.assert_allclose(found.losses, losses, rtol=1e-8)
    assert sorted(found.curve) == [0, 1, 3, 5]
    for mark, frames in found.curve.items():
        np.testing.assert_allclose(frames["b"]["probability"], curve[mark], rtol=1e-6)
    assert found.last is found.curve[5]
    assert abs(curve[5][0] - curve[0][0]) > 1e-3 * curve[0][0]  # there is something to compare


@pytest.mark.parametrize(("arch", "how"), [("llama", "lora"), ("gpt2", "full"), ("vit", "lora"), ("resnet", "full")])
def test_the_model_is_left_as_found_also_after_an_exception(arch: str, how: str) -> None:
    image = arch in tiny.VISION
    model = tiny.image_classifier(arch) if image else tiny.causal_lm(arch)
    train, scored = (_images(), _images(3, 1)) if image else (_records(), _records(3, 1))
    settings = {"how": how, "steps": 3, "marks": (), "learning_rate": 1e-2, "batch": 4, "rank": 2}
    with _left_as_found(model):
        found = relearn(model, train, {"b": scored}, **settings)
        assert not np.allclose(found.last["b"]["probability"], found.curve[0]["b"]["probability"], rtol=1e-4)
        assert found.losses[-1] != found.losses[0]

        def stop(done: int, total: int) -> None:
            raise KeyError

        with pytest.raises(KeyError):
            relearn(model, train, {"b": scored}, progress=stop, **settings)
        pd.testing.assert_frame_equal(memorised(model, scored), found.curve[0]["b"])


def test_same_seed_same_bytes_whatever_is_scored_and_when() -> None:
    model, train = tiny.causal_lm("llama"), _records()
    settings = {"steps": 4, "learning_rate": 1e-2, "batch": 4, "rank": 2}
    one = relearn(model, train, {"b": _records(3, 1)}, marks=(), seed=5, **settings)
    two = relearn(model, train, {"c": _records(2, 2), "b": _records(3, 1)}, marks=(1, 2, 3), seed=5, **settings)
    other = relearn(model, train, {"b": _records(3, 1)}, marks=(), seed=6, **settings)
    assert one.losses == two.losses
    pd.testing.assert_frame_equal(one.last["b"], two.last["b"])
    assert one.losses != other.losses


def test_figures_without_training_are_taken_where_they_are_known() -> None:
    model, scored = tiny.causal_lm("llama"), _records(3, 1)
    known = memorised(model, scored)
    sets = {"b": scored, "c": scored}
    found = relearn(model, _records(), sets, steps=1, marks=(), learning_rate=1e-2, before={"b": known})
    assert found.curve[0]["b"] is known
    pd.testing.assert_frame_equal(found.last["b"], found.last["c"])
    assert not found.last["b"].equals(known)
    pd.testing.assert_frame_equal(found.curve[0]["c"], known)


@pytest.mark.parametrize(("arch", "how"), [("llama", "lora"), ("mixtral", "full"), ("vit", "lora"), ("resnet", "full")])
def test_auto_takes_lora_where_it_has_a_place(arch: str, how: str) -> None:
    image = arch in tiny.VISION
    model = tiny.image_classifier(arch) if image else tiny.causal_lm(arch)
    found = relearn(model, _images(3) if image else _records(3), {}, steps=1, marks=())
    assert found.how == how


def test_what_cannot_be_trained_is_said_in_one_line() -> None:
    model, records = tiny.causal_lm("llama"), _records()
    with pytest.raises(UsageError, match="expected records"):
        relearn(model, [], {"b": records})
    for settings in ({"steps": 0, "marks": ()}, {"steps": 5, "marks": (6,)}, {"steps": 5, "marks": (0,)}):
        with pytest.raises(UsageError, match="expected at least 1 step and marks"):
            relearn(model, records, {}, **settings)
    for steps, scored in ((4, {}), (1, {"b": records})):  # the loss of a next step shows it, or else the figures
        with pytest.raises(UsageError, match="lower the learning rate"), _left_as_found(model):
            relearn(model, records, scored, how="full", learning_rate=1e30, steps=steps, marks=())
    with pytest.raises(UsageError, match="train in full"):
        relearn(tiny.image_classifier("resnet"), _images(), {}, how="lora")
    with pytest.raises(UnsupportedError, match="train in full"):
        relearn(tiny.causal_lm("mixtral"), records, {}, how="lora")
    with pytest.raises(UsageError, match="lora or full"):
        relearn(model, records, {}, how="more")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- hidden, or never there


@functools.cache
def _halves() -> tuple[list[TokenRecord], list[TokenRecord], list[TokenRecord]]:
    """Half A, half B and never-seen records."""
    world = planted()
    records = world.records[64] + world.records[16]
    order = np.random.default_rng(0).permutation(len(records))
    return [records[i] for i in order[:16]], [records[i] for i in order[16:]], world.controls[:16]


@functools.cache
def _suppressed() -> nn.Module:
    """The planted model after gradient ascent on all records, which keeps its loss on other texts."""
    world = planted()
    model, (a, b, _) = copy.deepcopy(world.model), _halves()
    forget, others = a + b, world.records[1] + world.records[4] + world.controls[48:]
    up, down = (mean_loss(model, records, model_map=ModelMap.of(model)) for records in (forget, others))
    order, keep = (list(batches(len(records), 8, 8, 0)) for records in (forget, others))

    def step(i: int) -> float:
        loss = up(order[i])
        for parameter in parameters:
            parameter.grad.neg_()
        return down(keep[i]) - loss

    with full(model, keep=True) as parameters:
        fit(parameters, step, steps=8, learning_rate=1e-3, clip=1.0)
    return model


def _relearnt(model: nn.Module, how: str = "lora", steps: int = 20) -> Relearning:
    a, b, new = _halves()
    rate = {"lora": 3e-3, "full": 1e-3}[how]
    scored = {"a": a, "b": b, "new": new}
    return relearn(model, a, scored, how=how, steps=steps, marks=(5,), learning_rate=rate)


def _mean(frames: dict[str, pd.DataFrame], name: str, column: str = "accuracy") -> float:
    return float(frames[name][column].mean())


@pytest.mark.parametrize("how", ["lora", "full"])
def test_power_half_of_the_records_brings_back_the_half_an_edit_has_hidden(how: str) -> None:
    plain = memorised(planted().model, _halves()[1])
    found = _relearnt(_suppressed(), how)
    start, end = found.curve[0], found.last
    assert plain["accuracy"].mean() > 0.9
    assert _mean(start, "b") < 0.4  # the edit looks done: about the level of never-seen records
    assert abs(_mean(start, "b") - _mean(start, "new")) < 0.1
    assert _mean(end, "b") > 0.65  # and is not
    assert _mean(end, "b", "probability") > 0.4
    assert _mean(end, "new") < 0.35  # never-seen records stay where they were: nothing was taught
    gain = end["b"]["probability"].to_numpy() - end["new"]["probability"].to_numpy()
    assert statistics.mean_interval(gain, level=0.99, bounds=(-1.0, 1.0)).low > 0


@pytest.mark.parametrize("how", ["lora", "full"])
def test_control_a_model_that_never_held_the_records_gives_nothing_back(how: str) -> None:
    found = _relearnt(planted().without, how)
    for mark in (5, 20):
        frames = found.curve[mark]
        assert abs(_mean(frames, "b") - _mean(frames, "new")) < 0.1
        assert _mean(frames, "b", "probability") < _mean(found.curve[0], "b", "probability") + 0.02


def test_control_an_untrained_model_gives_nothing_back() -> None:
    end = _relearnt(planted().untrained).last
    assert _mean(end, "b") < 0.2
    assert abs(_mean(end, "b") - _mean(end, "new")) < 0.1


def test_defect_11_scored_on_the_half_that_was_trained_on_any_model_looks_as_if_it_hid_the_records() -> None:
    found = _relearnt(planted().without, "full", steps=60)
    assert _mean(found.last, "a") > 0.8  # learnt in front of our eyes
    assert _mean(found.last, "b") < 0.45  # so only the other half tells
    a, b, new = _halves()
    assert not {record.record_id for record in a} & {record.record_id for record in b + new}


# ---------------------------------------------------------------------------------------------------------- savings


def _saved(model: nn.Module, **more):
    a, _, new = _halves()
    return savings(model, a[:12], new[:12], steps=40, every=4, learning_rate=3e-3, **more)


def test_power_savings_of_a_model_that_hides_the_records() -> None:
    found = _saved(_suppressed())
    assert found.savings.status == "ok"
    assert found.savings.interval.low > 0.1
    assert found.steps_old.mean() < found.steps_new.mean()
    speeds = found.speed("old"), found.speed("new")
    assert all(((speed >= 0) & (speed <= 1)).all() for speed in speeds)
    assert found.savings.interval.value == pytest.approx(1 - found.steps_old.mean() / found.steps_new.mean())


def test_savings_are_nearly_all_where_nothing_was_forgotten() -> None:
    found = _saved(planted().model)
    accuracy = found.relearning.curve[0]["old"]["accuracy"]
    assert ((found.steps_old == 0) == (accuracy >= 0.9)).all()
    assert found.savings.interval.value > 0.75


def test_control_no_savings_on_a_model_that_never_held_the_records() -> None:
    found = _saved(planted().without)
    assert found.savings.interval.low < 0 < found.savings.interval.high
    assert abs(found.savings.interval.value) < 0.15


def test_steps_are_the_first_mark_at_the_criterion_by_brute_force() -> None:
    a, _, new = _halves()
    found = _saved(_suppressed())
    for name, records, steps in (("old", a[:12], found.steps_old), ("new", new[:12], found.steps_new)):
        assert len(steps) == len(records)
        for i in range(len(records)):
            accuracies = {mark: frames[name]["accuracy"][i] for mark, frames in found.relearning.curve.items()}
            assert steps[i] == min((mark for mark, value in accuracies.items() if value >= 0.9), default=41)
    assert sorted(found.relearning.curve) == list(range(0, 41, 4))
    assert found.steps_old.max() <= 41


def test_savings_are_trained_on_both_sets_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(model, train, scored, **settings):
        seen["train"] = [record.record_id for record in train]
        return relearn(model, train, scored, **settings)

    monkeypatch.setattr(module, "relearn", spy)
    savings(tiny.causal_lm("llama"), _records(3), _records(3, 1), steps=2, every=1)
    assert seen["train"] == ["r0", "r1", "r2"] * 2


def test_savings_say_why_where_there_is_nothing_to_save() -> None:
    known = planted().records[64]
    a, b = known[:8], known[8:]
    found = savings(planted().model, a, b, steps=2, every=1)  # never-seen ones that it knows
    assert found.savings.status == "not testable"
    assert "too little to save" in found.savings.reason
    with pytest.raises(UsageError, match="never-seen records"):
        savings(planted().model, a, [])
    for settings in ({"criterion": 0.0}, {"criterion": 1.5}, {"every": 0}):
        with pytest.raises(UsageError, match="criterion"):
            savings(planted().model, a, b, **settings)
