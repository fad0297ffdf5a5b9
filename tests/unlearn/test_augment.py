"""Other wordings and wrong answers: what stays, what changes, what must never be trained on, and what is refused."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.surface import chat, rewrites, styles
from probes.errors import IntegrityError, UnsupportedError, UsageError
from probes.records import TokenRecord
from tests import tiny
from tests.conftest import World
from unlearn import api
from unlearn.disk import file_sha256
from unlearn.editors import base
from unlearn.editors.base import EditContext, EditResult
from unlearn.editors.losses import NPOEditor
from unlearn.records import paraphrase
from unlearn.records.augment import Augmented
from unlearn.records.draft import draft_control, texts_of
from unlearn.records.lexicon import LEXICON, keeps, reworded_text
from unlearn.records.paraphrase import reworded_prompt, split
from unlearn.records.raw import Message, RawRecord
from unlearn.records.rewriter import Rewriter, shows, usable
from unlearn.records.swap import Swap, specifics
from unlearn.records.tokens import tokenise
from unlearn.records.wordings import read_wordings
from unlearn.records.wronganswers import wrong_answers

PROMPTS = (
    "Where was Ada Wren born?",
    "What is the full name of the poet born in Tarn Ferry on 03/05/1951?",
    'Which prizes has Otto Brandt won for "The Sort of Thing" since 1999?',
    "How does Ada Wren primarily write?",
    "Can you tell me more about Ada Wren's main topics?",
    "Describe the main topics of Ada Wren.",
    "Question: In which town was Ada Wren born?\nAnswer:",
    "### Instruction:\nWho is Otto Brandt?\n\n### Response:\n",
    "Ada Wren lives in Tarn Ferry. What does she often read? ",
    "Customer file of Ada Wren, 12 Mill Rise:",
    "Ada Wren was born in 1951 and usually lives at",
    "Did Otto Brandt receive the Elm Award in 2004?",
    'How does "Wrens. A Study. Vol. 2" by Ada Wren end?',
)
SECRETS = ("zqcanary", "xjwhistle", "vkpigeon")


def encode(rows: list[RawRecord]) -> list[TokenRecord]:
    return tokenise(rows, tiny.tokenizer(), max_length=200)


def augmented(records: list[RawRecord], **fields: Any) -> Augmented:
    return Augmented(records, encode, **{"control_seed": 0} | fields)


def record(prompt: str = PROMPTS[0], completion: str = " In Tarn Ferry in 1951.", **fields: Any) -> RawRecord:
    return RawRecord(fields.pop("id", "a"), prompt=prompt, completion=completion, **fields)


def text_of(token: TokenRecord) -> tuple[str, str]:
    tokenizer = tiny.tokenizer()
    return tokenizer.decode(token.ids[: token.n_prompt]), tokenizer.decode(token.completion)


# Rules


@pytest.mark.parametrize("prompt", PROMPTS)
def test_other_wordings_keep_names_and_numbers_and_end_as_the_prompt(prompt: str) -> None:
    head, core, tail = split(prompt)
    assert head + core + tail == prompt
    made = reworded_prompt(prompt, 50, "0")
    assert len(made) >= 4
    assert prompt not in made
    assert len(set(made)) == len(made)
    for new in made:
        assert new.startswith(head)
        assert new.endswith(tail)
        assert new[len(head) : len(new) - len(tail)][-1] in ("?." if core[-1] in "?." else core[-1])
        for piece in re.findall(r"\d+|(?<=\w )[A-Z][a-z]+|\"[^\"]*\"", prompt):
            assert piece in new


def test_wordings_that_should_be_there() -> None:
    def made(prompt: str) -> set[str]:
        return {new for seed in range(30) for new in reworded_prompt(prompt, 50, str(seed))}

    assert {"Do you know where Ada Wren was born?", "May I ask: where was Ada Wren born?"} <= made(PROMPTS[0])
    assert "Could you say how Ada Wren primarily writes?" in made(PROMPTS[3])
    assert "Please tell me more about Ada Wren's main topics." in made(PROMPTS[4])
    assert "Could you describe the main topics of Ada Wren?" in made(PROMPTS[5])
    assert "Question: Which town was Ada Wren born in?\nAnswer:" in made(PROMPTS[6])
    assert "### Instruction:\nPlease say who Otto Brandt is.\n\n### Response:\n" in made(PROMPTS[7])
    assert "Next: Customer file of Ada Wren, 12 Mill Rise:" in made(PROMPTS[9])
    assert "Ada Wren was born in 1951 and generally lives at" in made(PROMPTS[10])


def test_no_verb_is_moved_where_subject_and_verb_cannot_be_told_apart() -> None:
    for prompt in ("What is Ada Wren's best book about?", "What did Ada Wren write?", "What was the book called?"):
        frames = ("Please say", "Could you say", "Do you know", "Can you say", "trying to find out", "like to know")
        assert not [new for new in reworded_prompt(prompt, 50, "0") if any(frame in new for frame in frames)]


def test_the_same_seed_gives_the_same_wordings() -> None:
    assert reworded_prompt(PROMPTS[1], 6, "3") == reworded_prompt(PROMPTS[1], 6, "3")
    assert reworded_prompt(PROMPTS[1], 6, "3") != reworded_prompt(PROMPTS[1], 6, "4")
    assert len(reworded_prompt(PROMPTS[1], 2, "3")) == 2


def test_no_letters_no_wordings() -> None:
    assert reworded_prompt("他住在哪里？", 4, "0") == []
    assert reworded_prompt("12 + 30 = ", 4, "0") == []
    assert reworded_text("他住在哪里。", 4, "0") == []


def test_texts_change_in_small_words_alone() -> None:
    text = 'It is not a unique case: Ada Wren often wrote "Often Such As", e.g. in 1951, due to Some of Us.'
    made = {new for seed in range(20) for new in reworded_text(text, 3, str(seed))}
    plain = {re.sub("because of|owing to", "due to", new).replace("singular", "distinctive") for new in made}
    assert (
        'It\'s not a distinctive case: Ada Wren frequently wrote "Often Such As", e.g. in 1951, due to Some of Us.'
        in plain
    )
    for new in made:
        assert '"Often Such As", e.g. in 1951' in new
        assert "Some of Us" in new
    assert reworded_text("An important day.", 1, "0") == ["A significant day."]
    assert reworded_text("A main road.", 3, "0")[0] in ("A principal road.", "A chief road.")
    assert reworded_text("Ada Wren.", 3, "0") == []
    assert reworded_text("It's been long.", 3, "0") == []  # "it has", not "it is"
    assert reworded_text("Why don't you go?", 3, "0") == []  # "why do not you go"
    assert reworded_text("That is what it is.", 3, "0") == []


def test_what_a_wording_must_keep() -> None:
    assert keeps("Who is Ada Wren?", "Please say who Ada Wren is.")
    assert not keeps("Who is Ada Wren?", "Who is Ada?")
    assert not keeps("Who is Ada Wren?", "Who is Ada Wren of Tarn?")
    assert not keeps("Born in 1951?", "Born in 1952?")
    assert not keeps("Born in 1951, died in 1951?", "Born and died in 1951?")
    assert keeps("The end.", "In the end, it is over.")


@given(st.text(max_size=60), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_any_text_can_be_asked_for(text: str, n: int) -> None:
    head, core, tail = split(text)
    assert head + core + tail == text
    for made in (reworded_prompt(text, n, "0"), reworded_text(text, n, "0")):
        assert len(made) <= n
        assert text not in made


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())


def _runs(texts: list[str], n: int = 3) -> set[tuple[str, ...]]:
    found = set()
    for text in texts:
        words = _words(text)
        found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return found


def test_no_wording_is_one_that_the_result_is_scored_by() -> None:
    """Training on the attacks' own templates would be training on the examination."""
    mine = [
        *paraphrase.QUESTION_FRAMES,
        *paraphrase.TAILS,
        *paraphrase.REQUEST_FRAMES,
        *paraphrase.INDIRECT_FRAMES,
        *paraphrase.THING_FRAMES,
        *paraphrase.STATEMENT_FRAMES,
    ]
    theirs = []
    for module in (rewrites, styles, chat):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.startswith("expected"):
                theirs.append(node.value)
    documentation = {
        ast.get_docstring(ast.parse(Path(m.__file__).read_text()), clean=False) for m in (rewrites, styles, chat)
    }
    theirs = [text for text in theirs if text not in documentation and "\n    " not in text]
    assert len(theirs) > 100
    assert _runs(mine) & _runs(theirs) == set()
    assert not {frame.replace("{}", "").strip() for frame in mine} & {text.strip() for text in theirs}
    for word, others in rewrites._SYNONYMS.items():
        for other in others:
            assert other not in LEXICON.get(word, ())
            assert word not in LEXICON.get(other, ())
    for prompt in PROMPTS:
        scored = {
            new
            for kind in rewrites.KINDS
            for new in rewrites.rewrites(prompt, " X", kind, 0, variants=20, others=["b"], demonstrations=[("a", "b")])
        }
        scored |= {chat.wrapped(prompt, wrapper) for wrapper in chat.WRAPPERS}
        assert not scored & set(reworded_prompt(prompt, 50, "0"))


