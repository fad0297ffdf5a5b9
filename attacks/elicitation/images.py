"""Nearby images: does a small change of its pixels bring an image's label back? The steps are calibrated.

Pixels are measured in ranges: u = (x - low) / (high - low), each channel between the lowest and the highest value of
the images given, so that a radius means the same under any normalisation. Projected gradient descent (Madry et al.,
arXiv 1706.06083) lowers the cross entropy of the record's own label within u in [0, 1] and

    linf:  max |delta| <= radius,           a step adds  -step * radius * sign(g)
    l2:    rms(delta)  <= radius,           a step adds  -step * radius * g / rms(g)

with g the gradient and rms the root mean square over all values of the image. An image that takes any label exists
close to nearly every image, so a success by itself shows nothing; only the number of steps that
`attacks.elicitation.budget` calibrates on never-seen images counts (Finding Dori, arXiv 2507.16880, for classifiers).

Shape letters: B images in a batch, R images, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.elicitation.budget import Trace
from attacks.elicitation.inputs import halving, unit
from probes.classify import class_logits
from probes.errors import UnsupportedError, UsageError
from probes.likelihood import Progress
from probes.passes import gradients, sum_type
from probes.records import ImageRecord

RADIUS = 0.03
STEP = 0.05
Norm = Literal["linf", "l2"]


def pixel_range(records: Sequence[ImageRecord]) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each channel over all images, each [channels].

    Raises:
        UsageError: no images, or images without any contrast.
    """
    if not records:
        raise UsageError("expected at least one image, found none")
    low = torch.stack([record.pixels.amin((1, 2)) for record in records]).amin(0)
    high = torch.stack([record.pixels.amax((1, 2)) for record in records]).amax(0)
    if not bool((high > low).any()):
        raise UsageError("expected images with some contrast, found every pixel alike; check the image processor")
    return low, high


def perturb(
    model: nn.Module,
    records: Sequence[ImageRecord],
    *,
    limits: tuple[Tensor, Tensor],
    radius: float = RADIUS,
    norm: Norm = "linf",
    steps: int = 50,
    step: float = STEP,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Trace:
    """Move each image toward its label.

    Args:
        model: an image classifier; used in evaluation mode, left as found.
        records: images of one shape.
        limits: lowest and highest value of each channel, see `pixel_range`; the same for records and controls.
        radius: most a pixel (`linf`), or the root mean square of all (`l2`), moves, as a share of the range.
        norm: which.
        steps: S.
        step: length of a step as a share of the radius.
        restarts: searches an image: the first starts at the image, the others within one step of it, drawn by seed.
        seed: of the starts; an image's start depends on the seed and its place in `records` alone.
        batch_size: images run at a time.
        progress: called with (images done, images) over restarts.

    Returns:
        The trace; S + 1 images forward and S backward an image and restart.

    Raises:
        UsageError: no records, or a radius, step or count that is not positive.
        UnsupportedError: labels outside the classes or an unknown model output.
        ResourceError: when one image does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one image, found none")
    if not (radius > 0 and step > 0) or min(steps, restarts, batch_size) < 1 or norm not in ("linf", "l2"):
        raise UsageError("expected linf or l2 and a radius, step, steps and restarts above 0, found others")
    scores, done = np.zeros((restarts, len(records), steps + 1, 3)), 0

    def run(batch: list[int]) -> list[np.ndarray]:
        shape = records[batch[0]].pixels.shape
        starts = [_start(tuple(shape), norm, step * radius if restart else 0.0, (seed, restart, i)) for i in batch]
        return _search(
            model, [records[i] for i in batch], torch.stack(starts), limits, norm, radius, step * radius, steps
        )

    with gradients(model, {}, lambda name, gradient: None):
        for restart in range(restarts):
            for start in range(0, len(records), batch_size):
                batch = list(range(start, min(start + batch_size, len(records))))
                scores[restart, batch] = halving(run, batch, "image")
                done += len(batch)
                if progress:
                    progress(done, restarts * len(records))
    return Trace.of([record.record_id for record in records], scores, restarts * len(records) * (steps + 1))


def _start(shape: tuple[int, ...], norm: Norm, length: float, seed: tuple[int, ...]) -> Tensor:
    """A displacement of `length` in a random direction, in ranges."""
    if not length:
        return torch.zeros(shape)
    drawn = torch.as_tensor(np.random.default_rng([23, *seed]).normal(size=shape), dtype=torch.float32)
    return length * _steepest(drawn[None], norm)[0]


def _search(
    model: nn.Module,
    records: Sequence[ImageRecord],
    moved: Tensor,
    limits: tuple[Tensor, Tensor],
    norm: Norm,
    radius: float,
    length: float,
    steps: int,
) -> list[np.ndarray]:
    """Scores [S + 1, 3] of each image of one batch: probability, accuracy, extracted after each step."""
    device = next(model.parameters()).device
    low, span = (x.to(device)[:, None, None] for x in (limits[0], limits[1] - limits[0]))  # [channels, 1, 1]
    pixels = torch.stack([record.pixels for record in records]).to(device)  # [B, channels, height, width]
    labels = torch.tensor([record.label for record in records], device=device)  # [B]
    base = torch.where(span > 0, (pixels - low) / span.where(span > 0, 1.0), 0.0)  # in ranges
    # An image outside the limits stays where it is allowed to be; its own values never count as a move.
    bottom, top = base.clamp(max=0.0), base.clamp(min=1.0)
    moved, found = moved.to(base), []
    for s in range(steps + 1):
        moved = (base + _inside(moved, norm, radius)).clamp(bottom, top) - base
        inputs = (pixels + moved * span).requires_grad_(s < steps)  # span 0: a channel that never varies stays
        with torch.set_grad_enabled(s < steps):
            logits = class_logits(model, inputs)
            logits = logits.to(sum_type(logits))  # [B, classes]
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
            raise UnsupportedError(f"expected labels below {logits.shape[-1]} classes, found others; check the records")
        found.append(_scores(logits.detach(), labels))
        if s < steps:
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            slope = torch.autograd.grad(loss, inputs)[0] * span
            moved = moved - length * _steepest(slope, norm)
    return list(np.stack(found, axis=1))


def _scores(logits: Tensor, labels: Tensor) -> np.ndarray:
    """[B, 3] probability of the label, and twice whether it is predicted (see `probes.classify`: ties are not)."""
    gold = logits.gather(-1, labels[:, None])  # [B, 1]
    right = gold > logits.scatter(-1, labels[:, None], -torch.inf).amax(-1, keepdim=True)
    probability = logits.log_softmax(-1).gather(-1, labels[:, None]).exp()
    scores: np.ndarray = torch.cat([probability.nan_to_num(0.0), right, right], dim=-1).double().cpu().numpy()
    return scores


def _steepest(slope: Tensor, norm: Norm) -> Tensor:
    """Direction [B, channels, height, width] of length 1 in the norm that raises the loss most; 0 stays 0."""
    if norm == "linf":
        return slope.nan_to_num(0.0, 0.0, 0.0).sign()
    return unit(slope, (1, 2, 3)) * float(np.sqrt(slope[0].numel()))


def _inside(moved: Tensor, norm: Norm, radius: float) -> Tensor:
    """Displacements no longer than the radius."""
    if norm == "linf":
        return moved.clamp(-radius, radius)
    rms = moved.square().mean((1, 2, 3), keepdim=True).sqrt()  # [B, 1, 1, 1]
    inside: Tensor = moved * (radius / rms.clamp(min=radius))
    return inside
