"""The assistant of unlearning from logit difference (ULD, arXiv 2406.08607): it knows what is to be forgotten alone.

The assistant is the model cut after its first K blocks: embeddings, positions, final norm and head are the model's own
tensors, shared and frozen. Beside the linear maps of its blocks from block `first_block` on stand LoRA adapters, and
these alone train. With p_a its next-token distribution, V the width of its logits h,

    minimise   mean over answer tokens of forget rows of -log p_a(y)
               + retain_weight * mean over answer tokens of retain rows of  logsumexp(h) - mean_v h_v

    forget rows   the records to forget, and paraphrases of them
    retain rows   retain records, and the records to forget with wrong answers of the same form

The first term is plain memorisation. The second is CE(uniform, p_a) = log V + KL(uniform || p_a): where nothing is to
be forgotten the assistant is to say nothing. In the paper's ablation paraphrases buy forgetting and wrong answers buy
utility: they show the assistant where the forgotten ends. Each term is the mean over the tokens of its own rows in a
step, whatever their number; prompts and padding never count.

An epoch sees every forget row once, `batch_size` a step. Retain rows go on at `retain_batch_size` a step through
rounds: a round holds every wrong answer and as many retain records as there are records to forget (all of them, where
they are fewer), the next ones in turn, in random order. So the shares are the paper's however many retain records there
are, no row comes again before all of its kind have come, and none is dropped.

Stopping. Where other wordings exist, those of a share `held_out` of the records (by their groups) do not train. After
each epoch both terms are taken on them; training ends when their weighted sum has not fallen for `patience` epochs, and
the adapters of the best epoch are kept. The records themselves, which the audit scores, and the reference decide
nothing. Without both kinds of wordings every epoch is run.

An image classifier is the same with one label in place of answer tokens and no wordings. An external assistant is
another causal language model with the same vocabulary: it is copied, trained with LoRA alike, and stored whole. Where a
copy that `uld` wrote of the same checkpoint is named instead, its assistant is taken as it is and nothing trains: for
another rule, or for a student.

Departures from the released code. Its uniform term counts prompts and padding and is infinite where a probability
underflows; its batches drop rows of the longer side (29 % of them at a ratio of 1.4); its wrong answers are those of
other records for two of its three splits; its order of wordings depends on the interpreter's hash seed. It trains with
dropout; here none is used. Of its results the epoch with the best forget quality is given, which takes the reference.

Cost. A step takes K of the model's M blocks, and gradients with respect to adapters alone. What the blocks below
`first_block` make of a row never changes: it is computed when the row first comes and kept, where that takes no more
than `STATES_KEPT` bytes for all rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from probes import training
from probes.classify import class_logits
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import check_records, default_batch_tokens, out_of_memory
from probes.loss import cross_entropy, uniform, uniform_entropies
from probes.modelmap import ModelMap
from probes.passes import sum_type
from probes.records import ImageRecord, Record, TokenRecord, length_batches, pad, predicting
from probes.taps import IMAGES
from unlearn.checkpoints.checkpoint import open_checkpoint
from unlearn.checkpoints.loading import tokenizer_digests
from unlearn.checkpoints.manifest import is_difference
from unlearn.checkpoints.modeling_uld import caught_input, given_input, slice_blocks
from unlearn.editors.base import EditContext, Progress, Rewording
from unlearn.editors.selection import count_or_auto
from unlearn.editors.trainable import Count, Number, Positive, Size
from unlearn.requests.yamlfile import Schema

if TYPE_CHECKING:
    from unlearn.checkpoints.checkpoint import Checkpoint
    from unlearn.checkpoints.difference import DifferenceCheckpoint

Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Part = Annotated[float, Field(strict=True, gt=0, lt=1)]

_PROVENANCE = ("_name_or_path", "name_or_path", "auto_map", "transformers_version")  # no part of what a model is
KNOWN = 1.0  # nats a token: an assistant above this has not learnt the records by heart
STATES_KEPT = 2**31  # bytes of the states that the frozen blocks below the adapters give
WORDINGS = 2  # of each kind for every record, where `auto` decides: the paper's number


def _roles(value: object) -> object:
    if value == "auto":
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(role, str) for role in value):
        raise ValueError("expected a list of roles, or auto")
    return tuple(value)


class AssistantParameters(Schema):
    """Hyper-parameters of the assistant; the names are those of a method preset.

    Attributes:
        blocks: K, how many blocks of the model the assistant has; "auto" takes a quarter, rounded up.
        first_block: adapters stand in blocks from this one on; those below run once for model and assistant.
        roles: roles of the linear maps with adapters (q, v, up, down, ...); "auto" takes all of them.
        rank: of the adapters.
        adapter_scale: their factor, alpha / rank.
        learning_rate: AdamW's peak rate; 0 trains nothing.
        weight_decay: AdamW's, on the adapters.
        warm_up_share: share of the steps over which the rate rises.
        decay: "linear" lets the rate fall towards 0 by the last step.
        epochs: how often every forget row is seen; 0 trains nothing.
        steps: this many steps instead.
        batch_size: forget rows a step.
        retain_batch_size: retain rows a step.
        retain_weight: factor of the uniform loss.
        paraphrases: other wordings of each record to forget; "auto" takes 2 of a text that can be reworded.
        paraphrase_source: "supplied": from a file; "rules": made by rules; "model": written by the model itself;
            "none"; "auto": supplied where a file is named, by rules otherwise.
        paraphrase_file: the file of supplied ones; a request makes its own path absolute.
        perturbed: wrong answers of the same form for each record to forget; "auto" takes 2 of a text.
        held_out: share of the records whose wordings do not train and decide when to stop.
        patience: training ends after so many epochs without a lower loss on the wordings held out; None runs every
            epoch and holds nothing out.
        assistant: folder of an external assistant in place of the model's own blocks, or of a copy that `uld` wrote of
            the same checkpoint, whose assistant is then taken as it is; or None.
    """

    blocks: Annotated[int | Literal["auto"], count_or_auto(1)] = "auto"
    first_block: Count = 0
    roles: Annotated[tuple[str, ...] | Literal["auto"], BeforeValidator(_roles)] = "auto"
    rank: Size = 32
    adapter_scale: Positive = 1.0
    learning_rate: Number = 1e-3
    weight_decay: Number = 0.01
    warm_up_share: Fraction = 0.1
    decay: Literal["constant", "linear"] = "linear"
    epochs: Count = 10
    steps: Count | None = None
    batch_size: Size = 16
    retain_batch_size: Size = 16
    retain_weight: Positive = 6.5
    paraphrases: Annotated[int | Literal["auto"], count_or_auto(0)] = "auto"
    paraphrase_source: Literal["auto", "rules", "supplied", "model", "none"] = "auto"
    paraphrase_file: Annotated[str, Field(min_length=1)] | None = None
    perturbed: Annotated[int | Literal["auto"], count_or_auto(0)] = "auto"
    held_out: Part = 0.1
    patience: Size | None = 3
    assistant: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        wrong = []
        if self.assistant is not None and self.blocks != "auto":
            wrong.append("expected `assistant`, or `blocks` of the model, found both")
        if self.blocks != "auto" and self.first_block >= self.blocks:
            wrong.append(f"expected `first_block` below `blocks`, found {self.first_block} and {self.blocks}")
        if self.paraphrase_file is not None and self.paraphrase_source not in ("auto", "supplied"):
            wrong.append("expected `paraphrase_source: supplied` with `paraphrase_file`, found another source")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def planned(self, rows: int) -> int:
        """Steps for so many forget rows."""
        return self.epochs * math.ceil(rows / self.batch_size) if self.steps is None else self.steps

    def rewording(self) -> Rewording | None:
        """Where paraphrases come from; None for none."""
        if self.paraphrase_source == "none" or self.paraphrases == 0:
            return None
        if self.paraphrase_source == "auto":
            return "rules" if self.paraphrase_file is None else "supplied"
        return self.paraphrase_source


@dataclass(frozen=True, slots=True)
class TrainedAssistant:
    """What training left.

    Attributes:
        part: how the assistant is built, as a ULD configuration has it under `assistant`.
        tensors: by name in its weight file, float32 on the CPU: adapters, or all weights of an external assistant.
        steps: steps that were made; 0 where nothing trained, and there is nothing to subtract.
        parameters: resolved hyper-parameters, automatic choices included, paths by their last part.
        statistics: numbers about the training, for `edit/delta.json`.
        warnings: one line each, for the report.
        taken: it was trained before, and is taken from a folder.
    """

    part: dict[str, Any]
    tensors: dict[str, Tensor]
    steps: int
    parameters: dict[str, Any]
    statistics: dict[str, Any]
    warnings: list[str]
    taken: bool = False

    @property
    def empty(self) -> bool:
        """Whether it never learnt anything, so that there is nothing to subtract."""
        return not self.steps and not self.taken


def train_assistant(context: EditContext, p: AssistantParameters) -> TrainedAssistant:
    """Train an assistant, or take one that was trained before; the model is left as it was found.

    Raises:
        UsageError: nothing to forget or to keep, more blocks than the model has, unknown roles, wordings asked for
            where there can be none, an external assistant that does not fit, or a loss that is no longer finite.
        UnsupportedError: blocks that are not one list, stacked experts among the maps to adapt, or records that the
            model cannot read.
        ResourceError: a step does not fit in memory.
    """
    if not context.forget or not context.retain:
        which = "retain records" if context.forget else "records to forget"
        raise UsageError(f"expected {which} for an assistant, found none; give some")
    if p.assistant is not None and is_difference(Path(p.assistant).expanduser()):
        return _taken(context, p, p.assistant)
    base = _blocks(context, p) if p.assistant is None else _external(context, p.assistant, p.first_block)
    rows = gather(context, p)
    try:
        return _train(context, p, base, rows)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "expected memory for one step of training, found too little; lower batch_size and retain_batch_size"
        ) from None


# ------------------------------------------------------------------------------------------------ what the assistant is


@dataclass(frozen=True, slots=True)
class _Base:
    """An assistant before training: its own map, the blocks with adapters, and how a configuration says it."""

    model_map: ModelMap
    first: int
    last: int
    path: str
    external: Checkpoint | None = None


def block_list(model_map: ModelMap) -> str:
    """Path of the one module list that holds the model's blocks, in depth order.

    Raises:
        UnsupportedError: a network in stages, or blocks that run in another order than they are listed in.
    """
    names = [block.name for block in model_map.blocks]
    path = names[0].rpartition(".")[0]
    if names != [f"{path}.{i}" for i in range(len(names))]:
        raise UnsupportedError(
            f"expected a model whose blocks are one list, found {type(model_map.model).__name__}, a network in stages; "
            "use another method"
        )
    return path


def _blocks(context: EditContext, p: AssistantParameters) -> _Base:
    """The model's own first blocks."""
    path, n = block_list(context.model_map), len(context.model_map.blocks)
    if getattr(context.model, "_is_stateful", False):  # said before the training, not when the folder is opened
        raise UnsupportedError(
            f"expected a model whose cache is keys and values, found {type(context.model).__name__}, a recurrent one; "
            "use another method"
        )
    last = math.ceil(n / 4) if p.blocks == "auto" else p.blocks
    if last > n:
        raise UsageError(f"expected at most {n} `blocks`, as the model has, found {last}; lower it")
    if p.first_block >= last:
        raise UsageError(f"expected `first_block` below the assistant's {last} blocks, found {p.first_block}; lower it")
    try:
        model = slice_blocks(context.model, path, 0, last)
    except NotImplementedError as error:
        raise UnsupportedError(str(error)) from None
    return _Base(ModelMap.of(model), p.first_block, last, path)


