"""Nearby images: steps one image at a time, radius and range, and what comes back within the calibrated budget."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from attacks.elicitation import images
from attacks.elicitation.budget import calibrate
from probes.errors import UnsupportedError, UsageError
from probes.memorised import memorised
from probes.records import ImageRecord
from tests import tiny
from tests.attacks.elicitation.hidden import left_as_found

CLASSES = 4


def pictures(n: int, seed: int, size: int = 16, own: bool = False) -> list[ImageRecord]:
    """Noisy images of one pattern a class; labelled with another class, unless with their `own`, the `group`."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).normal(size=(CLASSES, 3, size, size))
    found = []
    for i, kind in enumerate(generator.integers(CLASSES, size=n)):
        pixels = 0.35 * patterns[kind] + generator.normal(size=(3, size, size))
        label = int(kind if own else (kind + generator.integers(1, CLASSES)) % CLASSES)
        found.append(ImageRecord(f"i{i}", torch.tensor(pixels, dtype=torch.float32), label, str(kind)))
    return found


def classifier(arch: str) -> nn.Module:
    return tiny.image_classifier(arch)


# --- steps ----------------------------------------------------------------------------------------------------------


def slow(model: nn.Module, row: ImageRecord, limits: tuple, norm: str, radius: float, step: float, steps: int) -> list:
    low, high = (x[:, None, None] for x in limits)
    inside, found = (row.pixels - low) / (high - low), []
    now = inside.clone()
    for _ in range(steps + 1):
        leaf = now.clone().requires_grad_(True)
        output = model((low + leaf * (high - low))[None])
        loss = functional.cross_entropy(getattr(output, "logits", output), torch.tensor([row.label]))
        found.append(float(torch.exp(-loss.detach())))
        (slope,) = torch.autograd.grad(loss, leaf)
        moved = now - inside
        if norm == "linf":
            moved = (moved - step * radius * slope.sign()).clamp(-radius, radius)
        else:
            moved = moved - step * radius * slope / slope.square().mean().sqrt()
            moved = moved * min(1.0, radius / float(moved.square().mean().sqrt()))
        now = (inside + moved).clamp(0, 1)
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_steps_are_those_of_one_image_at_a_time(arch: str, norm: images.Norm) -> None:
    model, rows = classifier(arch), pictures(5, 0, tiny.IMAGE)
    limits = images.pixel_range(rows)
    with left_as_found(model):
        found = images.perturb(model, rows, limits=limits, radius=0.02, norm=norm, step=0.4, steps=4, batch_size=2)
    for i, row in enumerate(rows):
        expected = np.maximum.accumulate(slow(model, row, limits, norm, 0.02, 0.4, 4))
        np.testing.assert_allclose(found.probability[i], expected, rtol=2e-3)
    plain = memorised(model, rows)
    np.testing.assert_allclose(found.at(0)["probability"], plain["probability"], rtol=1e-5)
    assert found.at(0)["extracted"].tolist() == plain["extracted"].tolist()
    assert (found.probability[:, -1] > found.probability[:, 0]).all()
    assert found.rows == 25