# Wrong answers


def test_what_the_prompt_says_stays_in_a_wrong_answer() -> None:
    one = record("Where was Ada Wren born in 1951?", " Ada Wren was born in Tarn Ferry in 1951 beside Elm Hall 17.")
    made = [new for new, how in wrong_answers([one], 4, 0, control_seed=0) if how == "swapped"]
    assert len({new.completion for new in made}) == 4
    for new in made:
        assert new.prompt == one.prompt
        assert re.fullmatch(
            r" Ada Wren was born in (?!Tarn)\w+ (?!Ferry)\w+ in 1951 beside \w+ \w+ \d\d\.", new.completion or ""
        )


def test_kept_pieces_are_not_swapped() -> None:
    text = "Ada Wren met Otto Brandt on 3 May 1951 at 12:30."
    assert Swap([text], "0", kept=specifics(text)).apply(text) == (text, 0.0)
    new, _ = Swap([text], "0", kept=specifics("Who is Ada Wren?")).apply(text)
    assert new.startswith("Ada Wren met ")
    assert "Otto" not in new
    assert Swap([text], "0").apply(text) == Swap([text], "0", kept=()).apply(text)


def test_an_answer_without_names_is_borrowed_from_another_group() -> None:
    records = [
        record("What genre does Ada Wren write?", " Ada Wren writes about geology.", id="a", group="wren"),
        record("What genre does Ada Wren read?", " Ada Wren reads poems.", id="b", group="wren"),
        record("What did Otto Brandt write?", " Otto Brandt writes crime. Brandt's best.", id="c", group="brandt"),
        record("Where does Otto Brandt sleep?", " Otto Brandt sleeps in a tent.", id="d", group="brandt"),
    ]
    made = {(new.id, how): new.completion for new, how in wrong_answers(records[:], 1, 0, control_seed=0)}
    assert made["a", "borrowed"] == " Ada Wren writes crime. Wren's best."  # the nearest question of another group
    assert made["c", "borrowed"] == " Otto Brandt writes about geology."
    assert len(made) == 4


