"""When a difference is real: means with intervals, paired comparisons, the ranking of configurations.

Intervals are Student's t at 95 %: runs with different seeds are close to normal and few.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness.results import trial_id

if TYPE_CHECKING:
    from tune_spaces import Claim

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


POWER, OF_INTEREST = 0.8, 0.005  # a difference of half a point of accuracy; the chance to see it that is asked for
Verdict = Literal["holds", "does not hold", "not settled"]


@dataclass(frozen=True)
class Finding:
    """What became of a claim that `variant` is better than `than` (or, with a `margin`, as good).

    `difference` is better - than with its own 95 % interval; `p` is corrected for all claims of the table (Holm).
    `seeds` of each would settle a difference of `of_interest` with 80 % power; None where that is no question.
    `diverged`: trials of the two that did, and count for nothing.
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
        """For people, in points."""
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
        about = float(f"{self.seeds:.2g}")  # a deviation of few seeds tells no more
        return f"{text}; about {about:.0f} seeds would settle {100 * self.of_interest:g} points"


METRICS = {"test_accuracy": "test accuracy", "gap": "training minus test accuracy"}


def value_of(record: Mapping[str, Any], metric: str) -> float:
    """Of a finished trial; `gap` is how much better the network does on the images it was trained on."""
    metrics = record["metrics"]
    return metrics["train_accuracy"] - metrics["test_accuracy"] if metric == "gap" else metrics[metric]


def findings(claims: Sequence["Claim"], records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A finding for each claim whose variants both have finished trials with the test set read, the claims' order.

    Welch's t-tests on the means over seeds; Holm's correction keeps the chance that any claim of the table is wrongly
    called settled near 5 % (tests/test_stats.py simulates it). A claim of equivalence is two one-sided tests
    (Schuirmann 1987).
    """
    groups: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
    for record in records:
        if record["status"] == "finished" and record["variant"] and "test_accuracy" in record["metrics"]:
            for metric, values in groups.items():
                values.setdefault(record["variant"], []).append(value_of(record, metric))
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
        diverged = sum(r["status"] == "diverged" and r["variant"] in pair for r in records)
        found.append(
            Finding(claim.says, *pair, claim.metric, difference.interval, p, verdict, of_interest, seeds, diverged)
        )
    return found


def _test(claim: "Claim", difference: Difference) -> tuple[float, bool]:
    """(p, whether the claim is what it speaks for); 1 where there is too little to tell."""
    if not difference.freedom:
        return 1.0, False
    size = abs(difference.mean)
    if claim.margin is None:
        return 2 * difference.above(size), difference.mean > 0 if claim.higher else difference.mean < 0
    # The two nulls exclude each other, so that the smaller p errs no more often than each. Beyond lie two sides: with a
    # margin that is small against the error, a difference as large on the other one is as likely.
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
    """Seeds of each of two variants with which a true difference of just that is settled with 80 % power, at 5 % over
    so many comparisons (Bonferroni); with `equivalence`, that there is none beyond it, where there is none at all.
    None beyond 1,000, or where nothing is known. `deviation`: between seeds, the same in both.
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


@dataclass(frozen=True)
class Ranked:
    """One configuration over its seeds. `tied`: not told apart from the best one at 95 %."""

    name: str
    records: tuple[Mapping[str, Any], ...]
    estimate: Estimate
    tied: bool


def ranking(records: Sequence[Mapping[str, Any]], metric: str = "val_accuracy") -> list[Ranked]:
    """Configurations, best first, by their mean on validation; confirmed ones alone where there are any.

    Only finished trials count. The search's own runs do not vote once configurations are confirmed: the best of many
    lucky runs is lucky. `metric`: val_accuracy or val_loss.
    """
    finished = [r for r in records if r["status"] == "finished"]
    confirmed = [r for r in finished if r["stage"] == "confirm"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in confirmed or finished:
        groups.setdefault(trial_id(record["config"], 0, ""), []).append(record)
    sign = -1 if metric == "val_accuracy" else 1
    rows = [(tuple(group), seeds_interval([r["metrics"][metric] for r in group])) for group in groups.values()]
    rows.sort(key=lambda row: (sign * row[1].mean, row[0][0]["index"]))
    if not rows:
        return []
    best = {r["seed"]: r["metrics"][metric] for r in rows[0][0]}
    ranked = []
    for position, (group, estimate) in enumerate(rows):
        difference = difference_interval({r["seed"]: r["metrics"][metric] for r in group}, best)
        apart = not math.isnan(difference.low) and not difference.low <= 0 <= difference.high
        ranked.append(Ranked(configuration_name(group[0]), group, estimate, position > 0 and not apart))
    return ranked


def configuration_name(record: Mapping[str, Any]) -> str:
    """What a person calls it: its variant, or the number of its sample."""
    if record["variant"]:
        return str(record["variant"])
    return "base" if record["index"] == 0 and not record["parameters"] else f"sample {record['index']}"


def winning_trial(ranked: Ranked, metric: str = "val_accuracy") -> Mapping[str, Any]:
    """Of the winning configuration the trial with the best validation: the one that is exported."""
    sign = -1 if metric == "val_accuracy" else 1
    return min(ranked.records, key=lambda r: sign * r["metrics"][metric])
