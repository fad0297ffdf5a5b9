"""Unlearning from logit difference (ULD, arXiv 2406.08607): a target's distribution less an assistant's.

    c(v) = log b(v) - alpha * log a(v)   for kept tokens v;  b = softmax(target), a = softmax(assistant)

The assistant knows what is to be forgotten and is uniform on the rest; the target's weights stay as they are. Whoever
has these files therefore has the original's weights: this is a method of inference time.

A token is kept when fewer than max(1, floor(rank_share * V)) tokens are likelier under the target, or when
b(v) >= ratio * max b; with a share and a ratio of 0 every token is kept. `outside` says what the rest gets: "original",
the target's own probability, where the kept tokens share the mass that they had together, so that alpha = 0 is the
target itself and every loss is finite; or "never", nothing, where the kept tokens share all.

The assistant is the target's blocks first..last-1 with low-rank additions, then the target's final norm and head: it
continues the hidden state that enters block `first` of the target and shares its storage, so embeddings and earlier
blocks run once. Or it is another model with the same vocabulary. On a CPU the assistant's head runs for kept tokens
alone, which are about a hundredth of the vocabulary; elsewhere one product with a shared head serves both.

This file imports nothing but the standard library, torch, transformers and safetensors, which comes with it: it is
copied byte for byte into every saved folder, for `trust_remote_code`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, ImageClassifierOutput
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

ASSISTANT_FILE = "assistant.safetensors"
CODE_FILE = "modeling_uld.py"
RULE_TENSOR = "assistant.rule"
# What config.json names as the file of the weights, for the whole and for the target in it. `LlamaForCausalLM`, asked
# to load the folder of a difference over a Llama, takes the target's configuration from inside and would be the
# original without a word; so it looks for this file, and what it says when there is none tells what to do.
_NO_FILE = "a-difference-of-two-models.load-it-with-trust_remote_code=True.safetensors"
FLOOR = -1.0e4  # least log a(v) / max a: an assistant that rules a token out would make c infinite
TILE_ELEMENTS = 1 << 19  # logits combined at once on a CPU; 2 MB in fp32 stay in its cache
_SLACK = 1e-9  # floor(0.29 * 100) is 29, whatever 0.29 * 100 is in floating point


# ------------------------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True)
class Rule:
    """How the two distributions are combined.

    Attributes:
        alpha: weight of the assistant, at least 0.
        rank_share: share of the vocabulary that is kept by rank under the target, in [0, 1]; 0 turns this off.
        ratio: tokens of at least this share of the target's largest probability are kept, in [0, 1]; 0 turns it off.
        outside: what tokens that are not kept get: "original", their probability under the target, or "never".
    """

    alpha: float
    rank_share: float
    ratio: float
    outside: Literal["original", "never"] = "original"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"expected a finite alpha of at least 0, found {self.alpha}; change it")
        for name in ("rank_share", "ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, found {getattr(self, name)}; change it")
        if self.outside not in ("original", "never"):
            raise ValueError("expected outside to be original or never, found another value; choose one of them")

    @property
    def nothing(self) -> bool:
        """Whether the target's distribution is left as it is."""
        return self.alpha == 0 and self.outside == "original"


_At = Callable[[slice, Tensor | None, Tensor | None], Tensor]
"""The assistant's logits for the rows of a slice: all, [C, V]; or [N], at row i and column j of them each."""


