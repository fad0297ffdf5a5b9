r"""Exposure of canaries: how far a secret stands out among all the secrets that could have been in its place.

A canary is a sentence with a secret drawn at random from a known space of size |R| ("the code is {digits:6}"). With
the log-probability of the sentence computed for fills t of the space,

    rank(s) = 1 + #{t != s : log p(t) >= log p(s)},    exposure(s) = log2 |R| - log2 rank(s)  bits.

A secret that the model never met is any element of the space, so its rank is uniform and P(exposure >= b) = 2^-b for
every attainable b: the p-value rank / |R| is exact, whatever the model, with no reference model and no threshold. Over
several canaries Fisher's method combines the p-values, and a test of the ranks against the uniform law says whether
secrets that were to be forgotten look never seen again.

Where the space is too large to enumerate, n random fills stand for it: p = (1 + #{t : log p(t) >= log p(s)}) / (n + 1),
again exact, and no exposure above log2(n + 1) bits can be seen. Extrapolating beyond with a skew-normal fit is offered
as a figure of its own, and takes part in no test.

Paper: Carlini et al. 2019, The Secret Sharer (arXiv 1802.08232). Departures: ties count against the finding, and the
p-value of sampled fills counts the secret itself, so that it is never 0.

Shape letters: R records.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
from scipy import stats
from torch import nn

from probes import likelihood, statistics
from probes.errors import UsageError
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from probes.sharedprefix import completion_log_probs
from probes.statistics import Floats

ALPHABETS = {
    "digits": "0123456789",
    "hex": "0123456789abcdef",
    "letters": "abcdefghijklmnopqrstuvwxyz",
    "alnum": "0123456789abcdefghijklmnopqrstuvwxyz",
}
ROUNDING = 8 * float(np.finfo(np.float32).eps)  # relative noise of a summed log-probability; closer ones are ties
_FIELD = re.compile(r"\{\{|\}\}|\{([a-z]+):([^{}]*)\}|([{}])")


@dataclass(frozen=True, slots=True)
class Space:
    """All texts that a canary's secret can be; every one of them has an index from 0 to size - 1.

    Made by `Space.of(format)`. Characters stand for themselves, and fields for what may vary:
    `{digits:9}` nine decimal digits, `{hex:16}` (lower case), `{letters:5}` (a to z), `{alnum:8}` (lower case),
    `{choice:red,green,blue}` one of the options. `{{` and `}}` are braces.

    Attributes:
        size: number of texts; may exceed 64 bits.
    """

    size: int
    _parts: tuple[tuple[str, ...], ...] = field(repr=False)  # options of each part; a character class is one part

    @classmethod
    def of(cls, template: str) -> Space:
        """Parse a canary format.

        Args:
            template: the format, see above.

        Returns:
            The space.

        Raises:
            UsageError: an unknown or malformed field, a space of fewer than two texts, or options of a choice of which
                one begins another so that a text could be read in two ways.
        """
        parts: list[tuple[str, ...]] = []
        end = fields = 0
        for found in _FIELD.finditer(template):
            if found.start() > end:
                parts.append((template[end : found.start()],))
            end = found.end()
            if found[0] in ("{{", "}}"):
                parts.append((found[0][0],))
                continue
            fields += 1
            parts.extend(_field(found[1], found[2], fields))
        if end < len(template):
            parts.append((template[end:],))
        size = math.prod(len(part) for part in parts)
        if size < 2:
            raise UsageError(
                f"expected a canary format of at least 2 possible texts, found {size}; add a field such as {{digits:9}}"
            )
        space = cls(size, tuple(parts))
        space._check_readable()
        return space

    def _check_readable(self) -> None:
        """Refuse formats whose texts can be read in two ways: they would be counted twice."""
        for i, options in enumerate(self._parts[:-1]):
            follows = self._parts[i + 1][0] if len(self._parts[i + 1]) == 1 else ""
            texts = sorted(option + follows for option in options)
            if any(later.startswith(earlier) for earlier, later in pairwise(texts)):
                raise UsageError(
                    "expected options of a choice of which none begins another, found two that do; put a character "
                    "between the choice and what follows"
                )

    def nth(self, index: int) -> str:
        """The text with this index.

        Raises:
            UsageError: an index outside 0..size - 1.
        """
        if not 0 <= index < self.size:
            raise UsageError(f"expected an index below {self.size}, found {index}; draw from the space instead")
        texts = []
        for options in reversed(self._parts):
            index, choice = divmod(index, len(options))
            texts.append(options[choice])
        return "".join(reversed(texts))

    def index(self, text: str) -> int | None:
        """The index of a text, or None if it is not in the space."""
        at = value = 0
        for i, options in enumerate(self._parts):
            follows = self._parts[i + 1][0] if i + 1 < len(self._parts) and len(self._parts[i + 1]) == 1 else ""
            last = i + 1 == len(self._parts)
            for choice, option in enumerate(options):
                if text[at:] == option if last else text.startswith(option + follows, at):
                    value = value * len(options) + choice
                    at += len(option)
                    break
            else:
                return None
        return value

    def __contains__(self, text: object) -> bool:
        """Whether the space holds a text."""
        return isinstance(text, str) and self.index(text) is not None

    def enumerate(self) -> Iterator[str]:
        """All texts, by index."""
        return ("".join(choice) for choice in product(*self._parts))

    def draw(self, n: int, seed: int | str, exclude: Sequence[str] = ()) -> list[str]:
        """Draw different texts uniformly at random.

        Args:
            n: how many.
            seed: of the draw; the same seed gives the same texts.
            exclude: texts of the space that must not be drawn.

        Returns:
            n different texts, none of `exclude`.

        Raises:
            UsageError: fewer than n texts are there to draw.
        """
        taken = {index for index in map(self.index, exclude) if index is not None}
        if not 0 <= n <= self.size - len(taken):
            raise UsageError(
                f"expected at most {self.size - len(taken)} texts to draw from this space, found a request for {n}; "
                "draw fewer or widen the format"
            )
        source = random.Random(seed)
        if 2 * (n + len(taken)) > self.size:  # rejection would be slow
            left = [index for index in range(self.size) if index not in taken]
            return [self.nth(index) for index in source.sample(left, n)]
        drawn: list[str] = []
        while len(drawn) < n:
            index = source.randrange(self.size)
            if index not in taken:
                taken.add(index)
                drawn.append(self.nth(index))
        return drawn


def _field(kind: str | None, argument: str | None, number: int) -> list[tuple[str, ...]]:
    """The parts of one field; messages name its position, for a format may quote a record."""
    if kind == "choice" and argument:
        options = tuple(argument.split(","))
        if len(set(options)) < len(options) or "" in options:
            raise UsageError(f"expected different, non-empty options in field {number}, found others; correct it")
        return [options]
    if kind in ALPHABETS and argument and argument.isdecimal() and 1 <= int(argument) <= 1000:
        return [tuple(ALPHABETS[kind])] * int(argument)
    known = ", ".join(f"{{{name}:N}}" for name in ALPHABETS)
    raise UsageError(
        f"expected {known} or {{choice:a,b}} in a canary format, found something else as field {number}; "
        "write literal braces twice"
    )


@dataclass(frozen=True, slots=True)
class Exposure:
    """How far one secret stands out. Holds no text.

    Attributes:
        rank: 1 + number of compared fills at least as likely as the secret; ties count against the finding.
        size: number of fills ranked, the secret included.
        bits: log2(size / rank).
        max_bits: log2(size), the most that could be seen.
        pvalue: rank / size, the exact probability of such a rank for a secret that was never seen.
        exact: the whole space was ranked, not a sample of it.
        space_size: number of texts in the space.
        log_prob: log-probability of the secret's sentence in nats.
        extrapolated_bits: -log2 of the upper tail of a skew-normal fitted to the fills; an extrapolation that rests on
            the shape of the fit and has no p-value. None unless asked for, or where no fit is possible.
        joint_rank: rank among the fills that makes canaries measured together independent, see `combine`.
        joint_size: number of fills behind `joint_rank`, the secret included.
    """

    rank: int
    size: int
    bits: float
    max_bits: float
    pvalue: float
    exact: bool
    space_size: int
    log_prob: float
    extrapolated_bits: float | None
    joint_rank: int
    joint_size: int


@dataclass(frozen=True, slots=True)
class Combined:
    """Several canaries together.

    Attributes:
        canaries: how many.
        mean_bits: mean exposure; a never-seen canary of a large space has 1 / ln 2 = 1.44 bits on average.
        pvalue: Fisher's combination: small if some canaries stand out more than never-seen ones would.
        law_pvalue: test of all ranks against the uniform law, both directions: small also where canaries are less
            likely than never-seen ones, as after an edit that overshoots.
        compatible: law_pvalue is not below 1 - level.
        level: the level of that decision.
    """

    canaries: int
    mean_bits: float
    pvalue: float
    law_pvalue: float
    compatible: bool
    level: float


def exposure(
    model: nn.Module,
    make_record: Callable[[str], TokenRecord],
    secret: str,
    space: Space,
    *,
    n: int = 1000,
    seed: int = 0,
    extrapolate: bool = False,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
) -> Exposure:
    """The exposure of one canary: `exposures` for a single secret, with the same arguments and errors."""
    return exposures(
        model,
        make_record,
        [secret],
        space,
        n=n,
        seed=seed,
        extrapolate=extrapolate,
        model_map=model_map,
        batch_tokens=batch_tokens,
    )[0]


def exposures(
    model: nn.Module,
    make_record: Callable[[str], TokenRecord],
    secrets: Sequence[str],
    space: Space,
    *,
    n: int = 1000,
    seed: int = 0,
    extrapolate: bool = False,
    model_map: ModelMap | None = None,
    batch_tokens: int | None = None,
    progress: likelihood.Progress | None = None,
) -> list[Exposure]:
    """Rank the secrets of canaries that share a sentence and a space, in one pass over shared fills.

    The p-values hold for secrets drawn uniformly from the space when the canaries were made. A secret that a person
    chose (a birthday, "1234") is likely a priori, and its exposure then says nothing about training.

    Args:
        model: a causal language model; left as found.
        make_record: the canary's record for a fill; its completion, tokenised together with the prompt, is what the
            log-probability is summed over. Where all records begin with the same tokens, these are run once.
        secrets: the secrets, all different.
        space: where the secrets come from.
        n: fills to rank against. A space with at most n texts beside the secrets is ranked whole.
        seed: of the random fills, which depend on the secrets too: calls for other secrets draw other fills, and calls
            for the same secrets on another checkpoint the same ones.
        extrapolate: add the skew-normal extrapolation.
        model_map: the model's map, built when absent.
        batch_tokens: padded tokens per batch.
        progress: called with (fills done, fills in all).

    Returns:
        One result per secret, in order.

    Raises:
        UsageError: no secret, one not in the space, one twice, n below 1, or a record that is no record.
        UnsupportedError: token ids outside the model's vocabulary.
        ResourceError: a single fill does not fit in memory.
    """
    if not secrets:
        raise UsageError("expected at least one secret to rank, found none; pass the canary's secret")
    if n < 1:
        raise UsageError(f"expected at least 1 fill to rank against, found n = {n}; pass a larger n")
    indices = [space.index(secret) for secret in secrets]
    if outside := indices.count(None):
        raise UsageError(
            f"expected secrets that fit the canary format, found {outside} of {len(secrets)} that do not; "
            "correct the format or the secret"
        )
    if len(set(indices)) < len(indices):
        raise UsageError(
            f"expected different secrets, found {len(set(indices))} among {len(secrets)}; pass each secret once"
        )
    exact = space.size - len(secrets) <= n
    key = f"{seed}|{indices}"
    others = space.draw(space.size - len(secrets) if exact else n, key, exclude=secrets)
    records = [built_record(make_record, text) for text in [*secrets, *others]]
    model_map = model_map or ModelMap.of(model)
    scores = completion_log_probs(
        model, records, model_map=model_map, batch_tokens=batch_tokens, progress=progress
    )  # [k + n]
    if not bool(np.isfinite(scores).all()):
        raise UsageError(
            f"expected finite log-probabilities for every fill, found {int((~np.isfinite(scores)).sum())} others; "
            "check the checkpoint, and that its tokenizer made the records"
        )
    reference = scores[len(secrets) :]  # [n]
    return [
        Exposure(
            rank=rank,
            size=size,
            bits=statistics.exposure(rank, size),
            max_bits=math.log2(size),
            pvalue=statistics.exposure_pvalue(rank, size),
            exact=exact,
            space_size=space.size,
            log_prob=float(own),
            extrapolated_bits=_extrapolate(float(own), reference) if extrapolate else None,
            joint_rank=joint_rank,
            joint_size=joint_size,
        )
        for own, (rank, size, joint_rank, joint_size) in zip(scores, _ranks(scores, len(secrets), exact), strict=False)
    ]


def combine(canaries: Sequence[Exposure], *, seed: int = 0, level: float = 0.95) -> Combined:
    """Do these canaries, taken together, look never seen?

    Canaries may come from several calls of `exposures`, with different sentences, spaces and sizes, each secret in one
    call only. Canaries of one call share their fills; the joint ranks used here are independent all the same.

    Args:
        canaries: at least one. A test with few canaries has little power; 10 or more are worth having.
        seed: of the randomisation within the steps of the discrete ranks, for the law test only.
        level: of the decision `compatible`.

    Returns:
        The combination.

    Raises:
        UsageError: no canary, or a level outside (0, 1).
    """
    if not canaries:
        raise UsageError("expected at least one canary to combine, found none; measure an exposure first")
    if not 0 < level < 1:
        raise UsageError(f"expected a level in (0, 1), found {level}; pass 0.95")
    ranks = [canary.joint_rank for canary in canaries]
    sizes = [canary.joint_size for canary in canaries]
    pvalues = [statistics.exposure_pvalue(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    law = statistics.exposure_law(ranks, sizes, seed=seed)
    return Combined(
        canaries=len(canaries),
        mean_bits=float(np.mean([canary.bits for canary in canaries])),
        pvalue=statistics.fisher_combined(pvalues),
        law_pvalue=law,
        compatible=law >= 1 - level,
        level=level,
    )


def built_record(make_record: Callable[[str], TokenRecord], text: str) -> TokenRecord:
    """The caller's record for a fill.

    Raises:
        UsageError: `make_record` gave no record, or refused the text; without the text or its ids.
    """
    try:
        record: TokenRecord | None = make_record(text)
    except ValueError:  # its message and context may hold the text or its ids
        record = None
    if not isinstance(record, TokenRecord):
        raise UsageError(
            "expected a record with a prompt token and a completion token for every fill, found none for one; "
            "check make_record"
        )
    return record


def _ranks(scores: Floats, k: int, exact: bool) -> list[tuple[int, int, int, int]]:
    """(rank, size, joint rank, joint size) of the first k of `scores` [k + n]; the others are fills.

    Never-seen secrets and fills are exchangeable. So the rank of a secret among the fills and the secrets before it
    says nothing about the ranks of those, nor does, in a whole space, its rank among all but the secrets before it.
    """
    out = []
    for i in range(k):
        floor = scores[i] - ROUNDING * abs(scores[i])
        above = int((scores[k:] >= floor).sum())
        peers = scores[:k] >= floor  # [k], itself included
        if exact:
            out.append((above + int(peers.sum()), len(scores), above + int(peers[i:].sum()), len(scores) - i))
        else:
            fills = len(scores) - k
            out.append((above + 1, fills + 1, above + int(peers[: i + 1].sum()), fills + 1 + i))
    return out


def _extrapolate(own: float, reference: Floats) -> float | None:
    """-log2 of the upper tail of a skew-normal fitted to `reference`, at `own`."""
    if len(reference) < 20 or float(np.ptp(reference)) == 0.0:
        return None
    # A mirrored fit, because the lower tail is computed without the cancellation of 1 - cdf.
    tail = float(stats.skewnorm.cdf(-own, *stats.skewnorm.fit(-reference)))
    return -math.log2(tail) if 0.0 < tail <= 1.0 else None
