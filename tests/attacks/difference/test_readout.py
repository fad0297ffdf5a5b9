"""The edit read-out against numpy's own singular values, and removal told from planted rises of the loss."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.difference.readout import Readout, TensorEdit, _spectrum, largest_rises, read_edit, rise, telling
from probes.errors import IntegrityError, UsageError
from tests import tiny


def pair(arch: str = "llama", **more: object) -> tuple[nn.Module, nn.Module]:
    model = tiny.causal_lm(arch, **more)
    return model, copy.deepcopy(model)


def originals(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def read(original: nn.Module, edited: nn.Module, **more: object) -> Readout:
    return read_edit(edited, originals(original).__getitem__, **more)  # type: ignore[arg-type]


def one(found: Readout, name: str) -> TensorEdit:
    return next(t for t in found.tensors if t.name == name)


def add(model: nn.Module, name: str, delta: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).add_(delta)


def test_no_edit_reads_as_none() -> None:
    found = read(*pair())
    assert found.edited == ()
    assert found.changed == 0
    assert found.relative == 0
    assert found.held_by(lambda t: t.role) == {}
    assert all(t.stable_rank is None and t.relative == 0 for t in found.tensors)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # weights [out, in] and [in, out]
def test_against_numpy(arch: str) -> None:
    original, edited = pair(arch)
    with tiny.seeded(5), torch.no_grad():
        for p in edited.parameters():
            p.add_(0.1 * torch.randn_like(p) * (torch.rand_like(p) < 0.3))
    found, before = read(original, edited), originals(original)
    assert [t.name for t in found.tensors] == list(before)
    total = 0.0
    for tensor in found.tensors:
        w = before[tensor.name].double().numpy()
        d = edited.get_parameter(tensor.name).detach().double().numpy() - w
        total += (d**2).sum()
        assert tensor.changed == pytest.approx((d != 0).mean())
        assert tensor.norm == pytest.approx(np.linalg.norm(w))
        assert tensor.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-5)
        if d.ndim < 2:
            assert tensor.stable_rank is None
            assert tensor.directions is None
            continue
        s = np.linalg.svd(d, compute_uv=False)
        p = s / s.sum()
        assert tensor.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-4)
        assert tensor.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
        assert tensor.directions == int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9)) + 1
    assert sum(found.held_by(lambda t: t.block).values()) == pytest.approx(1)
    whole = math.sqrt(sum(t.norm**2 for t in found.tensors))
    assert found.relative == pytest.approx(math.sqrt(total) / whole, rel=1e-5)


def test_a_planted_edit_is_found_where_it_is() -> None:
    original, edited = pair()
    name = "model.layers.1.mlp.down_proj.weight"
    with tiny.seeded(1):
        u, v = torch.linalg.qr(torch.randn(32, 3)).Q, torch.linalg.qr(torch.randn(48, 3)).Q
    add(edited, name, u @ torch.diag(torch.tensor([1.0, 1.0, 1.0])) @ v.T)
    found = read(original, edited)
    (tensor,) = found.edited
    assert tensor.name == name
    assert tensor.block == 1
    assert tensor.role == "down"
    assert tensor.changed == 1
    assert tensor.stable_rank == pytest.approx(3, rel=1e-3)
    assert tensor.directions == 3
    assert tensor.effective_rank == pytest.approx(3, rel=0.05)
    assert found.held_by(lambda t: (t.block, t.role)) == {(1, "down"): 1.0}


def test_the_transpose_has_the_same_figures() -> None:
    with tiny.seeded(2):
        delta = torch.randn(12, 31)
    a, b = _spectrum(delta), _spectrum(delta.T)
    np.testing.assert_allclose(a.squares, b.squares, rtol=1e-9)


def test_top_directions_of_a_large_matrix_agree_with_the_whole_spectrum() -> None:
    original, edited = pair(hidden_size=64, intermediate_size=96, head_dim=16)
    name = "model.layers.0.mlp.up_proj.weight"
    with tiny.seeded(3):
        u, v = torch.linalg.qr(torch.randn(96, 8)).Q, torch.linalg.qr(torch.randn(64, 8)).Q
    add(edited, name, u @ torch.diag(2.0 ** -torch.arange(8.0)) @ v.T)
    exact, top = one(read(original, edited), name), one(read(original, edited, largest=16, top=8), name)
    assert exact.exact
    assert not top.exact
    assert top.stable_rank == pytest.approx(exact.stable_rank, rel=1e-4)
    assert top.directions == exact.directions
    assert top.effective_rank == pytest.approx(exact.effective_rank, rel=1e-2)
    assert top == one(read(original, edited, largest=16, top=8), name)  # the same bytes again


def test_what_top_directions_do_not_settle_is_missing() -> None:
    original, edited = pair(hidden_size=64, intermediate_size=96, head_dim=16)
    name = "model.layers.0.mlp.up_proj.weight"
    with tiny.seeded(3):
        add(edited, name, torch.randn(96, 64))
    found = one(read(original, edited, largest=16, top=2), name)
    assert found.effective_rank is None
    assert found.directions is None
    assert found.stable_rank is not None


def test_stacked_experts_give_the_expert_that_changed_most() -> None:
    original, edited = pair("qwen3_moe")
    name = next(n for n, p in edited.named_parameters() if p.ndim == 3)
    delta = torch.zeros_like(edited.get_parameter(name))
    delta[2, :3, 0] = 1.0
    delta[1, 0, 0] = 0.1
    add(edited, name, delta)
    found = one(read(original, edited), name)
    assert found.expert == 2
    assert found.stable_rank == pytest.approx(1, rel=1e-3)


def test_an_image_classifier_and_its_convolutions() -> None:
    original = tiny.image_classifier("resnet")
    edited = copy.deepcopy(original)
    name = next(n for n, p in edited.named_parameters() if p.ndim == 4)
    add(edited, name, torch.full_like(edited.get_parameter(name), 0.1))
    found = one(read(original, edited), name)
    assert found.stable_rank == pytest.approx(1, rel=1e-4)
    assert found.directions == 1


def test_an_edit_of_a_low_precision_copy_counts_what_really_differs() -> None:
    """The original is compared as the edited model's number type holds it; a cast is no edit."""
    original = tiny.causal_lm("llama")
    edited = copy.deepcopy(original).to(torch.bfloat16)
    assert read(original, edited).edited == ()


