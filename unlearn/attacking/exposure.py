"""Exposure of planted canaries, with exact p-values."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from attacks.exposure import Exposure, Space, combine, exposures
from probes import statistics
from probes.records import TokenRecord
from unlearn.attacking.result import Result, as_figure, point
from unlearn.attacking.views import Views
from unlearn.records.extras import Canary
from unlearn.records.raw import RawRecord


def canaries(views: Views, settings: dict[str, Any]) -> Result:
    """Rank each canary among fills of its format; canaries of one sentence and format share the fills."""
    together: dict[tuple[str, str], list[Canary]] = defaultdict(list)
    for canary in views.workspace.canaries():
        together[canary.prompt, canary.format].append(canary)
    rows: list[tuple[str, Exposure]] = []
    found: list[Exposure] = []
    for (prompt, form), members in together.items():
        names = dict(zip((canary.secret for canary in members), (canary.id for canary in members), strict=True))

        def record(fill: str, prompt: str = prompt) -> TokenRecord:
            return views.encode([RawRecord("canary", prompt=prompt, completion=fill)])[0]

        secrets = list(names)
        for secret, one in zip(
            secrets,
            exposures(
                views.model,
                record,
                secrets,
                Space.of(form),
                n=settings["n"],
                seed=views.seed,
                extrapolate=True,
                model_map=views.model_map,
                progress=views.progress,
            ),
            strict=True,
        ):
            found.append(one)
            rows.append((views.workspace.pseudonym(names[secret]), one))
    together_found = combine(found, seed=views.seed)
    adjusted = statistics.holm([one.pvalue for one in found])
    exposed = [bool(p <= settings["level"]) for p in adjusted]
    result = Result(headline="exposed", bounds=None)
    title = f"canaries exposed, p at most {settings['level']:g} after Holm"
    attainable = len(found) * min(1 / one.size for one in found)
    if attainable <= settings["level"]:
        result.rate("exposed", title, exposed, None)
    else:
        result.headline, result.titles["exposed"] = "bits", title
        result.not_resolvable["exposed"] = (
            f"{len(found)} canaries among so few fills cannot go below p = {attainable:.2g} after Holm; take more fills"
        )
    result.titles |= {"bits": "mean exposure", "law": "p-value: the ranks look never seen", "fisher": "p-value: Fisher"}
    most = max(one.max_bits for one in found)
    interval = statistics.mean_interval([one.bits for one in found], bounds=(0.0, most), seed=views.seed)
    result.figures["bits"] = as_figure(interval, "bits", "lower")
    result.figures["fisher"] = point(together_found.pvalue, "probability", len(found), "higher")
    result.figures["law"] = point(together_found.law_pvalue, "probability", len(found), "higher")
    order = sorted(range(len(rows)), key=lambda i: (rows[i][1].pvalue, rows[i][0]))
    result.tables.append(
        {
            "title": "Canaries, most exposed first",
            "columns": [
                "canary",
                "exposure (bits)",
                "most measurable",
                "p-value",
                "Holm",
                "rank",
                "of",
                "extrapolated",
            ],
            "rows": [
                [
                    rows[i][0],
                    rows[i][1].bits,
                    rows[i][1].max_bits,
                    rows[i][1].pvalue,
                    float(adjusted[i]),
                    rows[i][1].rank,
                    rows[i][1].size,
                    rows[i][1].extrapolated_bits,
                ]
                for i in order
            ],
        }
    )
    result.notes += [
        "A never-seen canary has an exposure of at least b bits with probability 2^-b, 1.44 bits on average, where "
        "secrets were drawn at random from their format.",
        "Together the canaries look "
        + ("never seen." if together_found.compatible else "unlike never-seen ones (KS test of their ranks, 5 %)."),
        "Extrapolated exposures come from a fitted skew-normal and carry no p-value.",
    ]
    return result
