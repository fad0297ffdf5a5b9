"""Walk from the edited weights towards the original ones: how far until the records come back, and over which barrier?

With U the edited and O the original checkpoint, W(l) = U + l (O - U) for every parameter: l = 0 is the edited copy,
l = 1 the original, a negative l goes beyond the edit. Along the path

    l*        the first l >= 0 at which a figure reaches half of what the original has, found by linear interpolation
              between the steps; an edit that hides needs a small one
    barrier   max over l in [0, 1] of loss(l) - ((1 - l) loss(0) + l loss(1)), at least 0: without one, both
              checkpoints lie in one basin, which predicts recovery by fine-tuning (arXiv 2505.22310; linear mode
              connectivity, Frankle et al., arXiv 1912.05671)

The sums are taken in float64, so that l = 1 gives the original's own weights back. Only parameters move; buffers
(BatchNorm's running statistics) stay those of the edited copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from attacks.recovery.weights import changed
from probes.errors import UsageError

STEPS = (-0.5, 0.1, 0.2, 0.3, 0.5, 1.0)
T = TypeVar("T")


def interpolation(
    model: nn.Module, other: Callable[[str], Tensor], step: float, names: Iterable[str] | None = None
) -> AbstractContextManager[tuple[str, ...]]:
    """The model moved a step towards another one, inside a `with` block.

    Args:
        model: the live model U; as found afterwards, bit for bit.
        other: gives a parameter of O by its name in `model`; asked for one at a time.
        step: l; 0 changes nothing, 1 is O.
        names: the parameters to move; all by default.

    Returns:
        A context manager that yields the names of the tensors changed: those in which U and O differ.

    Raises:
        UsageError: a step that is not finite, or a parameter of another shape.
    """
    if not np.isfinite(step):
        raise UsageError(f"expected a finite step, found {step}")

    def edit(name: str, weight: Tensor) -> Tensor | None:
        if step == 0:
            return None
        end = other(name).detach().to(weight.device)
        if end.shape != weight.shape:
            raise UsageError(
                f"expected {name} of shape {list(weight.shape)} in both checkpoints, found {list(end.shape)}"
            )
        if torch.equal(end.to(weight.dtype), weight):
            return None
        start = weight.double()
        return start + step * (end.double() - start)

    return changed(model, edit, [name for name, _ in model.named_parameters()] if names is None else names)


def along(
    model: nn.Module, other: Callable[[str], Tensor], steps: Sequence[float], measure: Callable[[], T]
) -> list[T]:
    """What `measure` finds at each step of the path, in the order of `steps`.

    Args:
        model: the live model U; as found afterwards, bit for bit.
        other: see `interpolation`.
        steps: values of l.
        measure: called once a step, while the model stands there.
    """
    found = []
    for step in steps:
        with interpolation(model, other, step):
            found.append(measure())
    return found


def crossing(steps: ArrayLike, values: ArrayLike, level: float) -> float | None:
    """The first l >= 0 at which a curve reaches a level from below, by linear interpolation.

    Args:
        steps: [n] values of l in any order; negative ones are left out.
        values: [n] of the figure.
        level: to be reached.

    Returns:
        l*; the smallest step at least 0 where the curve is there already; None where it never gets there.
    """
    x, y = _sorted(steps, values)
    wanted = (x >= 0) & np.isfinite(y)
    x, y = x[wanted], y[wanted]
    there = np.flatnonzero(y >= level)
    if not len(there):
        return None
    i = int(there[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def barrier(steps: ArrayLike, losses: ArrayLike) -> tuple[float, float] | None:
    """How far the loss rises above the straight line between both ends.

    Args:
        steps: [n] values of l in any order, 0 and 1 among them; others outside [0, 1] are left out.
        losses: [n].

    Returns:
        The height, at least 0, in the unit of the losses, and the l where it stands; None without both ends, or with
        a loss that is not finite.
    """
    x, y = _sorted(steps, losses)
    x, y = x[(x >= 0) & (x <= 1)], y[(x >= 0) & (x <= 1)]
    if not len(x) or x[0] != 0 or x[-1] != 1 or not np.isfinite(y).all():
        return None
    above = y - ((1 - x) * y[0] + x * y[-1])
    above[[0, -1]] = 0.0  # exactly, whatever the rounding
    i = int(above.argmax())
    return float(above[i]), float(x[i])


def _sorted(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise UsageError(f"expected one value for each step, found {list(x.shape)} steps and {list(y.shape)} values")
    order = np.argsort(x, kind="stable")
    return x[order], y[order]
