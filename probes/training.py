"""The one training loop: AdamW on the parameters of a context that puts the model back as it was.

    with adapters(model, model_map, rank=16, alpha=16, seed=0) as parameters:       # or full(model)
        order = list(batches(len(records), 8, steps, seed=0))
        loss = mean_loss(model, records, model_map=model_map)
        fit(parameters, lambda i: loss(order[i]), steps=steps, learning_rate=3e-4)

`adapters` is LoRA (Hu et al., arXiv 2106.09685): beside the frozen weight W of a linear map stands a product of two
thin matrices,

    y = x W^T + (alpha / r) x A^T B^T,      A [r, in] random, B [out, r] zero, so that nothing changes before step 1.

`full` trains weights themselves. AdamW is Loshchilov and Hutter's (1711.05101) with betas (0.9, 0.999) and epsilon
1e-8; its state, and the copy of a half-precision weight that it moves, are fp32. Both contexts train in evaluation
mode: dropout would only add noise. Parameters outside the context are frozen, so a backward pass stops at the lowest
block that trains.

The seed decides everything random here; torch's global generator is neither read nor moved.

Shape letters: B records, T padded tokens, N completion tokens of a batch, d width, r rank.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from probes.classify import class_logits
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import check_records, out_of_memory
from probes.loss import cross_entropy
from probes.modelmap import ModelMap, Projection
from probes.passes import sum_type
from probes.records import ImageRecord, TokenRecord, pad, predicting

Decay = Literal["constant", "linear"]
Records = Sequence[TokenRecord] | Sequence[ImageRecord]

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_ADAPTER = "default"


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Rows of each step: one random permutation of the n rows after another, cut into batches.

    The last batch of a permutation may be short. The batches of the first steps do not depend on how many follow.

    Args:
        n: number of rows, at least 1.
        size: rows a batch, at least 1.
        steps: number of batches, at least 0.
        seed: of the permutations.

    Raises:
        UsageError: a number that is too small.
    """
    if n < 1 or size < 1 or steps < 0:
        raise UsageError(f"expected records, a batch size and steps to train on, found {n}, {size} and {steps}")
    return _batches(n, size, steps, seed)