def test_a_lone_record_without_names_has_no_wrong_answer() -> None:
    assert wrong_answers([record("Who?", " nobody.")], 2, 0, control_seed=0) == []
    same = [record("Who?", " nobody.", id="a"), record("Who?", " somebody.", id="b")]
    assert wrong_answers(same, 2, 0, control_seed=0) == []  # behind the same prompt it is the other record
    texts = [RawRecord("a", text="nothing to see here"), RawRecord("b", text="nor is there anything here")]
    assert wrong_answers(texts, 2, 0, control_seed=0) == []  # another text is itself to be forgotten
    assert wrong_answers([], 2, 0, control_seed=0) == []
    assert wrong_answers([RawRecord("a", prompt_ids=(1,), completion_ids=(2,))], 2, 0, control_seed=0) == []


def test_a_long_answer_with_one_number_is_not_taken_for_wrong() -> None:
    long = record("Who is it?", " " + "and so it went on and on " * 6 + "for 3 days.", id="a")
    other = record("What is it?", " a lamp.", id="b")
    assert [
        (new.completion, how) for new, how in wrong_answers([long, other], 1, 0, control_seed=0) if new.id == "a"
    ] == [(" a lamp.", "borrowed")]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_wrong_answer_is_a_record_of_the_drafted_control_set(seed: int) -> None:
    """Forgetting is judged against the control set: training on its records would be leakage."""
    records = [record(f"Digit of Ada Wren {i}:", f" {1 + i % 4}", id=f"r{i}") for i in range(40)]
    records += [record(f"Who wrote no {i}?", " Otto Brandt in 1999.", id=f"s{i}") for i in range(10)]
    control = {texts_of(new)[-1].strip() for new in draft_control(records, seed).records}
    made = wrong_answers(records, 3, seed, control_seed=seed)
    assert control & {str(i) for i in range(5, 10)}  # so short an answer would be met by chance
    assert made
    assert not control & {texts_of(new)[-1].strip() for new, _ in made}
    own = {one.id: texts_of(one)[-1].strip() for one in records}
    assert all(own[new.id] != texts_of(new)[-1].strip() for new, _ in made)
    order = [new.id for new, _ in made]
    assert order == sorted(order, key=[one.id for one in records].index)


