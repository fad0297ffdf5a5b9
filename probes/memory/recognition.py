r"""Recognition and recall of records: what a model knows again, beside what it can say (arXiv 2303.17557).

Recognition is a two-alternative forced choice. Every record is paired with a foil, a never-seen record of about its
length, and the model chooses the one it finds likelier:

    outcome_i = 1[mean log p(record_i) > mean log p(foil_i)] + 1/2 1[equal],      recognition = mean of outcome_i

Recall is what a prompt brings back: by default the share of the completion that greedy decoding emits before its first
error, which the one pass decides. Both are put on one scale, 0 for a model that never saw the records and 1 for perfect
memory, and their difference is the gap:

    gap_i = (2 outcome_i - 1) - (recall_i - recall of foil_i)

An edit that takes recall to the never-seen level and leaves recognition high has hidden the records, not forgotten
them; that is a gap near 1.

Limits: one half is the level of chance only if a record and its foil are exchangeable to a model that saw neither.
Foils of another source or style shift it, as they shift any membership score, so the blind test comes first. A
recognition of one half does not show that nothing is left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from probes.errors import UsageError
from probes.likelihood import TokenTable
from probes.memory.pairing import pair_by_length
from probes.statistics import Clusters, Estimate, Floats, mean_interval
from probes.statistics.checks import codes_of


@dataclass(frozen=True, slots=True)
class Recognition:
    """Outcome of a two-alternative forced choice.

    Attributes:
        share: share of pairs in which the record is likelier, ties half; "not resolvable" without pairs. Its limits
            respect clusters, and pairs that share a foil count as one cluster.
        outcomes: [R] 1, 0, or 0.5 for a tie.
        pairs: [R] index of each record's foil.
        ties: number of ties.
        most_uses: how often the most used foil is used.
        length_difference: mean absolute difference in completion tokens between a record and its foil.
    """

    share: Estimate
    outcomes: Floats
    pairs: NDArray[np.intp]
    ties: int
    most_uses: int
    length_difference: float | None

    @property
    def above_chance(self) -> bool:
        """Whether the interval of `share` lies above one half."""
        return self.share.interval is not None and self.share.interval.low > 0.5


@dataclass(frozen=True, slots=True)
class Memory:
    """Recognition and recall of the same records.

    Attributes:
        recognition: the forced choice.
        recall: mean recall of the records, in [0, 1].
        foil_recall: mean recall of the foils paired with them: what is guessed without memory.
        gap: mean of (2 outcome - 1) - (recall - foil recall), in [-2, 2]; see the module's docstring.
    """

    recognition: Recognition
    recall: Estimate
    foil_recall: Estimate
    gap: Estimate


def recognition(
    table: TokenTable,
    foils: TokenTable,
    *,
    pairs: Sequence[int] | NDArray[np.intp] | None = None,
    clusters: Clusters = None,
    foil_clusters: Clusters = None,
    level: float = 0.95,
    seed: int = 0,
) -> Recognition:
    """Two-alternative forced choice between records and never-seen foils.

    Args:
        table: one pass over the R records.
        foils: the same model's pass over F never-seen records of the same kind.
        pairs: [R] the foil of each record; by default `pair_by_length` of the completions.
        clusters: [R] near-duplicate clusters of the records, None for a record of its own.
        foil_clusters: [F] likewise for the foils.
        level: confidence level.
        seed: of the pairing and the interval.

    Returns:
        The outcome; its share is "not resolvable" without records or foils.

    Raises:
        UsageError: pairs or clusters of the wrong length, or a foil that does not exist.
    """
    records, others = len(table.record_ids), len(foils.record_ids)
    if not records or not others:
        reason = f"{records} records and {others} foils; at least one pair is needed"
        nothing = np.zeros(0)
        return Recognition(Estimate("not resolvable", reason, None), nothing, nothing.astype(np.intp), 0, 0, None)
    lengths, foil_lengths = np.diff(table.offsets), np.diff(foils.offsets)
    chosen = pair_by_length(lengths, foil_lengths, seed=seed) if pairs is None else np.asarray(pairs, dtype=np.intp)
    if chosen.shape != (records,) or not 0 <= int(chosen.min()) <= int(chosen.max()) < others:
        raise UsageError(f"expected a foil below {others} for each of {records} records, found others; correct pairs")
    mine, theirs = _mean_log_prob(table), _mean_log_prob(foils)[chosen]  # [R]
    outcomes = np.where(mine == theirs, 0.5, (mine > theirs).astype(np.float64))
    joint = _joint_clusters(chosen, clusters, foil_clusters, others)
    return Recognition(
        share=Estimate("ok", None, mean_interval(outcomes, joint, level=level, bounds=(0.0, 1.0), seed=seed)),
        outcomes=outcomes,
        pairs=chosen,
        ties=int((mine == theirs).sum()),
        most_uses=int(np.bincount(chosen).max()),
        length_difference=float(np.abs(lengths - foil_lengths[chosen]).mean()),
    )


def memory(
    table: TokenTable,
    foils: TokenTable,
    *,
    recall: ArrayLike | None = None,
    foil_recall: ArrayLike | None = None,
    pairs: Sequence[int] | NDArray[np.intp] | None = None,
    clusters: Clusters = None,
    foil_clusters: Clusters = None,
    level: float = 0.95,
    seed: int = 0,
) -> Memory:
    """Recognition beside recall.

    Args:
        table: as in `recognition`.
        foils: as in `recognition`.
        recall: [R] recall of each record in [0, 1], such as the ROUGE-L recall of generated text; by default
            `emitted_share`.
        foil_recall: [F] the same figure of the foils; both are given or neither.
        pairs: as in `recognition`.
        clusters: as in `recognition`.
        foil_clusters: as in `recognition`.
        level: confidence level of every interval.
        seed: as in `recognition`.

    Returns:
        Every part is "not resolvable" without records or foils.

    Raises:
        UsageError: as `recognition`; recall of one side alone, of the wrong length or outside [0, 1].
    """
    if (recall is None) != (foil_recall is None):
        raise UsageError("expected recall of records and of foils, found one of them; pass both or neither")
    mine = emitted_share(table) if recall is None else np.asarray(recall, dtype=np.float64)  # [R]
    theirs = emitted_share(foils) if foil_recall is None else np.asarray(foil_recall, dtype=np.float64)  # [F]
    sizes = (len(table.record_ids),), (len(foils.record_ids),)
    if (mine.shape, theirs.shape) != sizes:
        raise UsageError(
            f"expected recall of {sizes[0][0]} records and {sizes[1][0]} foils, found {mine.size} and {theirs.size}; "
            "pass one for each"
        )
    choice = recognition(
        table, foils, pairs=pairs, clusters=clusters, foil_clusters=foil_clusters, level=level, seed=seed
    )
    if choice.share.interval is None:
        return Memory(choice, choice.share, choice.share, choice.share)
    joint = _joint_clusters(choice.pairs, clusters, foil_clusters, len(theirs))
    guessed = theirs[choice.pairs]  # [R]

    def estimate(values: Floats, low: float, high: float) -> Estimate:
        return Estimate("ok", None, mean_interval(values, joint, level=level, bounds=(low, high), seed=seed))

    gaps = (2 * choice.outcomes - 1) - (mine - guessed)
    return Memory(choice, estimate(mine, 0.0, 1.0), estimate(guessed, 0.0, 1.0), estimate(gaps, -2.0, 2.0))


def emitted_share(table: TokenTable) -> Floats:
    """[R] share of each completion that greedy decoding emits after the prompt before its first error."""
    match = table.match
    shares = np.ones(len(table.record_ids))
    for i in range(len(shares)):
        misses = np.flatnonzero(~match[table.rows(i)])
        if len(misses):
            shares[i] = misses[0] / len(match[table.rows(i)])
    return shares


def _mean_log_prob(table: TokenTable) -> Floats:
    """[R] mean log p per completion token; -inf where a token is impossible."""
    sums = np.add.reduceat(table.log_prob.astype(np.float64), table.offsets[:-1])
    means: Floats = sums / np.diff(table.offsets)
    return means


def _joint_clusters(
    pairs: NDArray[np.intp], clusters: Clusters, foil_clusters: Clusters, foils: int
) -> list[Hashable | None]:
    """[R] clusters of pairs: two belong together if their records or their foils do, or by a chain of such links."""
    left = codes_of(clusters, len(pairs), "clusters")
    right = codes_of(foil_clusters, foils, "foil_clusters")[pairs] + int(left.max()) + 1
    size = int(right.max()) + 1
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (left, right)), shape=(size, size))
    _, components = connected_components(graph, directed=False)
    return [int(c) for c in components[left]]
