"""Statuses of attacks on an edit's durability: every branch, and error rates of the whole family by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unlearn.test_criteria import measured, table
from unlearn.evidence import stress
from unlearn.evidence.criteria import Evidence, claim_level, evaluate, verdict
from unlearn.evidence.stress import Arms, Judged, judge, summarise, survives
from unlearn.requests.presets import Criterion

F, C, CONCENTRATION = 40, 60, 8.0


def draw(rng: np.random.Generator, mean: float, n: int) -> np.ndarray:
    """[n] figures in (0, 1) with this mean."""
    return rng.beta(mean * CONCENTRATION, (1 - mean) * CONCENTRATION, n)


def arms(
    seed: int = 0,
    *,
    o: float = 0.9,
    u: float = 0.1,
    n: float = 0.1,
    r: float | None = None,
    plain: float | None = None,
    same: bool = False,
) -> Arms:
    """Arms with these means; with `same` the edited copy is the reference, record by record."""
    rng = np.random.default_rng(seed)
    edited, never = draw(rng, u, F), draw(rng, n, C)
    other = None if r is None else edited if same else draw(rng, r, F)
    return Arms(
        o=draw(rng, o, F),
        u=edited,
        n=never,
        r=other,
        n_plain=never if plain is None else draw(rng, plain, C),
        bounds=(0.0, 1.0),
    )


def status(found: Arms, family: int = 1, **more: Any) -> str:
    return judge(found, None, None, family=family, seed=0, **more).status


def test_each_status_is_reached() -> None:
    assert status(arms(u=0.1, n=0.1)) == "resists"
    assert status(arms(u=0.6, n=0.1, r=0.1)) == "recovers"
    assert status(arms(u=0.6, n=0.1)) == "recovers"
    assert status(arms(o=0.2, n=0.1)) == "not testable"
    assert status(arms(u=0.6, n=0.5, plain=0.1)) == "re-teaches"
    assert status(arms(u=0.22, n=0.1)) in ("undecided", "recovers")
    assert status(arms(u=0.19, n=0.1), family=20) == "undecided"


def test_a_reference_that_gives_as_much_back_is_no_sign_of_hiding() -> None:
    """40 % of removed sequences are completed after exact retraining: R is not 0 (arXiv 2503.17514)."""
    found = judge(arms(u=0.5, n=0.1, r=0.5, same=True), None, None, family=1, seed=0)
    assert found.status == "undecided"
    assert "reference" in found.reason
    assert found.over_reference is not None
    assert found.over_reference["value"] == 0


def test_a_small_shift_of_the_controls_is_not_called_hidden() -> None:
    """Residual 4 %, beyond chance with many records: below the margin, so it is no finding."""
    rng = np.random.default_rng(0)
    many = Arms(draw(rng, 0.9, 4000), draw(rng, 0.13, 4000), draw(rng, 0.1, 4000), None, None, (0.0, 1.0))
    found = judge(many, None, None, family=1, seed=0)
    assert found.low is not None
    assert found.low > 0
    assert found.status == "resists"


def test_records_that_an_arm_lacks_are_left_out() -> None:
    whole = arms(u=0.6)
    half = np.arange(F) % 2 == 0
    part = Arms(
        np.where(half, whole.o, np.nan), np.where(half, whole.u, np.nan), whole.n, None, whole.n_plain, whole.bounds
    )
    taken = Arms(whole.o[half], whole.u[half], whole.n, None, whole.n_plain, whole.bounds)
    assert judge(part, None, None, family=3, seed=1) == judge(taken, None, None, family=3, seed=1)


@pytest.mark.parametrize("empty", ["u", "n"])
def test_an_arm_without_a_record_is_not_testable(empty: str) -> None:
    found = arms()
    gone = {"o": found.o, "u": found.u, "n": found.n} | {empty: np.full(F if empty == "u" else C, np.nan)}
    judged = judge(Arms(**gone, r=None, n_plain=None, bounds=(0.0, 1.0)), None, None, family=1, seed=0)
    assert judged.status == "not testable"


def test_clusters_widen_the_bounds() -> None:
    found = arms(u=0.3)
    alone = judge(found, None, None, family=1, seed=0)
    few = judge(found, [f"g{i // 10}" for i in range(F)], [f"h{i // 10}" for i in range(C)], family=1, seed=0)
    assert alone.low is not None
    assert alone.high is not None
    assert few.low is None or few.low < alone.low
    assert few.high is None or few.high > alone.high


def test_a_larger_family_widens_the_bounds() -> None:
    one, many = (judge(arms(u=0.3), None, None, family=k, seed=0) for k in (1, 20))
    assert one.low is not None
    assert many.low is not None
    assert one.high is not None
    assert many.high is not None
    assert many.low < one.low
    assert many.high > one.high


@pytest.mark.parametrize("reference", [True, False])
def test_false_alarms_of_a_family_of_attacks(reference: bool) -> None:
    """A forgotten set, four attacks, 200 repetitions: any of them "recovers" in at most 5 % of the runs."""
    alarms = 0
    for run in range(200):
        found = [arms(1000 * run + k, u=0.1, n=0.1, r=0.1 if reference else None, same=reference) for k in range(4)]
        alarms += any(status(one, family=4) == "recovers" for one in found)
    assert alarms <= 17  # 99 % bound of a binomial with 200 and 0.05


def test_a_hidden_set_is_seldom_called_resistant() -> None:
    """A residual of 0.2, four attacks, 200 repetitions: any of them "resists" in at most 5 % of the runs."""
    wrong = 0
    for run in range(200):
        found = [arms(5000 + 1000 * run + k, u=0.26, n=0.1) for k in range(4)]
        wrong += any(status(one, family=4) == "resists" for one in found)
    assert wrong <= 17


def test_power_at_half_of_what_stood_out() -> None:
    assert all(status(arms(seed, u=0.5, n=0.1, r=0.1), family=8) == "recovers" for seed in range(20))


def judged(**statuses: str) -> dict[str, Judged]:
    names = {"relearn": "recovery.relearning", "round": "recovery.quantisation", "lens": "hidden_knowledge.lens"}
    return {names[key]: Judged(value, "because", 0.0, 0.05) for key, value in statuses.items()}  # type: ignore[arg-type]


def test_the_finding_over_all_attacks() -> None:
    def finding(**statuses: str) -> str:
        return str(summarise(judged(**statuses), [])["finding"])

    assert finding(relearn="resists", round="resists") == "not hidden"
    assert finding(relearn="recovers", round="resists") == "hidden"
    assert finding(relearn="undecided", round="resists") == "undecided"
    assert finding(relearn="re-teaches", round="not testable") == "not tested"
    assert finding(relearn="re-teaches", round="resists") == "not hidden"
    assert finding() == "not tested"


def test_surviving_takes_one_attack_of_each_kind() -> None:
    assert survives(summarise(judged(relearn="resists", round="resists", lens="resists"), []))
    assert not survives(summarise(judged(relearn="resists", round="resists"), []))
    assert not survives(summarise(judged(relearn="resists", round="resists", lens="undecided"), []))
    assert not survives(summarise(judged(relearn="re-teaches", round="resists", lens="resists"), []))


def document(status_: str, value: float, low: float, high: float) -> dict[str, Any]:
    residual = {
        "value": value,
        "unit": "share of O - N",
        "n": 100,
        "ci_low": low,
        "ci_high": high,
        "ci_level": 0.95,
        "direction": "lower",
        "status": "ok",
        "reason": None,
    }
    return {"residual": residual, "stress": Judged(status_, "because", low, high).as_dict(0.95)}  # type: ignore[arg-type]


def criterion(attack: str = "all", limit: float = 0.1) -> Criterion:
    return Criterion(id="C4", metric="residual", attack=attack, test="upper95", max=limit)


def evidence(attacks: dict[str, dict[str, Any]], *, reference: bool = False) -> Evidence:
    found = {name: Judged(one["stress"]["status"], "because", 0.0, 0.0) for name, one in attacks.items()}
    current = measured(records=table(40), control=table(40))
    other = measured("sha256:1", records=table(40)) if reference else None
    return Evidence(
        "causal_lm", current, measured("sha256:2", records=table(40)), other, 0, attacks, summarise(found, [])
    )


def row(attack: str, attacks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return evaluate(criterion(attack), evidence(attacks))


NAMES = ("recovery.relearning", "recovery.quantisation", "hidden_knowledge.lens")
RESISTS = document("resists", 0.01, -0.05, 0.06)
RECOVERS = document("recovers", 0.63, 0.5, 0.75)
OPEN = document("undecided", 0.1, -0.1, 0.3)


def test_a_criterion_on_the_residual() -> None:
    assert row("all", {NAMES[0]: RESISTS, NAMES[1]: RESISTS})["status"] == "met"
    assert row("all", {NAMES[0]: RESISTS, NAMES[1]: OPEN})["status"] == "inconclusive"
    worst = row("all", {NAMES[0]: RECOVERS, NAMES[1]: RESISTS})
    assert worst["status"] == "not met"
    assert worst["observed"]["value"] == 0.63
    assert NAMES[0] in worst["reason"]
    assert row(NAMES[1], {NAMES[0]: RECOVERS, NAMES[1]: RESISTS})["status"] == "met"
    assert row("all", {})["status"] == "inconclusive"
    assert row(NAMES[1], {NAMES[0]: RESISTS})["status"] == "inconclusive"
    taught = document("re-teaches", 0.4, 0.2, 0.6)
    assert row(NAMES[0], {NAMES[0]: taught})["status"] == "inconclusive"
    assert verdict([worst]) == "criteria not met"


def level(attacks: dict[str, dict[str, Any]], *, equivalent: bool) -> str | None:
    rows = [{"test": "equivalence", "against": "reference", "status": "met" if equivalent else "inconclusive"}]
    return claim_level(rows, evidence(attacks, reference=True))


def test_claim_levels() -> None:
    """E3 takes equivalence and every kind of attack resisting; an attack that recovers leaves E1 at most."""
    every = dict.fromkeys(NAMES, RESISTS)
    assert level(every, equivalent=True) == "E3"
    assert level(every, equivalent=False) == "E1"
    assert level({NAMES[0]: RESISTS}, equivalent=True) == "E2"
    assert level(every | {NAMES[0]: OPEN}, equivalent=True) == "E2"
    assert level(every | {NAMES[0]: RECOVERS}, equivalent=True) == "E1"
    assert level({}, equivalent=True) == "E2"


def test_constants_are_those_of_the_documents() -> None:
    assert (stress.ERROR, stress.MARGIN, stress.TEACHES) == (0.05, 0.10, 0.10)
