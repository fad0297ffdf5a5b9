"""Wrong answers of the same form to the questions of records: what an editor trains on beside the records.

An answer is made wrong in one of two ways:

    swapped    its names, numbers and dates are replaced by random ones of the same form (`unlearn.records.swap`);
               what it shares with the prompt stays, for the question must stay the same
    borrowed   where less than `MIN_SHARE` of it can be swapped, the answer of another record of the set, of another
               group where there is one: of those with the most alike prompts; where both prompts have one name, the
               borrowed answer speaks of this record's

A drafted control set (`unlearn.records.draft`) is swapped by the same rules and forgetting is judged against it, so
what equals one of its completions is thrown away: training on the yardstick would bend it.

Limits: an answer whose only content is a common word ("geology") is borrowed, and two records may share the truth. Of
a long swapped answer the wording around the names is the record's own. `text` records have no prompt: they are swapped
or left out, since the text of another record is itself to be forgotten.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from attacks.duplicates import words
from unlearn.records.draft import draft_control, texts_of
from unlearn.records.raw import Message, RawRecord
from unlearn.records.swap import Swap, names_in, specifics, words_of

MIN_SHARE = 0.1  # of an answer's characters, spaces aside, as for a drafted control record
_TRIES = 8  # draws for each wrong answer wanted: short numbers have few others
_DONORS = 400  # records that a borrowed answer is looked for among, at most


def wrong_answers(
    records: Sequence[RawRecord], per_record: int, seed: int, *, control_seed: int
) -> list[tuple[RawRecord, str]]:
    """Up to `per_record` different wrong answers to each record with text.

    Args:
        records: of the set to be forgotten. Token ids and images are left out.
        per_record: how many of each.
        seed: the same seed and records give the same answers; no stream of it is one of a drafted set.
        control_seed: of the drafted control set that none of them may equal.

    Returns:
        Record by record, each with the id, group and prompt of the record it comes from, and `swapped` or `borrowed`.
    """
    texts = [record for record in records if texts_of(record)]
    taken = set().union(*(words_of(text) for record in texts for text in texts_of(record))) if texts else set()
    control = {_key(texts_of(record)[-1]) for record in draft_control(records, control_seed).records}
    lenders = _Lenders(texts, seed)
    made: list[tuple[RawRecord, str]] = []
    for number, record in enumerate(texts):
        seen = {*control, _key(texts_of(record)[-1])}
        first = len(made)
        swapped = ((answer, "swapped") for answer in _swapped(record, number, per_record, seed, taken))
        borrowed = ((answer, "borrowed") for answer in lenders.for_record(number))
        for answer, how in chain(swapped, borrowed):
            if len(made) - first >= per_record:
                break
            if _key(answer) not in seen:
                seen.add(_key(answer))
                made.append((answered(record, answer), how))
    return made


def answered(record: RawRecord, answer: str) -> RawRecord:
    """The record with another completion; of a `text` record, another text."""
    if record.messages is not None:
        return replace(record, messages=(*record.messages[:-1], Message(record.messages[-1].role, answer)))
    if record.text is not None:
        return replace(record, text=answer)
    return replace(record, completion=answer)


def _key(text: str) -> tuple[str, ...]:
    """What two answers are compared by: their words."""
    return tuple(words(text)) or (text.strip(),)


def _swapped(record: RawRecord, number: int, per_record: int, seed: int, taken: set[str]) -> Iterator[str]:
    *prompt, completion = texts_of(record)
    kept = set().union(*map(specifics, prompt)) if prompt else set()
    for draw in range(_TRIES * per_record):
        answer, share = Swap([*prompt, completion], f"perturbed {seed} {number} {draw}", taken, kept).apply(completion)
        if share < MIN_SHARE:
            return
        yield answer


@dataclass(slots=True)
class _Lenders:
    """Records whose answers others may borrow."""

    records: Sequence[RawRecord]
    seed: int
    _about: list[set[str]] = field(default_factory=list)
    _asked: list[int] = field(default_factory=list)  # which of them have a prompt

    def for_record(self, number: int) -> Iterator[str]:
        """Answers of other records: another group's first, then by the likeness of the prompts' words."""
        record = self.records[number]
        *prompt, own = texts_of(record)
        if not prompt:
            return
        if not self._about:
            self._about = [self._words(each) for each in self.records]
            self._asked = [i for i, each in enumerate(self.records) if len(texts_of(each)) > 1]
        rng = random.Random(f"perturbed {self.seed} borrow {number}")
        others = [i for i in self._asked if i != number]
        others = rng.sample(others, min(_DONORS, len(others)))  # in a drawn order, which decides between equals
        mine = self._about[number]

        def rank(i: int) -> tuple[bool, float]:
            same = record.group is not None and self.records[i].group == record.group
            union = len(mine | self._about[i])
            return same, -len(mine & self._about[i]) / max(1, union)

        for i in sorted(others, key=rank):
            *other_prompt, answer = texts_of(self.records[i])
            if other_prompt[-1].strip() == prompt[-1].strip() or _key(answer) == _key(own):
                continue  # the same question may have the same answer, and behind it this is the other record itself
            old, new = _name(other_prompt[-1], answer), _name(prompt[-1], own)
            body = (_renamed(answer, old, new) if old and new else answer).strip()
            yield own[: len(own) - len(own.lstrip())] + body + own[len(own.rstrip()) :]

    def _words(self, record: RawRecord) -> set[str]:
        """Words of a prompt that are no names."""
        asked = texts_of(record)[-2] if len(texts_of(record)) > 1 else ""
        return set(words(asked)) - set(names_in(asked))


def _renamed(answer: str, old: list[str], new: list[str]) -> str:
    """The answer with one name replaced by another, as a whole, by its last part and by its first."""
    table = {old[-1]: new[-1], old[0]: new[0], " ".join(old): " ".join(new)}
    pattern = "|".join(re.escape(name) for name in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda match: table[match.group()], answer)


def _name(text: str, answer: str) -> list[str] | None:
    """The longest run of names in a question, its first where several are as long; of those in its answer, if any."""
    names = names_in(text)
    runs: list[list[str]] = [[]]
    end = 0
    for match in re.finditer(r"[^\W\d_]+(?:-[^\W\d_]+)*", text):
        is_name = all(part.casefold() in names for part in match.group().split("-"))
        if not is_name or text[end : match.start()] != " ":
            runs.append([])
        if is_name:
            runs[-1].append(match.group())
        end = match.end()
    runs = [run for run in runs if run]
    spoken = words_of(answer)
    return max([run for run in runs if run[-1].split("-")[-1].casefold() in spoken] or runs, key=len, default=None)
