"""The same prompt in another spelling: casing, spacing, typing errors, no punctuation.

    lower, upper, title    case of the prompt
    double_spaces          every blank between words twice
    no_break_spaces        every blank between words as U+00A0
    newlines               every blank between words as a line break
    typos                  adjacent letters swapped inside words, at seeded places, never in words with digits
    no_punctuation         punctuation left out, but inside numbers; between letters a blank takes its place

The completion is looked for as it stands. Blanks at the end of the prompt are kept, so that it follows as it did.

Limits: an edit that was made robust to one spelling may fail at another; letters alone are swapped in every script, but
case and blanks between words exist in some only, where these kinds change nothing.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from probes.errors import UsageError

RATE = 0.05  # share of the letters that a typing error touches first
Seed = int | Sequence[int]

_BETWEEN = re.compile(r"(?<=\S) (?=\S)")
_WORD = re.compile(r"\w+")
_FIRST = re.compile(r"(?<![\w'’])\w")


def spelled(prompt: str, kind: str, seed: Seed = 0, *, rate: float = RATE) -> str:
    """A prompt in another spelling.

    Args:
        prompt: as given.
        kind: a name of `SPELLINGS`.
        seed: of the typing errors; give (seed, position) so that records differ and arms do not.
        rate: of the typing errors: share of a prompt's letters, rounded up.

    Returns:
        The changed prompt; equal to the one given where the kind changes nothing in it.

    Raises:
        UsageError: an unknown kind, or a rate outside (0, 0.5].
    """
    if kind not in SPELLINGS:
        raise UsageError(f"expected a spelling among {', '.join(SPELLINGS)}, found another name")
    if not 0 < rate <= 0.5:
        raise UsageError(f"expected a rate of typing errors in (0, 0.5], found {rate:g}; pass {RATE:g}")
    body = prompt.rstrip()
    if kind == "typos":
        changed = _typos(body, np.random.default_rng(seed), rate)
    else:
        changed = _PLAIN[kind](body)
    return changed + prompt[len(body) :] if changed.strip() else prompt


def _title(text: str) -> str:
    return _FIRST.sub(lambda match: match.group().upper(), text.lower())


def _unpunctuated(text: str) -> str:
    out = []
    for i, character in enumerate(text):
        if not unicodedata.category(character).startswith("P"):
            out.append(character)
            continue
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        if before.isdigit() and after.isdigit():
            out.append(character)  # 3.5 without its point is another number
        elif before.isalnum() and after.isalnum() and character not in "'’":
            out.append(" ")
    return "".join(out)


def _typos(text: str, rng: np.random.Generator, rate: float) -> str:
    """`text` with ceil(rate x letters) swaps of two neighbouring, different letters; no letter is moved twice."""
    letters = list(text)
    places = [
        i
        for match in _WORD.finditer(text)
        if len(match.group()) > 3 and not any(c.isdigit() for c in match.group())
        for i in range(match.start() + 1, match.end() - 1)  # the first letter stays, as in most typing errors
        if letters[i].isalpha() and letters[i + 1].isalpha() and letters[i].casefold() != letters[i + 1].casefold()
    ]
    wanted, moved = math.ceil(rate * sum(c.isalpha() for c in text)), set[int]()
    for place in rng.permutation(len(places)):
        i = places[int(place)]
        if len(moved) >= 2 * wanted:
            break
        if i in moved or i + 1 in moved:
            continue
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
        moved |= {i, i + 1}
    return "".join(letters)


_PLAIN: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "title": _title,
    "double_spaces": lambda text: _BETWEEN.sub("  ", text),
    "no_break_spaces": lambda text: _BETWEEN.sub("\u00a0", text),
    "newlines": lambda text: _BETWEEN.sub("\n", text),
    "no_punctuation": _unpunctuated,
}
SPELLINGS = ("lower", "upper", "title", "double_spaces", "no_break_spaces", "newlines", "typos", "no_punctuation")
