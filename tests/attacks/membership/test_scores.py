"""Membership scores against the formulas written out on full distributions, and at the edges that break other tools."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from attacks.membership import scores
from attacks.membership.scores import SCORES, Inputs, compute, prefixed_records
from probes.classify import score_images
from probes.errors import UsageError
from probes.figures import record_figures
from probes.likelihood import TokenTable, score
from probes.records import ImageRecord, TokenRecord
from tests import tiny
from tests.attacks.membership.tables import distributions, golds, records, table


@pytest.fixture(scope="module")
def scored() -> tuple[torch.nn.Module, torch.nn.Module, list[TokenRecord], TokenTable, TokenTable]:
    model = tiny.causal_lm("llama", seed=1, dtype=torch.float64)
    other = tiny.causal_lm("llama", seed=2, dtype=torch.float64)
    found = records(25)
    return model, other, found, score(model, found), score(other, found)


def lowest(values: np.ndarray, share: float = 0.2) -> float:
    return float(np.sort(values)[: max(1, int(share * len(values)))].mean())


def test_scores_of_one_table_match_full_distributions(scored) -> None:
    model, _, found, tokens, _ = scored
    for i, record in enumerate(found):
        rows, gold = distributions(model, record), golds(model, record)
        p = np.exp(rows)
        mu = (p * rows).sum(-1)
        sigma = np.sqrt((p * (rows - mu[:, None]) ** 2).sum(-1))
        np.testing.assert_allclose(scores.loss(tokens)[i], gold.mean(), rtol=1e-10)
        np.testing.assert_allclose(scores.zlib(tokens)[i], gold.sum() / record.compressed_bytes, rtol=1e-10)
        np.testing.assert_allclose(scores.min_k(tokens)[i], lowest(gold), rtol=1e-10)
        np.testing.assert_allclose(scores.min_k_plus_plus(tokens)[i], lowest((gold - mu) / sigma), rtol=1e-8)
        limit = float(np.median(-mu))
        cut = np.sort(gold)[max(1, int(0.5 * len(gold))) - 1]
        chosen = gold[(gold <= cut) & (-mu < limit)]
        expected = chosen.mean() if len(chosen) else gold[gold <= cut].mean()
        np.testing.assert_allclose(scores.surprising(tokens, 0.5, limit)[i], expected, rtol=1e-10)


def test_scores_agree_with_the_figures_of_the_audit(scored) -> None:
    *_, tokens, _ = scored
    frame = record_figures(tokens)
    np.testing.assert_allclose(scores.loss(tokens), -frame["loss"])
    np.testing.assert_allclose(scores.min_k(tokens), frame["min_k"])
    np.testing.assert_allclose(scores.min_k_plus_plus(tokens), frame["min_k_plus_plus"])


def test_scores_against_a_reference_match_the_formulas(scored) -> None:
    model, other, found, tokens, ref = scored
    sizes = (2, 3, 7)
    for i, record in enumerate(found):
        a, b = golds(model, record), golds(other, record)
        np.testing.assert_allclose(scores.token_ratio(tokens, ref)[tokens.rows(i)], a - b, rtol=1e-8)
        np.testing.assert_allclose(scores.reference(tokens, ref)[i], a.mean() - b.mean(), rtol=1e-8)
        shares = []
        for size in [s for s in sizes if s <= len(a)] or [len(a)]:
            votes = [a[s : s + size].sum() > b[s : s + size].sum() for s in range(len(a) - size + 1)]
            shares.append(np.mean(votes))
        np.testing.assert_allclose(scores.windows(tokens, ref, sizes)[i], np.mean(shares))


def test_rmia_matches_its_definition(scored) -> None:
    model, other, found, *_ = scored
    part, population = found[:10], found[10:]
    a, gamma = 0.3, 1.1

    def ratio(record: TokenRecord) -> float:
        p, out = math.exp(golds(model, record).mean()), math.exp(golds(other, record).mean())
        return p / (0.5 * ((1 + a) * out + (1 - a)))

    expected = [np.mean([ratio(x) / ratio(z) >= gamma for z in population]) for x in part]
    tables = [score(net, rows) for rows in (part, population) for net in (model, other)]
    np.testing.assert_allclose(scores.rmia(*tables, a=a, gamma=gamma), expected)
    arrays = [scores.loss(t) for t in tables]  # as of a classifier: one log-probability a record
    np.testing.assert_allclose(scores.rmia(*arrays, a=a, gamma=gamma), expected)
    np.testing.assert_allclose(scores.reference(*arrays[:2]), scores.reference(*tables[:2]))


def test_a_changed_or_longer_input_is_compared_by_its_mean(scored) -> None:
    model, _, found, tokens, _ = scored
    lowered = [replace(r, ids=(*r.ids, 7, 8)) for r in found]  # other ids, other lengths
    lower = score(model, lowered)
    expected = [golds(model, a).mean() - golds(model, b).mean() for a, b in zip(found, lowered, strict=True)]
    np.testing.assert_allclose(scores.lowercase(tokens, lower), expected, rtol=1e-8)
    shots = [replace(r, record_id=f"s{i}") for i, r in enumerate(records(3, seed=9))]
    members = [replace(r, record_id=f"m{i}") for i, r in enumerate(records(3, seed=10))]
    after, after_members = (score(model, prefixed_records(found, s)) for s in (shots, members))
    for i, record in enumerate(found):
        plain = -golds(model, record).mean()
        context = tuple(t for shot in shots for t in shot.ids)
        other = tuple(t for shot in members for t in shot.ids)
        non, mem = (
            -golds(model, TokenRecord("x", c + record.ids, len(c) + record.n_prompt, 1)).mean()
            for c in (context, other)
        )
        np.testing.assert_allclose(scores.recall(tokens, after)[i], non / plain, rtol=1e-5)
        got = scores.con_recall(tokens, after, after_members, gamma=0.4)[i]
        np.testing.assert_allclose(got, (non - 0.4 * mem) / plain, rtol=1e-5)
    np.testing.assert_array_equal(
        scores.con_recall(tokens, after, after_members, gamma=0.0), scores.recall(tokens, after)
    )


def everything(first: TokenTable, second: TokenTable) -> dict[str, np.ndarray]:
    inputs = Inputs(first, second, second, second, second, (first, second), np.zeros(len(first.record_ids)))
    done, missing = compute(inputs)
    assert not missing
    return done


def test_defect_2_few_tokens_still_have_a_lowest_share() -> None:
    tokens = table([[-1.0], [-1.0, -3.0], [-1.0, -2.0, -3.0, -4.0]])
    np.testing.assert_array_equal(scores.min_k(tokens), [-1.0, -3.0, -4.0])
    np.testing.assert_array_equal(scores.min_k_plus_plus(tokens), [0.0, -2.0, -3.0])
    np.testing.assert_array_equal(scores.surprising(tokens), [-1.0, -3.0, -4.0])
    for name, values in everything(tokens, table([[-2.0], [-2.0, -1.0], [-2.0] * 4])).items():
        assert values.shape == (3,), name
        assert np.isfinite(values).all(), name


def test_defect_3_certain_and_impossible_tokens_give_numbers() -> None:
    nothing = float("-inf")
    certain = table([[0.0, 0.0], [nothing, -1.0], [nothing, nothing], [-1.0, -1.0]], mean=0.0, variance=0.0)
    for second in (certain, table([[-1.0, -1.0]] * 4), table([[nothing] * 2] * 4)):
        for name, values in {**everything(certain, second), **everything(second, certain)}.items():
            assert np.isfinite(values).all(), name
    assert scores.min_k_plus_plus(certain)[0] == 0  # saturates: neither NaN nor infinite
    loss = scores.loss(certain)
    assert loss[0] == 0
    assert loss[0] > loss[3] > loss[1] > loss[2]


def test_defect_3_a_padded_vocabulary_gives_numbers() -> None:
    model = tiny.causal_lm("llama", vocab=96)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(96))
    with torch.no_grad():
        model.lm_head.bias[90:] = float("-inf")
    found = [TokenRecord("a", (5, 6, 7, 8), 1, 5), TokenRecord("b", (5, 91, 92), 1, 5), TokenRecord("c", (5, 95), 1, 5)]
    tokens = score(model, found)
    for name, values in everything(tokens, tokens).items():
        assert np.isfinite(values).all(), name
    assert np.argmax(scores.loss(tokens)) == 0


def test_defect_6_perfectly_memorised_tokens_count() -> None:
    half = table([[0.0, -2.0], [-2.0]])
    np.testing.assert_array_equal(scores.loss(half), [-1.0, -2.0])
    assert scores.reference(half, table([[-4.0, -4.0], [-4.0]]))[0] == 3.0
    assert scores.windows(half, table([[-4.0, -4.0], [-4.0]]), (1,))[0] == 1.0


def test_defect_10_zlib_does_not_depend_on_length() -> None:
    short = table([[-1.0, -2.0]], sizes=[6])
    long = table([[-1.0, -2.0] * 10], sizes=[60])
    np.testing.assert_allclose(scores.zlib(short), scores.zlib(long))


def test_defect_10_sums_are_in_double_precision() -> None:
    tokens = table([[-(2.0**-24)] * 3 + [-1.0]])
    tokens = replace_columns(tokens, np.float32)
    assert scores.loss(tokens)[0] == -(1.0 + 3 * 2.0**-24) / 4  # in float32 the small ones vanish


def replace_columns(tokens: TokenTable, dtype: type) -> TokenTable:
    return replace(tokens, log_prob=tokens.log_prob.astype(dtype), mean=tokens.mean.astype(dtype))


def test_no_surprising_token_is_no_sign_of_membership() -> None:
    unsure = table([[-6.0] * 10, [-0.01] * 10], mean=[[-5.0] * 10, [-0.1] * 10])
    values = scores.surprising(unsure)
    np.testing.assert_allclose(values, [-6.0, -0.01])


def test_a_model_like_its_reference_is_in_the_middle() -> None:
    tokens = table([[-1.0, -0.3, -2.0], [0.0], [float("-inf")]])
    np.testing.assert_array_equal(scores.windows(tokens, tokens), [0.5] * 3)
    np.testing.assert_array_equal(scores.reference(tokens, tokens), [0.0] * 3)
    np.testing.assert_array_equal(scores.recall(tokens, tokens), [1.0] * 3)
    np.testing.assert_array_equal(scores.lowercase(tokens, tokens), [0.0] * 3)


def test_a_record_shorter_than_every_window_is_one_window() -> None:
    tokens, ref = table([[-1.0, -1.0, -9.0], [-1.0]]), table([[-2.0, -2.0, -2.0], [-2.0]])
    np.testing.assert_array_equal(
        scores.windows(tokens, ref, (5,)), [0.0, 1.0]
    )  # -11 against -6; single tokens: 2 of 3
    np.testing.assert_array_equal(scores.windows(tokens, ref, (1, 5)), [2 / 3, 1.0])


def test_ten_window_sizes_spaced_geometrically() -> None:
    assert scores.WINDOW_SIZES == (2, 3, 4, 5, 8, 11, 15, 21, 29, 40)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_rmia_is_finite_at_its_ends(a: float) -> None:
    extremes = np.array([0.0, -1e-9, -5.0, -1e5, -np.inf])
    values = scores.rmia(extremes, extremes, extremes, extremes[::-1], a=a)
    assert ((values >= 0) & (values <= 1)).all()


def test_one_population_record_is_enough_and_none_is_refused() -> None:
    one = np.array([-1.0])
    assert scores.rmia(one, one, one, one)[0] == 1.0
    with pytest.raises(UsageError, match="population"):
        scores.rmia(one, one, np.zeros(0), np.zeros(0))


def test_a_table_without_records_has_no_scores() -> None:
    empty = table([])
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "surprising"):
        assert getattr(scores, name)(empty).shape == (0,)
    assert scores.windows(empty, empty).shape == (0,)


def test_nan_is_an_error_not_a_missing_record() -> None:
    tokens = table([[-1.0], [float("nan")]])
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "surprising"):
        with pytest.raises(UsageError, match="NaN"):
            getattr(scores, name)(tokens)
    with pytest.raises(UsageError, match="NaN"):
        scores.reference(np.array([np.nan]), np.array([0.0]))


def test_tables_of_other_records_or_tokens_are_refused() -> None:
    first, second = table([[-1.0], [-2.0]]), table([[-1.0], [-2.0]], names=["r1", "r0"])
    for function in (scores.lowercase, scores.recall, scores.reference, scores.windows, scores.token_ratio):
        with pytest.raises(UsageError, match="same records"):
            function(first, second)
    other = table([[-1.0], [-2.0, -3.0]])
    for function in (scores.reference, scores.windows, scores.token_ratio):
        with pytest.raises(UsageError, match="tokenizer"):
            function(first, other)
    with pytest.raises(UsageError, match="same records"):
        scores.reference(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5])
def test_shares_and_factors_outside_their_range_are_refused(bad: float) -> None:
    for function in (scores.min_k, scores.min_k_plus_plus, scores.surprising):
        with pytest.raises(UsageError):
            function(table([[-1.0]]), bad)
    with pytest.raises(UsageError):
        scores.windows(table([[-1.0]]), table([[-1.0]]), ())
    with pytest.raises(UsageError):
        scores.rmia(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), gamma=0.0)


def test_prefixes_keep_the_completion_and_the_opening_token() -> None:
    found = [TokenRecord("a", (2, 10, 11, 12), 2, 7, "g"), TokenRecord("b", (2, 13), 1, 8)]
    shots = [TokenRecord("s", (2, 20, 21), 1, 1), TokenRecord("t", (2, 22), 1, 1)]
    plain = prefixed_records(found, shots)
    assert plain[0] == TokenRecord("a", (2, 20, 21, 2, 22, 2, 10, 11, 12), 7, 7, "g")
    kept = prefixed_records(found, shots, keep=1)
    assert [r.ids for r in kept] == [(2, 20, 21, 22, 10, 11, 12), (2, 20, 21, 22, 13)]
    assert [r.completion for r in kept] == [r.completion for r in found]
    cut = prefixed_records(found, shots, 5, keep=1)
    assert [r.ids for r in cut] == [(2, 22, 10, 11, 12), (2, 20, 21, 22, 13)]
    assert [r.n_prompt for r in cut] == [3, 4]


def test_prefixes_that_cannot_be_are_refused() -> None:
    found = [TokenRecord("a", (2, 10, 11, 12), 2, 7)]
    with pytest.raises(UsageError, match="found none"):
        prefixed_records(found, [])
    with pytest.raises(UsageError, match="not scored"):
        prefixed_records(found, [TokenRecord("a", (5, 6), 1, 1)])
    with pytest.raises(UsageError, match="not scored"):
        prefixed_records(found, [TokenRecord("other", (2, 10, 11, 12), 1, 1)])
    with pytest.raises(UsageError, match="room") as caught:
        prefixed_records(found, [TokenRecord("s", (5, 6), 1, 1)], 4)
    assert "10" not in str(caught.value)  # no token ids in messages
    with pytest.raises(UsageError, match="prefix of 0"):
        prefixed_records(found, [TokenRecord("s", (5, 6), 1, 1)], keep=2)


def test_image_scores_follow_the_classifier() -> None:
    model = tiny.image_classifier("vit")
    generator = torch.Generator().manual_seed(0)
    images = [ImageRecord(f"i{i}", torch.randn(3, 32, 32, generator=generator), i % 4) for i in range(6)]
    found = scores.image_scores(score_images(model, images))
    with torch.no_grad():
        logits = model(torch.stack([image.pixels for image in images])).logits.double().numpy()
    for i, image in enumerate(images):
        log_p = logits[i] - np.log(np.exp(logits[i]).sum())
        np.testing.assert_allclose(found["loss"][i], log_p[image.label], atol=1e-5)
        others = np.delete(logits[i], image.label).max()
        np.testing.assert_allclose(found["margin"][i], logits[i][image.label] - others, atol=1e-5)
        np.testing.assert_allclose(found["entropy"][i], (np.exp(log_p) * log_p).sum(), atol=1e-5)


def test_image_scores_are_finite_and_refuse_what_is_missing() -> None:
    frame = pd.DataFrame({"loss": [0.0, np.inf], "margin": [np.inf, -np.inf], "entropy": [0.0, 0.0]})
    assert all(np.isfinite(values).all() for values in scores.image_scores(frame).values())
    with pytest.raises(UsageError, match="margin"):
        scores.image_scores(frame.drop(columns="margin"))
    with pytest.raises(UsageError, match="NaN"):
        scores.image_scores(frame.assign(loss=np.nan))


def test_the_registry_says_what_each_score_needs() -> None:
    tokens = table([[-1.0, -2.0], [-3.0]])
    done, missing = compute(Inputs(table=tokens))
    assert sorted(done) == ["loss", "min_k", "min_k_plus_plus", "surprising", "zlib"]
    assert missing["rmia"] == "needs reference and population"
    assert missing["gradient"] == "needs gradient"
    assert set(done) | set(missing) == set(SCORES)
    np.testing.assert_array_equal(done["loss"], scores.loss(tokens))
    assert list(compute(Inputs(table=tokens), ["zlib"])[0]) == ["zlib"]
    with pytest.raises(UsageError, match="expected scores among"):
        compute(Inputs(table=tokens), ["nonsense"])
    assert all(score.source and score.title and name == score.name for name, score in SCORES.items())
