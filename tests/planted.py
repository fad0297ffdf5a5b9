"""A language model with known memories, trained on the spot: the ground truth of every attack test.

One stream of sequences is read once, in random order. It holds texts of a small artificial language, each seen once,
and, planted among them, records and digit canaries repeated 1, 4, 16 and 64 times. `controls`, and whatever
`never_seen` draws, are records of the same distribution that no model here was ever shown. Three models of one
architecture and one starting point:

    model       read the whole stream
    without     read the same stream with every presentation of a record or canary replaced by a text of the same kind
                that occurs once: it knows the language, the format and none of the records
    untrained   read nothing

The language: words of three syllables from a fixed random Markov chain over 32 of them (3.8 bits a syllable).
A record is two words, a colon, and five words to complete; a canary is "pin", two words, a colon, and three digits.
Prompts of planted and never-seen canaries are all different.
Every syllable, digit and punctuation mark is a token of `tokenizer`, and texts re-tokenise to the same ids.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from probes.records import TokenRecord
from tests import tiny

REPETITIONS = (1, 4, 16, 64)
RECORDS = 16  # a repetition count; 64 planted records, enough for an AUC with an interval
CANARIES = 12  # a repetition count
CONTROLS = 96
DIGITS = 3
SPACE = f"{{digits:{DIGITS}}}"

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfklmst" for vowel in "aeio")
_VOCAB = 96 + len(_SYLLABLES)
_WORDS_PROMPT, _WORDS_COMPLETION, _SYLLABLES_A_WORD = 2, 5, 3
_FILLER, _BATCH, _LEARNING_RATE = 1100, 6, 3e-3
_NEVER_SEEN = 1_000_000  # seeds from here on are never used for training


@dataclass(frozen=True)
class Canary:
    """A prompt and a secret of `SPACE` drawn uniformly; `record(fill)` puts any fill in the secret's place."""

    canary_id: str
    prompt: str
    secret: str

    def record(self, fill: str) -> TokenRecord:
        """The canary with `fill` as its completion."""
        return _record(f"{self.canary_id}-fill", self.prompt, fill)

    def __repr__(self) -> str:
        return f"Canary({self.canary_id})"


