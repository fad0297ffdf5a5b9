"""Whether a prompt gives the answer away: the longest run of the completion's words that stands in it.

    shown = longest common run of words / words of the completion

A model that copies its prompt has memorised nothing. Character n-grams (`attacks.pii.games.lexical_overlap`) suit one
sentence; a prompt with demonstrations in it holds most trigrams of any short answer, so words are compared here, whole
and in order: "no" does not stand in "know". Words are without case, accents' compatibility forms and punctuation.

Limits: a paraphrase, a translation or an abbreviation of the answer is not seen.
"""

from __future__ import annotations

from attacks.duplicates import words
from attacks.extraction.overlap import longest_common_span

CUED = 0.8  # share of the completion's words in one run from which a prompt gives it away; answers share openings


def shown(prompt: str, completion: str) -> float:
    """Share of the completion's words in the longest run of them that stands in the prompt, in [0, 1].

    A completion without words (punctuation alone) counts as shown where it stands in the prompt as it is.
    """
    wanted = words(completion)
    if not wanted:
        return float(bool(completion.strip()) and completion.strip() in prompt)
    return longest_common_span(words(prompt), wanted) / len(wanted)


def gives_away(changed: str, prompt: str, completion: str, limit: float = CUED) -> bool:
    """Whether a changed prompt shows the completion where the prompt as given did not show as much of it.

    Args:
        changed: the prompt after the change.
        prompt: the prompt as given; what it shows already is the record's own and no fault of the change.
        completion: what is looked for.
        limit: share of the completion's words in one run.
    """
    share = shown(changed, completion)
    return share >= limit and share > shown(prompt, completion)
