"""Personal data: extraction from free samples, reconstruction of masked values, inference among candidates."""

from __future__ import annotations

from typing import Any

from attacks.pii import detectors, games
from attacks.pii.games import Game, Question
from probes.errors import UsageError
from probes.likelihood import SamplingScheme
from probes.records import TokenRecord
from unlearn.attacking.result import Result, as_figure, point
from unlearn.attacking.views import ROLES, Views
from unlearn.records.expand import text_of
from unlearn.records.raw import RawRecord

TOP_K = (1, 5, 10)


def extraction(views: Views, settings: dict[str, Any]) -> Result:
    """Values of the records that stand in free samples."""
    drawn = views.samples(settings["n"], settings["length"], SamplingScheme(top_k=40))
    texts = {role: [text_of(record) for record in views.raw(role) or []] for role in ROLES if views.has(role)}
    found = games.extraction(
        views.decode(drawn),
        texts["records"],
        kinds=settings["kinds"] or None,
        patterns=settings["patterns"] or None,
        controls=texts.get("control", ()),
        groups=views.clusters(),
        seed=views.seed,
    )
    result = Result(headline="recall", bounds=None)
    result.titles = {
        "recall": "values of the records that came out",
        "precision": "values in the samples that stand in the records",
    }
    if found.recall is None:
        result.not_resolvable["recall"] = found.reason or "not resolvable"
    else:
        result.figures["recall"] = as_figure(found.recall, "share")
        if found.control is not None:
            result.control["recall"] = as_figure(found.control, "share")
        if found.precision is not None:
            result.figures["precision"] = as_figure(found.precision, "share")
    result.records["hit"] = list(found.hits)
    result.tables.append(
        {
            "title": "Different values by kind",
            "columns": ["kind", "in the records", "in the samples", "in both"],
            "rows": found.by_kind.to_numpy().tolist(),
        }
    )
    result.generated = sum(map(len, drawn))
    result.notes.append("Values are found by patterns with check digits; names and addresses are not looked for.")
    return result


def reconstruction(views: Views, settings: dict[str, Any]) -> Result:
    """Fill in the masked personal data of each record from the model's own samples."""
    questions = _detected(views, "records", settings)
    if not questions:
        raise UsageError("it found no personal data of a known kind in the records, behind other text")

    def play(chosen: list[Question]) -> Game:
        return games.reconstruction(
            views.model,
            chosen,
            lambda ids: views.decode([ids])[0],
            draws=settings["draws"],
            scheme=SamplingScheme(top_k=settings["top_k"]),
            patterns=settings["patterns"] or None,
            top_k=TOP_K,
            seed=views.seed,
            model_map=views.model_map,
            progress=views.progress,
        )

    result = _result(play(questions), "reconstructed")
    if never := _detected(views, "control", settings):
        result.control |= {f"top_{k}": as_figure(share, "share") for k, share in play(never).top_k.items()}
    return result


def inference(views: Views, settings: dict[str, Any]) -> Result:
    """Name the value that stood in each record, among the candidates given."""
    given = views.workspace.candidates()
    questions, unknown, unclear = [], set(given), 0
    for record in views.raw("records") or []:
        candidates = given.get(record.id)
        if candidates is None:
            continue
        unknown.discard(record.id)
        text = text_of(record)
        present = [value for value in candidates if value in text]
        if len(present) != 1 or text.index(present[0]) == 0:
            unclear += 1
            continue
        start = text.index(present[0])
        kind = next((span.kind for span in detectors.find(present[0])), "")
        questions.append(_question(views, record, text, start, start + len(present[0]), kind, tuple(candidates)))
    if unknown:
        raise UsageError(
            f"expected candidates for records of the run, found {len(unknown)} for other ids; correct them"
        )
    if not questions:
        raise UsageError(
            f"expected one candidate to stand in its record, behind other text, found none or several in all "
            f"{unclear}; the right value must be among the candidates"
        )
    found = games.inference(
        views.model, questions, top_k=TOP_K, seed=views.seed, model_map=views.model_map, progress=views.progress
    )
    result = _result(found, "inferred")
    if unclear:
        result.notes.append(f"{unclear} records hold none or several of their candidates and were left out.")
    return result


def _detected(views: Views, role: str, settings: dict[str, Any]) -> list[Question]:
    """A question for every value that is found behind other text."""
    questions = []
    for record in views.raw(role) or []:
        text = text_of(record)
        for span in detectors.find(text, settings["kinds"] or None, settings["patterns"] or None):
            if text[: span.start].strip():
                questions.append(_question(views, record, text, span.start, span.end, span.kind, ()))
    return questions


def _question(
    views: Views, record: RawRecord, text: str, start: int, end: int, kind: str, candidates: tuple[str, ...]
) -> Question:
    before, after = text[:start], text[end:]

    def filled(value: str) -> TokenRecord:
        return views.encode([RawRecord(record.id, prompt=before, completion=value + after)])[0]

    name = views.workspace.pseudonym(record.id)
    shown = before + " " + after
    return Question(f"{name}:{start}", filled, text[start:end], candidates, kind, shown, record.group or record.id)


def _result(found: Game, word: str) -> Result:
    result = Result(headline="top_1", bounds=None, generated=found.generated_tokens)
    for k, share in found.top_k.items():
        result.titles[f"top_{k}"] = f"{word} among the first {k}, questions without a surface cue"
        result.figures[f"top_{k}"] = as_figure(share, "share")
        result.titles[f"chance_{k}"] = f"the same by guessing, first {k}"
        result.figures[f"chance_{k}"] = point(found.chance[k], "share", share.n, "none")
    if found.status != "ok":
        result.titles["top_1"] = word
        result.not_resolvable["top_1"] = found.reason or "not resolvable"
    if found.cued is not None:
        result.titles["cued"] = f"{word} where the prompt holds much of the answer (no sign of memory)"
        result.figures["cued"] = as_figure(found.cued, "share", "none")
    rows = [
        [row[0].partition(":")[0], int(row[1]), None if row[2] is None else int(row[2]), bool(row[6])]
        for row in found.table.astype(object).where(found.table.notna(), None).to_numpy().tolist()
    ]
    rows.sort(key=lambda row: (row[2] is None, row[2] or 0, row[0]))
    result.tables.append(
        {
            "title": "Questions, best rank first",
            "columns": ["record", "candidates", "rank", "surface cue"],
            "rows": [[*row[:3], "yes" if row[3] else "no"] for row in rows[:200]],
        }
    )
    return result
