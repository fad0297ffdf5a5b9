"""The difference of two image classifiers."""

from __future__ import annotations

import copy

import pytest
import torch

from probes.modelmap import ModelMap
from tests import tiny
from tests.unlearn.uld_models import ALL, MILD, assert_close, config_of, difference, external, images, model_of, path_of
from unlearn.checkpoints.modeling_uld import (
    Rule,
    ULDConfig,
    ULDForImageClassification,
    _pairs,
    attach,
    combine,
    slice_blocks,
)


@pytest.mark.parametrize("arch", ["vit", "dinov2"])
@torch.no_grad()
def test_identities(arch: str) -> None:
    model, pixels = model_of(arch), images()
    before = model(pixels).logits
    assert_close(difference(model, Rule(0.0, 0.1, 0.1))(pixels).logits, before.log_softmax(-1))
    same = difference(model, ALL, first=0, last=3, size=0.0)
    assert_close(same(pixels).logits, (0.25 * before.log_softmax(-1)).log_softmax(-1))


@pytest.mark.parametrize("arch", ["vit", "dinov2"])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 3), (2, 3)])
@torch.no_grad()
def test_it_is_the_combination_of_two_models_run_apart(arch: str, first: int, last: int) -> None:
    model, pixels = model_of(arch), images()
    whole = difference(model, MILD, first, last, size=3.0)
    other = slice_blocks(model, path_of(model), 0, last)
    attach(other, path_of(model), 0, _pairs(whole.assistant), 0.5)
    want = combine(model(pixels).logits, other(pixels).logits, MILD)
    assert_close(whole(pixels).logits, want)
    assert (want - model(pixels).logits.log_softmax(-1)).abs().max() > 1e-3
    labels = torch.tensor([1, 3])
    assert_close(whole(pixels, labels=labels).loss, -want[[0, 1], labels].mean())
    states = whole.states_model()(pixel_values=pixels).last_hidden_state
    assert_close(whole.states_logits(states), want)


@torch.no_grad()
def test_copies_and_the_map() -> None:
    model, pixels = model_of("vit"), images()
    whole = difference(model)
    want = whole(pixels).logits
    assert torch.equal(copy.deepcopy(whole)(pixels).logits, want)
    found, inside = ModelMap.of(whole), ModelMap.of(model)
    assert (found.task, found.composite, found.vocab_size) == ("image_classification", True, 4)
    assert [block.name for block in found.blocks] == [f"target.{block.name}" for block in inside.blocks]
    assert whole.config.id2label == model.config.id2label
    assert (whole.config.num_channels, whole.config.image_size) == (3, tiny.IMAGE)


@torch.no_grad()
def test_an_external_assistant() -> None:
    target = model_of("vit")
    assistant = tiny.image_classifier("dinov2", seed=5, dtype=torch.float64, num_hidden_layers=2)
    whole, pixels = external(target, assistant), images()
    want = combine(target(pixels).logits, copy.deepcopy(assistant)(pixels).logits, MILD)
    assert_close(whole(pixels).logits, want)
    with pytest.raises(ValueError, match="expected an assistant with the target's 4 outputs, found 7"):
        external(target, tiny.image_classifier("vit", classes=7))


@pytest.mark.parametrize("arch", ["swin", "resnet"])
def test_networks_in_stages_are_refused(arch: str) -> None:
    model = tiny.image_classifier(arch)
    found = ModelMap.of(model)
    part = {"kind": "blocks", "path": path_of(model), "first": 0, "last": 1, "scale": 1.0}
    config = ULDConfig.beside(model, MILD, assistant=part, head=found.head)
    with pytest.raises(NotImplementedError, match=r"expected a model whose blocks are one list .*; use a decoder"):
        ULDForImageClassification.over(model, config, {})


def test_a_head_that_is_not_there() -> None:
    model = model_of("vit")
    config = config_of(model)
    config.head = "no_such"
    with pytest.raises(ValueError, match="expected a linear output layer at no_such, found none"):
        ULDForImageClassification.over(model, config, {})
