"""Claims about variants: tests corrected for multiple comparisons, and the seeds that would settle them."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.run.records import TrialRecord
from harness.stats.intervals import CONFIDENCE, Difference, Estimate, welch

if TYPE_CHECKING:
    from tune_spaces import Claim

POWER, OF_INTEREST = 0.8, 0.005  # power required for a difference of 0.5 points of accuracy
Verdict = Literal["holds", "does not hold", "not settled"]


@dataclass(frozen=True)
class Finding:
    """The test result of a claim that `variant` is better than `than` (or, with a `margin`, as good).

    `difference`: variant - than with its own 95 % interval; `p`: corrected for all claims of the table (Holm).
    `seeds` per variant would settle a difference of `of_interest` with 80 % power; None where settled or unknown.
    `diverged`: diverged trials of the two variants, which are left out.
    """

    says: str
    variant: str
    than: str
    metric: str
    difference: Estimate
    p: float
    verdict: Verdict
    of_interest: float
    seeds: int | None
    diverged: int = 0

    @property
    def sentence(self) -> str:
        """The finding in words, in points (percent)."""
        mean, low, high = (100 * v for v in (self.difference.mean, self.difference.low, self.difference.high))
        interval = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
        what = "points" if self.metric == "test_accuracy" else f"points of {METRICS[self.metric]}"
        seeds = "1 seed" if self.difference.n == 1 else f"{self.difference.n} seeds"
        seeds += f" ({self.diverged} diverged and left out)" if self.diverged else ""
        text = f"{self.says}: {mean:+.1f}{interval} {what} over {seeds}, {self.verdict}"
        if self.verdict != "not settled":
            return f"{text} (p = {self.p:.2g} after Holm's correction)"
        if self.seeds is None:
            return text
        about = float(f"{self.seeds:.2g}")  # few seeds give no more precise deviation
        return f"{text}; about {about:.0f} seeds would settle {100 * self.of_interest:g} points"


METRICS = {"test_accuracy": "test accuracy", "gap": "training minus test accuracy"}


def judge_claims(claims: Sequence["Claim"], records: Sequence[TrialRecord]) -> list[Finding]:
    """A finding for each claim whose variants both have finished, tested trials, in the order of the claims.

    Welch's t-tests on the means over seeds; Holm's correction keeps the probability that any claim of the table is
    wrongly settled near 5 % (simulated in tests/test_stats.py). Equivalence is tested by two one-sided tests
    (Schuirmann 1987).
    """
    groups: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
    for record in records:
        if record.is_tested and record.variant:
            for metric, values in groups.items():
                values.setdefault(record.variant, []).append(record.metrics.of(metric))
    tested = []
    for claim in claims:
        values = groups[claim.metric]
        if {claim.variant, claim.than} <= set(values):
            difference = welch(values[claim.variant], values[claim.than])
            tested.append((claim, difference, *_test(claim, difference)))
    corrected = holm([p for *_, p, _ in tested])
    found = []
    for (claim, difference, _, holds), p in zip(tested, corrected, strict=True):
        verdict: Verdict = "not settled"
        if p < 1 - CONFIDENCE:
            verdict = "holds" if holds else "does not hold"
        of_interest, seeds = claim.margin or OF_INTEREST, None
        if verdict == "not settled":
            equivalence = claim.margin is not None
            seeds = needed_seeds(difference.deviation, of_interest, len(tested), equivalence=equivalence)
        pair = (claim.variant, claim.than)
        diverged = sum(r.status == "diverged" and r.variant in pair for r in records)
        found.append(
            Finding(claim.says, *pair, claim.metric, difference.interval, p, verdict, of_interest, seeds, diverged)
        )
    return found


def _test(claim: "Claim", difference: Difference) -> tuple[float, bool]:
    """(p, whether the data favour the claim); p is 1 where there are too few trials."""
    if not difference.freedom:
        return 1.0, False
    size = abs(difference.mean)
    if claim.margin is None:
        return 2 * difference.above(size), difference.mean > 0 if claim.higher else difference.mean < 0
    # The two null hypotheses exclude each other, so the smaller p errs no more often than each. `beyond` has two tails:
    # if the margin is small against the error, an equally large difference of the other sign is as likely.
    inside = difference.above(claim.margin - size)
    beyond = difference.above(size - claim.margin) + difference.above(size + claim.margin)
    return min(inside, beyond), inside < beyond


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Scandinavian Journal of Statistics 6, 1979), in the given order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for done, position in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[position]))
        adjusted[position] = largest
    return adjusted


def needed_seeds(deviation: float, difference: float, comparisons: int, *, equivalence: bool = False) -> int | None:
    """Seeds per variant that settle a true `difference` with 80 % power at 5 % over all `comparisons` (Bonferroni).

    With `equivalence`: that settle equivalence to within `difference` where the true difference is 0. `deviation`:
    standard deviation between seeds, the same in both variants. None beyond 1,000 seeds or without a deviation.
    """
    if not deviation > 0:
        return None
    from scipy.special import stdtrit
    from scipy.stats import nct

    alpha = (1 - CONFIDENCE) / comparisons

    def is_enough(n: int) -> bool:
        error, freedom = deviation * math.sqrt(2 / n), 2 * (n - 1)
        if equivalence:
            limit = float(stdtrit(freedom, 1 - alpha))
            return 2 * float(nct.cdf(-limit, freedom, -difference / error)) - 1 >= POWER
        return float(nct.sf(float(stdtrit(freedom, 1 - alpha / 2)), freedom, difference / error)) >= POWER

    numbers = range(2, 1001)
    found = bisect.bisect_left(numbers, True, key=is_enough)
    return numbers[found] if found < len(numbers) else None
