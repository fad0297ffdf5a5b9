"""The Kronecker selection against a heap, a sort and brute force; identities, invariances, ties and noise."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from probes.curvature import kronecker
from probes.curvature.kronecker import (
    Basis,
    Eigenbases,
    Kept,
    _fewest,
    coordinates,
    curve_points,
    edit_figures,
    eigenbasis,
    eigenpairs,
    keep_cells,
    keep_pairs,
    project,
    random_pairs,
)
from probes.errors import UsageError

RHOS = (0.05, 0.3, 0.6, 0.75, 0.9, 0.99, 0.999999)


@dataclass
class Pair:
    """What `eigenbasis` reads of a factor."""

    a: Tensor
    g: Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(n: int, seed: int, power: float = 1.5) -> Tensor:
    """A power law with noise, descending."""
    noise = torch.randn(n, generator=generator(seed), dtype=torch.float64).exp()
    return (noise * torch.arange(1, n + 1).double() ** -power).sort(descending=True).values


def second_moment(n: int, samples: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(samples, n, generator=generator(seed), dtype=torch.float64)
    x *= torch.arange(1, n + 1).double() ** -0.7
    return (x.T @ x / samples).to(dtype)


def problem(p: int, q: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Basis, Pair]:
    weight = torch.randn(p, q, generator=generator(seed), dtype=torch.float64).to(dtype)
    factor = Pair(second_moment(q, 4 * q, seed + 1), second_moment(p, 4 * p, seed + 2))
    return weight, eigenbasis(factor), factor


def by_heap(lam: Tensor, mu: Tensor, rho: float) -> set[tuple[int, int]]:
    """The published way: the best pair of every row in a heap of tuples, popped until the mass is reached."""
    a, b = lam.tolist(), mu.tolist()
    target = rho * math.fsum(x * y for x, y in itertools.product(a, b))
    heap = [(-a[i] * b[0], i, 0) for i in range(len(a))]
    heapq.heapify(heap)
    kept: set[tuple[int, int]] = set()
    mass = 0.0
    while heap and mass < target:
        value, i, j = heapq.heappop(heap)
        mass -= value
        kept.add((i, j))
        if j + 1 < len(b):
            heapq.heappush(heap, (-a[i] * b[j + 1], i, j + 1))
    return kept


def by_sort(mass: Tensor, rho: float) -> Tensor:
    """Cells in descending order, ties row by row; the shortest prefix that reaches the share."""
    order = sorted(range(mass.numel()), key=lambda i: (-float(mass.flatten()[i]), i))
    total, held, mask = float(mass.sum()), 0.0, torch.zeros(mass.numel(), dtype=torch.bool)
    for i in order:
        if held >= rho * total:
            break
        held += float(mass.flatten()[i])
        mask[i] = True
    return mask.view(mass.shape)


def pairs_of(mask: Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in mask.nonzero()}


# ----------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (12, 31), (40, 16), (33, 64)])
@pytest.mark.parametrize("rho", RHOS)
def test_bisection_equals_heap_and_sort(shape: tuple[int, int], rho: float) -> None:
    lam, mu = spectrum(shape[0], 1), spectrum(shape[1], 2)
    kept = keep_pairs(lam, mu, rho)
    mass = lam[:, None] * mu
    assert kept.mask().shape == shape
    assert pairs_of(kept.mask()) == by_heap(lam, mu, rho)
    assert torch.equal(kept.mask(), by_sort(mass, rho))
    assert torch.equal(kept.mask(), keep_cells(mass, rho))
    assert (kept.pairs, kept.total) == (int(kept.mask().sum()), mass.numel())
    assert kept.threshold == float(mass[kept.mask()].min())
    held = float(mass[kept.mask()].sum() / mass.sum())
    assert kept.mass == pytest.approx(held, rel=1e-12)
    assert kept.mass >= rho - 1e-12
    # the smallest such set: without its last pair the share is not reached
    assert float(mass[kept.mask()].sum()) - kept.threshold < rho * float(mass.sum()) * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=9),
    st.lists(st.integers(0, 6), min_size=1, max_size=9),
    st.sampled_from((0.125, 0.25, 0.5, 0.75, 0.875, 0.9375)),
)
def test_ties_and_zeros_by_brute_force(first: list[int], second: list[int], rho: float) -> None:
    """Small whole numbers: products tie often and every sum is exact, so all three ways must agree on every pair."""
    lam, mu = (torch.tensor(sorted(values, reverse=True), dtype=torch.float64) for values in (first, second))
    mass = lam[:, None] * mu
    if not mass.sum():
        for select in (lambda: keep_pairs(lam, mu, rho), lambda: keep_cells(mass, rho)):
            with pytest.raises(UsageError, match="no gradient"):
                select()
        return
    kept = keep_pairs(lam, mu, rho)
    assert torch.equal(kept.mask(), by_sort(mass, rho))
    assert torch.equal(keep_cells(mass, rho), by_sort(mass, rho))
    assert bool((kept.counts[1:] <= kept.counts[:-1]).all())
    assert kept.mass == pytest.approx(float(mass[kept.mask()].sum() / mass.sum()), rel=1e-14)


@given(st.floats(0, 1), st.floats(1e-6, 1), st.integers(1, 60), st.sampled_from((-1, 0, 1)))
@example(0.48592769656281265, 0.04048437818077755, 33, 1)  # the quotient rounds down to 33
@example(0.0, 0.1, 3, 0)  # 0.1 * 3 / 0.1 is above 3
def test_the_fewest_ties_whatever_the_rounding(held: float, each: float, n: int, ulp: int) -> None:
    target = held + n * each
    target = math.nextafter(target, math.inf * ulp) if ulp else target
    found = _fewest(held, each, target, 100)
    assert held + found * each >= target
    assert found == 1 or held + (found - 1) * each < target
    assert _fewest(held, each, target, 1) == 1


def test_masks_nest_as_rho_grows() -> None:
    lam, mu = spectrum(24, 3), spectrum(17, 4)
    masks = [keep_pairs(lam, mu, rho).mask() for rho in (*RHOS, 1.0)]
    for smaller, larger in itertools.pairwise(masks):
        assert not bool((smaller & ~larger).any())
        assert int(smaller.sum()) <= int(larger.sum())
    assert bool(masks[-1].all())


@pytest.mark.parametrize("rho", [1, 1.0])
def test_all_the_mass_is_every_pair(rho: float) -> None:
    """Pairs without mass too, so that nothing changes; and an int is a number."""
    zeros = torch.tensor([3.0, 0.0, 0.0])
    kept = keep_pairs(zeros, zeros, rho)
    assert bool(kept.mask().all())
    assert (kept.pairs, kept.total, kept.threshold, kept.mass) == (9, 9, 0.0, 1.0)
    assert bool(keep_cells(torch.zeros(2, 3), rho).all())


@pytest.mark.parametrize("rho", [0, 0.0, -0.5, 1.0000001, 2, math.nan, math.inf, True, "0.5", None])
def test_a_share_outside_its_range_is_refused(rho: object) -> None:
    for select in (lambda: keep_pairs(torch.ones(2), torch.ones(2), rho), lambda: keep_cells(torch.ones(2, 2), rho)):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="above 0 and up to 1"):
            select()


def test_a_degenerate_spectrum_fills_row_by_row() -> None:
    """A = G = I: any set of the right size is as good, and this is the one that is taken."""
    kept = keep_pairs(torch.ones(4), torch.ones(6), 0.4)
    assert kept.pairs == math.ceil(0.4 * 24)
    assert kept.counts.tolist() == [6, 4, 0, 0]
    assert kept.threshold == 1.0
    basis = eigenbasis(Pair(torch.eye(6), torch.eye(4)))
    assert torch.equal(basis.lam, torch.ones(4))
    weight = torch.randn(4, 6, generator=generator())
    assert float(project(weight, basis, kept).square().sum()) < float(weight.double().square().sum())


@pytest.mark.parametrize(("p", "q", "rho"), [(30, 20, 0.6), (20, 30, 0.9)])
def test_scale_does_not_matter(p: int, q: int, rho: float) -> None:
    weight, basis, factor = problem(p, q)
    kept = keep_pairs(basis.lam, basis.mu, rho)
    for a, g in ((1e-12, 1.0), (3.7e9, 2e-18), (1.0, 5.0)):
        scaled = eigenbasis(Pair(a * factor.a, g * factor.g))
        again = keep_pairs(scaled.lam, scaled.mu, rho)
        assert torch.equal(again.counts, kept.counts)
        assert again.threshold == pytest.approx(a * g * kept.threshold, rel=1e-9, abs=0)
        torch.testing.assert_close(project(weight, scaled, again), project(weight, basis, kept), rtol=0, atol=1e-10)


def test_order_and_sign_of_eigenvalues_are_checked() -> None:
    for wrong in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1e-9]), torch.ones(2, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match="descending"):
            keep_pairs(wrong, torch.ones(3), 0.5)
    for wrong in (torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf]])):
        with pytest.raises(UsageError, match="masses from 0"):
            keep_cells(wrong, 0.5)


def test_random_pairs_are_as_many_and_seeded() -> None:
    mask = random_pairs(7, 9, 20, seed=3)
    assert mask.shape == (7, 9)
    assert int(mask.sum()) == 20
    assert torch.equal(mask, random_pairs(7, 9, 20, seed=3))
    assert not torch.equal(mask, random_pairs(7, 9, 20, seed=4))
    assert int(random_pairs(7, 9, 63, seed=0).sum()) == 63
    assert int(random_pairs(7, 9, 0, seed=0).sum()) == 0
    hits = torch.stack([random_pairs(4, 5, 5, seed) for seed in range(800)]).double().mean(0)
    assert float((hits - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 800)  # every pair as often as any other
    with pytest.raises(ValueError, match="0 to 63"):
        random_pairs(7, 9, 64, seed=0)


# ------------------------------------------------------------------------------------------------------- decomposition


def test_eigenpairs_descend_reconstruct_and_repeat() -> None:
    matrix = second_moment(30, 200, 5)
    values, vectors = eigenpairs(matrix)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(30).double(), rtol=0, atol=1e-13)
    assert bool((values[1:] <= values[:-1]).all())
    assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())
    again = eigenpairs(matrix.clone())
    assert torch.equal(values, again[0])
    assert torch.equal(vectors, again[1])


def test_negative_noise_is_clamped() -> None:
    """A rank-deficient moment in float32 has eigenvalues a little below 0, which would break every order and sum."""
    matrix = second_moment(40, 8, 6, torch.float32)
    assert float(torch.linalg.eigvalsh(matrix.double()).min()) < 0
    values, _ = eigenpairs(matrix)
    assert float(values.min()) == 0.0
    assert keep_pairs(values, values, 0.999999).mass >= 0.999999


def test_a_shared_input_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = second_moment(9, 40, 1)
    maps = [Pair(shared, second_moment(n, 40, n)) for n in (5, 6)] + [Pair(shared.clone(), second_moment(7, 40, 7))]
    sizes: list[int] = []
    real = kronecker.eigenpairs
    monkeypatch.setattr(kronecker, "eigenpairs", lambda m, device: sizes.append(len(m)) or real(m, device))
    bases = Eigenbases()
    found = [bases(factor) for factor in maps]
    assert sorted(sizes) == [5, 6, 7, 9, 9]
    assert found[0].u_a is found[1].u_a
    assert torch.equal(found[1].u_a, found[2].u_a)
    for basis, factor in zip(found, maps, strict=True):
        assert torch.equal(basis.u_g, eigenbasis(factor).u_g)


def test_nothing_and_not_a_number() -> None:
    values, vectors = eigenpairs(torch.zeros(3, 3))
    assert torch.equal(values, torch.zeros(3).double())
    assert torch.equal(vectors, torch.eye(3).double())
    for wrong in (math.nan, math.inf):
        with pytest.raises(UsageError, match="float32"):
            eigenpairs(torch.full((2, 2), wrong))


def test_wide_sides_use_float32_and_a_failing_solver_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker, "DOUBLE_SIDE", 20)
    weight, basis, factor = problem(30, 12)
    assert (basis.u_g.dtype, basis.u_a.dtype, basis.lam.dtype) == (torch.float32, torch.float64, torch.float64)
    assert project(weight, basis, keep_pairs(basis.lam, basis.mu, 0.5)).dtype == torch.float32
    real = torch.linalg.eigh

    def failing(matrix: Tensor) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigenpairs(factor.g)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(values, basis.lam, rtol=1e-4, atol=1e-7 * float(values[0]))


# --------------------------------------------------------------------------------------------------- the edited weight


@pytest.mark.parametrize(("p", "q"), [(6, 9), (9, 6), (1, 5)])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_the_edit_by_outer_products(p: int, q: int, rho: float) -> None:
    """One rank-one term a pair, chosen by the heap, added up one by one."""
    weight, basis, _ = problem(p, q, seed=p)
    expected = torch.zeros(p, q, dtype=torch.float64)
    for i, j in by_heap(basis.lam, basis.mu, rho):
        u, v = basis.u_g[:, i], basis.u_a[:, j]
        expected += torch.dot(u, weight @ v) * torch.outer(u, v)
    kept = keep_pairs(basis.lam, basis.mu, rho)
    torch.testing.assert_close(project(weight, basis, kept), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(project(weight, basis, kept.mask()), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "side", "bound"), [(torch.float64, 2048, 1e-14), (torch.float32, 8, 3e-7)])
def test_keeping_everything_is_the_identity(
    dtype: torch.dtype, side: int, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kronecker, "DOUBLE_SIDE", side)
    weight, basis, _ = problem(48, 32, dtype=dtype)
    assert basis.dtype == dtype
    kept = keep_pairs(basis.lam, basis.mu, 1.0)
    error = torch.linalg.norm((project(weight, basis, kept) - weight).double()) / torch.linalg.norm(weight.double())
    assert float(error) <= bound
    found = edit_figures(weight, basis, kept)
    assert (found["kept_norm"], found["predicted_rise"]) == (1.0, 0.0)


def test_the_edit_projects() -> None:
    """Idempotent, and no norm grows; more kept is closer."""
    weight, basis, _ = problem(20, 28)
    last, size = math.inf, float(torch.linalg.norm(weight))
    for rho in RHOS:
        kept = keep_pairs(basis.lam, basis.mu, rho)
        once = project(weight, basis, kept)
        torch.testing.assert_close(project(once, basis, kept), once, rtol=0, atol=1e-13)
        assert float(torch.linalg.norm(once)) <= size * (1 + 1e-14)
        distance = float(torch.linalg.norm(once - weight))
        assert distance <= last
        assert distance**2 + float(torch.linalg.norm(once)) ** 2 == pytest.approx(size**2)
        last = distance


def test_an_orthogonal_change_of_the_inputs_commutes() -> None:
    """x -> Q x turns A into Q A Q^T and W into W Q^T; the edit turns with them, and so does G on the other side."""
    weight, basis, factor = problem(14, 18)
    kept = keep_pairs(basis.lam, basis.mu, 0.7)
    plain = project(weight, basis, kept)
    for side, n in (("a", 18), ("g", 14)):
        turn, _ = torch.linalg.qr(torch.randn(n, n, generator=generator(9), dtype=torch.float64))
        if side == "a":
            turned, other, expected = weight @ turn.T, Pair(turn @ factor.a @ turn.T, factor.g), plain @ turn.T
        else:
            turned, other, expected = turn @ weight, Pair(factor.a, turn @ factor.g @ turn.T), turn @ plain
        new = eigenbasis(other)
        again = keep_pairs(new.lam, new.mu, 0.7)
        assert torch.equal(again.counts, kept.counts)
        torch.testing.assert_close(project(turned, new, again), expected, rtol=0, atol=1e-11)


def test_a_transposed_problem_is_the_transposed_edit() -> None:
    weight, basis, factor = problem(11, 15)
    flipped = eigenbasis(Pair(factor.g, factor.a))
    one = project(weight, basis, keep_pairs(basis.lam, basis.mu, 0.8))
    other = project(weight.T, flipped, keep_pairs(flipped.lam, flipped.mu, 0.8))
    torch.testing.assert_close(one, other.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [2048, 4])
@pytest.mark.parametrize("positions_per_loss", [1.0, 3.5])
def test_the_predicted_rise_is_the_quadratic_form(
    side: int, positions_per_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1/2 vec(dW)^T (G (x) A) vec(dW) with the Kronecker product written out, vec row by row."""
    monkeypatch.setattr(kronecker, "DOUBLE_SIDE", side)
    weight, basis, factor = problem(8, 10)
    factor.g *= 1e-25  # squared gradients of a sure model; their products with float32 squares would underflow
    basis = eigenbasis(factor)
    kept = keep_pairs(basis.lam, basis.mu, 0.6)
    change = (project(weight, basis, kept) - weight).double().flatten()
    dense = torch.kron(factor.g, factor.a)
    expected = 0.5 * positions_per_loss * float(change @ dense @ change)
    rel = 1e-9 if basis.dtype == torch.float64 else 1e-4
    found = edit_figures(weight, basis, kept, positions_per_loss=positions_per_loss)
    assert found["predicted_rise"] == pytest.approx(expected, rel=rel, abs=0)
    norm = float(project(weight, basis, kept).double().square().sum() / weight.square().sum())
    assert found["kept_norm"] == pytest.approx(norm, rel=rel)
    mass = basis.lam[:, None] * basis.mu
    by_mass = edit_figures(weight, basis, kept.mask(), mass=mass, positions_per_loss=positions_per_loss)
    assert by_mass["predicted_rise"] == pytest.approx(expected, rel=rel, abs=0)