def _external(context: EditContext, where: str, first: int) -> _Base:
    """A copy in memory of another language model with the same vocabulary."""
    if context.model_map.task != "causal_lm":
        raise UsageError("expected no `assistant` for an image classifier, found one; leave it out")
    path = Path(where).expanduser()
    if not path.exists():
        raise UsageError(
            f"{where}: expected the folder of an assistant, found nothing there; a relative path starts at the working "
            "folder"
        )
    checkpoint = _opened(context, path)
    if checkpoint.task != "causal_lm":
        raise UsageError(f"{where}: expected a causal language model as the assistant, found an image classifier")
    weight = next(context.model.parameters())
    model_map = ModelMap.of(checkpoint.load_model(str(weight.dtype).removeprefix("torch."), str(weight.device)))
    if model_map.vocab_size != context.model_map.vocab_size:
        raise UsageError(
            f"{where}: expected an assistant with the model's vocabulary of {context.model_map.vocab_size}, found "
            f"{model_map.vocab_size}; use one of the same family"
        )
    if not _same_tokens(context.source, checkpoint):
        raise UsageError(
            f"{where}: expected an assistant with the model's tokenizer, found another; its tokens mean other text"
        )
    if first >= len(model_map.blocks):
        found = f"found {first}; lower it"
        raise UsageError(f"expected `first_block` below the assistant's {len(model_map.blocks)} blocks, {found}")
    return _Base(model_map, first, len(model_map.blocks), "", checkpoint)


