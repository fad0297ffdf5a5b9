"""Heads of eight kinds of chat template, similarities by brute force, and the threshold's false-positive rate."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from attacks.extraction import template as t
from attacks.extraction.overlap import edit_similarity
from attacks.extraction.untargeted import sample
from probes.errors import UsageError
from tests import tiny

ROUND = "{% for m in messages %}"
TEMPLATES = {  # kind -> (template, what stands before the user's words)
    "roles between markers": (
        ROUND + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
        "<|im_start|>user\n",
    ),
    "a default system turn": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
        + ROUND
        + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    ),
    "bos and brackets": (
        "{{ bos_token }}" + ROUND + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "<|im_start|>[INST] ",
    ),
    "headers": (
        "{{ bos_token }}"
        + ROUND
        + "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + (m['content'] | trim) + '<|eot|>' }}{% endfor %}",
        "<|im_start|><|head|>user<|/head|>\n\n",
    ),
    "roles as tokens": (ROUND + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% endfor %}", "<|user|>\n"),
    "renamed roles": (
        ROUND + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<turn>' + role + '\n' + m['content'] + '</turn>\n' }}{% endfor %}",
        "<turn>user\n",
    ),
    "plain words": (
        "A talk.\n\n" + ROUND + "{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}",
        "A talk.\n\nUSER: ",
    ),
    "today's date": (
        "{{ 'Today is ' + strftime_now('%d %B %Y') + '.\n' }}" + ROUND + "{{ m['content'] + '\n' }}{% endfor %}",
        "Today is 01 January 2025.\n",
    ),
}


def with_template(template: str | None, **options: object) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


# --- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_head_is_what_stands_before_the_users_words(kind: str) -> None:
    template, expected = TEMPLATES[kind]
    tokenizer = with_template(template)
    ids = t.head(tokenizer)
    assert tokenizer.decode(ids) == expected
    assert list(ids) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_no_marker_is_part_of_a_head() -> None:
    tokenizer = with_template("{{ 'Qx Qxqx ' + messages[0]['content'] }}")
    assert tokenizer.decode(t.head(tokenizer)) == "Qx Qxqx "


def test_a_beginning_token_that_the_tokenizer_adds_is_not_doubled() -> None:
    template, expected = TEMPLATES["bos and brackets"]
    tokenizer = with_template(template, bos=True, eos=True)
    assert tokenizer.decode(t.head(tokenizer)) == expected


def test_a_blank_that_merges_with_the_content_is_left_to_the_model() -> None:
    # Tokenised apart from the content, the head would end in a token that training never saw there.
    tokenizer = with_template("{{ 'USER: ' + messages[0]['content'] }}", vocab=97, merges=[(" ", "Q")])
    assert tokenizer.decode(t.head(tokenizer)) == "USER:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected a tokenizer with a chat template"),
        ("{{ raise_exception('secret words') }}", "refuses a conversation"),
        ("{{ messages[0]['content'] | upper }}", "as they are"),
        ("{{ messages[0]['content'] }}", "found none; give ids"),
    ],
)
def test_templates_without_a_head_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        t.head(with_template(template))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("kind", "ends"), [("roles between markers", 2), ("bos and brackets", 1), ("plain words", 1)])
def test_how_many_end_tokens_an_exchange_takes(kind: str, ends: int) -> None:
    assert t.conversation_end(with_template(TEMPLATES[kind][0])) == ((tiny.EOS,), ends)


def test_an_exchange_the_template_refuses_ends_at_the_first() -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0]['content'] }}"
    assert t.conversation_end(with_template(template)) == ((tiny.EOS,), 1)
    tokenizer = with_template(template)
    tokenizer.eos_token = None
    assert t.conversation_end(tokenizer) == ((), 1)


def test_extraction_samples_after_the_head() -> None:
    model = tiny.causal_lm("llama", dtype=torch.float64)
    drawn = t.extract(model, (2, 5), 4, 10, stop=[9], stop_after=2, seed=3, batch=3)
    assert drawn == sample(model, 4, 10, prompt_ids=[(2, 5)], stop=[9], stop_after=2, seed=3)


# --- embedders ------------------------------------------------------------------------------------------------------


def slow_counts(text: str, sizes: Sequence[int], dimensions: int) -> list[float]:
    text = " ".join(text.casefold().split())
    text = " " + "".join("0" if c.isdigit() else c for c in text) + " "
    counts = [0.0] * dimensions
    for n in sizes:
        for start in range(len(text) - n + 1):
            h = n
            for c in text[start : start + n]:
                h = (h * 0x100000001B3 + ord(c)) % 2**64
            h ^= h >> 33
            h = h * 0xFF51AFD7ED558CCD % 2**64
            h ^= h >> 33
            counts[h % dimensions] += 1 if h >> 63 else -1
    return counts


def test_hashed_ngrams_against_plain_integers() -> None:
    texts = ["Call 12 now, Mary!", "Größe  und\nGewicht 😀", "abc abc abc abc", "a call to Mary"]
    embedder = t.HashedNgrams(sizes=(2, 3), dimensions=37)
    counts = np.array([slow_counts(text, (2, 3), 37) for text in texts])
    idf = np.log(5 / (1 + (counts != 0).sum(0))) + 1
    rows = np.sign(counts) * np.log1p(np.abs(counts)) * idf
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    embed, own = embedder.fit(texts)
    np.testing.assert_allclose(own, rows, atol=1e-6)
    np.testing.assert_allclose(embed(texts[1:3]), rows[1:3], atol=1e-6)


def test_hashed_cosines_are_near_the_cosines_without_hashing() -> None:
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list(string.ascii_lowercase), 5)) for _ in range(40)]
    texts = [" ".join(generator.choice(words, 20)) for _ in range(12)]
    grams = [Counter(f" {x} "[i : i + n] for n in (3, 4, 5) for i in range(len(x) + 3 - n)) for x in texts]
    df = Counter(gram for counts in grams for gram in counts)
    vectors = [
        {gram: math.log1p(k) * (math.log(13 / (1 + df[gram])) + 1) for gram, k in counts.items()} for counts in grams
    ]
    norms = [math.sqrt(sum(value * value for value in v.values())) for v in vectors]
    exact = [
        [sum(x * w.get(gram, 0.0) for gram, x in v.items()) / (a * b) for w, b in zip(vectors, norms, strict=True)]
        for v, a in zip(vectors, norms, strict=True)
    ]
    _, rows = t.HashedNgrams().fit(texts)
    assert np.abs(rows @ rows.T - exact).max() < 0.06


def test_short_and_blank_texts_have_vectors() -> None:
    embed, own = t.HashedNgrams().fit(["a"])
    assert np.linalg.norm(own[0]) == pytest.approx(1)
    assert not embed(["  \n"]).any()
    assert embed([]).shape == (0, 4096)
    with pytest.raises(UsageError, match="n-gram"):
        t.HashedNgrams(sizes=())


def test_the_models_embedding_is_the_mean_hidden_state_whatever_the_batch() -> None:
    model, tokenizer = tiny.causal_lm("llama", dtype=torch.float64), tiny.tokenizer()
    texts = ["A short one.", "x", "", "A rather longer text about nothing at all."]
    means = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = model.model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy() if ids else np.zeros(32)
        means.append(states)
    expected = np.array(means) - np.mean(means, axis=0)
    expected[2] = 0
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    for batch_tokens in (1, 50, 1000):
        embed, own = t.model_embedder(model, tokenizer, batch_tokens=batch_tokens).fit(texts)
        np.testing.assert_allclose(own, expected, atol=1e-6)
        np.testing.assert_allclose(embed(texts[3:]), expected[3:], atol=1e-6)
        assert embed([""]).shape == (1, 32)


def test_long_texts_are_cut_and_foreign_tokens_refused() -> None:
    model, tokenizer = tiny.causal_lm("llama"), tiny.tokenizer()
    embed, _ = t.model_embedder(model, tokenizer, max_length=5).fit(["Hello", "World"])
    assert np.array_equal(embed(["abcdefgh"]), embed(["abcdexyz"]))
    t.model_embedder(model, tokenizer).fit(["a" * 500])  # more than the model's positions
    with pytest.raises(UsageError, match="own tokenizer"):
        t.model_embedder(tiny.causal_lm("llama", vocab=40), tokenizer).fit(["Hello"])
    with pytest.raises(UsageError, match="length"):
        t.model_embedder(model, tokenizer, max_length=0)


# --- matching -------------------------------------------------------------------------------------------------------


def sentences(n: int, seed: int, words: int = 8) -> list[str]:
    generator = np.random.default_rng(seed)
    vocabulary = ["".join(np.random.default_rng(w).choice(list("abcdefghij"), 5)) for w in range(60)]
    return [" ".join(generator.choice(vocabulary, words)) for _ in range(n)]


@pytest.mark.parametrize("pairs", [1 << 20, 7])
def test_nearest_generations_by_brute_force(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "PAIRS", pairs)
    generations, targets, disjoint = sentences(9, 0), sentences(6, 1), sentences(50, 2)
    frame = t.match([*generations, " "], targets, disjoint).frame
    slow = np.array([[edit_similarity(x, y) for y in generations] for x in targets])
    np.testing.assert_allclose(frame["edit_similarity"], slow.max(1), atol=1e-12)
    assert frame["edit_nearest"].tolist() == slow.argmax(1).tolist()
    embed, own = t.HashedNgrams().fit(generations)
    cosines = embed(targets).astype(float) @ own.astype(float).T
    np.testing.assert_allclose(frame["cosine"], cosines.max(1), atol=1e-5)
    assert frame["cosine_nearest"].tolist() == cosines.argmax(1).tolist()


def test_blank_generations_keep_the_numbers_of_the_others() -> None:
    result = t.match(["", "one two three"], ["one two three"], sentences(40, 2))
    assert result.generations == 1
    assert result.frame["edit_nearest"].tolist() == [1]


def test_an_exact_copy_is_1_and_hit() -> None:
    targets = sentences(3, 1)
    result = t.match([*sentences(20, 0), targets[1]], targets, sentences(80, 2))
    assert result.frame["edit_similarity"][1] == 1.0
    assert result.frame["cosine"][1] == 1.0
    assert result.frame["edit_hit"].tolist() == [False, True, False]
    assert result.frame["cosine_hit"][1]
    assert result.edit.threshold is not None
    assert result.edit.threshold < 1


def test_a_copy_with_other_digits_is_near_by_embedding_and_less_so_by_edits() -> None:
    target = "Invoice 48213907 of 17.03.2024: pay 99215.40 to account 5518840027 by 31.12.2025, order 7781 6620."
    generator = np.random.default_rng(0)
    copy = "".join(str((int(c) + int(generator.integers(1, 10))) % 10) if c.isdigit() else c for c in target)
    frame = t.match([copy], [target], sentences(40, 2)).frame
    assert frame["cosine"][0] == 1.0
    assert frame["edit_similarity"][0] < 0.7
    plain = t.match([copy], [target], sentences(40, 2), embedder=t.HashedNgrams(fold_digits=False)).frame
    assert plain["cosine"][0] < 0.8


def test_hits_are_the_records_nearer_than_the_threshold() -> None:
    targets, disjoint, generations = sentences(40, 1, words=3), sentences(81, 2, words=3), sentences(15, 0, words=3)
    result = t.match(generations, targets, disjoint, fpr=0.2, seed=5)
    calibration, _ = t._halves(81, None, 5)
    assert len(calibration) == 41
    nearest = sorted(max(edit_similarity(disjoint[i], text) for text in generations) for i in calibration)
    assert result.edit.threshold == pytest.approx(nearest[-8])  # 8 = 0.2 * 42 rounded down
    for name, hits in (("edit", result.edit), ("cosine", result.cosine)):
        frame = result.frame
        similarity = frame["edit_similarity" if name == "edit" else name]
        hit = frame[f"{name}_hit"].astype(bool)
        assert hits.threshold is not None
        assert hits.targets is not None
        assert hits.disjoint is not None
        assert (hit == (similarity > hits.threshold)).all()
        assert hits.targets.value == pytest.approx(hit.mean())
        assert hits.excess is not None
        assert hits.excess.value == pytest.approx(hits.targets.value - hits.disjoint.value)
        assert hits.disjoint.n == 40


def test_the_false_positive_rate_of_the_threshold() -> None:
    rates = []
    for seed in range(200):
        texts = sentences(110, 100 + seed, words=3)
        result = t.match(texts[:10], texts[10:30], texts[30:], embedder=t.HashedNgrams((3,), 64), fpr=0.1, seed=seed)
        shares = (result.edit.targets, result.edit.disjoint, result.cosine.targets)
        rates.append([share.value for share in shares if share])
    mean, error = np.mean(rates, axis=0), np.std(rates, axis=0) / math.sqrt(200)
    assert (mean <= 0.1 + 3 * error).all()
    assert mean[2] > 0.04  # the test has not become one that never fires


def test_clusters_stay_on_one_side_of_the_split() -> None:
    clusters = [i // 4 if i < 40 else None for i in range(60)]
    first, second = t._halves(60, clusters, 3)
    assert sorted(first + second) == list(range(60))
    assert abs(len(first) - len(second)) <= 4
    assert not {clusters[i] for i in first} & {clusters[i] for i in second} - {None}
    assert t._halves(60, clusters, 3) == (first, second) != t._halves(60, clusters, 4)
    result = t.match(sentences(5, 0), sentences(4, 1), sentences(60, 2), disjoint_clusters=clusters, clusters=[1] * 4)
    assert result.edit.status == "ok"
    with pytest.raises(UsageError, match="cluster for each"):
        t.match(["a b"], ["a"], sentences(60, 2), disjoint_clusters=[1])


@pytest.mark.parametrize(("n", "status"), [(0, "not resolvable"), (36, "not resolvable"), (37, "ok")])
def test_too_few_unseen_records_resolve_nothing(n: int, status: str) -> None:
    result = t.match(sentences(5, 0), sentences(4, 1), sentences(n, 2))
    for hits in (result.edit, result.cosine):
        assert hits.status == status
        if status != "ok":
            assert f"needs 37 or more unseen records, found {n}" in str(hits.reason)
            assert hits.threshold is hits.targets is hits.disjoint is hits.excess is None
    if status != "ok":
        assert result.frame["edit_hit"].tolist() == [None] * 4
    assert np.isfinite(result.frame[["edit_similarity", "cosine", "edit_pvalue"]].to_numpy(dtype=float)).all()


def test_bad_input_is_refused_without_quoting_it() -> None:
    good = sentences(40, 2)
    with pytest.raises(UsageError, match="found 0 and 1"):
        t.match(["  "], ["a secret"], good)
    with pytest.raises(UsageError, match="found 1 and 0"):
        t.match(["a"], [], good)
    with pytest.raises(UsageError, match="blank") as caught:
        t.match(["a"], ["a secret", ""], good)
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="rate"):
        t.match(["a"], ["b"], good, fpr=0.0)


# --- end to end -----------------------------------------------------------------------------------------------------


def test_an_aligned_model_writes_its_post_training_data_and_an_untrained_one_does_not() -> None:
    tokenizer = tiny.tokenizer()
    generator = np.random.default_rng(0)

    def texts(n: int) -> list[str]:
        return ["".join(generator.choice(list(string.ascii_lowercase), 12)) for _ in range(n)]

    targets, disjoint, plain = texts(6), texts(80), texts(12)
    head = t.head(tokenizer)
    conversations = [[*head, *tokenizer(text)["input_ids"], tiny.EOS] for text in targets]
    pretraining = [tokenizer(text)["input_ids"] for text in plain]  # also known, yet not written after the head
    aligned, untrained = tiny.causal_lm("llama"), tiny.causal_lm("llama")
    tiny.train(aligned, [*conversations, *pretraining], steps=80)

    def hits(model: torch.nn.Module, looked_for: Sequence[str]) -> tuple[float, float]:
        stop, _ = t.conversation_end(tokenizer)
        drawn = t.extract(model, head, 48, 14, stop=stop)
        generations = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
        result = t.match(generations, looked_for, disjoint)
        assert result.edit.targets is not None
        assert result.cosine.targets is not None
        return result.edit.targets.value, result.cosine.targets.value

    assert min(hits(aligned, targets)) >= 0.8
    assert max(hits(aligned, plain)) <= 0.25
    assert max(hits(untrained, targets)) <= 0.2


def test_results_hold_no_text() -> None:
    result = t.match(["some secret words"], ["some secret words"], sentences(40, 2))
    assert "secret" not in repr(result)
    assert all(dtype.kind in "ifb" or name == "edit_hit" for name, dtype in result.frame.dtypes.items())
