r"""Membership scores: pure functions of token tables, one number a record, higher = more likely a member.

With l_t = log p(y_t) over a record's k completion tokens (fewer than k cannot happen: a record has at least one), mean
m = (1/k) sum_t l_t, and loss NLL = -m:

    loss          m                                                                        Yeom et al., 1709.01604
    zlib          sum_t l_t / zlib-compressed bytes of the completion                      Carlini et al., 2012.07805
    lowercase     m - m(the record in lower case)                                          2012.07805
    min_k         mean of the lowest 20 % of l_t                                           2310.16789
    min_k++       the same over (l_t - mu_t) / sigma_t                                     2404.02936
    surprising    mean of those l_t among the lowest 20 % whose entropy is below 2 nats    SURP, 2407.21248
    recall        NLL(record after never-seen records) / NLL                               ReCaLL, 2406.15968
    con_recall    (NLL(after never-seen) - gamma NLL(after members)) / NLL                 CON-ReCaLL, 2409.03363
    reference     m - m under a reference model                                            2111.08440
    windows       share of token windows whose loss is below the reference's               WBC, 2601.02751
    rmia          share of population records z with [p(x)/q(x)] / [p(z)/q(z)] >= gamma    RMIA, 2312.03262, offline
                  q = ((1 + a) p_reference + (1 - a)) / 2, p = exp(mean log-probability)
    token_ratio   l_t - l_t under the reference, per token                                 first term of 2510.05582
    gradient      minus the norm of the loss gradient, see `attacks.membership.gradient`   2402.17012

Every score is finite. A token the model cannot emit (log p = -inf) counts as log p = -1e4; a spread sigma_t below 1e-6
and a loss beside which a ratio would explode (perfectly memorised: 0) are held away from zero. A NaN in a table is an
error, never a score: leaving the record out would change which records the figures are about.

The two sums of the zlib score are both totals. Elsewhere the loss is a mean and the bytes are a total, and the score
then mostly measures length.

Limits: Min-K%++ tends to 0, not to its maximum, for a perfectly memorised token, and ReCaLL to 1; read both beside the
loss. One score ranks records; it says nothing of a single one without never-seen records to compare with
(`attacks.membership.flagged`), and nothing at all where the two sets differ by more than membership
(`attacks.membership.blind`).

Shape letters: R records, N tokens in all, Z population records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from probes.errors import UsageError
from probes.figures import MIN_K, SIGMA_FLOOR, lowest_share
from probes.likelihood import FLOOR, TokenTable
from probes.records import TokenRecord

Floats = NDArray[np.float64]
LogProbs = TokenTable | ArrayLike  # a table, or [R] log-probabilities of labels

LOSS_FLOOR = 1e-6  # nats a token; fp32 log-probabilities near 0 are not finer than 1e-7
MAX_ENTROPY = 2.0  # nats; SURP's value
WINDOW_SIZES = tuple(int(size) for size in np.unique(np.geomspace(2, 40, 10).round()))  # WBC: ten sizes, 2 to 40


# ------------------------------------------------------------------------------------------------------ one table


def loss(table: TokenTable) -> Floats:
    """[R] mean log-probability of the completion, in nats a token: minus the loss."""
    return _means(table, _log_prob(table))


def zlib(table: TokenTable) -> Floats:
    """[R] log-probability of the completion over its zlib-compressed bytes, in nats a byte."""
    per_byte: Floats = _sums(table, _log_prob(table)) / np.maximum(table.compressed_bytes, 1)
    return per_byte


def min_k(table: TokenTable, share: float = MIN_K) -> Floats:
    """[R] mean of the lowest `share` of a record's log-probabilities, at least one of them."""
    _check_share(share)
    return _each(table, lambda log_p: lowest_share(log_p, share), _log_prob(table))


def min_k_plus_plus(table: TokenTable, share: float = MIN_K) -> Floats:
    """[R] mean of the lowest `share` of log-probabilities standardised over the vocabulary, at least one of them."""
    _check_share(share)
    sigma = np.sqrt(np.maximum(_column(table, table.variance), 0.0))
    mean = _column(table, table.mean)
    return _each(table, lambda z: lowest_share(z, share), (_log_prob(table) - mean) / np.maximum(sigma, SIGMA_FLOOR))


