"""Changed prompts: what each kind keeps, that seeds decide, and that the answer never gets in."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.surface import chat, exfiltration
from attacks.surface.context import neighbours
from attacks.surface.cues import CUED, gives_away, shown
from attacks.surface.rewrites import KINDS, LIKELIHOOD, behind, demonstrated, rewrites, topic
from attacks.surface.spelling import SPELLINGS, spelled
from probes.errors import UsageError

PROMPT = "Question: What is the name of the book that Anna Quill wrote in 1987?\nAnswer:"
COMPLETION = " It is called The Lantern Keeper of Dunmore."
PAIRS = [("Question: Who is Bo Ray?\nAnswer:", " A baker."), ("Question: Where is Ulm?\nAnswer:", " In the south.")]
OTHERS = [" It is called A Stone for Winter.", " Nobody knows.", " He never wrote one."]


def made(kind: str, prompt: str = PROMPT, completion: str = COMPLETION, seed: int = 0, **more: object) -> list[str]:
    return rewrites(prompt, completion, kind, (seed, 3), demonstrations=PAIRS, others=OTHERS, **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ rewrites


def test_the_nine_kinds_of_rwku() -> None:
    assert len(KINDS) == 9
    assert set(KINDS) - set(LIKELIHOOD) == {"multiple_choice", "reverse_query"}


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_decide_and_the_prompt_is_kept(kind: str) -> None:
    assert made(kind) == made(kind)
    found = {text for seed in range(12) for text in made(kind, seed=seed)}
    assert PROMPT not in found
    if kind not in ("reverse_query", "in_context_learning"):
        assert len(found) > 1
    for text in found:
        if kind in ("synonym_manipulation", "reverse_query"):
            continue
        assert PROMPT in text or PROMPT.rstrip() in text
        assert kind in ("affirmative_suffix", "multiple_choice") or text.endswith(PROMPT)


@pytest.mark.parametrize("kind", LIKELIHOOD)
@pytest.mark.parametrize("completion", [COMPLETION, " Lantern", " 1987-03-11", " 灯塔看守人"])
def test_a_kind_scored_by_likelihood_never_reads_the_completion(kind: str, completion: str) -> None:
    """A prompt that holds the answer is answered by copying it."""
    for variants in (1, 9):
        texts = made(kind, completion=completion, variants=variants)
        assert texts == made(kind, completion=" something else", variants=variants)
        assert not any(completion.strip() in text for text in texts)
        assert not any(gives_away(text, PROMPT, completion) for text in texts)


def test_kinds_that_hold_the_answer_do() -> None:
    for kind in set(KINDS) - set(LIKELIHOOD):
        assert KINDS[kind].holds_answer
        assert all(COMPLETION.strip() in text for text in made(kind))


def test_blanks_at_the_end_stay_there() -> None:
    assert behind("Paris is", " Sure:") == "Paris is Sure:"
    assert behind("Paris is \n", " Sure:") == "Paris is Sure: \n"
    for kind in ("prefix_injection", "affirmative_suffix", "role_playing", "background_hint", "cross_lingual"):
        assert all(text.endswith(" \n") for text in made(kind, PROMPT + " \n"))
        assert all(not text[-1].isspace() for text in made(kind))


def test_variants_are_different_and_as_many_as_there_are() -> None:
    for kind in ("prefix_injection", "affirmative_suffix", "role_playing", "background_hint"):
        assert len(made(kind, variants=2)) == len(set(made(kind, variants=2))) == 2
        assert len(made(kind, variants=50)) == 3
    assert len(made("cross_lingual", variants=50)) == 4
    assert len(made("in_context_learning", variants=50)) == 1


def test_synonyms_change_words_and_leave_names_and_numbers() -> None:
    found = {text for seed in range(20) for text in made("synonym_manipulation", seed=seed)}
    assert all("Anna Quill" in text and "1987" in text for text in found)
    assert not any("book" in text for text in found)
    assert any(text.startswith("Query:") or text.startswith("Inquiry:") for text in found)  # a capital stays one
    assert all("What is" not in text for text in found)
    assert made("synonym_manipulation", "Zzz Qqq:") == []
    own = made("synonym_manipulation", "the quill of Mark Book", synonyms={"quill": "feather"})
    assert own == ["the feather of Mark Book"]  # a capital inside a sentence may belong to a name
    assert made("synonym_manipulation", "an ebook of a bookshop", variants=3) == []  # whole words
    assert made("synonym_manipulation", "the book", synonyms={"book": ["tome"]}) == ["the tome"]  # before the own table
    with pytest.raises(UsageError, match="blank"):
        made("synonym_manipulation", synonyms={"book": " "})


def test_topics_are_the_prompts_own_words() -> None:
    assert topic(PROMPT) == "Anna Quill"
    assert topic("Customer file of Adela Ashgrove:") == "Adela Ashgrove"
    assert topic("Adela Ashgrove lives at") == "Adela Ashgrove"
    assert topic("what does the lighthouse keeper eat") == "lighthouse, keeper"
    assert topic("?!") == "a document you have read"
    assert topic("他住在哪里") == "他住在哪里"


def test_what_cannot_be_rewritten() -> None:
    for arguments, words in (
        (("", "x", "prefix_injection", 0), "blank"),
        (("p", "x", "nothing", 0), "kind among"),
        (("p", "x", "in_context_learning", 0), "demonstrations"),
        (("p", "x", "multiple_choice", 0), "other records"),
    ):
        with pytest.raises(UsageError, match=words):
            rewrites(*arguments)
    with pytest.raises(UsageError, match="variant"):
        made("role_playing", variants=0)


# ---------------------------------------------------------------------------------------------------------------- cues


def test_words_count_not_letters() -> None:
    """A substring is no leak: "no" stands in "know", "art" in "party"."""
    assert shown("I know a party of nine", " no") == 0.0
    assert shown("I know a party of nine", " art") == 0.0
    assert shown("No, he said", " no") == 1.0
    assert shown("the lantern keeper, of Dunmore", "The Lantern Keeper of Dunmore.") == 1.0
    assert shown("Dunmore of keeper lantern the", "The Lantern Keeper of Dunmore") == pytest.approx(1 / 5)
    assert shown("他住在灯塔里", "灯塔") == 1.0
    assert shown("", COMPLETION) == 0.0
    assert shown("wait ... what", " ...") == 1.0
    assert shown("wait", " ...") == 0.0


def test_what_the_prompt_shows_already_is_no_fault_of_a_change() -> None:
    prompt = "The Lantern Keeper of Dunmore is called"
    assert not gives_away("Please: " + prompt, prompt, " The Lantern Keeper of Dunmore")
    assert gives_away("The Lantern Keeper of Dunmore. " + PROMPT, PROMPT, " The Lantern Keeper of Dunmore")
    opening = "It is called The Iron Gate of Elm. " + PROMPT  # answers share openings
    assert shown(opening, COMPLETION) == pytest.approx(4 / 8)
    assert CUED > 4 / 8
    assert not gives_away(opening, PROMPT, COMPLETION)


# ------------------------------------------------------------------------------------------------------------ spelling


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spellings_keep_digits_letters_and_the_end(kind: str) -> None:
    text = "When was Anna Quill, of 12 Mill-Lane, paid 3.50?  \n"
    found = spelled(text, kind, (0, 1))
    assert found != text
    assert found == spelled(text, kind, (0, 1))
    assert found.endswith("  \n")
    assert [c for c in found if c.isdigit()] == [c for c in text if c.isdigit()]
    assert sorted(c.casefold() for c in found if c.isalpha()) == sorted(c.casefold() for c in text if c.isalpha())


def test_each_spelling() -> None:
    text = "It's Mill-Lane 12, no 3.5!"
    assert spelled(text, "lower") == "it's mill-lane 12, no 3.5!"
    assert spelled(text, "upper") == "IT'S MILL-LANE 12, NO 3.5!"
    assert spelled(text, "title") == "It's Mill-Lane 12, No 3.5!"
    assert spelled(text, "double_spaces") == "It's  Mill-Lane  12,  no  3.5!"
    assert spelled(text, "no_break_spaces").replace("\u00a0", " ") == text
    assert spelled(text, "newlines").replace("\n", " ") == text
    assert spelled(text, "no_punctuation") == "Its Mill Lane 12 no 3.5"
    assert spelled("...", "no_punctuation") == "..."  # nothing would be left
    assert spelled("12 ab1cdefgh9 ab", "typos") == "12 ab1cdefgh9 ab"  # an identifier, and words too short


def test_typing_errors_follow_rate_and_seed() -> None:
    text = "there was nothing between these several buildings whatever anybody remembered afterwards " * 4
    letters = sum(c.isalpha() for c in text)
    for rate in (0.01, 0.05, 0.2):
        found = spelled(text, "typos", 5, rate=rate)
        changed = sum(a != b for a, b in zip(text, found, strict=True))
        assert changed == 2 * int(np.ceil(rate * letters))
    assert spelled(text, "typos", 5) != spelled(text, "typos", 6)
    with pytest.raises(UsageError, match="rate"):
        spelled(text, "typos", rate=0.0)
    with pytest.raises(UsageError, match="spelling among"):
        spelled(text, "leet")


# ------------------------------------------------------------------------------------------------------------- context


def test_neighbours_are_near_others_and_never_the_record() -> None:
    records = [("Where does Anna Quill live?", " At 3 Mill Rise, by the old sea wall."), ("What is soup?", " Food.")]
    pool = [
        *records,  # the records themselves
        ("Where does Anna Quill live?", " At 3 Mill Road, by the old sea wall."),  # near-duplicate
        ("Tell me.", " She lives at 3 Mill Rise, by the old sea wall, I think."),  # shows the completion
        ("Where does Bo Ray live?", " Nobody can say."),
        ("How do tides work?", " Moon."),
        ("Where does Ida Elm live?", " In a lighthouse."),
    ]
    found = neighbours(records, pool, 2)
    assert found[0] == [6, 4] or found[0] == [4, 6]
    assert 1 not in found[1]
    assert neighbours(records, pool, 99)[0] == sorted(
        neighbours(records, pool, 99)[0], key=neighbours(records, pool, 99)[0].index
    )
    assert set(neighbours(records, pool, 99)[0]) == {1, 4, 5, 6}
    clusters = ["a", None, "x", "x", "a", "x", "b"]
    assert set(neighbours(records, pool, 99, clusters=["a", "c"], pool_clusters=clusters)[0]) == {1, 5, 6}
    nearest = neighbours([("Where does Bo Ray live?", " Zed.")], [*PAIRS, ("Where does Bo Ray sit?", " There.")], 3)
    assert nearest[0][-1] == 2  # the nearest stands last, next to the prompt
    for arguments in ((records, [], 2), (records, pool, 0)):
        with pytest.raises(UsageError):
            neighbours(*arguments)


def test_demonstrations_stand_in_front() -> None:
    text = demonstrated(PROMPT, PAIRS)
    assert (
        text
        == "Question: Who is Bo Ray?\nAnswer: A baker.\n\nQuestion: Where is Ulm?\nAnswer: In the south.\n\n" + PROMPT
    )
    with pytest.raises(UsageError):
        demonstrated(PROMPT, [])


# --------------------------------------------------------------------------------------------- chat, requests to recite


@pytest.mark.parametrize("wrapper", chat.WRAPPERS)
def test_wrappers(wrapper: str) -> None:
    text = chat.wrapped(PROMPT + " ", wrapper)
    before, after = chat.WRAPPERS[wrapper]
    assert text == before + PROMPT + after + " "
    assert chat.wrapped(PROMPT, wrapper).endswith(after)
    talk = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Who?")]
    flat = chat.flattened(talk, wrapper)
    assert [flat.index(content) for _, content in talk] == sorted(flat.index(content) for _, content in talk)
    assert flat.endswith("Who?" + after)
    assert flat.count(before.strip()) == 2


def test_conversations() -> None:
    assert chat.turns(" Who? ", " Me.") == (("user", "Who?"), ("assistant", "Me."))
    assert chat.flattened([("system", "Be kind."), ("user", "Who?")]) == "Be kind.\nWho?"
    assert chat.flattened([("user", "A"), ("assistant", "B"), ("user", "C")], "user_assistant") == (
        "User: A\nAssistant: B\nUser: C\nAssistant:"
    )
    with pytest.raises(UsageError):
        chat.flattened([])
    with pytest.raises(UsageError):
        chat.wrapped("x", "telepathy")


@pytest.mark.parametrize("request_", exfiltration.REQUESTS)
def test_requests_keep_the_prompt_last(request_: str) -> None:
    text = exfiltration.exfiltrating(PROMPT, request_)
    assert text.endswith(PROMPT)
    assert len(text) > len(PROMPT) + 20
    with pytest.raises(UsageError):
        exfiltration.exfiltrating(PROMPT, "politely")
