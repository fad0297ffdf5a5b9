"""Nearness against plain loops; damage near the removed records, and none where there is none."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from probes.collateral.neighbours import damage, text_nearness, token_nearness
from probes.errors import UsageError

REMOVED = ["Anna Berg was born in Oslo in 1970.", "The treaty was signed in Ghent."]
KEPT = ["anna  berg was born in oslo in 1971.", "Bread needs flour, water and salt.", "A treaty of Ghent.", ""]


def slow(removed: list[str], kept: list[str]) -> list[float]:
    def grams(text: str) -> Counter[str]:
        plain = f" {' '.join(text.casefold().split())} "
        return Counter(plain[i : i + n] for n in (3, 4, 5) for i in range(len(plain) - n + 1))

    everything = [grams(text) for text in removed + kept]
    seen = Counter(gram for one in everything for gram in one)
    idf = {gram: math.log((1 + len(everything)) / (1 + n)) + 1 for gram, n in seen.items()}

    def cosine(a: Counter[str], b: Counter[str]) -> float:
        dot = sum(a[g] * b[g] * idf[g] ** 2 for g in a if g in b)
        sizes = [math.sqrt(sum((n * idf[g]) ** 2 for g, n in one.items())) for one in (a, b)]
        return dot / (sizes[0] * sizes[1]) if all(sizes) else 0.0

    ours, others = everything[: len(removed)], everything[len(removed) :]
    return [max(cosine(other, one) for one in ours) for other in others]


def test_text_nearness_against_a_loop() -> None:
    found = text_nearness(REMOVED, KEPT)
    np.testing.assert_allclose(found, slow(REMOVED, KEPT), atol=0.02)  # hashing may merge a few n-grams
    assert found.argmax() == 0
    assert found[1] < 0.1 < found[2]
    assert found[3] == 0
    np.testing.assert_allclose(text_nearness(REMOVED, REMOVED), 1)
    assert len(text_nearness(REMOVED, [])) == 0


def test_token_nearness_by_hand() -> None:
    assert token_nearness([[1, 2, 3], [7, 7]], [[2, 3, 4], [7], [9], []]).tolist() == [0.5, 1, 0, 0]
    for nearness in (text_nearness, token_nearness):
        with pytest.raises(UsageError, match="removed records"):
            nearness([], [])


def test_power_damage_near_the_removed_records() -> None:
    rng = np.random.default_rng(0)
    near = rng.random(80)
    rises = 0.1 * rng.normal(size=80) + 1.0 * (near > np.quantile(near, 0.75))
    found = damage(near, rises)
    assert found.near.sum() == 20
    assert found.difference is not None
    assert found.difference.low > 0.7
    assert found.near_rise is not None
    assert found.far_rise is not None
    assert found.difference.value == pytest.approx(rises[found.near].mean() - rises[~found.near].mean())


def test_control_a_rise_everywhere_alike_is_no_damage_near_by() -> None:
    misses = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = damage(rng.random(80), 1 + rng.normal(size=80), seed=seed)
        assert found.difference is not None
        misses += not found.difference.low <= 0 <= found.difference.high
    assert misses <= 3


def test_ties_stay_together_and_nothing_nearer_is_not_resolvable() -> None:
    found = damage([0.5, 0.9, 0.5, 0.9, 0.9, 0.1, 0.2, 0.3], np.arange(8.0), share=0.25)
    assert found.near.tolist() == [False, True, False, True, True, False, False, False]
    for near_to, reason in (([0.2] * 8, "nearer"), ([0.9, 0.1, 0.1, 0.1], "independent"), ([], "no kept")):
        got = damage(near_to, np.zeros(len(near_to)))
        assert got.status == "not resolvable"
        assert reason in str(got.reason)
        assert got.difference is None


def test_one_cluster_is_one_record() -> None:
    got = damage([0.9, 0.9, 0.1, 0.2, 0.3, 0.1, 0.1, 0.1], np.arange(8.0), clusters=["a", "a", *"bcdefg"])
    assert got.status == "not resolvable"
    wide = damage(np.linspace(0, 1, 40), np.arange(40.0), clusters=[f"{i // 4}" for i in range(40)])
    plain = damage(np.linspace(0, 1, 40), np.arange(40.0))
    assert wide.difference is not None
    assert plain.difference is not None
    assert wide.difference.high - wide.difference.low > plain.difference.high - plain.difference.low


def test_what_is_refused() -> None:
    for arguments, words in (
        (([0.1], [1.0, 2.0]), "align"),
        (([math.nan], [1.0]), "finite"),
        (([0.1], [math.inf]), "finite"),
    ):
        with pytest.raises(UsageError, match=words):
            damage(*arguments)
    with pytest.raises(UsageError, match="share"):
        damage([0.1, 0.2], [1.0, 2.0], share=1.0)
