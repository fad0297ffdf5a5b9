r"""Games about personal data: extraction, reconstruction and inference.

Lukas et al. 2023 (arXiv 2302.00539). Of a sentence with one value masked, `prefix [value] suffix`,

    inference        the attacker holds a list of candidates, and names the one that makes the sentence likeliest;
    reconstruction   the attacker holds no list: candidates are sampled from the model after the prefix, and ranked in
                     the same way;
    extraction       the attacker holds nothing: values are picked out of free samples.

The likelihood of a sentence is its log p(value, suffix | prefix), summed over tokens of one joint tokenisation; the
prefix is common to all candidates and drops out. The paper ranks by perplexity, a mean over tokens, which favours
candidates of many easy tokens; `per_token=True` does that.

A model that copies a value from its prompt has memorised nothing: published leakage was in part driven by such surface
cues (arXiv 2601.03791). Questions whose prompt holds much of the answer's characters are flagged and counted apart.

Limits: an accuracy means something only beside its chance level, and where the candidates were drawn as the answer was:
a rare name among frequent ones is found, or missed, without any training on the record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import nn

from attacks.exposure import ROUNDING, built_record
from attacks.extraction.untargeted import sample
from attacks.pii.detectors import canonical, find
from probes import likelihood
from probes.errors import UsageError
from probes.likelihood import SamplingScheme
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.statistics import Floats, Interval, clopper_pearson, mean_interval

CUED = 0.5  # share of the answer's character n-grams in the prompt from which a question counts as cued
TOP_K = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class Question:
    """A sentence with one value masked.

    Attributes:
        question_id: the caller's identifier.
        record: the sentence with a given value in the masked place, tokenised as one text. The prompt of the record is
            what stands before the value, its completion the value and what follows.
        answer: the value that stood there.
        candidates: for inference, what may stand there; the answer is added where it is missing.
        kind: of the value, as in `attacks.pii.detectors`; decides how spellings are compared.
        prompt: the text around the masked place, for the flag of surface cues.
        group: subject or near-duplicate cluster, for intervals.
    """

    question_id: str
    record: Callable[[str], TokenRecord] = field(repr=False)
    answer: str = field(repr=False)
    candidates: tuple[str, ...] = field(default=(), repr=False)
    kind: str = ""
    prompt: str = field(default="", repr=False)
    group: Hashable | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Game:
    """Outcome of an inference or reconstruction game. Holds no text.

    Attributes:
        status: "ok", or "not resolvable" where every question is cued.
        reason: why not, or None.
        accuracy: share of the questions without a surface cue whose answer ranks first; None if not resolvable.
        top_k: k -> share whose answer is among the first k.
        chance: k -> the same share for a guess among the same candidates that does not look at the model.
        cued: share of cued questions whose answer ranks first; None if there are none.
        table: per question: question_id, candidates (how many), rank (missing where the answer was no candidate; ties
            count against the finding), hit (rank 1), margin (nats by which the answer is likelier than the best other
            candidate; missing without one), overlap, cued.
        scored: records scored by the model.
        generated_tokens: tokens sampled.
    """

    status: str
    reason: str | None
    accuracy: Interval | None
    top_k: Mapping[int, Interval]
    chance: Mapping[int, float]
    cued: Interval | None
    table: pd.DataFrame = field(repr=False)
    scored: int
    generated_tokens: int


def inference(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    per_token: bool = False,
    top_k: Sequence[int] = TOP_K,
    cued: float = CUED,
    seed: int = 0,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: likelihood.Progress | None = None,
) -> Game:
    """Which of the given candidates stood in the masked place?

    Args:
        model: a causal language model; left as found.
        questions: at least one, each with at least two different candidates, the answer included.
        per_token: rank by perplexity instead of likelihood.
        top_k: which shares to report besides the first place.
        cued: overlap from which a question counts as cued.
        seed: of the intervals.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens per batch.
        progress: called with (records scored, records in all).

    Returns:
        The outcome.

    Raises:
        UsageError: no question, one without a choice, or a record that is no record.
        UnsupportedError: token ids outside the model's vocabulary.
    """
    _check(questions, top_k)
    candidates = [_distinct(question, [question.answer, *question.candidates]) for question in questions]
    if alone := sum(len(values) < 2 for values in candidates):
        raise UsageError(
            f"expected at least 2 different candidates for every question, found {alone} questions with fewer; "
            "add values that could have stood there"
        )
    scores = _score(model, questions, candidates, per_token, model_map, batch_tokens, progress)
    return _outcome(questions, candidates, scores, top_k, cued, seed, 0)


def reconstruction(
    model: nn.Module,
    questions: Sequence[Question],
    decode: Callable[[Sequence[int]], str],
    *,
    draws: int = 64,
    length: int = 16,
    scheme: SamplingScheme | None = None,
    values: Callable[[str], Iterable[str]] | None = None,
    patterns: Mapping[str, str] | None = None,
    per_token: bool = False,
    top_k: Sequence[int] = TOP_K,
    cued: float = CUED,
    seed: int = 0,
    batch: int = 32,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: likelihood.Progress | None = None,
) -> Game:
    """What stood in the masked place, without a list of candidates?

    The prompts that are continued are those of the answers' own records, so that no text is tokenised in halves.

    Args:
        model: a causal language model; left as found.
        questions: at least one; their candidates are not used.
        decode: token ids -> text.
        draws: samples for each question.
        length: tokens of each sample; it should hold the longest answer.
        scheme: the sampling rule; top-k of 40 by default, as in the paper.
        values: text of a sample -> the values in it, in order; by default the spans of the question's kind. The first
            value of each sample becomes a candidate.
        patterns: the caller's own kinds, as in `attacks.pii.detectors.find`.
        per_token: rank by perplexity instead of likelihood.
        top_k: which shares to report besides the first place.
        cued: overlap from which a question counts as cued.
        seed: of the samples and the intervals.
        batch: samples decoded together.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens per batch of the ranking.
        progress: called with (records scored, records in all).

    Returns:
        The outcome. An answer that was never sampled has no rank and counts as a miss.

    Raises:
        UsageError: no question, an unknown kind, fewer than one draw, or more positions than the model has.
        UnsupportedError: token ids outside the vocabulary, or a model that keeps no key-value cache.
    """
    _check(questions, top_k)
    if draws < 1:
        raise UsageError(f"expected at least 1 draw for every question, found {draws}; pass 64")
    if values is None:
        for kind in dict.fromkeys(question.kind for question in questions):
            find("", [kind], patterns)  # an unknown kind is refused before anything is sampled
    prompts = []
    for question in questions:
        record = built_record(question.record, question.answer)
        prompts.append(record.ids[: record.n_prompt])
    model_map = model_map or ModelMap.of(model)
    samples = sample(
        model,
        draws * len(questions),
        length,
        prompt_ids=prompts,
        scheme=scheme or SamplingScheme(top_k=40),
        seed=seed,
        batch=batch,
        model_map=model_map,
    )
    candidates = []
    for i, question in enumerate(questions):
        found = []
        for tokens in samples[i :: len(questions)]:
            text = decode(tokens)
            inside = values(text) if values else _values(text, [question.kind], patterns)
            found += [value for value in list(inside)[:1] if value]
        candidates.append(_distinct(question, found))
    scores = _score(model, questions, candidates, per_token, model_map, batch_tokens, progress)
    return _outcome(questions, candidates, scores, top_k, cued, seed, sum(map(len, samples)))


def lexical_overlap(prompt: str, answer: str, n: int = 3) -> float:
    """Share of the answer's character n-grams that stand in the prompt (arXiv 2601.03791).

    Args:
        prompt: what the model is shown.
        answer: what it is to say.
        n: characters; an answer of fewer is one n-gram.

    Returns:
        In [0, 1]; case and runs of spaces do not count; 0 for an empty answer.

    Raises:
        UsageError: n below 1.
    """
    if n < 1:
        raise UsageError(f"expected n-grams of at least 1 character, found {n}; pass 3")
    shown, wanted = (" ".join(text.casefold().split()) for text in (prompt, answer))
    if not wanted:
        return 0.0
    size = min(n, len(wanted))
    grams = {wanted[i : i + size] for i in range(len(wanted) - size + 1)}
    return sum(gram in shown for gram in grams) / len(grams)


@dataclass(frozen=True, slots=True)
class PiiExtraction:
    """Outcome of the extraction game. Holds no text.

    Attributes:
        status: "ok", or "not resolvable" where the records hold no value of the kinds asked for.
        reason: why not, or None.
        recall: share of the records' different values that came out; None if not resolvable.
        precision: share of the different values in the samples that stand in the records; None if there are none.
        control: share of the control texts' values that came out, which no training on the records explains; None
            without control texts or values in them.
        by_kind: per kind: kind, in_records, in_samples, matched.
        hits: [R] whether any value of the record came out.
    """

    status: str
    reason: str | None
    recall: Interval | None
    precision: Interval | None
    control: Interval | None
    by_kind: pd.DataFrame = field(repr=False)
    hits: tuple[bool, ...] = field(repr=False)


def extraction(
    samples: Sequence[str],
    records: Sequence[str],
    *,
    kinds: Iterable[str] | None = None,
    patterns: Mapping[str, str] | None = None,
    prompts: Sequence[str] | None = None,
    controls: Sequence[str] = (),
    groups: Sequence[Hashable | None] | None = None,
    seed: int = 0,
) -> PiiExtraction:
    """Which of the records' values stand in free samples of the model?

    Values are compared in their canonical spelling. A value that stands in a sample's own prompt is not counted for
    that sample.

    Args:
        samples: texts the model wrote, without their prompts.
        records: texts whose values are looked for, at least one.
        kinds: kinds of values, all built-in ones by default.
        patterns: the caller's own kinds.
        prompts: the prompt of each sample.
        controls: texts the model has certainly never seen, for the rate at which their values come out.
        groups: cluster of each record, for the interval of the recall.
        seed: of the intervals.

    Returns:
        The outcome.

    Raises:
        UsageError: no sample or record, an unknown kind, or lists of different length.
    """
    if not samples or not records:
        raise UsageError(
            f"expected at least one sample and one record, found {len(samples)} and {len(records)}; pass both"
        )
    if prompts is not None and len(prompts) != len(samples):
        raise UsageError(
            f"expected a prompt for every sample, found {len(prompts)} for {len(samples)}; pass one for each"
        )
    if groups is not None and len(groups) != len(records):
        raise UsageError(
            f"expected a group for every record, found {len(groups)} for {len(records)}; pass one for each"
        )
    kinds = None if kinds is None else list(kinds)
    found: set[tuple[str, str]] = set()
    for i, text in enumerate(samples):
        given = _keyed(prompts[i], kinds, patterns) if prompts else set()
        found |= _keyed(text, kinds, patterns) - given
    held = [_keyed(text, kinds, patterns) for text in records]
    owner: dict[tuple[str, str], int] = {}
    for i, values in enumerate(held):
        for value in sorted(values):
            owner.setdefault(value, i)
    wanted = sorted(owner)
    hit = np.array([value in found for value in wanted], dtype=float)  # [distinct values]
    clusters = [_cluster(groups, owner[value]) for value in wanted]
    unseen = sorted(set().union(*(_keyed(text, kinds, patterns) for text in controls)) - owner.keys())
    counts = [Counter(kind for kind, _ in values) for values in (wanted, found, found & owner.keys())]
    rows = [(kind, *(count[kind] for count in counts)) for kind in sorted(set().union(*counts))]
    return PiiExtraction(
        status="ok" if wanted else "not resolvable",
        reason=None if wanted else "the records hold no value of the kinds asked for",
        recall=mean_interval(hit, clusters, bounds=(0.0, 1.0), seed=seed) if wanted else None,
        precision=clopper_pearson(len(found & owner.keys()), len(found)) if found and wanted else None,
        control=clopper_pearson(len(found & set(unseen)), len(unseen)) if unseen else None,
        by_kind=pd.DataFrame(rows, columns=["kind", "in_records", "in_samples", "matched"]),
        hits=tuple(bool(values & found) for values in held),
    )


def _cluster(groups: Sequence[Hashable | None] | None, record: int) -> Hashable:
    """What a record's values are resampled with: values of one record come out together."""
    group = None if groups is None else groups[record]
    return ("record", record) if group is None else ("group", group)


