"""Counterfactual memorisation: a dense oracle, planted wrong labels, standard errors, and runs that do not tell."""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import pytest
import torch

from attacks import counterfactual as module
from attacks.counterfactual import counterfactual, estimate, fine_tune, performance
from probes.errors import UsageError
from probes.records import ImageRecord, TokenRecord
from tests import tiny


class Recorder:
    """A stand-in for training: keeps every call, and its figures depend on which records were in."""

    def __init__(self, n: int, m: int, noise: float, seed: int = 0) -> None:
        rng = np.random.default_rng((seed, 99))
        self.n, self.noise = n, noise
        self.own = rng.normal(0, 1, n)
        self.cross = rng.normal(0, 1, (n, m))
        self.rng = np.random.default_rng((seed, 98))
        self.included: list[np.ndarray] = []
        self.figures: list[np.ndarray] = []
        self.seeds: list[int] = []

    def train(self, included: np.ndarray, seed: int) -> np.ndarray:
        self.included.append(included.copy())
        self.seeds.append(seed)
        return included

    def score(self, included: np.ndarray) -> np.ndarray:
        figures = np.concatenate([included * self.own, included @ self.cross])
        figures = figures + self.noise * self.rng.normal(size=len(figures)) + 1e3  # a large common offset
        self.figures.append(figures)
        return figures


def dense(included: np.ndarray, figures: np.ndarray) -> np.ndarray:
    """[n, n + m] difference of the mean figures with and without each record, the plain way."""
    return np.array([figures[row].mean(axis=0) - figures[~row].mean(axis=0) for row in included.T])


@pytest.mark.parametrize(("share", "runs"), [(0.5, 12), (0.7, 20), (0.25, 8)])
def test_equals_the_dense_estimate(share: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 20)  # several blocks of records
    world = Recorder(23, 7, 0.3)
    found = counterfactual(23, world.train, world.score, runs, share=share, seed=3, top_k=10)
    expected = dense(np.array(world.included), np.array(world.figures))
    assert found.memorisation == pytest.approx(np.diag(expected[:, :23]).tolist(), abs=1e-9)
    cross = expected[:, 23:]
    assert len({(i.record, i.target) for i in found.influences}) == 10
    assert all(i.influence == pytest.approx(cross[i.record, i.target], abs=1e-9) for i in found.influences)
    # Records that were in the same runs throughout tie, so only the sizes are in a fixed order.
    largest = np.sort(np.abs(cross).ravel())[::-1][:10]
    assert [abs(i.influence) for i in found.influences] == pytest.approx(largest.tolist(), abs=1e-9)


@pytest.mark.parametrize(("share", "parts", "taken"), [(0.5, 2, 1), (0.7, 10, 7), (0.25, 4, 1)])
def test_every_record_is_in_exactly_its_share_of_every_group(share: float, parts: int, taken: int) -> None:
    world = Recorder(41, 0, 0.1)
    found = counterfactual(41, world.train, world.score, 3 * parts, share=share)
    for group in range(3):
        runs = slice(group * parts, (group + 1) * parts)
        assert (np.sum(world.included[runs], axis=0) == taken).all()
        assert len(set(world.seeds[runs])) == 1
    assert len(set(world.seeds)) == 3
    assert (found.runs_in == 3 * taken).all()
    assert (found.runs_out == 3 * (parts - taken)).all()
    sizes = [int(row.sum()) for row in world.included]
    assert max(sizes) - min(sizes) <= taken
    if parts == 2:
        assert (world.included[0] == ~world.included[1]).all()
        assert not (world.included[0] == world.included[2]).all()


def test_errors_are_those_of_the_groups() -> None:
    world = Recorder(15, 3, 0.5)
    found = counterfactual(15, world.train, world.score, 16, seed=1, top_k=5)
    included, figures = np.array(world.included), np.array(world.figures)
    groups = np.array([dense(included[g : g + 2], figures[g : g + 2]) for g in range(0, 16, 2)])  # [8, n, n + m]
    errors = groups.std(axis=0, ddof=1) / math.sqrt(8)
    assert found.standard_error == pytest.approx(np.diag(errors[:, :15]).tolist())
    for influence in found.influences:
        assert influence.standard_error == pytest.approx(errors[influence.record, 15 + influence.target])


def test_errors_shrink_with_the_root_of_the_runs_and_are_true() -> None:
    """The spread of estimates over repetitions is what the standard error says, at 8 and at 128 runs."""
    reported, spread = {}, {}
    for runs in (8, 128):
        worlds = [Recorder(10, 0, 1.0, seed=s) for s in range(60)]
        results = [counterfactual(10, w.train, w.score, runs, seed=s) for s, w in enumerate(worlds)]
        errors = np.array([r.standard_error for r in results], dtype=float)
        misses = np.array([r.memorisation for r in results], dtype=float) - np.array([w.own for w in worlds])
        reported[runs], spread[runs] = math.sqrt((errors**2).mean()), math.sqrt((misses**2).mean())
    assert reported[8] / reported[128] == pytest.approx(4, rel=0.1)
    for runs in (8, 128):
        assert reported[runs] == pytest.approx(spread[runs], rel=0.1)


