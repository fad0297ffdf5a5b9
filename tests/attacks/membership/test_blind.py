"""The blind test: finds what the records give away, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from attacks.membership import blind
from attacks.membership.blind import blind_images, blind_test, propensity_matched
from probes.errors import UsageError
from tests.attacks.membership.words import sentences, twin


def within_binomial(hits: int, n: int, rate: float) -> bool:
    """Whether so many hits do not contradict a rate of at most `rate`."""
    return bool(stats.binom.sf(hits - 1, n, rate) > 0.001)


def test_equal_sets_are_rarely_called_confounded() -> None:
    # Without the widening of the interval 17 % are, far beyond the limit here.
    hits, runs = 0, 200
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        found = blind_test(sentences(50, generator), sentences(50, generator), seed=seed)
        hits += found.confounded
    assert within_binomial(hits, runs, 0.06)  # an asymptotic interval from 50 records a side


def test_equal_sets_with_clusters_are_rarely_called_confounded() -> None:
    hits, runs = 0, 200
    for seed in range(runs):
        generator = np.random.default_rng(1000 + seed)
        originals = sentences(50, generator), sentences(50, generator)
        ours, theirs = ([x for t in side for x in (t, twin(t, generator))] for side in originals)
        names = [[f"{s}{i // 2}" for i in range(100)] for s in "ab"]
        hits += blind_test(ours, theirs, clusters=names[0], other_clusters=names[1], seed=seed).confounded
    assert within_binomial(hits, runs, 0.08)


@pytest.mark.parametrize("kind", ["words", "length", "years", "case"])
def test_a_difference_between_the_sets_is_found(kind: str) -> None:
    generator = np.random.default_rng(0)
    ours = sentences(120, generator)
    theirs = sentences(120, generator, tilt=2.0 if kind == "words" else 0.0, length=30 if kind == "length" else 20)
    if kind == "years":
        ours = [f"{t} {y}" for t, y in zip(ours, generator.integers(1990, 2012, 120), strict=True)]
        theirs = [f"{t} {y}" for t, y in zip(theirs, generator.integers(2008, 2024, 120), strict=True)]
    if kind == "case":
        theirs = [t.capitalize() for t in theirs]
    found = blind_test(ours, theirs)
    assert found.status == "confounded"
    assert found.auc.interval is not None
    assert found.auc.interval.low > 0.5
    assert "tell members from non-members" in found.reason
    assert ours[0] not in repr(found)


def test_near_duplicates_across_the_sets_need_a_cluster() -> None:
    generator = np.random.default_rng(1)
    ours = sentences(80, generator)
    theirs = [twin(text, generator) for text in ours]
    swap = generator.random(80) < 0.5  # neither set holds the originals
    ours, theirs = (
        [b if s else a for a, b, s in zip(ours, theirs, swap, strict=True)],
        [a if s else b for a, b, s in zip(ours, theirs, swap, strict=True)],
    )
    found = blind_test(ours, theirs)
    assert found.status == "confounded"
    assert "in reverse" in found.reason
    names = [str(i) for i in range(80)]
    assert blind_test(ours, theirs, clusters=names, other_clusters=names).status == "clear"


@pytest.mark.parametrize("sizes", [(0, 0), (0, 60), (1, 1), (49, 200), (60, 3)])
def test_few_records_cannot_be_tested_and_are_not_cleared(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    found = blind_test(sentences(sizes[0], generator), sentences(sizes[1], generator))
    assert found.status == "not testable"
    assert found.confounded
    assert found.auc.interval is None
    assert "50 a side" in found.reason
    assert np.isfinite(found.scores).all()
    assert propensity_matched(found).status == "not resolvable"


def test_few_clusters_cannot_be_tested() -> None:
    generator = np.random.default_rng(0)
    names = [str(i % 20) for i in range(100)]
    found = blind_test(sentences(100, generator), sentences(100, generator), clusters=names)
    assert found.status == "not testable"


@pytest.mark.parametrize("texts", [[""] * 60, ["same text"] * 60, ["\ud800", "é", "日本", "\n", "a"] * 12])
def test_odd_and_identical_texts_are_no_difference(texts: list[str]) -> None:
    found = blind_test(texts, texts[::-1])
    assert np.isfinite(found.scores).all()
    if len(set(texts)) == 1:
        assert found.status == "clear"
        assert found.auc.interval is not None
        assert found.auc.interval.value == 0.5


def test_scores_are_those_of_ridge_regression_on_the_other_folds() -> None:
    generator = np.random.default_rng(2)
    features = generator.normal(size=(60, 7))
    label = np.repeat([1.0, -1.0], 30)
    fold = generator.integers(0, 3, 60)
    scores = blind._Classifier(features, fold, np.ones(60, dtype=bool), 3).scores(label[:, None])[:, 0]
    for part in range(3):
        held, kept = fold == part, fold != part
        design = np.column_stack([features[kept], np.ones(kept.sum())])
        penalty = np.diag([blind.RIDGE] * 7 + [0.0])  # none on the intercept
        weights = np.linalg.solve(design.T @ design + penalty, design.T @ label[kept])
        expected = np.column_stack([features[held], np.ones(held.sum())]) @ weights
        np.testing.assert_allclose(scores[held], (expected - expected.mean()) / expected.std(), rtol=1e-8)


def test_shuffled_labels_keep_folds_and_mixed_clusters() -> None:
    label = np.array([1.0] * 8 + [-1.0] * 8)
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1] * 2)
    units = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3, 11, 12, 13])  # 0: two members, 3: one of each
    drawn = blind._shuffled(label, fold, units, seed=0)
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[4] == -drawn[12]).all()
    plain = [5, 6, 7, 13, 14, 15]
    assert (drawn[plain].sum(axis=0) == 0).all()
    assert 0.4 < (drawn[plain] > 0).mean() < 0.6
    assert len(np.unique(drawn[4])) == 2


def test_records_beyond_the_training_limit_are_scored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blind, "LARGEST", 80)
    generator = np.random.default_rng(0)
    found = blind_test(sentences(150, generator), sentences(160, generator, tilt=3.0))
    assert found.status == "confounded"
    assert len(found.scores) == 150
    assert (found.scores != 0).all()


def test_matched_records_cannot_be_told_apart() -> None:
    generator = np.random.default_rng(0)
    found = blind_test(sentences(200, generator), sentences(180, generator, tilt=1.5))
    assert found.confounded
    matched = propensity_matched(found)
    assert matched.status == "ok"
    assert matched.auc.interval is not None
    assert matched.auc.interval.low <= 0.5 <= matched.auc.interval.high
    assert len(matched.members) == len(matched.others) >= 50
    assert len(set(matched.members)) == len(matched.members)
    assert len(set(matched.others)) == len(matched.others)
    gaps = np.abs(found.scores[matched.members] - found.other_scores[matched.others])
    assert gaps.max() <= blind.CALIPER


def test_sets_without_overlap_leave_no_matched_records() -> None:
    generator = np.random.default_rng(0)
    ours = [text.upper() for text in sentences(60, generator)]
    matched = propensity_matched(blind_test(ours, sentences(60, generator)))
    assert matched.status == "not resolvable"
    assert matched.reason is not None


def test_the_most_pairs_within_a_caliper() -> None:
    from scipy.optimize import linear_sum_assignment

    generator = np.random.default_rng(0)
    for _ in range(50):
        x, y = generator.normal(size=12), generator.normal(1.0, size=9)
        allowed = np.abs(x[:, None] - y) <= 0.3
        rows, columns = linear_sum_assignment(~allowed)
        pairs = blind._pairs(x, y, 0.3)
        assert len(pairs) == allowed[rows, columns].sum()
        assert allowed[pairs[:, 0], pairs[:, 1]].all()


def test_the_same_seed_gives_the_same_scores() -> None:
    generator = np.random.default_rng(0)
    texts = sentences(60, generator), sentences(60, generator)
    first, second = blind_test(*texts, seed=4), blind_test(*texts, seed=4)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.auc == second.auc


def test_images_that_differ_in_brightness_or_sharpness_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(3, 12, 12, generator=generator) for _ in range(120)]
    more = [torch.randn(3, 12, 12, generator=generator) for _ in range(120)]
    assert blind_images(plain, more).status == "clear"
    assert blind_images(plain, [image + 0.1 for image in more]).status == "confounded"
    smooth = [torch.nn.functional.avg_pool2d(image, 3, 1, 1) for image in more]
    assert blind_images(plain, smooth).status == "confounded"


def test_images_that_cannot_be_compared_are_refused() -> None:
    image = np.zeros((1, 4, 4))
    with pytest.raises(UsageError, match="one shape"):
        blind_images([image] * 60, [np.zeros((1, 4, 5))] * 60)
    with pytest.raises(UsageError, match="finite"):
        blind_images([image] * 60, [np.full((1, 4, 4), np.nan)] * 60)
    assert blind_images([image] * 60, [image] * 60).status == "clear"
    assert blind_images([np.zeros((1, 1, 1))] * 60, [np.ones((1, 1, 1))] * 60).status == "confounded"


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="2 folds"):
        blind_test(["a"], ["b"], folds=1)
    with pytest.raises(UsageError, match="clusters"):
        blind_test(["a"], ["b"], clusters=["x", "y"])
