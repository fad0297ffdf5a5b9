"""The four arms of a figure: checkpoint by record set, from a report's set-level measurements."""

from __future__ import annotations

from reports.text import ARMS, AUDIT_ARMS, METRICS, Json


def measured_arms(measured: Json, metric: str) -> dict[str, Json | None]:
    """Arms of one metric from the set-level figures; in an audit the audited checkpoint is also the one on control."""

    def figure(stage: str, part: str) -> Json | None:
        found: Json | None = ((measured[stage] or {}).get("sets", {}).get(part) or {}).get("figures", {}).get(metric)
        return found

    return {
        "O": figure("before", "records"),
        "U": figure("after", "records"),
        "N": figure("after" if measured["after"] else "before", "control"),
        "R": figure("reference", "records"),
    }


def known_metrics(report: Json) -> list[str]:
    """Metrics of the measured record set, in the vocabulary's order, unknown ones last."""
    before = report["run"]["measurements"]["before"] or {"sets": {}}
    names = (before["sets"].get("records") or {"figures": {}})["figures"]
    order = {name: index for index, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def arms(report: Json, metric: str) -> dict[str, Json | None]:
    """The four arms of a metric, from a report's set-level figures."""
    return measured_arms(report["run"]["measurements"], metric)


def edited(report: Json) -> bool:
    """Whether an edited checkpoint was measured; a forget run that stopped early reads like an audit."""
    return report["run"]["measurements"]["after"] is not None


def arm_words(report: Json) -> dict[str, tuple[str, str]]:
    """Words of each arm: (short, long); without an edit, records and control are on one checkpoint."""
    return ARMS if edited(report) else AUDIT_ARMS


def present_arms(report: Json) -> str:
    """Arms that can hold a figure in this run, in reading order."""
    return f"O{'U' if edited(report) else ''}N{'R' if report['run']['measurements']['reference'] else ''}"
