"""Intervals, tests and decisions for the figures of an audit; nothing statistical is implemented anywhere else.

Every function is pure (numpy and scipy only) and deterministic by seed. Three rules hold throughout:

- Nothing is ever known exactly. A sample without spread (0 of n, every record alike, AUC = 1) gets a bound on what
  was not seen, never an interval of width zero.
- Records may be near-duplicates of each other. Where `clusters` is given, whole clusters are resampled and the
  number of clusters, not of records, decides how wide an interval is.
- A question the data cannot answer is answered "not resolvable", "not testable" or "inconclusive", with the reason.
"""

from probes.statistics.calibration import conformal_pvalues, dkw
from probes.statistics.canaries import exposure, exposure_law, exposure_pvalue
from probes.statistics.curve import Roc, roc, tpr_at_fpr
from probes.statistics.differences import difference_interval
from probes.statistics.epsilon import one_run_epsilon
from probes.statistics.margins import equivalence, noninferiority
from probes.statistics.means import mean_interval
from probes.statistics.meantests import mean_difference_pvalue
from probes.statistics.multiple import benjamini_hochberg, fisher_combined, holm, median_combined
from probes.statistics.ranking import MIN_PER_SIDE, auc
from probes.statistics.ranktests import auc_null_interval, auc_pvalue
from probes.statistics.rates import clopper_pearson, required_n, worst_of
from probes.statistics.resampling import RESAMPLES
from probes.statistics.residuals import MIN_GAP, residual
from probes.statistics.results import (
    Alternative,
    Bounds,
    Clusters,
    Decision,
    Estimate,
    Floats,
    Interval,
    OperatingPoint,
    Sided,
    Status,
)

__all__ = [
    "MIN_GAP",
    "MIN_PER_SIDE",
    "RESAMPLES",
    "Alternative",
    "Bounds",
    "Clusters",
    "Decision",
    "Estimate",
    "Floats",
    "Interval",
    "OperatingPoint",
    "Roc",
    "Sided",
    "Status",
    "auc",
    "auc_null_interval",
    "auc_pvalue",
    "benjamini_hochberg",
    "clopper_pearson",
    "conformal_pvalues",
    "difference_interval",
    "dkw",
    "equivalence",
    "exposure",
    "exposure_law",
    "exposure_pvalue",
    "fisher_combined",
    "holm",
    "mean_difference_pvalue",
    "mean_interval",
    "median_combined",
    "noninferiority",
    "one_run_epsilon",
    "required_n",
    "residual",
    "roc",
    "tpr_at_fpr",
    "worst_of",
]
