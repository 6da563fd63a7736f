"""Claims about variants: tests corrected for multiple comparisons and looks, and the seeds that would settle them."""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from harness.run.progress import counted
from harness.run.records import TrialRecord
from harness.stats.comparison import Comparison
from harness.stats.intervals import CONFIDENCE, Difference, Estimate
from harness.stats.sequential import FIXED, Look

if TYPE_CHECKING:
    from tune_spaces import Claim

POWER, MOST = 0.8, 1000  # of a needed number of seeds; the largest that is looked for
REASONABLE = 20  # seeds per variant beyond which a question is said to cost too much
METRICS = {"test_accuracy": "test accuracy", "gap": "training minus test accuracy"}
Verdict = Literal["holds", "does not hold", "no difference", "not judged", "not settled"]
FAVOURABLE = ("holds", "no difference")


@dataclass(frozen=True)
class Finding:
    """The test result of a claim that `variant` is better than `than` (or, with a `margin`, as good).

    `difference`: variant - than with its interval at the level of its test, which excludes 0 where the difference is
    settled; `p`: corrected for all claims of the table (Holm), to be compared with `alpha`, what this look may spend.
    `seeds`: range of the seeds per variant that would settle it, None where settled or unknown; None as its upper end:
    more than MOST. `failed`: seeds that failed, by variant. `deviation`: standard deviation between seeds.
    """

    says: str
    variant: str
    than: str
    metric: str
    difference: Estimate
    p: float
    alpha: float
    verdict: Verdict
    of_interest: float
    deviation: float = math.nan
    seeds: tuple[int, int | None] | None = None
    failed: Mapping[str, int] | None = None

    @property
    def is_open(self) -> bool:
        """Whether more seeds may settle it."""
        return self.verdict == "not settled"

    @property
    def sentence(self) -> str:
        """The finding in words, in points (percent)."""
        mean, low, high = (100 * v for v in (self.difference.mean, self.difference.low, self.difference.high))
        interval = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
        what = "points" if self.metric == "test_accuracy" else f"points of {METRICS[self.metric]}"
        text = f"{self.says}: {mean:+.1f}{interval} {what} over {counted(self.difference.n, 'seed')}"
        interest = f"{100 * self.of_interest:g} points"
        if self.failed:
            names = ", ".join(f"{counted(count, 'seed')} of {name} failed" for name, count in self.failed.items())
            text += f" ({names})"
        if self.verdict == "not judged":
            return f"{text}, not judged: seeds that failed count against {self.variant}"
        if self.is_open:
            return f"{text}, not settled{self._cost(interest)}"
        said = f"no difference as large as {interest}" if self.verdict == "no difference" else self.verdict
        return f"{text}, {said} (p = {self.p:.2g} after Holm's correction)"

    def _cost(self, interest: str) -> str:
        if self.seeds is None:
            return ""
        low, high = self.seeds
        about = f"more than {MOST:,}" if low > MOST else f"{low:,} or more" if high is None else f"{low:,} to {high:,}"
        return f"; {about} seeds per variant would settle {interest}"


def judge_claims(
    claims: Sequence["Claim"], records: Sequence[TrialRecord], looks: Sequence[Look] = FIXED
) -> list[Finding]:
    """A finding for each claim whose variants both have finished, tested trials, in the order of the claims.

    The tests are t-tests under the comparison model of all variants (harness/stats/comparison.py), with Holm's
    correction for the claims that were open at each look. A claim that one variant is better is settled by a difference
    or by showing that there is none as large as `of_interest` (two one-sided tests, Schuirmann 1987): the two null
    hypotheses exclude each other. A claim settled at a look stays settled; a look counts for a claim once its variants
    have all its seeds.
    """
    found: dict[int, Finding] = {}
    for number, look in enumerate(looks):
        still_open = [i for i in range(len(claims)) if i not in found or found[i].is_open]
        ready = [i for i in still_open if _has_seeds(records, claims[i], look)]
        if number == 0:  # claims whose seeds are not there yet are shown, but nothing settles them
            early = [i for i in still_open if i not in ready]
            found |= _at(replace(look, alpha=0.0), claims, early, records, 0)
        others = sum(i in found and i not in ready for i in still_open)
        found |= _at(look, claims, ready, records, others)
    return [found[i] for i in sorted(found)]


def _has_seeds(records: Sequence[TrialRecord], claim: "Claim", look: Look) -> bool:
    """Whether both variants have ended all seeds of the look."""
    if look.number is None:
        return True
    ended = {(r.variant, r.index) for r in records if r.is_done or r.is_failure}
    return all((name, i) in ended for name in (claim.variant, claim.than) for i in range(look.number))