def test_a_zero_weight_loses_nothing() -> None:
    _, basis, _ = problem(4, 5)
    found = edit_figures(torch.zeros(4, 5), basis, keep_pairs(basis.lam, basis.mu, 0.5), points=0)
    assert found == {"kept_norm": 1.0, "predicted_rise": 0.0}


def test_coordinates_are_the_diagonal_frame() -> None:
    """In these coordinates a weight has the variance that the Kronecker factors say, and nothing else is mixed in."""
    weight, basis, _ = problem(5, 7)
    c = coordinates(weight, basis)
    for i, j in itertools.product(range(5), range(7)):
        assert float(c[i, j]) == pytest.approx(float(basis.u_g[:, i] @ weight @ basis.u_a[:, j]))


# --------------------------------------------------------------------------------------------------------------- curve


@pytest.mark.parametrize("by_mass", [False, True])
def test_curve_points_equal_the_sorted_products(by_mass: bool) -> None:
    _, basis, _ = problem(13, 9)
    mass = basis.lam[:, None] * basis.mu
    points = curve_points(basis, mass if by_mass else None, points=20)
    ordered = mass.flatten().sort(descending=True).values
    index = points["spectrum"]["index"]
    assert index[0] == 1
    assert index[-1] == 117
    assert points["spectrum"]["eigenvalue"] == pytest.approx([float(ordered[i - 1]) for i in index], rel=1e-12)
    assert points["curve"]["pairs"] == pytest.approx([i / 117 for i in index])
    sums = ordered.cumsum(0) / ordered.sum()
    assert points["curve"]["mass"] == pytest.approx([float(sums[i - 1]) for i in index], rel=1e-12)
    figures = edit_figures(torch.ones(13, 9), basis, keep_pairs(basis.lam, basis.mu, 0.5))
    assert set(figures) == {"kept_norm", "predicted_rise", "curve", "spectrum"}


def test_curve_points_of_a_spectrum_with_zeros_and_of_none() -> None:
    eye = torch.eye(3).double()
    basis = Basis(eye, torch.tensor([2.0, 1.0, 0.0]).double(), eye, torch.tensor([1.0, 0.0, 0.0]).double())
    points = curve_points(basis, points=12)
    assert points["spectrum"]["index"] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert points["spectrum"]["eigenvalue"] == [2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert points["curve"]["mass"] == pytest.approx([2 / 3, 1, 1, 1, 1, 1, 1, 1])
    nothing = Basis(eye, torch.zeros(3).double(), eye, torch.zeros(3).double())
    assert set(curve_points(nothing, points=5)["curve"]["mass"]) == {0.0}


def test_kept_is_a_staircase_of_its_counts() -> None:
    kept = Kept(torch.tensor([3, 1, 0]), 4, 9, 0.5, 0.9)
    assert kept.mask().tolist() == [[True, True, True], [True, False, False], [False, False, False]]
