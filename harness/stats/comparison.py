"""The one comparison model: treatments (configurations, variants, arms) measured in blocks (seeds, replicates).

The variance is pooled over the treatments, for its degrees of freedom. As few values cannot show that deviations are
equal, the pair's own variance counts where it is larger; and of treatments that are not measured side by side, Welch's
test of the pair must agree at three times the level. So quiet treatments lend a noisy one no certainty.
docs/evidence.md has the error rates, simulated.
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
    """`values` under the model. `paired`: the treatments of a block are measured side by side.

    `variance` is pooled, with `freedom` degrees of freedom; `variances` are those of each treatment. Where the variance
    is unknown (one value each, or all values alike), they are 0.
    """

    values: Values
    paired: bool
    means: Mapping[str, float]
    variances: Mapping[str, float]
    variance: float
    freedom: int
    inverse: "np.ndarray | None"  # of the normal equations, treatments first; None without blocks

    @classmethod
    def of(cls, values: Values, *, paired: bool = False) -> "Comparison":
        """Fit the model. Blocks enter if values are `paired`, or if that leaves ENOUGH_FREEDOM."""
        count = sum(len(own) for own in values.values())
        if paired or count - len(values) >= ENOUGH_FREEDOM:
            fitted = cls._with_blocks(values, paired=paired)
            if paired or fitted.freedom >= ENOUGH_FREEDOM:
                return fitted
        means = {name: float(np.mean(list(own.values()))) for name, own in values.items()}
        squares = {name: sum((v - means[name]) ** 2 for v in own.values()) for name, own in values.items()}
        freedom = _known(sum(squares.values()), count - len(values))
        return cls(
            values=values,
            paired=False,
            means=means,
            variances={name: squares[name] / max(1, len(own) - 1) for name, own in values.items()},
            variance=sum(squares.values()) / max(1, freedom),
            freedom=freedom,
            inverse=None,
        )

    @classmethod
    def _with_blocks(cls, values: Values, *, paired: bool) -> "Comparison":
        """Least squares; missing values are allowed for."""
        names, blocks = list(values), sorted({block for own in values.values() for block in own})
        cells = [(i, blocks.index(block)) for i, name in enumerate(names) for block in values[name]]
        y = np.array([values[names[i]][blocks[j]] for i, j in cells])
        treatment, block = (np.eye(n)[[cell[k] for cell in cells]] for k, n in ((0, len(names)), (1, len(blocks))))
        x = np.hstack([treatment, block - block.mean(0)])
        inverse = np.linalg.pinv(x.T @ x, rcond=1e-10, hermitian=True)  # a block is redundant: singular
        fitted = inverse @ x.T @ y
        squares, left = np.square(y - x @ fitted), 1 - np.einsum("ij,jk,ik->i", x, inverse, x)
        freedom = _known(float(squares.sum()), len(y) - int(np.linalg.matrix_rank(x)))
        of = {name: [i == number for i, _ in cells] for number, name in enumerate(names)}
        return cls(
            values=values,
            paired=paired,
            means=dict(zip(names, fitted[: len(names)].tolist(), strict=True)),
            variances={name: float(squares[own].sum() / max(left[own].sum(), 1e-9)) for name, own in of.items()},
            variance=float(squares.sum()) / max(1, freedom),
            freedom=freedom,
            inverse=inverse,
        )

    def _share(self, a: str, b: str) -> float:
        """The variance of the difference of two means in units of that of one value."""
        if self.inverse is None:
            return 1 / len(self.values[a]) + 1 / len(self.values[b])
        i, j = (list(self.values).index(name) for name in (a, b))
        return float(self.inverse[i, i] + self.inverse[j, j] - 2 * self.inverse[i, j])

    def difference(self, a: str, b: str) -> Difference:
        """The difference a - b."""
        first, second = self.values[a], self.values[b]
        if self.paired:
            own = paired([first[block] - second[block] for block in sorted(set(first) & set(second))])
        else:
            own = welch(list(first.values()), list(second.values()))
        if not self.freedom or len(self.values) == 2:
            return own
        share = self._share(a, b)
        of_pair = self.variances[a] / len(first) + self.variances[b] / len(second)
        error = math.sqrt(max(self.variance * share, of_pair))
        tested = TDistributed(error, self.freedom)
        guard = None if self.paired else own.pooled
        freedom = own.deviation_freedom if of_pair > self.variance * share else self.freedom
        return Difference(self.means[a] - self.means[b], tested, guard, error / math.sqrt(share), own.n, freedom)

    def worse_than(self, best: str, others: Sequence[str]) -> list[float]:
        """Adjusted p values that each of `others`, ordered by their means, is worse than the `best`; NaN if unknown.

        The step-down range test of Ryan, Einot, Gabriel and Welsch (Journal of the American Statistical Association 72,
        1977): the range from the best to each, the widest first, by the studentized range. With equal treatments any p
        is below 0.05 in at most 5 % of the cases, however many they are. The narrower ranges of one that is not shown
        keep its p, a lower bound of theirs.
        """
        k, found = len(others) + 1, [math.nan] * len(others)
        largest = 0.0
        for size in range(k, 1, -1):
            difference = self.difference(best, others[size - 2])
            if difference.pooled is None:
                return found
            p = range_p(difference, size) if largest < 1 - CONFIDENCE else 0.0
            if size < k - 1:
                p = 1 - (1 - p) ** (k / size)
            found[size - 2] = largest = max(largest, p)
        return found


def _known(squares: float, freedom: int) -> int:
    """The degrees of freedom; 0 where values are alike up to rounding, which shows no variance."""
    return freedom if freedom > 0 and squares > 1e-18 * freedom else 0


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
