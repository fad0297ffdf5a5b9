"""Other wordings by rules: the same question, request or text in other words, with every name and number in place.

A prompt is taken apart into what stands around it (labels, templates, earlier sentences) and its core, and only the
core is reworded, so that it ends as it ended and the completion follows as it did:

    structure   a question as a request or an indirect question, a request in another polite form, a preposition moved
    frame       a few words in front of a prompt, or behind a question
    lexicon     contractions written out or made, function words and other common words by a table

Names, numbers and whatever stands in quotation marks are never touched; a wording that lost or gained one is thrown
away. No wording is shared with the attacks that judge the result (`attacks.surface`): an editor that trains on these
does not train on its own examination.

Limits: the rules are English; a prompt without Latin letters gets none. They are few and shallow: a wording by a person
or a good model says more. A word of several meanings can be replaced by one that fits less well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from unlearn.records.lexicon import PARTICIPLE, keeps, relexed, sentence_starts

QUESTION_FRAMES = (
    "I have a question: {}",
    "May I ask: {}",
    "I was wondering: {}",
    "A short question: {}",
    "Help me with this: {}",
    "For my notes: {}",
    "One thing I'd like to understand: {}",
    "To check what I read: {}",
)
TAILS = ("{}, if you know?", "{}, do you think?", "{}, to your knowledge?")
REQUEST_FRAMES = (
    "Please {}.",
    "Could you {}?",
    "Can you {}?",
    "Would you {}?",
    "I would like you to {}.",
    "I'd be glad if you could {}.",
    "Could you {}, please?",
)
INDIRECT_FRAMES = (
    "Please say {}.",
    "Could you say {}?",
    "Do you know {}?",
    "I would like to know {}.",
    "I'm trying to find out {}.",
    "Can you say {}?",
)
THING_FRAMES = ("I would like to know {}.", "I'm looking for {}.", "I need to find out {}.", "Do you know {}?")
STATEMENT_FRAMES = ("Once more: {}", "Next: {}", "To go on: {}", "Now this: {}", "Here it is: {}", "And then: {}")

_LABEL = re.compile(r"(?:[ \t]*#[^\n]*\n+|[ \t]*(?:#+[ \t]*)?[A-Z][\w ]{0,18}:[ \t]+|[ \t]*\[INST\][ \t]*)(?=\S)")
_ANSWER_LINE = re.compile(r"\s*\n[^\n]{0,30}[:>\]]$|\s*\[/INST\]$|(?<=[?.!])\s+[A-Z][a-z]{0,11}:$")

_WH = "who|whom|whose|what|which|where|when|why|how"
_NAME = r"[A-Z][\w-]*(?:['’][A-Z][\w-]*)*(?:\.?\s+[A-Z][\w-]*(?:['’][A-Z][\w-]*)*)*"
_DETERMINER = r"(?:the|his|her|its|their|this|that)"
_PREPOSITIONS = frozenset("about after against as at by for from in into like of on than to under up upon with".split())
_AUXILIARIES = frozenset(
    "am are can could did do does had has have is may might must shall should was were will would".split()
)
_OPENING = frozenset(_WH.split("|")) | _AUXILIARIES | _PREPOSITIONS | {"based", "regarding", "apart", "besides", "any"}
_VERBS = (
    "comment|define|describe|discuss|elaborate|explain|give|identify|list|mention|name|outline|point|provide|recall"
    "|recommend|say|share|shed|show|state|suggest|summari[sz]e|talk|tell|write"
)
_REQUEST = re.compile(
    rf"(?:(?:please\s+)?(?:can|could|would|will)\s+you\s+(?:please\s+)?(?P<asked>(?:{_VERBS})\b.*?)(?:,?\s+please)?\?"
    rf"|(?:please\s+)?(?P<told>(?:{_VERBS})\s.*?)(?:,?\s+please)?[.!])",
    re.IGNORECASE | re.DOTALL,
)
_NO_CHOICE = frozenset(("difference", "effect", "impact", "influence", "kind", "role", "sort", "time", "type"))
_Plan = tuple[str, str, float, float]
_HEAVIEST = 10  # words that an indirect question carries before its verb


def reworded_prompt(prompt: str, n: int, seed: str) -> list[str]:
    """Up to `n` different other wordings of a prompt, none equal to it.

    Args:
        prompt: a question, a request, or the beginning of a text, with a template around it or not.
        n: how many are wanted.
        seed: decides which, and in which order: changes of structure and words alternate with frames.
    """
    rng = random.Random(seed)
    head, core, tail = split(prompt)
    if not re.search("[A-Za-z]", core):
        return []
    whole, frames = _candidates(core)
    rng.shuffle(whole)
    rng.shuffle(frames)
    # What is made: a frame, the text in it, the share of its words to replace, and how likely any is replaced.
    inner = [("{}", text, 0.5, 0.5) for text in whole]
    plain = [("{}", core, share, 1.0) for share in (1.0, 0.5, 0.5)]
    framed = [(frame, core, 0.3, 0.5) for frame in frames]
    made: dict[str, None] = {}
    for frame, text, share, likely in _alternating([*inner[:1], *plain[:1], *inner[1:], *plain[1:]], framed):
        if len(made) == n:
            break
        new = _framed(frame, relexed(text, rng, share) if rng.random() < likely else text)
        if new != core and keeps(core, new):
            made[head + new + tail] = None
    return list(made)


def split(prompt: str) -> tuple[str, str, str]:
    """What stands before a prompt's core, the core, and what stands behind it; together they are the prompt.

    Behind: blanks, and a last line or word that only announces the answer (`Answer:`). Before: labels (`Question:`)
    and, where the core is a question or a request, every line and sentence before its own. The core of anything else
    is all that is left.
    """
    body = prompt.rstrip()
    if (match := _ANSWER_LINE.search(body)) and body[: match.start()].strip():
        body = body[: match.start()]
    tail = prompt[len(body) :]
    start = body.rfind("\n") + 1
    if label := _LABEL.match(body, start):
        start = label.end()
    last = max((at for at in sentence_starts(body[start:])), default=0) + start
    core = body[last:]
    if core.endswith("?") or is_request(core):
        return body[:last], core, tail
    opening = _LABEL.match(body)
    start = opening.end() if opening else len(body) - len(body.lstrip())
    return body[:start], body[start:], tail


def is_request(text: str) -> bool:
    """Whether a sentence asks someone to say something (`Describe ...`, `Could you tell me ...?`)."""
    return _REQUEST.fullmatch(text) is not None


# The parts of a wording


def _candidates(core: str) -> tuple[list[str], list[str]]:
    """Finished wordings of another structure, and frames for the core (`{}` where it goes)."""
    if match := _REQUEST.fullmatch(core):
        wanted = match["asked"] or match["told"]
        made = [frame.format(_lowered(wanted)) for frame in REQUEST_FRAMES]
        return made, []
    if core.endswith("?"):
        return list(_other_structures(core)), [*QUESTION_FRAMES, *TAILS]
    return [], list(STATEMENT_FRAMES)


def _framed(frame: str, core: str) -> str:
    if frame in TAILS:
        return frame.format(core.removesuffix("?"))
    return frame.format(_lowered(core) if frame in QUESTION_FRAMES else core)


def _lowered(text: str) -> str:
    """The text with a small first letter where its first word is no name."""
    first = re.match(r"[A-Za-z]+", text)
    verb = first is not None and re.fullmatch(_VERBS, first.group(), re.IGNORECASE)
    if first and (first.group().casefold() in _OPENING or verb) and first.group() != "May":
        return text[0].lower() + text[1:]
    return text


def _other_structures(question: str) -> Iterator[str]:
    lowered = _lowered(question)
    indirect = _indirect(lowered.removesuffix("?"))
    if indirect is not None:
        yield from (frame.format(indirect) for frame in INDIRECT_FRAMES)
    if match := re.fullmatch(r"what (?:is|was|are|were) ((?:the|his|her|their)\s.+)\?", lowered, re.DOTALL):
        thing = match[1]
        if _whole(thing):
            yield from (frame.format(thing) for frame in THING_FRAMES)
    match = re.fullmatch(r"(in|at|from|for|by) which ([^,]+)\?", lowered)
    if match and len(match[2].split()) <= 9 and not _PREPOSITIONS & set(match[2].split()):
        yield f"Which {match[2]} {match[1]}?"
    if (match := re.match(r"what ([a-z]+)", lowered)) and match[1] not in _AUXILIARIES | {"if", "about", "else"}:
        if re.match(r"what year (?:was|were|did|does)\b", lowered):
            yield "In what" + lowered[4:]
        elif match[1] not in _NO_CHOICE and set(lowered.split()[2:4]) & _AUXILIARIES:  # not "What inspired"
            yield "Which" + lowered[4:]
    if match := re.match(r"(what|where|who) is (?=\w+ \w)", lowered):
        yield f"{match[1].capitalize()}'s {question[match.end() :]}"
    if match := re.match(r"(what|where)['’]s (?=\w+ \w)", lowered):
        yield f"{match[1].capitalize()} is {question[match.end() :]}"


def _indirect(question: str) -> str | None:
    """`where she was born` of `where was she born`, where the rules can tell subject and verb apart."""
    no_verb = rf"(?!(?:{'|'.join(sorted(_AUXILIARIES))})\b)"
    asked = rf"(?P<wh>(?:(?:in|at|from|for|by|with) )?(?:{_WH})(?: {no_verb}[a-z]+){{0,3}})"
    subject = rf"(?P<who>{_NAME}|he|she|they|it|{_NAME}['’]s?(?:\s+[\w+-]+){{1,3}}?)"
    participle = rf"(?:\w+ly )?{PARTICIPLE}\b.*"
    have = re.fullmatch(rf"{asked} (?P<verb>has|have|had) {subject} (?P<rest>{participle})", question, re.DOTALL)
    be = re.fullmatch(
        rf"{asked} (?P<verb>is|are|was|were) {subject} (?P<rest>{participle}|from|like)", question, re.DOTALL
    )
    for match in (have, be):
        if match is not None:
            return f"{match['wh']} {match['who']} {match['verb']} {match['rest']}"
    does = re.fullmatch(
        rf"{asked} does (?P<who>{_NAME}) (?P<adverb>(?:[a-z]+ly )?)(?P<verb>[a-z]+)(?P<rest>(?: .*)?)",
        question,
        re.DOTALL,
    )
    if does is not None:
        return f"{does['wh']} {does['who']} {does['adverb']}{_third_person(does['verb'])}{does['rest']}"
    if match := re.fullmatch(r"(?P<wh>who|what) (?P<verb>is|are|was|were) (?P<who>.+)", question, re.DOTALL):
        thing = match["who"]
        if _whole(thing) and len(thing.split()) <= _HEAVIEST and "," not in thing:
            return f"{match['wh']} {thing} {match['verb']}"
    if re.match(rf"(?:who|what|which [a-z]+) (?:has|have|had) (?:\w+ly )?{PARTICIPLE}\b", question):
        return question
    asked_for = r"(?:who|what) (?:[a-z]+ed|makes|made|wrote|won|led|gave|drives|drove|[a-z]+ishes)\b"
    if re.match(asked_for, question) and not set(question.split()[2:7]) & _AUXILIARIES:
        return question
    return None


def _third_person(verb: str) -> str:
    if verb in ("have", "do", "go"):
        return {"have": "has", "do": "does", "go": "goes"}[verb]
    if re.search("(?:s|x|z|ch|sh)$", verb):
        return verb + "es"
    return verb[:-1] + "ies" if re.search("[^aeiou]y$", verb) else verb + "s"


def _whole(thing: str) -> bool:
    """Whether words behind a form of `be` are one thing: a name, or a noun with what belongs to it."""
    words = thing.split()
    if words[-1].casefold() in _PREPOSITIONS or re.fullmatch(rf"{PARTICIPLE}|\w+ing", words[-1]):
        return False
    if re.fullmatch(_NAME, thing):
        return True
    if re.fullmatch(rf"{_NAME}['’]s?(?:\s+[\w+-]+){{1,4}}", thing):
        return not any(re.fullmatch(rf"{PARTICIPLE}|\w+ing", word) for word in words) and not (
            _PREPOSITIONS & set(words)
        )
    return bool(re.match(rf"{_DETERMINER}\s", thing))


def _alternating(first: Sequence[_Plan], second: Sequence[_Plan]) -> Iterator[_Plan]:
    for i in range(max(len(first), len(second))):
        yield from first[i : i + 1]
        yield from second[i : i + 1]
