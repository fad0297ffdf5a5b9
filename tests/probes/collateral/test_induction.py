"""Induction: a hand-wired induction head, a model without context, and transformers' own attention weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from probes.collateral import induction
from probes.collateral.induction import Repeated, copying, prefix_matching, repeated
from probes.errors import UnsupportedError, UsageError
from tests import tiny

WORDS, PLACES = 32, 32


def draw(**more: object) -> Repeated:
    return repeated(range(4, 96), **({"sequences": 6, "length": 12, "opening": (2,)} | more))  # type: ignore[arg-type]


def wired() -> nn.Module:
    """GPT-2 of two layers, one head each: layer 0 looks one token back, layer 1 at what followed the same token.

    The residual stream is [token one-hot | position one-hot | the token before]; the feed-forward layers give nothing.
    """
    width = 2 * WORDS + PLACES
    model = tiny.causal_lm("gpt2", vocab=WORDS, n_embd=width, n_layer=2, n_head=1, n_positions=PLACES)
    own, place, before = slice(0, WORDS), slice(WORDS, WORDS + PLACES), slice(WORDS + PLACES, width)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.ones_like(p) if "ln_" in name and name.endswith("weight") else torch.zeros_like(p))
        base = model.transformer
        base.wte.weight[:, own] = torch.eye(WORDS)
        base.wpe.weight[:, place] = torch.eye(PLACES)
        attention = [block.attn for block in base.h]
        q, k, v = (slice(i * width, (i + 1) * width) for i in range(3))
        reads = attention[0].c_attn.weight  # [in, out]
        reads[place, q.start : q.start + PLACES] = 3.0 * torch.eye(PLACES)
        reads[place, k.start : k.start + PLACES] = 3.0 * torch.eye(PLACES).roll(1, dims=1)
        reads[own, v.start : v.start + WORDS] = torch.eye(WORDS)
        attention[0].c_proj.weight[:WORDS, before] = torch.eye(WORDS)
        reads = attention[1].c_attn.weight
        reads[own, q.start : q.start + WORDS] = 3.0 * torch.eye(WORDS)
        reads[before, k.start : k.start + WORDS] = 3.0 * torch.eye(WORDS)
        reads[own, v.start : v.start + WORDS] = torch.eye(WORDS)
        attention[1].c_proj.weight[:WORDS, own] = 5.0 * torch.eye(WORDS)
    return model


def test_a_wired_induction_head_scores_one_and_copies() -> None:
    model = wired()
    drawn = repeated(range(WORDS), sequences=8, length=14)
    found = prefix_matching(model, drawn)
    frame = found.frame()
    assert frame["prefix_matching"][1] > 0.95
    assert frame["prefix_matching"][0] < 0.01
    best, score = found.strongest()
    assert (found.blocks[best], found.heads[best]) == (1, 0)
    assert score.value > 0.95
    assert copying(model, drawn).loss.mean() < -3


def test_copying_loss_of_a_wired_head_by_hand() -> None:
    model, drawn = wired(), repeated(range(WORDS), sequences=3, length=8)
    found = copying(model, drawn)
    for i, record in enumerate(drawn.records):
        ids = torch.tensor([record.ids])
        with torch.no_grad():
            log_p = model.double()(input_ids=ids).logits[0].log_softmax(-1)
        each = [-float(log_p[t - 1, record.ids[t]]) for t in range(1, 16)]  # token t, from the one before
        assert found.first[i] == pytest.approx(np.mean(each[:7]), rel=1e-4)
        assert found.second[i] == pytest.approx(np.mean(each[8:]), rel=1e-4, abs=1e-4)


def test_control_random_weights_look_everywhere_and_copy_nothing() -> None:
    model, drawn = tiny.causal_lm("llama", initializer_range=0.02), draw(sequences=24)
    found = prefix_matching(model, drawn)
    expected = np.mean([1 / (t + 1) for t in range(13, 25)])  # 1 / number of positions to look at
    assert len(found.blocks) == 12
    np.testing.assert_allclose(found.frame()["prefix_matching"], expected, rtol=0.2)
    assert abs(copying(model, drawn).loss.mean()) < 0.1


def test_control_a_model_without_context_has_equal_losses() -> None:
    model = tiny.causal_lm("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name:
                p.zero_()
    found = copying(model, draw())
    np.testing.assert_allclose(found.first, found.second, rtol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mixtral", "phi3", "olmo2"])
def test_against_the_weights_that_transformers_gives_out(arch: str) -> None:
    drawn = draw()
    model = tiny.causal_lm(arch)
    slow = tiny.causal_lm(arch, attn_implementation="eager")
    ids = torch.tensor([record.ids for record in drawn.records])
    with torch.no_grad():
        weights = slow(input_ids=ids, output_attentions=True).attentions
    found = prefix_matching(model, drawn, batch_tokens=60)  # several batches
    assert not found.skipped
    column = 0
    for block, layer in enumerate(weights):
        for head in range(layer.shape[1]):
            for s in range(len(ids)):
                each = [float(layer[s, head, 13 + i, 2 + i]) for i in range(12)]
                assert found.scores[s, column] == pytest.approx(np.mean(each), rel=1e-4, abs=1e-7)
            assert (found.blocks[column], found.heads[column]) == (block, head)
            column += 1
    assert column == found.scores.shape[1]


def test_layers_that_cannot_look_back_far_enough_have_no_score() -> None:
    """Gemma 2 alternates windows with full attention; the window here is shorter than one copy."""
    model = tiny.causal_lm("gemma2", sliding_window=8)
    found = prefix_matching(model, draw())
    assert found.skipped == {0: "does not look back far enough"}
    assert set(found.blocks) == {1}


def test_a_model_without_attention_weights_is_refused() -> None:
    model = tiny.causal_lm("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedError, match="attention weights"):
        prefix_matching(model, draw())


def test_draws_depend_on_the_seed_alone() -> None:
    first = draw()
    assert [r.ids for r in first.records] == [r.ids for r in draw().records]
    assert [r.ids for r in first.records] != [r.ids for r in draw(seed=1).records]
    for record in first.records:
        body = record.ids[1:]
        assert record.ids[0] == 2
        assert body[:12] == body[12:]
        assert len(set(body)) == 12
        assert min(body) >= 4


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="ordinary tokens"):
        repeated(range(5), length=6)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        draw(length=1)
    with pytest.raises(UsageError, match="at most 128"):
        copying(tiny.causal_lm("llama"), repeated(range(4, 96), length=70))
    with pytest.raises(UsageError, match="at most 128"):
        prefix_matching(tiny.causal_lm("gpt2"), repeated(range(4, 96), length=70))
    with pytest.raises(UsageError, match="4 sequences"):
        prefix_matching(tiny.causal_lm("llama"), draw(sequences=3)).strongest()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama")
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = model.config._attn_implementation
    assert kept == "sdpa"
    state = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(induction.ModelMap, "backbone", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prefix_matching(model, draw())
    else:
        copying(model, draw())
        prefix_matching(model, draw())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.config._attn_implementation == kept for m in model.modules() if hasattr(m, "config"))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())


def test_no_score_is_nan() -> None:
    found = prefix_matching(tiny.causal_lm("qwen3"), draw())
    assert not math.isnan(float(found.scores.sum()))