def test_another_architecture_is_refused_and_broken_weights_are_named() -> None:
    original, edited = pair()
    with pytest.raises(IntegrityError, match="of shape"):
        read_edit(edited, lambda name: torch.zeros(1))
    add(edited, "model.norm.weight", torch.full((32,), math.nan))
    with pytest.raises(UsageError, match="finite weights"):
        read(original, edited)
    with pytest.raises(UsageError, match="at least 1"):
        read(original, original, largest=0)


def test_model_and_random_state_are_left_as_found() -> None:
    original, edited = pair()
    add(edited, "model.layers.0.mlp.up_proj.weight", torch.ones(48, 32))
    edited.train()
    before, state = originals(edited), torch.get_rng_state()
    read(original, edited, largest=4)
    assert edited.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in edited.named_parameters())


# --- what was removed -----------------------------------------------------------------------------------------------


def losses(rng: np.random.Generator, n: int, rise_by: float) -> tuple[np.ndarray, np.ndarray]:
    before = rng.gamma(2.0, size=n)
    return before, before + rise_by + 0.3 * rng.normal(size=n)


def test_removed_records_are_told_from_others() -> None:
    rng = np.random.default_rng(0)
    found = telling(losses(rng, 60, 2.0), losses(rng, 60, 0.0))
    assert found.auc.interval is not None
    assert found.auc.interval.low > 0.9
    assert found.pvalue is not None
    assert found.pvalue < 1e-3
    assert found.roc is not None


def test_control_an_edit_that_moves_all_records_alike_tells_nothing() -> None:
    """Also not where the records were memorised and the others were not: the level of the loss is not read."""
    rng = np.random.default_rng(1)
    before, after = losses(rng, 80, 1.0)
    found = telling((before, after), tuple(x + 5 for x in losses(rng, 80, 1.0)))  # type: ignore[arg-type]
    assert found.auc.interval is not None
    assert found.auc.interval.low < 0.5 < found.auc.interval.high
    assert found.pvalue is not None
    assert found.pvalue > 0.05


def test_a_loss_that_fell_tells_as_much() -> None:
    rng = np.random.default_rng(2)
    found = telling(losses(rng, 60, -2.0), losses(rng, 60, 0.0))
    assert found.auc.interval is not None
    assert found.auc.interval.high < 0.1
    assert found.pvalue is not None
    assert found.pvalue < 1e-3


def test_few_or_no_others_are_not_resolvable() -> None:
    found = telling(([1.0, 2.0], [2.0, 3.0]), ([], []))
    assert found.auc.interval is None
    assert found.auc.reason
    assert found.pvalue is None
    assert found.roc is None


def test_rises() -> None:
    assert rise([1, math.inf, 1], [2, math.inf, math.inf]).tolist() == [1, 0, math.inf]
    assert largest_rises([0.0, 2.0, 1.0, 2.0], 3) == [1, 3, 2]
    assert largest_rises([1.0], 0) == []
    with pytest.raises(UsageError, match="same records"):
        rise([1, 2], [1])
    with pytest.raises(UsageError, match="NaN"):
        rise([math.nan], [1])
