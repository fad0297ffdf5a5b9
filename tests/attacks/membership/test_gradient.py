"""The gradient norm against automatic differentiation, one record at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attacks.membership.gradient import gradient_norm
from probes.errors import UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import ImageRecord, TokenRecord
from tests import tiny
from tests.attacks.membership.tables import records


def block_weights(model: nn.Module, layers: list[int] | None = None) -> set[str]:
    model_map = ModelMap.of(model)
    found = {p.parameter: model_map.block_of(p.parameter) for p in model_map.projections()}
    return {name for name, block in found.items() if block is not None and (layers is None or block in layers)}


def by_autograd(model: nn.Module, record: TokenRecord, names: set[str]) -> float:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=torch.tensor([record.ids])).logits[0, record.n_prompt - 1 : -1]
    nn.functional.cross_entropy(logits, torch.tensor(record.completion)).backward()
    total = sum(float(p.grad.square().sum()) for n, p in model.named_parameters() if n in names and p.grad is not None)
    model.zero_grad(set_to_none=True)
    return -(total**0.5)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_norms_are_those_of_autograd(arch: str, layers: list[int] | None) -> None:
    exact = arch != "mixtral"  # grouped experts have no double precision
    model = tiny.causal_lm(arch, dtype=torch.float64 if exact else torch.float32)
    found = records(8)  # the first has a completion of one token
    expected = [by_autograd(model, record, block_weights(model, layers)) for record in found]
    tolerance = 1e-6 if exact else 1e-3  # rotary angles are float32 in any model
    np.testing.assert_allclose(gradient_norm(model, found, layers=layers), expected, rtol=tolerance)
    np.testing.assert_allclose(gradient_norm(model, found, layers=layers, batch_tokens=20), expected, rtol=tolerance)


def test_defect_10_dropout_is_off_and_the_model_is_left_as_it_was() -> None:
    model = tiny.causal_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    found = records(4)
    expected = gradient_norm(model, found)
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = next(model.parameters())
    first.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = torch.get_rng_state()
    np.testing.assert_array_equal(gradient_norm(model, found), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not first.requires_grad
    assert (model.lm_head.weight.grad == 1).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_record_learned_by_heart_has_the_highest_score() -> None:
    model = tiny.causal_lm("llama")
    found = [
        TokenRecord(f"r{i}", tuple(int(t) for t in row), 1, 5) for i, row in enumerate(torch.randint(4, 96, (6, 12)))
    ]
    tiny.train(model, [found[2].ids], steps=150)
    values = gradient_norm(model, found)
    assert np.argmax(values) == 2
    assert values[2] > 0.1 * np.delete(values, 2).max()
    assert (values <= 0).all()


def test_no_gradient_is_zero_and_not_nan() -> None:
    model = tiny.causal_lm("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    values = gradient_norm(model, records(3))
    np.testing.assert_array_equal(values, [0.0] * 3)
    assert not np.signbit(values).any()


def test_images_have_a_norm_too() -> None:
    model = tiny.image_classifier("vit", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = [ImageRecord(f"i{i}", torch.randn(3, 32, 32, generator=generator).double(), i % 4) for i in range(3)]
    names = block_weights(model)
    for image, value in zip(images, gradient_norm(model, images), strict=True):
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(image.pixels[None]).logits, torch.tensor([image.label])).backward()
        total = sum(float(p.grad.square().sum()) for n, p in model.named_parameters() if n in names)
        np.testing.assert_allclose(value, -(total**0.5), rtol=1e-8)


def test_progress_and_edges() -> None:
    model = tiny.causal_lm("llama")
    seen: list[tuple[int, int]] = []
    assert gradient_norm(model, []).shape == (0,)
    gradient_norm(model, records(5), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert all(0 <= done <= total == 5 for done, total in seen)
    with pytest.raises(UsageError, match="blocks"):
        gradient_norm(model, records(2), layers=[7])
    with pytest.raises(UnsupportedError, match="vocabulary"):
        gradient_norm(model, [TokenRecord("a", (5, 9999), 1, 1)])
