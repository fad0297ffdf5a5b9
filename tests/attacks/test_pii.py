"""Detectors of personal data, kind by kind, and the three games against slow oracles."""

from __future__ import annotations

import base64
import copy
import ipaddress
import json
import random
import string
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from torch import nn

from attacks.pii import detectors
from attacks.pii.detectors import KINDS, Span, canonical, entropy, find, luhn, mod97, presidio
from attacks.pii.games import Question, extraction, inference, lexical_overlap, reconstruction
from probes.errors import ResourceError, UsageError
from probes.records import TokenRecord
from tests import tiny

# --- detectors ------------------------------------------------------------------------------------------------------

# Fictitious values with valid check digits: published examples and test numbers of the card networks.
JWT = ".".join(
    base64.urlsafe_b64encode(part).rstrip(b"=").decode()
    for part in (b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"1234567890"}', b"\x01" * 32)
)
PEM = "-----{} RSA PRIVATE KEY-----\n{}\n-----{} RSA PRIVATE KEY-----".format("BEGIN", "MIIEow" * 40, "END")
POSITIVE = {
    "email": ["jane.doe+x@example.co.uk", "j_d-1%z@mail.example.org", "jos\u00e9@ex\u00e4mple.de", "A@B.museum"],
    "phone": (
        "+49 30 1234567 | +1 (555) 123-4567 | (555) 123-4567 | 555-123-4567 | 555.123.4567"
        " | 06 12 34 56 78 | 0049 30 123456 | 030/1234567 | 020 7946 0123 | 1-800-555-0199"
        " | +442079460123 | +49 (0)30 1234567"
    ).split(" | "),
    "iban": (
        "DE89370400440532013000 | DE89 3704 0044 0532 0130 00 | GB82 WEST 1234 5698 7654 32"
        " | NL91ABNA0417164300 | FR14 2004 1010 0505 0001 3M02 606 | NO93 8601 1117 947"
        " | gb82west12345698765432"
    ).split(" | "),
    "card": (
        "4111111111111111 | 4111 1111 1111 1111 | 5555-5555-5555-4444 | 378282246310005"
        " | 3782 822463 10005 | 6011000990139424 | 3530111333300000 | 30569309025904 | 2223003122003222"
        " | 4222222222222"
    ).split(" | "),
    "ipv4": ["10.0.0.1", "192.168.255.254", "8.8.8.8"],
    "ipv6": ["2001:db8::1", "fe80::1ff:fe23:4567:890a", "::1", "::ffff:192.168.0.1", "1:2:3:4:5:6:7:8"],
    "aws_key": ["AKIAIOSFODNN7EXAMPLE"],
    "github_token": ["ghp_" + "a1B2c3D4e5F6" * 3, "github_pat_" + "A1" * 41],
    "jwt": [JWT],
    "private_key": [PEM, PEM.replace("RSA ", "")],
    "secret": ["Zx81Qp0vN4rT7mK2sW9eB3yL", "f3Ga9LkPq2/Xv7+TzB5cYw8N1sDhRjUe"],
}
NEGATIVE = {
    "email": ["jane.doe@", "@example.com", "a@b", "a..b@", "jane doe at example.com", "x@example.c0m", "a@-b.com"],
    "phone": (
        "2024-01-15 | 15.01.2024 | 01-02-2024 | 1234567890 | 12345 | 3.14159265 | 1,234,567.89"
        " | 978-3-16-148410-0 | 12:34:56 | 555-1234 | 1.2.3.4 | 2001:db8::1 | +1234 | 000-000-0000"
        " | 0 1 2 3 4 5"
    ).split(" | "),
    "iban": (
        "DE88370400440532013000 | GB82 WEST 1234 5698 7654 33 | DE8937040044053201300"
        " | XX89370400440532013000 | DE893704004405320130001 | DE89 3704 0044 0532 0130 0X"
    ).split(" | "),
    "card": (
        "4111111111111112 | 4111 1111-1111 1111 | 1234567890123452 | 0000000000000000 | 41111111111111111"
        " | 411111111111 | 56 1234567890 | 4111.1111.1111.1111 | x4111111111111111 | 4111111111111111.5"
    ).split(" | "),
    "ipv4": (
        "1.2.3 | 1.2.3.4.5 | 256.1.1.1 | 01.2.3.4 | v1.2.3.4 | version 1.2.3.4 | release 10.0.0.1"
        " | Chrome/120.0.0.0 | lib-1.2.3.4 | 1.2.3.4-beta | 1.2.3.4.tar | firmware: 2.4.1.0"
    ).split(" | "),
    "ipv6": ["12:34:56", "00:1B:44:11:3A:B7", "std::vector", "a::b", "::", "1:2:3", "2001:db8::1::2", "12345::1"],
    "aws_key": ["AKIAIOSFODNN7EXAMPL", "AKIAiosfodnn7example", "xAKIAIOSFODNN7EXAMPLE", "AKIA IOSFODNN7EXAMPLE"],
    "github_token": ["ghp_short", "ghx_" + "a1B2c3D4e5F6" * 3, "xghp_" + "a1B2c3D4e5F6" * 3],
    "jwt": ["eyJhbGciOi.abc", "eyJ" + "x" * 30 + "." + "y" * 10 + "." + "z" * 10, "eyJhbGciOi", "a.b.c"],
    "private_key": ["-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----", PEM[5:31], PEM[:32]],
    "secret": (
        "thisIsAVeryLongIdentifierName1 | d41d8cd98f00b204e9800998ecf8427e"
        " | AAAAAAAAAAAAAAAAAAAAAAAAAAAAAA | short1A | https://example.com/some/long/path"
        " | 123e4567-e89b-12d3-a456-426614174000 | password: letmein"
    ).split(" | "),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_where_it_stands(kind: str) -> None:
    for number, value in enumerate(POSITIVE[kind]):
        for before, after in (("", ""), ("see ", " now"), ("(", ")"), ("\n", "."), ("\u7535\u8bdd\u662f", "\u8bf7")):
            if after == "." and kind in ("jwt", "private_key"):
                continue  # a full stop may belong to them
            text = before + value + after
            found = [span for span in find(text) if span.kind == kind]
            assert found == [Span(len(before), len(before) + len(value), kind)], (number, before)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_leaves_look_alikes(kind: str) -> None:
    for number, value in enumerate(NEGATIVE[kind]):
        for text in (value, f"see {value} now"):
            assert find(text, [kind]) == [], number


def test_check_digits_against_all_single_errors() -> None:
    """Luhn and modulo 97 both catch every single wrong digit; nine of ten, and 96 of 97, random numbers."""
    card, iban = "4111111111111111", "DE89370400440532013000"
    assert luhn(card)
    assert mod97(iban)
    for place in range(16):
        for digit in set(string.digits) - {card[place]}:
            assert not luhn(card[:place] + digit + card[place + 1 :])
    for place in range(2, len(iban)):
        for digit in set(string.digits) - {iban[place]}:
            assert not mod97(iban[:place] + digit + iban[place + 1 :])
    source = random.Random(0)
    valid = [luhn("".join(source.choices(string.digits, k=16))) for _ in range(5000)]
    assert sum(valid) / 5000 == pytest.approx(0.1, abs=0.015)
    valid = [mod97("DE" + "".join(source.choices(string.digits, k=20))) for _ in range(5000)]
    assert sum(valid) / 5000 == pytest.approx(1 / 97, abs=0.005)


def test_random_numbers_are_seldom_cards_and_never_wrong_ones() -> None:
    source = random.Random(1)
    numbers = ["".join(source.choices(string.digits, k=16)) for _ in range(3000)]
    found = [number for number in numbers if find(number, ["card"])]
    assert all(luhn(number) for number in found)
    assert len(found) < 0.06 * len(numbers)


def test_random_tokens_are_found_at_the_stated_rate() -> None:
    source = random.Random(2)
    letters = string.ascii_letters + string.digits
    for length, low in ((24, 0.95), (32, 0.975), (40, 0.985)):
        tokens = ["".join(source.choices(letters, k=length)) for _ in range(1000)]
        assert sum(bool(find(token, ["secret"])) for token in tokens) >= low * 1000


def test_values_assigned_to_telling_names_are_secrets() -> None:
    for text, value in [
        ("password: hunter2222", "hunter2222"),
        ('api_key="0123456789abcdef"', "0123456789abcdef"),
        ("DB_PASSWORD=s3cr3t-pass!", "s3cr3t-pass"),
        ("my token is abc12345.", "abc12345"),
        ("'secret' => 'x9x9x9x9'", "x9x9x9x9"),
    ]:
        (span,) = find(text)
        assert (span.kind, text[span.start : span.end]) == ("secret", value)
    for text in ("the password is not known", "token: https://example.com/a1", "secret: 12345678", "tokens = 8"):
        assert find(text, ["secret"]) == []


def test_overlaps_go_to_the_stricter_kind_and_spans_are_ordered() -> None:
    text = f"token={POSITIVE['github_token'][0]}; key: {POSITIVE['card'][0]} mail jane@10.example.com {PEM}"
    found = find(text)
    assert [span.kind for span in found] == ["github_token", "card", "email", "private_key"]
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert [span.kind for span in find("::ffff:192.168.0.1")] == ["ipv6"]
    assert [span.kind for span in find("4111 1111 1111 1111")] == ["card"]  # not a phone number


def test_overlaps_are_resolved_as_by_brute_force() -> None:
    source = random.Random(3)
    for _ in range(200):
        spans = []
        for _ in range(source.randrange(12)):
            start = source.randrange(30)
            spans.append((source.randrange(3), Span(start, start + source.randrange(1, 8), "k")))
        expected: list[Span] = []
        for _, span in sorted(spans, key=lambda s: (s[0], s[1].start - s[1].end, s[1].start)):
            if not any(set(range(span.start, span.end)) & set(range(o.start, o.end)) for o in expected):
                expected.append(span)
        assert detectors._resolve(spans) == sorted(expected)


def test_a_card_among_other_numbers() -> None:
    for text in ("4111 1111 1111 1111 123", "pay 4111111111111111 12/29", "1234 4111 1111 1111 1111 9"):
        assert [text[s.start : s.end].replace(" ", "") for s in find(text, ["card"])] == ["4111111111111111"]
    text = "no12 DE89 3704 0044 0532 0130 00 is mine"
    assert [text[s.start : s.end] for s in find(text, ["iban"])] == ["DE89 3704 0044 0532 0130 00"]


def test_a_private_key_that_is_cut_off() -> None:
    for end in (100, 200, len(PEM) - 20):
        assert [span.kind for span in find(f"key\n{PEM[:end]}", ["private_key"])] == ["private_key"]
    assert find(PEM[:32], ["private_key"]) == []  # a header alone


def test_own_patterns() -> None:
    text = "patient MRN-004711, staff EMP-7, mail a@b.org"
    assert [s.kind for s in find(text, patterns={"mrn": r"MRN-\d{6}"})] == ["mrn", "email"]
    assert find(text, ["mrn"], {"mrn": r"MRN-(?P<value>\d{6})"}) == [Span(12, 18, "mrn")]
    assert [s.kind for s in find(text, ["email"], {"email": r"EMP-\d"})] == ["email"]
    assert find(text, ["x"], {"x": r"z*"}) == []  # matches of nothing are none
    assert [s.kind for s in find("a@b.org", patterns={"whole": ".+"})] == ["whole"]


def test_errors_quote_neither_patterns_nor_text() -> None:
    for case in (
        lambda: find("secret text", ["nonsense"]),
        lambda: find("secret text", patterns={"own": "(unclosed"}),
    ):
        with pytest.raises(UsageError, match="expected") as caught:
            case()
        assert "nonsense" not in str(caught.value)
        assert "unclosed" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "jane" not in repr(find("jane@example.com"))


@pytest.mark.parametrize("unit", ["1 ", "0 ", "1-", "1", "a.", "a@a.", "(1)", "AB12 ", "eyJ", "1:", "aB1", "password="])
def test_no_text_takes_more_than_linear_time(unit: str) -> None:
    text = unit * (60_000 // len(unit))
    start = time.perf_counter()
    find(text)
    assert time.perf_counter() - start < 5  # a quadratic search of 60,000 characters takes minutes


def test_empty_text() -> None:
    assert find("") == []
    assert find("nothing to see") == []
    assert find("jane@example.com", []) == []


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        ("phone", "+49 30 123-4567", "0049 (0)30 1234567"),
        ("iban", "de89 3704 0044 0532 0130 00", "DE89370400440532013000"),
        ("card", "4111-1111-1111-1111", "4111111111111111"),
        ("email", "Jane@Example.COM", "jane@example.com"),
        ("ipv6", "2001:0db8:0::1", "2001:db8::1"),
        ("name", "Jane  DOE", "jane doe"),
    ],
)
def test_canonical_spelling(kind: str, a: str, b: str) -> None:
    assert canonical(kind, a) == canonical(kind, b)
    assert canonical(kind, a) != canonical(kind, a + "1")


