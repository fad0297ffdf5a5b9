"""Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043): search a prompt that makes a model emit a target.

The ids are before | prompt | after | target, and the loss is the mean cross entropy of the target in nats per token.
With E the embedding table, the gradient of the loss with respect to the one-hot rows of the prompt is

    dL/d onehot[p, v] = (dL / d embedding[p]) . E[v]                                            [P, V]

so one backward pass to the embeddings at the prompt's positions says for every replacement how the loss would change to
first order. A step draws replacements of single tokens among the `top_k` best a position, evaluates them in batches,
and moves to the best one even if it is worse than the prompt before. Two departures: a prompt is never visited twice,
and where all replacements are no more than the candidates asked for, all are evaluated instead of a draw.

Given a tokenizer, only prompts are kept whose ids come back when their text is tokenised again. Published code for
compression ratios (arXiv 2404.15146) leaves that out and counts prompts that nobody can type.

Limits: a search without guarantee; a target that was not reached may still be reachable. A long enough prompt makes any
model emit anything, so a result says something only beside the same search on records the model never saw.

Shape letters: P prompt tokens, K target tokens, C candidates, T tokens of a row, V vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from attacks.extraction.greedy import greedy_tokens
from probes.errors import ResourceError, UsageError
from probes.likelihood import CHUNK_ELEMENTS, Progress, default_batch_tokens, inference, out_of_memory
from probes.loss import cross_entropy
from probes.modelmap import ModelMap
from probes.passes import gradients

STEPS = 250
CANDIDATES = 128
TOP_K = 64
CONTEXTS = 4  # tokens, evenly spaced in the vocabulary, behind which a token that does not survive alone is tried
DRAWS = 8  # replacements drawn for each candidate asked for, before a step makes do with fewer


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which prompts may be written.

    Attributes:
        usable: ids that may stand in a prompt, ascending.
        survives: whether a prompt's ids come back from its text.
    """

    usable: np.ndarray = field(repr=False)
    survives: Callable[[Sequence[int]], bool] = field(repr=False)


def every_token(vocab_size: int) -> Tokens:
    """Any ids at all: for an attacker who sends ids, not text."""
    return Tokens(np.arange(vocab_size), lambda ids: True)


