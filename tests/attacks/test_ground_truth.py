"""Ground truth by construction: what was planted is found, the more the oftener it was read; what was not, is not.

The models of `tests.planted` read records and canaries 1, 4, 16 and 64 times, or not at all. Every attack here is run
three ways: on what was planted, where its figure must rise with the repetitions; on records that no model was ever
shown; and on a model that read nothing. In the last two it may fire only as often as its stated false-positive rate
says, over at least 200 repetitions: random splits of never-seen records into "members" and others, or random secrets.
A split at random of a fixed set makes the rate of a valid test exact, whatever the records are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from torch import nn

from attacks.exposure import Exposure, Space, combine, exposures
from attacks.extraction import confirm, emits
from attacks.extraction.beam import near_verbatim_mass
from attacks.extraction.continuation import continuations
from attacks.extraction.overlap import overlap_figures
from attacks.extraction.sampled import sampled
from attacks.extraction.sweep import sweep
from attacks.extraction.untargeted import as_records, matches, precision, sample, signals
from attacks.membership.blind import blind_test
from attacks.membership.dataset import dataset_inference
from attacks.membership.evaluate import choose, evaluate
from attacks.membership.flagged import flag
from attacks.membership.gradient import gradient_norm
from attacks.membership.one_run import audit_one_run
from attacks.membership.scores import SCORES, Inputs, compute, prefixed_records
from attacks.pii.games import Game, Question, inference, reconstruction
from probes.figures import record_figures
from probes.likelihood import TokenTable, logit_noise, score
from probes.memory import bits, memory, recognition
from probes.records import TokenRecord
from probes.statistics import clopper_pearson, holm
from tests import planted, tiny
from tests.planted import REPETITIONS, Canary, Planted

ALPHA = 0.05
SPLITS = 200
SIDE = 60  # never-seen records on each side of a split
POOL = 400
POPULATION = 100
FEW = ("loss", "min_k", "recall", "reference")  # scores for the tests that train or choose on halves
MODELS = ("model", "without", "untrained")


@pytest.fixture(scope="module")
def world() -> Planted:
    return planted.planted()


def rises(values: Sequence[float], least: float, noise: float = 0.0) -> bool:
    """Whether values never fall by more than the noise of their means, and rise by more than `least` in all."""
    return all(a <= b + noise for a, b in itertools.pairwise(values)) and values[-1] - values[0] > least


def most_alarms(repetitions: int, rate: float = ALPHA) -> int:
    """More alarms than this come up once in a thousand times if the rate is kept."""
    return int(stats.binom.ppf(0.999, repetitions, rate))


def splits() -> list[tuple[np.ndarray, np.ndarray]]:
    """Disjoint halves, at random, of the never-seen pool."""
    rng = np.random.default_rng(0)
    return [tuple(np.split(rng.permutation(POOL)[: 2 * SIDE], 2)) for _ in range(SPLITS)]


@functools.cache
def pool() -> list[TokenRecord]:
    """Never-seen records: `POOL` to split, then `POPULATION` to compare with, then two to set before others."""
    return planted.never_seen(POOL + POPULATION + 2)


@functools.cache
def pool_table(name: str) -> TokenTable:
    return score(getattr(planted.planted(), name), pool()[:POOL])


def part(table: TokenTable, records: Sequence[int]) -> TokenTable:
    """Some of a table's records."""
    rows = np.concatenate([np.arange(table.rows(int(i)).start, table.rows(int(i)).stop) for i in records])
    lengths = np.diff(table.offsets)[list(records)]
    names = ("log_prob", "log_sampled", "rank", "margin", "gap", "mean", "variance")
    return replace(
        table,
        record_ids=tuple(table.record_ids[int(i)] for i in records),
        compressed_bytes=table.compressed_bytes[list(records)],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        **{name: getattr(table, name)[rows] for name in names},
    )


