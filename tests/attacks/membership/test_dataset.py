"""Dataset inference: its level under no difference, its power, and the edges that shift other tools' data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from attacks.membership.dataset import _ridge, dataset_inference
from probes.errors import UsageError

NAMES = [f"f{i}" for i in range(6)]


def run(x: np.ndarray, y: np.ndarray, **options: object) -> float:
    found = dataset_inference(x, y, names=NAMES, **options)  # type: ignore[arg-type]
    assert found.pvalue is not None
    return found.pvalue


def test_sets_without_a_difference_are_rarely_significant() -> None:
    heavy, clustered, runs = 0, 0, 200
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        x, y = generator.standard_t(1.5, (30, 6)), generator.standard_t(1.5, (40, 6))
        heavy += run(x, y, splits=4, seed=seed) <= 0.05
        names = [str(i // 3) for i in range(90)], [f"o{i // 3}" for i in range(90)]
        x, y = (np.repeat(generator.normal(size=(30, 6)), 3, axis=0) for _ in range(2))
        clustered += run(x, y, clusters=names[0], other_clusters=names[1], splits=2, seed=seed) <= 0.05
    for hits in (heavy, clustered):
        assert stats.binom.sf(hits - 1, runs, 0.05) > 0.001


def test_a_small_difference_of_many_records_is_found() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(300, 6)), generator.normal(size=(300, 6))
    x[:, 1] += 0.3
    x[:, 4] += 0.3
    found = dataset_inference(x, y, names=NAMES)
    assert found.status == "ok"
    assert found.pvalue is not None
    assert found.pvalue < 0.01
    assert found.effect is not None
    assert 0.2 < found.effect < 0.7
    assert set(sorted(found.weights, key=lambda n: -found.weights[n])[:2]) == {"f1", "f4"}
    assert len(found.pvalues) == 10
    assert found.pvalue == pytest.approx(min(1.0, 2 * sorted(found.pvalues)[4]))


def test_lower_scores_separate_too_and_the_weights_say_so() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(200, 6)), generator.normal(size=(200, 6))
    found = dataset_inference(x - 1, y, names=NAMES)
    assert found.pvalue is not None
    assert found.pvalue < 0.01
    assert all(weight < 0 for weight in found.weights.values())


def test_weights_are_those_of_weighted_ridge_regression() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(0.5, 1, (30, 4)), generator.normal(size=(50, 4))
    rows = np.column_stack([np.concatenate([x, y]), np.ones(80)])
    label = np.repeat([1.0, -1.0], [30, 50])
    weight = np.repeat([1 / 60, 1 / 100], [30, 50])
    penalty = np.diag([1 / 80] * 4 + [0.0])
    expected = np.linalg.solve(rows.T @ (weight[:, None] * rows) + penalty, rows.T @ (weight * label))
    np.testing.assert_allclose(_ridge(x, y), expected[:4])


def test_defect_6_records_with_zero_loss_count_and_keep_their_place() -> None:
    generator = np.random.default_rng(0)
    y = generator.normal(-3, 1, (60, 6))
    x = generator.normal(-3, 1, (60, 6))
    x[::2] = 0.0  # every second record perfectly memorised: all its features are zero
    assert run(x, y) < 0.01


def test_infinite_and_constant_features() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 6)), generator.normal(size=(60, 6))
    x[:40, 2] = np.inf
    y[:40, 2] = -np.inf
    x[:, 3] = y[:, 3] = 7.0
    x[:, 5] = y[:, 5] = -np.inf
    x[:30, 4] = y[:35, 4] = 0.0  # more than half alike
    found = dataset_inference(x, y, names=NAMES)
    assert found.pvalue is not None
    assert found.pvalue < 0.01
    assert found.weights["f3"] == found.weights["f5"] == 0.0
    assert all(np.isfinite(weight) for weight in found.weights.values())
    assert x[0, 2] == np.inf  # the caller's array is left alone


def test_clusters_decide_how_much_there_is() -> None:
    generator = np.random.default_rng(3)
    x, y = np.repeat(generator.normal(0.3, 1, (25, 6)), 8, axis=0), np.repeat(generator.normal(size=(25, 6)), 8, axis=0)
    names = [str(i // 8) for i in range(200)], [f"o{i // 8}" for i in range(200)]
    assert run(x, y) < 0.01
    assert run(x, y, clusters=names[0], other_clusters=names[1]) > 0.05
    few = dataset_inference(x, y, names=NAMES, clusters=[str(i // 20) for i in range(200)])
    assert few.status == "not resolvable"
    assert "10 independent audited records" in str(few.reason)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 50), (1, 50), (50, 19)])
def test_few_records_are_not_resolvable(sizes: tuple[int, int]) -> None:
    found = dataset_inference(np.zeros((sizes[0], 6)), np.zeros((sizes[1], 6)), names=NAMES)
    assert found.status == "not resolvable"
    assert found.pvalue is None
    assert found.effect is None
    assert "20 a side" in str(found.reason)


def test_nothing_that_varies_is_not_resolvable() -> None:
    for features in (np.ones((30, 6)), np.full((30, 6), -np.inf)):
        found = dataset_inference(features, features, names=NAMES)
        assert found.status == "not resolvable"
    none = dataset_inference(np.zeros((30, 0)), np.zeros((30, 0)), names=[])
    assert none.status == "not resolvable"
    assert none.weights == {}


def test_one_cluster_across_everything_is_not_resolvable() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 6))
    names = ["all"] * 19 + [None] * 21
    found = dataset_inference(x, y, names=NAMES, clusters=names, other_clusters=names)
    assert found.status == "ok"
    assert 0 < found.pvalue <= 1  # type: ignore[operator]


def test_bad_arguments_are_refused() -> None:
    good = np.zeros((30, 6))
    with pytest.raises(UsageError, match="shape"):
        dataset_inference(np.zeros((30, 5)), good, names=NAMES)
    with pytest.raises(UsageError, match="NaN in 2 records"):
        bad = good.copy()
        bad[:2] = np.nan
        dataset_inference(bad, good, names=NAMES)
    with pytest.raises(UsageError, match="split"):
        dataset_inference(good, good, names=NAMES, splits=0)
    with pytest.raises(UsageError, match="clusters"):
        dataset_inference(good + np.eye(30, 6), good, names=NAMES, clusters=["a"])


def test_the_same_seed_gives_the_same_result() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 6))
    assert dataset_inference(x, y, names=NAMES, seed=5) == dataset_inference(x, y, names=NAMES, seed=5)
    x[:, 0] += 0.7
    assert run(x, y, seed=5) != run(x, y, seed=6)
