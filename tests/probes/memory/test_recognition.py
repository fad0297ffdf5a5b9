"""Recognition and recall: known tables, ties, clusters, and what a model that saw nothing gives."""

from __future__ import annotations

import numpy as np
import pytest

from probes.errors import UsageError
from probes.likelihood import score
from probes.memory import emitted_share, memory, recognition
from probes.records import TokenRecord
from probes.statistics import clopper_pearson
from tests import tiny
from tests.probes.memory.tables import table_of


def random_table(rng: np.random.Generator, n: int, shift: float = 0.0):
    return table_of([(rng.normal(-3 + shift, 1, 4)).tolist() for _ in range(n)])


def test_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    records, foils = random_table(rng, 30, 0.3), random_table(rng, 40)
    found = recognition(records, foils)
    expected = [
        float(records.log_prob[records.rows(i)].mean() > foils.log_prob[foils.rows(int(j))].mean())
        for i, j in enumerate(found.pairs)
    ]
    assert found.outcomes.tolist() == expected
    assert found.share.interval is not None
    assert found.share.interval.value == pytest.approx(np.mean(expected))
    assert found.most_uses == 1
    # Each pair is a trial of its own, so the limits are about those of a rate.
    rate = clopper_pearson(int(sum(expected)), 30)
    assert found.share.interval.low == pytest.approx(rate.low, abs=0.04)
    assert found.share.interval.high == pytest.approx(rate.high, abs=0.04)


def test_a_record_against_itself_is_a_tie() -> None:
    model = tiny.causal_lm("llama")
    records = [TokenRecord(f"r{i}", (5 + i, 9, 20 + i, 30), 2, 8) for i in range(10)]
    table = score(model, records)
    found = recognition(table, table, pairs=range(10))
    assert found.ties == 10
    assert found.share.interval is not None
    assert found.share.interval.value == 0.5
    assert not found.above_chance


def test_perfect_and_absent_recognition_are_bounded_not_certain() -> None:
    good, bad = table_of([[-0.1]] * 40), table_of([[-5.0]] * 40)
    best, worst = recognition(good, bad), recognition(bad, good)
    assert best.share.interval is not None
    assert worst.share.interval is not None
    assert (best.share.interval.value, worst.share.interval.value) == (1.0, 0.0)
    assert best.share.interval.low == pytest.approx(clopper_pearson(40, 40).low)
    assert worst.share.interval.high == pytest.approx(clopper_pearson(0, 40).high)
    assert best.above_chance
    assert not worst.above_chance


def test_lengths_do_not_decide() -> None:
    """The mean per token is compared: a longer completion is not less likely for its length."""
    short, long = table_of([[-2.0] * 3] * 12), table_of([[-1.0] * 12] * 12)
    found = recognition(long, short)
    assert found.outcomes.mean() == 1.0
    assert found.length_difference == 9.0


def test_pairs_with_a_common_foil_are_one_cluster() -> None:
    good, foil = table_of([[-0.1]] * 40), table_of([[-5.0]])
    one = recognition(good, foil).share.interval
    many = recognition(good, table_of([[-5.0]] * 40)).share.interval
    assert one is not None
    assert many is not None
    assert one.low < 0.5 < many.low
    assert one.low == pytest.approx(clopper_pearson(1, 1).low, abs=1e-9)