def test_no_memorisation_is_found_where_there_is_none() -> None:
    """400 records that leave no trace: |t| beyond the 97.5 % point of Student's law in about 5 % of them."""
    world = Recorder(400, 0, 1.0)
    world.own[:] = 0.0
    found = counterfactual(400, world.train, world.score, 20)
    t = np.array(found.memorisation) / np.array(found.standard_error)
    assert abs((np.abs(t) > 2.262).mean() - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)  # 9 degrees of freedom


def logistic(x: np.ndarray, y: np.ndarray, included: np.ndarray) -> np.ndarray:
    """Weights of a lightly regularised logistic regression by Newton's method."""
    x, y = x[included], y[included]
    weights = np.zeros(x.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-2 * np.eye(x.shape[1])
        weights -= np.linalg.solve(hessian, x.T @ (p - y) + 1e-2 * weights)
    return weights


def right_probability(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability of the given label."""
    return 1 / (1 + np.exp(-np.clip((2 * y - 1) * (x @ weights), -30, 30)))


def test_planted_wrong_labels_are_memorised_most() -> None:
    """60 logistic regressions with more features than records in a run, in well under ten seconds."""
    rng, n, wrong = np.random.default_rng(0), 200, 12
    y = (rng.random(n) > 0.5).astype(float)
    x = rng.normal(size=(n, 120))
    x[:, 0] = 5 * (2 * y - 1)  # what a label is told from; the other features only serve to tell records apart
    y[:wrong] = 1 - y[:wrong]
    started = time.process_time()
    found = counterfactual(n, lambda s, _: logistic(x, y, s), lambda w: right_probability(w, x, y), 60)
    assert time.process_time() - started < 10
    ranked = np.argsort(-np.array(found.memorisation))
    assert set(ranked[:wrong].tolist()) == set(range(wrong))
    assert np.mean(found.memorisation[:wrong]) > 3 * np.mean(found.memorisation[wrong:])


def test_influence_finds_the_twin() -> None:
    """A target that equals one training record is influenced by that record most."""
    rng, n = np.random.default_rng(1), 60
    x = rng.normal(size=(n, 200))
    y = (rng.random(n) > 0.5).astype(float)
    both, truth = np.concatenate([x, x[[7, 31]]]), np.concatenate([y, y[[7, 31]]])
    found = counterfactual(n, lambda s, _: logistic(x, y, s), lambda w: right_probability(w, both, truth), 60, top_k=2)
    assert {(i.record, i.target) for i in found.influences} == {(7, 0), (31, 1)}
    assert not counterfactual(9, lambda s, _: s, lambda s: s.astype(float), 2, top_k=2).influences  # no targets
    for influence in found.influences:
        assert influence.influence == pytest.approx(found.memorisation[influence.record])
        assert influence.standard_error == pytest.approx(found.standard_error[influence.record])


def test_a_record_in_all_or_no_runs_has_a_reason_and_no_number() -> None:
    """The published code divides by a small epsilon here and returns a number."""
    included = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 1, 1]], dtype=bool)
    figures = np.arange(15.0).reshape(3, 5)
    found = estimate(included, figures, top_k=9)
    assert found.memorisation[:2] == found.standard_error[:2] == [None, None]
    assert found.reasons == {0: "in all of 3 runs", 1: "in none of 3 runs"}
    assert found.memorisation[2] == pytest.approx(figures[[0, 2], 2].mean() - figures[1, 2])
    assert found.standard_error[2] is None  # a single run without it
    assert {i.record for i in found.influences} == {2, 3}


def test_runs_made_elsewhere() -> None:
    rng = np.random.default_rng(4)
    included, figures = rng.random((50, 12)) < 0.7, rng.normal(size=(50, 15))
    found = estimate(included, figures, top_k=4)
    assert found.memorisation == pytest.approx(np.diag(dense(included, figures)[:, :12]).tolist())
    for i in range(12):
        a, b = figures[included[:, i], i], figures[~included[:, i], i]
        assert found.standard_error[i] == pytest.approx(math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        assert (found.runs_in[i], found.runs_out[i]) == (len(a), len(b))
    for influence in found.influences:
        inside, column = included[:, influence.record], figures[:, 12 + influence.target]
        a, b = column[inside], column[~inside]
        assert influence.standard_error == pytest.approx(math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))


def test_influences_of_barely_memorised_records_can_be_left_out() -> None:
    world = Recorder(20, 5, 0.1)
    found = counterfactual(20, world.train, world.score, 10, top_k=100, minimum=0.5)
    kept = {i for i, m in enumerate(found.memorisation) if m is not None and m >= 0.5}
    assert {i.record for i in found.influences} == kept
    assert len(found.influences) == 5 * len(kept)


def test_one_group_gives_no_standard_error() -> None:
    world = Recorder(6, 1, 0.1)
    found = counterfactual(6, world.train, world.score, 2, top_k=1)
    assert found.standard_error == [None] * 6
    assert found.influences[0].standard_error is None
    assert None not in found.memorisation


def test_same_seed_same_result() -> None:
    worlds = [Recorder(9, 2, 0.2) for _ in range(2)]
    a, b = (counterfactual(9, w.train, w.score, 8, seed=5, top_k=3) for w in worlds)
    assert a.memorisation == b.memorisation
    assert a.influences == b.influences
    other = Recorder(9, 2, 0.2)
    counterfactual(9, other.train, other.score, 8, seed=6)
    assert not (np.array(other.included) == np.array(worlds[0].included)).all()


def test_bad_arguments() -> None:
    world = Recorder(10, 0, 0.1)
    for share in (0.0, 1.0, 0.01, -1.0, math.nan):
        with pytest.raises(UsageError, match="share"):
            counterfactual(10, world.train, world.score, 4, share=share)
    with pytest.raises(UsageError, match="multiple of 2"):
        counterfactual(10, world.train, world.score, 5)
    with pytest.raises(UsageError, match="multiple of 2"):
        counterfactual(10, world.train, world.score, 0)
    with pytest.raises(UsageError, match="at least 2 records"):
        counterfactual(1, world.train, world.score, 4)
    with pytest.raises(UsageError, match="figures of 10 records"):
        counterfactual(10, world.train, lambda _: np.zeros(9), 4)
    with pytest.raises(UsageError, match="not finite"):
        counterfactual(10, world.train, lambda _: np.full(10, np.nan), 4)
    with pytest.raises(UsageError, match="one row"):
        estimate(np.ones((2, 3)), np.zeros((3, 3)))
    with pytest.raises(UsageError, match="one row"):
        estimate(np.ones((0, 3)), np.zeros((0, 3)))
    with pytest.raises(UsageError, match="influences"):
        counterfactual(10, world.train, lambda _: np.zeros(10), 4, top_k=-1)
    with pytest.raises(UsageError, match="above 0"):
        fine_tune(lambda: tiny.causal_lm("llama"), [], epochs=1, learning_rate=1e-3)
    with pytest.raises(UsageError, match="a figure among"):
        performance([], "loss")  # type: ignore[arg-type]


def test_a_record_with_copies_is_not_counterfactually_memorised() -> None:
    """Four records occur once, three eight times: all are learned, only the former because they were read."""
    rng = np.random.default_rng(0)
    texts = [tuple(int(t) for t in rng.integers(4, 94, 7)) for _ in range(7)]
    occurrences = [*range(4), *(k for k in range(4, 7) for _ in range(8))]
    records = [TokenRecord(f"r{i}", texts[k], 2, 9) for i, k in enumerate(occurrences)]
    base = tiny.causal_lm("llama", hidden_size=48, num_hidden_layers=2, head_dim=12)
    before = {name: p.clone() for name, p in base.named_parameters()}
    state = torch.get_rng_state()
    train = fine_tune(lambda: copy.deepcopy(base), records, epochs=25, learning_rate=5e-3, batch_size=4)
    found = counterfactual(len(records), train, performance(records, "probability"), 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not base.training
    assert min(found.memorisation[:4]) > 0.5
    assert max(abs(x) for x in found.memorisation[4:]) < 0.1


def test_the_trainer_repeats_itself_and_is_plain_adamw() -> None:
    records = [TokenRecord(f"r{i}", (5, 6 + i, 9, 20 + i), 1 + i % 2, 4) for i in range(5)]
    included = np.array([True, False, True, True, False])

    def factory() -> torch.nn.Module:
        return tiny.causal_lm("llama")

    train = fine_tune(factory, records, epochs=2, learning_rate=1e-2, batch_size=8)
    first, second = train(included, 3), train(included, 3)
    expected = factory()
    optimiser = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimiser.zero_grad()
        losses = []
        for record in (r for r, there in zip(records, included, strict=True) if there):
            logits = expected(torch.tensor([record.ids])).logits[0, record.n_prompt - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(record.completion), reduction="none"))
        torch.cat(losses).mean().backward()
        optimiser.step()
    for a, b, c in zip(first.parameters(), second.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in first.parameters())


@pytest.mark.parametrize("figure", ["accuracy", "probability", "log_probability"])
def test_classifiers_too(figure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [ImageRecord(f"i{i}", torch.randn(3, 4, 4, generator=generator), i % 3) for i in range(12)]

    def factory() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))

    train = fine_tune(factory, images[:9], epochs=15, learning_rate=2e-2, batch_size=4)
    found = counterfactual(9, train, performance(images, figure), 10, top_k=1)  # type: ignore[arg-type]
    assert np.mean(found.memorisation) > 0.1
    assert all(0 <= i.target < 3 for i in found.influences)


def test_no_ids_in_a_repr() -> None:
    assert repr(estimate(np.eye(3), np.zeros((3, 3)))) == "Counterfactual(records=3, runs=3)"
