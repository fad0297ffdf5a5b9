"""SVD truncation against the best approximation of that rank, and its identities."""

from __future__ import annotations

import math

import pytest
import torch

from probes.curvature import svd
from probes.curvature.svd import kept_rank, svd_truncate
from probes.errors import UsageError


def weight(p: int, q: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(p, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("p", "q"), [(12, 7), (7, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.9])
def test_truncation_removes_the_smallest_singular_values(p: int, q: int, fraction: float) -> None:
    """By the eigenvectors of the Gram matrix: another route to the same subspace."""
    w = weight(p, q)
    rank = max(1, math.ceil(fraction * min(p, q)))
    _, v = torch.linalg.eigh(w.T @ w)
    top = v[:, -rank:]
    found = svd_truncate(w, fraction)
    torch.testing.assert_close(found, w @ top @ top.T, rtol=0, atol=1e-12)
    assert int(torch.linalg.matrix_rank(found)) == rank
    s = torch.linalg.svdvals(w)
    assert float(torch.linalg.norm(w - found)) == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-12)
    torch.testing.assert_close(svd_truncate(found, fraction), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(svd_truncate(w.T, fraction), found.T, rtol=0, atol=1e-12)


def test_all_of_them_is_the_weight_itself() -> None:
    w = weight(5, 8)
    assert svd_truncate(w, 1) is w
    assert svd_truncate(w, 0.95) is w  # a share of 5 values is rounded up


def test_ranks() -> None:
    assert [kept_rank(10, 20, fraction) for fraction in (1e-9, 0.1, 0.7, 0.71, 1, 1.0)] == [1, 1, 7, 8, 10, 10]
    assert 0.07 * 100 > 7
    assert kept_rank(200, 100, 0.07) == 7


@pytest.mark.parametrize("fraction", [0, -1, 1.01, math.nan, True, "0.5"])
def test_other_fractions_are_refused(fraction: object) -> None:
    with pytest.raises(UsageError, match="above 0 and up to 1"):
        svd_truncate(weight(3, 3), fraction)  # type: ignore[arg-type]


def test_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert svd_truncate(weight(6, 4).bfloat16(), 0.5).dtype == torch.float64
    exact = svd_truncate(weight(6, 4), 0.5)
    monkeypatch.setattr(svd, "DOUBLE_SIDE", 5)
    rough = svd_truncate(weight(6, 4), 0.5)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=1e-5)