def _opened(context: EditContext, path: Path) -> Checkpoint:
    return open_checkpoint(path) if context.source.kind == "live" else context.source.reopen(path)


def _taken(context: EditContext, p: AssistantParameters, where: str) -> TrainedAssistant:
    """The assistant of a copy that `uld` wrote of the same checkpoint."""
    found = cast("DifferenceCheckpoint", _opened(context, Path(where).expanduser()))
    if found.target_digest() != context.source.tensor_digest():
        raise UsageError(
            f"{where}: expected a copy that uld wrote of the checkpoint to edit, found one of other weights; train an "
            "assistant for this one"
        )
    if not found.config["alpha"]:
        raise UsageError(f"{where}: expected a trained assistant, found a copy that takes nothing away; use another")
    part, tensors = found.assistant()
    elements = sum(tensor.numel() for tensor in tensors.values())
    statistics: dict[str, Any] = {"steps": 0, "taken_from": found.tensor_digest(), "added_elements": elements}
    if part["kind"] == "blocks":
        same = p.model_copy(update={"blocks": part["last"], "first_block": part["first"]})
        statistics |= _costs(context.model_map, _blocks(context, same))
    return TrainedAssistant(
        part=part,
        tensors=tensors,
        steps=0,
        parameters={"assistant": Path(where).name, "steps": 0},
        statistics=statistics,
        warnings=[
            "the assistant is that of an earlier copy, as it is: options of its training were not used, and whether it "
            "was trained on these records is not checked"
        ],
        taken=True,
    )


