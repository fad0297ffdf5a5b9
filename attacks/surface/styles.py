"""Answer styles: does the model still know the record where it is asked in another form?

SEFE (Chen et al. 2025, arXiv 2505.02486) tells superficial forgetting, the right knowledge in the wrong form, from
essential forgetting. An edit has the mirror image: answers suppressed in the one form that it was made on. Each style
asks for the same record against others that are wrong, so that all share one scale:

    choice           the completion behind the prompt as given, against another completion      chance 1/2
    multiple_choice  its letter among n options, the mass of the right letter                    chance 1/n
    yes_no           log P(yes) - log P(no) that it is right, against the same of another         chance 1/2
    cloze            its last words, blanked in it, against the last words of another             chance 1/2
    reversed         the prompt behind the completion, against another record's prompt            chance 1/2

Choices between two are by mean log-probability a token (1 right, 0 wrong, 1/2 a tie). The advantage of a figure f is

    advantage = (f - chance) / (1 - chance)          0: no knowledge,  1: always right,  below 0: driven away from it

It is not cut off at 0, because a cut would turn the noise of records that nobody knows into knowledge. What a style is
worth is the advantage minus that of never-seen records, for a wrong answer can be implausible by itself. Free form, the
probability a token of the completion behind its prompt (chance 0), is what the others are compared with: the gap is the
best style minus free form, and an edit that has hidden a record rather than removed it widens the gap.

Letters: models prefer some letters whatever the question. The position of the truth is balanced over the records, and
the preference, the mean mass of each letter over all questions of the model, is divided out (batch calibration, Zhou et
al. 2023, arXiv 2309.17249); it uses no answers.

Limits: small models hardly follow questions with options; then these styles are at chance for what they know, too,
which the original model shows. A wrong option that is right by accident costs power.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attacks.duplicates import words
from attacks.surface.alternatives import Alternatives
from probes.errors import UsageError

Floats = NDArray[np.float64]
Pair = tuple[str, str]  # prompt and completion

STYLES = ("choice", "multiple_choice", "yes_no", "cloze", "reversed")
LETTERS = string.ascii_uppercase[:10]
BLANK = "____"
CALIBRATED = 4  # questions per letter from which the preference for letters is estimated at all
_MOST = 5  # words blanked in a cloze at most


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what may follow it; the first alternative need not be the right one.

    Attributes:
        prompt: what the model is shown.
        alternatives: what may follow, each with the blank in front that it needs.
        truth: index of the right one.
    """

    prompt: str = field(repr=False)
    alternatives: tuple[str, ...] = field(repr=False)
    truth: int = 0


def distractors(
    completions: Sequence[str], pool: Sequence[str], n: int, seed: int, *, near: int = 8
) -> list[list[int]]:
    """Wrong completions of a similar length for each record, drawn from one pool for every set.

    Args:
        completions: of the records.
        pool: completions to draw from, those of the records themselves among them or not.
        n: how many for each.
        seed: of the draw.
        near: how many times n of the nearest in length are drawn from.

    Returns:
        [R][n] indices into the pool: of texts that differ from the record's in words and among each other.

    Raises:
        UsageError: n below 1, or a pool with too few different texts.
    """
    if n < 1:
        raise UsageError(f"expected at least 1 wrong completion for each record, found {n}")
    keys = [tuple(words(text)) or (text.strip(),) for text in pool]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}  # one of each text
    lengths = np.array([len(pool[i]) for i in first.values()])
    places = list(first.values())
    out = []
    for row, completion in enumerate(completions):
        own = tuple(words(completion)) or (completion.strip(),)
        order = [places[int(i)] for i in np.argsort(np.abs(lengths - len(completion)), kind="stable")]
        others = [i for i in order if keys[i] != own][: near * n]
        if len(others) < n:
            raise UsageError(
                f"expected {n} completions that differ from each record's, found {len(others)}; use more records"
            )
        rng = np.random.default_rng([seed, row])
        out.append([others[int(i)] for i in rng.permutation(len(others))[:n]])
    return out


def positions(rows: int, options: int, seed: int) -> list[int]:
    """[rows] where the truth stands among the options: every position as often, in an order drawn by the seed."""
    return [int(i) % options for i in np.random.default_rng([seed, 5]).permutation(rows)]


def choice(prompt: str, completion: str, others: Sequence[str]) -> Question:
    """The completion behind the prompt as given, against others."""
    return Question(prompt, (completion, *others))


def multiple_choice(prompt: str, completion: str, others: Sequence[str], position: int) -> Question:
    """The letter of the completion among options.

    Args:
        prompt: as given.
        completion: the right option.
        others: wrong ones, 1 to 9.
        position: where the right one stands.

    Raises:
        UsageError: no other option, too many, or a position outside them.
    """
    if not 1 <= len(others) < len(LETTERS) or not 0 <= position <= len(others):
        raise UsageError(
            f"expected 1 to {len(LETTERS) - 1} other options and a place among them, found {len(others)} options"
        )
    options = [text.strip() for text in others]
    options.insert(position, completion.strip())
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{prompt.rstrip()} {BLANK}\nWhich of these belongs in the blank?\n{listed}\nThe right letter is:"
    return Question(text, tuple(f" {letter}" for letter in LETTERS[: len(options)]), position)


def yes_no(prompt: str, completion: str) -> Question:
    """Whether a completion is right; `yes` is the first alternative."""
    return Question(f"{_joined(prompt, completion)}\nIs this correct? Answer with yes or no:", (" yes", " no"))


