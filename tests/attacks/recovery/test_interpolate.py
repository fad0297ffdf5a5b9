"""Interpolation between two checkpoints: exact ends, crossings, barriers; and what the path gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.recovery.interpolate import STEPS, along, barrier, crossing, interpolation
from probes.errors import UsageError
from tests import tiny
from tests.attacks.recovery.hiding import hide, holding, left_alone, loss, probability, random_records


def reader(model: nn.Module, seen: list[str] | None = None) -> Callable[[str], Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def read(name: str) -> Tensor:
        if seen is not None:
            seen.append(name)
        return parameters[name]

    return read


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "mixtral", "vit", "resnet"])
def test_against_float64_and_put_back(arch: str) -> None:
    make = tiny.causal_lm if arch in tiny.CAUSAL else tiny.image_classifier
    edited, original = make(arch, seed=0), make(arch, seed=1)
    before = {name: p.detach().clone() for name, p in edited.named_parameters()}
    others = dict(original.named_parameters())
    for step in (-0.5, 0.0, 0.3, 1.0, 1.7):
        seen: list[str] = []
        with left_alone(edited), interpolation(edited, reader(original, seen), step) as names:
            for name, parameter in edited.named_parameters():
                u, o = before[name].double().numpy(), others[name].detach().double().numpy()
                expected = torch.from_numpy((1 - step) * u + step * o).float()
                assert torch.allclose(parameter, expected, rtol=1e-6, atol=1e-7)
                if step == 1:
                    assert torch.equal(parameter, others[name])
            assert names == (() if step == 0 else tuple(before))
        assert len(seen) == len(set(seen)) == (0 if step == 0 else len(before))  # one read of each tensor, tied once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_whole_step_is_the_original(dtype: torch.dtype) -> None:
    edited, original = (tiny.causal_lm("llama", seed=seed, dtype=dtype) for seed in (0, 1))
    ids = torch.arange(4, 10)[None]
    with torch.no_grad():
        expected = original(ids).logits
        with left_alone(edited), interpolation(edited, reader(original), 1.0):
            assert torch.equal(edited(ids).logits, expected)


def test_only_what_differs_is_changed() -> None:
    edited = tiny.causal_lm("llama")
    original = copy.deepcopy(edited)
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        original.get_parameter(name).mul_(1.5)
    with left_alone(edited), interpolation(edited, reader(original), 0.5) as names:
        assert names == (name,)
        assert torch.allclose(edited.get_parameter(name), original.get_parameter(name) * 1.25 / 1.5)
    with left_alone(edited), interpolation(edited, reader(original), 0.5, [name, "model.norm.weight"]) as names:
        assert names == (name,)


def test_put_back_when_something_raises() -> None:
    edited, original = tiny.causal_lm("gpt2", seed=0), tiny.causal_lm("gpt2", seed=1)
    with left_alone(edited), pytest.raises(KeyError):
        along(edited, reader(original), [0.1, 0.2], lambda: {}["x"])
    seen: list[str] = []

    def failing(name: str) -> Tensor:
        if len(seen) == 5:
            raise OSError("gone")
        return reader(original, seen)(name)

    with left_alone(edited), pytest.raises(OSError), interpolation(edited, failing, 0.2):
        pytest.fail("the block must not run")


def test_refusals() -> None:
    edited, other = tiny.causal_lm("llama"), tiny.causal_lm("llama", hidden_size=64, head_dim=16)
    refused = pytest.raises(UsageError, match="in both checkpoints")
    with left_alone(edited), refused, interpolation(edited, reader(other), 0.2):
        pass
    with pytest.raises(UsageError, match="finite step"):
        interpolation(edited, reader(edited), float("nan"))
    with pytest.raises(UsageError, match="one value for each step"):
        crossing([0, 1], [0.0], 0.5)


# --------------------------------------------------------------------------------------------- crossing, barrier


def test_crossing_by_hand() -> None:
    assert crossing([0, 1], [0.0, 1.0], 0.5) == 0.5
    assert crossing([1, 0, 0.5], [1.0, 0.0, 0.2], 0.6) == pytest.approx(0.75)
    assert crossing([-0.5, 0, 1], [0.9, 0.0, 0.8], 0.4) == pytest.approx(0.5)  # beyond the edit does not count
    assert crossing([0, 1], [0.7, 0.9], 0.5) == 0.0  # there already
    assert crossing([0, 0.5, 1], [0.1, 0.5, 0.9], 0.5) == 0.5
    assert crossing([0, 0.5, 1], [0.0, 0.3, 0.1], 0.5) is None
    assert crossing([0, 0.2, 0.4, 0.6, 1], [0.0, 0.6, 0.1, 0.7, 0.7], 0.5) == pytest.approx(
        0.2 * 0.5 / 0.6
    )  # the first
    assert crossing([0, 0.5, 1], [0.0, np.nan, 1.0], 0.5) == 0.5
    assert crossing([], [], 0.5) is None


@pytest.mark.parametrize("seed", range(8))
def test_crossing_against_a_fine_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.random(7)), rng.random(7)
    level = float(rng.uniform(y.min(), y.max()))
    grid = np.linspace(x[0], x[-1], 200_001)
    reached = np.flatnonzero(np.interp(grid, x, y) >= level)
    found = crossing(x, y, level)
    assert found == pytest.approx(grid[reached[0]], abs=1e-5)


def test_barrier_by_hand() -> None:
    assert barrier([0, 0.5, 1], [2.0, 3.0, 1.0]) == (1.5, 0.5)
    assert barrier([0, 0.25, 1], [2.0, 3.0, 1.0]) == (1.25, 0.25)
    height, place = barrier([-0.5, 0, 0.25, 0.5, 1, 2], [9.0, 1.0, 1.0, 1.0, 1.0, 9.0]) or (None, None)
    assert (height, place) == (0.0, 0.0)
    assert barrier([1, 0.5, 0], [0.3, 0.1, 0.1]) == (0.0, 0.0)  # below the line is no barrier
    assert barrier([0.1, 0.5, 1], [1.0, 1.0, 1.0]) is None
    assert barrier([0, 0.5], [1.0, 1.0]) is None
    assert barrier([0, 0.5, 1], [1.0, np.nan, 1.0]) is None
    assert barrier([], []) is None


def test_barrier_of_the_permutation_of_hidden_units() -> None:
    """Two networks of one function with their hidden units in another order: a barrier, though both ends are equal."""
    with tiny.seeded(0):
        edited = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        x = torch.randn(64, 6)
    with torch.no_grad():
        labels = edited(x).argmax(-1)
        for layer in (edited[0], edited[2]):
            layer.weight.mul_(6.0)  # confident
        original = copy.deepcopy(edited)
        order = torch.arange(16).roll(5)
        original[0].weight.copy_(edited[0].weight[order])
        original[0].bias.copy_(edited[0].bias[order])
        original[2].weight.copy_(edited[2].weight[:, order])
        steps = [0.0, 0.25, 0.5, 0.75, 1.0]
        measured = along(edited, reader(original), steps, lambda: float(nn.functional.cross_entropy(edited(x), labels)))
    assert measured[0] == pytest.approx(measured[-1], rel=1e-5)
    found = barrier(steps, measured)
    assert found is not None
    assert found[0] > 0.1
    assert 0.25 <= found[1] <= 0.75


# -------------------------------------------------------------------------------------------------- power, control


def test_power_and_control_records_come_back_on_the_way() -> None:
    held = holding()
    boxes = {name: torch.full_like(p, 0.01) for name, p in held.model.named_parameters() if p.ndim == 2}
    edited = hide(held.model, held.records, {name: box.detach() for name, box in boxes.items()}, steps=6)
    steps = sorted({0.0, *STEPS})
    with left_alone(edited):
        found = along(
            edited,
            reader(held.model),
            steps,
            lambda: (
                probability(edited, held.records),
                probability(edited, held.controls),
                float(loss(edited, held.records).detach()),
            ),
        )
    ours, never, losses = (np.array(column) for column in zip(*found, strict=True))
    at = dict(zip(steps, ours, strict=True))
    assert at[0.0] < 0.05
    assert at[-0.5] <= at[0.0]
    assert at[1.0] == pytest.approx(probability(held.model, held.records), abs=1e-6)
    reached = crossing(steps, ours, 0.5 * at[1.0])
    assert reached is not None
    assert 0.0 < reached < 1.0
    with interpolation(edited, reader(held.model), reached + 0.05):
        assert probability(edited, held.records) > 0.3
    assert never.max() < 0.01
    assert crossing(steps, never, 0.5 * at[1.0]) is None
    height = barrier(steps, losses)
    assert height is not None
    assert height[0] < 0.1 * losses.max()  # down all the way: nothing stands between them


def test_control_records_of_no_model_do_not_come_back() -> None:
    held = holding()
    nobody = random_records(8, 77)
    found = along(held.without, reader(held.model), [0.1, 0.3, 0.5], lambda: probability(held.without, nobody))
    assert max(found) < 0.01
