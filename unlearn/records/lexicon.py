"""Words for words: a text in other words by a table, with every name and number in place.

The table holds contractions with their opposites, function words and other common words of English. What stands in
quotation marks, inside a name or with capitals is never touched; an article before a replaced word is corrected.

Limits: a word of several meanings can be replaced by one that fits less well. Texts in other languages stay as they
are.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from unlearn.records.swap import names_in

# Word or phrase -> others of the same meaning. Lower case; a capital at the start of a sentence is kept.
LEXICON: dict[str, tuple[str, ...]] = {
    "a few of": ("several of",),
    "accomplishments": ("achievements",),
    "achievements": ("accomplishments",),
    "additionally": ("in addition",),
    "almost": ("nearly",),
    "although": ("even though",),
    "as well as": ("along with",),
    "award": ("prize",),
    "awards": ("prizes",),
    "birth date": ("date of birth",),
    "birthplace": ("place of birth",),
    "captivating": ("fascinating",),
    "compelling": ("gripping",),
    "completely": ("fully",),
    "complex": ("intricate",),
    "currently": ("at present",),
    "date of birth": ("birth date",),
    "deep": ("profound",),
    "deeply": ("profoundly",),
    "demonstrates": ("shows",),
    "depicts": ("shows",),
    "despite": ("in spite of",),
    "distinctive": ("distinct",),
    "diverse": ("varied",),
    "due to": ("because of", "owing to"),
    "elaborate on": ("say more about", "expand on"),
    "enhance": ("improve",),
    "entirely": ("wholly",),
    "especially": ("particularly",),
    "examine": ("explore",),
    "explore": ("examine", "look into"),
    "explored": ("examined", "looked into"),
    "explores": ("examines", "looks into"),
    "exploring": ("examining", "looking into"),
    "fascinating": ("intriguing",),
    "for example": ("for instance",),
    "for instance": ("for example",),
    "frequently": ("often",),
    "full name": ("complete name",),
    "fully": ("completely",),
    "furthermore": ("what is more",),
    "impact on": ("effect on",),
    "impact of": ("effect of",),
    "important": ("significant",),
    "in fact": ("indeed",),
    "in order to": ("so as to",),
    "incorporates": ("includes",),
    "incorporating": ("including",),
    "individuals": ("people",),
    "influence on": ("effect on",),
    "initially": ("at first",),
    "intriguing": ("fascinating",),
    "kind of": ("sort of", "type of"),
    "known for": ("recognized for",),
    "main": ("principal", "chief"),
    "mainly": ("chiefly", "for the most part"),
    "moreover": ("what is more",),
    "narratives": ("stories",),
    "nearly": ("almost",),
    "nevertheless": ("all the same",),
    "notable": ("noteworthy",),
    "numerous": ("many",),
    "often": ("frequently",),
    "particularly": ("especially",),
    "penned by": ("written by",),
    "perhaps": ("maybe",),
    "perspective": ("point of view",),
    "perspectives": ("points of view",),
    "portrays": ("depicts",),
    "primarily": ("mainly", "chiefly"),
    "primary": ("main", "principal"),
    "published": ("brought out",),
    "rapidly": ("quickly",),
    "recently": ("lately",),
    "reflect": ("mirror",),
    "reflected": ("mirrored",),
    "reflects": ("mirrors",),
    "regarding": ("concerning",),
    "several": ("a number of",),
    "several of": ("some of", "a few of"),
    "shed light on": ("say something about",),
    "showcases": ("displays",),
    "showcasing": ("displaying",),
    "significance": ("importance",),
    "significant": ("important",),
    "some of": ("a few of", "several of"),
    "sort of": ("kind of",),
    "specific": ("particular",),
    "style of writing": ("way of writing",),
    "such as": ("like",),
    "therefore": ("for that reason",),
    "throughout": ("all through",),
    "thus": ("in this way",),
    "tell me more about": ("say more about",),
    "toward": ("towards",),
    "towards": ("toward",),
    "type of": ("kind of", "sort of"),
    "typically": ("usually",),
    "unique": ("distinctive", "singular"),
    "usually": ("generally",),
    "variety of": ("range of",),
    "various": ("different", "several"),
    "wide range of": ("broad range of", "great variety of"),
    "writing style": ("way of writing",),
    # contractions and their opposites
    "are not": ("aren't",),
    "cannot": ("can't",),
    "could not": ("couldn't",),
    "did not": ("didn't",),
    "do not": ("don't",),
    "does not": ("doesn't",),
    "had not": ("hadn't",),
    "has not": ("hasn't",),
    "have not": ("haven't",),
    "is not": ("isn't",),
    "should not": ("shouldn't",),
    "was not": ("wasn't",),
    "were not": ("weren't",),
    "will not": ("won't",),
    "would not": ("wouldn't",),
    "he is": ("he's",),
    "it is": ("it's",),
    "she is": ("she's",),
    "there is": ("there's",),
    "they are": ("they're",),
    "you are": ("you're",),
    "aren't": ("are not",),
    "can't": ("cannot",),
    "couldn't": ("could not",),
    "didn't": ("did not",),
    "doesn't": ("does not",),
    "don't": ("do not",),
    "hadn't": ("had not",),
    "hasn't": ("has not",),
    "haven't": ("have not",),
    "isn't": ("is not",),
    "shouldn't": ("should not",),
    "wasn't": ("was not",),
    "weren't": ("were not",),
    "won't": ("will not",),
    "wouldn't": ("would not",),
    "it's": ("it is",),
    "they're": ("they are",),
    "you're": ("you are",),
}
_BE = {"he is", "it is", "she is", "there is", "they are", "you are"}  # no contraction before a stop
_HAVE_READING = {"it's"}  # "it has" before a participle
_PHRASES = re.compile(
    r"(?<![\w'’-])(?:(?P<article>[Aa]n?) )?(?P<key>"
    + "|".join(re.escape(key).replace("'", "['’]") for key in sorted(LEXICON, key=len, reverse=True))
    + r")(?![\w'’-])",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»|(?<!\w)['‘][^'’\n]*(?:['’]\w+[^'’\n]*)*['’](?!\w)|\*[^*\n]+\*")
_TITLES = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|No|Vol|Inc|Ltd)|(?<!\w)[A-Z])\.$")
WORD = re.compile(r"[^\W_](?:[\w'’.+&/-]*[\w+])?")
_NEXT = re.compile(rf" *({WORD.pattern})")
PARTICIPLE = (
    r"(?:\w+ed|been|born|become|begun|broken|brought|built|chosen|done|drawn|found|given|grown|had|held|kept|known|led"
    r"|made|said|seen|sold|spent|spoken|sung|taken|taught|told|won|written)"
)
_WH = frozenset(("who", "whom", "whose", "what", "which", "where", "when", "why", "how"))
_SMALL = frozenset(("some of", "a few of", "kind of", "sort of", "type of", "toward", "towards", "as well as"))


def reworded_text(text: str, n: int, seed: str) -> list[str]:
    """Up to `n` different other wordings of a text by the lexicon alone, none equal to it; none where no rule fits."""
    rng = random.Random(seed)
    made = dict.fromkeys(relexed(text, rng, share) for share in (1.0, *[0.6] * (3 * n)))
    return [new for new in made if new != text and keeps(text, new)][:n]


def sentence_starts(text: str) -> Iterator[int]:
    """Where sentences begin in a text, its first one aside; none begins in quotation marks."""
    quoted = [match.span() for match in _QUOTED.finditer(text)]
    for match in re.finditer(r"(?<=[.!?])[\"'”’)]?\s+(?=[\"'“‘(]?[A-Z0-9])", text):
        inside = any(first < match.end() < last for first, last in quoted)
        if not inside and not _TITLES.search(text[max(0, match.start() - 8) : match.start()]):
            yield match.end()


def keeps(original: str, new: str) -> bool:
    """Whether a wording has every name and number of the original as often, and no other."""
    had, has = _specifics(original), _specifics(new)
    words = Counter(_bare(word) for word in WORD.findall(new))
    known = {_bare(word) for word in WORD.findall(original)}
    return all(words[key] >= count for key, count in had.items()) and all(
        count <= had[key] if key in had else key in known for key, count in has.items()
    )


def _specifics(text: str) -> Counter[str]:
    """Words with digits or capitals, casefolded; the first word of a sentence only where it is a name."""
    names = names_in(text)
    openings = {first.start() for at in (0, *sentence_starts(text)) if (first := WORD.search(text, at))}
    found: Counter[str] = Counter()
    for match in WORD.finditer(text):
        word = match.group()
        key = _bare(word)
        ordinary = match.start() in openings and (word[1:].islower() or word == "A")
        capital = any(c.isupper() for c in word) and key not in _OWN and not ordinary
        if any(c.isdigit() for c in word) or capital or (key in names and word[0].isupper()):
            found[key] += 1
    return found


_OWN = frozenset(("i", "i'd", "i'm"))  # capitals of the frames


def _bare(word: str) -> str:
    key = word.casefold().replace("’", "'")
    return key[:-2] if key.endswith("'s") else key


def relexed(text: str, rng: random.Random, share: float) -> str:
    """The text with about `share` of what the lexicon knows replaced, at least one of it where there is any."""
    protected = [match.span() for match in _QUOTED.finditer(text)]
    starts = {0, *sentence_starts(text)}
    found = [match for match in _PHRASES.finditer(text) if _fits(match, text, protected, starts)]
    parts, end = list[str](), 0
    for match in [match for match in found if rng.random() < share] or found[:1]:
        key = match["key"].casefold().replace("’", "'")
        new = rng.choice(LEXICON[key])
        if match["article"]:
            article = "an" if new[0] in "aeiou" else "a"
            new = f"{article.capitalize() if match['article'][0] == 'A' else article} {new}"
        elif match["key"][0].isupper():
            new = new[0].upper() + new[1:]
        parts += [text[end : match.start()], new]
        end = match.end()
    return "".join([*parts, text[end:]])


def _fits(match: re.Match[str], text: str, protected: Iterable[tuple[int, int]], starts: set[int]) -> bool:
    key = match["key"].casefold().replace("’", "'")
    follows = _NEXT.match(text, match.end())
    if any(first <= match.start() < last for first, last in protected):
        return False
    if match["key"][0].isupper():
        # a capital that the sentence explains, and that opens no name
        if match.start("key") not in starts or not match["key"][1:].islower() or (follows and follows[1][0].isupper()):
            return False
    elif not match["key"].islower():
        return False
    before = text[max(0, match.start() - 40) : match.start()].split()[-1:]
    if key in _SMALL and before and before[0][0].isupper() and follows and follows[1][0].isupper():
        return False  # a small word inside a name
    if key in _BE:
        return follows is not None and follows.start(1) > match.end()
    if key in _HAVE_READING and follows and re.fullmatch(PARTICIPLE, follows[1]):
        return False
    if "n't" in key:  # written out only where no subject follows, as one does in a question
        opens = match.start() in starts or not before or before[0].casefold() in _WH
        return not (opens or (follows and follows[1].casefold() in ("i", "you", "he", "she", "it", "we", "they")))
    return True
