"""Steering by anonymised activations: the push against blocks called by hand, and names that an edit has shrunk."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from attacks.steering import Steering, find_steering, steered
from probes.errors import UsageError
from probes.memorised import memorised
from probes.records import TokenRecord
from tests.probes.inside.world import F64, double, left_as_found, slow_states, texts
from tests.tiny import causal_lm, train

NAME, NOBODY = 5, 6  # the token that names whom a prompt is about, and another in its place


def other_name(record: TokenRecord) -> TokenRecord:
    """The record about nobody."""
    return replace(record, ids=tuple(NOBODY if token == NAME else token for token in record.ids))


@functools.cache
def named() -> tuple[nn.Module, list[TokenRecord], list[TokenRecord]]:
    """A model that says one thing about NAME and another about NOBODY, by the question's topic; and such records.

    Of the never-seen records it knows the questions, about both, but was never shown their answers.
    """
    rng = np.random.default_rng(0)
    model = causal_lm("llama", hidden_size=64, intermediate_size=96, head_dim=16, initializer_range=0.05)
    records, never, texts_ = [], [], []
    for i in range(24):
        topic = rng.integers(10, 90, 3).tolist()
        about, nobody = rng.integers(10, 90, 3).tolist(), rng.integers(10, 90, 3).tolist()
        record = TokenRecord(f"n{i}", (2, NAME, *topic, *about), 5, 1)
        (records if i < 16 else never).append(record)
        if i < 16:
            texts_ += [record.ids, (2, NOBODY, *topic, *nobody)]
    train(model, texts_, steps=120)
    return model, records, never


@functools.cache
def shrunk() -> nn.Module:
    """The model with the name's embedding almost that of nobody's: it answers as if asked about nobody."""
    model = copy.deepcopy(named()[0])
    with torch.no_grad():
        table = cast(nn.Embedding, model.get_submodule("model.embed_tokens")).weight
        table[NAME] = table[NOBODY] + 0.2 * (table[NAME] - table[NOBODY])
    return model


def test_the_push_stands_at_every_position_that_predicts() -> None:
    model, records = double("gpt2"), texts()
    direction = np.random.default_rng(0).standard_normal(32)
    with left_as_found(model):
        found = steered(model, records, Steering(1, 1.5, direction, ()), batch_tokens=24)
    for i, record in enumerate(records):
        blocks = list(cast(Any, model).transformer.h)
        hidden = slow_states(model, record)[1][None].clone()
        hidden[:, record.n_prompt - 1 : -1] += 1.5 * torch.from_numpy(direction)
        mask = torch.full((len(record.ids),) * 2, -torch.inf, dtype=F64).triu(1)[None, None]
        with torch.no_grad():
            out = blocks[2](hidden, attention_mask=mask)
            hidden = cast(Any, model).transformer.ln_f(out[0] if isinstance(out, tuple) else out)
            log_p = cast(Any, model).lm_head(hidden)[0].log_softmax(-1)
        gold = torch.stack([log_p[t - 1, record.ids[t]] for t in range(record.n_prompt, len(record.ids))])
        first = [int(log_p[t - 1].argmax()) == record.ids[t] for t in range(record.n_prompt, len(record.ids))]
        assert found["loss"][i] == pytest.approx(-float(gold.mean()), abs=1e-10)
        assert found["probability"][i] == pytest.approx(float(gold.mean().exp()), rel=1e-9)
        assert found["accuracy"][i] == pytest.approx(np.mean(first))
        assert found["extracted"][i] == all(first)


def test_the_direction_is_the_mean_difference_at_the_last_prompt_token() -> None:
    model, records = causal_lm("llama", dtype=F64), texts(5)
    others = [replace(r, ids=(7, 8, *r.ids), n_prompt=r.n_prompt + 2) for r in records[:4]]
    same = records[4]  # a prompt with nothing to exchange is no pair
    found = find_steering(model, records, [*others, same], layers=[0], coefficients=[1e-3])
    pairs = [
        slow_states(model, own)[0][own.n_prompt - 1] - slow_states(model, other)[0][other.n_prompt - 1]
        for own, other in zip(records[:4], others, strict=True)
    ]
    np.testing.assert_allclose(found.direction, torch.stack(pairs).mean(0).numpy(), rtol=0, atol=1e-12)
    drawn = found.random(3)
    assert np.linalg.norm(drawn.direction) == pytest.approx(np.linalg.norm(found.direction))
    assert (drawn.layer, drawn.coefficient) == (found.layer, found.coefficient)
    assert found.random(3).direction.tobytes() == drawn.direction.tobytes()
    assert abs(np.dot(drawn.direction, found.direction)) < 0.9 * np.linalg.norm(found.direction) ** 2


def test_no_push_is_the_model_itself() -> None:
    model, records = causal_lm("qwen2"), texts()
    found = steered(model, records, Steering(0, 0.0, np.ones(32), ()))
    own = memorised(model, records)
    np.testing.assert_allclose(found["probability"], own["probability"], rtol=1e-5)
    assert found["accuracy"].tolist() == own["accuracy"].tolist()


def test_steering_brings_back_what_a_shrunk_name_hides() -> None:
    _, records, never = named()
    model, (first, second) = shrunk(), (records[::2], records[1::2])
    with left_as_found(model):
        found = find_steering(model, first, [other_name(record) for record in first])
        after, control = (steered(model, some, found)["probability"].mean() for some in (second, never))
    before, unseen = (memorised(model, some)["probability"].mean() for some in (second, never))
    assert found.coefficient > 0
    assert before < 0.15
    assert after > 2 * before
    assert after - before > 0.1
    assert abs(control - unseen) < 0.05  # it teaches nothing
    assert steered(model, second, found.random(0))["probability"].mean() < 0.75 * after
    best = max(found.tried, key=lambda one: one[2])
    assert (found.layer, found.coefficient) == best[:2]


def test_steering_finds_nothing_in_a_model_that_never_saw_the_records() -> None:
    _, records, _ = named()
    untrained = causal_lm("llama", hidden_size=64, intermediate_size=96, head_dim=16, initializer_range=0.05)
    found = find_steering(untrained, records[::2], [other_name(record) for record in records[::2]])
    after = steered(untrained, records[1::2], found)["probability"].mean()
    assert abs(after - memorised(untrained, records[1::2])["probability"].mean()) < 0.02


def test_no_push_is_chosen_where_none_helps() -> None:
    model, records, _ = named()
    found = find_steering(model, records, [other_name(record) for record in records], coefficients=[40.0])
    assert found.coefficient == 0
    np.testing.assert_allclose(
        steered(model, records, found)["probability"], memorised(model, records)["probability"], rtol=1e-5
    )


def test_bad_input_is_refused_and_the_model_left_as_found() -> None:
    model, records = causal_lm("llama"), texts(3)
    with left_as_found(model):
        with pytest.raises(UsageError, match="names, numbers or dates"):
            find_steering(model, records, records)
        with pytest.raises(UsageError, match="copy of each record"):
            find_steering(model, records, records[:2])
        for coefficients in ([], [float("nan")]):
            with pytest.raises(UsageError, match="at least one coefficient"):
                find_steering(model, records, texts(3, seed=1), coefficients=coefficients)
        with pytest.raises(UsageError, match="at least one record"):
            steered(model, [], Steering(0, 1.0, np.ones(32), ()))
        with pytest.raises(RuntimeError):
            steered(model, records, Steering(0, 1.0, np.ones(7), ()))
