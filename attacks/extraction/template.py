"""Template extraction: the head of the chat template alone makes an aligned model write its post-training data.

Barbero et al. 2025 (arXiv 2510.18554): the tokens that a chat template writes before the first user turn occur in
post-training only, so what a model samples after them resembles its post-training data. Generations are compared with
records by

    edit similarity   1 - Levenshtein(a, b) / max(|a|, |b|), on characters
    cosine            of embeddings, which find copies whose wording or numbers changed

and each record counts with its nearest generation. The paper's fixed threshold (cosine 0.95) depends on the embedder
and on how alike all texts of a kind are. Here the threshold comes from records that the model certainly never saw, of
the same kind as the records looked for: a hit is a record nearer to some generation than all but a chosen share of the
unseen ones (split conformal; ties count against a hit). Half of the unseen records set the threshold, the other half
shows what share of them it hits.

Shape letters: N generations, M records looked for, C unseen records, d embedding width, T padded tokens.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import numpy as np
import pandas as pd
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import nn

from attacks.extraction.untargeted import sample
from probes.errors import UsageError
from probes.likelihood import Progress, SamplingScheme, default_batch_tokens, inference
from probes.modelmap import ModelMap
from probes.statistics import Clusters, Floats, Interval, conformal_pvalues, difference_interval, mean_interval

FPR = 0.05  # share of unseen records that may be hit
PAIRS = 1 << 20  # similarities held at a time
TODAY = datetime.datetime(2025, 1, 1)  # for templates that print the date: a head must not depend on the day

_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

Embed = Callable[[Sequence[str]], np.ndarray]


# --- what the template writes ---------------------------------------------------------------------------------------


def head(tokenizer: Any) -> tuple[int, ...]:
    """Ids of what the chat template writes before the content of the first user turn, a default system turn included.

    The template is rendered with a marker as content, tokenised in one piece with it and cut before the first token
    that the marker has a part in: a blank that would merge with the content is left for the model to write.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Returns:
        At least one token id.

    Raises:
        UsageError: no chat template, one that refuses a single user turn or does not write it as it is, or one that
            writes nothing before it.
    """
    marker = _marker(tokenizer)
    rendered = _render(tokenizer, [{"role": "user", "content": marker}])
    at = rendered.find(marker)
    if at < 0:
        raise UsageError("expected a chat template that writes the user's words as they are, found another; give ids")
    if getattr(tokenizer, "is_fast", False):
        text = rendered[: at + len(marker)]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [i for i, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True) if end <= at]
    else:
        ids = list(tokenizer(rendered[:at], add_special_tokens=False)["input_ids"])
    if not ids:
        raise UsageError("expected a chat template that opens the user's turn with tokens, found none; give ids")
    return tuple(int(i) for i in ids)


def conversation_end(tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """When one exchange after the head is over: the end-of-sequence id, and how many of them it takes.

    A template may end every turn with it or only the assistant's. Where it never writes one, or refuses an exchange,
    the first counts.

    Returns:
        The stop tokens and their number, as `extract` takes them; no tokens where the tokenizer has no such id.

    Raises:
        UsageError: no chat template.
    """
    end = tokenizer.eos_token_id
    if end is None:
        return (), 1
    marker = _marker(tokenizer)
    turns = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    try:
        rendered = _render(tokenizer, turns)
    except UsageError:
        return (int(end),), 1
    after = rendered[rendered.find(marker) :]
    ids = list(tokenizer(after, add_special_tokens=False)["input_ids"])
    return (int(end),), max(1, ids.count(end))


def _marker(tokenizer: Any) -> str:
    """A word that the template does not contain, begun with a letter as ordinary text is."""
    try:
        template = str(tokenizer.get_chat_template())
    except (AttributeError, ValueError):
        raise UsageError(
            "expected a tokenizer with a chat template, found none; template extraction is for aligned models"
        ) from None
    marker = "Qx"
    while marker in template:
        marker += "qx"
    return marker


def _render(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    try:
        template = _DATE.sub(lambda call: repr(TODAY.strftime(call[2])), str(tokenizer.get_chat_template()))
        return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
    except Exception as error:  # a template raises what it likes, with the text in it
        raise UsageError(f"the chat template refuses a conversation of one turn ({type(error).__name__})") from None


def extract(
    model: nn.Module,
    head_ids: Sequence[int],
    n: int,
    length: int,
    *,
    stop: Sequence[int] = (),
    stop_after: int = 1,
    scheme: SamplingScheme | None = None,
    seed: int = 0,
    batch: int = 32,
    model_map: ModelMap | None = None,
    progress: Progress | None = None,
) -> list[tuple[int, ...]]:
    """Sample after the template's head; arguments and errors as `attacks.extraction.untargeted.sample`.

    Args:
        model: an aligned causal language model.
        head_ids: of `head`.
        n: how many samples.
        length: tokens of each at most.
        stop: tokens that end a conversation, see `conversation_end`.
        stop_after: how many of them it takes.
        scheme: the sampling rule; plain sampling by default.
        seed: of all draws.
        batch: samples decoded together.
        model_map: the model's map, built when absent.
        progress: called with (samples done, samples in all).

    Returns:
        n token sequences without the head; decode them without special tokens before `match`.
    """
    return sample(
        model,
        n,
        length,
        prompt_ids=[tuple(head_ids)],
        scheme=scheme,
        seed=seed,
        batch=batch,
        stop=stop,
        stop_after=stop_after,
        model_map=model_map,
        progress=progress,
    )


# --- embedders ------------------------------------------------------------------------------------------------------


class Embedder(Protocol):
    """Texts to vectors. `fit` sees the generations alone, so records and unseen records are treated alike."""

    def fit(self, texts: Sequence[str]) -> tuple[Embed, np.ndarray]:
        """A function from texts to unit rows [len(texts), d], zeros for a blank text; and the rows of `texts`."""
        ...


@dataclass(frozen=True, slots=True)
class HashedNgrams:
    """Tf-idf of hashed character n-grams: no model, no network, the same vectors on every machine.

    Case is folded, runs of blanks are one blank, and every digit counts as 0 unless told otherwise, so that a copy with
    other numbers is still near. Counts are damped by log(1 + count); an n-gram adds or subtracts by its hash, so that
    collisions cancel on average. A frequent n-gram counts less: idf = ln((1 + N) / (1 + df)) + 1 over the generations.

    Attributes:
        sizes: lengths of the n-grams, in characters.
        dimensions: width of the vectors.
        fold_digits: whether digits are alike.
    """

    sizes: tuple[int, ...] = (3, 4, 5)
    dimensions: int = 4096
    fold_digits: bool = True

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1 or self.dimensions < 1:
            raise UsageError("expected n-gram sizes and dimensions of at least 1, found smaller ones")

    def fit(self, texts: Sequence[str]) -> tuple[Embed, np.ndarray]:
        """Inverse document frequencies of the generations."""
        counts = self._rows(texts)
        idf = np.log((1 + len(texts)) / (1 + (counts != 0).sum(0))) + 1  # [d]

        def embed(texts: Sequence[str]) -> np.ndarray:
            return _units(self._rows(texts) * idf)

        return embed, _units(counts * idf)

    def _rows(self, texts: Sequence[str]) -> np.ndarray:
        """Damped signed counts [len(texts), d]."""
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for i, text in enumerate(texts):
            counts = self._counts(text)
            rows[i] = np.sign(counts) * np.log1p(np.abs(counts))
        return rows

    def _counts(self, text: str) -> Floats:
        """Signed counts of hashed n-grams [d]; zeros for a blank text."""
        words = " ".join(text.casefold().split())
        if self.fold_digits:
            words = "".join("0" if c.isdigit() else c for c in words)
        codes = np.frombuffer(f" {words} ".encode("utf-32-le", "replace"), dtype=np.uint32).astype(np.uint64)  # [m]
        counts = np.zeros(self.dimensions)
        if not words:
            return counts
        for size in self.sizes:
            size = min(size, len(codes))
            hashes = np.full(len(codes) - size + 1, size, dtype=np.uint64)
            for j in range(size):
                hashes = hashes * np.uint64(0x100000001B3) + codes[j : j + len(hashes)]  # modulo 2^64
            hashes ^= hashes >> np.uint64(33)  # the mixing of MurmurHash3, so that every bit counts
            hashes *= np.uint64(0xFF51AFD7ED558CCD)
            hashes ^= hashes >> np.uint64(33)
            signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
            counts += np.bincount((hashes % np.uint64(self.dimensions)).astype(np.intp), signs, self.dimensions)
        return counts


@dataclass(frozen=True, slots=True)
class _HiddenStates:
    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    model_map: ModelMap = field(repr=False)
    max_length: int
    batch_tokens: int

    def fit(self, texts: Sequence[str]) -> tuple[Embed, np.ndarray]:
        """The mean over the generations, which is subtracted: all hidden states of a model share one direction."""
        own = self._means(texts)
        centre = own.mean(0)  # [d]

        def rows(means: Floats) -> np.ndarray:
            read = np.abs(means).sum(1, keepdims=True) > 0  # nothing was read from a blank text
            return _units((means - centre) * read)

        return lambda texts: rows(self._means(texts)), rows(own)

    def _means(self, texts: Sequence[str]) -> Floats:
        """Mean hidden states [len(texts), d]; zeros for a text without tokens."""
        encoded = [list(self.tokenizer(text)["input_ids"])[: self.max_length] for text in texts]
        if any(token >= self.model_map.vocab_size for ids in encoded for token in ids):
            raise UsageError(
                "expected the checkpoint's own tokenizer, found one with token ids the model does not have"
            )
        device = next(self.model.parameters()).device
        order = sorted((i for i in range(len(texts)) if encoded[i]), key=lambda i: (-len(encoded[i]), i))
        found: dict[int, Floats] = {}
        with inference(self.model):
            while order:
                size = max(1, self.batch_tokens // len(encoded[order[0]]))
                batch, order = order[:size], order[size:]
                ids = torch.zeros(len(batch), len(encoded[batch[0]]), dtype=torch.long)  # [B, T], right-padded, no mask
                for row, i in enumerate(batch):
                    ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
                hidden = self.model_map.backbone(self.model)(input_ids=ids.to(device), use_cache=False)
                for row, i in enumerate(batch):
                    states = hidden.last_hidden_state[row, : len(encoded[i])]  # [tokens, d]
                    found[i] = states.double().mean(0).cpu().numpy()
        width = len(next(iter(found.values()))) if found else 1  # without a token there is nothing to compare
        return np.array([found.get(i, np.zeros(width)) for i in range(len(texts))]).reshape(len(texts), width)


def model_embedder(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_length: int = 512,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> Embedder:
    """The audited model as embedder: its mean final hidden state over a text's tokens, minus the generations' mean.

    No other model is needed, and one forward pass a text. A text that the model memorised may well have unusual states;
    the unseen records that set the threshold do not show that, so read this beside `HashedNgrams`.

    Args:
        model: a causal language model; used in evaluation mode, unchanged.
        tokenizer: its tokenizer.
        max_length: tokens of a text that are read, at most the model's positions.
        batch_tokens: padded tokens a batch.
        model_map: the model's map, built when absent.
    """
    model_map = model_map or ModelMap.of(model)
    positions = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", None)
    most = min(max_length, positions) if isinstance(positions, int) else max_length
    if most < 1:
        raise UsageError(f"expected a length of at least 1 token, found {most}")
    budget = batch_tokens or default_batch_tokens(next(model.parameters()).device)
    return _HiddenStates(model, tokenizer, model_map, most, budget)


def _units(rows: np.ndarray) -> np.ndarray:
    """Rows [n, d] divided by their norms; rows of zeros stay."""
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1, keepdims=True))
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)


# --- matching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits by one similarity.

    Attributes:
        status: "not resolvable" where the unseen records are too few for the false-positive rate.
        reason: why, or None.
        threshold: the similarity a record must exceed.
        targets: share of the records that are hit.
        disjoint: share of the held-out unseen records that are hit; expected at or below the chosen rate.
        excess: targets minus disjoint.
    """

    status: Literal["ok", "not resolvable"]
    reason: str | None
    threshold: float | None
    targets: Interval | None
    disjoint: Interval | None
    excess: Interval | None


