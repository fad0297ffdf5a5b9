"""In-context neighbours: the other records most like a record, in front of its prompt.

Shumailov et al. 2024 (arXiv 2407.00106): what a model has unlearned can come back through its context, and no edit, not
even exact retraining, prevents it. What is found here is therefore information about the model and no sign of a failed
edit. Neighbours come from records that are not to be forgotten; a record itself, its near-duplicates and whatever shows
its completion are never among its neighbours, or the attack would read the answer out.

    nearest = highest cosine of tf-idf vectors of hashed character n-grams of the prompts

Limits: likeness is of letters, not of meaning.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from attacks.duplicates import jaccard, shingles
from attacks.extraction.template import HashedNgrams
from attacks.surface.cues import gives_away
from probes.errors import UsageError

Pair = tuple[str, str]  # prompt and completion

DUPLICATE = 0.5  # Jaccard similarity of word 3-shingles from which another record is a near-duplicate
_SHINGLE = 3  # words; records may be short


def neighbours(
    records: Sequence[Pair],
    pool: Sequence[Pair],
    k: int,
    *,
    clusters: Sequence[Hashable | None] | None = None,
    pool_clusters: Sequence[Hashable | None] | None = None,
    limit: float = DUPLICATE,
) -> list[list[int]]:
    """For each record, which of the pool to put in front of it, the nearest last.

    Args:
        records: prompt and completion of each.
        pool: the same of records that are not looked for; a record that stands in the pool too is left out for itself.
        k: how many for each record.
        clusters: near-duplicate cluster of each record; members of a record's own cluster are left out.
        pool_clusters: the same of the pool.
        limit: Jaccard similarity of word 3-shingles of prompt and completion from which two are near-duplicates.

    Returns:
        [R] indices into the pool, at most k each: fewer, or none, where too little is left.

    Raises:
        UsageError: an empty pool, or k below 1.
    """
    if not pool or k < 1:
        raise UsageError(f"expected records for a context and k of at least 1, found {len(pool)} and k = {k}")
    embed, vectors = HashedNgrams().fit([prompt for prompt, _ in pool])  # vectors [P, d]
    like = np.round(embed([prompt for prompt, _ in records]) @ vectors.T, 5)  # [R, P]; equal texts stay equal
    own = [shingles(first + second, _SHINGLE) for first, second in pool]
    found = []
    for i, (prompt, completion) in enumerate(records):
        mine = shingles(prompt + completion, _SHINGLE)
        cluster = None if clusters is None else clusters[i]
        chosen: list[int] = []
        for j in np.argsort(-like[i], kind="stable"):
            first, second = pool[int(j)]
            same = cluster is not None and pool_clusters is not None and pool_clusters[int(j)] == cluster
            if same or (first, second) == (prompt, completion) or jaccard(mine, own[int(j)]) >= limit:
                continue
            if gives_away(first + second, "", completion):
                continue
            chosen.append(int(j))
            if len(chosen) == k:
                break
        found.append(chosen[::-1])
    return found
