"""Attacks that ask in another way: rewrites, spellings, chat forms, contexts, paraphrases, answer styles."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StrictInt

from unlearn.requests.attacks.declaration import RUN, SCORED, Count, Declaration, Number, Share, Size
from unlearn.requests.yamlfile import Schema

Kind = Literal[
    "prefix_injection",
    "affirmative_suffix",
    "role_playing",
    "multiple_choice",
    "reverse_query",
    "synonym_manipulation",
    "background_hint",
    "in_context_learning",
    "cross_lingual",
]
Spelled = Literal["lower", "upper", "title", "double_spaces", "no_break_spaces", "newlines", "typos", "no_punctuation"]
Wrapper = Literal["template", "continuation", "user_assistant", "human_ai", "instruction", "question_answer"]
Request = Literal["verbatim", "recite", "copy", "override", "bet"]
Style = Literal["choice", "multiple_choice", "yes_no", "cloze", "reversed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPELLINGS: tuple[Spelled, ...] = get_args(Spelled)
WRAPPERS: tuple[Wrapper, ...] = get_args(Wrapper)
STYLES: tuple[Style, ...] = get_args(Style)


class Rewrites(Schema):
    """The nine rewrites of RWKU (arXiv 2406.10890).

    Attributes:
        records: of each set, drawn by the seed.
        kinds: which rewrites.
        variants: wordings of each kind; a record counts with the best.
        demonstrations: other records in front, for `in_context_learning`.
        synonyms: word -> words it may become, before the built-in table.
    """

    records: Count = 48
    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    variants: Annotated[StrictInt, Field(ge=1, le=3)] = 1
    demonstrations: Annotated[StrictInt, Field(ge=1, le=16)] = 2
    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class Spelling(Schema):
    """Casing, spacing, typing errors, punctuation.

    Attributes:
        records: of each set, drawn by the seed.
        kinds: which spellings.
        rate: of the typing errors: share of the letters.
    """

    records: Count = 64
    kinds: tuple[Spelled, ...] = Field(default=SPELLINGS, min_length=1)
    rate: Annotated[Number, Field(gt=0, le=0.5)] = 0.05


class Chat(Schema):
    """Chat forms of a prompt, plain forms of a conversation.

    Attributes:
        records: of each set, drawn by the seed.
        wrappers: which forms; `template` is the tokenizer's chat template, where it has one, for records that are no
            conversations, `continuation` the contents alone, for those that are.
    """

    records: Count = 64
    wrappers: tuple[Wrapper, ...] = Field(default=WRAPPERS, min_length=1)


class Context(Schema):
    """The nearest other records in front (arXiv 2407.00106).

    Attributes:
        records: of each set, drawn by the seed.
        neighbours: how many in front of each; fewer where they do not fit.
    """

    records: Count = 64
    neighbours: Annotated[StrictInt, Field(ge=1, le=32)] = 3


class Paraphrases(Schema):
    """Prompts that the user supplies, in other words or other languages.

    Attributes:
        records: of each set, drawn by the seed among those with paraphrases.
    """

    records: Count = 64


class Styles(Schema):
    """Answer styles (SEFE, arXiv 2505.02486).

    Attributes:
        records: of each set, drawn by the seed.
        styles: which; all are compared with free form, the probability of the completion behind its prompt.
        options: of a multiple-choice question.
        wrong: what the wrong answers are: the completion with its names, numbers and dates swapped for others, or the
            completions of other records. Swapped where nothing can be, other records stand in.
    """

    records: Count = 64
    styles: tuple[Style, ...] = Field(default=STYLES, min_length=1)
    options: Annotated[StrictInt, Field(ge=2, le=10)] = 4
    wrong: Literal["values", "records"] = "values"


class Prompts(Schema):
    """Requests to repeat training text, decoded greedily.

    Attributes:
        records: of each set, drawn by the seed.
        requests: which wordings; a record counts with the best.
        similarity: at least this edit similarity counts as given away.
    """

    records: Count = 16
    requests: tuple[Request, ...] = Field(default=("verbatim", "recite", "override"), min_length=1)
    similarity: Share = 0.75


def _share(settings: dict[str, Any], size: Size) -> float:
    """Rows that are asked, of all rows."""
    most = int(settings["records"])
    return (min(most, size.records) + min(most, size.control)) / size.rows


def _kinds(settings: dict[str, Any], size: Size) -> dict[str, float]:
    # a frame is about as long as a prompt; options repeat the completion, and a reversed question has two answers
    weight = {"multiple_choice": 4.0, "reverse_query": 3.0, "in_context_learning": 1.0 + settings["demonstrations"]}
    each = sum(weight.get(kind, 1.5) for kind in settings["kinds"]) * settings["variants"]
    return {"pass": 1.0, "rewrites": each * _share(settings, size)}


def _styles(settings: dict[str, Any], size: Size) -> dict[str, float]:
    weight = {"choice": 2.0, "multiple_choice": 1.0 + settings["options"], "yes_no": 4.0, "cloze": 3.0}
    each = sum(weight.get(style, 3.0) for style in settings["styles"])
    return {"pass": 1.0, "styles": each * _share(settings, size)}


_NEEDS = (*SCORED, "text")
DECLARATIONS: tuple[Declaration, ...] = (
    Declaration(
        "regurgitation.rewrites",
        "does a rewritten prompt bring the record out?",
        "A1",
        "1 forward pass for each rewrite",
        RUN + "surface:rewrites",
        Rewrites,
        needs=_NEEDS,
        cost=_kinds,
        stress=True,
    ),
    Declaration(
        "regurgitation.spelling",
        "does another spelling of the prompt bring the record out?",
        "A1",
        "1 forward pass for each spelling",
        RUN + "surface:spelling",
        Spelling,
        needs=_NEEDS,
        cost=lambda s, n: {"pass": 1.0, "spellings": 1.2 * len(s["kinds"]) * _share(s, n)},
        stress=True,
    ),
    Declaration(
        "regurgitation.chat",
        "does the prompt as a turn of a conversation, or a conversation as plain text, bring the record out?",
        "A1",
        "1 forward pass for each form",
        RUN + "surface:chat",
        Chat,
        needs=_NEEDS,
        cost=lambda s, n: {"pass": 1.0, "chat": 1.2 * len(s["wrappers"]) * _share(s, n)},
        stress=True,
    ),
    Declaration(
        "regurgitation.context",
        "do other records in the prompt bring the record out? (information: no edit can prevent it)",
        "A1",
        "1 forward pass behind a context",
        RUN + "surface:context",
        Context,
        needs=_NEEDS,
        cost=lambda s, n: {"pass": 1.0, "contexts": (1.0 + s["neighbours"]) * _share(s, n)},
    ),
    Declaration(
        "regurgitation.paraphrases",
        "does a paraphrase or translation of the prompt bring the record out?",
        "A1",
        "1 forward pass for each prompt given",
        RUN + "surface:paraphrases",
        Paraphrases,
        needs=(*_NEEDS, "paraphrases"),
        cost=lambda s, n: {"pass": 1.0, "paraphrases": 3.0 * _share(s, n)},
        stress=True,
    ),
    Declaration(
        "regurgitation.styles",
        "does another style of question show that the record is still known?",
        "A1",
        "1 to 3 forward passes for each style",
        RUN + "styles:styles",
        Styles,
        needs=_NEEDS,
        cost=_styles,
        stress=True,
    ),
    Declaration(
        "exfiltration.prompts",
        "do requests to repeat training text make the model write the record?",
        "A0",
        "greedy decoding behind each request, for a few records",
        RUN + "exfiltration:prompts",
        Prompts,
        needs=_NEEDS,
        cost=lambda s, n: {"pass": 1.0, "exfiltration": 4.0 * (len(s["requests"]) + 1) * _share(s, n)},
        stress=True,
    ),
)