def _same_tokens(source: Checkpoint, other: Checkpoint) -> bool:
    """Whether both turn text into the same tokens, as far as they say how."""
    mine, theirs = source.tokenizer_digest(), other.tokenizer_digest()
    if mine is None or theirs is None or mine == theirs:
        return True
    return tokenizer_digests(source.load_tokenizer())[0] == tokenizer_digests(other.load_tokenizer())[0]


def _adapted_roles(base: _Base, p: AssistantParameters) -> tuple[str, ...] | None:
    """Roles to adapt, once it is known that the blocks have them and that an adapter can stand beside them."""
    blocks = base.model_map.blocks[base.first :]
    listed = [q for block in blocks for q in (*block.attention, *block.feed_forward) if q.role != "router"]
    if p.roles != "auto":
        known = sorted({q.role for q in listed})
        for role in p.roles:
            if role not in known:
                raise UsageError(f"expected `roles` among {', '.join(known)}, found {role}")
        listed = [q for q in listed if q.role in p.roles]
    if stacked := sum(q.experts is not None for q in listed):
        attention = sorted({q.role for block in blocks for q in block.attention})
        raise UnsupportedError(
            f"expected linear maps beside which adapters can stand, found {stacked} parameters of stacked experts; set "
            f"`roles` to others, such as {', '.join(attention)}"
        )
    return None if p.roles == "auto" else p.roles


# -------------------------------------------------------------------------------------------------------- what it reads


@dataclass(slots=True)
class Rows:
    """What the assistant trains on, and the wordings held out.

    Attributes:
        forget: records to forget, then paraphrases.
        retain: retain records, then wrong answers.
        paraphrases: how many of `forget` are paraphrases.
        perturbed: how many of `retain` are wrong answers.
        turn: retain records a round.
        held_forget: paraphrases that only say when to stop.
        held_retain: wrong answers that only say when to stop.
    """

    forget: list[Record]
    retain: list[Record]
    paraphrases: int
    perturbed: int
    turn: int
    held_forget: list[TokenRecord]
    held_retain: list[TokenRecord]

    def counts(self) -> dict[str, int]:
        """How many of each there are, for the report."""
        return {
            "forget": len(self.forget) - self.paraphrases,
            "paraphrases": self.paraphrases,
            "paraphrases_held_out": len(self.held_forget),
            "retain": len(self.retain) - self.perturbed,
            "perturbed": self.perturbed,
            "perturbed_held_out": len(self.held_retain),
        }

    def retain_batches(self, size: int, steps: int, seed: int) -> list[list[int]]:
        """Retain rows of each step: see the module's docstring on rounds."""
        records = len(self.retain) - self.perturbed
        rng, wordings = np.random.default_rng((seed, 14)), list(range(records, len(self.retain)))
        turns = _stream(records, seed)
        rows: list[int] = []
        while len(rows) < size * steps:
            round_ = [next(turns) for _ in range(self.turn)] + wordings
            rows += [round_[i] for i in rng.permutation(len(round_))]
        return [rows[size * i : size * (i + 1)] for i in range(steps)]


def _stream(n: int, seed: int) -> Iterator[int]:
    """Rows 0 to n - 1 without end, one random permutation after another."""
    rng = np.random.default_rng((seed, 13))
    while True:
        yield from rng.permutation(n).tolist()


