"""Means, ratios and differences with 95 % intervals.

Intervals are Student's t: runs with different seeds are close to normal and few.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its interval; with one value the interval is not a number."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    from scipy.special import stdtrit  # the quantile of scipy.stats.t, which takes a second to import

    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Geometric mean of paired ratios with its interval: a t-interval on the logarithms."""
    logs = np.log(np.asarray(numerator) / np.asarray(denominator))
    estimate = mean_interval(logs.tolist())
    return Estimate(math.exp(estimate.mean), math.exp(estimate.low), math.exp(estimate.high), estimate.n)


def seeds_interval(values: Sequence[float]) -> Estimate:
    """The interval over seeds; a few that happen to agree to the last image do not make one of no width."""
    estimate = mean_interval(values)
    return Estimate(estimate.mean, math.nan, math.nan, estimate.n) if agree(values) else estimate


def agree(values: Sequence[float]) -> bool:
    """Whether all are the same, but for rounding."""
    return float(np.ptp(values)) < 1e-9


def difference_interval(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """Mean difference by seed with its interval: paired over the seeds that both have, unpaired (Welch) without any.

    Not a number where there are fewer than two runs to compare, or these do not differ at all.
    """
    common = sorted(set(values) & set(reference))
    if len(common) >= 2:
        return seeds_interval([values[seed] - reference[seed] for seed in common])
    return welch(list(values.values()), list(reference.values())).interval


@dataclass(frozen=True)
class Difference:
    """Of two groups' means: `error` is its standard error, `deviation` that of a single run; 0 `freedom` and not a
    number where nothing is known of them."""

    mean: float
    error: float
    freedom: float
    deviation: float
    n: int

    @property
    def interval(self) -> Estimate:
        if not self.freedom:
            return Estimate(self.mean, math.nan, math.nan, self.n)
        from scipy.special import stdtrit

        half = float(stdtrit(self.freedom, 0.5 + CONFIDENCE / 2)) * self.error
        return Estimate(self.mean, self.mean - half, self.mean + half, self.n)

    def above(self, value: float) -> float:
        """The chance of a t as large as this difference's or larger, were the true one `value` less."""
        from scipy.special import stdtr

        return float(stdtr(self.freedom, -value / self.error))


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of a - b (Biometrika 34, 1947): each group with its own variance. Few seeds do not tell whether variances are
    equal, and a pooled one lends a noisy variant the quiet ones' certainty."""
    difference, n = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
    variances = [0.0 if n < 2 or agree(values) else float(np.var(values, ddof=1)) for values in (a, b)]
    parts = [variance / len(values) for variance, values in zip(variances, (a, b), strict=True)]
    if not sum(parts):
        return Difference(difference, math.nan, 0, math.nan, n)
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return Difference(difference, math.sqrt(sum(parts)), sum(parts) ** 2 / below, math.sqrt(sum(variances) / 2), n)