def _batches(n: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    rng, made = np.random.default_rng((seed, 11)), 0
    while made < steps:
        order = rng.permutation(n).tolist()
        for start in range(0, min(n, (steps - made) * size), size):
            yield order[start : start + size]
            made += 1


def mean_loss(
    model: nn.Module, records: Records, *, model_map: ModelMap | None = None
) -> Callable[[Sequence[int]], float]:
    """The loss of a batch, for `fit`: its backward pass adds to the gradients of what trains.

    Args:
        model: a causal language model (for `TokenRecord`s) or an image classifier (for `ImageRecord`s).
        records: at least one.
        model_map: the model's own map, built when absent, which adapters in place forbid; images need none.

    Returns:
        A function from row numbers of `records` to the mean cross entropy in nats, over the completion tokens of all
        these records together, or over images.

    Raises:
        UsageError: no records.
        UnsupportedError: token ids or labels that the model does not have.
    """
    if not records:
        raise UsageError("expected records to train on, found none; pass at least one")
    device = next(model.parameters()).device
    if isinstance(records[0], ImageRecord):
        images = cast("Sequence[ImageRecord]", records)
        return lambda rows: _backward(_image_loss(model, [images[i] for i in rows], device))
    texts = cast("Sequence[TokenRecord]", records)
    mapped = model_map if model_map is not None and model_map.model is model else ModelMap.of(model)
    check_records(texts, mapped.vocab_size)
    return lambda rows: _backward(_text_loss(mapped, [texts[i] for i in rows], device))


def _text_loss(model_map: ModelMap, batch: Sequence[TokenRecord], device: torch.device) -> Tensor:
    ids, _ = pad(batch, device)  # [B, T]; no mask, see `probes.likelihood`
    hidden = model_map.backbone()(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
    states = hidden[predicting(batch, ids)]  # [N, d]
    labels = torch.tensor([token for record in batch for token in record.completion], device=device)  # [N]
    weights = torch.full((len(labels),), 1.0 / len(labels), device=device, dtype=sum_type(states))  # [N]
    return cross_entropy(model_map, states, labels, weights)


def _image_loss(model: nn.Module, batch: Sequence[ImageRecord], device: torch.device) -> Tensor:
    logits = class_logits(model, torch.stack([record.pixels for record in batch]).to(device))  # [B, classes]
    labels = torch.tensor([record.label for record in batch], device=device)  # [B]
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise UnsupportedError(f"expected labels below {logits.shape[-1]} classes, found others; check the records")
    return functional.cross_entropy(logits.to(sum_type(logits)), labels)


def _backward(loss: Tensor) -> float:
    if loss.requires_grad:  # not if no parameter that trains takes part in the loss
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def fit(
    parameters: Sequence[nn.Parameter],
    step: Callable[[int], float],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warm_up: int = 0,
    decay: Decay = "constant",
    clip: float | None = None,
    after: Callable[[int], bool | None] | None = None,
) -> list[float]:
    """Train `parameters` in place with AdamW.

    Args:
        parameters: what to train; each has `requires_grad`.
        step: `step(i)`, i from 0, leaves gradients of step i in `.grad` (which is empty before) and returns the loss.
        steps: number of steps, at least 0.
        learning_rate: the peak rate.
        weight_decay: AdamW's, times the rate.
        warm_up: the rate of step i is at most (i + 1) / warm_up of the peak.
        decay: "constant" keeps the peak; "linear" falls to peak / (steps - warm_up) at the last step.
        clip: largest Euclidean norm of all gradients together; None for any.
        after: called with the number of steps done, after each, gradients freed; True ends the training.

    Returns:
        The loss of each step, before its update.

    Raises:
        UsageError: nothing to train, a number out of range, or a loss that is not finite.
        ResourceError: a step does not fit in memory.
    """
    if not parameters or steps < 0 or warm_up < 0 or not learning_rate > 0:
        raise UsageError(
            "expected parameters to train, steps and warm-up of at least 0 and a learning rate above 0, found "
            f"{len(parameters)}, {steps}, {warm_up} and {learning_rate}"
        )
    # A half-precision weight swallows updates below its last bit, so the optimiser moves an fp32 copy of it.
    moved = [p if p.dtype == sum_type(p) else nn.Parameter(p.detach().to(sum_type(p))) for p in parameters]
    copies = [(p, copy) for p, copy in zip(parameters, moved, strict=True) if copy is not p]
    optimiser = torch.optim.AdamW(moved, lr=learning_rate, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    losses: list[float] = []
    try:
        for i in range(steps):
            _clear(parameters)
            losses.append(_taken(step, i))
            if not math.isfinite(losses[-1]):
                raise UsageError(
                    f"expected a finite training loss, found {losses[-1]} at step {i + 1}; lower the learning rate"
                )
            for parameter, copy in copies:
                copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)
            if clip is not None:
                nn.utils.clip_grad_norm_(moved, clip)
            share = rate_share(i, steps=steps, warm_up=warm_up, decay=decay)
            optimiser.param_groups[0]["lr"] = learning_rate * share
            optimiser.step()
            with torch.no_grad():
                for parameter, copy in copies:
                    parameter.copy_(copy)
            _clear(parameters)
            if after is not None and after(i + 1):
                break
    finally:
        _clear(parameters)
    return losses


def rate_share(i: int, *, steps: int, warm_up: int, decay: Decay) -> float:
    """The rate of step i, from 0, as a share of the peak; the arguments are those of `fit`.

    For an `after` that does a step of its own, such as a proximal one, at the rate of the step before it.
    """
    share = min(1.0, (i + 1) / warm_up) if warm_up else 1.0
    return min(share, (steps - i) / max(1, steps - warm_up)) if decay == "linear" else share


def _taken(step: Callable[[int], float], i: int) -> float:
    try:
        with torch.enable_grad():
            return step(i)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError("expected memory for a training step, found too little; use smaller batches") from None


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing trains, no gradients; modes, flags and gradients are put back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


@contextmanager
def full(model: nn.Module, names: Collection[str] | None = None, *, keep: bool = False) -> Iterator[list[nn.Parameter]]:
    """Train weights themselves.

    Args:
        model: any model.
        names: parameters to train, as in `named_parameters()`; None for all of them.
        keep: leave the trained weights in the model; otherwise they are put back bit for bit, also on an exception,
            from a copy that this makes.

    Yields:
        The parameters that train, in the model's order; all others are frozen.

    Raises:
        UsageError: no names, or names that the model does not have.
    """
    every = dict(model.named_parameters())
    unknown = sorted(set(names or ()) - set(every))
    wanted = every if names is None else {name: p for name, p in every.items() if name in set(names)}
    if unknown or not wanted:
        found = f"{len(unknown)} that it does not have, such as {unknown[0]}" if unknown else "none"
        raise UsageError(f"expected names of the model's parameters to train, found {found}; see named_parameters()")
    saved = {} if keep else {name: p.detach().clone() for name, p in wanted.items()}
    with _frozen(model):
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        try:
            yield list(wanted.values())
        finally:
            with torch.no_grad():
                for name, before in saved.items():
                    wanted[name].copy_(before)


@contextmanager
def adapters(
    model: nn.Module,
    model_map: ModelMap,
    *,
    rank: int,
    alpha: float,
    roles: Collection[str] | None = None,
    first_block: int = 0,
    seed: int,
) -> Iterator[list[nn.Parameter]]:
    """LoRA adapters beside the linear maps of the blocks, put in place by peft and taken out afterwards.

    The model keeps its identity, and `model_map`, made before, keeps working while adapters are in place. Adapters of
    half-precision weights are fp32. A's entries are uniform in +-1 / sqrt(in).

    Args:
        model: the mapped model or another instance of its architecture, without adapters.
        model_map: its map.
        rank: r, at least 1.
        alpha: the product B A counts alpha / r times.
        roles: roles of the projections to adapt (see `probes.modelmap.Projection`); None for all linear maps of
            attention and feed-forward, routers aside.
        first_block: blocks below it get none, and no backward pass.
        seed: of A.

    Yields:
        A and B of each adapted projection, in the map's order.

    Raises:
        UsageError: a rank below 1, or no linear map among what was asked for (a convolutional network).
        UnsupportedError: stacked experts among what was asked for.
    """
    chosen = _chosen(model_map, model, roles, first_block)
    if rank < 1 or not alpha > 0:
        raise UsageError(f"expected a rank and an alpha above 0, found {rank} and {alpha:g}; change them")
    original = {projection.module: model.get_submodule(projection.module) for projection in chosen}
    with _frozen(model):
        try:
            _inject(model, list(original), rank, alpha, isinstance(next(iter(original.values())), Conv1D))
            parameters = _initialised(model, chosen, seed)
            model.eval()  # new modules start in training mode
            yield parameters
        finally:
            for path, module in original.items():
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, module)
            if hasattr(model, "peft_config"):
                del model.peft_config


def adaptable(model_map: ModelMap) -> bool:
    """Whether `adapters` can take the whole model: not a convolutional network, nor one with stacked experts."""
    try:
        _chosen(model_map, model_map.model, None, 0)
    except (UsageError, UnsupportedError):
        return False
    return True


def _chosen(model_map: ModelMap, model: nn.Module, roles: Collection[str] | None, first_block: int) -> list[Projection]:
    """The projections to adapt."""
    model_map.expect_single()
    wanted = [
        projection
        for block in model_map.blocks[max(0, first_block) :]
        for projection in (*block.attention, *block.feed_forward)
        if (projection.role != "router" if roles is None else projection.role in roles)
    ]
    stacked = sum(projection.experts is not None for projection in wanted)
    if stacked:
        raise UnsupportedError(
            f"expected linear maps to adapt, found {stacked} parameters of stacked experts; train in full, or adapt "
            "the attention alone"
        )
    linear = [p for p in wanted if p.hookable and isinstance(model.get_submodule(p.module), (nn.Linear, Conv1D))]
    if not linear:
        raise UsageError("expected linear maps in the blocks to adapt, found none; train in full")
    return linear


def _inject(model: nn.Module, paths: Sequence[str], rank: int, alpha: float, transposed: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "fan_in_fan_out": transposed}
    config = LoraConfig(target_modules="|".join(map(re.escape, paths)), **settings)
    device = next(model.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),  # peft draws values that are replaced below
        warnings.catch_warnings(),
    ):
        # Where both orientations occur peft corrects `fan_in_fan_out` layer by layer, with a warning each time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)


