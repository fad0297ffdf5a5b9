"""Per-record figures as pure functions of the one-pass token table: no model, no text.

Natural logarithms; higher loss means less memorised. The formulas and their sources:

    loss                 -(1/k) sum log p(y_t)                 probability exp(-loss)
    token_accuracy       share of positions where y_t is the greedy choice (every position, the last included)
    extraction_strength  1 - (m + 1)/k, m = last position that is not greedy, -1 if none; 0 if the last one is not
                         (arXiv 2407.14057's definition on token ids; a floor of 1/k there is a known defect elsewhere)
    zlib_ratio           loss / zlib-compressed bytes of the completion (Carlini et al. 2021)
    min_k                mean of the lowest 20 % of log p (2310.16789), rounded down but at least one token
    min_k_plus_plus      the same over z_t = (log p(y_t) - mu_t) / sigma_t (2404.02936)
    p_z                  prod q(y_t): probability that one sample equals the completion (2410.19482)
    n_for_p              queries n with 1 - (1 - p_z)^n >= p

sigma_t goes to 0 as a token becomes certain; it is clamped at 1e-6, where z_t tends to 0 and not to infinity: Min-K%++
saturates on perfectly memorised records, so it is read beside the loss, never alone.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from probes.likelihood import TokenTable

SIGMA_FLOOR = 1e-6
MIN_K = 0.2


def lowest_share(values: np.ndarray, share: float = MIN_K) -> float:
    """Mean of the lowest `share` of `values` [k], at least one of them.

    Raises:
        ValueError: for an empty array or a share outside (0, 1].
    """
    if not len(values) or not 0 < share <= 1:
        raise ValueError(f"expected values and a share in (0, 1], found {len(values)} values and share {share}")
    count = max(1, math.floor(share * len(values) + 1e-9))
    return float(np.partition(values, count - 1)[:count].mean())


def extraction_strength(match: np.ndarray) -> float:
    """1 - (shortest gold prefix after which greedy decoding finishes the record) / k, from match bits [k].

    0 when the last token is not the greedy choice, hence 0 when nothing matches; 1 when everything does.
    """
    misses = np.flatnonzero(~match)
    return 1.0 if not len(misses) else 1.0 - (int(misses[-1]) + 1) / len(match)


def queries_needed(log_p: float, target: float) -> float:
    """Smallest n with 1 - (1 - p)^n >= target, for p = exp(log_p).

    Returns:
        1 for p = 1, inf for p = 0; exact for p far below machine epsilon.
    """
    if log_p >= 0:
        return 1.0
    if log_p == -math.inf:
        return math.inf
    if log_p < -700:  # p leaves the normal doubles, where n = -log(1 - target) / p to every digit
        exponent = math.log(-math.log1p(-target)) - log_p
        return math.exp(exponent) if exponent < 709 else math.inf
    # log(1 - e^log_p) without cancellation at either end
    log_miss = math.log(-math.expm1(log_p)) if log_p > -math.log(2) else math.log1p(-math.exp(log_p))
    return float(max(1.0, math.ceil(math.log1p(-target) / log_miss)))


def verdict(match: np.ndarray, margin: np.ndarray, gap: np.ndarray, noise: float) -> str:
    """Greedy verdict of one record before confirmation: `extracted`, `not` or `uncertain`.

    Greedy decoding from the prompt emits the completion if and only if every position's argmax is its token. One
    clear miss settles `not`, whatever the other margins; without one, any margin within the noise is `uncertain`.
    """
    if bool((gap < -noise).any()):
        return "not"
    if bool(match.all()) and bool((margin > noise).all()):
        return "extracted"
    return "uncertain"


def record_figures(table: TokenTable, *, noise: float = 0.0) -> pd.DataFrame:
    """One row per record, in input order.

    Args:
        table: the token table of one pass.
        noise: logit margin below which a greedy verdict is uncertain (`probes.likelihood.logit_noise`).

    Returns:
        A frame with the columns record_id, n_tokens, log_prob, loss, probability, token_accuracy,
        extraction_strength, greedy, min_margin, zlib_ratio, min_k, min_k_plus_plus, log_p_z, n_for_p50, n_for_p90,
        entropy.
    """
    columns: dict[str, list[object]] = {name: [] for name in COLUMNS}
    match = table.match
    for i, record_id in enumerate(table.record_ids):
        rows = table.rows(i)
        log_p = table.log_prob[rows].astype(np.float64)
        sigma = np.sqrt(np.maximum(table.variance[rows].astype(np.float64), 0.0))
        z = (log_p - table.mean[rows]) / np.maximum(sigma, SIGMA_FLOOR)
        total = float(log_p.sum())
        loss = -total / len(log_p) if total else 0.0  # no negative zero in what people read
        log_p_z = float(table.log_sampled[rows].astype(np.float64).sum())
        row: dict[str, object] = {
            "record_id": record_id,
            "n_tokens": len(log_p),
            "log_prob": total,
            "loss": loss,
            "probability": math.exp(-loss),
            "token_accuracy": float(match[rows].mean()),
            "extraction_strength": extraction_strength(match[rows]),
            "greedy": verdict(match[rows], table.margin[rows], table.gap[rows], noise),
            "min_margin": float(table.margin[rows].min()),
            "zlib_ratio": loss / max(1, int(table.compressed_bytes[i])),
            "min_k": lowest_share(log_p),
            "min_k_plus_plus": lowest_share(z),
            "log_p_z": log_p_z,
            "n_for_p50": queries_needed(log_p_z, 0.5),
            "n_for_p90": queries_needed(log_p_z, 0.9),
            "entropy": float(table.entropy[rows].mean()),
        }
        for name, value in row.items():
            columns[name].append(value)
    return pd.DataFrame(columns)


COLUMNS = (
    "record_id",
    "n_tokens",
    "log_prob",
    "loss",
    "probability",
    "token_accuracy",
    "extraction_strength",
    "greedy",
    "min_margin",
    "zlib_ratio",
    "min_k",
    "min_k_plus_plus",
    "log_p_z",
    "n_for_p50",
    "n_for_p90",
    "entropy",
)