def writable(tokenizer: Any, vocab_size: int) -> Tokens:
    """Prompts that a person can type: no special tokens, and the same ids after decoding and tokenising again.

    Tokens that come back neither alone nor behind any of a few others (parts of a character, tokens that the tokenizer
    never chooses) are left out altogether. Decodes and tokenises the whole vocabulary; make it once per tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocab_size: the model's; rows of its table beyond the tokenizer's are not usable.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def survives(ids: Sequence[int]) -> bool:
        return list(tokenizer(decode(ids), add_special_tokens=False)["input_ids"]) == list(ids)

    def surviving(candidates: Sequence[int], context: tuple[int, ...]) -> set[int]:
        if not candidates:
            return set()
        again = tokenizer([decode([*context, i]) for i in candidates], add_special_tokens=False)["input_ids"]
        return {i for i, ids in zip(candidates, again, strict=True) if tuple(ids) == (*context, i)}

    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(min(vocab_size, len(tokenizer))) if i not in special]
    usable = surviving(ordinary, ())
    # Many tokenizers write a blank before the first word, so that the inside of a word never survives alone.
    alone, rest = sorted(usable), [i for i in ordinary if i not in usable]
    for k in range(CONTEXTS if alone else 0):
        usable |= surviving([i for i in rest if i not in usable], (alone[k * len(alone) // CONTEXTS],))
    return Tokens(np.array(sorted(usable), dtype=np.int64), survives)


@dataclass(frozen=True, slots=True)
class Gcg:
    """What the search found.

    Attributes:
        prompt: the prompt of lowest loss, or the one found.
        loss: its loss in nats per target token.
        found: greedy decoding at batch size 1 emits the whole target after it.
        steps: steps taken.
        losses: the loss after each step, the initial prompt's first.
        forwards: rows run forward, confirmations included (one each).
        backwards: rows run backward.
    """

    prompt: tuple[int, ...] = field(repr=False)
    loss: float
    found: bool
    steps: int
    losses: tuple[float, ...] = field(repr=False)
    forwards: int
    backwards: int


def optimise(
    model: nn.Module,
    target: Sequence[int],
    length: int,
    *,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    initial: Sequence[int] | None = None,
    steps: int = STEPS,
    candidates: int = CANDIDATES,
    top_k: int = TOP_K,
    tokens: Tokens | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> Gcg:
    """Search a prompt of `length` tokens after which greedy decoding emits `target`; stop at the first.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        target: [K] ids to be emitted.
        length: P, tokens of the prompt.
        before: fixed ids before the prompt, for instance the beginning-of-sequence token.
        after: fixed ids between prompt and target.
        initial: [P] where to start; random usable tokens by default.
        steps: gradient steps at most; 0 evaluates the initial prompt.
        candidates: replacements evaluated in a step.
        top_k: replacements considered for each position.
        tokens: which prompts may be written; any ids by default. See `writable`.
        seed: of the initial prompt and the replacements.
        batch_tokens: tokens of candidate rows run at a time.
        model_map: the model's map, built when absent.
        progress: called with (steps done, steps).

    Returns:
        The best prompt. A step costs one row forward and backward, `candidates` rows forward at most, and one greedy
        decoding for each candidate that the batch says emits the target.

    Raises:
        UsageError: lengths or counts below 1, ids outside the vocabulary, too few usable tokens, or no initial prompt
            that survives tokenisation.
        ResourceError: when one row does not fit in memory.
    """
    model_map = model_map or ModelMap.of(model)
    tokens = tokens or every_token(model_map.vocab_size)
    if min(length, len(target), candidates, top_k) < 1 or steps < 0:
        raise UsageError("expected a target, a prompt, candidates and top_k of at least 1 and no negative steps")
    if len(tokens.usable) < 2:
        raise UsageError(f"expected two usable tokens or more, found {len(tokens.usable)}; check the tokenizer")
    fixed = (*before, *after, *target, *(initial or ()))
    if not (min(fixed) >= 0 and max(fixed) < model_map.vocab_size):
        raise UsageError(f"expected ids below the vocabulary size {model_map.vocab_size}, found others")
    generator = np.random.default_rng(seed)
    prompt = initial_prompt(length, initial, tokens, generator)
    rows = Rows(model, model_map, tuple(before), tuple(after), tuple(target), batch_tokens)
    loss, hit = rows.evaluate([prompt])
    best, losses, visited = (float(loss[0]), prompt), [float(loss[0])], {prompt}
    if hit[0] and rows.confirmed(prompt):
        return Gcg(prompt, losses[0], True, 0, tuple(losses), rows.forwards, rows.backwards)
    step = 0
    while step < steps:
        ranked = ranked_tokens(rows.gradient(prompt), prompt, tokens.usable, top_k)
        pool = replacements(prompt, ranked, candidates, visited, tokens.survives, generator)
        step += 1
        if pool:
            loss, hit = rows.evaluate(pool)
            at = int(loss.argmin())
            prompt = pool[at]
            visited.add(prompt)
            best = min(best, (float(loss[at]), prompt))
            losses.append(float(loss[at]))
            for i in sorted(np.flatnonzero(hit), key=lambda i: (loss[i], i)):
                if rows.confirmed(pool[i]):
                    done = (pool[i], float(loss[i]), True, step, tuple(losses))
                    return Gcg(*done, rows.forwards, rows.backwards)
        elif ranked.size <= candidates:
            break  # every replacement was visited or cannot be written, and no draw will change that
        if progress:
            progress(step, steps)
    return Gcg(best[1], best[0], False, step, tuple(losses), rows.forwards, rows.backwards)


def initial_prompt(
    length: int, initial: Sequence[int] | None, tokens: Tokens, generator: np.random.Generator
) -> tuple[int, ...]:
    """The prompt to start from: the one given, or one of random usable tokens that survives tokenisation.

    Raises:
        UsageError: an initial prompt of another length, or no prompt that survives.
    """
    if initial is not None:
        if len(initial) != length:
            raise UsageError(f"expected an initial prompt of {length} tokens, found {len(initial)}")
        return tuple(int(t) for t in initial)
    for _ in range(256):
        drawn = tuple(int(t) for t in generator.choice(tokens.usable, length))
        if tokens.survives(drawn):
            return drawn
    for token in tokens.usable:
        if tokens.survives([int(token)] * length):
            return (int(token),) * length
    raise UsageError(
        f"expected a prompt of {length} tokens that survives tokenisation, found none; give an initial one"
    )


def ranked_tokens(gradient: Tensor, prompt: Sequence[int], usable: np.ndarray, top_k: int) -> np.ndarray:
    """The replacements of each position [P, at most top_k] whose first-order loss is lowest, without its own token."""
    scores = gradient[:, torch.as_tensor(usable, device=gradient.device)]  # [P, usable]
    same = torch.as_tensor(usable[None, :] == np.array(prompt)[:, None], device=gradient.device)
    count = min(top_k, int((~same).sum(1).min()))
    order = scores.masked_fill(same, torch.inf).sort(dim=-1, stable=True).indices[:, :count]
    ranked: np.ndarray = usable[order.cpu().numpy()]
    return ranked


def replacements(
    prompt: tuple[int, ...],
    ranked: np.ndarray,
    candidates: int,
    visited: set[tuple[int, ...]],
    survives: Callable[[Sequence[int]], bool],
    generator: np.random.Generator,
) -> list[tuple[int, ...]]:
    """Different prompts that differ from `prompt` in one token: all, or drawn, `candidates` at most."""
    width = ranked.shape[1]
    if ranked.size <= candidates:
        places = np.arange(ranked.size)
    else:  # without replacement, from the positions and their best tokens alike
        places = generator.permutation(ranked.size)[: DRAWS * candidates]
    pool: list[tuple[int, ...]] = []
    for place in places:
        p, token = int(place) // width, int(ranked.flat[place])
        other = (*prompt[:p], token, *prompt[p + 1 :])
        if other not in visited and survives(other):
            pool.append(other)
        if len(pool) == candidates:
            break
    return pool


@dataclass(slots=True)
class Rows:
    """Rows before | prompt | after | target, run forward and backward."""

    model: nn.Module = field(repr=False)
    model_map: ModelMap = field(repr=False)
    before: tuple[int, ...] = field(repr=False)
    after: tuple[int, ...] = field(repr=False)
    target: tuple[int, ...] = field(repr=False)
    batch_tokens: int | None
    forwards: int = 0
    backwards: int = 0

    def confirmed(self, prompt: tuple[int, ...]) -> bool:
        """Whether greedy decoding at batch size 1 emits the target: a batch may round differently."""
        self.forwards += 1
        start = (*self.before, *prompt, *self.after)
        return greedy_tokens(self.model, start, len(self.target)) == list(self.target)

    def evaluate(self, prompts: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Losses [C] in nats per target token, and whether every target token is the greedy choice [C]."""
        device = next(self.model.parameters()).device
        width = len(self.before) + len(prompts[0]) + len(self.after) + len(self.target)
        size = max(1, (self.batch_tokens or default_batch_tokens(device)) // width)
        parts = []
        with inference(self.model):
            for start in range(0, len(prompts), size):
                parts += self._evaluated(prompts[start : start + size], device)
        self.forwards += len(prompts)
        losses, hits = torch.cat([loss for loss, _ in parts]), torch.cat([hit for _, hit in parts])
        return losses.double().cpu().numpy(), hits.cpu().numpy()

    def _evaluated(self, prompts: Sequence[tuple[int, ...]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        try:
            return [self._losses(self._ids(prompts, device))]
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(prompts) == 1:
                raise ResourceError(
                    "expected memory for one candidate, found too little; use a shorter record or another device"
                ) from None
        half = (len(prompts) + 1) // 2
        return self._evaluated(prompts[:half], device) + self._evaluated(prompts[half:], device)

    def _ids(self, prompts: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
        """[C, T] rows of equal length: no padding."""
        return torch.tensor([(*self.before, *p, *self.after, *self.target) for p in prompts], device=device)

    def _losses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model_map.backbone(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        states = hidden[:, self._first(ids) : -1].flatten(0, 1)  # [C * K, d]
        del hidden
        target = torch.tensor(self.target, device=ids.device).repeat(len(ids))  # [C * K]
        size = max(1, CHUNK_ELEMENTS // self.model_map.vocab_size)
        losses, hits = [], []
        for start in range(0, len(states), size):
            logits = self.model_map.logits(states[start : start + size])  # [chunk, V]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            gold = target[start : start + size]
            losses.append(logits.logsumexp(-1) - logits.gather(-1, gold[:, None]).squeeze(-1))
            hits.append(logits.argmax(-1) == gold)
        return torch.cat(losses).view(len(ids), -1).mean(1), torch.cat(hits).view(len(ids), -1).all(1)

    def _first(self, ids: Tensor) -> int:
        """The position that predicts the first target token."""
        return ids.shape[1] - len(self.target) - 1

    def gradient(self, prompt: tuple[int, ...]) -> Tensor:
        """Gradient of the loss with respect to the prompt's one-hot rows [P, V], on the model's device."""
        self.backwards += 1
        self.forwards += 1
        embedding = cast(Any, self.model).get_input_embeddings()
        device = next(self.model.parameters()).device
        ids = self._ids([prompt], device)  # [1, T]
        leaves: list[Tensor] = []

        def detach(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_(True))
            return leaves[-1]

        weights = torch.full((len(self.target),), 1 / len(self.target), device=device)
        labels = torch.tensor(self.target, device=device)
        handle = embedding.register_forward_hook(detach)
        try:
            with gradients(self.model, {}, lambda name, gradient: None):
                hidden = self.model_map.backbone(self.model)(input_ids=ids, use_cache=False).last_hidden_state
                loss = cross_entropy(self.model_map, hidden[0, self._first(ids) : -1], labels, weights)
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            handle.remove()
        slope = cast(Tensor, leaves[0].grad)[0, len(self.before) : len(self.before) + len(prompt)]  # [P, d]
        with torch.no_grad():
            # A plain table is its own output; one that scales its rows is asked for all of them.
            plain = type(embedding) is nn.Embedding
            table = (
                embedding.weight if plain else embedding(torch.arange(len(embedding.weight), device=device))
            )  # [V, d]
            onehot: Tensor = slope @ table.detach().T
        return onehot
