"""The graded figures of every stress attack, against `generate`-free arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from probes.errors import UnsupportedError
from probes.memorised import COLUMNS, memorised
from probes.records import ImageRecord, TokenRecord
from tests import tiny


def records(n: int = 5) -> list[TokenRecord]:
    return [TokenRecord(f"r{i}", tuple(3 + (i * 7 + j) % 20 for j in range(4 + i)), 2, 10) for i in range(n)]


def test_texts_against_a_loop_in_float64() -> None:
    model = tiny.causal_lm("llama").double()
    frame = memorised(model, records())
    assert tuple(frame.columns) == COLUMNS
    for row, record in zip(frame.itertuples(), records(), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([record.ids])).logits[0].log_softmax(-1)
        gold = [float(log_p[t - 1, record.ids[t]]) for t in range(record.n_prompt, len(record.ids))]
        top = [int(log_p[t - 1].argmax()) == record.ids[t] for t in range(record.n_prompt, len(record.ids))]
        mean = sum(gold) / len(gold)
        assert row.loss == pytest.approx(-mean, rel=1e-6)
        assert row.probability == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-6)
        assert row.accuracy == pytest.approx(sum(top) / len(top))
        assert row.extracted == all(top)


def test_images_by_their_labels() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.stack([pixels.flatten(1).sum(1), -pixels.flatten(1).sum(1)], dim=1)

    images = [ImageRecord(f"i{k}", torch.full((1, 1, 1), float(v)), 0) for k, v in enumerate((1.0, -1.0))]
    frame = memorised(Fixed(), images)
    assert frame["probability"].tolist() == pytest.approx([0.880797, 0.119203], abs=1e-5)
    assert frame["accuracy"].tolist() == [1.0, 0.0]
    assert frame["extracted"].tolist() == [True, False]


def test_no_records_give_an_empty_frame() -> None:
    assert list(memorised(tiny.causal_lm("llama"), []).columns) == list(COLUMNS)


def test_a_model_that_gives_nan_is_refused() -> None:
    """Noise and rounding can push a model over: one line, not a crash further on."""
    model = tiny.causal_lm("llama")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(UnsupportedError, match="NaN"):
        memorised(model, records())
