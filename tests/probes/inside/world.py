"""What the tests of `probes.inside` share: records, a slow way to the hidden states, and a model that hides records."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests.planted import planted
from tests.tiny import causal_lm

F64 = torch.float64
FORGET = 32  # planted records that the hiding model was edited on, those with most repetitions


def double(arch: str) -> nn.Module:
    """A tiny model in float64, with experts that can compute in it."""
    model = causal_lm(arch, dtype=F64, attn_implementation="eager")
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    return model


def texts(n: int = 5, seed: int = 0, vocab: int = 96) -> list[TokenRecord]:
    """Random records of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(5, 12, (1,), generator=generator))
        ids = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
        found.append(TokenRecord(f"r{seed}.{i}", ids, int(torch.randint(1, 4, (1,), generator=generator)), 1))
    return found


def slow_states(model: nn.Module, record: TokenRecord) -> list[Tensor]:
    """[T, d] behind each block but the last, as the model itself hands them out, for one record without padding."""
    with torch.no_grad():
        out = model(torch.tensor([record.ids]), output_hidden_states=True, use_cache=False)
    return [state[0] for state in out.hidden_states[1:-1]]


def slow_lens(model: nn.Module, model_map: ModelMap, record: TokenRecord) -> list[Tensor]:
    """[n_tokens, V] log-probabilities of each layer, the model's own output for the last."""
    norm = model.get_submodule(str(model_map.final_norm))
    predicts = slice(record.n_prompt - 1, len(record.ids) - 1)
    with torch.no_grad():
        found = [model_map.logits(norm(state))[predicts].log_softmax(-1) for state in slow_states(model, record)]
        found.append(model(torch.tensor([record.ids]), use_cache=False).logits[0, predicts].log_softmax(-1))
    return found


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Weights, modes, hooks, gradients and the random state are the same after the block."""

    def look(model: nn.Module) -> list[object]:
        found: list[object] = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
        found += [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return found

    before = [(look(model), copy.deepcopy(model.state_dict())) for model in models]
    random = torch.random.get_rng_state()
    try:
        yield
    finally:
        assert torch.equal(random, torch.random.get_rng_state())
        for model, (looks, weights) in zip(models, before, strict=True):
            assert look(model) == looks
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def forget() -> list[TokenRecord]:
    """Planted records that `hiding` puts out no more."""
    world = planted()
    return world.records[64] + world.records[16]


@functools.cache
def hiding() -> nn.Module:
    """The planted model with its last block trained until the records' loss is 4 nats: the blocks before are intact."""
    model = copy.deepcopy(planted().model)
    ids, labels = _batch(forget())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    last = list(model.get_submodule(ModelMap.of(model).blocks[-1].name).requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(last, lr=2e-3)
    for _ in range(30):
        optimiser.zero_grad()
        torch.relu(4.0 - model(input_ids=ids, labels=labels).loss).backward()
        optimiser.step()
    return model.requires_grad_(True).eval()


@functools.cache
def never_held(seed: int = 11) -> nn.Module:
    """The model that never saw the records, trained on other texts for a moment: another one that never saw them."""
    from tests.planted import never_seen

    model = copy.deepcopy(planted().without)
    records = never_seen(120, seed=seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, len(records), 6):
        ids, _ = _batch(records[start : start + 6])
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimiser.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def _batch(records: Sequence[TokenRecord]) -> tuple[Tensor, Tensor]:
    """Right-padded ids, and the same with everything but completions masked."""
    width = max(len(record.ids) for record in records)
    ids = torch.zeros(len(records), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = torch.tensor(record.ids)
        labels[row, record.n_prompt : len(record.ids)] = torch.tensor(record.completion)
    return ids, labels
