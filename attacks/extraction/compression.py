"""Adversarial compression (Schwarzschild et al. 2024, arXiv 2404.15146): the shortest prompt that yields a record.

    ratio = |completion| / |shortest prompt after which greedy decoding emits it|;    memorised if and only if ratio > 1

in tokens: a model that spells out more than it was told must hold the rest. The search is one of prompts of a given
length (`attacks.extraction.gcg`) inside one over lengths: the ends of the record's own prompt first, then lengths 1,
2, 4, ... until a prompt is found, then bisection between the longest length that failed and the shortest that did not.
A found prompt is first shortened by dropping tokens one at a time; what is left starts the search at smaller lengths.

The ratio found is a lower bound: a better search may find a shorter prompt, and not finding one proves nothing. Whether
a prompt of some length exists is not quite monotone in the length, so bisection may miss a shorter one too.

How much is chance follows from counting. Each prompt has one greedy continuation, so of all strings of K tokens over a
vocabulary of V at most sum_{l <= L} U^l can be emitted after a prompt of up to L of U usable tokens. For a string drawn
uniformly at random (a canary) the probability of that is at most 2^-bits_saved with

    bits_saved = K log2 V - log2 sum_{l <= L} U^l

Natural text is not drawn uniformly: a predictable text (a list, a count) compresses without being memorised. Compare
with records of the same kind that the model never saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from torch import nn

from attacks.extraction.gcg import CANDIDATES, TOP_K, Rows, Tokens, every_token, optimise
from probes.errors import UsageError
from probes.likelihood import check_records
from probes.modelmap import ModelMap
from probes.records import TokenRecord

STEPS = 100
TRIES = 2  # searches at each length: one from what is known, the others from random tokens


@dataclass(frozen=True, slots=True)
class Compression:
    """The shortest prompt found for one record.

    Attributes:
        record_id: the record's identifier.
        n_tokens: tokens of the completion.
        status: "not resolvable" for a completion of one token, to which no shorter prompt exists.
        reason: why, or what ended the search early; None otherwise.
        found: a prompt shorter than the completion was found and confirmed by greedy decoding at batch size 1.
        prompt_length: its tokens, or None.
        ratio: n_tokens / prompt_length, a lower bound above 1; None where nothing was found.
        bits_saved: see the module; None where nothing was found.
        lengths: (length, found) of each search, in order.
        steps: gradient steps in all.
        forwards: rows run forward in all, each confirmation counted as one.
        prompt: the prompt's ids, or None.
    """

    record_id: str
    n_tokens: int
    status: Literal["ok", "not resolvable"]
    reason: str | None
    found: bool
    prompt_length: int | None
    ratio: float | None
    bits_saved: float | None
    lengths: tuple[tuple[int, bool], ...]
    steps: int
    forwards: int
    prompt: tuple[int, ...] | None = field(repr=False)

    @property
    def memorised(self) -> bool:
        """Ratio above 1."""
        return self.found


def adversarial_compression(
    model: nn.Module,
    record: TokenRecord,
    *,
    before: Sequence[int] = (),
    tokens: Tokens | None = None,
    steps: int = STEPS,
    candidates: int = CANDIDATES,
    top_k: int = TOP_K,
    tries: int = TRIES,
    max_rows: int | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> Compression:
    """Search the shortest prompt after which greedy decoding emits the record's completion.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        record: its completion is the target; its prompt only serves as a first try.
        before: ids that stand before every prompt and do not count, such as the beginning-of-sequence token.
        tokens: which prompts may be written (`attacks.extraction.gcg.writable`); any ids by default.
        steps: gradient steps of one search.
        candidates: replacements evaluated in a step.
        top_k: replacements considered for each position.
        tries: searches at each length.
        max_rows: forward rows after which no further step is taken; None for no limit. Each search costs up to
            steps x (candidates + 1) rows, for about 2 log2(n_tokens) lengths.
        seed: of all draws.
        batch_tokens: tokens of candidate rows run at a time.
        model_map: the model's map, built when absent.

    Raises:
        UsageError: no tries, a negative limit, or what `attacks.extraction.gcg.optimise` refuses.
        UnsupportedError: record ids outside the vocabulary.
        ResourceError: when one row does not fit in memory.
    """
    if tries < 1 or (max_rows is not None and max_rows < 0):
        raise UsageError(f"expected at least one try and no negative limit, found {tries} and {max_rows}")
    model_map = model_map or ModelMap.of(model)
    check_records([record], model_map.vocab_size)
    if record.n_tokens == 1:
        nothing = "a completion of one token has no shorter prompt"
        return Compression(record.record_id, 1, "not resolvable", nothing, False, None, None, None, (), 0, 0, None)
    search = _Search(
        tokens=tokens or every_token(model_map.vocab_size),
        rows=Rows(model, model_map, tuple(before), (), record.completion, batch_tokens),
        steps=steps,
        candidates=candidates,
        top_k=top_k,
        tries=tries,
        max_rows=max_rows,
        seed=seed,
    )
    search.run(record.ids[: record.n_prompt])
    best, total = search.best, record.n_tokens
    reason = f"stopped at the limit of {max_rows} rows" if search.exhausted else None
    return Compression(
        record_id=record.record_id,
        n_tokens=total,
        status="ok",
        reason=reason,
        found=best is not None,
        prompt_length=len(best) if best else None,
        ratio=total / len(best) if best else None,
        bits_saved=bits_saved(total, len(best), model_map.vocab_size, len(search.tokens.usable)) if best else None,
        lengths=tuple(search.lengths),
        steps=search.taken,
        forwards=search.rows.forwards,
        prompt=best,
    )


def bits_saved(n_tokens: int, prompt_length: int, vocab_size: int, usable: int | None = None) -> float:
    """K log2 V - log2 sum_{l <= L} U^l: a uniformly random string is this compressible with probability <= 2^-bits.

    Args:
        n_tokens: K, tokens of the string.
        prompt_length: L, tokens of the prompt.
        vocab_size: V, tokens that the string is drawn from.
        usable: U, tokens that a prompt may hold; V by default.

    Returns:
        Bits; 0 or less where the prompts are as many as the strings, which is no evidence.
    """
    u = usable or vocab_size
    exponents = np.arange(1, prompt_length + 1) * math.log(u)
    return float(n_tokens * math.log2(vocab_size) - np.logaddexp.reduce(exponents) / math.log(2))


def compression_frame(results: Sequence[Compression]) -> pd.DataFrame:
    """One row a record: record_id, n_tokens, status, memorised, prompt_length, ratio, bits_saved, steps, forwards.

    What does not exist is None, in columns of objects.
    """
    names = (
        "record_id",
        "n_tokens",
        "status",
        "memorised",
        "prompt_length",
        "ratio",
        "bits_saved",
        "steps",
        "forwards",
    )
    rows = {name: [getattr(result, name) for result in results] for name in names}
    frame = pd.DataFrame(rows, columns=list(names))
    for name in ("prompt_length", "ratio", "bits_saved"):
        frame[name] = pd.Series(rows[name], dtype=object)
    return frame


@dataclass(slots=True)
class _Search:
    """One record's search over lengths. `best` is the shortest prompt so far after which the completion follows."""

    tokens: Tokens = field(repr=False)
    rows: Rows = field(repr=False)
    steps: int
    candidates: int
    top_k: int
    tries: int
    max_rows: int | None
    seed: int
    best: tuple[int, ...] | None = field(default=None, repr=False)
    lengths: list[tuple[int, bool]] = field(default_factory=list)
    taken: int = 0
    exhausted: bool = False

    def run(self, own: tuple[int, ...]) -> None:
        """Own prompt, doubling, bisection."""
        self._own(own)
        failed, length = 0, 1  # the longest length that failed, and the next to try
        nearest: tuple[int, ...] = ()
        while length < self._shortest() and not self.exhausted:
            found, nearest = self._at(length, nearest)
            if found:
                break
            failed, length = length, min(2 * length, max(length + 1, self._shortest() - 1))
        while failed + 1 < self._shortest() <= len(self.rows.target) - 1 and not self.exhausted:
            length = (failed + self._shortest()) // 2
            found, _ = self._at(length, ())
            failed = failed if found else length

    def _shortest(self) -> int:
        """Length of the best prompt; of the completion where there is none."""
        return len(self.best or self.rows.target)

    def _affordable(self, rows: int) -> bool:
        """Whether so many more rows stay within the limit; remembers when they do not."""
        if self.max_rows is not None and self.rows.forwards + rows > self.max_rows:
            self.exhausted = True
        return not self.exhausted

    def _own(self, own: tuple[int, ...]) -> None:
        """The shortest end of the record's own prompt after which the completion follows."""
        usable = set(self.tokens.usable.tolist())
        for length in range(1, min(len(own), len(self.rows.target) - 1) + 1):
            end = own[-length:]
            if end[0] not in usable or not self._affordable(2):
                return
            if self.tokens.survives(end) and self.rows.evaluate([end])[1][0] and self.rows.confirmed(end):
                self.best = end
                self._shorten()
                return

    def _shorten(self) -> None:
        """Drop tokens from the best prompt one at a time as long as the completion still follows."""
        while self.best is not None and len(self.best) > 1:
            pool = self._without_one(self.best)
            if not pool or not self._affordable(2 * len(pool)):
                return
            losses, hits = self.rows.evaluate(pool)
            order = sorted(np.flatnonzero(hits), key=lambda i: (losses[i], i))
            shorter = next((pool[i] for i in order if self.rows.confirmed(pool[i])), None)
            if shorter is None:
                return
            self.best = shorter

    def _without_one(self, prompt: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The different prompts with one token less that can be written."""
        return sorted(
            p for p in {(*prompt[:i], *prompt[i + 1 :]) for i in range(len(prompt))} if self.tokens.survives(p)
        )

    def _at(self, length: int, shorter: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
        """Search at one length: whether a prompt was found (then it is `best`), and else the nearest one."""
        tried: list[tuple[float, tuple[int, ...]]] = []
        for attempt in range(self.tries):
            seed = (self.seed * 1_000_003 + length) * 1_009 + attempt
            first = None if attempt else self._start(length, shorter, seed)
            steps = self.steps
            if self.max_rows is not None:
                # The initial prompt and one confirmation; then for each step the candidates, the slope, a confirmation.
                left = self.max_rows - self.rows.forwards - 2
                steps = min(steps, left // (self.candidates + 2))
            if steps < min(self.steps, 1):
                self.exhausted = True
                break
            result = optimise(
                self.rows.model,
                self.rows.target,
                length,
                before=self.rows.before,
                initial=first,
                steps=steps,
                candidates=self.candidates,
                top_k=self.top_k,
                tokens=self.tokens,
                seed=seed,
                batch_tokens=self.rows.batch_tokens,
                model_map=self.rows.model_map,
            )
            self.taken += result.steps
            self.rows.forwards += result.forwards
            if result.found:
                self.best = result.prompt
                self.lengths.append((length, True))
                self._shorten()
                return True, ()
            tried.append((result.loss, result.prompt))
        if tried:
            self.lengths.append((length, False))
        return False, min(tried)[1] if tried else ()

    def _start(self, length: int, shorter: tuple[int, ...], seed: int) -> tuple[int, ...] | None:
        """The best prompt without its least missed tokens, or a shorter one with random tokens; None if neither can."""
        if self.best is not None:
            prompt = self.best
            while len(prompt) > length:
                pool = self._without_one(prompt)
                if not pool or not self._affordable(len(pool)):
                    return None
                prompt = pool[int(self.rows.evaluate(pool)[0].argmin())]
            return prompt
        if not shorter:
            return None
        generator = np.random.default_rng(seed)
        for _ in range(64):
            prompt = (*generator.choice(self.tokens.usable, length - len(shorter)).tolist(), *shorter)
            if self.tokens.survives(prompt):
                return prompt
        return None
