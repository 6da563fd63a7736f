"""The interval of a share, such as of calls above a latency limit, from clusters that are not independent within."""

import math
from collections.abc import Sequence

from harness.stats.intervals import CONFIDENCE, Estimate


def share_interval(counts: Sequence[tuple[int, int]]) -> Estimate:
    """The share with its 95 % interval by Korn and Graubard (Survey Methodology 24, 1998), a binomial interval for the
    effective number of values. `counts`: (values with the property, values) of each cluster, such as a process.
    """
    from scipy.special import stdtrit
    from scipy.stats import beta

    counted, clusters = sum(n for _, n in counts), len(counts)
    if not counted:
        return Estimate(math.nan, 0.0, 1.0, 0)
    share, effective = sum(k for k, _ in counts) / counted, float(counted)
    if 0 < share < 1 and clusters > 1 and counted > clusters:
        between = sum((k - share * n) ** 2 for k, n in counts) * clusters / (clusters - 1) / counted**2
        freedom = float(stdtrit(counted - 1, 0.5 + CONFIDENCE / 2) / stdtrit(clusters - 1, 0.5 + CONFIDENCE / 2))
        if between:
            effective = min(float(counted), share * (1 - share) / between * freedom**2)
    tail, k = (1 - CONFIDENCE) / 2, share * effective
    low = float(beta.ppf(tail, k, effective - k + 1)) if share else 0.0
    high = float(beta.ppf(1 - tail, k + 1, effective - k)) if share < 1 else 1.0
    return Estimate(share, low, high, counted)