@dataclass(frozen=True, slots=True)
class TemplateMatch:
    """Records against generations.

    Attributes:
        frame: a row for each record: `target` (its index), and for `edit` and `cosine` the similarity to the nearest
            generation (`edit_similarity`, `cosine`), that generation's index (`edit_nearest`, `cosine_nearest`), the
            conformal p-value (`edit_pvalue`, `cosine_pvalue`) and whether it is a hit (`edit_hit`, `cosine_hit`; None
            where hits are not resolvable).
        edit: hits by edit similarity.
        cosine: hits by cosine.
        fpr: the false-positive rate asked for.
        generations: how many generations were compared.
    """

    frame: pd.DataFrame
    edit: Hits
    cosine: Hits
    fpr: float
    generations: int


def match(
    generations: Sequence[str],
    targets: Sequence[str],
    disjoint: Sequence[str],
    *,
    embedder: Embedder | None = None,
    fpr: float = FPR,
    clusters: Clusters = None,
    disjoint_clusters: Clusters = None,
    level: float = 0.95,
    seed: int = 0,
) -> TemplateMatch:
    """Compare records with generations, with thresholds from records that the model never saw.

    Both similarities are the highest over all generations, for records and unseen records alike: with more generations
    everything comes nearer, and the threshold with it.

    Args:
        generations: [N] decoded samples; blank ones are left out.
        targets: [M] texts of the records.
        disjoint: [C] texts that the model certainly never saw, of the same kind and length as the records. A shift
            between the two shows as hits.
        embedder: for the cosine; `HashedNgrams()` by default.
        fpr: share of unseen records that may be hit.
        clusters: [M] near-duplicate clusters, for the intervals.
        disjoint_clusters: [C] the same; a cluster is never on both sides of the split.
        level: confidence level.
        seed: of the split and the intervals.

    Returns:
        The comparison. At fpr = 0.05 at least 37 unseen records are needed, 19 of them for the threshold.

    Raises:
        UsageError: no generations, no records, a blank record, or a rate outside (0, 1).
    """
    written = [i for i, text in enumerate(generations) if text.strip()]
    if not written or not targets:
        raise UsageError(f"expected generations and records, found {len(written)} and {len(targets)} with text")
    if not all(text.strip() for text in (*targets, *disjoint)):
        raise UsageError("expected records with text, found blank ones; leave them out")
    if not 0 < fpr < 1:
        raise UsageError(f"expected a false-positive rate in (0, 1), found {fpr}")
    calibration, held_out = _halves(len(disjoint), disjoint_clusters, seed)
    texts = [generations[i] for i in written]
    both = [*targets, *disjoint]
    nearest = {"edit": _nearest_edit(both, texts), "cosine": _nearest_cosine(both, texts, embedder or HashedNgrams())}
    columns: dict[str, Any] = {"target": np.arange(len(targets))}
    hits: dict[str, Hits] = {}
    own = None if disjoint_clusters is None else [disjoint_clusters[i] for i in held_out]
    for name, (best, where) in nearest.items():
        ours, theirs = best[: len(targets)], best[len(targets) :]
        pvalues = conformal_pvalues(ours, theirs[calibration])
        columns["edit_similarity" if name == "edit" else name] = ours
        columns[f"{name}_nearest"] = np.array(written)[where[: len(targets)]]
        columns[f"{name}_pvalue"] = pvalues
        allowed = math.floor(fpr * (len(calibration) + 1) + 1e-9)  # unseen records that may be as near
        if not allowed or not len(held_out):
            needed = max(2, 2 * math.ceil(1 / fpr - 1e-9) - 3)
            reason = f"a false-positive rate of {fpr:g} needs {needed} or more unseen records, found {len(disjoint)}"
            hits[name] = Hits("not resolvable", reason, None, None, None, None)
            columns[f"{name}_hit"] = np.full(len(targets), None)
            continue
        hit = pvalues <= fpr + 1e-12
        false = conformal_pvalues(theirs[held_out], theirs[calibration]) <= fpr + 1e-12
        options: dict[str, Any] = {"level": level, "bounds": (0.0, 1.0), "seed": seed}
        hits[name] = Hits(
            status="ok",
            reason=None,
            threshold=float(np.sort(theirs[calibration])[-allowed]),
            targets=mean_interval(hit, clusters, **options),
            disjoint=mean_interval(false, own, **options),
            excess=difference_interval(hit, false, paired=False, clusters=clusters, y_clusters=own, **options),
        )
        columns[f"{name}_hit"] = hit
    return TemplateMatch(pd.DataFrame(columns), hits["edit"], hits["cosine"], fpr, len(written))


