"""Splits that respect clusters."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.membership.folds import folds, joint_codes, representatives
from probes.errors import UsageError


def test_clusters_stay_together_across_both_sets() -> None:
    generator = np.random.default_rng(0)
    ours = [str(x) if x < 12 else None for x in generator.integers(0, 15, 60)]
    theirs = [str(x) if x < 12 else None for x in generator.integers(6, 18, 45)]
    a, b = folds(60, 45, ours, theirs, 4, seed=1)
    part: dict[str, set[int]] = {}
    for name, where in [*zip(ours, a, strict=True), *zip(theirs, b, strict=True)]:
        if name is not None:
            part.setdefault(name, set()).add(int(where))
    assert all(len(where) == 1 for where in part.values())
    assert set(a) == set(b) == {0, 1, 2, 3}


@pytest.mark.parametrize("parts", [2, 5])
def test_without_clusters_every_part_has_the_same_share(parts: int) -> None:
    a, b = folds(53, 102, None, None, parts, seed=0)
    for side in (a, b):
        counts = np.bincount(side, minlength=parts)
        assert counts.max() - counts.min() <= 1


def test_the_seed_decides() -> None:
    assert (folds(40, 40, None, None, 2, 0)[0] == folds(40, 40, None, None, 2, 0)[0]).all()
    assert (folds(40, 40, None, None, 2, 0)[0] != folds(40, 40, None, None, 2, 1)[0]).any()


def test_records_without_a_cluster_are_their_own() -> None:
    np.testing.assert_array_equal(joint_codes(3, 2, ["g", None, None], ["g", None]), [0, 1, 2, 0, 3])
    np.testing.assert_array_equal(joint_codes(2, 1, None, ["g"]), [0, 1, 2])
    assert joint_codes(0, 0, None, None).shape == (0,)
    assert folds(0, 0, None, None, 2, 0)[0].shape == (0,)


def test_one_record_of_each_cluster() -> None:
    names = ["a", "a", None, "b", None, "a", "b"]
    found = representatives(7, names, seed=3)
    assert sorted(str(names[i]) for i in found) == ["None", "None", "a", "b"]
    assert list(found) == sorted(found)
    assert len({tuple(representatives(7, names, seed=s)) for s in range(20)}) > 1
    np.testing.assert_array_equal(representatives(3, None, 0), [0, 1, 2])


def test_clusters_of_another_length_are_refused() -> None:
    with pytest.raises(UsageError, match="other_clusters for 2 records"):
        folds(1, 2, ["a"], ["b"], 2, 0)
    with pytest.raises(UsageError, match="clusters for 3 records"):
        representatives(3, ["a"], 0)
