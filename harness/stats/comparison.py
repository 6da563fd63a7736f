"""The one comparison model: treatments (configurations, variants, arms) measured in blocks (seeds, replicates).

The variance is pooled over the treatments, for its degrees of freedom. As few values cannot show that deviations are
equal, a pair's own variance counts where it is larger, and a test by the pair's own values must agree at three times
the level. So quiet treatments lend a noisy one no certainty; docs/evidence.md has the error rates, simulated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.stats.intervals import CONFIDENCE, GUARD, Difference, TDistributed, paired, welch

ENOUGH_FREEDOM = 8  # blocks enter the model if they leave this many degrees of freedom: with fewer, they cost power

Values = Mapping[str, Mapping[int, float]]  # treatment -> block -> value


@dataclass(frozen=True)
class Comparison:
    """`values` under the model. `paired`: a pair's own test is by differences within blocks, not Welch's.

    `variance` is pooled, with `freedom` degrees of freedom; where it is unknown (one value each, or all values alike)
    both are 0.
    """

    values: Values
    paired: bool
    means: Mapping[str, float]
    covariance: Mapping[tuple[str, str], float]
    variance: float
    freedom: int

    @classmethod
    def of(cls, values: Values, *, paired: bool = False) -> "Comparison":
        """Fit the model. Blocks enter if values are `paired` (measured side by side), or if that leaves
        ENOUGH_FREEDOM."""
        names = list(values)
        blocks = sorted({block for own in values.values() for block in own})
        cells = [(names.index(name), blocks.index(block)) for name in names for block in values[name]]
        y = np.array([values[names[i]][blocks[j]] for i, j in cells])
        treatment = np.eye(len(names))[[i for i, _ in cells]] if cells else np.zeros((0, 0))
        block = np.eye(len(blocks))[[j for _, j in cells]] if cells else np.zeros((0, 0))
        both = np.hstack([treatment, block - block.mean(0)]) if cells else treatment
        rank = int(np.linalg.matrix_rank(both)) if cells else 0
        blocked = paired or len(y) - rank >= ENOUGH_FREEDOM
        x = both if blocked else treatment
        inverse = np.linalg.pinv(x.T @ x)
        fitted = inverse @ x.T @ y
        freedom = len(y) - (rank if blocked else len(names))
        square = float(np.square(y - x @ fitted).sum())
        known = freedom > 0 and square > 1e-18 * max(1, freedom)
        return cls(
            values=values,
            paired=paired,
            means=dict(zip(names, fitted[: len(names)].tolist(), strict=True)),
            covariance={(a, b): float(inverse[i, j]) for i, a in enumerate(names) for j, b in enumerate(names)},
            variance=square / freedom if known else 0.0,
            freedom=freedom if known else 0,
        )

    def difference(self, a: str, b: str) -> Difference:
        """The difference a - b."""
        first, second = self.values[a], self.values[b]
        own = welch(list(first.values()), list(second.values()))
        if self.paired:
            own = paired([first[block] - second[block] for block in sorted(set(first) & set(second))])
        if not self.freedom or len(self.values) == 2:
            return own
        share = self.covariance[a, a] + self.covariance[b, b] - 2 * self.covariance[a, b]
        error = math.sqrt(max(self.variance * share, own.pooled.error**2 if own.pooled else 0.0))
        pooled, mean = TDistributed(error, self.freedom), self.means[a] - self.means[b]
        return Difference(mean, pooled, own.pooled, error / math.sqrt(share), own.n)

    def worse_than(self, best: str, others: Sequence[str]) -> list[float]:
        """Adjusted p values that each of `others`, ordered by their means, is worse than the `best`; NaN if unknown.

        The step-down range test of Ryan, Einot, Gabriel and Welsch (Journal of the American Statistical Association 72,
        1977): the range from the best to each, the widest first, by the studentized range. All values equal, any p is
        at most 0.05 in 5 % of the cases, however many treatments there are.
        """
        k, found = len(others) + 1, [math.nan] * len(others)
        largest = 0.0
        for size in range(k, 1, -1):
            difference = self.difference(best, others[size - 2])
            if difference.pooled is None:
                return found
            p = range_p(difference, size)
            if size < k - 1:
                p = 1 - (1 - p) ** (k / size)
            found[size - 2] = largest = max(largest, p)
        return found

    def simultaneous(self, a: str, b: str) -> tuple[float, float, float]:
        """A - b with the limits of Tukey's simultaneous 95 % interval over all pairs; NaN limits if unknown."""
        difference = self.difference(a, b)
        if difference.pooled is None:
            return difference.mean, math.nan, math.nan
        half = difference.pooled.error * range_limit(len(self.values), difference.pooled.freedom) / math.sqrt(2)
        return difference.mean, difference.mean - half, difference.mean + half


def range_p(difference: Difference, treatments: int) -> float:
    """The p value of a range of `treatments` means; of two it is the t-test's, two-sided."""
    size = abs(difference.mean)
    if treatments == 2:
        return 2 * difference.above(size)
    from scipy.stats import studentized_range

    def p(tested: TDistributed) -> float:
        return float(studentized_range.sf(math.sqrt(2) * size / tested.error, treatments, tested.freedom))

    assert difference.pooled is not None
    return max(p(difference.pooled), p(difference.own) / GUARD if difference.own else 0.0)


def range_limit(treatments: int, freedom: float) -> float:
    """95 % quantile of the studentized range."""
    from scipy.special import stdtrit
    from scipy.stats import studentized_range

    if treatments == 2:
        return math.sqrt(2) * float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))
    return float(studentized_range.ppf(CONFIDENCE, treatments, freedom))
