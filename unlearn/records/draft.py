"""Draft the sets a user does not have: a control set from the records, a retain set from the model itself.

Control: each record with its names, numbers, dates and identifiers swapped (`unlearn.records.swap`): never seen by
construction, alike in length and style. The wording around what was swapped is the record's own, and a model that
knows the record knows that wording too, which makes differences to the control too small; random specifics can be
unlikely in themselves, which makes them too large.

Retain: half is what the model says of its own accord after generic openings, half what it says near the records, after
their own prompts with the specifics swapped. A sample that repeats a passage, a full name or an identifier of a record
is thrown away.

Both are proposals, to be written to a file (`unlearn.records.tokens.write_records`) and reviewed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from probes.errors import UnsupportedError, UsageError
from unlearn.records.raw import Message, RawRecord
from unlearn.records.swap import Swap, names_in, words_of
from unlearn.records.tokens import render_chat

SHINGLE = 5  # consecutive words that count as a repeated passage
_ROUNDS = 4  # attempts at a full retain set before giving up on the rest
_OPENING_WORDS = 8  # of a text record's beginning, to prompt near it

OPENERS = (
    "The", "In the", "A new", "When", "It was", "There is", "We", "She said that", "How to", "According to", "Once",
    "For many years,", "The best way to", "My favourite", "Researchers have", "Every morning,", "Question:", "To make",
    "In this article,", "Last week,", "People often", "The history of", "Dear", "One reason is that",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted set.

    Attributes:
        records: what was drafted.
        skipped: how many records or samples were asked for but could not be had.
        limits: sentences that belong beside every figure measured on the set.
    """

    records: list[RawRecord]
    skipped: int
    limits: tuple[str, ...]


def texts_of(record: RawRecord) -> list[str]:
    """The texts of a record in reading order; none for token ids and images."""
    if record.messages is not None:
        return [turn.content for turn in record.messages]
    return [text for text in (record.text, record.prompt, record.completion) if text is not None]


def swapped(record: RawRecord, seed: str, taken: set[str]) -> tuple[RawRecord, float]:
    """The record with its specifics swapped, and the share of its completion that changed (0 where nothing can)."""
    texts = texts_of(record)
    if not texts:
        return record, 0.0
    swap = Swap(texts, seed, taken)
    parts = [swap.apply(text) for text in texts]
    share = parts[-1][1]
    if record.messages is not None:
        turns = tuple(Message(turn.role, text) for turn, (text, _) in zip(record.messages, parts, strict=True))
        return replace(record, messages=turns), share
    if record.text is not None:
        return replace(record, text=parts[0][0]), share
    return replace(record, prompt=parts[0][0], completion=parts[1][0]), share


def draft_control(records: Sequence[RawRecord], seed: int, *, min_share: float = 0.1) -> Draft:
    """A control set: every record with its specifics swapped.

    A record is left out where less than `min_share` of its completion (of the text, for `text` records) could be
    swapped: what remained would be the record itself. Token ids and images are left out.

    Args:
        records: as read.
        seed: the same seed and records give the same draft.
        min_share: share of characters, spaces aside.

    Returns:
        Records `control-<n>`, numbered as their originals, with the originals' groups.
    """
    taken = set().union(*(words_of(text) for record in records for text in texts_of(record))) if records else set()
    originals = {texts_of(record)[-1] for record in records if texts_of(record)}
    drafted: list[RawRecord] = []
    shares: list[float] = []
    for number, record in enumerate(records, start=1):
        new, share = swapped(record, f"control {seed} {number}", taken)
        if share >= min_share and texts_of(new)[-1] not in originals:
            drafted.append(replace(new, id=f"control-{number}", where=f"control draft row {number}"))
            shares.append(share)
    skipped = len(records) - len(drafted)
    limits = [
        "The control set was drafted by swapping names, numbers, dates and identifiers of the records for random ones "
        f"of the same form ({len(drafted)} of {len(records)} records; nobody has reviewed it here)."
    ]
    if drafted:
        limits.append(
            f"On average {sum(shares) / len(shares):.0%} of a drafted completion was swapped; the rest is the record's "
            "own wording. A difference to this set can mislead either way: shared wording makes it too small, "
            "specifics that are unlikely in themselves too large."
        )
    if skipped:
        limits.append(f"{skipped} records held too little to swap and have no control record.")
    return Draft(drafted, skipped, tuple(limits))


