"""What a model remembers of a set of records: recognition beside recall, and learned bits."""

from __future__ import annotations

from probes.memory.bits import Bits, bits, parameter_count, uniform_prior, unigram_prior
from probes.memory.pairing import pair_by_length
from probes.memory.recognition import Memory, Recognition, emitted_share, memory, recognition

__all__ = [
    "Bits",
    "Memory",
    "Recognition",
    "bits",
    "emitted_share",
    "memory",
    "pair_by_length",
    "parameter_count",
    "recognition",
    "uniform_prior",
    "unigram_prior",
]