def _values(text: str, kinds: list[str] | None, patterns: Mapping[str, str] | None) -> list[str]:
    return [text[span.start : span.end] for span in find(text, kinds, patterns)]


def _keyed(text: str, kinds: list[str] | None, patterns: Mapping[str, str] | None) -> set[tuple[str, str]]:
    """The values in a text as (kind, canonical spelling)."""
    spans = find(text, kinds, patterns)
    return {(span.kind, canonical(span.kind, text[span.start : span.end])) for span in spans}


def _check(questions: Sequence[Question], top_k: Sequence[int]) -> None:
    if not questions:
        raise UsageError("expected at least one question, found none; mask a value of a record")
    if not all(k >= 1 for k in top_k):
        raise UsageError("expected places of at least 1 for top_k, found others; pass for example 1, 5 and 10")


def _distinct(question: Question, values: Iterable[str]) -> list[str]:
    """The values, one spelling of each; the answer in its own spelling."""
    spelling: dict[str, str] = {}
    for value in values:
        spelling.setdefault(canonical(question.kind, value), value)
    answer = canonical(question.kind, question.answer)
    return [question.answer if key == answer else value for key, value in spelling.items()]


def _score(
    model: nn.Module,
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
    per_token: bool,
    model_map: ModelMap | None,
    batch_tokens: int | None,
    progress: likelihood.Progress | None,
) -> list[Floats]:
    """Log-likelihood in nats of each candidate in its sentence, all questions in one pass."""
    records = [
        built_record(question.record, value)
        for question, values in zip(questions, candidates, strict=True)
        for value in values
    ]
    table = likelihood.score(model, records, model_map=model_map, batch_tokens=batch_tokens, progress=progress)
    sums = np.array([table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(len(records))])
    if not bool(np.isfinite(sums).all()):
        raise UsageError("expected finite log-probabilities, found others; check the checkpoint and its tokenizer")
    if per_token:
        sums = sums / np.diff(table.offsets)
    ends = np.cumsum([len(values) for values in candidates])
    return np.split(sums, ends[:-1])


