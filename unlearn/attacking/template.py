"""Template extraction: samples from the head of the chat template, matched against the records (2510.18554)."""

from __future__ import annotations

from typing import Any

from attacks.extraction.template import HashedNgrams, Hits, conversation_end, extract, head, match, model_embedder
from probes.likelihood import SamplingScheme
from unlearn.attacking.result import Result, as_figure
from unlearn.attacking.views import Views

WORDS = {"edit": "edit similarity", "cosine": "cosine similarity"}


def extraction(views: Views, settings: dict[str, Any]) -> Result:
    """Generate after the bare template; the control set sets the thresholds and measures false hits."""
    stop, after = conversation_end(views.tokenizer)
    drawn = extract(
        views.model,
        head(views.tokenizer),
        settings["n"],
        settings["length"],
        stop=stop,
        stop_after=after,
        scheme=SamplingScheme(settings["temperature"]),
        seed=views.seed,
        model_map=views.model_map,
        progress=views.progress,
    )
    texts = views.decode(drawn)
    own = settings["embedder"] == "model"
    embedder = model_embedder(views.model, views.tokenizer, model_map=views.model_map) if own else HashedNgrams()
    found = match(
        texts,
        views.strings(),
        views.strings("control"),
        embedder=embedder,
        fpr=settings["fpr"],
        clusters=views.clusters(),
        disjoint_clusters=views.clusters("control"),
        seed=views.seed,
    )
    result = Result(private=[{"text": text} for text in texts], generated=sum(map(len, drawn)))
    for name, hits in (("edit", found.edit), ("cosine", found.cosine)):
        _add(result, name, hits)
        result.records[f"{name}_similarity"] = found.frame["edit_similarity" if name == "edit" else name].tolist()
    if found.edit.status == "ok" and found.cosine.status == "ok":
        either = (found.frame["edit_hit"] | found.frame["cosine_hit"]).astype(bool)
        result.records["hit"] = either.tolist()
    result.headline = "cosine.excess"
    result.notes.append(
        f"{found.generations} generations. A record is hit when it lies nearer to one of them than all but "
        f"{settings['fpr']:.0%} of never-seen records; the excess over never-seen records is what counts."
    )
    return result


def _add(result: Result, name: str, hits: Hits) -> None:
    titles = {"targets": "records hit by", "disjoint": "never-seen records hit by", "excess": "excess of hits by"}
    for part, title in titles.items():
        key = f"{name}.{part}"
        result.titles[key] = f"{title} {WORDS[name]}"
        interval = getattr(hits, part)
        if interval is None:
            result.not_resolvable[key] = hits.reason or "not resolvable"
        else:
            result.figures[key] = as_figure(interval, "share")
