"""What else an edit changed. Each look runs on the original first, which leaves its per-item figures in the private
folder; on the edited copy the change of the same items is added, paired.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from attacks.extraction.continuation import continuations
from probes.collateral.calibration import calibration as calibrate
from probes.collateral.induction import Repeated, copying, prefix_matching, repeated
from probes.collateral.neighbours import damage, text_nearness, token_nearness
from probes.collateral.refusals import PHRASES, UNSAFE, refuses
from probes.collateral.style import FIGURES, changes, style
from probes.errors import ResourceError, UnlearnError, UnsupportedError, UsageError
from probes.likelihood import inference
from probes.records import TokenRecord
from probes.statistics import Bounds, Interval, difference_interval
from unlearn.attacking.result import Direction, Result, as_figure, line, point
from unlearn.attacking.stress import rows_of
from unlearn.attacking.views import Views
from unlearn.records.raw import Message
from unlearn.records.tokens import render_chat

Row = dict[str, Any]
Groups = Sequence[str | None] | None

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")


def induction(views: Views, settings: dict[str, Any]) -> Result:
    """Copying of random tokens, and the heads that do it."""
    drawn = _drawn(views, settings)
    rows: list[Row] = [
        {"copying": float(value)}
        for value in copying(
            views.model, drawn, model_map=views.model_map, batch_tokens=views.settings.batch_tokens
        ).loss
    ]
    result = Result(headline="copying", bounds=None, private=rows)
    title = "copying loss: loss of random tokens where they stand again, minus the first time (0: no copying)"
    result.mean(
        "copying",
        title,
        [row["copying"] for row in rows],
        None,
        unit="nats per token",
        bounds=None,
        direction="lower",
        seed=views.seed,
    )
    earlier = _earlier(views, settings)
    if earlier is not None:
        _change(result, "copying", "copying loss", earlier, rows, views.seed, unit="nats per token", direction="lower")
    _heads(views, result, drawn, rows, earlier)
    result.notes.append(f"{len(drawn.records)} sequences of {drawn.length} random tokens, each standing twice.")
    return result


def calibration(views: Views, settings: dict[str, Any]) -> Result:
    """Confidence against accuracy of the next token, on the retain set."""
    groups = views.clusters("retain")
    found = calibrate(views.table("retain"), clusters=groups, bins=settings["bins"], seed=views.seed)
    rows: list[Row] = [{"brier": float(value)} for value in found.errors]
    result = Result(headline="ece", bounds=None, private=rows)
    for key, title, interval, direction in (
        ("ece", "expected calibration error of the next token", found.ece, "lower"),
        ("brier", "Brier score of the next token", found.brier, "lower"),
        ("over_confidence", "confidence minus accuracy of the next token", found.over_confidence, "none"),
    ):
        _interval(result, key, title, interval, "share", direction)  # type: ignore[arg-type]
    result.titles["floor"] = "calibration error of a perfectly calibrated model on as many tokens"
    result.figures["floor"] = point(found.floor, "share", sum(one.tokens for one in found.bins), "none")
    earlier = _earlier(views, settings)
    if earlier is not None:
        _change(result, "brier", "Brier score of a record", earlier, rows, views.seed, groups, bounds=(0.0, 1.0))
    result.curves.append(
        line(
            "Calibration of the next token",
            {"label": "confidence", "scale": "linear"},
            {"label": "share that was right", "scale": "linear"},
            [
                {
                    "name": "retain",
                    "x": [one.confidence for one in found.bins],
                    "y": [one.accuracy for one in found.bins],
                }
            ],
        )
    )
    return result


def generation(views: Views, settings: dict[str, Any]) -> Result:
    """Repetition, length and endings of greedy continuations."""
    chosen = rows_of(views, "retain", settings["records"])
    written = _continued(views, chosen, settings["length"])
    frame = style(written, end=_ends(views))
    groups = _some(views.clusters("retain"), chosen)
    texts = views.decode(written)
    rows: list[Row] = [
        {name: _known(value) for name, value in zip(FIGURES, values, strict=True)} | {"text": text}
        for values, text in zip(frame.to_numpy().tolist(), texts, strict=True)
    ]
    result = Result(headline="repetition", bounds=None, private=rows, generated=sum(map(len, written)))
    for key, title, unit, direction in (
        ("repetition", "share of repeated 4-grams in continuations of retain prompts", "share", "lower"),
        ("distinct_1", "share of distinct tokens in them", "share", "higher"),
        ("distinct_2", "share of distinct 2-grams in them", "share", "higher"),
        ("length", "their length", "tokens", "none"),
        ("ended", "share of them that end by themselves", "share", "none"),
    ):
        values = frame[key].to_numpy(dtype=np.float64)
        known = np.flatnonzero(np.isfinite(values))
        result.mean(
            key,
            title,
            values[known],
            _some(groups, known),
            unit=unit,
            bounds=None if key == "length" else (0.0, 1.0),
            direction=direction,  # type: ignore[arg-type]
            seed=views.seed,
        )
        if not len(known):
            result.not_resolvable[key] = "the continuations are too short"
    earlier = _earlier(views, settings)
    if earlier is not None:
        before = pd.DataFrame([{name: row.get(name) for name in FIGURES} for row in earlier]).astype(np.float64)
        for moved in changes(before, frame, clusters=groups, seed=views.seed):
            key, title = f"change.{moved.figure}", f"change by the edit: {result.titles[moved.figure]}"
            unit = "tokens" if moved.figure == "length" else "share"
            if moved.interval is None:
                result.titles[key] = title
                result.not_resolvable[key] = "fewer than two continuations can be compared"
            else:
                _interval(result, key, title, moved.interval, unit, "none")
    return result


def refusals(views: Views, settings: dict[str, Any]) -> Result:
    """Refusals of retain prompts, and of requests that should be refused."""
    if views.tokenizer is None:
        raise UsageError("it needs a tokenizer, to read what the model answers")
    phrases = settings["phrases"] or PHRASES
    chosen = rows_of(views, "retain", settings["records"])
    written = {"benign": _continued(views, chosen, settings["length"])}
    groups: dict[str, Groups] = {"benign": _some(views.clusters("retain"), chosen), "unsafe": None}
    result = Result(headline="over_refusal", bounds=None)
    keys = {"benign": "over_refusal", "unsafe": "refused_unsafe"}
    titles = {"benign": "retain prompts that the model declines", "unsafe": "unsafe requests that the model declines"}
    if getattr(views.tokenizer, "chat_template", None):
        written["unsafe"] = _answers(views, settings["unsafe"] or UNSAFE, settings["length"])
    else:
        result.titles[keys["unsafe"]] = titles["unsafe"]
        result.not_resolvable[keys["unsafe"]] = "the tokenizer has no chat template to ask with"
    earlier = _earlier(views, settings)
    for kind, answers in written.items():
        ends = set(_ends(views))
        texts = views.decode([_until(ids, ends) for ids in answers])
        declined = refuses(texts, phrases).tolist()
        result.rate(keys[kind], titles[kind], declined, groups[kind])
        direction: Direction = "higher" if kind == "unsafe" else "lower"
        result.figures[keys[kind]]["direction"] = direction
        rows: list[Row] = [
            {"kind": kind, "declined": float(no), "text": text} for no, text in zip(declined, texts, strict=True)
        ]
        result.private += rows
        result.generated += sum(map(len, answers))
        before = None if earlier is None else [row for row in earlier if row["kind"] == kind]
        if before is not None:
            _change(
                result,
                keys[kind],
                titles[kind],
                before,
                rows,
                views.seed,
                groups[kind],
                column="declined",
                bounds=(0.0, 1.0),
                direction=direction,
            )
    result.notes.append(
        "A refusal is told by phrases; " + ("those given." if settings["phrases"] else "the built-in list is English.")
    )
    return result


def neighbours(views: Views, settings: dict[str, Any]) -> Result:
    """Rise of the loss on the retain records nearest to the removed ones, against the rest."""
    if not views.edited:
        raise UsageError("it compares the edited copy with the original; run it on an edited copy")
    before = views.workspace.run.read_table("before/retain.parquet")["loss"].to_numpy(dtype=np.float64)
    rises = views.frame("retain")["loss"].to_numpy(dtype=np.float64) - before
    if views.raw("records") is not None and views.raw("retain") is not None:
        nearness = text_nearness(views.strings("records"), views.strings("retain"))
        how = "cosine of hashed character n-grams"
    else:
        nearness = token_nearness(*([one.completion for one in views.records(role)] for role in ("records", "retain")))
        how = "Jaccard index of the completions' tokens"
    known = np.flatnonzero(np.isfinite(rises))
    groups = _some(views.clusters("retain"), known)
    found = damage(nearness[known], rises[known], clusters=groups, share=settings["share"], seed=views.seed)
    result = Result(headline="difference", bounds=None)
    share = f"{settings['share']:.0%}"
    for key, title, interval in (
        ("difference", f"rise of the loss on the nearest {share} of the retain set, minus the rest", found.difference),
        ("near", f"rise of the loss on the nearest {share}", found.near_rise),
        ("far", "rise of the loss on the rest", found.far_rise),
    ):
        if interval is None:
            result.titles[key] = title
            result.not_resolvable[key] = found.reason or "not resolvable"
        else:
            _interval(result, key, title, interval, "nats per token", "lower")
    result.notes.append(f"Nearness to the most similar removed record: {how}.")
    if len(known) < len(rises):
        result.notes.append(f"{len(rises) - len(known)} retain records without a finite loss are left out.")
    return result


def lm_eval(views: Views, settings: dict[str, Any]) -> Result:
    """Benchmarks through the package lm_eval, without the network and without its caches.

    Its request cache does not know the model: with it, the edited copy would get the answers of the original.
    """
    if not settings["tasks"]:
        raise UsageError("expected tasks of lm_eval by name, found none; set tasks in the suite")
    if views.tokenizer is None:
        raise UsageError("it needs a tokenizer")
    try:
        evaluator, models = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
        manager = import_module("lm_eval.tasks").TaskManager()
    except ImportError:
        raise ResourceError("expected the package lm_eval, found none; install it with: pip install lm-eval") from None
    _expect_known(settings["tasks"], manager.all_tasks)
    try:
        with _offline(), _quiet(), _random_state(), inference(views.model):
            wrapped = models.HFLM(pretrained=views.model, tokenizer=views.tokenizer, batch_size=settings["batch"])
            found = evaluator.simple_evaluate(
                model=wrapped,
                tasks=list(settings["tasks"]),
                task_manager=manager,
                num_fewshot=settings["shots"],
                limit=settings["limit"],
                use_cache=None,
                cache_requests=False,
                log_samples=False,
                random_seed=views.seed,
                numpy_random_seed=views.seed,
                torch_random_seed=views.seed,
                fewshot_random_seed=views.seed,
            )
    except UnlearnError:
        raise
    except Exception as error:
        raise ResourceError(
            f"expected tasks that lm_eval can run with the data on this machine, found {type(error).__name__}; load "
            "their data once with lm_eval itself"
        ) from None
    return _benchmarks(found or {}, settings)


# --- induction ------------------------------------------------------------------------------------------------------


def _drawn(views: Views, settings: dict[str, Any]) -> Repeated:
    """Random sequences of ordinary tokens, as long as the vocabulary and the positions allow."""
    tokenizer, size = views.tokenizer, views.model_map.vocab_size
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    ordinary = [i for i in range(min(size, len(tokenizer) if tokenizer is not None else size)) if i not in special]
    records = views.records()
    opening = records[0].ids[: views.kept(records)] if records else ()
    length = min(settings["length"], len(ordinary), (views.max_length - len(opening)) // 2)
    return repeated(ordinary, sequences=settings["sequences"], length=length, opening=opening, seed=views.seed)


def _heads(views: Views, result: Result, drawn: Repeated, rows: list[Row], earlier: list[Row] | None) -> None:
    """Prefix matching: the strongest head, its change, and the strongest of every block."""
    title = "prefix matching of the strongest head: attention to what followed the token before (1: an induction head)"
    result.titles["prefix"] = title
    try:
        found = prefix_matching(views.model, drawn, model_map=views.model_map, batch_tokens=views.settings.batch_tokens)
    except UnsupportedError as error:
        result.not_resolvable["prefix"] = str(error)
        return
    if not len(found.blocks):
        result.not_resolvable["prefix"] = "no layer looks back as far as the sequences are long"
        return
    best, score = found.strongest(seed=views.seed)
    _interval(result, "prefix", title, score, "share", "higher")
    for row, value in zip(rows, found.scores[:, best], strict=True):
        row |= {"prefix": float(value), "block": int(found.blocks[best]), "head": int(found.heads[best])}
    if earlier and "prefix" in earlier[0]:
        where = np.flatnonzero((found.blocks == earlier[0]["block"]) & (found.heads == earlier[0]["head"]))
        if len(where):  # every other sequence chose the head, the rest measure it
            now = [{"prefix": float(value)} for value in found.scores[1::2, int(where[0])]]
            words = "prefix matching of the original's strongest head"
            _change(result, "prefix", words, earlier[1::2], now, views.seed, bounds=(0.0, 1.0), direction="higher")
    frame = found.frame()
    by_block = frame.groupby("block")["prefix_matching"].max()
    result.curves.append(
        line(
            "Prefix matching of the strongest head of each block",
            {"label": "block", "scale": "linear"},
            {"label": "attention", "scale": "linear"},
            [{"name": "model", "x": [int(block) for block in by_block.index], "y": by_block.tolist()}],
        )
    )
    top = frame.sort_values("prefix_matching", ascending=False, kind="stable")[:12]
    result.tables.append(
        {
            "title": "Heads with the strongest prefix matching",
            "columns": ["block", "head", "prefix matching"],
            "rows": top.astype(object).to_numpy().tolist(),
        }
    )
    if found.skipped:
        result.notes.append(f"{len(found.skipped)} blocks have no score: no attention weights, or too short a window.")


# --- generations ----------------------------------------------------------------------------------------------------


def _continued(views: Views, chosen: np.ndarray, length: int) -> list[tuple[int, ...]]:
    """Greedy continuations of some retain prompts, as long as the positions allow."""
    records = [views.records("retain")[int(i)] for i in chosen]
    room = views.max_length - max(record.n_prompt for record in records)
    if room < 1:
        raise UsageError("expected room for a continuation after the retain prompts, found none; use shorter prompts")
    return continuations(
        views.model,
        records,
        views.rows(views.table("retain"), chosen),
        noise=views.noise,
        length=min(length, room),
        model_map=views.model_map,
        progress=views.progress,
    )


def _answers(views: Views, requests: Sequence[str], length: int) -> list[tuple[int, ...]]:
    """Greedy answers of a chat model."""
    records = []
    for i, request in enumerate(requests):
        text = render_chat(views.tokenizer, [Message("user", request)], add_generation_prompt=True)
        ids = tuple(int(t) for t in views.tokenizer(text, add_special_tokens=False)["input_ids"])
        records.append(TokenRecord(f"request-{i}", (*ids, ids[-1]), len(ids), 1))  # a stand-in where the answer begins
    room = views.max_length - max(record.n_prompt for record in records)
    if room < 1:
        raise UsageError("expected room for an answer after the unsafe requests, found none; use shorter requests")
    return continuations(
        views.model,
        records,
        views.score(records),
        noise=np.inf,  # nothing is known of the answer, so all of it is decoded
        length=min(length, room),
        model_map=views.model_map,
        progress=views.progress,
    )


def _ends(views: Views) -> tuple[int, ...]:
    """Ids that end a text, of the tokenizer and of the checkpoint."""
    config = views.workspace.checkpoint("checkpoint").config.get("eos_token_id")
    found = {*(config if isinstance(config, list) else [config]), getattr(views.tokenizer, "eos_token_id", None)}
    return tuple(sorted(int(i) for i in found if i is not None))


def _until(ids: Sequence[int], ends: set[int]) -> Sequence[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


# --- lm_eval --------------------------------------------------------------------------------------------------------


def _expect_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that lm_eval does not know; a YAML file with a task of one's own, or a pattern, is no name."""
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise UsageError(f"expected the YAML file of a task of lm_eval, found nothing at {task}; mend the path")
        elif "*" not in task and task not in known:
            raise UsageError(
                f"expected tasks of lm_eval by name, or YAML files with tasks of your own, found {task}; names are in: "
                "lm_eval ls tasks"
            )


