"""Made-up sentences for tests of what text alone gives away."""

from __future__ import annotations

import numpy as np

WORDS = [f"{a}{b}{c}" for a in "bcdfglmnprst" for b in "aeiou" for c in ("n", "r", "st", "lk", "mo", "ta")]


def sentences(n: int, generator: np.random.Generator, *, tilt: float = 0.0, length: int = 20) -> list[str]:
    """Texts of random words; `tilt` makes thirty of the words that much more frequent."""
    p = np.ones(len(WORDS))
    p[:30] += tilt
    sizes = generator.integers(length // 2, length, n)
    return [" ".join(generator.choice(WORDS, size, p=p / p.sum())) + "." for size in sizes]


def twin(text: str, generator: np.random.Generator) -> str:
    """The same text with one word changed."""
    words = text.split()
    words[int(generator.integers(len(words)))] = str(generator.choice(WORDS))
    return " ".join(words)