def surprising(table: TokenTable, share: float = MIN_K, max_entropy: float = MAX_ENTROPY) -> Floats:
    """[R] mean log-probability of tokens that the model was sure of and got wrong.

    Args:
        table: the records.
        share: candidates are the lowest `share` of a record's log-probabilities, at least one, ties included.
        max_entropy: in nats; of those, tokens with less entropy count. The entropy depends on the vocabulary.

    Returns:
        The mean; of all candidates where none is that certain: zero, the highest score, would call every record a
        member for a model that is unsure throughout.

    Raises:
        UsageError: a table with NaN, or a share outside (0, 1].
    """
    _check_share(share)

    def one(log_p: Floats, entropy: Floats) -> float:
        count = max(1, int(share * len(log_p) + 1e-9))
        lowest = log_p <= np.partition(log_p, count - 1)[count - 1]
        chosen = lowest & (entropy < max_entropy)
        return float(log_p[chosen if chosen.any() else lowest].mean())

    return _each(table, one, _log_prob(table), -_column(table, table.mean))


# ---------------------------------------------------------------------------------- tables of changed or longer inputs


def lowercase(table: TokenTable, lower: TokenTable) -> Floats:
    """[R] what writing a record in lower case costs, in nats a token.

    Args:
        table: the records.
        lower: the same records in lower case, in the same order; another number of tokens is fine.

    Raises:
        UsageError: tables of other records.
    """
    _same_records(table, lower)
    return loss(table) - loss(lower)


def recall(table: TokenTable, prefixed: TokenTable | Floats) -> Floats:
    """[R] by which factor never-seen context worsens the loss: a member has more to lose.

    Args:
        table: the records.
        prefixed: the same completions after never-seen records (`prefixed_records`), or [R] log-probabilities of these
            completions, as `probes.sharedprefix` gives them without running the context again for every record.

    Raises:
        UsageError: tables of other records, or another number of log-probabilities.
    """
    if isinstance(prefixed, TokenTable):
        _same_records(table, prefixed)
        behind = loss(prefixed)
    else:
        totals = _checked(prefixed, "log-probabilities")
        if len(totals) != len(table.record_ids):
            raise UsageError(f"expected {len(table.record_ids)} log-probabilities, found {len(totals)}; score again")
        behind = totals / np.diff(table.offsets)
    return (LOSS_FLOOR - behind) / (LOSS_FLOOR - loss(table))


def con_recall(table: TokenTable, prefixed_non: TokenTable, prefixed_members: TokenTable, gamma: float = 0.5) -> Floats:
    """[R] ReCaLL minus `gamma` times the same after members; 0 is plain ReCaLL.

    Args:
        table: the records.
        prefixed_non: their completions after never-seen records.
        prefixed_members: their completions after records that are members and are not scored.
        gamma: weight of the second; to be chosen on records that are not reported, if at all.

    Raises:
        UsageError: tables of other records.
    """
    _same_records(table, prefixed_non, prefixed_members)
    contrast = (LOSS_FLOOR - loss(prefixed_non)) - gamma * (LOSS_FLOOR - loss(prefixed_members))
    return contrast / (LOSS_FLOOR - loss(table))


