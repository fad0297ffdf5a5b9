"""Log-probabilities of a few alternatives behind one prompt, by one forward pass where they differ in their last token.

The letters of a multiple-choice question, or yes and no, are one token each behind the same tokens: one pass over the
prompt gives them all. Alternatives of any other shape are scored one by one.

Shape letters: B questions in a batch, T padded tokens, V vocabulary, d width, k alternatives of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from probes import likelihood
from probes.errors import ResourceError, UsageError
from probes.modelmap import ModelMap
from probes.records import TokenRecord, length_batches, pad

Floats = NDArray[np.float64]
Score = Callable[[Sequence[TokenRecord]], likelihood.TokenTable]


@dataclass(frozen=True, slots=True)
class Alternatives:
    """What a model gives to the alternatives of one question.

    Attributes:
        log_prob: [k] nats of each alternative behind the prompt. Where all of them differ in their last token alone,
            what stands before that token is common to all and left out: differences between them are the same.
        tokens: [k] tokens that `log_prob` sums over.
    """

    log_prob: Floats
    tokens: NDArray[np.int64]

    @property
    def per_token(self) -> Floats:
        """[k] mean log-probability of a token of each alternative."""
        means: Floats = self.log_prob / self.tokens
        return means


def score_alternatives(
    model: nn.Module,
    questions: Sequence[Sequence[TokenRecord]],
    *,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    score: Score | None = None,
) -> list[Alternatives]:
    """Score the alternatives of each question.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        questions: of each, one record an alternative: the prompt with this alternative as its completion, tokenised as
            one text.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens a batch.
        score: what scores the alternatives that need a pass each; `probes.likelihood.score` by default. A caller with a
            store of scored records hands over its own.

    Returns:
        One for each question, in order.

    Raises:
        UsageError: a question without alternatives.
        UnsupportedError: token ids outside the vocabulary.
        ResourceError: when a single question does not fit in memory.
    """
    if not all(len(question) for question in questions):
        raise UsageError("expected at least one alternative for every question, found none for some")
    model_map = model_map or ModelMap.of(model)
    likelihood.check_records([record for question in questions for record in question], model_map.vocab_size)
    together = [i for i, question in enumerate(questions) if _last_differs(question)]
    found: dict[int, Alternatives] = {}
    budget = batch_tokens or likelihood.default_batch_tokens(next(model.parameters()).device)
    with likelihood.inference(model):
        for batch in length_batches([questions[i][0] for i in together], budget):
            rows = [together[i] for i in batch]
            found.update(zip(rows, _last(model, model_map, [questions[i] for i in rows]), strict=True))
    rest = [i for i in range(len(questions)) if i not in found]
    flat = [record for i in rest for record in questions[i]]
    if flat:
        default = lambda records: likelihood.score(model, records, model_map=model_map, batch_tokens=batch_tokens)  # noqa: E731
        table = (score or default)(flat)
        sums = np.array([table.log_prob[table.rows(i)].sum(dtype=np.float64) for i in range(len(flat))])
        at = 0
        for i in rest:
            part = slice(at, at + len(questions[i]))
            found[i] = Alternatives(sums[part], np.array([record.n_tokens for record in questions[i]], dtype=np.int64))
            at = part.stop
    return [found[i] for i in range(len(questions))]


def _last_differs(question: Sequence[TokenRecord]) -> bool:
    """Whether the alternatives are the same but for their last token."""
    return len(question) > 1 and len({record.ids[:-1] for record in question}) == 1


def _last(model: nn.Module, model_map: ModelMap, questions: Sequence[Sequence[TokenRecord]]) -> list[Alternatives]:
    """Log-probabilities of the last tokens, questions batched; halved where memory runs out."""
    try:
        return _last_together(model, model_map, questions)
    except Exception as error:
        if not likelihood.out_of_memory(error):
            raise
        if len(questions) == 1:
            raise ResourceError(
                f"expected memory for one prompt of {len(questions[0][0].ids)} tokens, found too little; use shorter "
                "records, a smaller dtype or another device"
            ) from None
    half = (len(questions) + 1) // 2  # outside the handler, so that the failed batch's tensors are released first
    return _last(model, model_map, questions[:half]) + _last(model, model_map, questions[half:])


def _last_together(
    model: nn.Module, model_map: ModelMap, questions: Sequence[Sequence[TokenRecord]]
) -> list[Alternatives]:
    device = next(model.parameters()).device
    firsts = [question[0] for question in questions]
    ids, _ = pad(firsts, device)  # [B, T]
    hidden = model_map.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
    places = torch.tensor([len(record.ids) - 2 for record in firsts], device=device)
    states = hidden[torch.arange(len(firsts), device=device), places]  # [B, d]
    del hidden
    out, size = [], max(1, likelihood.CHUNK_ELEMENTS // model_map.vocab_size)
    for start in range(0, len(firsts), size):
        log_probs = model_map.logits(states[start : start + size]).float().log_softmax(-1)  # [<= size, V]
        for row, question in zip(log_probs, questions[start : start + size], strict=True):
            last = [record.ids[-1] for record in question]
            values = row[last].double().cpu().numpy()
            out.append(Alternatives(values, np.ones(len(question), dtype=np.int64)))
    return out