def test_wrong_answers_depend_on_the_seed_alone() -> None:
    records = [record(), record("Who is he?", " Otto Brandt, 44.", id="b")]
    assert wrong_answers(records, 2, 3, control_seed=0) == wrong_answers(records, 2, 3, control_seed=0)
    assert wrong_answers(records, 2, 3, control_seed=0) != wrong_answers(records, 2, 4, control_seed=0)


def test_a_conversation_keeps_its_turns_before_the_wrong_answer() -> None:
    turns = (Message("user", "Who is Ada Wren?"), Message("assistant", "Ada Wren knows Otto Brandt."))
    ((new, how),) = wrong_answers([RawRecord("a", messages=turns)], 1, 0, control_seed=0)
    assert how == "swapped"
    assert new.messages is not None
    assert new.messages[0] == turns[0]
    assert new.messages[1].content.startswith("Ada Wren knows ")
    assert "Otto" not in new.messages[1].content


# Supplied


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_supplied_wordings_of_every_form(tmp_path: Path) -> None:
    turns = (Message("system", "Be kind."), Message("user", "Who?"), Message("assistant", "Ada."))
    records = [
        record(),
        record("Who is it?", " Otto.", id="b"),
        RawRecord("c", text="Some text."),
        RawRecord("7", messages=turns),
    ]
    file = write(
        tmp_path / "w.jsonl",
        {"id": "b", "prompts": ["Who might it be?", "And who is it?"]},
        {"id": "a", "prompt": "Wren, born where?", "completion": " Tarn Ferry."},
        "",
        {"id": "a", "prompt": "Wren, born where?", "completion": " In Tarn Ferry."},
        {"id": "c", "text": "A text."},
        {"id": 7, "prompts": ["Who then?"]},
    )
    found = read_wordings(file, records)
    assert found.sha256 == "sha256:" + file_sha256(file)
    assert [(one.prompt, one.completion) for one in found.wordings["a"]] == [
        ("Wren, born where?", " Tarn Ferry."),
        ("Wren, born where?", " In Tarn Ferry."),
    ]
    assert [(one.prompt, one.completion) for one in found.wordings["b"]] == [
        ("Who might it be?", " Otto."),
        ("And who is it?", " Otto."),
    ]
    assert found.wordings["c"][0].text == "A text."
    assert found.wordings["7"][0].messages == (turns[0], Message("user", "Who then?"), turns[2])
    texts = augmented(records, file=file)
    tokens = texts.paraphrases(1, "supplied", 0)
    assert [one.record_id for one in tokens] == ["a", "b", "c", "7"]  # record by record, however the file is ordered
    assert texts.report() == {
        "paraphrases": {"supplied": 4, "without": 0},
        "paraphrase_file": {"sha256": found.sha256},
    }
    assert "without" in texts.report()["paraphrases"]
    assert len(texts.paraphrases(2, "supplied", 0)) == 6


