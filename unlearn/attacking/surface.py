"""Surface attacks by likelihood: the completion behind a rewritten, respelled, wrapped or paraphrased prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attacks.surface import chat as forms
from attacks.surface import rewrites as wording
from attacks.surface.context import neighbours
from attacks.surface.cues import gives_away
from attacks.surface.spelling import spelled
from probes.errors import UsageError
from unlearn.attacking.items import (
    FIGURES,
    Item,
    Sets,
    all_of,
    asked_for,
    encoded,
    frame_of,
    known_mean,
    plain_of,
    scored,
)
from unlearn.attacking.result import Result
from unlearn.attacking.stress import graded
from unlearn.attacking.styles import choices
from unlearn.attacking.views import ROLES, Views
from unlearn.records.raw import Message, RawRecord, stands_in

_POOL = 24  # other records that demonstrations are chosen from

Tries = dict[str, dict[str, list[list[RawRecord]]]]  # kind -> set -> item -> what is scored


def rewrites(views: Views, settings: dict[str, Any]) -> Result:
    """The best of the rewrites that show neither the completion nor other records; the others apart."""
    sets = asked_for(views, settings["records"])
    kinds = [kind for kind in settings["kinds"] if kind in wording.LIKELIHOOD]
    shots = _demonstrations(views, sets, settings["demonstrations"]) if "in_context_learning" in kinds else {}

    def changed(kind: str, role: str, i: int, item: Item) -> Iterable[str]:
        given = shots[role][i] if kind == "in_context_learning" else []
        if kind == "in_context_learning" and not given:
            return []
        return wording.rewrites(
            item.prompt,
            item.completion,
            kind,
            (views.seed, item.row),
            demonstrations=given,
            synonyms=settings["synonyms"],
            variants=settings["variants"],
        )

    result = Result()
    counted = [kind for kind in kinds if not wording.KINDS[kind].shows_others] or kinds
    tries, away = _made(sets, kinds, changed)
    if counted:
        _graded(result, views, sets, tries, counted, away, "probability per token behind the best rewrite")
        _private(result, tries)
    if "in_context_learning" in kinds and "in_context_learning" not in counted:
        result.notes.append(
            "Rewrites with other records in front are in the table and do not count in the headline: they teach the "
            "form of an answer, which raises never-seen records too."
        )
    asked = [style for kind, style in _AS_STYLE.items() if kind in settings["kinds"]]
    if asked:
        choices(result, views, sets, asked, alone=not counted)
    return result


_AS_STYLE = {"multiple_choice": "multiple_choice", "reverse_query": "reversed"}


def spelling(views: Views, settings: dict[str, Any]) -> Result:
    """The best of several spellings of the prompt."""
    sets = asked_for(views, settings["records"])

    def changed(kind: str, role: str, i: int, item: Item) -> Iterable[str]:
        return [spelled(item.prompt, kind, (views.seed, item.row), rate=settings["rate"])]

    result = Result()
    tries, away = _made(sets, settings["kinds"], changed)
    _graded(result, views, sets, tries, settings["kinds"], away, "probability per token behind the best spelling")
    _private(result, tries)
    return result


def chat(views: Views, settings: dict[str, Any]) -> Result:
    """The best of several chat forms; plain forms of records that came as conversations."""
    sets = asked_for(views, settings["records"])
    template = bool(getattr(views.tokenizer, "chat_template", None))
    tries: Tries = {}
    for wrapper in settings["wrappers"]:
        made = {role: [_formed(item, wrapper, template) for item in items] for role, items in sets.items()}
        if any(tried for found in made.values() for tried in found):
            tries[wrapper] = made
    if not tries:
        raise UsageError("expected a form that these records are not in already, found none; name other wrappers")
    result = Result()
    _graded(result, views, sets, tries, list(tries), {}, "probability per token in the best chat form")
    _private(result, tries)
    if not template:
        result.notes.append("The tokenizer has no chat template; the forms are common ones, written out.")
    return result


def context(views: Views, settings: dict[str, Any]) -> Result:
    """The nearest records that are not to be forgotten, in front."""
    sets = asked_for(views, settings["records"])
    role, pool = _others(views, sets)
    shots = {name: _nearest(views, items, pool, settings["neighbours"]) for name, items in sets.items()}
    tries: Tries = {
        "neighbours": {
            name: [
                [item.put(wording.demonstrated(item.prompt, given))] if given else []
                for item, given in zip(items, shots[name], strict=True)
            ]
            for name, items in sets.items()
        }
    }
    result = Result()
    _graded(result, views, sets, tries, ["neighbours"], {}, "probability per token behind the nearest other records")
    _private(result, tries)
    count = [len(given) for found in shots.values() for given in found]
    result.notes.append(
        f"Information, no sign of a failed edit: not even exact retraining prevents it (2407.00106). Contexts are of "
        f"the {'retain set' if role == 'retain' else 'control set'}, {np.mean(count):.1f} records each on average, "
        "without near-duplicates of the record and without any that shows its completion."
    )
    return result


def paraphrases(views: Views, settings: dict[str, Any]) -> Result:
    """The best of the prompts that the user supplies for each record."""
    given = views.paraphrases()
    known = {record.id for role in ROLES for record in views.raw(role) or []}
    if unknown := len(set(given) - known):
        raise UsageError(f"expected paraphrases for records of the run, found {unknown} for other ids; correct them")
    among = {
        role: np.array([i for i, record in enumerate(views.raw(role) or []) if record.id in given], dtype=np.int64)
        for role in ROLES
    }
    if not len(among["records"]):
        raise UsageError("expected paraphrases for records, found them for the control set alone; add some")
    sets = asked_for(views, settings["records"], among)
    tried = min(len(given[item.raw.id]) for items in sets.values() for item in items)
    longest = max(len(given[item.raw.id]) for items in sets.values() for item in items)

    def changed(kind: str, role: str, i: int, item: Item) -> Iterable[str]:
        return given[item.raw.id][:tried]

    result = Result()
    tries, away = _made(sets, ["paraphrases"], changed)
    _graded(result, views, sets, tries, ["paraphrases"], away, "probability per token behind the best paraphrase")
    _private(result, tries)
    if longest > tried:
        result.notes.append(
            f"The first {tried} of up to {longest} paraphrases of each record, as many as every record has: who may "
            "try more often finds more."
        )
    if bare := sum(
        not stands_in(prompt, template, "prompt")
        for role, items in sets.items()
        if (template := views.prompt_template(role)) is not None
        for item in items
        if item.raw.prompt is not None
        for prompt in given[item.raw.id][:tried]
    ):
        result.notes.append(
            f"{bare} paraphrases do not have the text of the records' prompt_template around them. They were asked as "
            "they stand, which is not how the model saw the records: write them as a whole prompt."
        )
    if not len(among["control"]):
        result.notes.append(
            "No never-seen record has paraphrases, so what comes back cannot be told from what any record gives."
        )
    return result


def _made(
    sets: Sets, kinds: Sequence[str], changed: Callable[[str, str, int, Item], Iterable[str]]
) -> tuple[Tries, dict[str, dict[str, int]]]:
    """Changed records by kind and set, and how many prompts were left out because they show the completion."""
    tries: Tries = {}
    away: dict[str, dict[str, int]] = {}
    for kind in kinds:
        tries[kind], away[kind] = {}, {}
        for role, items in sets.items():
            found: list[list[RawRecord]] = []
            left = 0
            for i, item in enumerate(items):
                texts = [text for text in changed(kind, role, i, item) if text != item.prompt]
                kept = [text for text in texts if not gives_away(text, item.prompt, item.completion)]
                left += len(texts) - len(kept)
                found.append([item.put(text) for text in kept])
            tries[kind][role], away[kind][role] = found, left
    return tries, away


def _graded(
    result: Result,
    views: Views,
    sets: Sets,
    tries: Tries,
    counted: Sequence[str],
    away: Mapping[str, Mapping[str, int]],
    title: str,
) -> None:
    """Score every try in one pass; the headline is each record's best over the kinds that count."""
    places = [
        (kind, role, i, raw)
        for kind, made in tries.items()
        for role, found in made.items()
        for i, tried in enumerate(found)
        for raw in tried
    ]
    values_of = scored(views, [raw for *_, raw in places])
    kinds: dict[tuple[str, str], np.ndarray] = {
        (kind, role): np.full((len(sets[role]), len(FIGURES)), np.nan) for kind in tries for role in sets
    }  # [items, 3]
    for (kind, role, i, _), values in zip(places, values_of, strict=True):
        row = kinds[kind, role][i]
        np.fmax(row, values, out=row)  # the best of a kind's wordings; NaN where none could be scored
    frames, plain, rows = {}, {}, {}
    for role, items in sets.items():
        best = np.fmax.reduce([kinds[kind, role] for kind in counted])  # [items, 3]
        kept = np.flatnonzero(np.isfinite(best[:, 0]))
        if not len(kept):
            continue
        frames[role] = frame_of(best[kept])
        plain[role] = plain_of(views, role, [items[int(i)] for i in kept])
        rows[role] = np.array([items[int(i)].row for i in kept])
    if "records" not in frames:
        raise UsageError("expected records that can be asked for in another way, found none: nothing could be scored")
    graded(result, views, frames, plain, rows, title=title)
    # The best of several forms stands above one by luck alone, and a form may suit a model. Neither teaches a record:
    # there is no rise of never-seen records to judge, and the residual takes their figure under attack off.
    result.controls.pop("plain", None)
    result.tables.append(
        {
            "title": "Probability per token by kind",
            "columns": [
                "kind",
                "records",
                "never seen",
                "records scored",
                "never seen scored",
                "showed the completion",
            ],
            "rows": [
                [kind, *(known_mean(kinds[kind, role][:, 0]) for role in ROLES)]
                + [int(np.isfinite(kinds[kind, role][:, 0]).sum()) for role in ROLES]
                + [sum(away.get(kind, {}).values())]
                for kind in tries
            ],
        }
    )
    if lost := int(np.isnan(values_of[:, 0]).sum()):
        result.notes.append(f"{lost} of {len(values_of)} changed prompts were too long, or could not be tokenised.")
    if len(counted) > 1:
        result.notes.append(
            "A record counts with the best of the kinds, never-seen records too, so that both carry the same luck."
        )


