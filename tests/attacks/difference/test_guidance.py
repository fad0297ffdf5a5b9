"""Reversed guidance against a loop over full softmaxes in double precision, its identities, power and control."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from attacks.difference import guidance
from attacks.difference.guidance import guided
from probes.errors import UnsupportedError, UsageError
from probes.figures import record_figures
from probes.likelihood import score
from probes.records import TokenRecord
from tests import tiny


def records(n: int = 6, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    rng = np.random.default_rng(seed)
    return [
        TokenRecord(f"r{i}", tuple(rng.integers(4, vocab, 8 + i % 3).tolist()), 3 + i % 2, 10, None) for i in range(n)
    ]


def slow(
    edited: nn.Module, original: nn.Module, record: TokenRecord, weight: float, keep: float
) -> tuple[float, list[bool]]:
    """Mean log-probability and argmax matches of a record, a token at a time in double precision."""
    ids = torch.tensor([record.ids])
    with torch.no_grad():
        u, o = (m.double()(input_ids=ids).logits[0].softmax(-1) for m in (edited, original))
    total, matches = 0.0, []
    for t in range(record.n_prompt, len(record.ids)):
        pu, po = u[t - 1].numpy(), o[t - 1].numpy()
        scores = {
            v: math.log(pu[v]) + weight * (math.log(po[v]) - math.log(pu[v]))
            for v in range(len(po))
            if po[v] >= keep * po.max()
        }
        norm = math.log(sum(math.exp(s) for s in scores.values()))
        token = record.ids[t]
        total += scores[token] - norm if token in scores else -math.inf
        matches.append(max(scores, key=scores.__getitem__) == token)
    return total / record.n_tokens, matches


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("keep", "few"), [(0.0, 16), (0.02, 0), (0.2, 1000), (0.5, 1)])
def test_against_a_slow_loop(arch: str, keep: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance, "FEW", few)  # 0: the kept tokens are gathered, 1000: they are not
    monkeypatch.setattr(guidance, "CHUNK_ELEMENTS", 96 * guidance.ALIVE * 3)  # several chunks a batch
    edited, original = tiny.causal_lm(arch, seed=0), tiny.causal_lm(arch, seed=1)
    rows = records()
    found = guided(edited, original, rows, weights=(0.5, 2.0), keep=keep, batch_tokens=24)
    doubles = copy.deepcopy(edited), copy.deepcopy(original)
    for weight, frame in found.items():
        for record, row in zip(rows, frame.itertuples(), strict=True):
            mean, matches = slow(*doubles, record, weight, keep)
            assert row.probability == pytest.approx(math.exp(mean), rel=2e-3, abs=1e-12)
            assert row.accuracy == pytest.approx(np.mean(matches))
            assert row.extracted == all(matches)
            assert row.record_id == record.record_id


def test_weight_zero_is_the_edited_and_weight_one_the_original_model() -> None:
    edited, original = tiny.causal_lm("llama", seed=0), tiny.causal_lm("llama", seed=1)
    rows = records()
    found = guided(edited, original, rows, weights=(0.0, 1.0), keep=0.0)
    for weight, model in ((0.0, edited), (1.0, original)):
        own = record_figures(score(model, rows))
        np.testing.assert_allclose(found[weight]["loss"], own["loss"], rtol=1e-5)
        np.testing.assert_array_equal(found[weight]["accuracy"], own["token_accuracy"])


def test_equal_models_are_not_moved_by_any_weight() -> None:
    model = tiny.causal_lm("llama")
    rows, other = records(), copy.deepcopy(model)
    found = guided(model, other, rows, weights=(-1.0, 0.0, 3.0), keep=0.0)
    np.testing.assert_allclose(found[-1.0]["loss"], found[0.0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[3.0]["loss"], found[0.0]["loss"], rtol=1e-5)


def test_only_the_likeliest_token_is_kept_at_one() -> None:
    edited, original = tiny.causal_lm("llama", seed=0), tiny.causal_lm("llama", seed=1)
    rows = records()
    found = guided(edited, original, rows, weights=(0.0,), keep=1.0)[0.0]
    own = record_figures(score(original, rows))
    np.testing.assert_array_equal(found["accuracy"], own["token_accuracy"])
    assert set(found["probability"]) <= {0.0, 1.0}
    assert np.isinf(found["loss"][found["probability"] == 0]).all()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module, list[TokenRecord], list[TokenRecord]]:
    """An original that knows ten records, and a copy in which a few steps of ascent suppress them."""
    rows, never = records(10, seed=3), records(10, seed=4)
    original = tiny.causal_lm("llama", initializer_range=0.05)
    tiny.train(original, [r.ids for r in rows], steps=120)
    edited = copy.deepcopy(original)
    optimiser = torch.optim.SGD(edited.parameters(), lr=0.5)
    for _ in range(300):
        table = record_figures(score(edited, rows))
        if table["token_accuracy"].mean() < 0.5:
            break
        optimiser.zero_grad(set_to_none=True)
        for r in rows:
            ids = torch.tensor([r.ids])
            logits = edited(input_ids=ids).logits[0, r.n_prompt - 1 : -1]
            (-nn.functional.cross_entropy(logits, ids[0, r.n_prompt :]) / len(rows)).backward()
        optimiser.step()
    edited.zero_grad(set_to_none=True)
    return edited, original, rows, never


def test_power_suppressed_records_come_back(
    trained: tuple[nn.Module, nn.Module, list[TokenRecord], list[TokenRecord]],
) -> None:
    edited, original, rows, _ = trained
    plain = record_figures(score(edited, rows))["token_accuracy"].mean()
    found = guided(edited, original, rows, weights=(1.5,))[1.5]
    alone = record_figures(score(original, rows))["token_accuracy"].mean()
    assert plain < 0.6
    assert found["accuracy"].mean() > 0.9
    assert alone > 0.9


def test_control_never_seen_records_stay_where_they_were(
    trained: tuple[nn.Module, nn.Module, list[TokenRecord], list[TokenRecord]],
) -> None:
    edited, original, _, never = trained
    found = guided(edited, original, never, weights=(1.5,))[1.5]
    assert found["accuracy"].mean() < 0.2
    assert not found["extracted"].any()


def test_what_is_refused() -> None:
    model = tiny.causal_lm("llama")
    for weights in ((), (1.0, 1.0), (math.nan,)):
        with pytest.raises(UsageError, match="weights"):
            guided(model, model, records(), weights=weights)
    with pytest.raises(UsageError, match="keep"):
        guided(model, model, records(), keep=1.5)
    with pytest.raises(UnsupportedError, match="vocabulary"):
        guided(model, tiny.causal_lm("llama", vocab=100), records())
    with pytest.raises(UnsupportedError, match="token ids"):
        guided(model, model, records(vocab=200))
    assert len(guided(model, model, [])[0.5]) == 0


def test_dropout_is_off_in_both_models() -> None:
    edited, original = (tiny.causal_lm("gpt2", seed=seed, attn_pdrop=0.5, resid_pdrop=0.5) for seed in (0, 1))
    still = guided(edited, original, records())[1.5]
    for model in (edited, original):
        model.train()
        assert guided(edited, original, records())[1.5].equals(still)
        model.eval()


def test_both_models_are_left_as_found_even_when_interrupted() -> None:
    edited, original = tiny.causal_lm("llama", seed=0), tiny.causal_lm("llama", seed=1)
    edited.train()
    kept = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (edited, original)]
    state = torch.get_rng_state()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    guided(edited, original, records())
    with pytest.raises(KeyboardInterrupt):
        guided(edited, original, records(), progress=stop)
    assert edited.training
    assert not original.training
    assert torch.equal(torch.get_rng_state(), state)
    for model, weights in zip((edited, original), kept, strict=True):
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name])
            assert p.grad is None
            assert p.requires_grad
        assert not any(m._forward_hooks for m in model.modules())


def test_memory_stays_below_one_batch_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a chunk of positions ever meets the head."""
    edited, original = tiny.causal_lm("llama", seed=0), tiny.causal_lm("llama", seed=1)
    sizes: list[int] = []
    plain = guidance._centred

    def watched(*args: object) -> torch.Tensor:
        out: torch.Tensor = plain(*args)  # type: ignore[arg-type]
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(guidance, "_centred", watched)
    monkeypatch.setattr(guidance, "CHUNK_ELEMENTS", 96 * guidance.ALIVE * 4)
    guided(edited, original, records(12))
    assert max(sizes) <= 96 * 4
    assert len(sizes) > 10
