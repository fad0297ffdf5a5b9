"""Answer styles: the records asked for among wrong answers, in several forms (SEFE, arXiv 2505.02486)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attacks.surface import styles as answer
from attacks.surface.alternatives import score_alternatives
from probes.errors import UsageError
from probes.records import TokenRecord
from unlearn.attacking.items import Item, Sets, asked_for, encoded, known_mean, plain_of
from unlearn.attacking.result import Result, point
from unlearn.attacking.stress import spread
from unlearn.attacking.views import ROLES, Views
from unlearn.records.raw import RawRecord
from unlearn.records.swap import Swap, words_of


def styles(views: Views, settings: dict[str, Any]) -> Result:
    """The advantage over chance in every style; the headline is a record's mean over the styles."""
    sets = asked_for(views, settings["records"])
    found = _asked(views, sets, settings["styles"], settings["options"], settings["wrong"])
    result = Result(headline="advantage", column="advantage", bounds=(-1.0, 1.0))
    free = {role: plain_of(views, role, items)["probability"].to_numpy(np.float64) for role, items in sets.items()}
    _add_mean(result, views, sets, "plain", "free form: probability per token behind the prompt", free, (0.0, 1.0))
    default = _beyond(free)
    table: list[list[Any]] = [["free_form", 0.0, *(known_mean(free[role]) for role in ROLES), default]]
    gains: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}
    for style in settings["styles"]:
        values = {role: _values(found, role, style, items) for role, items in sets.items()}
        if not np.isfinite(values["records"]).any():
            result.titles[style], result.not_resolvable[style] = _TITLES[style], "no record can be asked in this style"
            continue
        _add_mean(result, views, sets, style, _TITLES[style], values, (0.0, 1.0))
        chance = answer.chance(style, settings["options"])
        beyond = {role: answer.advantage(values[role], chance) for role in ROLES}
        table.append([style, chance, *(known_mean(values[role]) for role in ROLES), _beyond(beyond)])
        for role in ROLES:
            gains[role].append(beyond[role])
    mean = {role: _row_means(gains[role], len(items)) for role, items in sets.items()}
    if not np.isfinite(mean["records"]).any():
        raise UsageError("expected records that can be asked in another style, found none")
    title = "advantage over chance, mean of the styles (0: none, 1: always right)"
    _add_mean(result, views, sets, "advantage", title, mean, (-1.0, 1.0))
    result.titles["gap"] = "best style minus free form, each above never-seen records"
    best = [row[-1] for row in table[1:] if row[-1] is not None]
    if best and default is not None:
        result.figures["gap"] = point(max(best) - default, "advantage", len(sets["records"]), "none")
    else:
        result.not_resolvable["gap"] = "it needs never-seen records in the same styles"
    for role, columns in (("records", result.records), ("control", result.controls)):
        rows = np.array([item.row for item in sets[role]], dtype=np.int64)
        for name, column in (*found[role].items(), ("advantage", mean[role])):
            columns[name] = _known(spread(views, role, rows, column))
        right = [all(not values[i] <= 0.5 for values in found[role].values()) for i in range(len(rows))]
        columns["hit"] = spread(views, role, rows, right)
    # Questions teach nothing, so never-seen records have no figure to rise from: `plain` is of the records alone.
    rows = np.array([item.row for item in sets["records"]])
    result.records["plain"] = _known(spread(views, "records", rows, free["records"]))
    result.tables.append(
        {
            "title": "Figures by style, and the advantage over chance beyond never-seen records",
            "columns": ["style", "chance", "records", "never seen", "advantage beyond never seen"],
            "rows": table,
        }
    )
    result.notes.append(
        "A wrong answer can be implausible by itself: read every style against never-seen records. A gap that an edit "
        "widens says that it suppressed free form more than the knowledge."
    )
    return result


_TITLES = {
    "choice": "choice: the completion is likelier than a wrong one",
    "multiple_choice": "multiple choice: mass of the right letter",
    "yes_no": "yes or no: the completion is affirmed more than a wrong one",
    "cloze": "cloze: the last words are likelier than wrong ones",
    "reversed": "reversed: the prompt is likelier behind the completion than another prompt",
}


def choices(result: Result, views: Views, sets: Sets, wanted: Sequence[str], *, alone: bool) -> None:
    """The two rewrites that show the completion: right among alternatives, counted apart."""
    options = 4
    try:
        found = _asked(views, sets, wanted, options, "values")
    except UsageError as error:
        if alone:
            raise
        result.notes.append(f"Rewrites that show the completion were left out: {error}.")
        return
    rows = []
    for style in wanted:
        values = {role: _values(found, role, style, items) for role, items in sets.items()}
        chance = answer.chance(style, options)
        rows.append([style, chance, *(known_mean(values[role]) for role in ROLES)])
        if np.isfinite(values["records"]).any():
            _add_mean(result, views, sets, style, _TITLES[style], values, (0.0, 1.0))
        if alone and np.isfinite(values["records"]).any() and result.column is None:
            result.headline = result.column = style
            for role, columns in (("records", result.records), ("control", result.controls)):
                places = np.array([item.row for item in sets[role]], dtype=np.int64)
                columns[style] = _known(spread(views, role, places, values[role]))
            places = np.array([item.row for item in sets["records"]])
            result.records["plain"] = spread(views, "records", places, np.full(len(places), chance))
    result.tables.append(
        {
            "title": "Rewrites that show the completion: right among alternatives, not by likelihood",
            "columns": ["kind", "chance", "records", "never seen"],
            "rows": rows,
        }
    )