def combine(target_logits: Tensor, assistant_logits: Tensor, rule: Rule) -> Tensor:
    """Log-probabilities of the difference.

    Args:
        target_logits: [..., V] of the target, or its log-probabilities: a constant per row changes nothing.
        assistant_logits: [..., V] of the assistant, likewise.
        rule: how to combine them.

    Returns:
        [..., V] normalised log-probabilities, in single precision at least. With alpha 0 and outside "original" they
        are the target's own to the last bit.

    Raises:
        ValueError: logits of different shapes.
    """
    if target_logits.shape != assistant_logits.shape:
        raise ValueError(
            f"expected logits of one shape, found {tuple(target_logits.shape)} and {tuple(assistant_logits.shape)}; "
            "use an assistant with the target's vocabulary"
        )
    flat = assistant_logits.reshape(-1, assistant_logits.shape[-1])  # [R, V]

    def given(part: slice, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        return flat[part] if rows is None else flat[part][rows, columns]

    return _combined(target_logits, given, rule)


def _combined(target_logits: Tensor, assistant: _At, rule: Rule) -> Tensor:
    """`combine`, with the assistant's logits asked for where they count: of a filtered vocabulary a small part."""
    b = target_logits.reshape(-1, target_logits.shape[-1])  # [R, V]
    size = max(1, TILE_ELEMENTS // b.shape[-1] if b.device.type == "cpu" else len(b))
    parts = [slice(i, i + size) for i in range(0, len(b), size)]
    tiles = [_combined_rows(_precise(b[part]), partial(assistant, part), rule) for part in parts]
    out = tiles[0] if len(tiles) == 1 else torch.cat(tiles) if tiles else _precise(b)
    return out.view(target_logits.shape)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _combined_rows(target: Tensor, assistant: Callable[[Tensor | None, Tensor | None], Tensor], rule: Rule) -> Tensor:
    """`combine` of [R, V].

    What is normalised over the kept tokens does not depend on a constant taken from all of them, so the assistant's
    normaliser, a sum over the vocabulary, is never made; its largest kept logit stands in for it.
    """
    if rule.nothing:
        return target.log_softmax(-1)
    kept = _kept(target.detach(), rule)
    if kept is None:
        return torch.sub(target, _relative(assistant(None, None).to(target)), alpha=rule.alpha).log_softmax(-1)
    rows, columns = kept // target.shape[-1], kept % target.shape[-1]  # [N] each
    places = _places(rows, len(target))  # [R, n]
    before = target.log_softmax(-1) if rule.outside == "original" else target  # [R, V]
    b = _spread(before.flatten()[kept], places)  # [R, n]
    a = _relative(_spread(assistant(rows, columns).to(target), places))  # [R, n]
    c = torch.sub(b, a, alpha=rule.alpha).log_softmax(-1)
    if rule.outside == "original":
        c = c + b.logsumexp(-1, keepdim=True)  # of the kept under the target
    rest = before if rule.outside == "original" else torch.full_like(before, -math.inf)
    return rest.flatten().index_copy(0, kept, c[places]).view(target.shape)


def _relative(logits: Tensor) -> Tensor:
    """Logits [R, n] as far as they are below the row's largest, at least FLOOR; of a row of -inf alone all the same."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top.masked_fill(top == -math.inf, 0.0)).clamp(min=FLOOR)


def _kept(target: Tensor, rule: Rule) -> Tensor | None:
    """[N] places in the flattened [R, V], in order, of the tokens kept; None for all. Ties with the last rank stay.

    The count-th largest logit of a row is at least the count-th largest of the maxima of disjoint groups of columns,
    which are few. So only what reaches that is looked at more closely.
    """
    width, count = target.shape[-1], max(1, math.floor(rule.rank_share * target.shape[-1] + _SLACK))
    if not rule.rank_share and not rule.ratio:
        return None
    by_ratio = target.amax(-1, keepdim=True) + (math.log(rule.ratio) if rule.ratio else math.inf)  # [R, 1]
    if not rule.rank_share:
        return _reaching(target, by_ratio)
    groups = 3 * count
    if 2 * groups > width:
        return _reaching(target, torch.minimum(_nth(target, count), by_ratio))
    each = width // groups
    below = _nth(target[:, : groups * each].view(-1, each, groups).amax(1), count)  # [R, 1]
    some = _reaching(target, torch.minimum(below, by_ratio))  # [N]
    rows, values = some // width, target.flatten()[some]
    limit = torch.minimum(_nth(_spread(values, _places(rows, len(target))), count), by_ratio)  # [R, 1]
    return some[~(values < limit[rows, 0])]


def _reaching(values: Tensor, limits: Tensor) -> Tensor:
    """Places in the flattened [R, V] of what is not below its row's limit; NaN is not, and shows in the result."""
    return (values < limits).logical_not_().flatten().nonzero()[:, 0]


def _nth(values: Tensor, n: int) -> Tensor:
    """[R, 1] the n-th largest of each row [R, m]."""
    return values.topk(n, sorted=False).values.amin(-1, keepdim=True)


def _places(rows: Tensor, n: int) -> Tensor:
    """[n, most] bool: of each row as many from the left as it comes in `rows` [N], which rise."""
    counts = torch.bincount(rows, minlength=n)
    return torch.arange(int(counts.max()), device=rows.device) < counts[:, None]


def _spread(values: Tensor, places: Tensor) -> Tensor:
    """[N] values of rising rows, put into the places [R, n] that are theirs; -inf elsewhere."""
    return values.new_full(places.shape, -math.inf).masked_scatter(places, values)


# ------------------------------------------------------------------------------------------- blocks of the target


def slice_blocks(model: nn.Module, path: str, first: int, last: int) -> nn.Module:
    """A copy of a model's structure with some of its blocks, on the model's own storage.

    Parameters and buffers of the copy are the model's tensors themselves, so it takes no memory and follows edits in
    place. The blocks' own indices are lowered by `first`; the copy's configuration counts the blocks it has.

    Args:
        model: a transformers model whose blocks are one `ModuleList`; unchanged.
        path: that list's path.
        first: the first block of the copy.
        last: one past its last block.

    Returns:
        A module of the model's class, in the model's mode.

    Raises:
        ValueError: no such blocks.
        NotImplementedError: an architecture whose blocks are not one list of equals (stages, shared keys and values).
    """
    kind, config = type(model).__name__, cast(Any, getattr(model, "config", None))
    found: Any = _submodule(model, path)
    text = None if config is None else config.get_text_config()
    depth = None if text is None else getattr(text, "num_hidden_layers", None)
    staged = any(getattr(text, name, None) for name in ("depths", "num_kv_shared_layers", "kv_sharing_modes"))
    if not isinstance(found, nn.ModuleList) or staged or depth != len(found):
        raise NotImplementedError(
            f"expected a model whose blocks are one list of num_hidden_layers equal blocks, found {kind} with another "
            f"layout at {path or 'no path'}; use a decoder such as Llama or GPT-2, or a ViT"
        )
    if not 0 <= first < last <= len(found):
        raise ValueError(f"expected blocks from 0 to {len(found)}, found {first} to {last}; change them")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = tensor
    memo |= {id(block): nn.Identity() for i, block in enumerate(found) if not first <= i < last}
    copied = copy.deepcopy(model, memo)
    blocks = cast(nn.ModuleList, copied.get_submodule(path))
    chosen = list(blocks)[first:last]
    parent, _, leaf = path.rpartition(".")
    setattr(copied.get_submodule(parent), leaf, kept := nn.ModuleList(chosen))
    kept.training = blocks.training
    for block in chosen:
        for module in block.modules():
            for name in _INDICES:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, cast(int, getattr(module, name)) - first)
    _shorten(cast(Any, copied.config).get_text_config(), first, last, len(found))
    return copied


_INDICES = ("layer_idx", "layer_id")  # where modules keep the index of their layer in the cache


def _shorten(config: Any, first: int, last: int, depth: int) -> None:
    """Let a configuration speak of blocks first..last-1 only."""
    config.num_hidden_layers = last - first
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, key, value[first:last])


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


