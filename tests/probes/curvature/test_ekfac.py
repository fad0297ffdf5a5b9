"""Corrected masses against sums over single tokens, and what the correction is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from probes.curvature.ekfac import corrected_masses
from probes.curvature.factors import Factor, KroneckerFactors, kronecker_factors
from probes.curvature.kronecker import Basis, eigenbasis
from probes.errors import ResourceError, UsageError
from probes.records import ImageRecord, TokenRecord
from tests.probes.curvature.test_factors import same
from tests.probes.curvature.test_taps import classifier, exact, heard
from tests.probes.test_fisher import Convolutions, Perceptron, images, plain, texts
from tests.tiny import causal_lm

F64 = torch.float64


def bases_of(found: KroneckerFactors) -> dict[str, Basis]:
    return {key: eigenbasis(factor) for key, factor in found.factors.items()}


def per_token(model: nn.Module, records: list, key: str, basis: Basis, positions: str = "all") -> Tensor:
    """[p, q], one token after the other, from records that run alone and with gold labels."""
    total = torch.zeros(len(basis.u_g), len(basis.u_a), dtype=F64)
    n = 0
    for i in range(len(records)):
        found = heard(model, records, [key], [[i]], positions=positions).get(key)
        for x, g in zip(found[0], found[1], strict=True) if found else ():
            gradient = torch.outer(g.to(F64), x)  # of this token, [p, q]
            total += (basis.u_g.T @ gradient @ basis.u_a).square()
            n += 1
    return total / max(n, 1)


@pytest.mark.parametrize(
    ("model", "records", "modules", "positions"),
    [
        (exact("gpt2"), texts(5), ["*.h.1.attn.*", "*.h.2.mlp.*"], "all"),
        (exact("llama"), texts(5), ["*.layers.1.self_attn.*"], "predicting"),
        (exact("mixtral"), texts(5), ["*.layers.1.mlp.experts.*.0", "*.layers.0.mlp.gate"], "all"),
        (plain(Convolutions), images(4, side=9), ["body.*"], "all"),
        (classifier("vit"), images(4), ["*.layers.0.mlp.*"], "first"),
    ],
    ids=["gpt2", "llama", "mixtral", "convolutions", "vit"],
)
def test_masses_equal_the_sum_over_single_tokens(
    model: nn.Module, records: list, modules: list[str], positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probes.taps.PATCH_ELEMENTS", 1000)
    found = kronecker_factors(model, records, modules=modules, labels="gold", positions=positions)
    bases = bases_of(found)
    masses = corrected_masses(model, records, found, bases, batch_tokens=30)
    assert masses.keys() == found.factors.keys()
    for key, mass in masses.items():
        same(mass, per_token(model, records, key, bases[key], positions), 1e-5)
        assert mass.dtype == F64


def test_ekfac_is_closer_to_the_fisher_information_than_kfac() -> None:
    """One position a record, so the layer's Fisher information is a mean of outer products, written out in full."""
    model, records = plain(Perceptron), images(12, side=2)
    found = kronecker_factors(model, records, modules=["one"], labels="gold")
    factor, basis = found.factors["one"], eigenbasis(found.factors["one"])
    mass = corrected_masses(model, records, found, {"one": basis})["one"]
    x, g, _ = heard(model, records, ["one"])["one"]
    vectors = torch.einsum("np,nq->npq", g, x).flatten(1)  # [n, p q]
    fisher = vectors.T @ vectors / len(vectors)
    axes = torch.kron(basis.u_g.contiguous(), basis.u_a.contiguous())  # [p q, p q], columns in the order of mass
    kfac = torch.kron(factor.g, factor.a)
    torch.testing.assert_close(axes @ torch.diag(torch.outer(basis.lam, basis.mu).flatten()) @ axes.T, kfac)
    ekfac = axes @ torch.diag(mass.flatten()) @ axes.T
    assert float((fisher - ekfac).norm()) < 0.98 * float((fisher - kfac).norm())
    best = (axes.T @ fisher @ axes).diagonal()  # the closest of all diagonals in this basis
    torch.testing.assert_close(mass.flatten(), best)
    assert float(mass.sum()) == pytest.approx(float(fisher.trace()))