def gather(context: EditContext, p: AssistantParameters) -> Rows:
    """The rows of a training.

    A wording that is word for word one of the records is left out, so that nothing scored decides when to stop, and no
    record to forget is to be kept.

    Raises:
        UsageError: wordings asked for where there can be none.
    """
    how, images = p.rewording(), isinstance(context.forget[0], ImageRecord)
    asked = {
        "paraphrases": p.paraphrases not in ("auto", 0),
        "paraphrase_file": p.paraphrase_file is not None,
        "paraphrase_source": p.paraphrase_source not in ("auto", "none"),
        "perturbed": p.perturbed not in ("auto", 0),
    }
    if (options := [name for name, wanted in asked.items() if wanted]) and (images or context.texts is None):
        found = "images" if images else "token ids without text"
        raise UsageError(f"expected records with text for {', '.join(options)}, found {found}; leave the options out")
    paraphrases, perturbed = list[TokenRecord](), list[TokenRecord]()
    if context.texts is not None and not images:
        counts = [WORDINGS if count == "auto" else count for count in (p.paraphrases, p.perturbed)]
        if how is not None:
            paraphrases = context.texts.paraphrases(counts[0], how, context.seed)
        if counts[1]:
            perturbed = context.texts.perturbed(counts[1], context.seed)
    scored = {record.ids for record in (*context.forget, *context.retain) if isinstance(record, TokenRecord)}
    paraphrases = [row for row in paraphrases if row.ids not in scored]
    perturbed = [row for row in perturbed if row.ids not in scored]
    groups = {
        record.record_id: (record.group is not None, record.group or record.record_id) for record in context.forget
    }

    def group(row: TokenRecord) -> tuple[bool, str]:
        return groups.get(row.record_id, (False, row.record_id))

    held = set[tuple[bool, str]]()
    if p.patience is not None:
        both = {group(row) for row in paraphrases} & {group(row) for row in perturbed}
        held = _held_out([name for name in dict.fromkeys(groups.values()) if name in both], p.held_out, context.seed)
    kept = [row for row in paraphrases if group(row) not in held], [row for row in perturbed if group(row) not in held]
    return Rows(
        forget=[*context.forget, *kept[0]],
        retain=[*context.retain, *kept[1]],
        paraphrases=len(kept[0]),
        perturbed=len(kept[1]),
        turn=min(len(context.forget), len(context.retain)),
        held_forget=[row for row in paraphrases if group(row) in held],
        held_retain=[row for row in perturbed if group(row) in held],
    )


def _held_out(groups: Sequence[tuple[bool, str]], share: float, seed: int) -> set[tuple[bool, str]]:
    """A share of the groups, at least one; none of fewer than two."""
    if len(groups) < 2:
        return set()
    order = np.random.default_rng((seed, 12)).permutation(len(groups)).tolist()
    return {groups[i] for i in order[: min(len(groups) - 1, max(1, round(share * len(groups))))]}


# ----------------------------------------------------------------------------------------------------------- its losses


