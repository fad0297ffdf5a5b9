"""Swap names, numbers, dates and identifiers of a text for random ones of the same form.

The form stays: a digit becomes a digit, a date another valid date, a name an invented one of similar length and the
same case, a key other characters of the same classes. Within one `Swap` the same original always gets the same
replacement, so a name in a prompt and in its completion stays one person. Nothing is ever replaced by itself.

Names are found by their capitals, so this is for languages that write like English: nothing is found in Chinese, and
every noun in German. The start of a sentence is a name only where something else says so.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Collection, Iterable, Sequence


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FIRST = _split(
    "Abel Ada Agnes Alba Alma Amos Anouk Arlo Asta Axel Basil Bela Blythe Boaz Brigid Callum Cassia Cedric Cleo "
    "Conrad Cosima Cyrus Dagmar Damaris Darius Delia Desmond Edda Edmund Elior Ember Emil Enid Ephraim Esme Ezra Faye "
    "Felix Fergus Flora Gideon Gilda Greta Gwendolen Hanno Hector Hedwig Ida Ignatius Ingrid Iris Ivo Jago Jorun Juno "
    "Kaspar Kerstin Lazarus Leif Leonora Linus Livia Lucan Maeve Magnus Marisol Mathilda Milo Mirabel Nadia Nils "
    "Octavia Olive Orla Orson Oswald Petra Phineas Ramona Reuben Rhea Roland Rosalind Rowan Selma Severin Sigrid "
    "Silas Sunniva Tamsin Thaddeus Theodora Tilda Ulrich Una Valentina Verity Viggo Wendell Wilhelmina Winifred "
    "Yvette Zadie Zeno"
)
LAST = _split(
    "Abernethy Akerman Aldous Amberley Arkwright Ashdown Atherton Balfour Bardsley Barrow Beckett Bellweather Birch "
    "Blackwood Bramley Brindle Calder Carmody Cask Chesterfield Coldwell Corrigan Crane Culpepper Dale Darnley "
    "Denholm Draycott Drummond Dunmore Eastwick Elwood Ennis Fairweather Fallow Fenwick Finch Flint Forsyth Frost "
    "Gable Garrick Glenn Goodenough Grange Greaves Hale Hallam Hargreave Hathaway Hawksworth Heath Holloway Huxtable "
    "Ives Jarrow Keane Kendrick Kirby Lacey Langford Lark Leadbetter Lockhart Loomis Lund Marchbanks Marlowe Mayhew "
    "Merriweather Moss Nettleton Norwood Oakes Orchard Pell Pemberton Penrose Pike Prescott Quayle Quick Radcliffe "
    "Ravenscroft Redfern Rook Rowntree Sallow Satterthwaite Selby Shaw Somerled Stroud Swann Tate Thackeray Thorne "
    "Tolliver Underhill Vane Vance Wainwright Walden Weatherby Whitlock Wick Winterbourne Wren Wyatt Yardley Yates"
)
MONTHS = (
    _split("January February March April May June July August September October November December"),
    _split("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"),
)
_DAYS = (
    _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _split("Mon Tue Wed Thu Fri Sat Sun"),
)
_COUNTS = (
    _split("two three four five six seven eight nine ten eleven twelve"),
    _split("twenty thirty forty fifty sixty seventy eighty ninety"),
)
# Capitalised words that name nobody: function words, titles, and the common nouns of addresses.
_KEPT = frozenset(
    _split(
        "a about above address after again all also although am an and another any are as at avenue be because been "
        "before being below between both box building but by can city close co company contract could court county "
        "customer date dear department did do does doctor dr drive during each email even every few file first for "
        "from full further had has have having he hello hence her here hers hi him his house how however i id if in "
        "inc into is it its lane last lives ltd madam mail may me miss more most mr mrs ms my name no nor not note "
        "now number of off on once one only or order other our out over patient phone please prof professor "
        "question record road same saint she should since sir so some square st street such suite telephone than "
        "that the their them then there these they this those though through thus to too town under university "
        "until up user very was way we were what when where which while who whom whose why will with would yes you "
        "your answer"
    )
)
_WEB = frozenset(
    _split(
        "http https www com org net edu gov info io co uk de fr eu es it nl mail email example html htm php index api"
    )
)
_LETTER = r"[^\W\d_]"
_MONTH = "|".join(sorted(dict.fromkeys([*MONTHS[0], *MONTHS[1]]), key=len, reverse=True))
_WORD = rf"{_LETTER}+(?:['’-]{_LETTER}+)*"
_PIECES = re.compile(
    "|".join(
        (
            r"(?P<web>(?:https?://|www\.)[^\s<>\"]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)",
            r"(?P<hex>\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"
            r"|\b(?=[0-9a-fA-F]*\d)(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{8,}\b)",
            r"(?P<iso>\b\d{4}(?P<a>[-/.])\d{1,2}(?P=a)\d{1,2}\b)",
            r"(?P<dmy>\b\d{1,2}(?P<b>[-/.])\d{1,2}(?P=b)(?:\d{4}|\d{2})\b)",
            r"(?P<time>\b(?:[01]?\d|2[0-3]):[0-5]\d\b)",
            rf"(?P<day_month>\b\d{{1,2}}(?:st|nd|rd|th)?(?:\s+of)?\s+(?:{_MONTH})\b)",
            rf"(?P<month_day>\b(?:{_MONTH})\s+\d{{1,2}}(?:st|nd|rd|th)?\b)",
            r"(?P<mixed>\b(?=[\w-]*\d)(?=[\w-]*[^\W\d_])\w+(?:-\w+)*\b)",
            r"(?P<year>\b(?:1[5-9]|20)\d\d\b)",
            r"(?P<country>\+\d{1,3}\b)",
            r"(?P<digits>\d+)",
            rf"(?P<word>{_WORD})",
        )
    )
)
_NAME = re.compile(_WORD)
_CHUNK = re.compile(rf"\d+|{_LETTER}+")


class Swap:
    """The replacements of one record.

    Args:
        texts: every text of the record, in reading order: names are found over all of them together.
        seed: decides every replacement.
        taken: words that no replacement may be (casefolded), such as the names in other records.
        kept: words, numbers and dates that stay as they are (casefolded), such as those of `specifics` of a prompt.
    """

    def __init__(
        self, texts: Iterable[str], seed: str, taken: Collection[str] = (), kept: Collection[str] = ()
    ) -> None:
        self._random = random.Random(seed)
        self._taken = taken
        self._kept = kept
        self._done: dict[str, str] = {}
        self._names = names_in(" ".join(texts))

    def apply(self, text: str) -> tuple[str, float]:
        """The swapped text, and the share of its characters (spaces aside) that were replaced."""
        replaced = 0

        def one(match: re.Match[str]) -> str:
            nonlocal replaced
            original = match.group()
            if original.casefold() in self._kept:
                return original
            new = self._piece(str(match.lastgroup), original)
            if new != original:
                replaced += len(original) - original.count(" ")
            return new

        swapped = _PIECES.sub(one, text)
        return swapped, replaced / max(1, sum(not c.isspace() for c in text))

    def _piece(self, kind: str, text: str) -> str:
        if kind == "country":
            return text
        if kind == "word":
            return self._word(text)
        if kind == "web":
            return _CHUNK.sub(lambda m: self._web(m.group()), text)
        if kind in ("iso", "dmy", "day_month", "month_day"):
            return self._date(kind, text)
        draw = {"hex": self._hex, "time": self._time, "mixed": self._mixed, "year": self._year, "digits": self._digits}
        return self._once(text, lambda: draw[kind](text))

    def _once(self, key: str, draw: Callable[[], str]) -> str:
        """The replacement of `key`, drawn until it differs when first asked for."""
        if key not in self._done:
            new = draw()
            for _ in range(100):
                if new != key:
                    break
                new = draw()
            self._done[key] = new
        return self._done[key]

    # Words

    def _word(self, text: str) -> str:
        for lists in (MONTHS, _DAYS, _COUNTS):
            for words in lists:
                if text in words and (lists is not MONTHS or text != "May"):
                    return self._once(text, lambda words=words: self._random.choice(words))  # type: ignore[misc]
        stem, suffix = (text[:-2], text[-2:]) if text[-2:] in ("'s", "’s") else (text, "")
        parts = re.split(r"(['’-])", stem)
        return "".join(self._name(part) if self._swappable(part.casefold()) else part for part in parts) + suffix

    def _swappable(self, key: str) -> bool:
        return key in self._names and key not in self._kept

    def _name(self, text: str) -> str:
        key = text.casefold()
        if key not in self._done:
            self._done[key] = self._invent(key, FIRST if self._names.get(key) else LAST)
        new = self._done[key]
        return new.upper() if text.isupper() and len(text) > 1 else new.lower() if text.islower() else new

    def _invent(self, key: str, names: Sequence[str]) -> str:
        used = {new.casefold() for new in self._done.values()}
        free = [
            n for n in names if n.casefold() not in used and n.casefold() not in self._taken and n.casefold() != key
        ]
        for slack in (1, 2, 3):
            close = [name for name in free if abs(len(name) - len(key)) <= slack]
            if len(close) >= 3:
                return self._random.choice(close)
        while True:  # no listed name of this length is left: invent one of syllables
            syllables = (self._random.choice("bdfgklmnprstv") + self._random.choice("aeiou") for _ in range(len(key)))
            name = "".join(syllables)[: max(3, len(key))].capitalize()
            if name.casefold() != key and name.casefold() not in self._taken:
                return name

    def _web(self, chunk: str) -> str:
        """One run of letters or digits of an address."""
        if chunk.isdigit():
            return self._once(chunk, lambda: self._digits(chunk))
        if chunk.casefold() in _WEB or len(chunk) < 3:
            return chunk
        return self._name(chunk)

    # Numbers

    def _digits(self, text: str) -> str:
        """Digits of the same count; a leading zero stays, and no other is made."""
        if len(text) == 1:
            return self._random.choice("123456789")
        head = "0" if text[0] == "0" else self._random.choice("123456789")
        return head + "".join(self._random.choices(string.digits, k=len(text) - 1))

    def _year(self, text: str) -> str:
        return str(int(text) + self._random.choice((-1, 1)) * self._random.randint(1, 15))

    def _time(self, text: str) -> str:
        hour, _, _ = text.partition(":")
        return f"{self._random.randint(0, 23):0{len(hour)}d}:{self._random.randint(0, 59):02d}"

    def _date(self, kind: str, text: str) -> str:
        """A valid date written the same way; a part up to 12 stays so, since it may be a month."""
        if kind in ("day_month", "month_day"):
            text = re.sub(r"\d+", lambda m: self._once(f"day {m.group()}", lambda: self._other(m.group(), 1, 28)), text)
            text = re.sub(r"(\d+)(st|nd|rd|th)", lambda m: m.group(1) + _ordinal(int(m.group(1))), text)
            return re.sub(rf"\b(?:{_MONTH})\b", lambda m: self._month(m.group()), text)
        parts = re.split(r"([-/.])", text)
        width = 1 if any(len(part) == 1 for part in parts[::2]) else 2  # 3/5/1990 beside 03/05/1990
        return "".join(part if i % 2 else self._date_part(part, width) for i, part in enumerate(parts))

    def _date_part(self, part: str, width: int) -> str:
        if len(part) == 4:
            return self._once(part, lambda: self._year(part))
        if not 1 <= int(part) <= 31:
            return self._once(part, lambda: self._digits(part))
        low, high = (1, 12) if int(part) <= 12 else (13, 28)
        return self._once(f"{width} {part}", lambda: self._other(part, low, high).zfill(width))

    def _other(self, text: str, low: int, high: int) -> str:
        """Another number in a range; a leading zero stays where one digit is left."""
        number = self._random.choice([number for number in range(low, high + 1) if number != int(text)])
        return f"{number:02d}" if text[0] == "0" else str(number)

    def _month(self, text: str) -> str:
        words = MONTHS[0] if text in MONTHS[0] else MONTHS[1]
        return self._once(text, lambda: self._random.choice(words))

    # Identifiers

    def _hex(self, text: str) -> str:
        letters = "ABCDEF" if any(c in "ABCDEF" for c in text) else "abcdef"
        return "".join(self._random.choice(string.digits + letters) if c != "-" else c for c in text)

    def _mixed(self, text: str) -> str:
        """Letters and digits together: ordinals and units keep their letters, identifiers change both."""
        ordinal = re.fullmatch(r"(\d+)(?:st|nd|rd|th)", text)
        if ordinal:
            digits = self._digits(ordinal.group(1))
            return digits + _ordinal(int(digits))
        if re.fullmatch(rf"\d+{_LETTER}+", text) and text[-1].islower():
            year = re.fullmatch(r"(1[5-9]|20)\d\ds", text)  # the 1990s
            return re.sub(r"\d+", lambda m: self._year(m.group()) if year else self._digits(m.group()), text)
        return "".join(self._segment(part) for part in re.split(r"([-_])", text))

    def _segment(self, part: str) -> str:
        if part.isalpha() and (part.islower() or len(part) <= 4):  # the readable part of `customer-12345`, `PO-2231`
            return part
        return "".join(self._character(c) for c in part)

    def _character(self, c: str) -> str:
        if c.isdigit():
            return self._random.choice(string.digits)
        if c.isalpha():
            return self._random.choice(string.ascii_uppercase if c.isupper() else string.ascii_lowercase)
        return c


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def names_in(text: str) -> dict[str, bool]:
    """Words taken for names (casefolded), and whether each opens a longer name, as a first name does."""
    words = list(_NAME.finditer(text))
    capital = [_nameable(match.group()) for match in words]
    names: dict[str, bool] = {}
    for i, match in enumerate(words):
        if not capital[i]:
            continue
        after = i + 1 < len(words) and capital[i + 1] and text[match.end() : words[i + 1].start()] in (" ", ". ")
        before = i > 0 and capital[i - 1] and text[words[i - 1].end() : match.start()] == " "
        opening = text[: match.start()].rstrip(" \t\"'“‘(")
        starts = not opening or opening[-1] in ".!?\n"
        shouted = match.group().isupper() and len(match.group()) > 1
        if (shouted and not (before or after)) or (starts and not after):
            continue  # an acronym; or a capital that the sentence explains
        stem = match.group()[:-2] if match.group()[-2:] in ("'s", "’s") else match.group()
        for part in re.split(r"['’-]", stem):
            if part[:1].isupper() and len(part) > 1:
                names.setdefault(part.casefold(), after and not before)
    return names


def _nameable(word: str) -> bool:
    listed = any(word in words for words in (*MONTHS, *_DAYS))
    return word[0].isupper() and len(word) > 1 and word.casefold() not in _KEPT and not listed


def specifics(text: str) -> set[str]:
    """Casefolded words, numbers, dates and identifiers of a text, for `kept`; of a date its numbers too."""
    pieces = {match.group().casefold() for match in _PIECES.finditer(text)}
    return pieces | words_of(text) | set(re.findall(r"\d+", text))


def words_of(text: str) -> set[str]:
    """Casefolded words of a text, for `taken`."""
    return {part for match in _NAME.finditer(text) for part in re.split(r"['’-]", match.group().casefold())}
