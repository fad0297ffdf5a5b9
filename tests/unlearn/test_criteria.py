"""Criteria, verdict, claim level, residuals: every branch on tables made by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from scipy import stats

from probes.errors import UsageError
from unlearn.evidence import criteria as judging
from unlearn.evidence.measure import Measured
from unlearn.evidence.metrics import figure, find
from unlearn.requests.presets import Criterion

RETAINED = {
    "metric": "loss",
    "aggregate": "mean",
    "set": "retain",
    "test": "noninferiority",
    "against": "before",
    "margin": 0.1,
}


def table(n: int, emitted: int = 0, probability: float = 0.1, loss: float = 2.0, spread: float = 0.01) -> pd.DataFrame:
    wobble = [spread * ((i % 5) - 2) for i in range(n)]
    return pd.DataFrame(
        {
            "record_id": [f"r{i}" for i in range(n)],
            "emitted": [i < emitted for i in range(n)],
            "greedy": ["extracted" if i < emitted else "not" for i in range(n)],
            "probability": [probability + w for w in wobble],
            "loss": [loss + w for w in wobble],
            "extraction_strength": [0.05 + w for w in wobble],
            "token_accuracy": [0.4 + w for w in wobble],
            "log_p_z": [-40.0] * n,
            "min_k": [-4.0 + w for w in wobble],
            "min_k_plus_plus": [-1.0 + w for w in wobble],
            "zlib_ratio": [0.02 + w / 100 for w in wobble],
            "group": pd.Series([None] * n, dtype=object),
        }
    )


def measured(digest: str = "sha256:0", **tables: pd.DataFrame) -> Measured:
    return Measured("causal_lm", digest, tables, {"seed": 0}, {})


def evidence(current: Measured, before: Measured | None = None, reference: Measured | None = None) -> judging.Evidence:
    return judging.Evidence("causal_lm", current, before, reference, 0)


def judge(found: judging.Evidence, **fields: Any) -> tuple[str, str]:
    criterion = Criterion(**({"id": "C", "metric": "extraction.greedy", "aggregate": "rate"} | fields))
    row = judging.evaluate(criterion, found)
    return row["status"], row["reason"]


@pytest.mark.parametrize(
    ("n", "hits", "status"), [(29, 0, "met"), (28, 0, "inconclusive"), (30, 2, "inconclusive"), (30, 8, "not met")]
)
def test_a_bounded_rate(n: int, hits: int, status: str) -> None:
    found = evidence(measured(records=table(n, hits)))
    assert judge(found, test="upper95", max=0.1)[0] == status
    upper = stats.binomtest(hits, n, alternative="less").proportion_ci(0.95, "exact").high
    assert (upper <= 0.1) == (status == "met")


def test_too_few_records_say_how_many_would_do() -> None:
    status, reason = judge(evidence(measured(records=table(10))), test="upper95", max=0.01)
    assert status == "inconclusive"
    assert "0 of 10" in reason
    assert "n = 299" in reason


def test_a_point_value_makes_no_allowance() -> None:
    found = evidence(measured(records=table(10, 1)))
    assert judge(found, test="point", max=0.1)[0] == "met"
    assert judge(found, test="point", max=0.09)[0] == "not met"


def test_the_worst_record_needs_many_prompts() -> None:
    found = evidence(measured(records=table(24)))
    status, reason = judge(found, test="upper95", aggregate="worst", max=0.01)
    assert status == "inconclusive"
    assert "615 prompts" in reason
    assert judge(found, metric="probability", aggregate="worst", test="point", max=0.2)[0] == "met"
    assert judge(found, metric="probability", aggregate="worst", test="point", max=0.1)[0] == "not met"


def test_no_worse_than_the_control() -> None:
    fields = {
        "metric": "probability",
        "aggregate": "mean",
        "test": "noninferiority",
        "against": "control",
        "margin": 0.05,
    }
    control = table(30, probability=0.1)
    for probability, status in ((0.1, "met"), (0.02, "met"), (0.3, "not met")):
        assert (
            judge(evidence(measured(records=table(30, probability=probability), control=control)), **fields)[0]
            == status
        )
    wide = evidence(measured(records=table(6, probability=0.1, spread=0.04), control=table(6, spread=0.04)))
    assert judge(wide, **fields)[0] == "inconclusive"
    assert judge(evidence(measured(records=table(30))), **fields) == ("inconclusive", "no control to compare with")


def test_retained_behaviour_is_better_the_other_way() -> None:
    before = measured(digest="sha256:1", records=table(5), retain=table(30, loss=2.0))
    for loss, status in ((2.0, "met"), (1.0, "met"), (2.5, "not met")):
        found = evidence(measured(records=table(5), retain=table(30, loss=loss, spread=0.02)), before)
        assert judge(found, **RETAINED)[0] == status, loss


def test_an_edit_that_changed_nothing_keeps_what_was_retained() -> None:
    same = measured(records=table(5), retain=table(30))
    assert judge(evidence(same, same), **RETAINED) == (
        "met",
        "the checkpoint has the weights of before: nothing can differ",
    )


def test_equivalence_is_not_the_absence_of_a_difference() -> None:
    fields = {"metric": "loss", "aggregate": "mean", "test": "equivalence", "against": "reference", "margin": 0.1}
    reference = measured(digest="sha256:1", records=table(30, loss=2.0))
    near, far = (measured(records=table(30, loss=loss, spread=0.02)) for loss in (2.05, 3.0))
    assert judge(evidence(near, None, reference), **fields)[0] == "met"
    assert judge(evidence(far, None, reference), **fields)[0] == "not met"
    noisy = table(4, loss=2.05)
    noisy["loss"] += [0.3, -0.3, 0.4, -0.4]
    noise = evidence(measured(records=noisy), None, measured(digest="sha256:1", records=table(4)))
    assert judge(noise, **fields)[0] == "inconclusive"  # p > 0.05, and still no evidence of equivalence
    assert judge(evidence(measured(records=table(30))), **fields)[0] == "inconclusive"


def rows(*statuses: str, required: bool = True) -> list[dict[str, Any]]:
    return [{"status": s, "required": required, "test": "upper95", "against": None} for s in statuses]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["met", "met"], "criteria met"),
        (["met", "not met", "inconclusive"], "criteria not met"),
        (["met", "inconclusive"], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_verdicts(statuses: list[str], expected: str) -> None:
    assert judging.verdict(rows(*statuses)) == expected


def test_what_is_not_required_does_not_decide() -> None:
    assert judging.verdict(rows("met") + rows("not met", required=False)) == "criteria met"
    assert judging.verdict(rows("not met", required=False)) == "inconclusive"


def test_claim_levels() -> None:
    before = measured(records=table(20, 20, 0.9))
    clean, dirty = measured(records=table(20)), measured(records=table(20, 1))
    equal = [{"status": "met", "required": True, "test": "equivalence", "against": "reference"}]
    unequal = [equal[0] | {"status": "inconclusive"}]
    assert judging.claim_level(rows("met"), evidence(dirty, before)) == "E0"
    assert judging.claim_level(rows("met"), evidence(clean, before)) == "E1"
    assert judging.claim_level(equal, evidence(clean, before)) == "E2"
    assert judging.claim_level(unequal, evidence(clean, before)) == "E1"
    assert judging.claim_level(equal, evidence(dirty, before)) == "E0"
    assert judging.claim_level(equal, evidence(clean)) is None  # an audit claims nothing


def test_residuals() -> None:
    before = measured(records=table(20, 20, probability=0.9))
    current = measured(records=table(20, 0, probability=0.5), control=table(20, 0, probability=0.1))
    arms = judging.arms(evidence(current, before))
    assert arms["probability"]["residual"]["status"] == "ok"
    assert arms["probability"]["residual"]["value"] == pytest.approx(0.5)
    assert arms["loss"]["residual"]["status"] == "not testable"  # no fixed range
    faint = judging.arms(evidence(current, measured(records=table(20, 0, probability=0.2))))
    assert faint["probability"]["residual"]["status"] == "not testable"  # O - N below 0.2
    assert faint["probability"]["R"] is None


def test_overshooting_is_flagged() -> None:
    before = measured(records=table(20))
    control = table(20, loss=2.0)
    assert judging.over_forgetting(evidence(measured(records=table(20, loss=4.0), control=control), before))["flag"]
    assert not judging.over_forgetting(evidence(measured(records=table(20, loss=2.0), control=control), before))["flag"]
    assert not judging.over_forgetting(evidence(measured(records=table(20, loss=0.5), control=control), before))["flag"]


def test_no_interval_vanishes_at_zero_events() -> None:
    shown = figure(find("causal_lm", "extraction.greedy"), table(20), "records")
    assert shown["value"] == 0.0
    assert shown["ci_low"] == 0.0
    assert shown["ci_high"] == pytest.approx(0.1684, abs=1e-4)
    constant = table(20, spread=0.0)
    shown = figure(find("causal_lm", "probability"), constant, "records")
    assert shown["ci_high"] > shown["value"] > shown["ci_low"]


def test_groups_widen_the_interval() -> None:
    grouped = table(40, 20)
    grouped["group"] = [f"g{i // 10}" for i in range(40)]  # four clusters, two all hits, two none
    alone = figure(find("causal_lm", "extraction.greedy"), table(40, 20), "records")
    clustered = figure(find("causal_lm", "extraction.greedy"), grouped, "records")
    assert clustered["ci_high"] - clustered["ci_low"] > 1.5 * (alone["ci_high"] - alone["ci_low"])


def test_a_criterion_of_another_task_or_stage_is_refused() -> None:
    correct = Criterion(id="C", metric="correct", aggregate="rate", test="point", max=0.1)
    with pytest.raises(UsageError, match="expected a criterion on one of"):
        judging.check([correct], "causal_lm", auditing=True)
    before = Criterion(id="C", metric="loss", aggregate="mean", test="noninferiority", against="before", margin=0.1)
    with pytest.raises(UsageError, match="control or reference"):
        judging.check([before], "causal_lm", auditing=True)
    judging.check([before], "causal_lm", auditing=False)


def test_metric_names_are_those_a_request_may_use() -> None:
    from unlearn.evidence.metrics import metrics_of
    from unlearn.requests.presets import BINARY, METRICS, SHARES

    for task in ("causal_lm", "image_classification"):
        assert {metric.name for metric in metrics_of(task)} == METRICS[task]
        assert {metric.name for metric in metrics_of(task) if metric.binary} == BINARY[task]
        assert {metric.name for metric in metrics_of(task) if metric.bounds == (0.0, 1.0)} == SHARES[task]