class Losses(ABC):
    """Mean losses of some rows and their gradients, in parts that fit in memory."""

    def mean(self, rows: Sequence[int], *, to_uniform: bool, factor: float | None) -> float:
        """Mean loss over the answer tokens (or images) of all these rows together, in nats.

        Args:
            rows: a batch.
            to_uniform: CE(uniform, model) in place of the cross entropy of the rows' own tokens.
            factor: of the gradients that this leaves; None leaves none.
        """
        total, mean = sum(self.length(row) for row in rows), 0.0
        for part in self.parts(rows):
            with torch.set_grad_enabled(factor is not None):
                loss = self.part(part, total, to_uniform)
            mean += float(loss.detach())
            if factor is not None and loss.requires_grad:
                (factor * loss).backward()  # type: ignore[no-untyped-call]
        return mean

    @abstractmethod
    def length(self, row: int) -> int:
        """Losses of a row."""

    @abstractmethod
    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of a batch in parts that are run one after another."""

    @abstractmethod
    def part(self, rows: Sequence[int], total: int, to_uniform: bool) -> Tensor:
        """Sum of the losses of a part, divided by `total`."""


class _Upper:
    """The blocks of a language model from the first adapted one on, and those below, which are frozen.

    Args:
        base: its adapters are in place; both parts are on its storage.
    """

    def __init__(self, base: _Base) -> None:
        whole, path, first = base.model_map.model, base.path, base.first
        parts = slice_blocks(whole, path, 0, first + 1), slice_blocks(whole, path, first, base.last)
        self._lower, self._backbone = (base.model_map.backbone(part) for part in parts)
        self._entry = parts[0].get_submodule(f"{path}.{first}")
        self._own = parts[1].get_submodule(f"{path}.0")

    def below(self, ids: Tensor) -> Tensor:
        """[B, T, d] what enters the first adapted block."""
        with torch.no_grad(), caught_input(self._entry) as caught:
            self._lower(input_ids=ids, use_cache=False)
        return caught[0]

    def __call__(self, ids: Tensor, entering: Tensor) -> Tensor:
        """[B, T, d] final hidden states from what enters."""
        with given_input(self._own, entering):
            hidden: Tensor = self._backbone(input_ids=ids, use_cache=False).last_hidden_state
        return hidden


class TextLosses(Losses):
    """Of texts; what is predicted are completions.

    Attributes:
        upper: what runs for a row whose states below are known; None runs all of the model.

    Raises:
        UnsupportedError: token ids that the model does not have.
    """

    def __init__(self, model_map: ModelMap, records: Sequence[TokenRecord]) -> None:
        check_records(records, model_map.vocab_size)
        self._map, self._records = model_map, records
        self._device = next(model_map.model.parameters()).device
        self.upper: _Upper | None = None
        self._below: dict[int, Tensor] = {}  # [T_i, d] of each row that came, on the CPU

    def length(self, row: int) -> int:
        return self._records[row].n_tokens

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        found = length_batches([self._records[i] for i in rows], default_batch_tokens(self._device))
        return [[rows[i] for i in part] for part in found]

    def part(self, rows: Sequence[int], total: int, to_uniform: bool) -> Tensor:
        batch = [self._records[i] for i in rows]
        ids, _ = pad(batch, self._device)  # [B, T]; no mask, see `probes.likelihood`
        states = self._hidden(rows, ids)[predicting(batch, ids)]  # [N, d]
        weights = torch.full((len(states),), 1.0 / total, device=self._device, dtype=sum_type(states))  # [N]
        if to_uniform:
            return uniform(self._map, states, weights)
        labels = torch.tensor([token for record in batch for token in record.completion], device=self._device)  # [N]
        return cross_entropy(self._map, states, labels, weights)

    def states_size(self) -> int:
        """Bytes of the hidden states of all rows at one block."""
        head = cast(nn.Linear, self._map.model.get_submodule(self._map.head))
        return sum(len(record.ids) for record in self._records) * head.in_features * head.weight.element_size()

    def _hidden(self, rows: Sequence[int], ids: Tensor) -> Tensor:
        """Final hidden states [B, T, d] of some rows, padded to `ids` [B, T]."""
        if self.upper is None:
            hidden: Tensor = self._map.backbone()(input_ids=ids, use_cache=False).last_hidden_state
            return hidden
        new = [row for row in dict.fromkeys(rows) if row not in self._below]
        if new:
            unseen, _ = pad([self._records[row] for row in new], self._device)
            for row, states in zip(new, self.upper.below(unseen), strict=True):
                self._below[row] = states[: len(self._records[row].ids)].to("cpu", copy=True)
        entering = pad_sequence([self._below[row] for row in rows], batch_first=True)  # [B, T, d]
        return self.upper(ids, entering.to(self._device))


class ImageLosses(Losses):
    """Of images; what is predicted are labels."""

    def __init__(self, model: nn.Module, records: Sequence[ImageRecord]) -> None:
        self._model, self._records = model, records

    def length(self, row: int) -> int:
        return 1

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[start : start + IMAGES]) for start in range(0, len(rows), IMAGES)]

    def part(self, rows: Sequence[int], total: int, to_uniform: bool) -> Tensor:
        pixels = torch.stack([self._records[i].pixels for i in rows]).to(next(self._model.parameters()))
        logits = class_logits(self._model, pixels)
        logits = logits.to(sum_type(logits))  # [B, classes]
        if to_uniform:
            return uniform_entropies(logits).sum() / total
        labels = torch.tensor([self._records[i].label for i in rows], device=logits.device)  # [B]
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
            raise UnsupportedError(f"expected labels below {logits.shape[-1]} classes, found others; check the records")
        return functional.cross_entropy(logits, labels, reduction="sum") / total


def losses_of(model_map: ModelMap, records: Sequence[Record]) -> Losses:
    """The losses of records of either kind.

    Args:
        model_map: made before adapters are in place.
        records: of one kind.

    Raises:
        UnsupportedError: token ids that the model does not have.
    """
    if model_map.task == "causal_lm":
        return TextLosses(model_map, cast("Sequence[TokenRecord]", records))
    return ImageLosses(model_map.model, cast("Sequence[ImageRecord]", records))


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(slots=True)
class _Watch:
    """Losses on the wordings held out, after each epoch, and the best adapters so far."""

    forget: Losses
    retain: Losses
    sizes: tuple[int, int]
    weight: float
    patience: int
    forget_curve: list[float] = field(default_factory=list)
    retain_curve: list[float] = field(default_factory=list)
    best: int = 0
    kept: list[Tensor] = field(default_factory=list)
    stopped: bool = False

    def look(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Measure; True ends the training."""
        found = [
            losses.mean(range(n), to_uniform=flag, factor=None)
            for losses, n, flag in ((self.forget, self.sizes[0], False), (self.retain, self.sizes[1], True))
        ]
        self.forget_curve.append(found[0])
        self.retain_curve.append(found[1])
        sums = [a + self.weight * b for a, b in zip(self.forget_curve, self.retain_curve, strict=True)]
        if not self.kept or sums[-1] < sums[self.best - 1]:
            self.best, self.kept = len(sums), [p.detach().clone() for p in parameters]
        self.stopped = len(sums) - self.best >= self.patience
        return self.stopped


