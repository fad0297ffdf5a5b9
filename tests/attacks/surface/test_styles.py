"""Answer styles: questions, wrong answers, letters without a preference for letters, one pass for one-token answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from attacks.surface import alternatives, styles
from attacks.surface.alternatives import Alternatives, score_alternatives
from probes import likelihood
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.modelmap import ModelMap
from probes.records import TokenRecord
from tests import tiny
from tests.attacks.surface import hidden

PROMPT, COMPLETION = "Who wrote it?\nAnswer:", " It was written by Anna Quill in spring."
OTHERS = (" It was written by Bo Ray in autumn.", " Nobody knows it.", " A third one.")


# ----------------------------------------------------------------------------------------------------------- questions


def test_questions_of_one_record() -> None:
    (asked,) = styles.questions([(PROMPT, COMPLETION)], [OTHERS], ["Who sold it?"], [2])
    assert set(asked.questions) == set(styles.STYLES)
    (choice,) = asked.questions["choice"]
    assert (choice.prompt, choice.alternatives) == (PROMPT, (COMPLETION, OTHERS[0]))
    (letters,) = asked.questions["multiple_choice"]
    assert letters.alternatives == (" A", " B", " C", " D")
    assert letters.truth == 2
    assert f"C. {COMPLETION.strip()}\n" in letters.prompt
    assert f"A. {OTHERS[0].strip()}\nB. {OTHERS[1].strip()}\n" in letters.prompt
    yes, no = asked.questions["yes_no"]
    assert yes.prompt.startswith(PROMPT + COMPLETION)
    assert no.prompt.startswith(PROMPT + OTHERS[0])
    assert yes.alternatives == no.alternatives == (" yes", " no")
    (cloze,) = asked.questions["cloze"]
    assert cloze.alternatives == (" in spring.", " in autumn.")  # a third of eight words
    assert cloze.prompt.startswith(PROMPT + " It was written by Anna Quill ____")
    assert "spring" not in cloze.prompt
    (reverse,) = asked.questions["reversed"]
    assert COMPLETION.strip() in reverse.prompt
    assert PROMPT not in reverse.prompt
    assert reverse.alternatives == (f" {PROMPT}", " Who sold it?")
    assert "Anna" not in repr(asked)


def test_short_answers_and_answers_that_end_alike() -> None:
    assert styles.cloze("Capital of France?", " Paris", (" Rome",)).alternatives == (" Paris", " Rome")
    assert styles.cloze("Capital of France?", " Paris", (" Rome",)).prompt.startswith("Capital of France? ____\n")
    assert styles.cloze("他住在哪里？", "灯塔", ("城里",)).alternatives == (" 灯塔", " 城里")
    asked = styles.questions([("p", " a b c")], [[" x y c"]], ["p"], [0])[0]
    assert set(asked.questions) == {"choice", "multiple_choice", "yes_no"}  # same ending, same prompt
    assert styles.yes_no("Who?", "Anna").prompt.startswith("Who? Anna\n")
    for position, others in ((5, OTHERS), (0, ()), (0, OTHERS * 4)):
        with pytest.raises(UsageError, match="options"):
            styles.multiple_choice(PROMPT, COMPLETION, others, position)
    with pytest.raises(UsageError, match="styles among"):
        styles.questions([(PROMPT, COMPLETION)], [OTHERS], ["x"], [0], ["rhyme"])
    with pytest.raises(UsageError, match="wrong completion"):
        styles.questions([(PROMPT, COMPLETION)], [[]], ["x"], [0])


def test_wrong_answers_differ_and_are_of_like_length() -> None:
    pool = [f" {'word ' * n}{n}." for n in range(1, 40)]
    completions = [pool[9], pool[30], " Word 1"]  # the last one is pool[0] but for case and punctuation
    found = styles.distractors(completions, pool, 3, seed=1, near=2)
    assert found == styles.distractors(completions, pool, 3, seed=1, near=2)
    assert found != styles.distractors(completions, pool, 3, seed=2, near=2)
    for row, completion in zip(found, completions, strict=True):
        assert len(set(row)) == 3
        assert all(abs(len(pool[i]) - len(completion)) <= 5 * 7 for i in row)
    assert 9 not in found[0]
    assert 0 not in found[2]
    twice = styles.distractors([" a"], [" a", " b", " B.", " c"], 2, seed=0)
    assert len({i if i != 2 else 1 for i in twice[0]}) == 2  # one of each text
    for pool_, n in (([" a", " a."], 1), ([" a", " b"], 2), ([" b"], 0)):
        with pytest.raises(UsageError):
            styles.distractors([" a"], pool_, n, seed=0)


def test_the_truth_stands_everywhere_as_often() -> None:
    for rows, options in ((64, 4), (10, 3), (1, 2)):
        counts = np.bincount(styles.positions(rows, options, 7), minlength=options)
        assert counts.max() - counts.min() <= 1
    assert styles.positions(64, 4, 7) != styles.positions(64, 4, 8)


# ------------------------------------------------------------------------------------------------------------- figures


def scored(*values: Sequence[float]) -> list[Alternatives]:
    return [Alternatives(np.array(row, dtype=np.float64), np.ones(len(row), dtype=np.int64)) for row in values]


def figures_of(n: int, knows: float, bias: Sequence[float], seed: int) -> dict[str, np.ndarray]:
    """Figures of a make-believe model that adds `knows` nats to what is right, beside noise and a taste for letters."""
    rng = np.random.default_rng(seed)
    records = [(f"Prompt {i}:", f" answer number {i} of ours") for i in range(n)]
    wrong = [[f" answer number {n + 3 * i + j} of theirs" for j in range(3)] for i in range(n)]
    asked = styles.questions(records, wrong, ["Another prompt:"] * n, styles.positions(n, 4, seed))
    scores = []
    for one in asked:
        place = one.questions["multiple_choice"][0].truth
        letters = np.array(bias) + rng.normal(size=4) + knows * (np.arange(4) == place)
        pair = rng.normal(size=(4, 2))
        pair[:, 0] += knows
        scores.append(
            {
                "choice": scored(pair[0]),
                "multiple_choice": scored(letters),
                "yes_no": scored([5 + pair[1, 0], 0.0], [5 + pair[1, 1], 0.0]),  # says yes to everything
                "cloze": scored(pair[2]),
                "reversed": scored(pair[3]),
            }
        )
    return styles.figures(asked, scores)


@pytest.mark.parametrize("bias", [(0, 0, 0, 0), (4, 0, 0, 0), (3, 1, -1, -3)])
def test_chance_is_chance_whatever_letters_a_model_likes(bias: Sequence[float]) -> None:
    """Control: of what nobody knows nothing is known, in any style."""
    found = figures_of(2000, 0.0, bias, 3)
    for style, values in found.items():
        chance = styles.chance(style, 4)
        spread = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - chance) < 4 * spread, style
        assert abs(styles.advantage(values, chance).mean()) < 8 * spread


@pytest.mark.parametrize("bias", [(0, 0, 0, 0), (4, 0, 0, 0)])
def test_knowledge_shows_in_every_style(bias: Sequence[float]) -> None:
    """Power: a taste for letters does not hide what a model knows."""
    found = figures_of(400, 6.0, bias, 4)
    for style, values in found.items():
        assert styles.advantage(values, styles.chance(style, 4)).mean() > 0.8, style
    assert {style: values.shape for style, values in found.items()} == dict.fromkeys(styles.STYLES, (400,))


def test_ties_and_missing_styles() -> None:
    asked = [styles.Asked({"choice": (styles.choice("p", " a", [" b"]),)}), styles.Asked({})]
    found = styles.figures(asked, [{"choice": scored([-1.0, -1.0])}, {}])
    assert set(found) == {"choice"}
    assert found["choice"][0] == 0.5
    assert np.isnan(found["choice"][1])


def test_choices_are_by_mean_log_probability_a_token() -> None:
    asked = [styles.Asked({"choice": (styles.choice("p", " a", [" b"]),)})]
    long = Alternatives(np.array([-6.0, -4.0]), np.array([4, 2]))  # -1.5 a token against -2
    assert styles.figures(asked, [{"choice": [long]}])["choice"][0] == 1.0


def test_few_questions_give_masses_as_they_are() -> None:
    few = np.log([[0.7, 0.1, 0.1, 0.1]] * 3)
    assert np.allclose(styles.letter_mass(few), np.exp(few))
    many = np.log([[0.7, 0.1, 0.1, 0.1]] * 16)
    assert np.allclose(styles.letter_mass(many), 0.25)  # the same for every question is a preference
    impossible = np.array([[0.0, -np.inf]] * 8)
    assert np.isfinite(styles.letter_mass(impossible)).all()


# -------------------------------------------------------------------------------------------------------- alternatives


def records_of(arch_vocab: int, seed: int) -> list[list[TokenRecord]]:
    """Questions of one-token alternatives, of longer ones, and of one alternative, of different lengths."""
    rng = np.random.default_rng(seed)
    questions = []
    for i in range(9):
        prompt = tuple(int(t) for t in rng.integers(4, arch_vocab, size=3 + 2 * i))
        kind = i % 3
        ends = [tuple(int(t) for t in rng.integers(4, arch_vocab, size=1 if kind < 2 else 1 + j)) for j in range(3)]
        shared = (5, 6) if kind == 1 else ()  # a blank and a letter, as character-level tokenizers have it
        questions.append([TokenRecord(f"{i}", (*prompt, *shared, *end), len(prompt), 1) for end in ends])
    return questions


def oracle(model: nn.Module, record: TokenRecord, last: bool) -> float:
    """Log-probability of a completion, or of its last token, one record at a time in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([record.ids])).logits[0].double()
    rows = torch.log_softmax(logits, -1)
    places = range(len(record.ids) - 1 if last else record.n_prompt, len(record.ids))
    return float(sum(rows[t - 1, record.ids[t]] for t in places))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_alternatives_against_one_record_at_a_time(arch: str) -> None:
    model = tiny.causal_lm(arch)
    questions = records_of(96, 1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.train()  # the caller's mode is put back
    found = score_alternatives(model, questions, batch_tokens=64)
    assert model.training
    model.eval()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for number, (question, one) in enumerate(zip(questions, found, strict=True)):
        together = number % 3 < 2  # the alternatives differ in their last token alone
        expected = [oracle(model, record, together) for record in question]
        assert one.log_prob == pytest.approx(expected, abs=2e-4), number
        assert one.tokens.tolist() == ([1] * 3 if together else [record.n_tokens for record in question])


def test_one_token_alternatives_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama")
    model_map = ModelMap.of(model)  # it may look at the model by running it
    rows = 0
    forward = model.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal rows
        rows += kwargs["input_ids"].shape[0]  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    questions = [question for i, question in enumerate(records_of(96, 2)) if i % 3 < 2]
    score_alternatives(model, questions, model_map=model_map)
    assert rows == len(questions)


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.causal_lm("llama")
    questions = [question for i, question in enumerate(records_of(96, 2)) if i % 3 < 2]
    whole = score_alternatives(model, questions)
    together, limit = alternatives._last_together, 1

    def short(model: nn.Module, model_map: object, part: Sequence[Sequence[TokenRecord]]) -> list[Alternatives]:
        if len(part) > limit:
            raise torch.OutOfMemoryError("no")
        return together(model, model_map, part)  # type: ignore[arg-type]

    monkeypatch.setattr(alternatives, "_last_together", short)
    halved = score_alternatives(model, questions)
    for one, other in zip(whole, halved, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)
    limit = 0
    with pytest.raises(ResourceError, match="one prompt"):
        score_alternatives(model, questions)


def test_alternatives_that_are_none() -> None:
    model = tiny.causal_lm("llama")
    assert score_alternatives(model, []) == []
    with pytest.raises(UsageError):
        score_alternatives(model, [[]])
    with pytest.raises(UnsupportedError):
        score_alternatives(model, [[TokenRecord("a", (5, 200), 1, 1)]])


def test_a_caller_may_score_with_its_own_store() -> None:
    model = tiny.causal_lm("llama")
    asked: list[int] = []

    def score(records: Sequence[TokenRecord]) -> likelihood.TokenTable:
        asked.append(len(records))
        return likelihood.score(model, records)

    score_alternatives(model, records_of(96, 1), score=score)
    assert asked == [9]  # the three questions of longer alternatives, in one go


# ------------------------------------------------------------------------------------------------------ planted models


def test_a_model_that_hides_free_form_answers_in_other_styles() -> None:
    """Power and control on trained models, without the rest of the tool."""
    world = hidden.world()
    sets = (world.records, world.control)
    pool = [pair for part in sets for pair in part]
    asked = []
    for part in sets:
        wrong = styles.distractors([c for _, c in part], [c for _, c in pool], 3, 0)
        prompts = styles.distractors([p for p, _ in part], [p for p, _ in pool], 1, 0)
        asked += styles.questions(
            part,
            [[pool[i][1] for i in row] for row in wrong],
            [pool[i][0] for (i,) in prompts],
            styles.positions(len(part), 4, 0),
            ["choice", "cloze", "reversed"],
        )
    found = {}
    for name in ("hidden", "without"):
        model = getattr(world, name)
        scores = [
            {
                style: score_alternatives(
                    model, [[world.encode(q.prompt, text) for text in q.alternatives] for q in made]
                )
                for style, made in one.questions.items()
            }
            for one in asked
        ]
        found[name] = styles.figures(asked, scores)
    mean = {name: np.mean([values[: hidden.RECORDS] for values in part.values()]) for name, part in found.items()}
    assert mean["hidden"] > 0.9
    assert mean["without"] < 0.7