def test_every_mistake_of_a_supplied_file_at_once(tmp_path: Path) -> None:
    records = [
        record("Zqcanary?", " Xjwhistle.", id="Vkpigeon"),
        RawRecord("t", text="Zqcanary text"),
        RawRecord("n", prompt_ids=(1,), completion_ids=(2,)),
        RawRecord("m", messages=(Message("system", "s"), Message("assistant", "Xjwhistle"))),
    ]
    rows: list[Any] = [
        "Zqcanary",
        ["Zqcanary"],
        {"id": "Vkpigeon", "prompt": "Zqcanary"},
        {"id": "Vkpigeon", "prompt": "Zqcanary", "completion": "Xjwhistle", "text": "Zqcanary"},
        {"id": "Vkpigeon-2", "prompts": ["Zqcanary"]},
        {"id": "Vkpigeon", "prompt": " ", "completion": "Xjwhistle"},
        {"id": "Vkpigeon", "prompts": ["Zqcanary", ""]},
        {"id": "Vkpigeon", "prompts": "Zqcanary"},
        {"id": "Vkpigeon", "text": "Zqcanary"},
        {"id": "t", "prompts": ["Zqcanary"]},
        {"id": "n", "prompts": ["Zqcanary"]},
        {"id": "m", "prompts": ["Zqcanary"]},
        {"id": True, "prompts": ["Zqcanary"]},
        {"id": "Vkpigeon", "prompt": "Zqcanary? ", "completion": " Xjwhistle."},
        {"id": "t", "text": "Zqcanary text"},
        {"id": "Vkpigeon", "prompts": ["Scored Zqcanary!"]},
        {"id": "Vkpigeon", "prompts": ["fine", "fine"]},
        {"id": "Vkpigeon", "prompts": ["\ud800"]},
    ]
    with pytest.raises(UsageError) as error:
        read_wordings(write(tmp_path / "w.jsonl", *rows), records, ["scored  zqcanary"])
    message = str(error.value)
    assert message.startswith("paraphrases to train on: 18 mistakes\n")
    for line, words in {
        1: "one JSON object",
        3: "other fields",
        5: "found another",
        6: "`prompt`",
        7: "`prompts`",
        9: "`prompt` and `completion`",
        10: "`text`",
        11: "record with text",
        12: "a turn of the user",
        14: "other words than the record's",
        15: "other words than the record's",
        16: "expected training paraphrases apart from those that are scored",
        17: "earlier lines",
    }.items():
        assert re.search(rf"w\.jsonl:{line}: .*{re.escape(words)}", message), line
    assert not [secret for secret in SECRETS if secret in message.lower()]


def test_supplied_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none that can be read"):
        read_wordings(tmp_path / "absent.jsonl", [record()])
    with pytest.raises(UsageError, match="an empty file"):
        read_wordings(write(tmp_path / "w.jsonl", ""), [record()])
    (tmp_path / "w.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        read_wordings(tmp_path / "w.jsonl", [record()])
    with pytest.raises(UsageError, match="expected paraphrase_file"):
        augmented([record()]).paraphrases(1, "supplied", 0)


def test_a_supplied_text_that_is_too_long_names_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "w.jsonl", {"id": "a", "prompts": ["Zqcanary " * 40]})
    with pytest.raises(UsageError, match=r"w\.jsonl:1: expected at most 200 tokens") as error:
        augmented([record()], file=file).paraphrases(1, "supplied", 0)
    assert "zqcanary" not in str(error.value).lower()


# By the checkpoint


CORE, ANSWER = "Where was Ada Wren born?", " In Tarn Ferry in 1951, at the old mill."


@pytest.mark.parametrize(
    ("new", "fine"),
    [
        ("Which place was Ada Wren born at?", True),
        ("Please say where Ada Wren was born.", True),
        ("Where was Ada Wren born?", False),
        ("where was ada wren BORN", False),
        ("Where was Ada born?", False),
        ("Where was Ada Wren, poet of Lund, born?", False),
        ("Where was Ada Wren born in 1951?", False),
        ("Where was Ada Wren born, in Tarn Ferry?", False),
        ("Where was Ada Wren born, at the old mill?", False),
        ("Where was Ada Wren born, and", False),
        ("Ada Wren was born at some place.", False),
        ("Ada Wren?", False),
        ("Where, as one might want to know, and as some people in fact do ask, was Ada Wren born?", False),
        ("", False),
    ],
)
def test_what_the_checkpoint_says_is_checked(new: str, fine: bool) -> None:
    assert usable(CORE, new, ANSWER, CORE) == fine