class LowRank(nn.Module):
    """y = base(x) + scale * (x A^T) B^T, beside a `Linear` or `Conv1D`.

    The addition is computed in the type of A and B, single precision as a rule, and rounded to the base's with the sum;
    where all are of one type the second product adds itself to the base's output.

    Args:
        base: the layer, as it is.
        lora_A: [r, in].
        lora_B: [out, r].
        scale: factor of the addition.
    """

    def __init__(self, base: nn.Module, lora_A: nn.Parameter, lora_B: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = lora_A, lora_B
        self.training = base.training

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y: Tensor = self.base(x)
        if y.dtype == x.dtype == self.lora_A.dtype:
            inner = F.linear(x, self.lora_A)  # [..., r]
            flat = y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1])
            return torch.addmm(*flat, self.lora_B.t(), alpha=self.scale).view(y.shape)
        added = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)  # [..., out]
        return (y + added * self.scale).to(y.dtype)


def attach(
    blocks: nn.Module, path: str, first: int, pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]], scale: float
) -> dict[str, LowRank]:
    """Put low-rank additions into a copy made by `slice_blocks`; the model it was copied from is not touched.

    Args:
        blocks: the copy, which is changed.
        path: path of the list of blocks.
        first: index in the model of the copy's first block.
        pairs: module path in the *model* -> (A [r, in], B [out, r]).
        scale: factor of the additions.

    Returns:
        The new modules, by module path in the model.

    Raises:
        ValueError: a path that is no linear map of these blocks, or matrices of another shape.
    """
    placed: dict[str, LowRank] = {}
    count = len(cast(nn.ModuleList, blocks.get_submodule(path)))
    for name, (down, up) in pairs.items():
        head, _, rest = name.removeprefix(f"{path}.").partition(".")
        index = int(head) - first if name.startswith(f"{path}.") and head.isdecimal() else -1
        inside = f"{path}.{index}.{rest}"
        base = _submodule(blocks, inside) if 0 <= index < count and rest else None
        if not isinstance(base, nn.Linear | Conv1D):
            raise ValueError(
                f"expected linear maps of blocks {first} to {first + count - 1}, found {name}; use another target"
            )
        wanted = tuple(base.weight.shape) if isinstance(base, nn.Linear) else tuple(base.weight.shape)[::-1]  # out, in
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != wanted or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"expected A [r, {wanted[1]}] and B [{wanted[0]}, r] for {name}, found {tuple(down.shape)} and "
                f"{tuple(up.shape)}; use the assistant that was trained on this model"
            )
        parent, _, leaf = inside.rpartition(".")
        placed[name] = LowRank(base, down, up, scale)
        setattr(blocks.get_submodule(parent), leaf, placed[name])
    return placed


def _backbone(model: nn.Module) -> nn.Module:
    """The model under the head."""
    base = cast(nn.Module, model.base_model)
    if base is not model:
        return base
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


