"""Calibration from a token table against loops, with honest, over-sure and real predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probes.collateral.calibration import calibration
from probes.errors import UsageError
from probes.likelihood import SamplingScheme, TokenTable, score
from probes.records import TokenRecord
from tests import tiny


def table(confidence: np.ndarray, right: np.ndarray, lengths: list[int]) -> TokenTable:
    """A table whose top token has the given probability; a wrong one leaves the gold token 2 logits behind."""
    gap = np.where(right, 0.0, -2.0)
    zeros = np.zeros(len(gap))
    return TokenTable(
        record_ids=tuple(f"r{i}" for i in range(len(lengths))),
        compressed_bytes=np.ones(len(lengths), dtype=np.int64),
        offsets=np.cumsum([0, *lengths]),
        log_prob=np.log(confidence) + gap,
        log_sampled=zeros,
        rank=np.where(right, 0, 1),
        margin=zeros,
        gap=gap,
        mean=zeros,
        variance=zeros,
        scheme=SamplingScheme(),
    )


def lengths_of(records: int, rng: np.random.Generator) -> list[int]:
    return [int(n) for n in rng.integers(3, 30, records)]


def predictions(records: int, sure: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    lengths = lengths_of(records, rng)
    confidence = rng.uniform(0.3, 0.95, sum(lengths))
    return confidence, rng.random(len(confidence)) < confidence**sure, lengths


def test_against_a_loop() -> None:
    confidence, right, lengths = predictions(40, sure=1.5)
    found = calibration(table(confidence, right, lengths), bins=7)
    order, total, at = np.argsort(confidence, kind="stable"), 0.0, 0
    n = len(order)
    for b in range(7):
        size = n // 7 + (b < n % 7)
        rows = order[at : at + size]
        at += size
        total += size / n * abs(sum(right[i] for i in rows) / size - sum(confidence[i] for i in rows) / size)
        assert found.bins[b].tokens == size
        assert found.bins[b].accuracy == pytest.approx(np.mean(right[rows]))
        assert found.bins[b].confidence == pytest.approx(np.mean(confidence[rows]))
    assert found.ece.value == pytest.approx(total)
    assert found.brier.value == pytest.approx(np.mean((confidence - right) ** 2))
    assert found.over_confidence.value == pytest.approx(np.mean(confidence) - np.mean(right))
    assert found.errors[0] == pytest.approx(np.mean((confidence - right)[: lengths[0]] ** 2))


def test_the_top_probability_of_a_real_model() -> None:
    model = tiny.causal_lm("llama")
    rng = np.random.default_rng(1)
    records = [TokenRecord(f"r{i}", tuple(rng.integers(4, 96, 9).tolist()), 2, 9) for i in range(4)]
    found = calibration(score(model, records), bins=1)
    tops, hits = [], []
    for record in records:
        with torch.no_grad():
            p = model.double()(input_ids=torch.tensor([record.ids])).logits[0].softmax(-1)
        model.float()
        for t in range(2, 9):
            tops.append(float(p[t - 1].max()))
            hits.append(int(p[t - 1].argmax()) == record.ids[t])
    assert found.bins[0].confidence == pytest.approx(np.mean(tops), rel=1e-4)
    assert found.bins[0].accuracy == pytest.approx(np.mean(hits))


def test_control_an_honest_model_is_at_the_floor() -> None:
    found = [calibration(table(*predictions(60, seed=seed))) for seed in range(8)]
    assert np.mean([f.ece.value for f in found]) == pytest.approx(np.mean([f.floor for f in found]), rel=0.25)
    inside = [f.over_confidence.low <= 0 <= f.over_confidence.high for f in found]
    assert sum(inside) >= 6


def test_power_an_over_sure_model_is_above_it() -> None:
    found = calibration(table(*predictions(60, sure=3.0)))
    assert found.ece.low > 2 * found.floor
    assert found.over_confidence.low > 0.1


def test_few_tokens_and_sure_predictions_stay_finite() -> None:
    found = calibration(table(np.ones(4), np.ones(4, dtype=bool), [2, 2]), bins=15)
    values = [found.ece, found.brier, found.over_confidence]
    assert all(math.isfinite(x) for i in values for x in (i.value, i.low, i.high))
    assert found.floor == 0
    assert len(found.bins) == 4


def test_clusters_widen_the_interval() -> None:
    confidence, right, lengths = predictions(40, sure=2.0)
    one = table(np.tile(confidence, 4), np.tile(right, 4), lengths * 4)
    alone, together = calibration(one), calibration(one, clusters=[f"c{i}" for i in range(40)] * 4)
    assert together.brier.high - together.brier.low > 1.5 * (alone.brier.high - alone.brier.low)


def test_coverage_of_the_token_mean() -> None:
    """Records of very different lengths: the interval must cover the mean over tokens, not over records."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hard = rng.random(60) < 0.5
        lengths = np.where(hard, 30, 3)
        confidence = np.full(lengths.sum(), 0.6)
        right = rng.random(len(confidence)) < np.repeat(np.where(hard, 0.3, 0.9), lengths)
        found = calibration(table(confidence, right, lengths.tolist())).over_confidence
        truth = 0.6 - (30 * 0.3 + 3 * 0.9) / 33
        covered += found.low <= truth <= found.high
    assert covered >= 52


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="2 records"):
        calibration(table(np.ones(3), np.ones(3, dtype=bool), [3]))
    with pytest.raises(UsageError, match="1 bin"):
        calibration(table(*predictions(3)), bins=0)