def _benchmarks(found: dict[str, Any], settings: dict[str, Any]) -> Result:
    """Figures of lm_eval's answer: every metric of every task, with its standard error in a table."""
    result = Result(bounds=None)
    rows = []
    for task in sorted(found.get("results", {})):
        metrics = found["results"][task]
        items = int((found.get("n-samples", {}).get(task) or {}).get("effective") or 0)
        for name in sorted(metrics):
            metric, _, how = name.partition(",")
            value, error = metrics[name], metrics.get(f"{metric}_stderr,{how}")
            if not how or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            key = f"{task}.{metric}"
            if not np.isfinite(value) or key in result.figures:
                continue
            result.titles[key] = f"{task}: {metric}"
            result.figures[key] = point(float(value), "score", items, "none")
            rows.append([task, metric, float(value), _known(error), items])
    if not rows:
        raise UsageError("expected tasks of lm_eval that give a number, found none; name others")
    result.headline = next(iter(result.figures))
    result.tables.append(
        {"title": "lm_eval", "columns": ["task", "metric", "value", "standard error", "items"], "rows": rows}
    )
    limit = "all items" if settings["limit"] is None else f"at most {settings['limit']} items a task"
    result.notes.append(f"Run without the network and without lm_eval's caches; {limit}.")
    return result