def _asked(
    views: Views, sets: Sets, wanted: Sequence[str], options: int, wrong: str
) -> dict[str, dict[str, np.ndarray]]:
    """Figures of every style by set, [items] each; wrong answers of all sets come from one pool."""
    pool = [item for items in sets.values() for item in items]
    completions = [item.completion for item in pool]
    taken = set().union(*(words_of(item.prompt + " " + item.completion) for item in pool))
    asked: list[answer.Asked] = []
    for role, items in sets.items():
        others = wrong_answers(views, role, items, completions, options - 1, wrong, taken)
        prompts = answer.distractors([item.prompt for item in items], [item.prompt for item in pool], 1, views.seed)
        asked += answer.questions(
            [(item.prompt, item.completion) for item in items],
            others,
            [pool[place].prompt for (place,) in prompts],
            answer.positions(len(items), options, views.seed),
            wanted,
        )
    questions = [question for one in asked for found in one.questions.values() for question in found]
    groups: list[list[TokenRecord] | None] = []
    for question in questions:
        records = [
            encoded(views, RawRecord("question", prompt=question.prompt, completion=text))
            for text in question.alternatives
        ]
        groups.append([record for record in records if record is not None] if all(records) else None)
    found = iter(
        score_alternatives(
            views.model,
            [group for group in groups if group],
            model_map=views.model_map,
            batch_tokens=views.settings.batch_tokens,
            score=views.score,
        )
    )
    scores = iter([next(found) if group else None for group in groups])
    kept, given = [], []
    for one in asked:
        answers = {style: [next(scores) for _ in made] for style, made in one.questions.items()}
        whole = {style: [each for each in these if each is not None] for style, these in answers.items()}
        fits = {style: made for style, made in one.questions.items() if len(whole[style]) == len(made)}
        kept.append(answer.Asked(fits))
        given.append({style: whole[style] for style in fits})
    table = answer.figures(kept, given)
    out, start = {}, 0
    for role, items in sets.items():
        out[role] = {style: values[start : start + len(items)] for style, values in table.items()}
        start += len(items)
    return out


def wrong_answers(
    views: Views, role: str, items: Sequence[Item], pool: Sequence[str], n: int, wrong: str, taken: set[str]
) -> list[list[str]]:
    """Wrong completions of each record, n each: its own with other values, other records' where that yields too few."""
    out = []
    for item in items:
        found: list[str] = []
        for number in range(3 * n if wrong == "values" else 0):
            text = _swapped(item, f"wrong {views.seed} {role} {item.row} {number}", taken)
            if text != item.completion and text not in found and len(found) < n:
                found.append(text)
        out.append(found)
    if any(len(found) < n for found in out):
        others = answer.distractors([item.completion for item in items], pool, n, views.seed)
        out = [found if len(found) == n else [pool[i] for i in row] for found, row in zip(out, others, strict=True)]
    return out


def _swapped(item: Item, seed: str, taken: set[str]) -> str:
    """The completion with other names, numbers and dates; what the prompt says already stays, or it would not fit."""
    given = sorted({word for word in re.findall(r"\w+", item.prompt) if not word.islower()}, key=len, reverse=True)
    swap = Swap([item.completion], seed, taken)
    if not given:
        return swap.apply(item.completion)[0]
    pieces = re.split(rf"((?<!\w)(?:{'|'.join(map(re.escape, given))})(?!\w))", item.completion)
    return "".join(piece if i % 2 else swap.apply(piece)[0] for i, piece in enumerate(pieces))


def _values(found: Mapping[str, Mapping[str, np.ndarray]], role: str, style: str, items: Sequence[Item]) -> np.ndarray:
    """[items] figures of a style; NaN where no record of the run could be asked in it."""
    return found[role].get(style, np.full(len(items), np.nan))


def _beyond(values: Mapping[str, np.ndarray]) -> float | None:
    """Mean on records minus mean on never-seen ones, where that is above 0; None without both.

    Never-seen records stand below chance where their wrong answers are completions that the model knows: no credit.
    """
    records, never = (known_mean(values[role]) for role in ROLES)
    return None if records is None or never is None else records - max(0.0, never)


def _row_means(columns: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """[rows] mean of the known values of each row; NaN where there is none."""
    if not columns:
        return np.full(rows, np.nan)
    stacked = np.stack(columns)  # [styles, rows]
    known = np.isfinite(stacked)
    count = known.sum(0)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _known(column: list[Any]) -> list[Any]:
    return [None if value is None or not math.isfinite(value) else value for value in column]


def _add_mean(
    result: Result,
    views: Views,
    sets: Sets,
    key: str,
    title: str,
    values: Mapping[str, np.ndarray],
    bounds: tuple[float, float],
) -> None:
    kept = {role: np.flatnonzero(np.isfinite(values[role])) for role in sets}
    groups = {role: [sets[role][int(i)].cluster for i in kept[role]] for role in sets}
    control = values["control"][kept["control"]] if len(kept["control"]) else ()
    result.mean(
        key,
        title,
        values["records"][kept["records"]],
        groups["records"],
        control,
        groups.get("control"),
        bounds=bounds,
        direction="lower",
        seed=views.seed,
    )
