"""Membership inference: were these records among what the checkpoint was trained on?

Run the blind test first (`blind_test`): where the records alone tell members from non-members, no figure here is about
membership. Then scores (`compute`), what they are worth (`evaluate`, `choose`), which records they flag (`flag`), and
whether the whole set stands out (`dataset_inference`). Who controls training can bound epsilon from one run
(`audit_one_run`).
"""

from attacks.membership.blind import Blind, Matched, blind_images, blind_test, propensity_matched
from attacks.membership.dataset import DatasetInference, dataset_inference
from attacks.membership.evaluate import Choice, Membership, choose, evaluate
from attacks.membership.flagged import Flagged, flag
from attacks.membership.gradient import gradient_norm
from attacks.membership.one_run import OneRun, audit_one_run
from attacks.membership.scores import SCORES, Inputs, Score, compute, image_scores, prefixed_records

__all__ = [
    "SCORES",
    "Blind",
    "Choice",
    "DatasetInference",
    "Flagged",
    "Inputs",
    "Matched",
    "Membership",
    "OneRun",
    "Score",
    "audit_one_run",
    "blind_images",
    "blind_test",
    "choose",
    "compute",
    "dataset_inference",
    "evaluate",
    "flag",
    "gradient_norm",
    "image_scores",
    "prefixed_records",
    "propensity_matched",
]