def test_clusters_chain_through_records_and_foils() -> None:
    rng = np.random.default_rng(1)
    records, foils = random_table(rng, 60, 0.4), random_table(rng, 60)
    plain = recognition(records, foils, pairs=range(60))
    halves = recognition(records, foils, pairs=range(60), clusters=[i // 2 for i in range(60)])
    chained = recognition(
        records,
        foils,
        pairs=range(60),
        clusters=[i // 2 for i in range(60)],
        foil_clusters=[(i + 1) // 2 for i in range(60)],  # links every cluster of records to the next
    )
    assert plain.share.interval is not None
    assert halves.share.interval is not None
    assert chained.share.interval is not None
    assert plain.share.interval.n == halves.share.interval.n == 60
    assert chained.share.interval.low < 0.1  # one cluster says next to nothing
    assert plain.share.interval.low > 0.3


def test_nothing_to_pair() -> None:
    empty, some = table_of([]), table_of([[-1.0]])
    for found in (recognition(empty, some), recognition(some, empty), recognition(empty, empty)):
        assert found.share.status == "not resolvable"
        assert "pair" in str(found.share.reason)
        assert not found.above_chance
    remembered = memory(some, empty)
    assert remembered.gap.status == remembered.recall.status == "not resolvable"


def test_a_record_of_one_token() -> None:
    found = recognition(table_of([[-1.0]]), table_of([[-2.0]]))
    assert found.outcomes.tolist() == [1.0]
    assert found.share.interval is not None
    assert found.share.interval.low < 0.5


def test_impossible_tokens_do_not_become_nan() -> None:
    impossible = table_of([[-np.inf, -1.0]] * 3)
    found = recognition(impossible, table_of([[-np.inf, -2.0]] * 3))
    assert found.outcomes.tolist() == [0.5] * 3
    assert recognition(table_of([[-1.0, -1.0]] * 3), impossible).outcomes.tolist() == [1.0] * 3


def test_bad_arguments() -> None:
    some = table_of([[-1.0]] * 3)
    with pytest.raises(UsageError, match="a foil below 3"):
        recognition(some, some, pairs=[0, 1, 3])
    with pytest.raises(UsageError, match="a foil below 3"):
        recognition(some, some, pairs=[0, 1])
    with pytest.raises(UsageError, match="clusters"):
        recognition(some, some, clusters=[1])
    with pytest.raises(UsageError, match="both or neither"):
        memory(some, some, recall=[1, 1, 1])
    with pytest.raises(UsageError, match="one for each"):
        memory(some, some, recall=[1], foil_recall=[0, 0, 0])
    with pytest.raises(UsageError, match="within"):
        memory(some, some, recall=[1, 2, 1], foil_recall=[0, 0, 0])


def test_emitted_share_is_what_comes_before_the_first_error() -> None:
    table = table_of([[-1.0] * 4] * 4, ranks=[[0, 0, 0, 0], [0, 0, 3, 0], [1, 0, 0, 0], [0, 0, 0, 2]])
    assert emitted_share(table).tolist() == [1.0, 0.5, 0.0, 0.75]


def test_recall_falls_while_recognition_stays() -> None:
    """The case the gap is for: an edit that only spoils the first token of every answer."""
    foils = table_of([[-3.0] * 5] * 30, ranks=[[4] * 5] * 30)
    before = memory(table_of([[-0.1] * 5] * 30), foils)
    hidden = memory(table_of([[-5.0, *[-0.1] * 4]] * 30, ranks=[[4, 0, 0, 0, 0]] * 30), foils)
    never = memory(table_of([[-3.0] * 5] * 30, ranks=[[4] * 5] * 30), foils)
    values = [m.gap.interval.value for m in (before, hidden, never) if m.gap.interval]
    assert values == [0.0, 1.0, 0.0]
    assert hidden.recall.interval is not None
    assert hidden.recall.interval.value == 0.0
    assert hidden.recognition.above_chance


def test_the_callers_recall_takes_the_place_of_the_default() -> None:
    some = table_of([[-1.0]] * 20)
    found = memory(some, table_of([[-2.0]] * 20), recall=[0.5] * 20, foil_recall=[0.25] * 20)
    assert found.recall.interval is not None
    assert found.foil_recall.interval is not None
    assert found.gap.interval is not None
    assert (found.recall.interval.value, found.foil_recall.interval.value) == (0.5, 0.25)
    assert found.gap.interval.value == pytest.approx(0.75)


def test_false_positives_and_coverage() -> None:
    """300 draws of records and foils of one distribution: chance is excluded, either way, in about 5 % of them."""
    rng, outside, above = np.random.default_rng(2), 0, 0
    for _ in range(300):
        found = recognition(random_table(rng, 40), random_table(rng, 25))  # foils used once or twice
        interval = found.share.interval
        assert interval is not None
        outside += not interval.low <= 0.5 <= interval.high
        above += found.above_chance
    assert outside <= 15 + 3 * np.sqrt(15)
    assert above <= 7.5 + 3 * np.sqrt(7.5)


def test_same_inputs_same_result() -> None:
    rng = np.random.default_rng(3)
    records, foils = random_table(rng, 20), random_table(rng, 30)
    first, second = recognition(records, foils, seed=4), recognition(records, foils, seed=4)
    assert first.share == second.share
    assert first.pairs.tolist() == second.pairs.tolist()
