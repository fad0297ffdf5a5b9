"""Choosing the component pairs that hold a share of the curvature mass, against a heap of tuples and against a sort.

The heap, as in the published code, holds the best pair left in every row as a tuple; products are read from tensors one
by one. A second heap multiplies plain Python floats, which is as fast as a heap of tuples gets. All sides choose the
same number of pairs, which is checked. The spectra are power laws with noise; how many pairs hold the share, and so
how long a heap takes, depends on the exponent.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject
from probes.curvature.kronecker import keep_pairs

SHAPE = (2048, 1024)
TINY = (64, 32)
EXPONENT = 0.5
SHARES = (0.6, 0.9)


def run(subject: Subject) -> Iterator[Ratio]:
    p, q = TINY if subject.tiny else SHAPE
    lam, mu = _spectrum(p, 0), _spectrum(q, 1)
    for rho in SHARES:
        yield from _compare(subject, lam, mu, rho)


def _compare(subject: Subject, lam: Tensor, mu: Tensor, rho: float) -> Iterator[Ratio]:
    p, q, rows, columns = len(lam), len(mu), lam.tolist(), mu.tolist()
    counts: dict[str, int] = {}
    sides = {
        "heap": _counted(counts, "heap", lambda: _heap(p, q, lambda i, j: (lam[i] * mu[j]).item(), rho)),
        "lists": _counted(counts, "lists", lambda: _heap(p, q, lambda i, j: rows[i] * columns[j], rho)),
        "sort": _counted(counts, "sort", lambda: _sort(lam, mu, rho)),
        "bisection": _counted(counts, "bisection", lambda: keep_pairs(lam, mu, rho).pairs),
    }
    seconds = interleave(sides, subject)
    if len(set(counts.values())) > 1:
        raise AssertionError(f"expected the same number of pairs from every side, found {counts}")
    note = f"{p} x {q}, rho {rho:g}: {counts['bisection']} of {p * q} pairs"
    heap, ours, target = seconds["heap"], seconds["bisection"], subject.target(100.0)
    yield Ratio("heap, products of tensors / bisection", heap, ours, target, at_least=True, note=note)
    yield Ratio("heap, products of floats / bisection", seconds["lists"], ours, note=note)
    yield Ratio("sort / bisection", seconds["sort"], ours, note=note)


def _spectrum(n: int, seed: int) -> Tensor:
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.arange(1, n + 1).double() ** -EXPONENT * (0.5 * noise).exp()).sort(descending=True).values


def _counted(counts: dict[str, int], name: str, side: Callable[[], int]) -> Callable[[], None]:
    def run() -> None:
        counts[name] = side()

    return run


def _heap(p: int, q: int, product: Callable[[int, int], float], rho: float) -> int:
    target = rho * sum(product(i, 0) for i in range(p)) * sum(product(0, j) for j in range(q)) / product(0, 0)
    heap = [(-product(i, 0), i, 0) for i in range(p)]
    heapq.heapify(heap)
    mass, pairs = 0.0, 0
    while heap and mass < target:
        value, i, j = heapq.heappop(heap)
        mass -= value
        pairs += 1
        if j + 1 < q:
            heapq.heappush(heap, (-product(i, j + 1), i, j + 1))
    return pairs


def _sort(lam: Tensor, mu: Tensor, rho: float) -> int:
    held = torch.outer(lam, mu).flatten().sort(descending=True).values.cumsum(0)
    return int((held < rho * held[-1]).sum()) + 1
