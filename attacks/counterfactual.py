r"""Counterfactual memorisation and influence, from many small trainings on random parts of the records.

For a training set of n records, a random part S of it, and a figure s(model, x) of how well a model does on x,

    memorisation_i  = E[s(model_S, x_i) | i in S] - E[s(model_S, x_i) | i not in S]
    influence_{i,j} = E[s(model_S, z_j) | i in S] - E[s(model_S, z_j) | i not in S]        for held-out z_j

(Feldman, arXiv 1906.05271; Feldman and Zhang, 2008.03703). With s the per-token accuracy of a language model this is
counterfactual memorisation (Zhang et al., 2112.12938). Unlike any figure of one checkpoint it does not mistake what is
easy, or common, for what is memorised.

Design. The records are cut at random into b parts, and b runs train on a of the parts each, in turn (share = a / b): in
every group of b runs each record is in exactly a of them, and at a share of one half the two runs of a group are
complements of each other. The runs of a group have the same training seed. So every group by itself gives an unbiased
estimate for every record, and the spread of the groups' estimates gives its standard error, whatever the dependence
between runs of one group.

Memory is O(n) for memorisation, by running means. For influence, the bits that say which record was in which run and
the scores on the m targets are kept, N (n / 8 + 8 m) bytes for N runs, and the n x m estimates are made and dropped a
block of records at a time, except the largest.

Limits: the figures are about the training procedure `train`, not about one given checkpoint. Fine-tuning from a common
start measures what the fine-tune adds; what the start already held shows in no figure. The largest of n x m noisy
influences are too large on average: see their standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from probes.errors import UsageError
from probes.likelihood import Progress
from probes.memorised import memorised
from probes.records import ImageRecord, TokenRecord
from probes.training import fit, mean_loss

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Records = Sequence[TokenRecord] | Sequence[ImageRecord]
Model = TypeVar("Model")

MAX_PARTS = 20  # finest share is 1/20
BLOCK = 1 << 22  # influence estimates alive at once, 32 MB


@dataclass(frozen=True, slots=True)
class Influence:
    """Effect of training on one record on the figure of one held-out target.

    Attributes:
        record: index of the record.
        target: index of the target, from 0.
        influence: difference of the mean figure between runs with and without the record.
        standard_error: of the influence; None from a single group of runs.
    """

    record: int
    target: int
    influence: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """Estimates for n records, in input order; None where the runs do not tell, with the reason.

    Attributes:
        memorisation: [n] see the module's docstring, in the unit of the figure.
        standard_error: [n] of the memorisation; None as well where there are too few runs for one.
        runs_in: [n] number of runs that trained on the record.
        runs_out: [n] number of runs that did not.
        reasons: index of a record without an estimate -> why.
        influences: the largest influences by absolute value, largest first.
        runs: number of runs.
    """

    memorisation: list[float | None]
    standard_error: list[float | None]
    runs_in: NDArray[np.int64]
    runs_out: NDArray[np.int64]
    reasons: dict[int, str]
    influences: list[Influence]
    runs: int

    def __repr__(self) -> str:
        return f"Counterfactual(records={len(self.memorisation)}, runs={self.runs})"


def counterfactual(
    n_records: int,
    train: Callable[[Bools, int], Model],
    score: Callable[[Model], ArrayLike],
    runs: int,
    *,
    share: float = 0.5,
    seed: int = 0,
    top_k: int = 0,
    minimum: float | None = None,
    progress: Progress | None = None,
) -> Counterfactual:
    """Train `runs` models on parts of the records and compare those with and without each record.

    Args:
        n_records: n, at least 2.
        train: takes which records to train on, [n] bool, and a seed, and returns a model; such as `fine_tune`.
        score: takes that model and returns [n + m] figures, higher = better: of the n records, then of m held-out
            targets (m may be 0); such as `performance`. One model is alive at a time.
        runs: number of trainings, a multiple of b for a share of a / b.
        share: share of the records in a run, rounded to a fraction with denominator at most 20; 0.5 by default,
            which gives the smallest standard errors.
        seed: of the parts and of the trainings.
        top_k: how many influences to report; there are none without targets.
        minimum: influences are reported only for records with at least this much memorisation; None for any.
        progress: called with (runs done, runs in all).

    Returns:
        The estimates. The standard error needs at least two groups of runs.

    Raises:
        UsageError: too few records or runs, a share that leaves no record in or out, a negative top_k, or figures of
            the wrong number or not finite.
    """
    whole = Fraction(share).limit_denominator(MAX_PARTS) if 0 < share < 1 else Fraction(0)
    taken, parts = whole.numerator, whole.denominator
    if not 0 < taken < parts:
        raise UsageError(f"expected a share from 1/{MAX_PARTS} to {MAX_PARTS - 1}/{MAX_PARTS}, found {share:g}")
    if n_records < parts:
        raise UsageError(f"expected at least {parts} records for a share of {whole}, found {n_records}; pass more")
    if runs < parts or runs % parts:
        raise UsageError(
            f"expected a multiple of {parts} runs for a share of {whole}, found {runs}; change one of them"
        )
    kept = _Runs(n_records, top_k)
    for group in range(runs // parts):
        rng = np.random.default_rng((seed, group))
        part = rng.permutation(np.arange(n_records) % parts)  # [n] sizes differ by one at most
        training_seed = int(rng.integers(2**31))
        for turn in range(parts):
            included = (part + turn) % parts < taken
            figures = np.asarray(score(train(included, training_seed)), dtype=np.float64)
            kept.add(included, figures, group)
            if progress:
                progress(kept.runs, runs)
    return kept.result(minimum)


def estimate(
    included: ArrayLike, figures: ArrayLike, *, top_k: int = 0, minimum: float | None = None
) -> Counterfactual:
    """The estimates from runs that were made elsewhere, in any design.

    Args:
        included: [N, n] bool, which records each run trained on.
        figures: [N, n + m] figures of each run's model, as in `counterfactual`.
        top_k: as in `counterfactual`.
        minimum: as in `counterfactual`.

    Returns:
        The estimates, with standard errors that take runs as independent. A record in all runs, or in none, has None
        and a reason.

    Raises:
        UsageError: shapes that do not fit, a negative top_k, or figures that are not finite.
    """
    inside, values = np.asarray(included, dtype=bool), np.asarray(figures, dtype=np.float64)
    if inside.ndim != 2 or values.ndim != 2 or len(inside) != len(values) or not len(inside):
        raise UsageError(
            f"expected one row of inclusions and one of figures per run, found {inside.shape} and {values.shape}"
        )
    kept = _Runs(inside.shape[1], top_k)
    for row, figure in zip(inside, values, strict=True):
        kept.add(row, figure, None)
    return kept.result(minimum)


@dataclass(slots=True)
class _Moments:
    """Running means and sums of squared deviations, a column each (Welford 1962)."""

    count: Floats
    mean: Floats
    squares: Floats

    @classmethod
    def of(cls, n: int) -> _Moments:
        return cls(np.zeros(n), np.zeros(n), np.zeros(n))

    def add(self, values: Floats, where: Bools) -> None:
        self.count += where
        change = np.where(where, values - self.mean, 0.0)
        self.mean += change / np.maximum(self.count, 1)
        self.squares += change * (values - self.mean)

    def error(self) -> Floats:
        """Squared standard error of the mean; infinite from fewer than two values."""
        with np.errstate(divide="ignore", invalid="ignore"):
            out: Floats = np.where(self.count > 1, self.squares / (self.count - 1) / self.count, math.inf)
        return out


@dataclass(slots=True)
class _Runs:
    """What the runs so far leave behind: running moments of the records' own figures, inclusions and target figures."""

    n: int
    top_k: int
    runs: int = 0
    width: int | None = None
    groups: list[int | None] = field(default_factory=list)
    packed: list[NDArray[np.uint8]] = field(default_factory=list)
    targets: list[Floats] = field(default_factory=list)
    inside: _Moments = field(init=False)
    outside: _Moments = field(init=False)
    between: _Moments = field(init=False)
    in_group: _Moments = field(init=False)
    out_of_group: _Moments = field(init=False)

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UsageError(f"expected a number of influences of at least 0, found {self.top_k}")
        self.inside, self.outside, self.between = (_Moments.of(self.n) for _ in range(3))
        self._start_group()

    def _start_group(self) -> None:
        self.in_group, self.out_of_group = _Moments.of(self.n), _Moments.of(self.n)

    def add(self, included: Bools, figures: Floats, group: int | None) -> None:
        self.width = len(figures) if self.width is None and figures.ndim == 1 else self.width
        if figures.shape != (self.width,) or len(figures) < self.n or included.shape != (self.n,):
            raise UsageError(
                f"expected figures of {self.n} records and the same targets from every run, found {figures.shape}; "
                "return one number for each"
            )
        bad = int((~np.isfinite(figures)).sum())
        if bad:
            raise UsageError(
                f"expected finite figures, found {bad} of {len(figures)} not finite; use a bounded one such as accuracy"
            )
        if self.groups and group != self.groups[-1]:
            self._close_group()
        own = figures[: self.n]
        for moments, where in ((self.inside, included), (self.outside, ~included)):
            moments.add(own, where)
        if group is not None:
            self.in_group.add(own, included)
            self.out_of_group.add(own, ~included)
        self.runs += 1
        self.groups.append(group)
        if self.top_k and len(figures) > self.n:
            self.packed.append(np.packbits(included))
            self.targets.append(figures[self.n :].copy())

    def _close_group(self) -> None:
        both = (self.in_group.count > 0) & (self.out_of_group.count > 0)
        self.between.add(self.in_group.mean - self.out_of_group.mean, both)
        self._start_group()

    def result(self, minimum: float | None) -> Counterfactual:
        grouped = self.groups[-1] is not None
        if grouped:
            self._close_group()
        known = (self.inside.count > 0) & (self.outside.count > 0)
        memorisation = self.inside.mean - self.outside.mean
        squared = self.between.error() if grouped else self.inside.error() + self.outside.error()
        reasons = {
            int(i): f"in {'all' if self.inside.count[i] else 'none'} of {self.runs} runs"
            for i in np.flatnonzero(~known)
        }
        chosen = known if minimum is None else known & (memorisation >= minimum)
        return Counterfactual(
            memorisation=[float(x) if there else None for x, there in zip(memorisation, known, strict=True)],
            standard_error=[
                math.sqrt(x) if there and math.isfinite(x) else None for x, there in zip(squared, known, strict=True)
            ],
            runs_in=self.inside.count.astype(np.int64),
            runs_out=self.outside.count.astype(np.int64),
            reasons=reasons,
            influences=self._influences(np.flatnonzero(chosen), grouped),
            runs=self.runs,
        )

    def _influences(self, chosen: NDArray[np.intp], grouped: bool) -> list[Influence]:
        if not self.targets:
            return []
        inside = np.unpackbits(np.stack(self.packed), axis=1, count=self.n).view(bool)  # [N, n]
        figures = np.stack(self.targets)  # [N, m]
        figures = figures - figures.mean(axis=0)  # shifts both means alike; keeps the digits
        best: list[tuple[float, int, int]] = []  # (influence, record, target)
        size = max(1, BLOCK // max(figures.shape))  # records at a time
        for start in range(0, len(chosen), size):
            block = chosen[start : start + size]
            weights = inside[:, block] / inside[:, block].sum(axis=0)
            weights -= ~inside[:, block] / (~inside[:, block]).sum(axis=0)
            values = weights.T @ figures  # [block, m]
            flat = np.abs(values).ravel()
            largest = np.argpartition(-flat, min(self.top_k, flat.size) - 1)[: self.top_k]
            rows, columns = np.unravel_index(largest, values.shape)
            best += [(float(values[r, c]), int(block[r]), int(c)) for r, c in zip(rows, columns, strict=True)]
            best = sorted(best, key=lambda b: (-abs(b[0]), b[1], b[2]))[: self.top_k]
        return [Influence(i, j, value, self._error(inside[:, i], figures[:, j], grouped)) for value, i, j in best]

    def _error(self, included: Bools, figure: Floats, grouped: bool) -> float | None:
        """Standard error of one influence, by groups or by runs."""
        if grouped:
            labels = np.array(self.groups)
            ones = [labels == g for g in dict.fromkeys(self.groups)]
            values = [figure[g & included].mean() - figure[g & ~included].mean() for g in ones]
            return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        sides = figure[included], figure[~included]
        if min(map(len, sides)) < 2:
            return None
        return math.sqrt(sum(float(side.var(ddof=1)) / len(side) for side in sides))


# --- a trainer and a figure for small models ------------------------------------------------------------------------


def fine_tune(
    factory: Callable[[], nn.Module],
    records: Records,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 16,
    weight_decay: float = 0.0,
) -> Callable[[Bools, int], nn.Module]:
    """A trainer for `counterfactual`: AdamW on the chosen records.

    Args:
        factory: returns a model to train in place: a deep copy of a base, or one with random weights, which torch's
            global generator, seeded for the run, decides.
        records: [n] records: texts (loss over completion tokens) for a causal language model, or images.
        epochs: passes over the chosen records.
        learning_rate: constant rate.
        batch_size: records per step; the last step of an epoch may have fewer.
        weight_decay: of AdamW.

    Returns:
        A function of which records to train on, [n] bool, and a seed, which decides the factory's random weights, the
        order of the records and dropout. It returns the model in evaluation mode and leaves the global random state
        as it was.

    Raises:
        UsageError: no records, or a number of epochs, records per step or a learning rate that is not positive.
    """
    if not records or epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise UsageError(
            f"expected records, epochs, batch size and learning rate above 0, found {len(records)}, {epochs}, "
            f"{batch_size} and {learning_rate}"
        )

    def train(included: Bools, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = factory()
            loss = mean_loss(model, records)
            model.train()
            order = np.random.default_rng((seed, 5))
            steps: list[list[int]] = []
            for _ in range(epochs):
                # Priorities are drawn for all records: those in both runs of a group keep their order.
                shuffled = [int(i) for i in np.argsort(order.random(len(records))) if included[i]]
                steps += [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
            fit(
                [parameter for parameter in model.parameters() if parameter.requires_grad],
                lambda i: loss(steps[i]),
                steps=len(steps),
                learning_rate=learning_rate,
                weight_decay=weight_decay,
            )
        return model.eval()

    return train


def performance(
    records: Records,
    figure: Literal["accuracy", "probability", "log_probability"] = "accuracy",
) -> Callable[[nn.Module], Floats]:
    """A figure for `counterfactual`, by one pass over the records and, after them, the targets.

    Args:
        records: the n records, followed by any targets, all texts or all images.
        figure: "accuracy": share of completion tokens that are the greedy choice, or whether the class is right;
            "probability": exp(mean log p), both in [0, 1]; "log_probability": its logarithm, in nats, unbounded.

    Returns:
        A function from a model to [n + m] figures.

    Raises:
        UsageError: an unknown figure.
        UnsupportedError: from the function, where a model's logits are NaN.
    """
    columns = {"accuracy": "accuracy", "probability": "probability", "log_probability": "loss"}
    if figure not in columns:
        raise UsageError(f"expected a figure among {', '.join(columns)}, found {figure!r}")

    def measure(model: nn.Module) -> Floats:
        values = memorised(model, records)[columns[figure]].to_numpy(dtype=np.float64)
        return -values if figure == "log_probability" else values

    return measure