def test_canonical_keeps_the_case_of_secrets_and_whatever_does_not_parse() -> None:
    assert canonical("secret", "aB") != canonical("secret", "ab")
    assert canonical("ipv4", "no address") == "no address"
    assert canonical("ipv4", "8.8.8.8") == str(ipaddress.ip_address("8.8.8.8"))


def test_entropy_of_known_texts() -> None:
    assert entropy("aaaa") == 0
    assert entropy("abcd") == pytest.approx(2)


def test_presidio_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ResourceError, match="pip install presidio-analyzer") as caught:
        presidio("my name is Jane")
    assert "Jane" not in str(caught.value)

    class Engine:
        def __init__(self, supported_languages: list[str]) -> None:
            assert supported_languages == ["de"]

        def analyze(self, text: str, entities: list[str] | None, language: str) -> list[SimpleNamespace]:
            hits = [("PERSON", 11, 15, 0.85), ("LOCATION", 8, 15, 0.4), ("PHONE_NUMBER", 0, 2, 0.5)]
            return [
                SimpleNamespace(entity_type=kind, start=start, end=end, score=score)
                for kind, start, end, score in hits
                if entities is None or kind in entities
            ]

    fake = ModuleType("presidio_analyzer")
    fake.AnalyzerEngine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "presidio_analyzer", fake)
    monkeypatch.setattr(detectors, "_ENGINES", {})
    found = presidio("my name is Jane", language="de")
    assert found == [Span(0, 2, "phone_number"), Span(11, 15, "person")]
    assert presidio("my name is Jane", ["LOCATION"], "de") == [Span(8, 15, "location")]
    monkeypatch.setattr(detectors, "_ENGINES", {"en": Engine(["de"])})
    assert find("my name is Jane", ["email", "presidio:PERSON"]) == [Span(11, 15, "person")]
    assert find("my name is Jane", ["email"]) == []


