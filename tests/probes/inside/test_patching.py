"""Activation patching against blocks called by hand, its fixed points, and what it says of hiding and of forgetting."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from probes.errors import UsageError
from probes.inside.patching import capture, depth, losses, patched_losses, patching
from probes.likelihood import score
from probes.records import TokenRecord
from tests.planted import planted
from tests.probes.inside.world import F64, double, forget, hiding, left_as_found, never_held, texts
from tests.tiny import CAUSAL, causal_lm


def by_hand(original: nn.Module, other: nn.Module, record: TokenRecord, layer: int) -> float:
    """GPT-2 alone: the other's embeddings and blocks up to `layer`, then the original's, one record without padding."""

    def blocks(model: nn.Module, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        mask = torch.full((hidden.shape[1],) * 2, -torch.inf, dtype=F64).triu(1)[None, None]
        for block in list(cast(Any, model).transformer.h)[start:stop]:
            out = block(hidden, attention_mask=mask)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    ids = torch.tensor([record.ids])
    with torch.no_grad():
        table = cast(Any, other).transformer
        hidden = table.wte(ids) + table.wpe(torch.arange(len(record.ids)))
        hidden = blocks(other, hidden, 0, layer + 1)
        hidden = cast(Any, original).transformer.ln_f(blocks(original, hidden, layer + 1, 3))
        log_p = cast(Any, original).lm_head(hidden)[0].log_softmax(-1)
    places = range(record.n_prompt, len(record.ids))
    return -float(torch.stack([log_p[t - 1, record.ids[t]] for t in places]).mean())


def test_the_rest_of_the_original_runs_on_the_others_states() -> None:
    original, other = double("gpt2"), causal_lm("gpt2", seed=1, dtype=F64, attn_implementation="eager")
    records = texts()
    with left_as_found(original, other):
        found = patched_losses(original, records, capture(other, records, batch_tokens=30), batch_tokens=24)
    expected = [[by_hand(original, other, record, layer) for layer in range(3)] for record in records]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("arch", CAUSAL)
def test_a_models_own_states_change_nothing(arch: str) -> None:
    model, records = causal_lm(arch), texts(4)
    plain = losses(model, records)
    found = patched_losses(model, records, capture(model, records))
    np.testing.assert_array_equal(found, np.repeat(plain[:, None], found.shape[1], axis=1))
    table = score(model, records)
    own = [-table.log_prob[table.rows(i)].mean() for i in range(4)]
    np.testing.assert_allclose(plain, own, rtol=1e-5)


def test_an_unedited_model_is_intact_and_the_reference_is_erased() -> None:
    world, records = planted(), forget()[:8]
    for edited, expected in ((world.model, 0.0), (world.without, 1.0)):
        found = patching(world.model, edited, world.without, records)
        assert found.resolvable.all()
        assert (found.erased == expected).all()
        assert (found.by_layer == expected).all()


def test_an_edit_that_only_hides_leaves_the_layers_before_it_intact() -> None:
    """Its output is far below the reference's; one layer's excess must not stand for another that is intact."""
    world = planted()
    found = patching(world.model, hiding(), world.without, forget())
    assert found.lost[:, -1].mean() > 1.5 * found.effect[:, -1].mean()
    assert found.by_layer.tolist() == [0.0, 1.0]
    assert 0.3 < found.erased.mean() < 0.7


def test_another_model_that_never_saw_the_records_counts_as_erased() -> None:
    world = planted()
    assert patching(world.model, never_held(), world.without, forget()).erased.mean() > 0.95


def test_never_seen_records_have_nothing_to_erase() -> None:
    world = planted()
    seen, never = (patching(world.model, hiding(), world.without, r) for r in (forget(), world.controls[:24]))
    assert seen.effect.mean() > 1.5
    assert abs(never.effect.mean()) < 0.3
    assert seen.resolvable.all()
    assert not never.resolvable.all()


def test_the_score_is_the_average_by_effect() -> None:
    records = texts(4)
    plain = np.array([1.0, 1.0, 1.0, 1.0])
    reference = np.array([[1.0, 3.0, 2.0], [1.02, 1.04, 0.5], [2.0, 2.0, 2.0], [1.0, 1.0, 2.0]])
    edited = np.array([[5.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.5, 9.0, 1.5], [1.0, 1.0, 1.25]])
    found = depth(records, [0, 4, 8], plain, edited, reference)
    # record 0: nothing at layer 0, half of 2, all of 1; record 1: below the minimum; record 2: 0, 1 and 0.5 of 1 each
    assert found.erased[[0, 2, 3]] == pytest.approx([(0.5 * 2 + 1) / 3, 0.5, 0.25])
    assert found.resolvable.tolist() == [True, False, True, True]
    assert found.by_layer == pytest.approx([0.0, (0.5 * 2 + 1) / 3, (1 + 0.5 + 0.25) / 3])
    nothing = depth(records, [0], plain, edited[:, :1], np.zeros((4, 1)))
    assert np.isnan(nothing.erased).all()
    assert np.isnan(nothing.by_layer).all()
    assert depth(records, [0, 4, 8], plain, edited, reference, minimum=0.01).resolvable.all()


def test_models_and_records_that_do_not_fit_are_refused() -> None:
    model, records = causal_lm("llama"), texts(3)
    wide = capture(causal_lm("llama", hidden_size=48), records, layers=[0])
    with pytest.raises(UsageError, match="one architecture"):
        patched_losses(model, records, wide)
    with pytest.raises(UsageError, match="same records"):
        patched_losses(model, records[:2], capture(model, records))
    with pytest.raises(UsageError, match="expected layers"):
        patched_losses(causal_lm("qwen2"), records, capture(model, records))
    with left_as_found(model), pytest.raises(UsageError, match="one architecture"):
        patched_losses(model, records, wide)