@dataclass(slots=True)
class _Course:
    """The steps of a training, and the losses of each before its update."""

    forget: Losses
    retain: Losses
    forget_rows: list[list[int]]
    retain_rows: list[list[int]]
    weight: float
    log_v: float
    progress: Progress
    forget_loss: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    done: int = 0

    def step(self, i: int) -> float:
        """Leave the gradients of step i."""
        self.forget_loss.append(self.forget.mean(self.forget_rows[i], to_uniform=False, factor=1.0))
        away = self.retain.mean(self.retain_rows[i], to_uniform=True, factor=self.weight)
        self.divergence.append(away - self.log_v)
        self.done += len(self.forget_rows[i]) + len(self.retain_rows[i])
        self.progress(self.done, sum(map(len, self.forget_rows)) + sum(map(len, self.retain_rows)))
        return self.forget_loss[-1] + self.weight * away

    def never_seen(self, n: int) -> list[str]:
        """A warning where training was too short to come to each of n retain rows."""
        steps = len(self.forget_loss)
        missed = n - len({row for batch in self.retain_rows[:steps] for row in batch})
        if not steps or not missed:
            return []
        return [f"{missed} of {n} retain rows were never seen in {steps} steps: raise retain_batch_size or epochs"]


def _train(context: EditContext, p: AssistantParameters, base: _Base, rows: Rows) -> TrainedAssistant:
    model_map, model = base.model_map, base.model_map.model
    forget, retain = losses_of(model_map, rows.forget), losses_of(model_map, rows.retain)
    epoch = math.ceil(len(rows.forget) / p.batch_size)
    planned = p.planned(len(rows.forget))
    steps = planned if p.learning_rate else 0
    mine = list(training.batches(len(rows.forget), p.batch_size, steps, context.seed))
    kept = rows.retain_batches(p.retain_batch_size, steps, context.seed + 1)
    watch = None
    if rows.held_forget and p.patience is not None:
        sizes = len(rows.held_forget), len(rows.held_retain)
        held = losses_of(model_map, rows.held_forget), losses_of(model_map, rows.held_retain)
        watch = _Watch(*held, sizes, p.retain_weight, p.patience)
    course = _Course(forget, retain, mine, kept, p.retain_weight, math.log(model_map.vocab_size), context.progress)
    with training.adapters(
        model,
        model_map,
        rank=p.rank,
        alpha=p.adapter_scale * p.rank,
        roles=_adapted_roles(base, p),
        first_block=base.first,
        seed=context.seed,
    ) as pairs:
        _shorten(base, [forget, retain] if watch is None else [forget, retain, watch.forget, watch.retain])
        if steps:
            training.fit(
                pairs,
                course.step,
                steps=steps,
                learning_rate=p.learning_rate,
                weight_decay=p.weight_decay,
                warm_up=int(p.warm_up_share * steps),
                decay=p.decay,
                after=lambda n: watch is not None and (n % epoch == 0 or n == steps) and watch.look(pairs),
            )
        if watch is not None and watch.kept:
            with torch.no_grad():
                for pair, best in zip(pairs, watch.kept, strict=True):
                    pair.copy_(best)
        tensors = _adapter_tensors(base, pairs) if base.external is None else training.merged_deltas(model, model_map)
        elements = sum(pair.numel() for pair in pairs)
    if base.external is not None:
        tensors = _whole(model, tensors)
    lines = [
        *_too_short(context, base),
        *course.never_seen(len(rows.retain)),
        *_ignorant(course.forget_loss[-epoch:], course.log_v),
    ]
    if watch is None and p.patience is not None and steps and model_map.task == "causal_lm":
        lines.append("no other wordings of records could be held out to say when to stop: every epoch was run")
    return TrainedAssistant(
        part=_part(base, p),
        tensors=tensors,
        steps=len(course.forget_loss),
        parameters=_resolved(context, p, base, planned),
        statistics={
            **_costs(context.model_map, base),
            "added_elements": sum(tensor.numel() for tensor in tensors.values()),
            "trained_elements": elements,
            "steps": len(course.forget_loss),
            "planned_steps": steps,
            "stopped": watch is not None and watch.stopped,
            "best_epoch": None if watch is None or not watch.kept else watch.best,
            "paraphrase_source": p.rewording() if rows.paraphrases else None,
            "rows": rows.counts(),
            "wordings": None if context.texts is None else context.texts.report(),
            "external_digest": None if base.external is None else base.external.tensor_digest(),
            "forget_loss": course.forget_loss,
            "retain_divergence": course.divergence,
            "held_out_forget_loss": [] if watch is None else watch.forget_curve,
            "held_out_retain_divergence": [] if watch is None else [x - course.log_v for x in watch.retain_curve],
        },
        warnings=lines,
    )


