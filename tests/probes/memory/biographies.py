"""Artificial people whose entropy is known to the last bit, after the biographies of arXiv 2404.05405.

Every person has a name, unique by its number, and six attributes drawn uniformly and independently from lists of known
size. A record's prompt is the name; its completion tells the attributes, each after a fixed marker token. Given the
name, a completion therefore holds exactly the sum of log2 of the list sizes, and the markers hold nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from probes.records import TokenRecord

SIZES = (2, 4, 8, 12, 16, 20)
VOCAB = 96
ENTROPY = sum(math.log2(size) for size in SIZES)  # bits a person, given the name

_MARKERS = range(4, 4 + len(SIZES))
_DIGITS = range(10, 20)
_VALUES = 20  # the first token of the values; every attribute uses its own, so that lists do not overlap


def people(n: int, seed: int = 0) -> list[TokenRecord]:
    """`n` people; the first of a longer list are those of a shorter one."""
    rng, out = np.random.default_rng(seed), []
    first = [_VALUES + sum(SIZES[:a]) for a in range(len(SIZES))]
    for i in range(n):
        name = [_DIGITS[int(digit)] for digit in f"{i:03d}"]
        values = [int(rng.integers(size)) for size in SIZES]
        completion = [t for a, value in enumerate(values) for t in (_MARKERS[a], first[a] + value)]
        out.append(TokenRecord(f"person-{i}", (2, *name, *completion), 4, 20))
    return out


def digest(records: Sequence[TokenRecord]) -> str:
    """A hash of the corpus."""
    return hashlib.sha256(repr([record.ids for record in records]).encode()).hexdigest()
