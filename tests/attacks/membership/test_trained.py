"""Every score on a model that was trained on half of the records: members rank higher, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.membership import (
    SCORES,
    Inputs,
    choose,
    compute,
    dataset_inference,
    evaluate,
    flag,
    gradient_norm,
    prefixed_records,
)
from probes.likelihood import score
from probes.records import TokenRecord
from tests import tiny

N = 60


def sequences(n: int, name: str, seed: int) -> list[TokenRecord]:
    rows = np.random.default_rng(seed).integers(4, 90, (n, 14))
    return [TokenRecord(f"{name}{i}", tuple(int(t) for t in row), 3, 20) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Scores of members and non-members, by the trained model and by the one it was trained from."""
    base, model = tiny.causal_lm("llama", seed=1), tiny.causal_lm("llama", seed=1)
    members, others, population = (sequences(N, name, seed) for name, seed in (("m", 0), ("o", 1), ("z", 2)))
    shots = sequences(2, "s", 3)
    seen = sequences(2, "t", 4)
    tiny.train(model, [record.ids for record in members + seen], steps=110, lr=1e-2)

    def scores(net: torch.nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        def inputs(records: list[TokenRecord]) -> Inputs:
            changed = [TokenRecord(r.record_id, tuple((t + 7) % 96 for t in r.ids), 3, 20) for r in records]
            return Inputs(
                table=score(net, records),
                lower=score(net, changed),
                prefixed=score(net, prefixed_records(records, shots)),
                prefixed_members=score(net, prefixed_records(records, seen)),
                reference=score(base, records),
                population=(score(net, population), score(base, population)),
                gradient=gradient_norm(net, records),
            )

        (ours, missing), (theirs, _) = compute(inputs(members)), compute(inputs(others))
        assert not missing
        return {name: (ours[name], theirs[name]) for name in SCORES}

    return {"trained": scores(model), "base": scores(base)}


@pytest.mark.parametrize("name", SCORES)
def test_members_score_higher_on_the_model_that_saw_them(measured, name: str) -> None:
    found = evaluate(*measured["trained"][name])
    assert found.auc.interval is not None
    assert found.null is not None
    assert found.auc.interval.value > found.null.high
    assert found.pvalue is not None
    assert found.pvalue < 0.001
    strong = name not in ("recall", "con_recall", "surprising")
    assert not strong or found.auc.interval.value > 0.95


def test_no_score_separates_on_the_model_that_saw_neither(measured) -> None:
    found = choose(measured["base"])
    assert found.evaluation is not None
    assert min(found.adjusted.values()) > 0.05
    for name, pair in measured["base"].items():
        assert np.isfinite(pair[0]).all(), name


def test_members_are_flagged_and_never_seen_records_are_not(measured) -> None:
    ours, theirs = measured["trained"]["loss"]
    assert flag(ours, theirs).flagged.mean() > 0.9
    ours, theirs = measured["base"]["loss"]
    assert flag(ours, theirs).flagged.mean() == 0


def test_the_set_as_a_whole_is_found_only_where_it_was_seen(measured) -> None:
    names = ["loss", "zlib", "min_k", "min_k_plus_plus", "surprising"]
    for where, expected in (("trained", True), ("base", False)):
        ours, theirs = (np.column_stack([measured[where][name][side] for name in names]) for side in (0, 1))
        found = dataset_inference(ours, theirs, names=names)
        assert found.pvalue is not None
        assert (found.pvalue < 0.01) == expected