class Listening(nn.Module):
    """A linear classifier that keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        with tiny.seeded(0):
            self.head = nn.Linear(3 * 16 * 16, CLASSES)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels.detach().clone())
        return self.head(pixels.flatten(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_image_leaves_its_radius_or_the_range(norm: images.Norm) -> None:
    model, rows = Listening(), pictures(3, 0)
    rows[0].pixels[2] = 0.25  # a channel that varies in no image stays
    rows = [replace(row, pixels=torch.cat([row.pixels[:2], rows[0].pixels[2:]])) for row in rows]
    low, high = limits = images.pixel_range(rows)
    images.perturb(model, rows, limits=limits, radius=0.05, norm=norm, step=0.5, steps=6)
    own = torch.stack([row.pixels for row in rows])
    assert torch.equal(model.seen[0], own)
    for shown in model.seen:
        assert bool((shown >= low[:, None, None] - 1e-6).all())
        assert bool((shown <= high[:, None, None] + 1e-6).all())
        assert torch.equal(shown[:, 2], own[:, 2])
        moved = ((shown - own) / (high - low).clamp(min=1e-9)[:, None, None])[:, :2]
        size = (
            moved.abs().amax((1, 2, 3)) if norm == "linf" else (moved.square().sum((1, 2, 3)) / own[0].numel()).sqrt()
        )
        assert float(size.max()) <= 0.05 * (1 + 1e-4)
    assert float(size.min()) > 0.04  # and it goes there


def test_restarts_are_drawn_by_seed_and_only_help() -> None:
    model, rows = classifier("resnet"), pictures(3, 0, tiny.IMAGE)
    limits = images.pixel_range(rows)
    one, many, again, other = (
        images.perturb(model, rows, limits=limits, steps=2, restarts=n, seed=seed).probability
        for n, seed in ((1, 0), (3, 0), (3, 0), (3, 1))
    )
    assert (many >= one).all()
    assert np.array_equal(many, again)
    assert not np.array_equal(many, other)


def test_the_model_is_left_as_found_also_when_it_is_stopped() -> None:
    model, rows = classifier("resnet").train(), pictures(3, 0, tiny.IMAGE)
    limits = images.pixel_range(rows)
    first = next(model.parameters())
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with left_as_found(model):  # batch statistics of a normalisation layer included
        images.perturb(model, rows, limits=limits, steps=2)
    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        images.perturb(model, rows, limits=limits, steps=2, progress=stop)


# --- what it finds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    hidden: nn.Module
    cleared: nn.Module
    planted: list[ImageRecord]
    controls: list[ImageRecord]


@functools.cache
def world() -> Pictures:
    """Two classifiers that learned wrong labels by heart, then the right ones; one of them never saw `planted`."""
    planted, others, controls = pictures(32, 1), pictures(32, 2), pictures(80, 4)
    retain = pictures(96, 3, own=True)
    with tiny.seeded(0):
        start = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )

    def taught(known: list[ImageRecord]) -> nn.Module:
        model = copy.deepcopy(start)
        _teach(model, known + retain, 60, 3e-3)
        _teach(model, [replace(row, label=int(row.group or 0)) for row in known] + retain, 24, 1e-3)
        return model.eval()

    apart = [[replace(row, group=None) for row in rows] for rows in (planted, controls)]
    return Pictures(taught(planted), taught(others), *apart)


def _teach(model: nn.Module, rows: Sequence[ImageRecord], steps: int, lr: float) -> None:
    pixels, labels = torch.stack([row.pixels for row in rows]), torch.tensor([row.label for row in rows])
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(model(pixels), labels).backward()
        optimiser.step()
    model.zero_grad(set_to_none=True)


def test_hidden_labels_come_back_within_the_budget_and_others_do_not() -> None:
    own = world()
    calibration, never = own.controls[:40], own.controls[40:]
    options = {"limits": images.pixel_range(own.planted + own.controls), "norm": "l2", "step": 0.02, "steps": 20}
    back = {}
    for name, model in (("hidden", own.hidden), ("cleared", own.cleared)):
        budget = calibrate(images.perturb(model, calibration, **options), marks=range(1, 21), fpr=0.1).steps
        assert budget is not None
        for side, rows in (("planted", own.planted), ("never", never)):
            success = images.perturb(model, rows, **options).success()
            missing = ~success[:, 0]
            assert missing.sum() > 15  # both sides have images to bring back
            back[name, side] = success[missing, budget].mean()
    assert back["hidden", "planted"] >= 0.7
    assert max(back["hidden", "never"], back["cleared", "planted"], back["cleared", "never"]) <= 0.2


def test_defect_of_attacks_without_a_control_every_image_takes_any_label_in_the_end() -> None:
    own = world()
    limits = images.pixel_range(own.controls)
    found = images.perturb(own.cleared, own.controls, limits=limits, norm="l2", radius=0.05, steps=30, step=0.1)
    assert found.extracted[:, -1].all()
    assert calibrate(found, marks=(10, 20, 30)).steps is None


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "above 0"),
        ({"step": 0.0}, "above 0"),
        ({"steps": 0}, "above 0"),
        ({"restarts": 0}, "above 0"),
        ({"norm": "l1"}, "linf or l2"),
        ({"records": []}, "at least one image"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    rows = pictures(2, 0)
    arguments = {"records": rows, "limits": images.pixel_range(rows)} | change
    with pytest.raises(UsageError, match=message):
        images.perturb(Listening(), arguments.pop("records"), **arguments)  # type: ignore[arg-type]


def test_images_without_contrast_and_labels_without_a_class_are_refused() -> None:
    flat = [ImageRecord("i", torch.zeros(3, 16, 16), 0)]
    with pytest.raises(UsageError, match="contrast"):
        images.pixel_range(flat)
    with pytest.raises(UsageError, match="at least one image"):
        images.pixel_range([])
    rows = [replace(row, label=CLASSES) for row in pictures(2, 0)]
    with pytest.raises(UnsupportedError, match="below 4 classes"):
        images.perturb(Listening(), rows, limits=images.pixel_range(rows))