@pytest.mark.parametrize("seed", [0, 7])
def test_labels_are_drawn_as_for_the_factors(seed: int) -> None:
    """With one position, x and g are what A and G are made of, so the correction changes nothing."""
    model = exact("gpt2")
    records = [TokenRecord("a", (5, 6), 1, 1)]
    found = kronecker_factors(model, records, modules=["*.h.2.*"], seed=seed)
    for key, mass in corrected_masses(model, records, found, bases_of(found)).items():
        basis = eigenbasis(found.factors[key])
        same(mass, torch.outer(basis.lam, basis.mu))
    other = kronecker_factors(model, records, modules=["*.h.2.*"], seed=seed + 1)
    wrong = corrected_masses(model, records, other, bases_of(found))[key]
    assert not torch.allclose(wrong, torch.outer(basis.lam, basis.mu), rtol=1e-2)


def test_a_memory_budget_and_batches_change_nothing() -> None:
    model, records = exact("llama"), texts(6)
    found = kronecker_factors(model, records, labels="gold")
    bases = bases_of(found)
    whole = corrected_masses(model, records, found, bases)
    progress: list[tuple[int, int]] = []
    some = corrected_masses(
        model, records, found, bases, memory_bytes=150_000, batch_tokens=1, progress=lambda *at: progress.append(at)
    )
    assert progress[-1][0] == progress[-1][1] > 2 * len(records)
    for key, mass in whole.items():
        same(some[key], mass, 1e-4)
    only = corrected_masses(model, records, found, {key: bases[key]}, batch_tokens=1)
    assert list(only) == [key]
    same(only[key], whole[key], 1e-4)
    with pytest.raises(ResourceError, match="found 1000"):
        corrected_masses(model, records, found, bases, memory_bytes=1000)


def test_inputs_shared_with_their_basis_are_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = exact("llama"), texts(3)
    found = kronecker_factors(model, records, modules=["*.layers.1.mlp.*"], labels="gold")
    bases = bases_of(found)
    gate, up = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))
    expected = corrected_masses(model, records, found, bases)
    bases[up] = Basis(u_g=bases[up].u_g, lam=bases[up].lam, u_a=bases[gate].u_a, mu=bases[gate].mu)
    calls: list[int] = []
    from probes.curvature import ekfac

    original = ekfac._Masses._squares
    monkeypatch.setattr(ekfac._Masses, "_squares", lambda self, *args: calls.append(1) or original(self, *args))
    shared = corrected_masses(model, records, found, bases)
    assert len(calls) == 5  # three outputs, two inputs
    for key, mass in expected.items():
        same(shared[key], mass)


def test_low_precision_models_give_single_precision_masses() -> None:
    records = texts(4)
    model, low = causal_lm("llama"), causal_lm("llama", dtype=torch.bfloat16)
    found = kronecker_factors(model, records, modules=["*.mlp.*"], labels="gold")
    bases = bases_of(found)
    reference = corrected_masses(model, records, found, bases)
    for other in (
        corrected_masses(low, records, found, bases),
        corrected_masses(model, records, found, bases, compute_dtype=torch.bfloat16),
    ):
        for key, mass in reference.items():
            assert other[key].dtype == torch.float32
            assert float((other[key] - mass).norm() / mass.norm()) < 0.2


def test_wrong_arguments_end_in_one_line() -> None:
    model, records = causal_lm("llama"), texts(2)
    found = kronecker_factors(model, records, modules=["*.layers.0.mlp.*"])
    bases = bases_of(found)
    key, basis = next(iter(bases.items()))
    empty: list[ImageRecord] = []
    for arguments in ((records, found, {}), (empty, found, bases)):
        with pytest.raises(UsageError, match="records and bases"):
            corrected_masses(model, *arguments)
    with pytest.raises(UsageError, match="one for lm_head"):
        corrected_masses(model, records, found, {"lm_head": basis})
    turned = Basis(u_g=basis.u_a, lam=basis.mu, u_a=basis.u_g, mu=basis.lam)
    with pytest.raises(UsageError, match=rf"one for {key} of shape \(32, 48\)"):
        corrected_masses(model, records, found, {key: turned})
    assert isinstance(found.factors[key], Factor)
