r"""Personal data and secrets in text: where they stand, and of which kind. No model, no network.

A pattern proposes a span, and where the kind has a rule that can be checked, the rule decides:

    email          an address of the common form local@domain.tld (no quoted local parts)
    phone          an international number (+ or 00), or a national one written with separators; 8 to 15 digits (E.164)
    iban           country, its length, and the check digits: the number modulo 97 is 1 (ISO 13616, ISO 7064)
    card           a card network's prefix and length, and the Luhn check digit (ISO/IEC 7812)
    ipv4, ipv6     an address that parses, and is no version number, time or hardware address
    aws_key        an access key id (AKIA or ASIA and 16 characters)
    github_token   a token with one of GitHub's prefixes
    jwt            three base64url parts, the first of which is a JSON header with an algorithm
    private_key    a PEM block of a private key
    secret         a value assigned to a name such as password or api_key, or a long token that looks random

Names, addresses and dates of birth need a language model; `presidio` asks Microsoft Presidio, where it is installed.
Patterns of the caller's own can be added.

Limits: these are detectors of form. A made-up number with a valid check digit (1 in 10 for a card, 1 in 97 for an IBAN)
is reported; a number written in words is not. National phone numbers without separators are not reported, because any
number looks like one. Of random tokens without a known format about 97 % are found at
24 characters and 99 % from 32, among them an occasional long identifier in camel case.
"""

from __future__ import annotations

import base64
import bisect
import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from probes.errors import ResourceError, UsageError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Where something stands in a text. Holds no text.

    Attributes:
        start: index of the first character.
        end: index after the last character.
        kind: what it is.
    """

    start: int
    end: int
    kind: str


def find(text: str, kinds: Iterable[str] | None = None, patterns: Mapping[str, str] | None = None) -> list[Span]:
    """Find personal data and secrets.

    Args:
        text: where to look.
        kinds: which of `KINDS` and of the names of `patterns` to look for; all of them by default. `presidio:PERSON`
            asks Microsoft Presidio for one of its kinds.
        patterns: more kinds, name -> regular expression. A group named `value` narrows the span. A name of `KINDS`
            replaces that detector.

    Returns:
        Spans in order, without overlaps: where two meet, the kind that is checked more strictly stands, then the longer
        one, then the first. The caller's own kinds go before all.

    Raises:
        UsageError: an unknown kind, or a pattern that is no regular expression.
        ResourceError: a kind of Presidio's, which is not installed.
    """
    own = {name: _compiled(pattern) for name, pattern in (patterns or {}).items()}
    named = list(dict.fromkeys([*own, *KINDS] if kinds is None else kinds))
    asked = [kind.removeprefix(PRESIDIO) for kind in named if kind.startswith(PRESIDIO)]
    wanted = [kind for kind in named if not kind.startswith(PRESIDIO)]
    if unknown := [kind for kind in wanted if kind not in own and kind not in KINDS]:
        raise UsageError(
            f"expected kinds of personal data among {', '.join(KINDS)}, found {len(unknown)} unknown; "
            "correct the list or give a pattern for them"
        )
    found: list[tuple[int, Span]] = []
    ranks = {kind: rank for rank, kind in enumerate([*own, *(kind for kind in KINDS if kind not in own)])}
    for kind in wanted:
        spans = _matches(own[kind], text) if kind in own else _DETECTORS[kind](text)
        found += [(ranks[kind], Span(start, end, kind)) for start, end in spans if start < end]
    if asked:  # last in rank: what a checksum or a pattern settles is better known
        found += [(len(ranks), span) for span in presidio(text, asked)]
    return _resolve(found)


def canonical(kind: str, value: str) -> str:
    """One spelling for values that mean the same: case, separators and prefixes of a number do not count.

    Args:
        kind: of the value.
        value: as it stands in a text.

    Returns:
        A string to compare with others of the same kind.
    """
    if kind == "phone":
        digits = re.sub(r"\D", "", value.replace("(0)", ""))
        return digits.removeprefix("00") if value.lstrip().startswith("00") else digits
    if kind in ("iban", "card"):
        return re.sub(r"[\s-]", "", value).upper()
    if kind == "email":
        return value.casefold()
    if kind in ("ipv4", "ipv6"):
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            return value
    if kind in ("aws_key", "github_token", "jwt", "secret"):
        return value  # case carries information
    return " ".join(value.split()).casefold()


def presidio(text: str, entities: Sequence[str] | None = None, language: str = "en") -> list[Span]:
    """Ask Microsoft Presidio, for kinds that need a language model (PERSON, LOCATION, DATE_TIME and others).

    Args:
        text: where to look.
        entities: Presidio's names of the kinds wanted; all it knows by default.
        language: of the text.

    Returns:
        Spans in order, without overlaps (higher score first), with Presidio's names in lower case as kinds.

    Raises:
        ResourceError: the package presidio-analyzer, or the language model it uses, is not installed.
    """
    try:
        from presidio_analyzer import AnalyzerEngine  # type: ignore[import-not-found,unused-ignore]

        engine = _ENGINES.get(language) or AnalyzerEngine(supported_languages=[language])
    except (ImportError, OSError, SystemExit) as error:  # it exits where it cannot download its language model
        raise ResourceError(
            f"expected the package presidio-analyzer and its language model, found {type(error).__name__}; "
            "pip install presidio-analyzer and a spaCy model"
        ) from None
    _ENGINES[language] = engine
    results = engine.analyze(text=text, entities=list(entities) if entities else None, language=language)
    return _resolve(
        [(int(-1e6 * result.score), Span(result.start, result.end, result.entity_type.lower())) for result in results]
    )


PRESIDIO = "presidio:"  # in front of the kinds that it is asked for
_ENGINES: dict[str, Any] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError):
        raise UsageError(
            "expected a regular expression for each kind of the caller's own, found something else; correct the pattern"
        ) from None


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    group: str | int = "value" if "value" in pattern.groupindex else 0
    return (match.span(group) for match in pattern.finditer(text))


def _resolve(found: list[tuple[int, Span]]) -> list[Span]:
    """Spans that do not overlap, by rank, then length, then place."""
    taken: list[Span] = []  # in order
    for _, span in sorted(found, key=lambda item: (item[0], item[1].start - item[1].end, item[1].start)):
        place = bisect.bisect(taken, span)
        before, after = taken[place - 1 : place], taken[place : place + 1]
        if all(other.end <= span.start for other in before) and all(span.end <= other.start for other in after):
            taken.insert(place, span)
    return taken


# --- checks ---------------------------------------------------------------------------------------------------------


def luhn(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit of the others."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def mod97(iban: str) -> bool:
    """Whether an IBAN without spaces has its check digits right."""
    moved = iban[4:] + iban[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def entropy(text: str) -> float:
    """Entropy of the characters of a text in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