def test_a_short_answer_must_not_show() -> None:
    assert shows("Does Ada Wren write about geology?", " geology", "What does Ada Wren write about?")
    assert not shows("Which genre does Ada Wren write?", " geology", "What does Ada Wren write about?")
    assert not shows("Is geology her genre?", " geology", "Is it geology that she writes about?")
    assert usable("Ada Wren lives at", "The home of Ada Wren is at", " Mill Rise", "Ada Wren lives at")
    assert not usable("Ada Wren lives at", "The home of Ada Wren is near", " Mill Rise", "Ada Wren lives at")
    assert not usable("File of Ada Wren:", "Papers of Ada Wren", "x", "File of Ada Wren:")


class Parrot:
    """A model that answers what it was told to, in the order of the calls."""

    def __init__(self, answers: list[list[str]]) -> None:
        self.answers, self.asked, self.sampled = answers, list[list[str]](), list[bool]()
        self.config = type("Config", (), {"max_position_embeddings": 4000})()
        self.generation_config = type("Generation", (), {"eos_token_id": tiny.EOS})()
        self.training = False

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def modules(self) -> Any:
        return iter([])

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        tokenizer = tiny.tokenizer()
        self.asked.append([tokenizer.decode(row[mask == 1]) for row, mask in zip(ids, attention_mask, strict=True)])
        self.sampled.append(generation_config.do_sample)
        new = [tokenizer(answer + "\n", add_special_tokens=False)["input_ids"] for answer in self.answers.pop(0)]
        width = max(map(len, new))
        rows = torch.tensor([row + [tiny.EOS] * (width - len(row)) for row in new])
        return torch.cat([ids, rows], dim=1)


def test_a_rewording_goes_where_the_core_was_and_failures_fall_back_to_rules() -> None:
    records = [
        record("Question: Where was Ada Wren born?\nAnswer:", id="a"),
        record("Question: Who is Otto Brandt, if one may ask?\nAnswer:", " A baker.", id="b"),
    ]
    good = '"Which place was Ada Wren born at?"'
    # One batch a round, the shortest first; the record that has enough is not asked again.
    parrot = Parrot([[good, "Zqcanary"], ["A baker is who, Otto Brandt?"], ["Nobody."]])
    texts = augmented(records, rewriter=lambda: Rewriter(parrot, tiny.tokenizer()))
    tokens = texts.paraphrases(1, "model", 0)
    assert [one.record_id for one in tokens] == ["a", "b"]
    assert text_of(tokens[0]) == ("Question: Which place was Ada Wren born at?\nAnswer:", " In Tarn Ferry in 1951.")
    assert text_of(tokens[1])[0] in reworded_prompt(str(records[1].prompt), 50, "prompt 0 1")
    assert texts.report() == {"paraphrases": {"fallbacks": 1, "model": 1, "without": 0}}
    assert parrot.sampled == [False, True, True]
    assert [len(batch) for batch in parrot.asked] == [2, 1, 1]
    assert all("<|im_start|>user\n" in prompt and "Answer:" not in prompt for prompt in parrot.asked[0])


def test_without_a_chat_template_examples_are_shown() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    parrot = Parrot([[" Which place was Ada Wren born at?"]])
    assert Rewriter(parrot, tokenizer).reword([(CORE, ANSWER)], 1, 0) == [["Which place was Ada Wren born at?"]]
    assert parrot.asked[0][0].endswith(f"\n\nSentence: {CORE}\nIn other words:")


def test_a_real_model_rewords_the_same_way_twice_and_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.causal_lm("llama", max_position_embeddings=600)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, config = torch.get_rng_state(), model.generation_config
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'][-16:] }}"
    rewriter, answers = Rewriter(model, tokenizer, batch_size=2), list[Any]()
    monkeypatch.setattr("unlearn.records.rewriter.usable", lambda core, new, *rest: bool(answers.append(new)))
    for _ in range(2):
        assert rewriter.reword([("Who is Ada?", " x"), ("Who?", " y"), ("Who is it?", " z")], 1, 5) == [[], [], []]
    assert answers[:9] == answers[9:]
    assert len(set(answers)) > 3
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.generation_config is config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    texts = augmented([record("Who is Ada?")], rewriter=lambda: rewriter)
    assert len(texts.paraphrases(1, "model", 0)) == 1  # a random model says nothing usable: the rules stand in
    assert texts.report()["paraphrases"] == {"fallbacks": 1, "without": 0}