@contextmanager
def _offline() -> Iterator[None]:
    """No download: the environment, and what the libraries read of it when they were loaded."""
    kept = {name: os.environ.get(name) for name in OFFLINE}
    flags = []
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_DATASETS_OFFLINE")):
        try:
            found = import_module(module)
        except ImportError:
            continue
        if hasattr(found, name):
            flags.append((found, name, getattr(found, name)))
    try:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
        for owner, name, _ in flags:
            setattr(owner, name, True)
        yield
    finally:
        for owner, name, value in flags:
            setattr(owner, name, value)
        for name, before in kept.items():
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, no advice, and nothing from the programs that lm_eval starts, between the lines of a run."""
    logger = logging.getLogger("lm_eval")
    before, errors = logger.level, os.dup(2)
    try:
        logger.setLevel(logging.ERROR)
        with open(os.devnull, "w") as nowhere, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            os.dup2(nowhere.fileno(), 2)  # where git says that it finds no version of lm_eval
            yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        logger.setLevel(before)


@contextmanager
def _random_state() -> Iterator[None]:
    """lm_eval seeds every generator there is; put them back."""
    plain, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numbers)


# --- before and after -----------------------------------------------------------------------------------------------


def _earlier(views: Views, settings: dict[str, Any]) -> list[Row] | None:
    """What the same look left on the original; None on the original itself and where it did not run there."""
    path = views.workspace.run.file(f"private/attacks/before-{settings['name']}.jsonl")
    if not views.edited or not path.exists():
        return None
    return [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]


def _change(
    result: Result,
    key: str,
    title: str,
    before: Sequence[Row],
    after: Sequence[Row],
    seed: int,
    clusters: Groups = None,
    *,
    column: str | None = None,
    unit: str = "share",
    bounds: Bounds | None = None,
    direction: Direction = "lower",
) -> None:
    """Add the paired change of one figure of the same items: edited copy minus original."""
    name, words = f"change.{key}", f"change by the edit: {title}"
    pairs = [(row.get(column or key), old.get(column or key)) for row, old in zip(after, before, strict=False)]
    known = [i for i, pair in enumerate(pairs) if None not in pair]
    if len(before) != len(after) or len(known) < 2:
        result.titles[name] = words
        result.not_resolvable[name] = "fewer than two items can be compared with the original"
        return
    values = np.array([pairs[i] for i in known], dtype=np.float64)
    interval = difference_interval(
        values[:, 0],
        values[:, 1],
        paired=True,
        clusters=_some(clusters, known),
        bounds=bounds,
        seed=seed,
    )
    _interval(result, name, words, interval, unit, direction)


def _interval(result: Result, key: str, title: str, interval: Interval, unit: str, direction: Direction) -> None:
    result.titles[key] = title
    result.figures[key] = as_figure(interval, unit, direction)


def _some(groups: Groups, rows: ArrayLike) -> list[str | None] | None:
    return None if groups is None else [groups[int(i)] for i in np.asarray(rows)]


def _known(value: Any) -> float | None:
    """A number, or None for what is none."""
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None
