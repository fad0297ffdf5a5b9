"""What an edit breaks besides: copying, calibration, style, refusals, and records near those it removed."""

from probes.collateral.calibration import Calibration, calibration
from probes.collateral.induction import Copying, Prefix, Repeated, copying, prefix_matching, repeated
from probes.collateral.neighbours import Damage, damage, text_nearness, token_nearness
from probes.collateral.refusals import refuses
from probes.collateral.style import Change, changes, style

__all__ = [
    "Calibration",
    "Change",
    "Copying",
    "Damage",
    "Prefix",
    "Repeated",
    "calibration",
    "changes",
    "copying",
    "damage",
    "prefix_matching",
    "refuses",
    "repeated",
    "style",
    "text_nearness",
    "token_nearness",
]
