"""Means, ratios and differences with 95 % intervals.

Intervals are Student's t: results over seeds are few and close to normal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its 95 % interval; NaN limits where there is no interval, as with one value."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    from scipy.special import stdtrit  # quantile of t; importing scipy.stats takes a second

    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Geometric mean of paired ratios with its 95 % interval: a t-interval on the logarithms."""
    logs = np.log(np.asarray(numerator) / np.asarray(denominator))
    estimate = mean_interval(logs.tolist())
    return Estimate(math.exp(estimate.mean), math.exp(estimate.low), math.exp(estimate.high), estimate.n)


def seeds_interval(values: Sequence[float]) -> Estimate:
    """The interval over seeds; NaN limits, not zero width, where few seeds happen to agree to the last image."""
    estimate = mean_interval(values)
    return Estimate(estimate.mean, math.nan, math.nan, estimate.n) if agree(values) else estimate


def agree(values: Sequence[float]) -> bool:
    """Whether all values are equal up to rounding."""
    return float(np.ptp(values)) < 1e-9


def difference_interval(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """Mean difference of values by seed with its interval: paired over two or more common seeds, else unpaired (Welch).

    The limits are NaN where there are fewer than two trials to compare, or where these do not vary.
    """
    common = sorted(set(values) & set(reference))
    if len(common) >= 2:
        return seeds_interval([values[seed] - reference[seed] for seed in common])
    return welch(list(values.values()), list(reference.values())).interval


@dataclass(frozen=True)
class Difference:
    """Difference of two groups' means: `error` is its standard error, `deviation` the standard deviation of one trial,
    `freedom` the degrees of freedom. If the variance is unknown, `freedom` is 0, `error` and `deviation` NaN."""

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
        """Upper-tail probability of t at `value` / `error`: a one-sided p value."""
        from scipy.special import stdtr

        return float(stdtr(self.freedom, -value / self.error))


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Welch's difference a - b (Biometrika 34, 1947), each group with its own variance. Few seeds cannot show that
    variances are equal, and a pooled one would understate the error of a noisy variant."""
    difference, n = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
    variances = [0.0 if n < 2 or agree(values) else float(np.var(values, ddof=1)) for values in (a, b)]
    parts = [variance / len(values) for variance, values in zip(variances, (a, b), strict=True)]
    if not sum(parts):
        return Difference(difference, math.nan, 0, math.nan, n)
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return Difference(difference, math.sqrt(sum(parts)), sum(parts) ** 2 / below, math.sqrt(sum(variances) / 2), n)