# --- detectors ------------------------------------------------------------------------------------------------------

# All patterns use re.ASCII, so that a script without spaces does not hide what it stands next to; and every repetition
# is bounded or has only one way to match, so that no text takes more than linear time.

_LETTER = "A-Za-zÀ-ɏ"
_EMAIL = re.compile(
    rf"(?<![{_LETTER}0-9_.%+@-])[{_LETTER}0-9_%+-]{{1,64}}(?:\.[{_LETTER}0-9_%+-]{{1,64}}){{0,8}}"
    rf"@(?:[{_LETTER}0-9](?:[{_LETTER}0-9-]{{0,61}}[{_LETTER}0-9])?\.){{1,8}}[{_LETTER}]{{2,24}}"
    rf"(?![{_LETTER}0-9_@-]|\.[{_LETTER}0-9_])"
)


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text):
        if len(match[0]) <= 254 and len(match[0].partition("@")[0]) <= 64:
            yield match.span()


_GAP = r"(?:[ ./-]| ?\((?=\d)|\)[ -]?)"
_PHONE = re.compile(
    r"(?<![\w+./:,@-])(?:(?:\+|00(?=[1-9]))\d{1,15}|\(0?\d{1,5}(?=\))|\d{1,6}(?=[ ./(-]))"
    rf"(?:{_GAP}\d{{1,14}}){{0,8}}"
    r"(?!\w|[.,/:-]\d)",
    re.ASCII,
)
_NATIONAL = re.compile(
    r"\(0?\d{1,5}\)[ -]?\d{2,8}(?:[ -]\d{1,8}){0,4}"  # (030) 123 456, (555) 123-4567
    r"|\d{3}([ .-])\d{3}\1\d{4}"  # 555-123-4567
    r"|1[ -]\d{3}[ -]\d{3}[ -]\d{4}"  # 1-800-555-0199
    r"|0\d([ .-])(?:\d{2}\2){3}\d{2}"  # 06 12 34 56 78
    r"|0\d{2,5}[ /-]\d{3,9}(?:[ -]\d{1,6}){0,3}",  # 030 1234567, 020 7946 0123
    re.ASCII,
)
_DATE = re.compile(r"\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ]\d{2,4}", re.ASCII)


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for match in _PHONE.finditer(text):
        ends = [group.end() for group in re.finditer(r"\d+", match[0])]
        if end := next((end for end in reversed(ends) if _is_phone(match[0][:end])), None):
            yield match.start(), match.start() + end