def prefixed_records(
    records: Sequence[TokenRecord], shots: Sequence[TokenRecord], max_length: int | None = None, *, keep: int = 0
) -> list[TokenRecord]:
    """Records with other records before them, for ReCaLL: same completions, longer conditioning.

    Args:
        records: what is scored.
        shots: what stands before each of them, in this order; never-seen records (or, for CON-ReCaLL, members) that
            are not scored themselves.
        max_length: tokens a record may have; the prefix loses its first tokens where it must.
        keep: leading tokens that open every record (1 for a BOS): they stay in front and are not repeated inside.

    Returns:
        Records with the same identifiers, completions, compressed sizes and groups.

    Raises:
        UsageError: no shots, a shot that is scored too, or records that leave no room for a prefix.
    """
    if not shots:
        raise UsageError("expected records to set before others, found none; give never-seen records")
    names, bodies = {record.record_id for record in records}, {record.ids for record in records}
    if scored := sum(shot.record_id in names or shot.ids in bodies for shot in shots):
        raise UsageError(f"expected shots that are not scored, found {scored} that are; take them out of one list")
    prefix = tuple(token for shot in shots for token in shot.ids[keep:])
    full = sum(max_length is not None and len(record.ids) >= max_length for record in records)
    if full or not prefix:
        raise UsageError(
            f"expected room for a prefix, found {full} records of {max_length} tokens or more and a prefix of "
            f"{len(prefix)}; raise the maximum length or shorten the records"
        )
    out = []
    for record in records:
        room = len(prefix) if max_length is None else min(len(prefix), max_length - len(record.ids))
        ids = record.ids[:keep] + prefix[len(prefix) - room :] + record.ids[keep:]
        out.append(TokenRecord(record.record_id, ids, record.n_prompt + room, record.compressed_bytes, record.group))
    return out


# ----------------------------------------------------------------------------------------------- with a reference model


def token_ratio(table: TokenTable, ref: TokenTable) -> Floats:
    """[N] log p(y_t) under the model minus that under the reference, per token: where the leak sits.

    Raises:
        UsageError: tables of other records or other tokens.
    """
    _same_rows(table, ref)
    return _log_prob(table) - _log_prob(ref)


def reference(table: LogProbs, ref: LogProbs) -> Floats:
    """[R] mean log-probability under the model minus that under a reference that never held the records.

    Args:
        table: the records, or [R] log-probabilities of labels.
        ref: the same under the reference.

    Raises:
        UsageError: tables of other records or other tokens.
    """
    if isinstance(table, TokenTable) and isinstance(ref, TokenTable):
        _same_rows(table, ref)
    return np.subtract(*_pair(table, ref))


def windows(table: TokenTable, ref: TokenTable, sizes: Sequence[int] = WINDOW_SIZES) -> Floats:
    """[R] share of windows of consecutive tokens on which the model beats the reference, averaged over sizes.

    Args:
        table: the records.
        ref: the same under the reference.
        sizes: window lengths in tokens. A record shorter than a window does without it; one shorter than all of them
            is a single window.

    Returns:
        In [0, 1]; a tie counts half, so that a model equal to its reference scores 0.5.

    Raises:
        UsageError: tables of other records or other tokens, or sizes that are not positive.
    """
    if not sizes or min(sizes) < 1:
        raise UsageError(f"expected window sizes of at least 1, found {list(sizes)}; leave them out for the default")

    def one(ratios: Floats) -> float:
        total = np.concatenate([[0.0], np.cumsum(ratios)])
        fitting = [size for size in sizes if size <= len(ratios)] or [len(ratios)]
        gains = (total[size:] - total[:-size] for size in fitting)
        return float(np.mean([((gain > 0) + 0.5 * (gain == 0)).mean() for gain in gains]))

    return _each(table, one, token_ratio(table, ref))


