"""The logit lens against the model's own states, and on models that hide records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.errors import UnsupportedError, UsageError
from probes.inside.lens import lens
from probes.memorised import memorised
from probes.modelmap import ModelMap
from tests.planted import planted
from tests.probes.inside.world import F64, double, forget, hiding, left_as_found, slow_lens, slow_states, texts
from tests.tiny import CAUSAL, causal_lm


@pytest.mark.parametrize("arch", CAUSAL)
def test_every_layer_is_the_head_of_its_normed_state(arch: str) -> None:
    model, records, top = double(arch), texts(), 5
    model_map = ModelMap.of(model)
    with left_as_found(model):
        found = lens(model, records, top=top, batch_tokens=24)
    for i, record in enumerate(records):
        targets = torch.tensor(record.completion)[:, None]
        reached = torch.zeros(record.n_tokens, dtype=torch.bool)
        for layer, log_p in enumerate(slow_lens(model, model_map, record)):
            gold = log_p.gather(-1, targets)
            ranks = (log_p > gold).sum(-1)
            reached |= ranks < top
            assert found.probability[i, layer] == pytest.approx(float(gold.mean().exp()), rel=1e-10)
            assert found.accuracy[i, layer] == pytest.approx(float((ranks == 0).double().mean()))
            assert found.among_top[i, layer] == pytest.approx(float((ranks < top).double().mean()))
        assert found.any_layer[i] == pytest.approx(float(reached.double().mean()))
    assert found.best == pytest.approx(found.probability.max(1))
    assert found.record_ids == tuple(record.record_id for record in records)


@pytest.mark.parametrize("arch", CAUSAL)
def test_the_last_layer_is_the_models_own_output(arch: str) -> None:
    model, records = causal_lm(arch), texts()
    found, own = lens(model, records), memorised(model, records)
    assert found.probability[:, -1] == pytest.approx(own["probability"].to_numpy(), rel=1e-5)
    assert found.accuracy[:, -1].tolist() == own["accuracy"].tolist()


def test_regression_c8_9_the_final_norm_stands_before_the_head() -> None:
    """A published lens hands the states to the head as they are."""
    model, record = causal_lm("llama", dtype=F64), texts(1)[0]
    model_map = ModelMap.of(model)
    found = lens(model, [record]).probability[0, 0]
    state = slow_states(model, record)[0][record.n_prompt - 1 : -1]
    targets = torch.tensor(record.completion)[:, None]
    with torch.no_grad():
        bare = model_map.logits(state).log_softmax(-1).gather(-1, targets).mean().exp()
        normed = model_map.logits(model.model.norm(state)).log_softmax(-1).gather(-1, targets).mean().exp()  # type: ignore[union-attr, operator]
    assert found == pytest.approx(float(normed), rel=1e-10)
    assert abs(found - float(bare)) > 1e-4
    with pytest.raises(UnsupportedError, match="final norm"):
        lens(model, [record], model_map=replace(model_map, final_norm=None))


def test_regression_c8_9_as_many_tries_as_layers_are_given_to_never_seen_records_too() -> None:
    """Any-layer success rises with every layer, on records nobody saw as well: only the difference says something."""
    world = planted()
    seen, never = (lens(world.model, records, top=3) for records in (forget(), world.controls))
    assert (never.any_layer >= never.among_top.max(1)).all()
    assert never.any_layer.mean() > never.among_top.mean(0).max() + 0.01  # mere optimism
    assert seen.any_layer.mean() > never.any_layer.mean() + 0.3


def test_records_that_the_output_hides_are_read_off_a_layer_before() -> None:
    world, model = planted(), hiding()
    assert memorised(model, forget())["probability"].mean() < 0.05
    assert memorised(model, forget())["extracted"].sum() == 0
    seen, never = lens(model, forget()).best.mean(), lens(model, world.controls).best.mean()
    assert seen > 0.2
    assert seen > 4 * never


def test_a_model_that_never_saw_the_records_names_them_in_no_layer() -> None:
    world = planted()
    for model in (world.without, world.untrained):
        seen, never = lens(model, forget()).best, lens(model, world.controls).best
        assert abs(seen.mean() - never.mean()) < 0.03


def test_one_pass_serves_all_layers() -> None:
    model, records = causal_lm("llama"), texts(4)
    model_map = ModelMap.of(model)
    calls: list[int] = []
    handle = model.get_submodule("model").register_forward_hook(lambda module, given, out: calls.append(1))
    try:
        lens(model, records, batch_tokens=1000, model_map=model_map)
    finally:
        handle.remove()
    assert len(calls) == 1 + 1  # two tokens to try the readout, and the records


def test_batches_and_choice_of_layers_change_nothing() -> None:
    model, records = causal_lm("qwen2", dtype=F64), texts(7)
    whole = lens(model, records, batch_tokens=1000)
    apart = lens(model, records, batch_tokens=1)
    np.testing.assert_allclose(whole.probability, apart.probability, rtol=1e-10)
    np.testing.assert_array_equal(whole.any_layer, apart.any_layer)
    last = lens(model, records, layers=[1], batch_tokens=1000)
    np.testing.assert_array_equal(last.probability[:, 0], whole.probability[:, 1])
    np.testing.assert_array_equal(last.any_layer, last.among_top[:, 0])
    assert lens(model, records, batch_tokens=1000).probability.tobytes() == whole.probability.tobytes()


def test_bad_input_is_refused() -> None:
    model = causal_lm("llama")
    with pytest.raises(UsageError, match="candidate"):
        lens(model, texts(1), top=0)
    with pytest.raises(UsageError, match="at least one record"):
        lens(model, [])
    with pytest.raises(UsageError, match="expected layers"):
        lens(model, texts(1), layers=[7])