def _is_phone(value: str) -> bool:
    international = value.startswith(("+", "00"))
    digits = re.sub(r"\D", "", value).removeprefix("00" if value.startswith("00") else "")
    if not 8 <= len(digits) <= 15 or len(set(digits)) == 1 or value.count("(") != value.count(")"):
        return False
    return international or (_NATIONAL.fullmatch(value) is not None and not _DATE.fullmatch(value))


_IBAN_LENGTHS = {
    country: int(length)
    for country, length in (
        item.split(":")
        for item in (
            "AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BI:27 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24 DE:22 "
            "DJ:27 DK:18 DO:28 EE:20 EG:29 ES:24 FI:18 FK:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28 HR:21 "
            "HU:28 IE:22 IL:23 IQ:23 IS:26 IT:27 JO:30 KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20 LV:21 LY:25 MC:27 "
            "MD:24 ME:22 MK:19 MN:20 MR:27 MT:31 MU:30 NI:28 NL:18 NO:15 OM:23 PK:24 PL:28 PS:29 PT:25 QA:29 RO:24 "
            "RS:22 RU:33 SA:24 SC:31 SD:18 SE:24 SI:19 SK:24 SM:27 SO:23 ST:25 SV:28 TL:23 TN:24 TR:26 UA:29 VA:22 "
            "VG:24 XK:20 YE:30"
        ).split()
    )
}
_IBAN = re.compile(r"(?<![A-Za-z0-9])(?=([A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}))", re.ASCII)


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[1][:2].upper(), 99)
        places = [i for i, character in enumerate(match[1]) if character.isalnum()][:length]
        end = match.start() + places[-1] + 1  # what follows may be the next word, but no letter of this one
        complete = len(places) == length and not re.match(r"[A-Za-z0-9]", text[end : end + 1])
        if complete and mod97("".join(match[1][i] for i in places).upper()):
            yield match.start(), end


_CARD = re.compile(  # in one run, in fours, or 4-6-5 and 4-6-4
    r"(?<![\w.,:/+-])(?=(?:(\d{12,19})|(\d{4}(?:(?P<gap>[ -])\d{4})(?:(?P=gap)\d{4}){1,2}(?:(?P=gap)\d{1,4})?)"
    r"|(\d{4}(?P<gap6>[ -])\d{6}(?P=gap6)\d{4,5}))(?!\d))",
    re.ASCII,
)
_CARD_NETWORKS = (
    (re.compile(r"4"), {13, 16, 19}),  # Visa
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), {16}),  # Mastercard
    (re.compile(r"3[47]"), {15}),  # American Express
    (re.compile(r"30[0-5]|3[689]"), set(range(14, 20))),  # Diners Club
    (re.compile(r"6011|64[4-9]|65"), set(range(16, 20))),  # Discover
    (re.compile(r"35(?:2[89]|[3-8])"), set(range(16, 20))),  # JCB
    (re.compile(r"62"), set(range(16, 20))),  # UnionPay
    (re.compile(r"50|5[6-9]|6[0379]"), set(range(12, 20))),  # Maestro
)
_DIGIT_GROUPS = re.compile(r"\d+", re.ASCII)
_NUMBER_GOES_ON = re.compile(r"\w|[.,-]\d", re.ASCII)


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        number = match[1] or match[2] or match[4]
        for group in reversed(list(_DIGIT_GROUPS.finditer(number))):  # the last may be an expiry date or a check code
            end = match.start() + group.end()
            if _is_card(re.sub(r"\D", "", text[match.start() : end])) and not _NUMBER_GOES_ON.match(text, end):
                yield match.start(), end
                break


def _is_card(digits: str) -> bool:
    known = any(prefix.match(digits) and len(digits) in lengths for prefix, lengths in _CARD_NETWORKS)
    return known and len(set(digits)) > 1 and luhn(digits)