def rmia(
    table: LogProbs,
    ref: LogProbs,
    population: LogProbs,
    population_ref: LogProbs,
    *,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Floats:
    """[R] share of population records over which a record's likelihood ratio dominates by the factor `gamma`.

    Args:
        table: the records, or [R] log-probabilities of labels.
        ref: the same under the reference.
        population: [Z] never-seen records of the same kind, not scored; they set the resolution, 1 / Z.
        population_ref: the same under the reference.
        a: how far the reference's probability stands for that of a model that might have seen the record: 1 as it
            is, 0 half of it replaced by 1. 0.3 is the paper's value for data sets of natural images.
        gamma: the factor.

    Raises:
        UsageError: no population, tables of other records or tokens, a outside [0, 1], or gamma not positive.
    """
    if not 0 <= a <= 1 or not gamma > 0:
        raise UsageError(f"expected a in [0, 1] and a positive gamma, found {a} and {gamma}")

    def log_ratio(model: LogProbs, other: LogProbs) -> Floats:
        if isinstance(model, TokenTable) and isinstance(other, TokenTable):
            _same_rows(model, other)
        log_p, log_out = _pair(model, other)
        with np.errstate(divide="ignore"):
            log_q = np.logaddexp(log_out + np.log((1 + a) / 2), np.log((1 - a) / 2))
        ratio: Floats = log_p - log_q
        return ratio

    others = np.sort(log_ratio(population, population_ref))  # [Z]
    if not len(others):
        raise UsageError("expected population records to compare with, found none; give never-seen records")
    dominated = np.searchsorted(others, log_ratio(table, ref) - np.log(gamma), side="right")
    share: Floats = dominated / len(others)
    return share


# ------------------------------------------------------------------------------------------------- image classifiers


def image_scores(frame: pd.DataFrame) -> dict[str, Floats]:
    """Scores of images from the figures of `probes.classify.score_images`.

    Args:
        frame: with the columns loss, margin and entropy.

    Returns:
        loss: log-probability of the label; margin: its logit minus the best other; entropy: minus that of the
        prediction (Salem et al., 1806.01246; needs no label). Each [R] and finite; pass "loss" to `reference`
        and `rmia` as log-probabilities.

    Raises:
        UsageError: columns that are missing or hold NaN.
    """
    if missing := [name for name in ("loss", "margin", "entropy") if name not in frame]:
        raise UsageError(f"expected the columns loss, margin and entropy, found none named {', '.join(missing)}")
    signs = {"loss": -1.0, "margin": 1.0, "entropy": -1.0}
    columns = {name: sign * _checked(frame[name].to_numpy(np.float64), name) for name, sign in signs.items()}
    return {name: np.clip(column, FLOOR, -FLOOR) + 0.0 for name, column in columns.items()}


# ---------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True, slots=True)
class Score:
    """One membership score.

    Attributes:
        name: as in figures and settings.
        title: as in a report.
        needs: fields of `Inputs` it reads.
        source: the paper's identifier at arXiv.
    """

    name: str
    title: str
    needs: frozenset[str]
    source: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """What scores can be computed from; None where it is not to be had.

    Attributes:
        table: the records.
        lower: the records in lower case.
        prefixed: the records after never-seen ones.
        prefixed_members: the records after members.
        reference: the records under the reference.
        population: (never-seen records, the same under the reference).
        gradient: [R] of `attacks.membership.gradient.gradient_norm`.
    """

    table: TokenTable | None = field(default=None, repr=False)
    lower: TokenTable | None = field(default=None, repr=False)
    prefixed: TokenTable | None = field(default=None, repr=False)
    prefixed_members: TokenTable | None = field(default=None, repr=False)
    reference: TokenTable | None = field(default=None, repr=False)
    population: tuple[TokenTable, TokenTable] | None = field(default=None, repr=False)
    gradient: Floats | None = field(default=None, repr=False)


def _score(name: str, title: str, source: str, *needs: str) -> tuple[str, Score]:
    return name, Score(name, title, frozenset(needs), source)


SCORES: Mapping[str, Score] = dict(
    [
        _score("loss", "Loss", "1709.01604", "table"),
        _score("zlib", "Loss over compressed size", "2012.07805", "table"),
        _score("min_k", "Min-K%", "2310.16789", "table"),
        _score("min_k_plus_plus", "Min-K%++", "2404.02936", "table"),
        _score("surprising", "Surprising tokens", "2407.21248", "table"),
        _score("lowercase", "Lower case", "2012.07805", "table", "lower"),
        _score("recall", "ReCaLL", "2406.15968", "table", "prefixed"),
        _score("con_recall", "CON-ReCaLL", "2409.03363", "table", "prefixed", "prefixed_members"),
        _score("reference", "Loss against a reference", "2111.08440", "table", "reference"),
        _score("windows", "Windows against a reference", "2601.02751", "table", "reference"),
        _score("rmia", "RMIA", "2312.03262", "table", "reference", "population"),
        _score("gradient", "Gradient norm", "2402.17012", "gradient"),
    ]
)

_COMPUTE: Mapping[str, Callable[..., Floats]] = {
    "loss": loss,
    "zlib": zlib,
    "min_k": min_k,
    "min_k_plus_plus": min_k_plus_plus,
    "surprising": surprising,
    "lowercase": lowercase,
    "recall": recall,
    "con_recall": con_recall,
    "reference": reference,
    "windows": windows,
    "rmia": lambda table, ref, population: rmia(table, ref, *population),
    "gradient": lambda gradient: _checked(gradient, "gradient norms"),
}
_FIELDS = ("table", "lower", "prefixed", "prefixed_members", "reference", "population", "gradient")  # argument order


def compute(inputs: Inputs, names: Sequence[str] | None = None) -> tuple[dict[str, Floats], dict[str, str]]:
    """Every score that the inputs allow.

    Args:
        inputs: what there is.
        names: of `SCORES`; all by default.

    Returns:
        Scores by name, each [R]; and for each name left out, what it would need.

    Raises:
        UsageError: an unknown name, or as the score itself.
    """
    done: dict[str, Floats] = {}
    missing: dict[str, str] = {}
    for name in SCORES if names is None else names:
        if name not in SCORES:
            raise UsageError(f"expected scores among {', '.join(SCORES)}, found {name}")
        needed = [key for key in _FIELDS if key in SCORES[name].needs]
        absent = [key for key in needed if getattr(inputs, key) is None]
        if absent:
            missing[name] = f"needs {' and '.join(absent)}"
        else:
            done[name] = _COMPUTE[name](*(getattr(inputs, key) for key in needed))
    return done, missing


# ------------------------------------------------------------------------------------------------------------- shared


def _checked(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if bad := int(np.isnan(array).sum()):
        raise UsageError(f"expected numbers as {name}, found {bad} of {array.size} NaN; check the checkpoint's weights")
    return array


def _column(table: TokenTable, values: NDArray[np.floating]) -> Floats:
    """A column of a table as finite float64."""
    if len(table.offsets) > 1 and int(np.diff(table.offsets).min()) < 1:
        raise UsageError("expected records of at least one completion token, found an empty one; leave it out")
    return np.clip(_checked(values, "log-probabilities"), FLOOR, -FLOOR)


def _log_prob(table: TokenTable) -> Floats:
    return _column(table, table.log_prob)


def _sums(table: TokenTable, values: Floats) -> Floats:
    """[R] sums over each record's tokens of values [N]."""
    sums: Floats = np.add.reduceat(values, table.offsets[:-1]) if len(values) else np.zeros(0)
    return sums


def _means(table: TokenTable, values: Floats) -> Floats:
    return _sums(table, values) / np.diff(table.offsets)


def _each(table: TokenTable, function: Callable[..., float], *columns: Floats) -> Floats:
    """[R] of function(the record's part of every column)."""
    parts = (table.rows(i) for i in range(len(table.record_ids)))
    return np.array([function(*(column[rows] for column in columns)) for rows in parts], dtype=np.float64)


def _pair(model: LogProbs, other: LogProbs) -> tuple[Floats, Floats]:
    """Per-record log-probabilities under two models."""
    first, second = (
        loss(x) if isinstance(x, TokenTable) else np.clip(_checked(x, "log-probabilities"), FLOOR, -FLOOR)
        for x in (model, other)
    )
    if first.shape != second.shape or first.ndim != 1:
        raise UsageError(f"expected the same records under both models, found {first.shape} and {second.shape}")
    return first, second


def _same_records(*tables: TokenTable) -> None:
    if any(table.record_ids != tables[0].record_ids for table in tables):
        counts = ", ".join(str(len(table.record_ids)) for table in tables)
        raise UsageError(f"expected tables of the same records in the same order, found others ({counts} records)")


def _same_rows(table: TokenTable, ref: TokenTable) -> None:
    _same_records(table, ref)
    if not np.array_equal(table.offsets, ref.offsets):
        raise UsageError(
            f"expected the same tokens under both models, found {len(table.log_prob)} and {len(ref.log_prob)}; "
            "use models that share a tokenizer"
        )


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise UsageError(f"expected a share in (0, 1], found {share}; 0.2 is usual")
