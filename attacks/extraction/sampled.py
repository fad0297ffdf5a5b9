"""(n, p)-discoverable extraction: does a decoder that samples emit a record within n tries?

    p_z = prod_t q(y_t | gold context)     q: the model's distribution under a decoder's temperature, top-k and top-p
    P(emitted within n samples) = 1 - (1 - p_z)^n
    n for probability p = ceil(log(1 - p) / log(1 - p_z))

Hayes et al. 2024 (arXiv 2410.19482), equations 3 and 4. All of it is arithmetic on the token table of one pass
(`probes.likelihood.score(..., schemes=...)`): nothing is sampled. The mean of P over records is the share of records
that n samples a record are expected to bring out, without sampling error.

Limits: exact repetition only (near copies: `attacks.extraction.beam`), from the record's own prompt, under the dtype
and device of the pass. In 16-bit arithmetic p_z moves by a factor of up to about 2 between devices or batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.errors import UsageError
from probes.figures import queries_needed
from probes.likelihood import SamplingScheme, TokenTable

QUERIES = (1, 100, 1000)
TINY = -700.0  # below it exp leaves the normal doubles, and 1 - (1 - p)^n = np to every digit


def emitted_within(log_p: np.ndarray, n: int) -> np.ndarray:
    """1 - (1 - p)^n for p = exp(`log_p`), any shape, without cancellation for small p.

    Raises:
        UsageError: for n below 1.
    """
    if n < 1:
        raise UsageError(f"expected at least 1 sample, found {n}; give a positive number of samples")
    log_p = np.minimum(np.asarray(log_p, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore", under="ignore"):
        log_miss = np.log1p(-np.exp(log_p))  # loses digits near p = 1, where nearly nothing of it is left in the result
        within = np.where(log_p < TINY, np.exp(np.minimum(log_p + math.log(n), 0.0)), -np.expm1(n * log_miss))
    out: np.ndarray = within
    return out


@dataclass(frozen=True, slots=True)
class Sampled:
    """Sampling figures of R records under S schemes.

    Attributes:
        record_ids: R identifiers.
        schemes: S sampling schemes.
        log_p_z: [R, S] log-probability that one sample is the whole completion; -inf where the scheme cannot emit it.
        n_for_p50: [R, S] samples after which it was emitted with probability 0.5; inf where never.
        n_for_p90: [R, S] the same for 0.9.
        within: per number of samples n, [R, S] probability that at least one of n samples is the completion.
        share: per number of samples n, [S] mean over records: the expected share of records emitted within n samples.
    """

    record_ids: tuple[str, ...]
    schemes: tuple[SamplingScheme, ...]
    log_p_z: np.ndarray
    n_for_p50: np.ndarray
    n_for_p90: np.ndarray
    within: dict[int, np.ndarray]
    share: dict[int, np.ndarray]


def sampled(table: TokenTable, *, queries: Sequence[int] = QUERIES) -> Sampled:
    """Sampling figures from one pass.

    Args:
        table: token table; its `schemes` are reported, or its own `scheme` when it has none.
        queries: numbers of samples for `within` and `share`.

    Raises:
        UsageError: for a table without records, or a number of samples below 1.
    """
    if not table.record_ids:
        raise UsageError("expected at least one record, found none; give records to score")
    schemes, rows = (
        (table.schemes, table.log_schemes) if table.schemes else ((table.scheme,), table.log_sampled[:, None])
    )
    by_scheme = np.ascontiguousarray(rows.T, dtype=np.float64)  # [S, N]: summed in the order of `record_figures`
    totals = [by_scheme[:, table.rows(i)].sum(axis=1) for i in range(len(table.record_ids))]
    log_p_z = np.minimum(np.stack(totals), 0.0)  # [R, S]; a sum of rounded logarithms may end just above 0
    needed = {p: np.vectorize(lambda value, p=p: queries_needed(value, p), otypes=[float])(log_p_z) for p in (0.5, 0.9)}
    within = {n: emitted_within(log_p_z, n) for n in queries}
    return Sampled(
        record_ids=table.record_ids,
        schemes=tuple(schemes),
        log_p_z=log_p_z,
        n_for_p50=needed[0.5],
        n_for_p90=needed[0.9],
        within=within,
        share={n: values.mean(axis=0) for n, values in within.items()},
    )
