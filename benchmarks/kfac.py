"""Kronecker factors against a collector that takes one block at a time, and against a plain forward and backward pass.

Layer by layer: what published scripts do. For each block, hooks on its linear maps, embeddings made to ask for a
gradient, every weight trained, so that a whole forward and backward pass with all weight gradients runs for the sake of
one block; full products, and A anew for every map. Plain: `model(ids, labels=...).loss.backward()` over the same
batches, every gradient formed, nothing else done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import Ratio, interleave
from benchmarks.subject import Subject, texts
from probes.curvature.ekfac import corrected_masses
from probes.curvature.factors import kronecker_factors
from probes.curvature.kronecker import eigenbasis
from probes.records import TokenRecord, length_batches, pad
from probes.taps import sites

BLOCKS = 4  # of all, evenly spaced from the first on: the lowest decides how far back a pass has to go
BATCH_TOKENS = 1024
RECORDS = 16


def run(subject: Subject) -> Iterator[Ratio]:
    records = texts(subject)[:RECORDS]
    n = len(subject.model_map.blocks)
    blocks = sorted({round(i * n / BLOCKS) for i in range(min(n, BLOCKS))})
    some = [site.key for site in sites(subject.model_map, blocks=blocks)]
    sides = {
        "by layer": lambda: _layer_by_layer(subject, records, blocks),
        "one pass": _factors(subject, records, some),
        "plain": lambda: _plain(subject, records),
        "all": _factors(subject, records, None),
        "compared": _factors(subject, records, None, halves=True),
    }
    seconds = interleave(sides, subject)
    count = sum(len(record.ids) for record in records)
    note = f"{len(records)} records, {count} tokens, at most {BATCH_TOKENS} a batch"
    inner = sum(p.numel() for name, p in subject.model.named_parameters() if subject.model_map.block_of(name) in blocks)
    yield Ratio(
        f"{len(blocks)} blocks, layer by layer / one pass",
        seconds["by layer"],
        seconds["one pass"],
        subject.target(3.0),
        at_least=True,
        note=f"{note}; {len(some)} maps, {inner / 1e6:.3g} M weights",
    )
    yield Ratio(
        f"{n} blocks / plain", seconds["all"], seconds["plain"], subject.target(2.0), note=f"{note}; one sum for all"
    )
    yield Ratio(
        f"{n} blocks, halves compared / plain",
        seconds["compared"],
        seconds["plain"],
        note=f"{note}; three eigendecompositions a factor, however many tokens",
    )
    yield _correction(subject, records, some)


def _correction(subject: Subject, records: Sequence[TokenRecord], modules: Sequence[str]) -> Ratio:
    """The second pass of EK-FAC; its bases are not part of the time."""
    factors = kronecker_factors(
        subject.model, records, modules=modules, batch_tokens=BATCH_TOKENS, halves=False, model_map=subject.model_map
    )
    bases = {key: eigenbasis(factor) for key, factor in factors.factors.items()}
    sides = {
        "factors": _factors(subject, records, modules),
        "masses": lambda: corrected_masses(
            subject.model, records, factors, bases, batch_tokens=BATCH_TOKENS, model_map=subject.model_map
        ),
    }
    seconds = interleave(sides, subject)
    return Ratio("EK-FAC masses / factors", seconds["masses"], seconds["factors"], note=f"{len(modules)} maps")


def _factors(
    subject: Subject, records: Sequence[TokenRecord], modules: Sequence[str] | None, *, halves: bool = False
) -> Callable[[], object]:
    return lambda: kronecker_factors(
        subject.model,
        records,
        modules=modules,
        batch_tokens=BATCH_TOKENS,
        halves=halves,
        model_map=subject.model_map,
    )


def _batches(subject: Subject, records: Sequence[TokenRecord]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in length_batches(records, BATCH_TOKENS):
        chosen = [records[i] for i in batch]
        ids, mask = pad(chosen, subject.device)  # [B, T]
        labels = ids.masked_fill(mask == 0, -100)
        for row, record in enumerate(chosen):
            labels[row, : record.n_prompt] = -100
        yield ids, labels


def _plain(subject: Subject, records: Sequence[TokenRecord]) -> None:
    subject.model.requires_grad_(True)
    for ids, labels in _batches(subject, records):
        subject.model(ids, labels=labels, use_cache=False).loss.backward()
        subject.model.zero_grad(set_to_none=True)


def _layer_by_layer(subject: Subject, records: Sequence[TokenRecord], blocks: Sequence[int]) -> dict[str, Tensor]:
    model, found = subject.model, {}
    model.requires_grad_(True)
    embedding = model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())]
    for block in blocks:
        modules = {site.key: model.get_submodule(site.key) for site in sites(subject.model_map, blocks=[block])}
        a = {key: torch.zeros(m.in_features, m.in_features, device=subject.device) for key, m in modules.items()}
        g = {key: torch.zeros(m.out_features, m.out_features, device=subject.device) for key, m in modules.items()}
        current: dict[str, Tensor] = {}
        hooks = [hook for key, module in modules.items() for hook in _hooks(key, module, a[key], g[key], current)]
        for ids, labels in _batches(subject, records):
            current["counted"] = (labels != -100).roll(-1, 1).flatten()  # [B T], a position predicts the next token
            model(ids, labels=labels, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
        found |= {f"{key}.a": total for key, total in a.items()} | {f"{key}.g": total for key, total in g.items()}
    for handle in handles:
        handle.remove()
    return found


def _hooks(key: str, module: nn.Module, a: Tensor, g: Tensor, current: dict[str, Tensor]) -> list:
    def forward(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)[current["counted"]]  # [n, q]
        a.add_(x.t() @ x)

    def backward(_module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        rows = outputs[0].flatten(0, -2)[current["counted"]]  # [n, p]
        g.add_(rows.t() @ rows)

    return [module.register_forward_pre_hook(forward), module.register_full_backward_hook(backward)]