_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)", re.ASCII)
_VERSION = re.compile(
    r"(?:\bv|\bver|\bversions?|\breleases?|\brev|\brevision|\bbuild|\bupdate|\bpatch|\bfirmware|[A-Za-z0-9_]/)"
    r"\.?[ :=]{0,2}$",
    re.IGNORECASE | re.ASCII,
)


def _ipv4(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text):
        if any(int(octet) > 255 or str(int(octet)) != octet for octet in match[0].split(".")):
            continue
        if not _VERSION.search(text, max(0, match.start() - 12), match.start()):
            yield match.span()


_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?:(?<=:)\d{1,3}(?:\.\d{1,3}){3})?(?![\w:]|\.\d)", re.ASCII)


def _ipv6(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV6.finditer(text):
        value = match[0]
        if value.count(":") < 2 or not any(character.isdigit() for character in value):
            continue  # `a::b` is an address, but more often a name in C++
        try:
            ipaddress.IPv6Address(value)
        except ValueError:
            continue
        yield match.span()


_AWS = re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Za-z0-9])", re.ASCII)
_GITHUB = re.compile(r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_\w{82})(?!\w)", re.ASCII)
_JWT = re.compile(r"(?<![\w.-])eyJ[\w-]{8,4096}\.[\w-]{2,16384}\.[\w-]{0,4096}(?![\w-])", re.ASCII)


def _jwts(text: str) -> Iterator[tuple[int, int]]:
    for match in _JWT.finditer(text):
        head = match[0].partition(".")[0]
        try:
            header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
        except (ValueError, RecursionError):
            continue
        if isinstance(header, dict) and "alg" in header:
            yield match.span()


_PEM = re.compile(
    r"-----BEGIN (?P<label>(?:[A-Z]{2,10} ){0,2}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?s:.{0,20000}?)-----END (?P=label)-----|[A-Za-z0-9+/=\s\\]{16,20000})",  # the end may be cut off
    re.ASCII,
)

_ASSIGNED = re.compile(
    r"(?i:\b\w{0,30}(?:password|passwd|pwd|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key)\w{0,10})"
    r"[\"']?\s{0,3}(?:=>|:=|[:=]|\bis\b)\s{0,3}[\"']?(?P<value>[^\s\"'<>,;]{8,200})",
    re.ASCII,
)
_RANDOM = re.compile(r"(?<![A-Za-z0-9+/_=.-])[A-Za-z0-9+/_-]{24,200}={0,2}(?![A-Za-z0-9+/_=-])", re.ASCII)
_CLASSES = (str.islower, str.isupper, str.isdigit)
MIN_ENTROPY = 3.5  # bits a character of a random token; 24 random base-64 characters have about 4.3
MIN_CHANGES = 0.4  # share of neighbours of different class; a random token has about 0.62, camelCaseWords about 0.3


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    for match in _ASSIGNED.finditer(text):
        value = match["value"].rstrip(".!?)]}")
        if len(value) >= 8 and any(map(str.isdigit, value)) and any(map(str.isalpha, value)) and "://" not in value:
            yield match.start("value"), match.start("value") + len(value)
    for match in _RANDOM.finditer(text):
        if _looks_random(match[0]):
            yield match.span()


def _looks_random(token: str) -> bool:
    """Whether all three classes of characters alternate as often as in a random token, and few repeat."""
    classes = [next((i for i, test in enumerate(_CLASSES) if test(character)), 3) for character in token.rstrip("=")]
    if not {0, 1, 2} <= set(classes):
        return False
    changes = sum(a != b for a, b in pairwise(classes))
    return changes >= MIN_CHANGES * (len(classes) - 1) and entropy(token) >= MIN_ENTROPY


def _plain(pattern: re.Pattern[str]) -> Callable[[str], Iterator[tuple[int, int]]]:
    return lambda text: _matches(pattern, text)


# In the order in which they win where spans meet.
_DETECTORS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "private_key": _plain(_PEM),
    "jwt": _jwts,
    "github_token": _plain(_GITHUB),
    "aws_key": _plain(_AWS),
    "iban": _ibans,
    "card": _cards,
    "email": _emails,
    "ipv6": _ipv6,
    "ipv4": _ipv4,
    "phone": _phones,
    "secret": _secrets,
}
KINDS: tuple[str, ...] = tuple(_DETECTORS)