def _halves(n: int, clusters: Clusters, seed: int) -> tuple[list[int], list[int]]:
    """Indices of two halves of about equal size, whole clusters in one of them."""
    if clusters is not None and len(clusters) != n:
        raise UsageError(f"expected a cluster for each of {n} unseen records, found {len(clusters)}")
    groups: dict[Hashable, list[int]] = {}
    for i in range(n):
        cluster = None if clusters is None else clusters[i]
        groups.setdefault((i,) if cluster is None else (0, cluster), []).append(i)
    members = list(groups.values())
    first: list[int] = []
    second: list[int] = []
    for g in np.random.default_rng(seed).permutation(len(members)):
        (first if len(first) <= len(second) else second).extend(members[g])
    return sorted(first), sorted(second)


def _nearest_edit(texts: Sequence[str], generations: Sequence[str]) -> tuple[Floats, np.ndarray]:
    """Edit similarity of each text to its nearest generation [n], and which that is [n]."""
    size = max(1, PAIRS // len(generations))
    best, where = [], []
    for start in range(0, len(texts), size):
        pairs = cdist(
            texts[start : start + size], generations, scorer=Levenshtein.normalized_similarity, dtype=np.float64
        )
        best.append(pairs.max(1))
        where.append(pairs.argmax(1))
    return np.concatenate(best), np.concatenate(where)


def _nearest_cosine(texts: Sequence[str], generations: Sequence[str], embedder: Embedder) -> tuple[Floats, np.ndarray]:
    """Cosine of each text to its nearest generation [n], and which that is [n]."""
    embed, vectors = embedder.fit(generations)  # vectors [N, d]
    size = max(1, min(256, PAIRS // len(generations)))
    best, where = [], []
    for start in range(0, len(texts), size):
        pairs = embed(texts[start : start + size]) @ vectors.T  # [size, N]
        best.append(np.round(np.clip(pairs.max(1), -1.0, 1.0).astype(np.float64), 5))  # equal texts stay equal
        where.append(pairs.argmax(1))
    return np.concatenate(best), np.concatenate(where)