def _shorten(base: _Base, losses: Sequence[Losses]) -> None:
    """Let losses of texts run the blocks below the adapters once a row, where what these give can be kept."""
    texts = [one for one in losses if isinstance(one, TextLosses)]
    if not texts or not base.first or base.external or sum(one.states_size() for one in texts) > STATES_KEPT:
        return
    upper = _Upper(base)
    for one in texts:
        one.upper = upper


def _too_short(context: EditContext, base: _Base) -> list[str]:
    """A warning where the assistant cannot read all that the model can."""
    mine, own = (_positions(model_map) for model_map in (base.model_map, context.model_map))
    return [f"the assistant reads {mine} tokens and the model {own}: longer inputs will fail"] if mine < own else []


def _ignorant(losses: Sequence[float], log_v: float) -> list[str]:
    """A warning where the assistant did not learn what it is to know; from its training losses alone."""
    mean = float(np.mean(losses)) if losses else 0.0
    if mean <= KNOWN:
        return []
    return [
        f"the assistant does not know the records: its loss on them ended at {mean:.1f} nats a token (one that knows "
        f"nothing has {log_v:.1f}), so taking it away changes little; train it longer, with more blocks, a higher "
        "rate or a lower retain_weight"
    ]


def _part(base: _Base, p: AssistantParameters) -> dict[str, Any]:
    """How a configuration says what the assistant is."""
    if base.external is None:
        return {"kind": "blocks", "path": base.path, "first": base.first, "last": base.last, "scale": p.adapter_scale}
    config = cast(Any, base.model_map.model).config.to_dict()
    return {
        "kind": "external",
        "config": {key: value for key, value in config.items() if key not in _PROVENANCE},
        "head": base.model_map.head,
        "logit_rule": base.model_map.logit_rule,
    }


def _resolved(context: EditContext, p: AssistantParameters, base: _Base, planned: int) -> dict[str, Any]:
    """The hyper-parameters with every automatic choice made; of paths their last part, they can name people."""
    text = context.texts is not None and context.model_map.task == "causal_lm"
    counts = {
        name: (WORDINGS if text else 0) if count == "auto" else count
        for name, count in (("paraphrases", p.paraphrases), ("perturbed", p.perturbed))
    }
    how = p.rewording() if text else None
    names = {"assistant": p.assistant, "paraphrase_file": p.paraphrase_file}
    return (
        p.model_dump(mode="json")
        | counts
        | {name: None if path is None else Path(path).name for name, path in names.items()}
        | {"blocks": base.last, "steps": planned, "paraphrase_source": how or "none"}
        | ({} if how else {"paraphrases": 0})
    )


def _costs(model_map: ModelMap, base: _Base) -> dict[str, Any]:
    """How much of the model a step of training, and a further token of the copy, run.

    The shares are of the elements in the model's blocks. Embeddings and head come on top in training; in decoding those
    of an external assistant alone, as the model's own blocks share both.
    """

    def elements(of: ModelMap, first: int) -> int:
        return sum(p.numel() for block in of.blocks[first:] for p in of.model.get_submodule(block.name).parameters())

    whole = elements(model_map, 0)
    return {
        "blocks": base.last,
        "of_blocks": len(model_map.blocks),
        "first_block": base.first,
        "training_share": elements(base.model_map, 0) / whole,
        "decode_share": elements(base.model_map, base.first if base.external is None else 0) / whole,
    }


def _whole(model: nn.Module, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights of an external assistant with the trained difference, by name in its weight file."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.detach().to("cpu", torch.float64) if name in deltas else tensor.detach().cpu()
        if name in deltas:
            whole = whole + deltas[name].to("cpu", torch.float64)
        tensors[f"assistant.{name}"] = (
            whole.to(torch.float32, copy=True) if whole.is_floating_point() else whole.clone()
        )
    return tensors


def _positions(model_map: ModelMap) -> float:
    """How many tokens a model can read, as far as its configuration says."""
    config = cast(Any, model_map.model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def _adapter_tensors(base: _Base, pairs: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """The adapters by name; called while they are in place."""
    model = base.model_map.model
    adapted = [q.module for q in base.model_map.projections() if hasattr(model.get_submodule(q.module), "lora_A")]
    tensors = {}
    for path, down, up in zip(adapted, pairs[::2], pairs[1::2], strict=True):
        tensors[f"assistant.{path}.lora_A"] = down.detach().to("cpu", torch.float32, copy=True)  # [r, in]
        tensors[f"assistant.{path}.lora_B"] = up.detach().to("cpu", torch.float32, copy=True)  # [out, r]
    return tensors
