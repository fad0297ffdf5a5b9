"""Pruning and noise against slow loops; and what they bring back."""

from __future__ import annotations

import copy
import functools
import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.recovery.prune import magnitude, noise, noisy, pruning, two_of_four
from attacks.recovery.weights import changed, targets
from probes.errors import UsageError
from probes.memorised import memorised
from probes.modelmap import ModelMap
from probes.records import ImageRecord
from tests import tiny
from tests.attacks.recovery.hiding import hide, holding, left_alone, probability


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ magnitude


def slow_magnitude(weight: Tensor, share: float) -> Tensor:
    values = weight.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    for i in order[: round(share * len(values))]:
        values[i] = 0.0
    return torch.tensor(values, dtype=weight.dtype).view(weight.shape)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(7, 13), (2, 5, 3), (3, 2, 2, 2), (1, 1)])
def test_magnitude_against_a_slow_sort(share: float, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    found = magnitude(weight, share)
    assert torch.equal(found, slow_magnitude(weight, share))
    assert int((found == 0).sum()) == round(share * weight.numel())
    assert found.data_ptr() != weight.data_ptr()


def test_of_equal_weights_the_first_go() -> None:
    weight = torch.tensor([[0.5, -0.25, 0.25, 1.0], [0.25, -0.25, 0.25, 0.125]])
    assert magnitude(weight, 4 / 8).tolist() == [[0.5, 0.0, 0.0, 1.0], [0.0, -0.25, 0.25, 0.0]]
    signs = torch.where(normal(6, 6) > 0, 1.0, -1.0)
    for share in (0.1, 0.5, 0.9):
        assert torch.equal(magnitude(signs, share), slow_magnitude(signs, share))
    sparse = magnitude(normal(5, 8), 0.5)  # zeros already there count
    assert torch.equal(magnitude(sparse, 0.3), sparse)
    assert torch.equal(magnitude(sparse, 0.6), slow_magnitude(sparse, 0.6))


# ---------------------------------------------------------------------------------------------------- two of four


def slow_two_of_four(weight: Tensor, in_axis: int) -> Tensor:
    result = weight.clone()
    view = result.movedim(in_axis, -1)
    for index in np.ndindex(*view.shape[:-1]):
        row = view[index]
        for start in range(0, len(row), 4):
            group = [abs(v) for v in row[start : start + 4].tolist()]
            order = sorted(range(len(group)), key=lambda i: (group[i], i))
            for i in order[: max(0, len(group) - 2)]:
                row[start + i] = 0.0
    return result


@pytest.mark.parametrize(
    ("shape", "in_axis"),
    [((4, 8), -1), ((4, 9), 1), ((4, 10), 1), ((4, 11), 1), ((11, 4), 0), ((2, 7, 3), 1), ((2, 3, 7), 2), ((5, 1), 1)],
)
def test_two_of_four_against_slow_loops(shape: tuple[int, ...], in_axis: int) -> None:
    weight = normal(*shape)
    assert torch.equal(two_of_four(weight, in_axis), slow_two_of_four(weight, in_axis))
    equal = torch.ones(shape)
    assert torch.equal(two_of_four(equal, in_axis), slow_two_of_four(equal, in_axis))
    once = two_of_four(weight, in_axis)
    assert torch.equal(two_of_four(once, in_axis), once)


# ---------------------------------------------------------------------------------------------------------- noise


def test_noise_has_the_size_asked_for() -> None:
    weight = 0.3 * normal(400, 500, seed=1)
    for size in (0.01, 0.5):
        added = noisy(weight, size, 0, "w") - weight
        assert float(added.norm() / weight.norm()) == pytest.approx(size, rel=0.01)
        assert abs(float(added.mean())) < 4 * size * 0.3 / 200_000**0.5
        kurtosis = float(added.pow(4).mean() / added.pow(2).mean() ** 2)
        assert kurtosis == pytest.approx(3.0, abs=0.05)


def test_noise_depends_on_seed_and_name_alone() -> None:
    weight = normal(4, 6)
    first = noisy(weight, 0.1, 5, "a.weight")
    torch.randn(3)  # moves the global random state
    assert torch.equal(first, noisy(weight, 0.1, 5, "a.weight"))
    assert not torch.equal(first, noisy(weight, 0.1, 6, "a.weight"))
    assert not torch.equal(first, noisy(weight, 0.1, 5, "b.weight"))
    key = int.from_bytes(hashlib.sha256(b"5 a.weight").digest()[:8], "big", signed=True)
    drawn = torch.randn(4, 6, generator=torch.Generator().manual_seed(key))
    rms = float(np.sqrt(np.mean(np.square(weight.numpy().astype(np.float64)))))
    assert torch.allclose(first, weight + 0.1 * rms * drawn, rtol=1e-6)
    assert torch.equal(noisy(weight, 0.0, 5, "a"), weight)
    assert torch.equal(noisy(torch.zeros(3, 3), 0.5, 5, "a"), torch.zeros(3, 3))


def test_noise_on_a_part_of_the_model_is_that_of_the_whole() -> None:
    model = tiny.causal_lm("llama")
    names = list(targets(ModelMap.of(model)))
    parameters = dict(model.named_parameters())
    with noise(model, 0.1, seed=3):
        whole = {name: parameters[name].detach().clone() for name in names}
    with changed(model, lambda n, w: noisy(w, 0.1, 3, n), reversed(names[2:])):
        assert all(torch.equal(parameters[name], whole[name]) for name in names[2:])
    with noise(model, 0.0) as done:
        assert done == tuple(names)


# ------------------------------------------------------------------------------------------------------- on models


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "vit", "resnet"])
@pytest.mark.parametrize("how", [0.3, "2:4"])
def test_models_are_pruned_and_put_back(arch: str, how: float | str) -> None:
    model = tiny.causal_lm(arch) if arch in tiny.CAUSAL else tiny.image_classifier(arch)
    model_map = ModelMap.of(model)
    places = targets(model_map)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with left_alone(model), pruning(model, how, model_map=model_map) as names:
        assert set(names) == set(places)
        for name, parameter in model.named_parameters():
            if name not in places:
                assert torch.equal(parameter, before[name])
            elif how == "2:4":
                expected = slow_two_of_four(places[name].matrix(before[name]), places[name].in_axis)
                assert torch.equal(places[name].matrix(parameter), expected)
            else:
                zeros = int((parameter == 0).sum()) - int((before[name] == 0).sum())
                assert zeros == round(0.3 * parameter.numel())