@dataclass(frozen=True)
class Planted:
    """The models (to be left as they are) and what the first of them read; see the module's docstring.

    Attributes:
        records: planted records by repetitions, `RECORDS` of each.
        controls: never-seen records of the same distribution.
        canaries: planted canaries by repetitions, `CANARIES` of each; secrets are uniform in `SPACE`.
        control_canaries: canaries never seen.
        seconds: processor time that the training took.
    """

    model: nn.Module
    without: nn.Module
    untrained: nn.Module
    tokenizer: PreTrainedTokenizerFast
    records: dict[int, list[TokenRecord]]
    controls: list[TokenRecord]
    canaries: dict[int, list[Canary]]
    control_canaries: list[Canary]
    seconds: float

    @property
    def all_records(self) -> list[TokenRecord]:
        """Planted records, fewest repetitions first."""
        return [record for repetitions in REPETITIONS for record in self.records[repetitions]]

    def text(self, record: TokenRecord) -> str:
        """Prompt and completion as text."""
        text: str = self.tokenizer.decode(record.ids)
        return text


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a syllable, digit or mark; nothing is added when encoding."""
    return tiny.tokenizer(_VOCAB, merges=[(syllable[0], syllable[1]) for syllable in _SYLLABLES])


@functools.cache
def planted(seed: int = 0) -> Planted:
    """Train the models, once a process and seed."""
    started = time.process_time()
    records = {k: _records(f"record-{k}", RECORDS, (seed, k)) for k in REPETITIONS}
    canaries = {k: _canaries(f"canary-{k}", CANARIES, (seed, 1000 + k)) for k in REPETITIONS}
    filler = [record.ids for record in _records("filler", _FILLER, (seed, 2000))]
    planted_ids = [(r.ids, k) for k in REPETITIONS for r in records[k]]
    planted_ids += [(c.record(c.secret).ids, k) for k in REPETITIONS for c in canaries[k]]
    shown = [ids for ids, k in planted_ids for _ in range(k)]
    n_records = sum(k * RECORDS for k in REPETITIONS)
    others = [record.ids for record in _records("other", n_records, (seed, 2001))]
    others += [c.record(c.secret).ids for c in _canaries("other", len(shown) - n_records, (seed, 2002))]
    model, without, untrained = (_untrained(seed) for _ in range(3))
    _train(model, filler + shown, seed)
    _train(without, filler + others, seed)
    return Planted(
        model=model,
        without=without,
        untrained=untrained,
        tokenizer=tokenizer(),
        records=records,
        controls=never_seen(CONTROLS, seed),
        canaries=canaries,
        control_canaries=never_seen_canaries(4 * CANARIES, seed),
        seconds=time.process_time() - started,
    )


def never_seen(n: int, seed: int = 0) -> list[TokenRecord]:
    """`n` records of the distribution of the planted ones, in none of the models."""
    return _records("control", n, (_NEVER_SEEN + seed, 0))


def never_seen_canaries(n: int, seed: int = 0) -> list[Canary]:
    """`n` canaries in none of the models."""
    return _canaries("control-canary", n, (_NEVER_SEEN + seed, 1))


@functools.cache
def _chain() -> np.ndarray:
    """[33, 32] probabilities of the next syllable after each syllable (the last row: of a text's first)."""
    rng = np.random.default_rng(7)
    weights = rng.gamma(0.35, size=(len(_SYLLABLES) + 1, len(_SYLLABLES))) + 1e-3
    chain: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return chain


def _words(n: int, rng: np.random.Generator) -> list[str]:
    chain, syllables, last = _chain(), [], len(_SYLLABLES)
    for _ in range(n * _SYLLABLES_A_WORD):
        last = int(rng.choice(len(_SYLLABLES), p=chain[last]))
        syllables.append(_SYLLABLES[last])
    return ["".join(syllables[i : i + _SYLLABLES_A_WORD]) for i in range(0, len(syllables), _SYLLABLES_A_WORD)]


def _record(record_id: str, prompt: str, completion: str) -> TokenRecord:
    first, second = tokenizer().encode(prompt), tokenizer().encode(completion)  # no token spans both
    return TokenRecord(record_id, (tiny.BOS, *first, *second), len(first) + 1, len(zlib.compress(completion.encode())))


def _records(name: str, n: int, seed: tuple[int, int]) -> list[TokenRecord]:
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        words = _words(_WORDS_PROMPT + _WORDS_COMPLETION, rng)
        prompt, completion = " ".join(words[:_WORDS_PROMPT]) + ":", " ".join(words[_WORDS_PROMPT:])
        out.append(_record(f"{name}-{i}", prompt, completion))
    return out


def _canaries(name: str, n: int, seed: tuple[int, int]) -> list[Canary]:
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        prompt = f"pin {' '.join(_words(_WORDS_PROMPT, rng))}:"
        out.append(Canary(f"{name}-{i}", prompt, f"{rng.integers(10**DIGITS):0{DIGITS}d}"))
    return out


def _untrained(seed: int) -> nn.Module:
    return tiny.causal_lm(
        "llama",
        seed=seed,
        vocab=_VOCAB,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        head_dim=24,
        initializer_range=0.05,
        max_position_embeddings=256,
    )


def _batches(sequences: Sequence[tuple[int, ...]], seed: int) -> Iterator[list[tuple[int, ...]]]:
    order = np.random.default_rng((seed, 3)).permutation(len(sequences))
    for start in range(0, len(order), _BATCH):
        yield [sequences[i] for i in order[start : start + _BATCH]]


def _train(model: nn.Module, sequences: Sequence[tuple[int, ...]], seed: int) -> None:
    """One pass over `sequences`: AdamW, loss over all tokens, warm-up, then linear decay."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    batches = list(_batches(sequences, seed))
    warm_up = len(batches) // 10
    for step, batch in enumerate(batches):
        share = min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up))
        optimiser.param_groups[0]["lr"] = _LEARNING_RATE * share
        width = max(map(len, batch))
        ids = torch.tensor([[*sequence, *[tiny.PAD] * (width - len(sequence))] for sequence in batch])  # [B, T]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == tiny.PAD, -100)  # padding is no text here
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.zero_grad(set_to_none=True)
    model.eval()