def _at(
    look: Look, claims: Sequence["Claim"], numbers: Sequence[int], records: Sequence[TrialRecord], others: int
) -> dict[int, Finding]:
    """Findings about the claims with these numbers from the look's seeds alone; `others`: open claims beside them."""
    chosen = [r for r in records if r.variant and (look.number is None or r.index < look.number)]
    models = {metric: _model(chosen, metric) for metric in {claims[i].metric for i in numbers}}
    tested = []
    for i in numbers:
        claim = claims[i]
        model = models[claim.metric]
        if {claim.variant, claim.than} <= set(model.values):
            difference = model.difference(claim.variant, claim.than)
            tested.append((i, difference, _ps(claim, difference)))
    found = {}
    for (i, difference, ps), step in zip(tested, holm([min(ps.values()) for _, _, ps in tested], others), strict=True):
        failed = {
            name: count
            for name in (claims[i].variant, claims[i].than)
            if (count := sum(r.is_failure and r.variant == name for r in chosen))
        }
        found[i] = _finding(claims[i], difference, ps, step, look, failed)
    return found


def _model(records: Sequence[TrialRecord], metric: str) -> Comparison:
    values: dict[str, dict[int, float]] = {}
    for record in records:
        if record.is_tested:
            values.setdefault(record.variant, {})[record.seed] = record.metrics.of(metric)
    return Comparison.of(values)


def _ps(claim: "Claim", difference: Difference) -> dict[Verdict, float]:
    """The p value of each verdict that would settle the claim; 1 where there are too few trials."""
    if difference.pooled is None:
        return {"not settled": 1.0}
    size, margin = abs(difference.mean), claim.smallest
    inside = difference.above(margin - size)
    if claim.margin is None:
        better = (difference.mean > 0) == claim.higher
        return {"holds" if better else "does not hold": 2 * difference.above(size), "no difference": inside}
    # `beyond` has two tails: if the margin is small against the error, an equally large difference of the other sign
    # is as likely.
    beyond = difference.above(size - margin) + difference.above(size + margin)
    return {"holds": inside, "does not hold": beyond}


def _finding(
    claim: "Claim",
    difference: Difference,
    ps: Mapping[Verdict, float],
    step: "HolmStep",
    look: Look,
    failed: Mapping[str, int],
) -> Finding:
    """The verdict: the first of `ps` below the level that Holm's correction leaves to this claim."""
    level = look.alpha / step.divisor
    settled = step.p < look.alpha
    verdict: Verdict = next((name for name, own in ps.items() if settled and own < level), "not settled")
    if verdict in FAVOURABLE and failed.get(claim.variant, 0) > (0 if claim.margin else failed.get(claim.than, 0)):
        verdict = "not judged"  # a seed that failed counts against the variant, whatever the others reached
    seeds = None
    shown = level or (1 - CONFIDENCE) / step.divisor
    equivalence = claim.margin is not None
    if verdict == "not settled" and difference.pooled is not None:
        seeds = seeds_range(difference, claim.smallest, shown, equivalence=equivalence)
    one_sided = verdict == "no difference" or (equivalence and verdict == "holds")
    return Finding(
        claim.says,
        claim.variant,
        claim.than,
        claim.metric,
        difference.interval_at(1 - shown * (2 if one_sided else 1)),
        step.p,
        look.alpha,
        verdict,
        claim.smallest,
        difference.deviation,
        seeds,
        failed,
    )


@dataclass(frozen=True)
class HolmStep:
    """Holm's adjusted `p` of a test; alpha / `divisor` is the level at which it is tested."""

    p: float
    divisor: int


def holm(ps: Sequence[float], others: int = 0) -> list[HolmStep]:
    """Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979), in the given order; `others`: further
    hypotheses, which are not tested now."""
    steps, largest = [HolmStep(1.0, 1)] * len(ps), 0.0
    for done, position in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        divisor = len(ps) + others - done
        largest = max(largest, min(1.0, divisor * ps[position]))
        steps[position] = HolmStep(largest, divisor)
    return steps


def seeds_range(
    difference: Difference, of_interest: float, level: float, *, equivalence: bool = False
) -> tuple[int, int | None]:
    """Range of the seeds per variant that settle a true difference of `of_interest`; None as its end beyond MOST.

    Its ends are for the ends of the 95 % interval of the deviation, by the chi-square distribution.
    """
    from scipy.special import chdtri

    freedom, tail = difference.deviation_freedom, (1 - CONFIDENCE) / 2
    low, high = (
        needed_seeds(
            difference.deviation * math.sqrt(freedom / float(chdtri(freedom, p))),
            of_interest,
            level,
            equivalence=equivalence,
        )
        for p in (tail, 1 - tail)
    )
    return low, None if high > MOST else high


def needed_seeds(deviation: float, difference: float, level: float, *, equivalence: bool = False) -> int:
    """Seeds per variant that settle a true `difference` with 80 % power at this two-sided `level`; MOST + 1 at most.

    With `equivalence`: that settle equivalence to within `difference` where the true difference is 0. `deviation`:
    standard deviation between seeds, the same in both variants.
    """
    from scipy.special import stdtrit
    from scipy.stats import nct

    def is_enough(n: int) -> bool:
        error, freedom = deviation * math.sqrt(2 / n), 2 * (n - 1)
        if equivalence:
            limit = float(stdtrit(freedom, 1 - level))
            return 2 * float(nct.cdf(-limit, freedom, -difference / error)) - 1 >= POWER
        return float(nct.sf(float(stdtrit(freedom, 1 - level / 2)), freedom, difference / error)) >= POWER

    numbers = range(2, MOST + 1)
    return 2 + bisect.bisect_left(numbers, True, key=is_enough)