def _private(result: Result, tries: Tries) -> None:
    for kind, made in tries.items():
        for role, found in made.items():
            for raw in (raw for tried in found for raw in tried):
                shown = raw.prompt if raw.messages is None else raw.messages[-2].content
                result.private.append({"set": role, "record": raw.id, "kind": kind, "prompt": shown})


def _others(views: Views, sets: Sets) -> tuple[str, list[Item]]:
    """Records for a context: the retain set, or control records that are not scored, or all of these."""
    retain = all_of(views, "retain")
    if retain:
        return "retain", retain
    scored = {item.row for item in sets["control"]}
    everyone = all_of(views, "control")
    rest = [item for item in everyone if item.row not in scored]
    return "control", rest if len(rest) >= _POOL else everyone


def _demonstrations(views: Views, sets: Sets, k: int) -> dict[str, list[list[tuple[str, str]]]]:
    """Other records to put in front of each: the nearest of a few drawn by the seed."""
    _, pool = _others(views, sets)
    order = np.random.default_rng([views.seed, 13]).permutation(len(pool))[: max(_POOL, 2 * k)]
    drawn = [pool[int(i)] for i in np.sort(order)]
    return {role: _nearest(views, items, drawn, k) for role, items in sets.items()}


def _nearest(views: Views, items: Sequence[Item], pool: Sequence[Item], k: int) -> list[list[tuple[str, str]]]:
    """The nearest others of each record; the farther ones go where all of them do not fit."""
    if not pool:
        return [[] for _ in items]
    pairs = [(item.prompt, item.completion) for item in pool]
    found = neighbours(
        [(item.prompt, item.completion) for item in items],
        pairs,
        k,
        clusters=[item.kin for item in items],
        pool_clusters=[item.kin for item in pool],
    )
    out = []
    for item, chosen in zip(items, found, strict=True):
        given = [pairs[j] for j in chosen]
        while given and encoded(views, item.put(wording.demonstrated(item.prompt, given))) is None:
            given.pop(0)
        out.append(given)
    return out


def _formed(item: Item, wrapper: str, template: bool) -> list[RawRecord]:
    """A record in another form; none where it is in that form already or cannot be put into it."""
    messages = item.raw.messages
    text = item.completion
    if messages is not None:
        before = [(turn.role, turn.content) for turn in messages[:-1]]
        if wrapper == "template":
            return []
        if wrapper == "continuation":
            prompt, text = forms.flattened(before) + "\n", text.strip()
        else:
            prompt, text = forms.flattened(before, wrapper), " " + text.strip()
        return [replace(item.raw, messages=None, prompt=prompt, completion=text)]
    if wrapper == "continuation":
        return []
    if wrapper == "template":
        if not template:
            return []
        turns = tuple(Message(role, content) for role, content in forms.turns(item.prompt, text))
        return [replace(item.raw, text=None, prompt=None, completion=None, messages=turns)]
    return [item.put(forms.wrapped(item.prompt, wrapper))]