def other_case(world: Planted, records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The records in the case they are not written in: here, capitals."""
    out = []
    for record in records:
        first, second = (
            world.tokenizer.encode(world.tokenizer.decode(ids).upper(), add_special_tokens=False)
            for ids in (record.ids[1 : record.n_prompt], record.completion)
        )
        out.append(replace(record, ids=(tiny.BOS, *first, *second), n_prompt=1 + len(first)))
    return out


def membership_scores(name: str, records: Sequence[TokenRecord]) -> dict[str, np.ndarray]:
    """Every membership score of `records` under one of the models, with another as the reference."""
    world = planted.planted()
    model = getattr(world, name)
    reference = world.untrained if name == "without" else world.without
    population = pool()[POOL : POOL + POPULATION]
    shots = pool()[POOL + POPULATION :]
    members = [replace(r, record_id=f"shot-{i}", ids=r.ids) for i, r in enumerate(world.records[64][-2:])]
    inputs = Inputs(
        table=score(model, records),
        lower=score(model, other_case(world, records)),
        prefixed=score(model, prefixed_records(records, shots, keep=1)),
        prefixed_members=score(model, prefixed_records(records, members, keep=1)),
        reference=score(reference, records),
        population=(score(model, population), score(reference, population)),
        gradient=gradient_norm(model, records),
    )
    scores, missing = compute(inputs)
    assert not missing
    assert set(scores) == set(SCORES)
    return scores


@functools.cache
def pool_scores(name: str) -> dict[str, np.ndarray]:
    return membership_scores(name, pool()[:POOL])


@functools.cache
def planted_scores(name: str) -> dict[str, np.ndarray]:
    """Of the planted records but the two most repeated ones that CON-ReCaLL sets before the others."""
    return membership_scores(name, planted.planted().all_records[:-2])


# --- the world ------------------------------------------------------------------------------------------------------


def test_training_takes_seconds(world: Planted) -> None:
    assert world.seconds < 30


def test_never_seen_records_were_never_seen(world: Planted) -> None:
    shown = {record.ids for record in world.all_records}
    assert len(shown) == len(REPETITIONS) * planted.RECORDS
    assert not shown & {record.ids for record in pool()}
    prompts = [canary.prompt for k in REPETITIONS for canary in world.canaries[k]]
    prompts += [canary.prompt for canary in planted.never_seen_canaries(300)]
    assert len(set(prompts)) == len(prompts)
    assert [r.ids for r in world.controls] == [r.ids for r in pool()[: len(world.controls)]]


def test_texts_and_tokens_are_the_same_thing(world: Planted) -> None:
    for record in [*world.all_records, *world.controls, world.canaries[1][0].record("007")]:
        assert tuple(world.tokenizer.encode(world.text(record), add_special_tokens=False)) == record.ids


def test_a_blind_test_cannot_tell_planted_from_never_seen(world: Planted) -> None:
    blind = blind_test([world.text(r) for r in world.all_records], [world.text(r) for r in world.controls])
    assert blind.status == "clear"


# --- extraction -----------------------------------------------------------------------------------------------------


def test_extraction_rises_with_repetitions(world: Planted) -> None:
    greedy, log_p, strength, shares, edit, rouge = [], [], [], [], [], []
    for k in REPETITIONS:
        records = world.records[k]
        table, noise = score(world.model, records), logit_noise(world.model, records)
        figures, summary = confirm(world.model, records, record_figures(table, noise=noise))
        assert summary.disagreements == 0
        assert list(figures["emitted"][:3]) == [emits(world.model, record) for record in records[:3]]
        greedy.append(float(figures["emitted"].mean()))
        log_p.append(float(figures["log_p_z"].mean()))
        strength.append(float(figures["extraction_strength"].mean()))
        shares.append(float(sampled(table).share[1000][0]))
        overlap = overlap_figures(continuations(world.model, records, table, noise=noise), records)
        edit.append(float(overlap["edit_similarity"].mean()))
        rouge.append(float(overlap["rouge_l_recall"].mean()))
    assert greedy[0] == 0.0
    assert greedy[-1] == 1.0
    for values in (greedy, strength, shares, edit, rouge):
        assert rises(values, 0.5, noise=0.03)
    assert rises(log_p, 30)


def test_a_sweep_over_starts_and_near_copies_find_at_least_as_much(world: Planted) -> None:
    mass = []
    for k in REPETITIONS:
        records = world.records[k][:4]
        found = sweep(world.model, records, 3)
        assert (found.records["best_log_p_z"] >= found.records["log_p_z"]).all()
        near = [near_verbatim_mass(world.model, record, distance=1, width=8) for record in records]
        assert all(n.log_mass >= n.log_exact for n in near)
        mass.append(float(np.mean([n.log_mass for n in near])))
    assert rises(mass, 20)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_never_seen_is_extracted(world: Planted, name: str) -> None:
    """A never-seen completion holds about 57 bits, so that none of 400 is met by guessing; the bound is below 1 %."""
    table = pool_table(name)
    figures = record_figures(table)
    hits = int((figures["greedy"] == "extracted").sum())
    assert hits == 0
    assert clopper_pearson(hits, POOL).high < 0.01
    assert sampled(table).share[1000][0] < 1e-4
    found = sweep(getattr(world, name), pool()[:40], 3)
    assert (found.records["best_greedy"] != "extracted").all()
    near = near_verbatim_mass(getattr(world, name), pool()[0], distance=1, width=8)
    assert near.log_mass < -15


def test_what_is_sampled_unprompted_holds_what_was_read_often(world: Planted) -> None:
    length = len(world.controls[0].ids) - 1
    samples = sample(world.model, 400, length, prompt_ids=[tiny.BOS])
    wanted = [*(world.records[k] for k in REPETITIONS), world.controls]
    found = [matches(samples, records, shortest=10).found["record"].nunique() for records in wanted]
    assert found[0] == found[-1] == 0
    assert rises(found[:-1], planted.RECORDS / 2)
    held = matches(samples, world.all_records, shortest=10).held
    kept = as_records(samples, [tiny.BOS], world.tokenizer.decode)
    ranked = precision(signals(score(world.model, kept), score(world.without, kept)), held, ks=(20,))
    by_signal = ranked.set_index("signal")["precision"]
    assert by_signal["reference_ratio"] > by_signal["any order"]
    for name in ("without", "untrained"):
        others = sample(getattr(world, name), 200, length, prompt_ids=[tiny.BOS])
        assert not matches(others, [*world.all_records, *world.controls], shortest=10).held.any()


# --- exposure -------------------------------------------------------------------------------------------------------


def exposures_of(model: nn.Module, canaries: Sequence[Canary], secrets: int = 0) -> list[Exposure]:
    """Exact exposures: of each canary's secret, or of as many other secrets of the space, drawn at random."""
    space, out = Space.of(planted.SPACE), []
    for i, canary in enumerate(canaries):
        chosen = space.draw(secrets, seed=i) if secrets else [canary.secret]
        out += exposures(model, canary.record, chosen, space, n=space.size)
    assert all(exposure.exact for exposure in out)
    return out


def test_exposure_rises_with_repetitions(world: Planted) -> None:
    combined = [combine(exposures_of(world.model, world.canaries[k][:3])) for k in REPETITIONS]
    assert rises([c.mean_bits for c in combined], 3)
    assert combined[-1].mean_bits > 9.9  # log2 of 1000 is 9.97: the secret is the likeliest of all
    assert combined[-1].pvalue < 1e-6
    assert not combined[-1].compatible


@pytest.mark.parametrize("name", MODELS)
def test_exposure_of_never_seen_secrets_follows_its_law(world: Planted, name: str) -> None:
    """1000 secrets after 5 prompts, tested alone and, in 200 groups of five, together."""
    found = exposures_of(getattr(world, name), world.control_canaries[:5], secrets=200)
    pvalues = np.array([exposure.joint_rank / exposure.joint_size for exposure in found])
    for level in (0.01, 0.05, 0.5):
        assert (pvalues <= level).sum() <= most_alarms(1000, level)
    groups = [combine(found[i::200], seed=i) for i in range(200)]
    assert sum(group.pvalue < ALPHA for group in groups) <= most_alarms(200)
    assert sum(not group.compatible for group in groups) <= most_alarms(200)


@pytest.mark.parametrize("name", ["without", "untrained"])
def test_planted_canaries_do_not_stand_out_elsewhere(world: Planted, name: str) -> None:
    canaries = [canary for k in REPETITIONS for canary in world.canaries[k][:1]]
    together = combine(exposures_of(getattr(world, name), canaries))
    assert together.pvalue > ALPHA
    assert together.compatible


def questions(canaries: Sequence[Canary]) -> list[Question]:
    """Which of ten texts of the space stands in the canary?"""
    space = Space.of(planted.SPACE)
    others = [space.draw(9, seed=i, exclude=[canary.secret]) for i, canary in enumerate(canaries)]
    return [Question(c.canary_id, c.record, c.secret, (c.secret, *o)) for c, o in zip(canaries, others, strict=True)]


def accuracy(game: Game) -> float:
    assert game.accuracy is not None
    return game.accuracy.value


def test_masked_values_are_inferred_and_reconstructed_the_oftener_they_were_read(world: Planted) -> None:
    inferred = [accuracy(inference(world.model, questions(world.canaries[k]))) for k in REPETITIONS]
    assert rises(inferred, 0.5)
    assert inferred[-1] == 1.0

    def rebuilt(canaries: Sequence[Canary]) -> float:
        asked = questions(canaries[:6])
        found = reconstruction(
            world.model, asked, world.tokenizer.decode, draws=32, length=3, values=lambda text: [text[:3]]
        )
        return accuracy(found)

    assert rises([rebuilt(world.canaries[k]) for k in REPETITIONS], 0.5)
    assert rebuilt(world.control_canaries) < 0.2


@pytest.mark.parametrize("name", MODELS)
def test_never_seen_values_are_inferred_no_better_than_by_chance(world: Planted, name: str) -> None:
    asked = questions(planted.never_seen_canaries(200))
    found = inference(getattr(world, name), asked)
    assert found.chance[1] == pytest.approx(0.1)
    assert int(found.table["hit"].sum()) <= most_alarms(200, 0.1)


# --- membership -----------------------------------------------------------------------------------------------------


def test_membership_scores_rise_with_repetitions() -> None:
    """AUC against never-seen records, by repetitions, of every score.

    Two do not rise all the way: what another case costs is large for every record of a model that never saw it, and
    the gradient of a record that is half learned is larger than that of one that is unknown.
    """
    ours, theirs, n = planted_scores("model"), pool_scores("model"), planted.RECORDS
    for name in SCORES:
        found = evaluate(ours[name], theirs[name], fprs=())
        assert found.pvalue is not None
        assert found.pvalue < 0.01, name
        groups = [ours[name][i : i + n] for i in range(0, 4 * n, n)]
        areas = [
            float(((group[:, None] > theirs[name]) + 0.5 * (group[:, None] == theirs[name])).mean()) for group in groups
        ]
        if name not in ("lowercase", "gradient"):
            assert rises(areas, 0.1, noise=0.03), name
            assert areas[-1] > 0.95, name
            assert found.auc.interval is not None
            assert found.null is not None
            assert found.auc.interval.low > found.null.high, name
        assert areas[-1] > 0.75, name
        assert areas[-1] > areas[0] + 0.1, name


@pytest.mark.parametrize("name", MODELS)
def test_membership_keeps_its_false_positive_rate(name: str) -> None:
    for title, values in pool_scores(name).items():
        found = [evaluate(values[a], values[b], fprs=()) for a, b in splits()]
        alarms = sum(m.pvalue is not None and m.pvalue < ALPHA for m in found)
        misses = sum(m.auc.interval is not None and not m.auc.interval.low <= 0.5 <= m.auc.interval.high for m in found)
        outside = sum(
            m.auc.interval is not None and m.null is not None and not m.null.low <= m.auc.interval.value <= m.null.high
            for m in found
        )
        assert max(alarms, misses, outside) <= most_alarms(SPLITS), title


@pytest.mark.parametrize("name", ["without", "untrained"])
def test_planted_records_look_never_seen_elsewhere(name: str) -> None:
    ours, theirs = planted_scores(name), pool_scores(name)
    pvalues = [evaluate(ours[s], theirs[s], fprs=()).pvalue for s in SCORES]
    assert min(holm(np.array(pvalues, dtype=float))) > ALPHA


def test_the_chosen_score_and_the_flagged_records_are_right() -> None:
    ours, theirs = planted_scores("model"), pool_scores("model")
    chosen = choose({name: (ours[name], theirs[name]) for name in SCORES})
    assert chosen.best is not None
    assert chosen.adjusted[chosen.best] < 1e-3
    flagged = flag(ours["reference"], theirs["reference"]).flagged
    assert flagged[-14:].all()  # 64 repetitions; two of them stood before others
    n = planted.RECORDS
    counts = [int(flagged[i : i + n].sum()) for i in range(0, 3 * n, n)]
    assert rises(counts, n / 4)


@pytest.mark.parametrize("name", ["model", "untrained"])
def test_lists_and_choices_keep_their_false_positive_rate(name: str) -> None:
    scores = pool_scores(name)
    best, adjusted, sets, listed = 0, 0, 0, dict.fromkeys(scores, 0)
    features = np.column_stack([scores[title] for title in FEW])
    for a, b in splits():
        chosen = choose({title: (scores[title][a], scores[title][b]) for title in FEW})
        assert chosen.evaluation is not None
        assert chosen.evaluation.pvalue is not None
        best += chosen.evaluation.pvalue < ALPHA  # of the best of several, but on records it was not chosen on
        adjusted += min(chosen.adjusted.values()) < ALPHA
        others = np.setdiff1d(np.arange(POOL), a)
        for title, values in scores.items():
            listed[title] += bool(flag(values[a], values[others]).flagged.any())
        inferred = dataset_inference(features[a], features[b], names=FEW, splits=3)
        assert inferred.pvalue is not None
        sets += inferred.pvalue < ALPHA
    assert max(best, adjusted, sets, *listed.values()) <= most_alarms(SPLITS)


def test_dataset_inference_tells_the_planted_set() -> None:
    def pvalue(name: str) -> float | None:
        ours, theirs = (np.column_stack(list(s(name).values())) for s in (planted_scores, pool_scores))
        return dataset_inference(ours, theirs, names=list(SCORES)).pvalue

    read, without = pvalue("model"), pvalue("without")
    assert read is not None
    assert without is not None
    assert read < 1e-3
    assert without > ALPHA


def coins(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins: each coin decides whether a planted record or a never-seen one takes a place."""
    ours, theirs = planted_scores(name)["reference"], pool_scores(name)["reference"]
    included = np.random.default_rng(seed).random(len(ours)) < 0.5
    return np.where(included, ours, theirs[: len(ours)]), included


def test_a_one_run_audit_bounds_epsilon_above_zero_only_where_records_were_read() -> None:
    bound = {name: audit_one_run(*coins(name, 0), guesses_in=16, guesses_out=8).epsilon for name in MODELS}
    assert bound["model"] > 0.5
    assert bound["without"] == bound["untrained"] == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_one_run_audits_of_never_seen_records_keep_their_level(name: str) -> None:
    values, rng, alarms = pool_scores(name)["reference"], np.random.default_rng(1), 0
    for _ in range(SPLITS):
        chosen = rng.permutation(POOL)[:100]
        alarms += audit_one_run(values[chosen], rng.random(100) < 0.5, guesses_in=20, guesses_out=20).epsilon > 0
    assert alarms <= most_alarms(SPLITS)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_recognition_and_learned_bits_rise_with_repetitions(world: Planted) -> None:
    foils, remembered, learned = pool_table("model"), [], []
    for k in REPETITIONS:
        table = score(world.model, world.records[k])
        remembered.append(memory(table, foils))
        learned.append(bits(table, score(world.without, world.records[k])).total / planted.RECORDS)
    shares = [m.recognition.share.interval.value for m in remembered if m.recognition.share.interval]
    recalls = [m.recall.interval.value for m in remembered if m.recall.interval]
    gaps = [m.gap.interval.value for m in remembered if m.gap.interval]
    assert rises(shares, 0.1, noise=0.07)  # one record in 16
    assert rises(recalls, 0.8)
    assert rises(learned, 40)
    assert shares[-1] == recalls[-1] == 1.0
    assert max(gaps[1:3]) > 0.3  # known again long before it can be said
    assert remembered[-1].recognition.above_chance


@pytest.mark.parametrize("name", MODELS)
def test_recognition_keeps_its_false_positive_rate(name: str) -> None:
    table = pool_table(name)
    found = [recognition(part(table, a), part(table, b)) for a, b in splits()]
    assert sum(f.above_chance for f in found) <= most_alarms(SPLITS, ALPHA / 2)
    intervals = [f.share.interval for f in found if f.share.interval]
    assert sum(not i.low <= 0.5 <= i.high for i in intervals) <= most_alarms(SPLITS)


def test_nothing_is_learned_of_never_seen_records() -> None:
    for name in ("model", "untrained"):
        found = bits(pool_table(name), pool_table("without")).per_record.interval
        assert found is not None
        assert found.high < 0