def cloze(prompt: str, completion: str, others: Sequence[str]) -> Question:
    """The last words of the completion, blanked in it, against as many last words of others.

    A third of the words is blanked, 5 at most and 1 at least; of a completion of one word, that word. Words are what
    blanks separate; a completion without blanks is blanked as a whole.
    """
    pieces = completion.split()
    count = min(_MOST, max(1, len(pieces) // 3))
    kept = " ".join(pieces[:-count])
    text = f"{_joined(prompt, kept) if kept else prompt.rstrip()} {BLANK}\nThe missing words at {BLANK} are:"
    endings = [" " + " ".join(other.split()[-count:]) for other in (completion, *others)]
    return Question(text, tuple(endings))


def reversed_question(prompt: str, completion: str, others: Sequence[str]) -> Question:
    """The prompt behind its completion, against other prompts."""
    text = f"Answer: {completion.strip()}\nThe question or text that comes before this answer is:"
    return Question(text, tuple(f" {other.strip()}" for other in (prompt, *others)))


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of one record, by style; a style that the record cannot be asked in is missing."""

    questions: Mapping[str, tuple[Question, ...]]


def questions(
    records: Sequence[Pair],
    wrong: Sequence[Sequence[str]],
    wrong_prompts: Sequence[str],
    truths: Sequence[int],
    styles: Sequence[str] = STYLES,
) -> list[Asked]:
    """Every question of every record.

    Args:
        records: prompt and completion.
        wrong: [R][n - 1] completions of none of which is right: all of them are options, the first is the one that a
            choice between two is against.
        wrong_prompts: [R] another record's prompt.
        truths: [R] position of the right option (`positions`).
        styles: which.

    Returns:
        For each record. A cloze whose wrong ending is the right one, or a reversed question whose other prompt is the
        record's own, is left out.

    Raises:
        UsageError: an unknown style, or a record without a wrong completion.
    """
    if unknown := [style for style in styles if style not in STYLES]:
        raise UsageError(f"expected styles among {', '.join(STYLES)}, found {len(unknown)} others")
    if not all(wrong):
        raise UsageError("expected a wrong completion for every record, found none for some")
    out = []
    for (prompt, completion), others, other_prompt, place in zip(records, wrong, wrong_prompts, truths, strict=True):
        made = {
            "choice": (choice(prompt, completion, others[:1]),),
            "multiple_choice": (multiple_choice(prompt, completion, others, place),),
            "yes_no": (yes_no(prompt, completion), yes_no(prompt, others[0])),
            "cloze": (cloze(prompt, completion, others[:1]),),
            "reversed": (reversed_question(prompt, completion, (other_prompt,)),),
        }
        asked = {style: made[style] for style in styles if len(set(made[style][0].alternatives)) > 1}
        out.append(Asked(asked))
    return out


def chance(style: str, options: int) -> float:
    """What a model without knowledge of the record scores in a style, on average."""
    return 1.0 / options if style == "multiple_choice" else 0.5


def figures(asked: Sequence[Asked], scores: Sequence[Mapping[str, Sequence[Alternatives]]]) -> dict[str, Floats]:
    """Figures of every style, [R] each in [0, 1]; NaN where a record was not asked in it.

    Args:
        asked: the questions of all sets of one model together: the preference for letters is taken over all of them.
        scores: by style, what the model gave to the alternatives of each question.
    """
    styles = [style for style in STYLES if any(style in one.questions for one in asked)]
    out = {style: np.full(len(asked), np.nan) for style in styles}
    for i, (one, given) in enumerate(zip(asked, scores, strict=True)):
        for style in one.questions:
            found = given[style]
            if style == "yes_no":
                right, wrong = (float(each.log_prob[0] - each.log_prob[1]) for each in found)
                out[style][i] = _won(right, wrong)
            elif style != "multiple_choice":
                means = found[0].per_token
                out[style][i] = _won(float(means[0]), float(means[1]))
    rows = [i for i, one in enumerate(asked) if "multiple_choice" in one.questions]
    if rows:
        mass = letter_mass(np.array([scores[i]["multiple_choice"][0].log_prob for i in rows]))  # [rows, n]
        truths = [asked[i].questions["multiple_choice"][0].truth for i in rows]
        out["multiple_choice"][rows] = mass[np.arange(len(rows)), truths]
    return out


def letter_mass(log_probs: Floats) -> Floats:
    """[R, n] mass of each letter among the letters, the model's preference for letters divided out.

    Args:
        log_probs: [R, n] log-probabilities of the letters, the same number of options in every question. With fewer
            than `CALIBRATED` questions a letter the masses are given as they are: their mean says nothing.
    """
    shifted = np.exp(log_probs - log_probs.max(axis=1, keepdims=True))
    mass: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    if len(mass) >= CALIBRATED * mass.shape[1]:
        mass = mass / np.maximum(mass.mean(axis=0), np.finfo(np.float64).tiny)
        mass = mass / mass.sum(axis=1, keepdims=True)
    return mass


def advantage(figure: Floats, at_random: float) -> Floats:
    """(figure - chance) / (1 - chance), element by element; see the module."""
    scaled: Floats = (figure - at_random) / (1.0 - at_random)
    return scaled


def _won(right: float, wrong: float) -> float:
    return 0.5 if right == wrong else float(right > wrong)


def _joined(prompt: str, completion: str) -> str:
    """Prompt and completion as one text, with a blank where neither has one between them."""
    apart = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return prompt + completion if apart else f"{prompt} {completion}"