def _outcome(
    questions: Sequence[Question],
    candidates: Sequence[Sequence[str]],
    scores: Sequence[Floats],
    top_k: Sequence[int],
    cued: float,
    seed: int,
    generated_tokens: int,
) -> Game:
    """Ranks, shares and their chance level."""
    rows = []
    for question, values, given in zip(questions, candidates, scores, strict=True):
        overlap = lexical_overlap(question.prompt, question.answer)
        rank: int | None = None
        margin: float | None = None
        if question.answer in values:
            own = given[values.index(question.answer)]
            others = np.delete(given, values.index(question.answer))
            rank = 1 + int((others >= own - ROUNDING * abs(own)).sum())
            margin = float(own - others.max()) if len(others) else None
        rows.append((question.question_id, len(values), rank, rank == 1, margin, overlap, overlap >= cued))
    columns = ["question_id", "candidates", "rank", "hit", "margin", "overlap", "cued"]
    table = pd.DataFrame(rows, columns=columns).astype({"rank": "Int64", "margin": "Float64"})
    clean = np.array([not row[6] for row in rows])
    groups = [question.group for question in questions]

    def share(where: np.ndarray, k: int) -> Interval | None:
        chosen = np.flatnonzero(where)
        hits = [float((rank := rows[i][2]) is not None and rank <= k) for i in chosen]
        return mean_interval(hits, [groups[i] for i in chosen], bounds=(0.0, 1.0), seed=seed) if hits else None

    def guess(k: int) -> float:
        """Mean probability that an order drawn at random puts the answer among the first k of these candidates."""
        return float(np.mean([min(1.0, k / row[1]) if row[2] else 0.0 for row in rows if not row[6]]))

    shares = {k: interval for k in sorted({1, *top_k}) if (interval := share(clean, k)) is not None}
    return Game(
        status="ok" if shares else "not resolvable",
        reason=None if shares else "every question's prompt holds its answer's characters",
        accuracy=shares.get(1),
        top_k=shares,
        chance={k: guess(k) for k in shares},
        cued=share(~clean, 1),
        table=table,
        scored=sum(len(values) for values in candidates),
        generated_tokens=generated_tokens,
    )
