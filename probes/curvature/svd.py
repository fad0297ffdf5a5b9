"""Rank truncation of a weight by its singular values: the baseline that looks at no data.

    W = U diag(s) V^T,     W' = sum_{i <= k} s_i u_i v_i^T,     k = ceil(fraction min(p, q))

the closest matrix of rank k (Eckart and Young). The curvature edit of arXiv 2510.24256 is compared with it: a cut that
hurts memorised text more than other text without looking at any is the least that a curvature has to beat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probes.curvature.kronecker import DOUBLE_SIDE
from probes.errors import UsageError


def kept_rank(p: int, q: int, fraction: float) -> int:
    """How many singular values of a [p, q] matrix a fraction of them is, at least one.

    Raises:
        UsageError: for a fraction outside (0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise UsageError("expected a fraction of the singular values above 0 and up to 1, found another value")
    return max(1, math.ceil(fraction * min(p, q) - 1e-9))  # 0.07 * 100 is a little above 7


def svd_truncate(weight: Tensor, fraction: float) -> Tensor:
    """The weight with only its largest singular values.

    Where the cut falls between equal singular values, which of their vectors stay is the solver's choice.

    Args:
        weight: [p, q]; not modified.
        fraction: share of the singular values to keep, in (0, 1].

    Returns:
        [p, q]; `weight` itself if all are kept, and else float64 up to a side of 2048 and float32 above.

    Raises:
        UsageError: for another fraction.
    """
    p, q = weight.shape
    rank = kept_rank(p, q, fraction)
    if rank == min(p, q):
        return weight
    dtype = torch.float64 if max(p, q) <= DOUBLE_SIDE else torch.float32
    u, s, vh = torch.linalg.svd(weight.detach().to(dtype), full_matrices=False)
    truncated: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]  # [p, k] [k, q]
    return truncated
