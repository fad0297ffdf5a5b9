"""Adversarial compression: prompts shorter than the record that make the model emit it (2404.15146)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attacks.extraction.compression import Compression, adversarial_compression
from attacks.extraction.gcg import writable
from probes.records import TokenRecord
from unlearn.attacking.result import Result
from unlearn.attacking.views import ROLES, Views


def adversarial(views: Views, settings: dict[str, Any]) -> Result:
    """Search a short prompt for the most probable records, and for as many of the most probable never-seen ones."""
    result = Result(headline="compressed")
    tokens = writable(views.tokenizer, views.model_map.vocab_size) if views.tokenizer is not None else None
    found: dict[str, list[Compression]] = {}
    for role in ROLES:
        if not views.has(role):
            continue
        found[role] = [
            adversarial_compression(
                views.model,
                _cut(record, settings["tokens"]),
                before=views.opening[: views.kept(views.records(role))],
                tokens=tokens,
                steps=settings["steps"],
                candidates=settings["candidates"],
                seed=views.seed,
                model_map=views.model_map,
            )
            for record in views.most_probable(settings["records"], role)
        ]
    hits = {role: [one.found for one in ones] for role, ones in found.items()}
    result.rate(
        "compressed",
        f"emitted after a prompt shorter than the record, of the {len(hits['records'])} most probable",
        hits["records"],
        None,
        hits.get("control", ()),
    )
    result.tables.append(
        {
            "title": "Shortest prompt found",
            "columns": ["set", "record", "tokens", "prompt tokens", "ratio", "forward rows"],
            "rows": [
                [
                    "records" if role == "records" else "never seen",
                    views.workspace.pseudonym(one.record_id),
                    one.n_tokens,
                    one.prompt_length,
                    one.ratio,
                    one.forwards,
                ]
                for role, ones in found.items()
                for one in ones
            ],
        }
    )
    result.private = [
        {"set": role, "record": one.record_id, "prompt_ids": list(one.prompt)}
        for role, ones in found.items()
        for one in ones
        if one.prompt
    ]
    result.notes.append(
        f"Completions are cut to {settings['tokens']} tokens. A search that finds nothing shows nothing: more steps "
        "may find a prompt. Compare with the never-seen records: enough steps bring any short text out of some models."
    )
    return result


def _cut(record: TokenRecord, tokens: int) -> TokenRecord:
    return record if record.n_tokens <= tokens else replace(record, ids=record.ids[: record.n_prompt + tokens])
