r"""Learned bits: how much shorter a model's code of the records is than the code of someone who never saw them.

By arithmetic coding a model writes completion y after its prompt in -log2 p(y) bits. With a prior q that knows the
language, or the generator, but not the records,

    learned_i = H_i - code_i,    H_i = -log2 q(y_i),    code_i = -log2 p(y_i),

in bits, per record and per parameter of the model (arXiv 2404.05405, where the records are synthetic biographies and H
their exact entropy; about two bits per parameter is what long training reaches there). As code_i >= 0, no record gives
more than H_i, whatever the model. On average over records drawn from q a model that never saw them gives at most 0:
the expected value of log2 (p / q) is minus a Kullback-Leibler divergence.

Limits: a lower bound. Bits that other prompts would bring out are not counted. With a prior that is worse than the
language itself (`uniform_prior`, `unigram_prior`, a weak reference) knowing the language counts as learned too; only
the difference between two models, before and after an edit, is then about the records, and the prior cancels in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from torch import nn

from probes.errors import UsageError
from probes.likelihood import TokenTable
from probes.records import TokenRecord
from probes.statistics import Clusters, Estimate, Floats, mean_interval

SMOOTHING = 0.5  # added to every count of a unigram prior (Krichevsky and Trofimov's estimator)


@dataclass(frozen=True, slots=True)
class Bits:
    """Learned bits of a set of records.

    Attributes:
        frame: one row per record: record_id, n_tokens, prior_bits (H), code_bits (None where the model rules a token
            out), learned_bits.
        total: sum of learned_bits over the records; negative where the model is worse than the prior.
        prior_total: sum of H, which the total never exceeds.
        per_record: mean of learned_bits; "not resolvable" without records.
        per_parameter: total / parameters; None without a count of parameters.
        parameters: number of the model's parameters, or None.
        ruled_out: records with a token of probability 0. No code of the model's reaches them, so they are written in
            the prior's and count 0.
    """

    frame: pd.DataFrame
    total: float
    prior_total: float
    per_record: Estimate
    per_parameter: float | None
    parameters: int | None
    ruled_out: int

    def __repr__(self) -> str:
        return f"Bits(records={len(self.frame)}, total={self.total:.6g}, prior_total={self.prior_total:.6g})"


def bits(
    table: TokenTable,
    prior: TokenTable | ArrayLike,
    *,
    parameters: int | None = None,
    clusters: Clusters = None,
    level: float = 0.95,
    seed: int = 0,
) -> Bits:
    """Learned bits of the records of one pass.

    Args:
        table: one pass of the model over R records.
        prior: H_i of each record in bits, [R]: the exact entropy of a known generator, `uniform_prior` or
            `unigram_prior`; or the pass of a reference model over the same records.
        parameters: the model's number of parameters, see `parameter_count`.
        clusters: [R] near-duplicate clusters, None for a record of its own.
        level: confidence level.
        seed: of the interval.

    Returns:
        Per record, in all and per parameter.

    Raises:
        UsageError: a prior of other records, or one with negative or infinite bits; a count of parameters below 1.
    """
    if parameters is not None and parameters < 1:
        raise UsageError(f"expected at least one parameter, found {parameters}; see parameter_count")
    if isinstance(prior, TokenTable):
        if prior.record_ids != table.record_ids or not np.array_equal(prior.offsets, table.offsets):
            raise UsageError(
                f"expected the reference's pass over the same {len(table.record_ids)} records, found another; "
                "tokenise once and score both models"
            )
        expected = _code(prior)
    else:
        expected = np.asarray(prior, dtype=np.float64)
    bad = int((~(np.isfinite(expected) & (expected >= 0))).sum())
    if expected.shape != (len(table.record_ids),) or bad:
        raise UsageError(
            f"expected finite prior bits of at least 0 for {len(table.record_ids)} records, found {expected.size} with "
            f"{bad} others; use a prior that rules nothing out"
        )
    code = _code(table)  # [R]
    ruled_out = np.isinf(code)
    learned = np.where(ruled_out, 0.0, expected - np.where(ruled_out, 0.0, code))
    spent = [None if out else float(c) for c, out in zip(code, ruled_out, strict=True)]
    frame = pd.DataFrame(
        {
            "record_id": list(table.record_ids),
            "n_tokens": np.diff(table.offsets),
            "prior_bits": expected,
            "code_bits": pd.Series(spent, dtype=object),
            "learned_bits": learned,
        }
    )
    total = math.fsum(learned)
    if len(learned):
        mean = Estimate("ok", None, mean_interval(learned, clusters, level=level, seed=seed))
    else:
        mean = Estimate("not resolvable", "no records", None)
    return Bits(
        frame=frame,
        total=total,
        prior_total=math.fsum(expected),
        per_record=mean,
        per_parameter=None if parameters is None else total / parameters,
        parameters=parameters,
        ruled_out=int(ruled_out.sum()),
    )


def uniform_prior(table: TokenTable, vocabulary: int) -> Floats:
    """[R] bits of a code that spends log2 of the vocabulary on every completion token.

    Args:
        table: the pass that will be compared with it.
        vocabulary: number of tokens to choose from.

    Raises:
        UsageError: an empty vocabulary.
    """
    if vocabulary < 1:
        raise UsageError(f"expected a vocabulary of at least one token, found {vocabulary}")
    code: Floats = np.diff(table.offsets) * math.log2(vocabulary)
    return code


def unigram_prior(records: Sequence[TokenRecord], corpus: Sequence[TokenRecord], vocabulary: int) -> Floats:
    """[R] bits of a code that knows how frequent each token is in completions of other records, and nothing else.

    Args:
        records: R records to write.
        corpus: never-seen records of the same kind, tokenised alike; none of `records`.
        vocabulary: number of token ids; each count has `SMOOTHING` added, so no token is ruled out.

    Raises:
        UsageError: an empty corpus, or token ids outside the vocabulary.
    """
    if not corpus:
        raise UsageError("expected a corpus to count tokens in, found no records; pass never-seen records")
    highest = max(max(record.completion) for record in [*corpus, *records])
    if highest >= vocabulary:
        raise UsageError(f"expected token ids below {vocabulary}, found {highest}; use the checkpoint's own tokenizer")
    counts = np.full(vocabulary, SMOOTHING)  # [V]
    for record in corpus:
        np.add.at(counts, list(record.completion), 1.0)
    code = -np.log2(counts / counts.sum())
    return np.array([code[list(record.completion)].sum() for record in records], dtype=np.float64)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _code(table: TokenTable) -> Floats:
    """[R] -log2 p of each completion."""
    if not table.record_ids:
        return np.zeros(0)
    sums = np.add.reduceat(table.log_prob.astype(np.float64), table.offsets[:-1])
    code: Floats = np.maximum(-sums, 0.0) / math.log(2) + 0.0  # no negative zero
    return code