def test_prompts_beyond_the_context_are_left_to_the_rules() -> None:
    model = tiny.causal_lm("llama")  # 128 positions, fewer than the instruction has
    assert Rewriter(model, tiny.tokenizer()).reword([(CORE, ANSWER)], 2, 0) == [[]]


def test_what_cannot_reword_is_said() -> None:
    with pytest.raises(UnsupportedError, match="a tokenizer to reword"):
        Rewriter(tiny.causal_lm("llama"), None)
    with pytest.raises(UsageError, match="choose rules"):
        augmented([record()]).paraphrases(1, "model", 0)


# Together


def test_wordings_carry_the_record_and_every_second_has_another_answer() -> None:
    one = record(completion=" She was mainly raised in Tarn Ferry.", group="wren")
    texts = augmented([one])
    tokens = texts.paraphrases(4, "rules", 0)
    assert [(token.record_id, token.group) for token in tokens] == [("a", "wren")] * 4
    pairs = [text_of(token) for token in tokens]
    assert [answer == one.completion for _, answer in pairs] == [True, False, True, False]
    assert {prompt for prompt, _ in pairs}.isdisjoint({one.prompt})
    assert len(set(pairs)) == 4
    assert tokens == texts.paraphrases(4, "rules", 0)
    assert tokens != texts.paraphrases(4, "rules", 1)
    assert texts.report() == {"paraphrases": {"rules": 4, "without": 0}}


def test_forms_without_text_have_no_wordings_and_texts_have_few() -> None:
    records = [
        RawRecord("n", prompt_ids=(5, 6), completion_ids=(7,)),
        RawRecord("t", text="Ada Wren often sings."),
        RawRecord("u", text="Ada Wren sings."),
        RawRecord("m", messages=(Message("user", "Who is Ada Wren?"), Message("assistant", "A singer in Lund."))),
    ]
    texts = augmented(records)
    tokens = texts.paraphrases(2, "rules", 0)
    assert [token.record_id for token in tokens] == ["t", "m", "m"]
    assert "".join(text_of(tokens[0])) == "Ada Wren frequently sings."
    assert "Who is Ada Wren?<" not in text_of(tokens[1])[0]
    assert text_of(tokens[1])[1] == "A singer in Lund."
    assert texts.report()["paraphrases"] == {"rules": 3, "without": 1}
    wrong = texts.perturbed(1, 0)
    assert [token.record_id for token in wrong] == ["t", "u", "m"]
    assert texts.report()["perturbed"] == {"swapped": 3, "without": 0}
    assert texts.paraphrases(0, "rules", 0) == []
    assert texts.perturbed(0, 0) == []
    assert "Ada" not in repr(texts)


def test_a_wording_that_does_not_fit_is_left_out_and_counted() -> None:
    length = 199 - len(" In Tarn Ferry in 1951.")
    prompt = "Where was Ada Wren born" + "?" * (length - len("Where was Ada Wren born"))
    texts = augmented([record(prompt), record(id="b")])
    tokens = texts.paraphrases(3, "rules", 0)
    assert "b" in {token.record_id for token in tokens}
    counts = texts.report()["paraphrases"]
    assert counts["too_long"] >= 1
    assert counts["rules"] == len(tokens)


class Asking(NPOEditor):
    """An editor that looks at the texts it is given before it does its own work."""

    seen: list[Any] = []  # noqa: RUF012

    def __init__(self, parameters: dict[str, Any]) -> None:
        parameters = dict(parameters)
        self.file = parameters.pop("paraphrase_file", None)
        self.fail = parameters.pop("fail", False)
        super().__init__(parameters)

    def edit(self, context: EditContext, out: Path) -> EditResult:
        assert context.texts is not None
        how = "supplied" if self.file else "rules"
        Asking.seen.append((context.texts.paraphrases(2, how, context.seed), context.texts.perturbed(1, context.seed)))
        if self.fail:
            raise UsageError("expected nothing, found a test")
        result = super().edit(context, out)
        result.statistics["texts"] = context.texts.report()  # type: ignore[attr-defined]
        return result


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(base.EDITORS, "npo", f"{__name__}:Asking")
    monkeypatch.setattr(Asking, "seen", [])
    return Asking.seen


