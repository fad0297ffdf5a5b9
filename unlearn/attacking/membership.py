"""Membership inference: each score against the control set, behind a blind test that needs no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from attacks.membership import scores
from attacks.membership.dataset import dataset_inference
from attacks.membership.evaluate import Membership, evaluate
from attacks.membership.flagged import flag
from attacks.membership.gradient import gradient_norm
from attacks.membership.one_run import audit_one_run
from probes.errors import UsageError
from probes.records import TokenRecord
from probes.statistics import Estimate, OperatingPoint, auc
from unlearn.attacking.result import Result, as_figure, line, point
from unlearn.attacking.views import Views

REFERENCE = ("reference", "windows", "rmia")
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores of records, of controls, and which controls those are


def blind(views: Views, settings: dict[str, Any]) -> Result:
    """Can the sets be told apart without the model?"""
    found = views.blind.found
    result = Result(headline="auc", notes=[views.blind.statement])
    _estimate(result, "auc", "AUC of text or image features alone", found.auc)
    if views.blind.confounded:
        matched = views.matched
        if matched.status == "ok":
            result.notes.append(
                f"{len(matched.members)} pairs of a record and a never-seen record look alike to the blind test; "
                "membership scores also give their AUC on these."
            )
    return result


def score(views: Views, settings: dict[str, Any]) -> Result:
    """One score: AUC, true-positive rates at low false-positive rates, ROC."""
    name = settings["name"].partition(".")[2]
    pos, neg, controls = _scores(views, name, settings)
    groups = views.clusters("control")
    found = evaluate(
        pos,
        neg,
        pos_clusters=views.clusters(),
        neg_clusters=[groups[int(i)] for i in controls],
        fprs=tuple(settings["fprs"]),
        alternative="two-sided" if views.stage == "after" else "greater",  # below never seen tells as much as above
        seed=views.seed,
    )
    result = _evaluated(found, settings["fprs"])
    if views.blind.confounded:
        matched = views.matched
        where = {int(row): place for place, row in enumerate(controls)}
        pairs = [
            (int(m), where[int(o)]) for m, o in zip(matched.members, matched.others, strict=True) if int(o) in where
        ]
        estimate = auc(pos[[m for m, _ in pairs]], neg[[o for _, o in pairs]], seed=views.seed) if pairs else None
        title = "AUC on pairs that look alike to the blind test"
        result.titles["auc.matched"] = title
        if matched.status == "ok" and estimate is not None:
            _estimate(result, "auc.matched", title, estimate)
        else:
            result.not_resolvable["auc.matched"] = matched.reason or "too few pairs look alike"
    result.records["score"] = pos.tolist()
    if len(controls) == len(groups):
        result.controls["score"] = neg.tolist()
    return result


def flagged(views: Views, settings: dict[str, Any]) -> Result:
    """Conformal p-values against the control set, with Benjamini-Hochberg."""
    name = settings["score"] or ("reference" if views.has_reference else "loss")
    pos, neg, controls = _scores(views, name, {})
    groups = views.clusters("control")
    found = flag(pos, neg, q=settings["q"], clusters=[groups[int(i)] for i in controls], seed=views.seed)
    result = Result(headline="flagged", column="hit")
    title = f"flagged as members, false discoveries at most {settings['q']:.0%} (score: {name})"
    if found.status != "ok":
        result.headline, result.column = None, None
        result.titles["flagged"] = title
        result.not_resolvable["flagged"] = found.reason or "not resolvable"
        return result
    result.rate("flagged", title, found.flagged.tolist(), views.clusters())
    result.records |= {
        "hit": found.flagged.tolist(),
        "p_value": found.pvalues.tolist(),
        "adjusted": found.adjusted.tolist(),
    }
    result.notes.append(
        f"p-values are ranks among {len(neg)} never-seen records; the bound holds when these are exchangeable with "
        "records the model never saw, which the blind test examines."
    )
    return result


def dataset(views: Views, settings: dict[str, Any]) -> Result:
    """Dataset inference: were the records, as a set, in training?"""
    tables = {role: _inputs(views, role) for role in ("records", "control")}
    names = [name for name, one in scores.SCORES.items() if name not in ("rmia", "gradient")]
    mine, _ = scores.compute(tables["records"], names)
    others, _ = scores.compute(tables["control"], names)
    ours, theirs = views.paired_clusters()
    used = [name for name in mine if name in others]  # what a suite computed anyway, and no more
    found = dataset_inference(
        np.column_stack([mine[name] for name in used]),
        np.column_stack([others[name] for name in used]),
        names=used,
        clusters=ours,
        other_clusters=theirs,
        splits=settings["splits"],
        seed=views.seed,
    )
    result = Result(headline="pvalue", bounds=None)
    result.titles = {"pvalue": "p-value: the records look never seen, as a set", "effect": "standardised difference"}
    if found.status != "ok" or found.pvalue is None:
        result.not_resolvable["pvalue"] = found.reason or "not resolvable"
        return result
    n = len(views.records()) + len(views.records("control"))
    result.figures["pvalue"] = point(found.pvalue, "probability", n, "higher")
    if found.effect is not None:
        result.figures["effect"] = point(found.effect, "standard deviations", n)
    rows = sorted(found.weights.items(), key=lambda item: -abs(item[1]))
    result.tables.append(
        {
            "title": "What the linear model weighs (mean over splits, standardised features)",
            "columns": ["score", "weight"],
            "rows": [[name, float(weight)] for name, weight in rows],
        }
    )
    return result


def one_run(views: Views, settings: dict[str, Any]) -> Result:
    """A lower bound on epsilon, where a fair coin put records into training."""
    if not settings["randomised"]:
        raise UsageError(
            "it needs records and control that a fair coin put into training or left out; say randomised: true then"
        )
    pos, neg, _ = _scores(views, "reference" if views.has_reference else "loss", {})
    each = max(1, int(settings["guesses"] * (len(pos) + len(neg)) / 2))
    found = audit_one_run(
        np.concatenate([pos, neg]),
        np.concatenate([np.ones(len(pos), dtype=bool), np.zeros(len(neg), dtype=bool)]),
        guesses_in=each,
        guesses_out=each,
        delta=settings["delta"],
        seed=views.seed,
    )
    result = Result(headline="epsilon", bounds=None)
    result.titles = {
        "epsilon": f"epsilon is at least this (95 %, delta {settings['delta']:g})",
        "ceiling": "the most this audit could have shown",
        "correct": "right guesses",
    }
    result.figures["epsilon"] = point(found.epsilon, "nats", len(pos) + len(neg))
    result.figures["ceiling"] = point(found.ceiling, "nats", found.guesses, "none")
    result.rate("correct", "right guesses", [True] * found.correct + [False] * (found.guesses - found.correct), None)
    return result


# --- shared ---------------------------------------------------------------------------------------------------------


def _inputs(views: Views, role: str) -> scores.Inputs:
    """What scores need, as far as it was made anyway: no pass is run for this."""
    made = views.made
    return scores.Inputs(
        table=views.table(role),
        lower=views.lower(role) if made(("lower", "records")) and made(("lower", "control")) else None,
        reference=views.reference(role) if views.has_reference else None,
    )


def _scores(views: Views, name: str, settings: dict[str, Any]) -> Pair:
    """Scores of the records and of the controls that are scored."""
    if name in REFERENCE and not views.has_reference:
        raise UsageError("it needs a reference that never held the records")
    everyone = np.arange(len(views.records("control")))
    if name == "gradient_norm":
        pair = [
            gradient_norm(views.model, views.records(role), model_map=views.model_map, progress=views.progress)
            for role in ("records", "control")
        ]
        return pair[0], pair[1], everyone
    if views.task == "image_classification":
        return _image_scores(views, name, settings)
    simple = {"loss": scores.loss, "zlib": scores.zlib, "surprising": scores.surprising}
    if name in simple:
        return simple[name](views.table()), simple[name](views.table("control")), everyone
    if name in ("min_k", "min_k_plus_plus"):
        make = getattr(scores, name)
        share = settings.get("share", 0.2)
        return make(views.table(), share), make(views.table("control"), share), everyone
    if name == "lowercase":
        pair = [scores.lowercase(views.table(role), views.lower(role)) for role in ("records", "control")]
        return pair[0], pair[1], everyone
    if name in ("reference", "windows"):
        make = getattr(scores, name)
        pair = [make(views.table(role), views.reference(role)) for role in ("records", "control")]
        return pair[0], pair[1], everyone
    if name == "rmia":
        return _rmia(views, settings)
    if name == "recall":
        return _recall(views, settings)
    raise UsageError("expected a membership score of this installation, found another name")


def _rmia(views: Views, settings: dict[str, Any]) -> Pair:
    """One half of the control set is the population, the other is scored."""
    population, scored = _population(views)
    options = {"a": settings.get("a", 0.3), "gamma": settings.get("gamma", 1.0)}
    mine, ref = views.table(), views.reference("records")
    never, never_ref = views.table("control"), views.reference("control")
    crowd = views.rows(never, population), views.rows(never_ref, population)
    pos = scores.rmia(mine, ref, *crowd, **options)
    neg = scores.rmia(views.rows(never, scored), views.rows(never_ref, scored), *crowd, **options)
    return pos, neg, scored


def _population(views: Views) -> tuple[np.ndarray, np.ndarray]:
    population, scored = views.halves()
    if not len(population) or not len(scored):
        raise UsageError("expected at least two independent never-seen records, found fewer; give a larger control set")
    return population, scored


def _recall(views: Views, settings: dict[str, Any]) -> Pair:
    """The first never-seen records of a random order stand before the others; they are not scored."""
    order = np.random.default_rng([views.seed, 11]).permutation(len(views.records("control")))
    shots, scored = order[: settings.get("shots", 4)], np.sort(order[settings.get("shots", 4) :])
    if not len(scored):
        raise UsageError("expected more never-seen records than shots, found fewer; give a larger control set")
    never = views.records("control")
    bodies = {record.ids for record in (*views.records(), *(never[int(i)] for i in scored))}
    # Sets without ids of their own number their rows alike: which record stands before another is said by its tokens.
    before = [replace(never[int(i)], record_id=f"shot {i}") for i in shots if never[int(i)].ids not in bodies]
    rows: list[TokenRecord] = [never[int(i)] for i in scored]
    pos = scores.recall(views.table(), views.prefixed(views.records(), before))
    neg = scores.recall(views.rows(views.table("control"), scored), views.prefixed(rows, before))
    return pos, neg, scored


def _image_scores(views: Views, name: str, settings: dict[str, Any]) -> Pair:
    everyone = np.arange(len(views.frame("control")))
    if name in ("reference", "rmia"):
        log_p = {role: -views.frame(role)["loss"].to_numpy(dtype=np.float64) for role in ("records", "control")}
        ref = {role: -views.reference_frame(role)["loss"].to_numpy(dtype=np.float64) for role in ("records", "control")}
        if name == "reference":
            pair = [scores.reference(log_p[role], ref[role]) for role in ("records", "control")]
            return pair[0], pair[1], everyone
        population, scored = _population(views)
        crowd = log_p["control"][population], ref["control"][population]
        options = {"a": settings.get("a", 0.3), "gamma": settings.get("gamma", 1.0)}
        pos = scores.rmia(log_p["records"], ref["records"], *crowd, **options)
        neg = scores.rmia(log_p["control"][scored], ref["control"][scored], *crowd, **options)
        return pos, neg, scored
    found = {role: scores.image_scores(views.frame(role)) for role in ("records", "control")}
    if name not in found["records"]:
        raise UsageError("expected a membership score of this installation, found another name")
    return found["records"][name], found["control"][name], everyone


def _estimate(result: Result, key: str, title: str, estimate: Estimate) -> None:
    result.titles[key] = title
    if estimate.interval is None:
        result.not_resolvable[key] = estimate.reason or "not resolvable"
    else:
        result.figures[key] = as_figure(estimate.interval, "AUC")


def _evaluated(found: Membership, fprs: list[float]) -> Result:
    result = Result(headline="auc", bounds=None, pvalue=found.pvalue)
    _estimate(result, "auc", "AUC against never-seen records", found.auc)
    if found.null is not None and found.auc.interval is not None:
        result.control["auc"] = as_figure(found.null, "AUC", "none")
        result.notes.append("Never seen: where the AUC of a score that separates nothing falls in 95 % of cases.")
    for fpr in fprs:
        place: OperatingPoint = found.points[fpr]
        key = f"tpr_at_{fpr:g}"
        result.titles[key] = f"true-positive rate at a false-positive rate of {fpr:.0%}"
        if place.tpr is None or place.fpr is None:
            result.not_resolvable[key] = place.reason or "not resolvable"
        else:
            result.figures[key] = as_figure(place.tpr, "share")
            result.control[key] = as_figure(place.fpr, "share", "none")
    if found.roc is not None and found.auc.interval is not None:
        x, y = found.roc.points(120)
        result.curves.append(
            line(
                "ROC",
                {"label": "false-positive rate", "scale": "log"},
                {"label": "true-positive rate", "scale": "log"},
                [{"name": "records", "x": x.tolist(), "y": y.tolist()}],
                kind="roc",
            )
        )
    return result
