"""Other wordings and wrong answers of the records to forget, as an editor asks for them (`unlearn.editors.base.Texts`).

Nothing is made before an editor asks. Three sources of wordings: a file (`unlearn.records.wordings`), the checkpoint
itself (`unlearn.records.rewriter`), rules (`unlearn.records.paraphrase`), which also stand in for what the checkpoint
words badly. Every second wording by rules or by the checkpoint has the completion reworded too, where a rule fits, so
that what is learned is not one string.

Limits: wordings of one record are not independent of each other, and all of them hold what is to be forgotten: they
are as private as the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probes.errors import UsageError
from probes.records import TokenRecord
from unlearn.editors.base import Rewording
from unlearn.records.draft import texts_of
from unlearn.records.lexicon import reworded_text
from unlearn.records.paraphrase import reworded_prompt
from unlearn.records.raw import RawRecord
from unlearn.records.rewriter import Rewriter
from unlearn.records.wordings import Supplied, prompt_of, read_wordings, reworded
from unlearn.records.wronganswers import answered, wrong_answers

Encode = Callable[[list[RawRecord]], list[TokenRecord]]


@dataclass(slots=True)
class Augmented:
    """The records to forget with their text, and what other texts are made of them.

    Attributes:
        records: as read; those without text (token ids, images) get no wordings.
        encode: text to tokens, as the records themselves were encoded; raises UsageError for what does not fit.
        control_seed: of a drafted control set, which no wrong answer may equal.
        file: of supplied wordings.
        scored: prompts that an attack scores, which must not be trained on.
        rewriter: makes a `Rewriter` of the checkpoint.
    """

    records: Sequence[RawRecord] = field(repr=False)
    encode: Encode = field(repr=False)
    control_seed: int
    file: Path | None = field(default=None, repr=False)
    scored: Sequence[str] = field(default=(), repr=False)
    rewriter: Callable[[], Rewriter] | None = field(default=None, repr=False)
    _counts: dict[str, Counter[str]] = field(default_factory=dict, repr=False)
    _supplied: Supplied | None = field(default=None, repr=False)

    def paraphrases(self, per_record: int, how: Rewording, seed: int) -> list[TokenRecord]:
        """The records in other words: up to so many of each, record by record, under the record's own id and group.

        Raises:
            UsageError: none were supplied, or the file has mistakes.
            UnsupportedError: the checkpoint is to reword and cannot generate.
        """
        records = [record for record in self.records if texts_of(record)]
        made: list[tuple[RawRecord, str]] = []
        if per_record > 0:
            if how == "supplied":
                made = self._of_file(records, per_record)
            else:
                asked = self._asked(records, per_record, seed) if how == "model" else [[] for _ in records]
                made = [
                    pair
                    for number, (record, own) in enumerate(zip(records, asked, strict=True))
                    for pair in self._reworded(record, own, per_record, how, f"{seed} {number}")
                ]
        return self._encoded("paraphrases", made, strict=how == "supplied")

    def perturbed(self, per_record: int, seed: int) -> list[TokenRecord]:
        """The records with wrong answers of the same form: up to so many of each, record by record."""
        wrong = wrong_answers(self.records, max(0, per_record), seed, control_seed=self.control_seed)
        return self._encoded("perturbed", wrong, strict=False)

    def supplied(self) -> Supplied:
        """The supplied wordings, read once.

        Raises:
            UsageError: there is no file, or it has mistakes.
        """
        if self.file is None:
            raise UsageError("expected paraphrase_file with the paraphrases to train on, found none; name a JSONL file")
        if self._supplied is None:
            self._supplied = read_wordings(self.file, self.records, self.scored)
        return self._supplied

    def report(self) -> dict[str, Any]:
        """Numbers about what was made last, without any text: of each kind how many by source, and the file's digest.

        `without` counts records, `too_long` wordings that do not fit the model's context; the rest counts texts.
        """
        made: dict[str, Any] = {what: dict(sorted(counts.items())) for what, counts in self._counts.items()}
        if self._supplied is not None:
            made["paraphrase_file"] = {"sha256": self._supplied.sha256}
        return made

    def _of_file(self, records: Sequence[RawRecord], per_record: int) -> list[tuple[RawRecord, str]]:
        given = self.supplied().wordings
        return [(new, "supplied") for record in records for new in given.get(record.id, ())[:per_record]]

    def _asked(self, records: Sequence[RawRecord], per_record: int, seed: int) -> list[list[str]]:
        """[R] wordings by the checkpoint, of the prompt or of the whole text."""
        if self.rewriter is None:
            raise UsageError("expected a checkpoint that can reword, found none; choose rules or supply a file")
        texts = []
        for record in records:
            prompt = prompt_of(record)
            completion = "" if record.text is not None else texts_of(record)[-1]
            texts.append(((record.text if record.text is not None else prompt) or "", completion))
        return self.rewriter().reword(texts, per_record, seed)

    def _reworded(
        self, record: RawRecord, own: Sequence[str], per_record: int, how: Rewording, seed: str
    ) -> list[tuple[RawRecord, str]]:
        """Wordings of one record with their source: the checkpoint's own first, then those of the rules."""
        stand_in = "rules" if how == "rules" else "fallbacks"
        if record.text is not None:
            by_rule = [text for text in reworded_text(record.text, per_record, f"text {seed}") if text not in own]
            found = [(text, "model") for text in own] + [(text, stand_in) for text in by_rule]
            return [(answered(record, text), source) for text, source in found[:per_record]]
        prompt = prompt_of(record)
        if prompt is None:
            return []
        by_rule = [text for text in reworded_prompt(prompt, per_record, f"prompt {seed}") if text not in own]
        found = ([(text, "model") for text in own] + [(text, stand_in) for text in by_rule])[:per_record]
        answers = reworded_text(texts_of(record)[-1], (len(found) + 1) // 2, f"answer {seed}")
        made = []
        for i, (text, source) in enumerate(found):
            answer = answers[i // 2 % len(answers)] if answers and i % 2 else None
            made.append((reworded(record, text, answer), source))
        return made

    def _encoded(self, what: str, made: Sequence[tuple[RawRecord, str]], *, strict: bool) -> list[TokenRecord]:
        """Tokens of what was made, counted by source; a text that does not fit is an error only where it is a user's.

        A rewording can be a few tokens longer than a record that just fits.
        """
        counts: Counter[str] = Counter()
        tokens: list[TokenRecord] = []
        try:
            tokens = self.encode([record for record, _ in made]) if made else []
            counts.update(source for _, source in made)
        except UsageError:
            if strict:
                raise
            for record, source in made:
                try:
                    tokens += self.encode([record])
                    counts[source] += 1
                except UsageError:
                    counts["too_long"] += 1
        with_some = {record.record_id for record in tokens}
        counts["without"] = sum(record.id not in with_some for record in self.records if texts_of(record))
        self._counts[what] = counts
        return tokens