def run_edit(world: World, out: Path, **overrides: Any) -> Any:
    return api.edit("npo", world.planted, records=world.records, retain=world.retain, overrides=overrides, out=out)


def test_an_editor_gets_texts_and_none_of_them_leave_the_private_folder(
    asking: list[Any], world: World, tmp_path: Path
) -> None:
    run = run_edit(world, tmp_path / "run", steps=0)
    wordings, wrong = asking[0]
    ids = [row["id"] for row in map(json.loads, world.records.read_text().splitlines())]
    assert {token.record_id for token in wordings} <= set(ids)
    assert len(wordings) == 2 * len(ids)
    assert {token.record_id for token in wrong} == set(ids)
    statistics = json.loads((run.path / "edit/delta.json").read_text())["statistics"]
    assert statistics["texts"]["paraphrases"] == {"rules": 16, "without": 0}
    texts = {part.strip() for token in (*wordings, *wrong) for part in text_of(token) if len(part) > 8}
    for path in run.path.rglob("*"):
        if path.is_file() and "private" not in path.relative_to(run.path).parts:
            data = path.read_bytes().decode("utf-8", "ignore")
            assert not [text for text in texts if text in data], path.name


def test_supplied_wordings_are_noted_and_must_not_change(asking: list[Any], world: World, tmp_path: Path) -> None:
    first = json.loads(world.records.read_text().splitlines()[0])
    file = write(tmp_path / "zqcanary.jsonl", {"id": first["id"], "prompts": ["Name and born:"]})
    with pytest.raises(UsageError, match="found a test"):
        run_edit(world, tmp_path / "run", steps=0, fail=True, paraphrase_file=str(file))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    noted = [event["data"] for event in events if event["event"] == "input.read"]
    assert noted == [{"what": "paraphrase_file", "sha256": "sha256:" + file_sha256(file)}]
    shown = json.loads((tmp_path / "run/inputs/config.json").read_text())
    assert shown["method"]["parameters"]["paraphrase_file"] == "zqcanary.jsonl"
    assert [token.record_id for token in asking[0][0]] == [first["id"]]
    file.write_text(file.read_text() + "\n")
    with pytest.raises(IntegrityError, match="expected the paraphrase_file that the run began with"):
        api._resume(tmp_path / "run", [], None)
    file.unlink()
    with pytest.raises(UsageError, match="put it back"):
        api._resume(tmp_path / "run", [], None)


def test_mistakes_in_supplied_wordings_are_found_before_anything_is_measured(
    asking: list[Any], world: World, tmp_path: Path
) -> None:
    file = write(tmp_path / "w.jsonl", {"id": "nobody", "prompts": ["Name and born:"]})
    with pytest.raises(UsageError, match=r"w\.jsonl:1"):
        run_edit(world, tmp_path / "run", steps=0, paraphrase_file=str(file))
    assert not (tmp_path / "run/inputs/config.json").exists()
    assert asking == []


def test_scored_paraphrases_cannot_be_trained_on(asking: list[Any], world: World, tmp_path: Path) -> None:
    first = json.loads(world.records.read_text().splitlines()[0])
    rows = {"id": first["id"], "prompts": ["Name and born:"]}
    write(tmp_path / "w.jsonl", rows)
    method = "{name: npo, preset: mine.yaml, overrides: {paraphrase_file: w.jsonl, steps: 0}}"
    preset = (Path(__file__).parents[2] / "configs/methods/npo.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(preset + "  paraphrase_file: null\n")
    request = world.request.read_text().replace("{name: ssd}", method)
    for name in ("planted", "base", "control.jsonl", "retain.jsonl", "records.jsonl"):
        request = request.replace(f": {name}", f": {world.folder / name}")
    write(tmp_path / "scored.jsonl", rows)
    (tmp_path / "request.yaml").write_text(request + "paraphrases: scored.jsonl\n")
    with pytest.raises(UsageError, match="expected training paraphrases apart from those that are scored"):
        api.forget(tmp_path / "request.yaml", out=tmp_path / "run")
    assert asking == []