@dataclass(frozen=True, slots=True)
class _Opening:
    """Where a sample starts: its prompt, and the record to complete."""

    prompt: str
    record: RawRecord
    special: bool  # whether the tokenizer adds its own tokens; a chat template has written them already


def draft_retain(
    model: Any,
    tokenizer: Any,
    records: Sequence[RawRecord],
    n: int,
    seed: int,
    max_new_tokens: int = 48,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Draft:
    """A retain set in the model's own words.

    Samples come from the model's distribution (temperature 1, nucleus 0.95, nothing else; the checkpoint's own
    generation defaults are set aside). The global random state is left as it was.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer.
        records: the records to be forgotten, whose passages must not be retained.
        n: how many to draft.
        seed: the same seed, records, model and machine give the same draft.
        max_new_tokens: length of a sample.
        batch_size: samples drawn together.
        progress: called with (samples kept, n).

    Returns:
        Records `retain-<n>`; fewer than `n` where the model kept repeating the records or said nothing.

    Raises:
        UnsupportedError: if the model cannot generate.
        UsageError: if there is no tokenizer, or `n` is not positive.
    """
    if tokenizer is None or not hasattr(model, "generate"):
        raise UnsupportedError(
            "expected a language model with generate() and a tokenizer to draft from; give a retain set"
        )
    if n < 1 or max_new_tokens < 1:
        raise UsageError(f"expected at least one record and one token to draft, found {n} and {max_new_tokens}")
    forbidden = _passages(records)
    room = getattr(model.config, "max_position_embeddings", None) or 2**31
    shuffled = random.Random(f"retain {seed}")
    kept: list[RawRecord] = []
    near = repeated = 0
    for attempt in range(_ROUNDS):
        missing = n - len(kept)
        around = list(_near(records, tokenizer, f"{seed} {attempt}", shuffled, (missing + 1) // 2))
        around = [opening for opening in around if len(_ids(tokenizer, opening)) + max_new_tokens <= room]
        openings = [*around, *_free(tokenizer, missing - len(around), shuffled)]
        for first in range(0, len(openings), batch_size):
            batch = openings[first : first + batch_size]
            samples = _sample(model, tokenizer, batch, max_new_tokens, seed * 1_000_003 + attempt * 1_009 + first)
            for position, (opening, sample) in enumerate(zip(batch, samples, strict=True), start=first):
                if _passage_in(sample, forbidden):
                    repeated += 1
                elif sample.strip():
                    kept.append(_completed(opening.record, sample, f"retain-{len(kept) + 1}"))
                    near += position < len(around)
            if progress is not None:
                progress(len(kept), n)
        if len(kept) >= n:
            break
    limits = [
        f"The retain set was drafted: {len(kept)} texts sampled from the checkpoint itself, {near} of them after the "
        "records' own prompts with the specifics swapped. It stands for what the checkpoint says, not for what is true "
        "or needed, and nobody has reviewed it here."
    ]
    if repeated:
        limits.append(
            f"{repeated} samples repeated a passage, a full name or an identifier of a record and were left out."
        )
    return Draft(kept, n - len(kept), tuple(limits))


def _near(
    records: Sequence[RawRecord], tokenizer: Any, seed: str, shuffled: random.Random, count: int
) -> Iterator[_Opening]:
    """Up to `count` openings near the records; one whose prompt holds nothing to swap would be the record's own."""
    taken = set().union(*(words_of(text) for record in records for text in texts_of(record))) if records else set()
    usable = [record for record in records if texts_of(record)]
    found = 0
    for record in shuffled.sample(usable, len(usable)) * (1 + count // max(1, len(usable))):
        if found == count:
            return
        new, _ = swapped(record, f"retain {seed} {found} {record.id}", taken)
        opening = _opening_of(record, new, tokenizer)
        if opening is not None:
            found += 1
            yield opening


def _opening_of(record: RawRecord, new: RawRecord, tokenizer: Any) -> _Opening | None:
    if record.messages is not None and new.messages is not None:
        if new.messages[:-1] == record.messages[:-1] or not getattr(tokenizer, "chat_template", None):
            return None
        try:
            prompt = render_chat(tokenizer, new.messages[:-1], add_generation_prompt=True)
        except UsageError:
            return None
        return _Opening(prompt, new, special=False)
    if record.text is not None and new.text is not None:
        before, after = (_first_words(text) for text in (record.text, new.text))
        return None if before == after else _Opening(after, RawRecord("", prompt=after, completion=""), special=True)
    return None if new.prompt == record.prompt else _Opening(str(new.prompt), new, special=True)


def _first_words(text: str) -> str:
    return " ".join(text.split()[:_OPENING_WORDS])


def _free(tokenizer: Any, count: int, shuffled: random.Random) -> list[_Opening]:
    """Generic openings, the empty one among them where the tokenizer can start from nothing."""
    starts = [*OPENERS, ""] if getattr(tokenizer, "bos_token_id", None) is not None else [*OPENERS]
    order = shuffled.sample(starts, len(starts))
    chosen = [order[i % len(order)] for i in range(count)]
    return [_Opening(start, RawRecord("", prompt=start, completion=""), special=True) for start in chosen]


def _completed(record: RawRecord, sample: str, identifier: str) -> RawRecord:
    made = {"id": identifier, "where": f"retain draft row {identifier.rpartition('-')[2]}", "group": None}
    if record.messages is not None:
        return replace(record, messages=(*record.messages[:-1], Message("assistant", sample.strip())), **made)  # type: ignore[arg-type]
    if not record.prompt:
        return replace(record, prompt=None, completion=None, text=sample, **made)  # type: ignore[arg-type]
    return replace(record, completion=sample, **made)  # type: ignore[arg-type]


def _sample(model: Any, tokenizer: Any, batch: Sequence[_Opening], max_new_tokens: int, seed: int) -> list[str]:
    """One sampled continuation each, as text."""
    import torch
    from transformers import GenerationConfig

    prompts = [_ids(tokenizer, opening) for opening in batch]
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [B, T], padded on the left
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    defaults, training = model.generation_config, model.training
    stop = defaults.eos_token_id if defaults.eos_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=0.95,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    devices = [device] if device.type == "cuda" else []
    model.eval()
    model.generation_config = GenerationConfig()  # or generate() would fill our gaps with the checkpoint's penalties
    try:
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            out = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)  # [B, T']
    finally:
        model.generation_config = defaults
        model.train(training)
    samples = []
    for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True):
        opening = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole = tokenizer.decode(prompt + row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # decoding the new ids alone would lose a leading space with some tokenizers
        samples.append(whole.removeprefix(opening).rstrip("\ufffd"))
    return samples


def _ids(tokenizer: Any, opening: _Opening) -> list[int]:
    ids = list(tokenizer(opening.prompt, add_special_tokens=opening.special)["input_ids"])
    if opening.special and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # an appended end of sequence would end the sample before it begins
    return ids or [tokenizer.bos_token_id]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _shingles(words: Sequence[str], size: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def _passages(records: Sequence[RawRecord]) -> dict[int, set[tuple[str, ...]]]:
    """What no sample may repeat, as runs of words by length.

    Runs of `SHINGLE` words of every completion (a shorter one as a whole), full names, and identifiers.
    """
    passages: dict[int, set[tuple[str, ...]]] = {1: set(), 2: set(), SHINGLE: set()}
    for record in records:
        texts = texts_of(record)
        completion = _words(texts[-1]) if texts else []
        size = min(SHINGLE, len(completion))
        if len("".join(completion)) >= 6:  # "yes" or "no" is no passage
            passages.setdefault(size, set()).update(_shingles(completion, size))
        everything, names = _words(" ".join(texts)), names_in(" ".join(texts))
        passages[2].update(pair for pair in pairwise(everything) if pair[0] in names and pair[1] in names)
        passages[1].update((word,) for word in everything if len(word) >= 5 and any(c.isdigit() for c in word))
    return passages


def _passage_in(sample: str, passages: dict[int, set[tuple[str, ...]]]) -> bool:
    words = _words(sample)
    return any(shingle in known for size, known in passages.items() for shingle in _shingles(words, size))