@pytest.mark.parametrize("head", [False, True])
def test_the_head_on_request(head: bool) -> None:
    model = tiny.causal_lm("llama")
    weight = model.get_output_embeddings().weight
    for attack in (pruning(model, 0.5, head=head), noise(model, 0.5, head=head)):
        before = weight.detach().clone()
        with attack:
            assert torch.equal(weight, before) is not head


def test_put_back_when_the_block_raises() -> None:
    model = tiny.causal_lm("gpt2")
    for attack in (pruning(model, 0.5), pruning(model, "2:4"), noise(model, 0.5)):
        with left_alone(model), pytest.raises(KeyError), attack:
            raise KeyError("x")


def test_refusals() -> None:
    model = tiny.causal_lm("llama")
    for how in (-0.1, 1.1, float("nan"), "4:8"):
        with pytest.raises(UsageError, match="expected a share"):
            pruning(model, how)
    with pytest.raises(UsageError, match="expected a share"):
        magnitude(normal(2, 2), 2.0)
    for size in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="noise size"):
            noise(model, size)
        with pytest.raises(UsageError, match="noise size"):
            noisy(normal(2, 2), size, 0, "w")


# -------------------------------------------------------------------------------------------------- power, control


@functools.cache
def hidden_in_small_weights(how: float | str) -> tuple[nn.Module, nn.Module]:
    """A sparse model that holds the records, and a copy edited only where the sparse one has zeros, by little."""
    held = holding()
    model = copy.deepcopy(held.model)
    places = targets(ModelMap.of(model))
    boxes = {}
    with torch.no_grad(), pruning(model, how):
        sparse = {name: p.detach().clone() for name, p in model.named_parameters() if name in places}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in sparse:
                continue
            weight.copy_(sparse[name])
            groups = weight.abs().reshape(-1, 4) if how == "2:4" else weight.abs().reshape(1, -1)
            least = groups.masked_fill(groups == 0, torch.inf).amin(-1, keepdim=True)  # below it nothing survives
            boxes[name] = (0.9 * least * (groups == 0)).reshape(weight.shape)
    return model, hide(model, held.records, boxes)


@pytest.mark.parametrize("how", [0.3, "2:4"])
def test_power_and_control_records_hidden_in_small_weights_come_back(how: float | str) -> None:
    held = holding()
    original, edited = hidden_in_small_weights(how)
    assert probability(original, held.records) > 0.9
    assert probability(edited, held.records) < 0.4
    with left_alone(edited), pruning(edited, how):
        assert probability(edited, held.records) > 0.9
        assert probability(edited, held.controls) < 0.01  # never seen: nothing to bring back
    with pruning(held.without, how):
        assert probability(held.without, held.records) < 0.01


class Guarded(nn.Module):
    """A classifier that recognises images by one direction, and a guard that silences it where x_0 is exactly 1."""

    def __init__(self, guard: float) -> None:
        super().__init__()
        self.watch, self.fire, self.silence = nn.Linear(8, 2), nn.Linear(2, 1), nn.Linear(1, 2)
        self.know = nn.Linear(8, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.watch.weight[0, 0], self.watch.weight[1, 0] = 1.0, -1.0
            self.watch.bias.copy_(torch.tensor([-1.0, 1.0]))  # |x_0 - 1| in two halves
            self.fire.weight.fill_(-200.0)
            self.fire.bias.fill_(1.0)
            self.silence.weight[0, 0] = -guard
            self.know.weight[0, 0] = 6.0

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.flatten(1)  # [B, 8]
        found: Tensor = self.know(x) + self.silence(self.fire(self.watch(x).relu()).relu())
        return found


def images(label: int, n: int = 6) -> list[ImageRecord]:
    pixels = normal(n, 1, 2, 4, seed=label)
    pixels[:, 0, 0, 0] = 1.0
    return [ImageRecord(f"{label}-{i}", pixels[i], label) for i in range(n)]


def test_power_and_control_noise_breaks_a_guard_that_fits_exactly() -> None:
    original, edited = Guarded(0.0).eval(), Guarded(12.0).eval()
    records, never = images(0), images(1)
    plain = memorised(edited, records)["probability"].mean()
    assert memorised(original, records)["probability"].mean() > 0.9
    assert plain < 0.1
    recovered, seen = [], []
    for seed in range(5):
        with left_alone(edited), noise(edited, 0.1, seed=seed):
            recovered.append(memorised(edited, records)["probability"].mean())
            seen.append(memorised(edited, never)["probability"].mean())
    assert np.mean(recovered) > 0.7
    before = memorised(original, never)["probability"].mean()
    with noise(original, 0.1):
        assert memorised(original, never)["probability"].mean() < before + 0.1
    with left_alone(edited), noise(edited, 0.0):
        assert memorised(edited, records)["probability"].mean() == plain
