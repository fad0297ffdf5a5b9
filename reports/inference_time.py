"""What a report says of an edit that acts at inference time: the copy answers differently through its own program, and
its files hold the original's weights. Whoever has the files can leave the program out.

The sentences stand beside the verdict, since a verdict and a claim level speak of the copy as its program runs it.
"""

from __future__ import annotations

from reports.text import Json

HOLDS = (
    "The edit acts at inference time: the files of the edited copy hold the original's weights. Figures and claim "
    "level are those of the copy as its own program runs it; whoever has the files has the original."
)
AUDITED = (
    "This checkpoint answers through a program of its own, and its files hold the weights of another model. The "
    "figures are those of the checkpoint as that program runs it; whoever has the files has the other model."
)
FILES = (
    "The files that the edited copy is made of still contain the original model; whoever has the files can read them "
    "as before."
)
ADVICE = {
    "regulator": "Delete or protect them.",
    "subject": "It is for the organisation that runs the model to delete or protect them.",
}
SAID = {
    True: "In the tests the edited copy no longer said these things when it was asked through its own program.",
    False: "The edited copy is meant to no longer say these things when it is asked through its own program; the tests "
    "did not show that it says none of them.",
}


def acts(report: Json) -> bool:
    """Whether the edited copy, or in an audit the checkpoint, holds another model's weights than it answers by."""
    if report["run"]["kind"] not in ("audit", "forget"):
        return False
    if report["method"]:
        return bool(report["method"]["inference_time"] and report["method"]["edit"])
    return bool(report["checkpoint"]["before"]["inference_time"])


def banner(report: Json, audience: str) -> str:
    """What stands beside the verdict; empty for every other report.

    Args:
        report: what `build` returns.
        audience: engineer; regulator and subject read it in plain words.
    """
    if not acts(report):
        return ""
    if not report["method"]:
        return AUDITED
    if audience == "engineer":
        return HOLDS
    silent = report["claim_level"] is not None and report["claim_level"] != "E0"
    return f"{SAID[silent]} {FILES} {ADVICE[audience]}"