def test_presidio_without_its_language_model_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the process where it cannot download the model."""

    def leave(supported_languages: list[str]) -> None:
        raise SystemExit(1)

    fake = ModuleType("presidio_analyzer")
    fake.AnalyzerEngine = leave  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "presidio_analyzer", fake)
    monkeypatch.setattr(detectors, "_ENGINES", {})
    with pytest.raises(ResourceError, match="language model"):
        find("my name is Jane", ["presidio:PERSON"])


def test_spans_are_plain_data() -> None:
    assert json.dumps([(s.kind, s.start, s.end) for s in find("a@b.org")]) == '[["email", 0, 7]]'


# --- games ----------------------------------------------------------------------------------------------------------

TOKENIZER = tiny.tokenizer()
PEOPLE = ["Ann", "Bob", "Cid", "Dora", "Eve", "Finn", "Gus", "Hana", "Ivo", "June"]


def address(number: int, seed: int = 0) -> str:
    source = random.Random(f"{seed} {number}")
    return "".join(source.choices(string.ascii_lowercase, k=5)) + "@mail.org"


def sentence(name: str) -> Callable[[str], TokenRecord]:
    head = f"The mail of {name} is "

    def build(value: str) -> TokenRecord:
        ids = TOKENIZER(f"{head}{value}; so it is.").input_ids
        return TokenRecord(name, tuple(ids), len(TOKENIZER(head).input_ids), 0)

    return build


def questions(n: int = len(PEOPLE), candidates: int = 10) -> list[Question]:
    return [
        Question(
            f"q{i}",
            sentence(PEOPLE[i]),
            address(i),
            tuple(address(j) for j in range(candidates)),
            kind="email",
            prompt=f"The mail of {PEOPLE[i]} is [...]; so it is.",
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = tiny.causal_lm("llama", seed=3, initializer_range=0.05, hidden_size=64, intermediate_size=96, head_dim=16)
    tiny.train(model, [q.record(q.answer).ids for q in questions()], steps=100, lr=8e-3)
    return model


def slow_log_likelihood(model: nn.Module, record: TokenRecord) -> float:
    with torch.no_grad():
        log_probs = copy.deepcopy(model).double()(torch.tensor([record.ids])).logits[0].log_softmax(-1)
    return float(sum(log_probs[t - 1, record.ids[t]] for t in range(record.n_prompt, len(record.ids))))


@pytest.mark.parametrize("per_token", [False, True])
def test_inference_ranks_as_brute_force(per_token: bool) -> None:
    model = tiny.causal_lm("llama", seed=1)
    asked = [replace(q, candidates=(*q.candidates, "a@b.org", "verylongname@mail.org")) for q in questions(4)]
    game = inference(model, asked, per_token=per_token)
    for row, question in zip(game.table.itertuples(), asked, strict=True):
        scores = {}
        for value in {question.answer, *question.candidates}:
            record = question.record(value)
            scores[value] = slow_log_likelihood(model, record) / (record.n_tokens if per_token else 1)
        own = scores.pop(question.answer)
        assert row.rank == 1 + sum(other >= own for other in scores.values())
        assert row.candidates == 12
        assert row.margin == pytest.approx(own - max(scores.values()), rel=1e-3, abs=1e-5)
    assert game.scored == 4 * 12
    assert game.generated_tokens == 0


def test_inference_names_the_planted_values_and_guesses_unseen_ones(trained: nn.Module) -> None:
    game = inference(trained, questions())
    assert game.status == "ok"
    assert game.accuracy is not None
    assert game.accuracy.value == 1.0
    assert game.accuracy.low > 0.6
    assert game.chance == {1: 0.1, 5: 0.5, 10: 1.0}
    assert game.top_k[10].value == 1.0
    assert (game.table["margin"] > 0).all()
    unseen = [replace(q, answer=address(i, seed=7), candidates=()) for i, q in enumerate(questions())]
    others = tuple(address(j, seed=8) for j in range(9))
    missed = inference(trained, [replace(q, candidates=others) for q in unseen])
    assert missed.accuracy is not None
    assert missed.accuracy.value <= 0.5  # P(more than 5 of 10 at 0.1) = 0.0001


def test_inference_of_never_seen_values_is_at_chance() -> None:
    """200 questions with 5 exchangeable candidates each, on a model that was never trained."""
    model = tiny.causal_lm("gpt2", seed=9)
    asked = []
    for i in range(200):
        values = [address(j, seed=100 + i) for j in range(5)]
        asked.append(Question(f"q{i}", sentence(PEOPLE[i % 10]), values[0], tuple(values), kind="email"))
    game = inference(model, asked)
    hits = int(game.table["hit"].sum())
    assert binomtest(hits, 200, 0.2).pvalue > 0.001
    assert game.chance[1] == pytest.approx(0.2)
    ranks = game.table["rank"].to_numpy(dtype=float)
    assert chisquare(np.bincount(ranks.astype(int) - 1, minlength=5)).pvalue > 0.001


def test_reconstruction_samples_what_was_planted(trained: nn.Module) -> None:
    asked = questions(6)
    game = reconstruction(trained, asked, TOKENIZER.decode, draws=8, length=20, seed=1)
    assert game.accuracy is not None
    assert game.accuracy.value >= 5 / 6
    assert game.generated_tokens == 6 * 8 * 20
    assert (game.table["candidates"] <= 3).all()  # the draws of one question, not of others
    again = reconstruction(trained, asked, TOKENIZER.decode, draws=8, length=20, seed=1)
    assert game.table.equals(again.table)


def test_reconstruction_ranks_the_distinct_first_values_of_the_draws(trained: nn.Module) -> None:
    """The draws replaced by texts of our own: candidates and ranks by hand."""
    question = questions(1)[0]
    texts = ["x@y.org and z@y.org", "nothing", question.answer.upper(), "X@Y.org", "w@y.org;"]
    calls = iter(texts)
    game = reconstruction(trained, [question], lambda ids: next(calls), draws=5, length=3)
    assert game.table["candidates"].tolist() == [3]  # x@y.org once, the answer, w@y.org
    assert game.table["rank"].tolist() == [1]
    assert game.scored == 3
    calls = iter(texts)
    named = reconstruction(
        trained, [question], lambda ids: next(calls), draws=5, length=3, values=lambda text: text.split()
    )
    assert named.table["candidates"].tolist() == [4]  # the first word of each


def test_reconstruction_without_the_answer_is_a_miss() -> None:
    model = tiny.causal_lm("llama", seed=4)
    game = reconstruction(model, questions(5), TOKENIZER.decode, draws=2, length=4)
    assert game.accuracy is not None
    assert game.accuracy.value == 0.0
    assert 0 < game.accuracy.high < 1
    assert game.table["rank"].isna().all()
    assert game.table["margin"].isna().all()
    assert game.chance[1] == 0.0
    assert not game.table["hit"].any()


def test_prompts_are_jointly_tokenised(trained: nn.Module) -> None:
    """Defect 4: tokenising prefix and value apart shifts the logits where a token spans the border."""
    tokenizer = tiny.tokenizer(vocab=112, merges=[(" ", c) for c in "abcdefghij"])
    model = tiny.causal_lm("llama", seed=2, vocab=112)

    def build(value: str) -> TokenRecord:
        text = f"The mail is {value}."
        encoded = tokenizer(text, return_offsets_mapping=True)
        at = len("The mail is ")
        return TokenRecord("r", tuple(encoded.input_ids), sum(end <= at for _, end in encoded.offset_mapping), 0)

    candidates = ("ann@b.org", "bob@b.org", "zoe@b.org")
    game = inference(model, [Question("q", build, "ann@b.org", candidates, kind="email")])
    scores = [slow_log_likelihood(model, build(value)) for value in candidates]
    halves = len(tokenizer("The mail is ").input_ids) + len(tokenizer("ann@b.org.").input_ids)
    assert len(build("ann@b.org").ids) < halves  # the border is inside a token
    assert game.table["rank"].tolist() == [1 + sum(other >= scores[0] for other in scores[1:])]


def test_cued_questions_are_counted_apart(trained: nn.Module) -> None:
    asked = questions()
    asked[0] = replace(asked[0], prompt=f"Write to {asked[0].answer.upper()} please. The mail of Ann is")
    asked[1] = replace(asked[1], prompt="the local part is " + asked[1].answer[:9])
    game = inference(trained, asked)
    assert game.table["cued"].tolist() == [True, True] + [False] * 8
    assert game.accuracy is not None
    assert game.cued is not None
    assert (game.accuracy.n, game.cued.n) == (8, 2)
    all_cued = inference(trained, [replace(q, prompt=q.answer) for q in asked])
    assert (all_cued.status, all_cued.accuracy, all_cued.top_k, all_cued.chance) == ("not resolvable", None, {}, {})
    assert all_cued.reason
    assert all_cued.cued is not None


def test_lexical_overlap_by_hand() -> None:
    assert lexical_overlap("my name is jane", "Jane") == 1.0
    assert lexical_overlap("my name is jan", "jane") == 0.5  # jan, ane
    assert lexical_overlap("unrelated", "jane") == 0.0
    assert lexical_overlap("a b", "B") == 1.0
    assert lexical_overlap("anything", "") == 0.0
    assert lexical_overlap("", "jane") == 0.0
    assert lexical_overlap("x  \n jane   doe", "jane doe") == 1.0
    with pytest.raises(UsageError):
        lexical_overlap("a", "b", n=0)


def test_ties_count_against_the_finding() -> None:
    model = tiny.causal_lm("llama")
    same = sentence("Ann")("x@y.org")
    game = inference(model, [Question("q", lambda value: same, "a", ("b", "c"))])
    assert game.table["rank"].tolist() == [3]


def test_intervals_respect_groups(trained: nn.Module) -> None:
    single = inference(trained, questions())
    grouped = inference(trained, [replace(q, group=i % 2) for i, q in enumerate(questions())])
    assert single.accuracy is not None
    assert grouped.accuracy is not None
    assert grouped.accuracy.low < single.accuracy.low


def test_extraction_game_by_hand() -> None:
    records = ["mail a@x.org and +49 30 1234567", "mail b@x.org, card 4111 1111 1111 1111", "nothing at all"]
    samples = ["write to A@X.org or c@x.org", "number 4111-1111-1111-1111", "spam spam", "a@x.org again"]
    result = extraction(samples, records, controls=["d@x.org", "c@x.org and b@x.org"])
    assert result.status == "ok"
    assert result.recall is not None
    assert result.precision is not None
    assert result.control is not None
    assert (result.recall.value, result.recall.n) == (2 / 4, 4)
    assert (result.precision.value, result.precision.n) == (2 / 3, 3)
    assert (result.control.value, result.control.n) == (1 / 2, 2)  # b@x.org stands in a record
    assert result.hits == (True, True, False)
    assert result.by_kind.to_dict("list") == {
        "kind": ["card", "email", "phone"],
        "in_records": [1, 2, 1],
        "in_samples": [1, 2, 0],
        "matched": [1, 1, 0],
    }
    only = extraction(samples, records, kinds=["email"])
    assert only.recall is not None
    assert only.recall.n == 2


def test_extraction_does_not_count_values_of_the_prompt() -> None:
    records = ["a@x.org", "b@x.org"]
    given = extraction(["a@x.org", "b@x.org"], records, prompts=["tell me about a@x.org", "who?"])
    assert given.recall is not None
    assert given.recall.value == 0.5
    assert given.hits == (False, True)


def test_extraction_without_values_is_not_resolvable() -> None:
    result = extraction(["a@x.org"], ["no values here"])
    assert (result.status, result.recall, result.precision, result.control) == ("not resolvable", None, None, None)
    assert result.reason
    nothing = extraction(["spam"], ["a@x.org"])
    assert nothing.precision is None
    assert nothing.recall is not None
    assert (nothing.recall.value, nothing.recall.low) == (0.0, 0.0)
    assert 0.9 < nothing.recall.high < 1


def test_extraction_groups_widen_the_interval() -> None:
    records = [f"u{i}@x.org" for i in range(40)]
    samples = records[:20]
    alone = extraction(samples, records).recall
    grouped = extraction(samples, records, groups=[i // 10 for i in range(40)]).recall
    assert alone is not None
    assert grouped is not None
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_games_refuse_bad_input_without_quoting_it(trained: nn.Module) -> None:
    question = questions(1)[0]
    name = question.answer.partition("@")[0]
    broken = replace(question, record=lambda value: TokenRecord("r", tuple(TOKENIZER(value).input_ids)[:1], 1, 0))
    for case in (
        lambda: inference(trained, []),
        lambda: inference(trained, [replace(question, candidates=())]),
        lambda: inference(trained, [replace(question, candidates=(question.answer, question.answer.upper()))]),
        lambda: inference(trained, [broken]),
        lambda: inference(trained, [question], top_k=(0,)),
        lambda: reconstruction(trained, [], TOKENIZER.decode),
        lambda: reconstruction(trained, [question], TOKENIZER.decode, draws=0),
        lambda: reconstruction(trained, [replace(question, kind="nonsense")], TOKENIZER.decode),
        lambda: reconstruction(trained, [question], TOKENIZER.decode, length=10_000),
        lambda: extraction([], [question.answer]),
        lambda: extraction([question.answer], []),
        lambda: extraction([question.answer], [question.answer], prompts=[]),
        lambda: extraction([question.answer], [question.answer], groups=[]),
        lambda: extraction([question.answer], [question.answer], kinds=["nonsense"]),
    ):
        with pytest.raises(UsageError, match="expected") as caught:
            case()
        assert name not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert name not in repr(question)
    assert name not in repr(inference(trained, questions(2)))
    assert "Ann" not in repr(question)


def test_games_leave_the_model_as_found() -> None:
    model = tiny.causal_lm("llama", seed=6)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    inference(model, questions(2))
    reconstruction(model, questions(2), TOKENIZER.decode, draws=2, length=3)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