@contextmanager
def caught_input(block: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states [B, T, d] that enter a block while this is open."""
    states: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def given_input(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let a block start from `hidden`, whatever is passed to it."""

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = block.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _scaled(logits: Tensor, rule: Mapping[str, Any]) -> Tensor:
    """What a model does to its head's output: z * scale or z / scale, then cap * tanh(z / cap)."""
    scale, cap = rule.get("scale", 1.0), rule.get("cap")
    if scale != 1.0:
        logits = logits / scale if rule.get("divide") else logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _head(model: nn.Module, path: str, rule: Mapping[str, Any], states: Tensor) -> Tensor:
    """Logits of the head's inputs [..., d]."""
    head: Any = model.get_submodule(path)
    return _scaled(head(states.to(head.weight.dtype)), rule)


def _picks(model: nn.Module, path: str, states: Tensor, rule: Rule) -> bool:
    """Whether the head is to run for kept tokens alone, on a CPU: a product of two or three rows with the vocabulary
    reads the matrix once a row there, where a GPU reads it once.

    Not where gradients are recorded, of which each row would have one as large as the head; nor for a layer that is
    more than its weight and bias.
    """
    head = model.get_submodule(path)
    plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    recorded = torch.is_grad_enabled() and (states.requires_grad or any(p.requires_grad for p in head.parameters()))
    filtered = rule.rank_share > 0 or rule.ratio > 0
    on_cpu = all(tensor.device.type == "cpu" for tensor in (states, *head.parameters()))
    return plain and filtered and not recorded and on_cpu


def _subtracted(
    target_logits: Tensor, model: nn.Module, path: str, scaling: Mapping[str, Any], states: Tensor, rule: Rule
) -> Tensor:
    """`combine` of the target's logits [..., V] and what a head makes of the assistant's states [..., d_a]."""
    if not _picks(model, path, states, rule):
        return combine(target_logits, _head(model, path, scaling, states).to(target_logits.device), rule)
    head = cast(nn.Linear, model.get_submodule(path))
    flat = states.reshape(-1, states.shape[-1]).to(head.weight.dtype)  # [R, d_a]

    def at(part: slice, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        wanted = flat[part]  # [C, d_a]
        if rows is None or columns is None:
            return _head(model, path, scaling, wanted)
        if len(rows) > max(head.out_features // 4, len(wanted) * head.out_features // 32):  # all are cheaper
            return _head(model, path, scaling, wanted)[rows, columns]
        return _scaled(_single(head, wanted, rows, columns), scaling)

    return _combined(target_logits, at, rule)


def _single(head: nn.Linear, states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[N] outputs of a head for its inputs [C, d]: number `columns` [N] of row `rows` [N], which rise."""
    each = torch.split(columns, torch.bincount(rows, minlength=len(states)).tolist())
    found = [
        F.linear(state, head.weight.index_select(0, own), None if head.bias is None else head.bias[own])
        for state, own in zip(states, each, strict=True)
    ]
    return torch.cat(found)


@cache
def _inputs_of(kind: Any) -> frozenset[str]:
    """Names of the parameters of a class's forward."""
    return frozenset(inspect.signature(kind.forward).parameters)


def _takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has a parameter of this name."""
    return name in _inputs_of(cast(Any, type(module)))


# --------------------------------------------------------------------------------------------------- configuration


class ULDConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of the difference; `target` holds the target's own.

    Args:
        target: the target's configuration as a dict with its `model_type`.
        assistant: {"kind": "blocks", "path", "first", "last", "scale"}, or {"kind": "external", "config" (a dict),
            "head" (path), "logit_rule"}.
        head: path of the output layer in the target.
        logit_rule: {"scale", "divide", "cap"}: what the target does to the head's output.
        alpha: see `Rule`.
        rank_share: see `Rule`.
        ratio: see `Rule`.
        outside: see `Rule`.
        kwargs: further keys of a configuration.

    Raises:
        ValueError: a rule outside its range, an unknown kind of assistant or a target that transformers does not know.
    """

    model_type: ClassVar[str] = "uld"
    inference_time: bool = True

    def __init__(
        self,
        target: dict[str, Any] | None = None,
        assistant: dict[str, Any] | None = None,
        head: str = "lm_head",
        logit_rule: dict[str, Any] | None = None,
        alpha: float = 0.75,
        rank_share: float = 0.01,
        ratio: float = 0.01,
        outside: str = "original",
        **kwargs: Any,
    ) -> None:
        self.target = {key: value for key, value in (target or {}).items() if key != "transformers_weights"}
        kwargs.pop("transformers_weights", None)
        self.assistant = dict(assistant or {})
        self.head = head
        self.logit_rule = {"scale": 1.0, "divide": False, "cap": None} | dict(logit_rule or {})
        self.alpha, self.rank_share, self.ratio = float(alpha), float(rank_share), float(ratio)
        self.outside = outside
        if self.target:  # transformers makes one without arguments, to see what the defaults are
            Rule(self.alpha, self.rank_share, self.ratio, cast(Any, outside))
            wanted = _PARTS.get(str(self.assistant.get("kind")))
            if wanted is None or not wanted <= self.assistant.keys():
                raise ValueError(
                    "expected an assistant of kind blocks (path, first, last, scale) or external (config, head, "
                    "logit_rule), found another; use the files that were saved together"
                )
            self._target_config = _config_of(self.target)
        kwargs["inference_time"] = True
        super().__init__(**kwargs)

    @classmethod
    def beside(
        cls,
        target: nn.Module,
        rule: Rule,
        *,
        assistant: Mapping[str, Any],
        head: str,
        logit_rule: Mapping[str, Any] | None = None,
    ) -> ULDConfig:
        """The configuration of a difference over a live target.

        Args:
            target: a causal language model or an image classifier of transformers.
            rule: how to combine.
            assistant: see the class.
            head: path of the target's output layer.
            logit_rule: see the class; nothing by default.
        """
        theirs = cast(Any, target.config)
        own = {key: value for key, value in theirs.to_dict().items() if key not in _NOT_KEPT}
        images = getattr(target, "main_input_name", "") == "pixel_values"
        task = "ImageClassification" if images else "CausalLM"
        keys = _IMAGE_KEYS if images else _TEXT_KEYS
        text = theirs.get_text_config()
        return cls(
            target=own | {"architectures": [type(target).__name__]},
            assistant=copy.deepcopy(dict(assistant)),
            head=head,
            logit_rule=dict(logit_rule or {}),
            alpha=rule.alpha,
            rank_share=rule.rank_share,
            ratio=rule.ratio,
            outside=rule.outside,
            architectures=[f"ULDFor{task}"],
            auto_map={"AutoConfig": "modeling_uld.ULDConfig", f"AutoModelFor{task}": f"modeling_uld.ULDFor{task}"},
            dtype=own.get("dtype"),
            **{key: value for key in keys if (value := getattr(text, key, None)) is not None},
        )

    @property
    def rule(self) -> Rule:
        """How to combine."""
        return Rule(self.alpha, self.rank_share, self.ratio, cast(Any, self.outside))

    @property
    def target_config(self) -> Any:
        """The target's configuration as an object; of a difference over a live target, the target's own."""
        return self._target_config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The target's: caches are made from it."""
        if "_target_config" not in self.__dict__:
            return self
        return self._target_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """Everything that goes into `config.json`."""
        held = self.__dict__.pop("_target_config", None)
        guard = {"transformers_weights": _NO_FILE}
        try:
            return cast(dict[str, Any], super().to_dict()) | guard | {"target": self.target | guard}
        finally:
            if held is not None:
                self._target_config = held


_PARTS = {"blocks": {"path", "first", "last", "scale"}, "external": {"config", "head", "logit_rule"}}
_NOT_KEPT = {"_name_or_path", "name_or_path", "auto_map", "transformers_version"}
_TEXT_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "hidden_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
_IMAGE_KEYS = ("num_hidden_layers", "hidden_size", "num_channels", "image_size", "id2label", "label2id")


def _config_of(values: Mapping[str, Any]) -> Any:
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"expected an architecture that transformers has, found {kind}; update transformers")
    return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(values)))


def rule_tensor(config: ULDConfig) -> Tensor:
    """float64 [7]: alpha, rank_share, ratio, outside (0 original, 1 never), first, last, scale.

    It lies among the weights, so that a digest of the tensors covers all that decides the distribution. Of an external
    assistant the last three are 0, 0, 1.
    """
    part = config.assistant
    place = [part.get("first", 0), part.get("last", 0), part.get("scale", 1.0)]
    rule = [config.alpha, config.rank_share, config.ratio, float(config.outside == "never")]
    return torch.tensor([*rule, *map(float, place)], dtype=torch.float64, device="cpu")


# -------------------------------------------------------------------------------------------------- the difference


class _Difference(PreTrainedModel):  # type: ignore[misc]
    """What both kinds of difference share: a target, an assistant, and how they come to be and are saved.

    Attributes:
        target: the target, as it is.
        assistant: the low-rank matrices by module path of the target, or the external model; the names of its tensors
            are those in the file.
    """

    config_class = ULDConfig
    base_model_prefix = "target"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _auto: ClassVar[Any]

    def __init__(
        self, config: ULDConfig, target: nn.Module | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        if target is None:
            target = cast(nn.Module, self._auto.from_config(config.target_config))
        if getattr(target, "_is_stateful", False):
            raise NotImplementedError(
                f"expected a target whose cache is keys and values, found {type(target).__name__}, a recurrent model; "
                "use another target"
            )
        config = copy.copy(config)
        config._target_config = cast(Any, target.config)
        config._attn_implementation = cast(Any, target.config)._attn_implementation
        super().__init__(config)
        self.target = target
        self.assistant = _assistant(config, target, tensors, self._auto)
        self._rule = config.rule
        self._width = int(_head_width(target, config.head))
        self._build()
        self.post_init()
        self.training = target.training  # its parts have modes of their own

    # -- how it comes to be ----------------------------------------------------------------------------------------

    @classmethod
    def over(cls, target: nn.Module, config: ULDConfig, tensors: Mapping[str, Tensor]) -> Any:
        """The difference over a live target, on its storage: nothing is copied but the assistant's own tensors.

        Args:
            target: a transformers model; left as it is.
            config: from `ULDConfig.beside`.
            tensors: the assistant's tensors, named as in its file; `assistant.rule` may be absent.

        Raises:
            ValueError: tensors that do not fit the target or the configuration.
            NotImplementedError: see `slice_blocks`.
        """
        return cls(config, target, tensors)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder made by `save_pretrained`: the target natively from its own files, then the assistant.

        Options go to the target's `from_pretrained`; with `output_loading_info` its report comes too.

        Raises:
            ValueError: `config.json` and `assistant.safetensors` disagree, or do not fit the target.
        """
        config = kwargs.pop("config", None)
        kwargs.pop("trust_remote_code", None)
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        if not isinstance(config, ULDConfig):
            config = ULDConfig.from_pretrained(pretrained_model_name_or_path, **where)
        found = cached_file(pretrained_model_name_or_path, ASSISTANT_FILE, **where)
        tensors = load_file(found)
        if RULE_TENSOR not in tensors:
            raise ValueError(f"expected {RULE_TENSOR} in {ASSISTANT_FILE}, found none; use a complete folder")
        theirs = copy.deepcopy(config.target_config)
        loaded = cls._auto.from_pretrained(pretrained_model_name_or_path, *args, config=theirs, **kwargs)
        target, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        model = cls.over(target, config, tensors)
        model.name_or_path = str(pretrained_model_name_or_path)
        return (model, *info) if info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder: the target's own files, `assistant.safetensors`, this file, and the configuration of both.

        Options go to the target's `save_pretrained`.

        Raises:
            ValueError: `push_to_hub`, which would publish the target alone first.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("expected a folder to save to, found push_to_hub; save first and upload the folder")
        folder = Path(save_directory)
        cast(Any, self.target).save_pretrained(folder, *args, **kwargs)
        config = copy.deepcopy(self.config)
        config.dtype = next(self.target.parameters()).dtype
        config.target["dtype"] = str(config.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if getattr(self, "generation_config", None) is not None:
            self.generation_config.save_pretrained(folder)
        save_file(self.assistant_tensors(), folder / ASSISTANT_FILE, metadata={"format": "pt"})
        (folder / CODE_FILE).write_bytes(Path(__file__).read_bytes())

    def assistant_tensors(self) -> dict[str, Tensor]:
        """What `assistant.safetensors` holds: the assistant's tensors in single precision, and the rule."""
        own = {f"assistant.{k}": v.detach().float().cpu().contiguous() for k, v in self.assistant.state_dict().items()}
        # A tied head and embedding are one tensor here and two in the file.
        return {name: tensor.clone() for name, tensor in own.items()} | {RULE_TENSOR: rule_tensor(self.config)}

    def init_weights(self) -> None:
        """Nothing: the target has its weights and the assistant its own."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the target has tied its own."""

    # -- the assistant's structure ---------------------------------------------------------------------------------

    def _build(self) -> None:
        """Lay the assistant's structure over the tensors as they are now. It is no submodule: it owns no tensor."""
        part, built = self.config.assistant, None
        if part["kind"] == "blocks":
            built = slice_blocks(self.target, part["path"], part["first"], part["last"])
            attach(built, part["path"], part["first"], _pairs(self.assistant), part["scale"])
        object.__setattr__(self, "_blocks", built)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        if "_blocks" in self.__dict__:
            self._build()  # buffers are replaced, not moved
        return moved

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; tensors may be assigned."""
        loaded = super().load_state_dict(*args, **kwargs)
        self._build()
        return loaded

    def _assisting(self) -> nn.Module:
        """The assistant as a model, in the target's mode."""
        model = self.__dict__["_blocks"] if self.config.assistant["kind"] == "blocks" else self.assistant
        if model.training != self.target.training:
            model.train(self.target.training)
        return cast(nn.Module, model)

    @property
    def _entry(self) -> tuple[nn.Module, nn.Module]:
        """The target's block whose input the assistant starts from, and the assistant's own first block."""
        part = self.config.assistant
        own = cast(nn.ModuleList, self.__dict__["_blocks"].get_submodule(part["path"]))
        return cast(nn.ModuleList, self.target.get_submodule(part["path"]))[part["first"]], own[0]

    def states_logits(self, states: Tensor) -> Tensor:
        """Log-probabilities from states of `states_model()`.

        Args:
            states: [..., d + d_a], the inputs of the two heads side by side.

        Returns:
            [..., V] normalised log-probabilities, fp32 at least.
        """
        config = self.config
        b, a = states[..., : self._width], states[..., self._width :]  # [..., d], [..., d_a]
        if self._rule.nothing:  # the product of fewer rows may round otherwise
            return _precise(_head(self.target, config.head, config.logit_rule, b)).log_softmax(-1)
        ours = self.target, config.head, config.logit_rule
        own = config.assistant["kind"] == "blocks"
        if own and not _picks(*ours[:2], a, self._rule):
            both = _head(*ours, torch.stack([b, a]))  # [2, ..., V]
            return combine(both[0], both[1], self._rule)
        theirs = ours if own else (self.assistant, config.assistant["head"], config.assistant["logit_rule"])
        return _subtracted(_head(*ours, b), *theirs, a, self._rule)


def _head_width(model: nn.Module, path: str) -> int:
    head: Any = _submodule(model, path)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected a linear output layer at {path or 'no path'}, found none; name the model's head")
    return head.in_features


def _assistant(config: ULDConfig, target: nn.Module, tensors: Mapping[str, Tensor] | None, auto: Any) -> nn.Module:
    """The module that owns the assistant's tensors."""
    part, own = config.assistant, dict(tensors or {})
    rule = own.pop(RULE_TENSOR, None)
    if rule is not None and not torch.equal(rule.cpu().double(), rule_tensor(config)):
        raise ValueError(
            f"expected config.json to say what {ASSISTANT_FILE} says, found another rule or other blocks; "
            "use the files that were saved together"
        )
    own = {name.removeprefix("assistant."): tensor for name, tensor in own.items()}
    dtype = next(target.parameters()).dtype
    precise = dtype if dtype == torch.float64 else torch.float32
    if part["kind"] == "external":
        return _external(part, target, own if tensors is not None else None, auto)
    root = nn.Module()
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        base: Any = _submodule(target, path)
        if leaf not in ("lora_A", "lora_B") or not isinstance(base, nn.Linear | Conv1D):
            raise ValueError(f"expected low-rank matrices of the target's linear maps, found assistant.{name}")
        value = tensor.detach().to(device=base.weight.device, dtype=precise, copy=True)
        _nested(root, path).register_parameter(leaf, nn.Parameter(value))
    return root


def _external(part: Mapping[str, Any], target: nn.Module, own: Mapping[str, Tensor] | None, auto: Any) -> nn.Module:
    weight = next(target.parameters())
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
        model = cast(nn.Module, auto.from_config(_config_of(part["config"])))
    if own is not None:
        try:
            model.load_state_dict(dict(own))
        except RuntimeError:
            raise ValueError(
                f"expected the tensors of {type(model).__name__} in {ASSISTANT_FILE}, found others; "
                "use the files that were saved together"
            ) from None
    ours, theirs = _outputs(target), _outputs(model)
    if ours != theirs:
        raise ValueError(
            f"expected an assistant with the target's {ours} outputs, found {theirs}; "
            "use a model with the same vocabulary"
        )
    _head_width(model, part["head"])
    return model.to(weight.device, weight.dtype).train(target.training)


def _outputs(model: nn.Module) -> int:
    config = cast(Any, model.config).get_text_config()
    return int(config.num_labels if model.main_input_name == "pixel_values" else config.vocab_size)


def _nested(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, made with those on the way to it."""
    for name in path.split("."):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = cast(nn.Module, root._modules[name])
    return root


def _pairs(root: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) by module path.

    Raises:
        ValueError: one without the other.
    """
    own = {name: module._parameters for name, module in root.named_modules() if module._parameters}
    if any(set(pair) != {"lora_A", "lora_B"} for pair in own.values()):
        raise ValueError(f"expected lora_A and lora_B of each layer in {ASSISTANT_FILE}, found one alone")
    return {name: (cast(Any, pair["lora_A"]), cast(Any, pair["lora_B"])) for name, pair in own.items()}


# ------------------------------------------------------------------------------------------------- language models


class ULDForCausalLM(_Difference, GenerationMixin):  # type: ignore[misc]
    """The difference of two causal language models; its logits are normalised log-probabilities.

    One call at a time: what enters the assistant is taken from the target by a hook that lives as long as the call.
    """

    _auto: ClassVar[Any] = AutoModelForCausalLM

    def __init__(
        self, config: ULDConfig, target: nn.Module | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(config, target, tensors)
        self.generation_config = copy.deepcopy(getattr(self.target, "generation_config", None)) or GenerationConfig()
        self._depth = len(DynamicCache(config=cast(Any, _backbone(self.target).config)).layers)

    def get_input_embeddings(self) -> nn.Module:
        """The target's."""
        return cast(nn.Module, cast(Any, self.target).get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """The target's."""
        return self.target.get_submodule(self.config.head)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As the target prepares its own."""
        return cast(Any, self.target).prepare_inputs_for_generation(*args, **kwargs)

    def states_model(self) -> nn.Module:
        """A module whose forward gives the inputs of both heads, [B, T, d + d_a], and one cache for both models.

        It stands where a backbone does: `.last_hidden_state` and `.past_key_values` of its output. The cache's layers
        are the target's, then the assistant's, so that reordering, repeating, selecting and cropping hold for both.
        """
        return _States(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] that are the normalised log-probabilities `generate()` samples from.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T], 1 for tokens.
            position_ids: [B, T].
            past_key_values: a dynamic cache, extended in place.
            inputs_embeds: [B, T, d] instead of `input_ids`; not with an external assistant.
            labels: [B, T]; the loss is the mean of those after the first that are not -100.
            use_cache: whether the cache comes back; by default as the target's configuration says.
            logits_to_keep: how many positions from the end, or which; 0 for all.
            kwargs: passed on to both models.

        Raises:
            NotImplementedError: a cache of fixed size, or hidden states or attention weights are asked for.
        """
        out = self._states(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        chosen = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.states_logits(out.last_hidden_state[:, chosen])  # [B, T, V]
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].reshape(-1).to(logits.device)  # [B * (T - 1)]
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), shifted, ignore_index=-100)
        return CausalLMOutputWithPast(
            loss=cast(Any, loss), logits=cast(Any, logits), past_key_values=out.past_key_values
        )

    def _states(self, *, past_key_values: Any = None, use_cache: bool | None = None, **inputs: Any) -> Any:
        """`states_model()`'s forward."""
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.pop(name, None):
                raise NotImplementedError(
                    f"expected logits to be asked for, found {name}; ask the model at `.target` for its own"
                )
        inputs.pop("return_dict", None)
        external = self.config.assistant["kind"] == "external"
        if external and inputs.get("inputs_embeds") is not None:
            raise NotImplementedError("expected token ids, found embeddings: an external assistant has its own")
        target, assistant = _backbone(self.target), _backbone(self._assisting())
        use_cache = getattr(cast(Any, target.config), "use_cache", True) if use_cache is None else use_cache
        ours, theirs, cache = self._caches(past_key_values, bool(use_cache))
        shared = {name: value for name, value in inputs.items() if value is not None}
        if external:
            first = target(**_fitting(target, shared), past_key_values=ours, use_cache=use_cache)
            second = assistant(**_fitting(assistant, shared), past_key_values=theirs, use_cache=use_cache)
        else:
            entry, own = self._entry
            shared = _fitting(target, shared)
            with caught_input(entry) as caught:
                first = target(**shared, past_key_values=ours, use_cache=use_cache)
            with given_input(own, caught[0]):
                second = assistant(**shared, past_key_values=theirs, use_cache=use_cache)
        states = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=-1)  # [B, T, d + d_a]
        return BaseModelOutputWithPast(
            last_hidden_state=cast(Any, states), past_key_values=cache if use_cache else None
        )

    def _caches(self, cache: Any, wanted: bool) -> tuple[Any, Any, Any]:
        """The target's view of the one cache, the assistant's, and the cache itself, with layers for both."""
        if cache is None and not wanted:
            return None, None, None
        ours = cast(Any, _backbone(self.target).config)
        cache = DynamicCache(config=ours) if cache is None else cache
        if getattr(cache, "is_compileable", False) or not hasattr(cache, "layers"):
            raise NotImplementedError(
                f"expected a dynamic cache, found {type(cache).__name__}; use cache_implementation dynamic"
            )
        if not cache.layers:
            cache.layers += DynamicCache(config=ours).layers
        if len(cache.layers) == self._depth:
            cache.layers += DynamicCache(config=cast(Any, _backbone(self._assisting()).config)).layers
        return _view(cache.layers[: self._depth]), _view(cache.layers[self._depth :]), cache


def _view(layers: list[Any]) -> DynamicCache:
    """A cache over layers that another one has too."""
    view = DynamicCache()
    view.layers, view.layer_class_to_replicate = layers, None
    return view


def _fitting(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without positions where the model takes none (it counts them itself)."""
    return {k: v for k, v in inputs.items() if k != "position_ids" or _takes(model, k)}


class _States(nn.Module):
    """See `ULDForCausalLM.states_model`."""

    def __init__(self, difference: Any) -> None:
        super().__init__()
        self.difference = difference
        self.training = difference.training

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As the target's backbone; see `states_model`."""
        return self.difference._states(input_ids=input_ids, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The target's."""
        return cast(nn.Module, self.difference.get_input_embeddings())


class ULDLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """The same distribution for a plain `target.generate(logits_processor=[...])` or a server's loop, batch by batch.

    Owns the assistant, as the target's first blocks on its storage or as an external model, and a cache. Rows are
    followed through beam search by what they begin with; where a call does not continue the last one, all is run anew.

    Args:
        target: the model that generates; left as it is.
        config: from `ULDConfig.beside`.
        tensors: the assistant's tensors, named as in its file.
        attention_mask: [B, T] of the prompts, where they are padded on the left.

    Raises:
        ValueError, NotImplementedError: as `ULDForCausalLM.over`.
    """

    def __init__(
        self,
        target: nn.Module,
        config: ULDConfig,
        tensors: Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
    ) -> None:
        part, self._rule = config.assistant, config.rule
        owner = _assistant(config, target, tensors, AutoModelForCausalLM)
        if part["kind"] == "external":
            self._model, self._head, self._scaling = owner, part["head"], part["logit_rule"]
        else:
            self._model = slice_blocks(target, part["path"], 0, part["last"])
            attach(self._model, part["path"], 0, _pairs(owner), part["scale"])
            self._head, self._scaling = config.head, config.logit_rule
        self._model.eval()
        self._prompts = attention_mask
        self._rows: Tensor | None = None  # [R, T] of the last call
        self._mask: Tensor | None = None  # [R, T] of the last call
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Combine.

        Args:
            input_ids: [R, T] all tokens so far.
            scores: [R, V] the target's logits or log-probabilities for the next token.

        Returns:
            [R, V] normalised log-probabilities.

        Raises:
            ValueError: a number of rows that is no multiple of the prompts'.
        """
        mask = self._mask_of(input_ids)  # [R, T]
        new = self._follow(input_ids, mask)
        backbone = _backbone(self._model)
        inputs: dict[str, Any] = {"input_ids": input_ids[:, new:], "attention_mask": mask}
        if _takes(backbone, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, new:]
        with torch.no_grad():
            hidden = backbone(**inputs, past_key_values=self._cache, use_cache=True).last_hidden_state[:, -1]  # [R, d]
            self._rows, self._mask = input_ids.clone(), mask
            return _subtracted(scores, self._model, self._head, self._scaling, hidden, self._rule)

    def _mask_of(self, input_ids: Tensor) -> Tensor:
        """[R, T] of the rows as the prompts' padding and the number of rows a prompt have it."""
        if self._prompts is None:
            return torch.ones_like(input_ids)
        rows, prompts = len(input_ids), self._prompts.to(input_ids.device)
        more = input_ids.shape[1] - prompts.shape[1]
        if rows % len(prompts) or more < 0:
            raise ValueError(
                f"expected rows that continue {len(prompts)} prompts of {prompts.shape[1]} tokens, found {rows} of "
                f"{input_ids.shape[1]}; make a processor for each batch"
            )
        return F.pad(prompts.long().repeat_interleave(rows // len(prompts), 0), (0, more), value=1)

    def _follow(self, input_ids: Tensor, mask: Tensor) -> int:
        """Bring the cache to the rows of this call; the number of tokens that it already holds."""
        known = 0 if self._rows is None else self._rows.shape[1]
        if 0 < known < input_ids.shape[1]:
            before, before_mask = cast(Tensor, self._rows), cast(Tensor, self._mask)
            same = (input_ids[:, None, :known] == before) & (mask[:, None, :known] == before_mask)  # [R, R', T']
            same_row = same.all(-1)  # [R, R']
            if same_row.any(-1).all():
                parents = same_row.long().argmax(-1)  # [R]
                self._cache.reorder_cache(parents)
                return known
        self._cache = DynamicCache(config=cast(Any, _backbone(self._model).config))
        return 0


# --------------------------------------------------------------------------------------------------------- images


class ULDForImageClassification(_Difference):
    """The same difference on class logits: its logits are normalised log-probabilities of the classes."""

    main_input_name = "pixel_values"
    _auto: ClassVar[Any] = AutoModelForImageClassification

    def states_model(self) -> nn.Module:
        """A module whose forward gives the inputs of both heads, [B, d + d_a], as `.last_hidden_state`."""
        return _States(self)

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits [B, classes] that are normalised log-probabilities.

        Args:
            pixel_values: [B, channels, height, width].
            labels: [B]; the loss is the mean.
            kwargs: passed on to both models.
        """
        logits = self.states_logits(self._states(pixel_values=pixel_values, **kwargs).last_hidden_state)
        loss = None if labels is None else F.nll_loss(logits, labels.to(logits.device))
        return ImageClassifierOutput(loss=cast(Any, loss), logits=cast(Any, logits))

    def _states(self, **inputs: Any) -> Any:
        part = self.config.assistant
        inputs = {name: value for name, value in inputs.items() if value is not None and name != "input_ids"}
        assistant = self._assisting()
        if part["kind"] == "external":
            states = [
                _head_input(self.target, self.config.head, inputs),
                _head_input(assistant, part["head"], inputs),
            ]
        else:
            entry, own = self._entry
            with caught_input(entry) as caught:
                first = _head_input(self.target, self.config.head, inputs)
            with given_input(own, caught[0]):
                states = [first, _head_input(assistant, self.config.head, inputs)]
        return BaseModelOutputWithPast(last_hidden_state=cast(Any, torch.cat(states, dim=-1)))


def _head_input(model: nn.Module, path: str, inputs: Mapping[str, Any]) -> Tensor:
    """What a classifier's output layer reads, [B, d]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[-1]
