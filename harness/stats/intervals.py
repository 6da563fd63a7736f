"""Means, ratios and differences with 95 % intervals.

Intervals are Student's t: results over seeds are few and close to normal.
"""

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class TDistributed:
    """A quantity over its standard `error` has Student's t distribution with `freedom` degrees of freedom."""

    error: float
    freedom: float

    def above(self, value: float) -> float:
        """Upper-tail probability at `value`: a one-sided p value."""
        from scipy.special import stdtr

        return float(stdtr(self.freedom, -value / self.error))

    def half_width(self, confidence: float) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, 0.5 + confidence / 2)) * self.error


GUARD = 3  # a pair's own test is made at three times the level


@dataclass(frozen=True)
class Difference:
    """Difference of two means, tested by `pooled` and `own`; both None where the variance is unknown.

    `pooled`: with the variance of all treatments or the pair's where that is larger; `own`: by the pair's values alone,
    at GUARD times the level; where there are no others, the two are the same. `deviation`: standard deviation of one
    trial, known with `deviation_freedom` degrees of freedom; `n`: values of the smaller group.
    """

    mean: float
    pooled: TDistributed | None
    own: TDistributed | None
    deviation: float
    n: int
    deviation_freedom: float = 0.0

    def interval_at(self, confidence: float = CONFIDENCE) -> Estimate:
        if self.pooled is None:
            return Estimate(self.mean, math.nan, math.nan, self.n)
        half = self.pooled.half_width(confidence)
        if self.own is not None:
            half = max(half, self.own.half_width(max(0.0, 1 - GUARD * (1 - confidence))))
        return Estimate(self.mean, self.mean - half, self.mean + half, self.n)

    def above(self, value: float) -> float:
        """One-sided p value: of `value` or more by chance."""
        assert self.pooled is not None
        return max(self.pooled.above(value), self.own.above(value) / GUARD if self.own else 0.0)


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Welch's difference a - b (Biometrika 34, 1947), each group with its own variance."""
    difference, n = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
    variances = [0.0 if n < 2 or agree(values) else float(np.var(values, ddof=1)) for values in (a, b)]
    parts = [variance / len(values) for variance, values in zip(variances, (a, b), strict=True)]
    if not sum(parts):
        return Difference(difference, None, None, math.nan, n)
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True) if part)
    tested = TDistributed(math.sqrt(sum(parts)), sum(parts) ** 2 / below)
    return Difference(difference, tested, None, math.sqrt(sum(variances) / 2), n, tested.freedom)


def paired(differences: Sequence[float]) -> Difference:
    """The mean of paired differences."""
    n, mean = len(differences), float(np.mean(differences))
    if n < 2 or agree(differences):
        return Difference(mean, None, None, math.nan, n)
    deviation = float(np.std(differences, ddof=1))
    return Difference(mean, TDistributed(deviation / math.sqrt(n), n - 1), None, deviation / math.sqrt(2), n, n - 1)