def _initialised(model: nn.Module, chosen: Sequence[Projection], seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters: list[nn.Parameter] = []
    for projection in chosen:
        layer: Any = model.get_submodule(projection.module)
        pair = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        for half in pair:
            half.to(sum_type(half.weight))
        down, up = (cast(nn.Parameter, half.weight) for half in pair)  # [r, in], [out, r]
        bound = projection.in_features**-0.5
        with torch.no_grad():
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
            up.zero_()
        parameters += [down, up]
    return parameters


def merged_deltas(model: nn.Module, model_map: ModelMap) -> dict[str, Tensor]:
    """What the adapters in place add to the weights.

    Args:
        model: a model inside `adapters`.
        model_map: the map that was passed there.

    Returns:
        Parameter name, as in `named_parameters()` of the model without adapters -> (alpha / r) B A in the parameter's
        own orientation, fp32 at least: adding it to the weight gives the adapted model.

    Raises:
        UsageError: no adapters in place.
    """
    deltas: dict[str, Tensor] = {}
    for projection in model_map.projections():
        layer: Any = model.get_submodule(projection.module)
        if _ADAPTER in getattr(layer, "lora_A", {}):
            down, up = layer.lora_A[_ADAPTER].weight.detach(), layer.lora_B[_ADAPTER].weight.detach()
            delta = layer.scaling[_ADAPTER] * (up @ down)  # [out, in]
            deltas[projection.parameter] = delta.T.contiguous() if projection.orientation == "in_out" else delta
    if not deltas:
        raise UsageError("expected adapters in place, found none; call it inside `adapters`")
    return deltas
