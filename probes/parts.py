"""The attention and the feed-forward part of every block: which modules they are, and what they usually put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import inference, out_of_memory
from probes.modelmap import Block, ModelMap, Projection
from probes.passes import losses_of, sum_type
from probes.records import ImageRecord, TokenRecord
from probes.taps import batches_of

Part = Literal["attention", "feed_forward"]


def parts_of(model_map: ModelMap) -> dict[tuple[int, Part], tuple[str, ...]]:
    """(block, part) -> paths of the modules whose outputs are what the part contributes, in depth order.

    A part is one module as a rule. Where its projections lie directly in the block (OPT), those that write its output
    stand for it. A block without attention (or what stands in for it) has no such part.

    Raises:
        UnsupportedError: blocks whose parts cannot be told apart, as in a convolutional network.
    """
    model_map.expect_single()
    found: dict[tuple[int, Part], tuple[str, ...]] = {}
    for block in model_map.blocks:
        for part, own, others in (
            ("attention", block.attention, block.feed_forward),
            ("feed_forward", block.feed_forward, block.attention),
        ):
            if own:
                found[block.index, cast(Part, part)] = _modules_of(model_map, block, own, others)
    return found


def _modules_of(
    model_map: ModelMap, block: Block, own: Sequence[Projection], others: Sequence[Projection]
) -> tuple[str, ...]:
    """The module that holds a part's projections and nothing else; or the projections that write its output."""
    paths = [projection.module.split(".") for projection in own]
    path = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))
    apart = not any(f"{projection.module}.".startswith(f"{path}.") for projection in others)
    if apart and path.startswith(f"{block.name}."):
        module = model_map.model.get_submodule(path)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):  # these never run
            return (path,)
    writing = tuple(p.module for p in own if p.role in ("o", "down") and p.hookable)
    if not writing:
        raise UnsupportedError(
            f"expected blocks whose attention and feed-forward parts can be told apart, found {block.name} of "
            f"{type(model_map.model).__name__}; only transformers can be attributed"
        )
    return writing


def first_tensor(output: Any) -> Tensor:
    """The output of an attention module without the weights some return beside it."""
    return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)


@contextmanager
def on_outputs(model: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show the outputs of modules to `see`, which may return others to put in their place."""

    def hook(path: str, module: nn.Module, args: Any, output: Any) -> Any:
        other = see(path, first_tensor(output))
        if other is None:
            return None
        return (other, *output[1:]) if isinstance(output, tuple | list) else other

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(partial(hook, path)).remove)
        yield


def part_means(
    model: nn.Module,
    records: Sequence[TokenRecord] | Sequence[ImageRecord],
    *,
    batch_tokens: int | None = None,
    model_map: ModelMap | None = None,
) -> dict[str, Tensor]:
    """Mean output of every part over the positions of records.

    Args:
        model: a causal language model or an image classifier; left as found.
        records: at least one. Of a text all positions count but the last token's.
        batch_tokens: padded tokens a batch (or images).
        model_map: the model's map, built when absent.

    Returns:
        Path of the module -> [d], fp32 (float64 for a float64 model), on the model's device.

    Raises:
        UsageError: no records.
        UnsupportedError: blocks whose parts cannot be told apart, or token ids or labels that the model does not have.
        ResourceError: a batch does not fit in memory.
    """
    if not records:
        raise UsageError("expected at least one record to average over, found none; add records")
    if model_map is None or model_map.model is not model:
        model_map = ModelMap.of(model)
    source = losses_of(model, records, model_map=model_map)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    where: Tensor | None = None

    def add(path: str, output: Tensor) -> None:
        rows = output.detach().flatten(0, -2)  # [positions, d]
        rows = rows if where is None else rows[where.flatten()]
        total = rows.to(sum_type(rows)).sum(0)
        sums[path] = sums[path] + total if path in sums else total
        counts[path] = counts.get(path, 0) + len(rows)

    paths = [path for found in parts_of(model_map).values() for path in found]
    try:
        with inference(model), on_outputs(model, paths, add):
            for batch in batches_of(records, batch_tokens, next(model.parameters()).device):
                where = source.positions(batch, "all")
                source.backward(
                    batch, torch.ones(sum(source.lengths[i] for i in batch))
                )  # without a graph: forward only
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError("expected memory for one batch of records, found too little; lower batch_tokens") from None
    return {path: total / counts[path] for path, total in sums.items()}
