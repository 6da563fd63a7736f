"""When a difference is real: means with intervals, paired comparisons, the ranking of configurations.

Intervals are Student's t at 95 %: runs with different seeds are close to normal and few.
"""

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


def difference_interval(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """Mean difference by seed with its interval: paired over the seeds that both have, unpaired (Welch) without any.

    Not a number where there are fewer than two runs to compare.
    """
    common = sorted(set(values) & set(reference))
    if len(common) >= 2:
        return mean_interval([values[seed] - reference[seed] for seed in common])
    difference = float(np.mean(list(values.values())) - np.mean(list(reference.values())))
    if min(len(values), len(reference)) < 2:
        return Estimate(difference, math.nan, math.nan, min(len(values), len(reference)))
    from scipy import stats

    test = stats.ttest_ind(list(values.values()), list(reference.values()), equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Estimate(difference, float(interval.low), float(interval.high), min(len(values), len(reference)))


@dataclass(frozen=True)
class Spread:
    """How much runs that differ by their seed alone differ: a standard deviation and its degrees of freedom.

    `pooled` over all groups where nothing speaks against one variance for all (Bartlett's test at 5 %), so that a few
    seeds of each tell as much as many; else a group has its own.
    """

    own: Mapping[str, tuple[float, int]]
    pooled: tuple[float, int] | None

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[float]]) -> "Spread":
        from scipy import stats

        several = {name: values for name, values in groups.items() if len(values) > 1}
        own = {name: (float(np.var(values, ddof=1)), len(values) - 1) for name, values in several.items()}
        freedom = sum(n for _, n in own.values())
        if not freedom:
            return cls(own, None)
        mean = sum(variance * n for variance, n in own.values()) / freedom
        varying = [values for values in several.values() if len(set(values)) > 1]  # the test knows no zero
        alike = len(varying) < 2 or float(stats.bartlett(*varying).pvalue) > 0.05
        return cls(own, (mean, freedom) if alike else None)

    def interval(self, name: str, values: Sequence[float]) -> Estimate:
        """Mean of a group with its 95 % interval."""
        variance, freedom = self.pooled or self.own.get(name, (math.nan, 0))
        return _interval(float(np.mean(values)), math.sqrt(variance / len(values)), freedom, len(values))

    def of_difference(self, a: str, b: str, n_a: int, n_b: int) -> tuple[float, float]:
        """(standard error, degrees of freedom) of the difference of two groups' means; Welch's where not pooled."""
        if self.pooled:
            return math.sqrt(self.pooled[0] * (1 / n_a + 1 / n_b)), self.pooled[1]
        if a not in self.own or b not in self.own:
            return math.nan, 0
        parts = [(self.own[name][0] / n, self.own[name][1]) for name, n in ((a, n_a), (b, n_b))]
        total = sum(part for part, _ in parts)
        below = sum(part**2 / freedom for part, freedom in parts)
        return math.sqrt(total), total**2 / below if below else math.inf


def _interval(mean: float, error: float, freedom: float, n: int) -> Estimate:
    if not freedom or math.isnan(error):
        return Estimate(mean, math.nan, math.nan, n)
    from scipy.special import stdtrit

    half = float(stdtrit(min(freedom, 1e6), 0.5 + CONFIDENCE / 2)) * error
    return Estimate(mean, mean - half, mean + half, n)


POWER, OF_INTEREST = 0.8, 0.005  # a difference of half a point of accuracy; the chance to see it that is asked for
Verdict = Literal["holds", "does not hold", "not settled"]


@dataclass(frozen=True)
class Finding:
    """What became of a claim that `variant` is better than `than` (or, with a `margin`, as good).

    `difference` is better - than with its own 95 % interval; `p` is corrected for all claims of the table (Holm).
    `seeds` of each would settle a difference of `of_interest` with 80 % power; None where that is no question.
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

    @property
    def sentence(self) -> str:
        """For people, in points."""
        mean, low, high = (100 * v for v in (self.difference.mean, self.difference.low, self.difference.high))
        interval = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
        what = "points" if self.metric == "test_accuracy" else f"points of {METRICS[self.metric]}"
        seeds = "1 seed" if self.difference.n == 1 else f"{self.difference.n} seeds"
        text = f"{self.says}: {mean:+.1f}{interval} {what} over {seeds}, {self.verdict}"
        if self.verdict != "not settled":
            return f"{text} (p = {self.p:.2g} after Holm's correction)"
        return text + (f"; {self.seeds} seeds would settle {100 * self.of_interest:g} points" if self.seeds else "")


METRICS = {"test_accuracy": "test accuracy", "gap": "training minus test accuracy"}


def value_of(record: Mapping[str, Any], metric: str) -> float:
    """Of a finished trial; `gap` is how much better the network does on the images it was trained on."""
    metrics = record["metrics"]
    return metrics["train_accuracy"] - metrics["test_accuracy"] if metric == "gap" else metrics[metric]


def findings(claims: Sequence["Claim"], records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A finding for each claim whose variants both have finished trials with the test set read, the claims' order.

    t-tests on the means over seeds, with the variance pooled over all variants where that is justified; Holm's
    correction keeps the chance that any claim of the table is wrongly called settled at 5 %. A claim of equivalence is
    two one-sided tests (Schuirmann 1987).
    """
    groups: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
    for record in records:
        if record["status"] == "finished" and record["variant"] and "test_accuracy" in record["metrics"]:
            for metric, values in groups.items():
                values.setdefault(record["variant"], []).append(value_of(record, metric))
    spreads = {metric: Spread.of(values) for metric, values in groups.items() if values}
    known = [c for c in claims if {c.variant, c.than} <= set(groups[c.metric])]
    tested = []
    for claim in known:
        values = groups[claim.metric]
        a, b = values[claim.variant], values[claim.than]
        error, freedom = spreads[claim.metric].of_difference(claim.variant, claim.than, len(a), len(b))
        estimate = _interval(float(np.mean(a) - np.mean(b)), error, freedom, min(len(a), len(b)))
        tested.append((claim, estimate, error, freedom, *_test(claim, estimate.mean, error, freedom)))
    corrected = holm([p for *_, p, _ in tested])
    found = []
    for (claim, estimate, error, _, _, holds), p in zip(tested, corrected, strict=True):
        verdict: Verdict = "not settled"
        if p < 1 - CONFIDENCE:
            verdict = "holds" if holds else "does not hold"
        of_interest = claim.margin or OF_INTEREST
        deviation = error / math.sqrt(2 / estimate.n) if not math.isnan(error) else math.nan
        seeds = needed_seeds(deviation, of_interest, len(known), equivalence=claim.margin is not None)
        seeds = seeds if verdict == "not settled" else None
        found.append(
            Finding(claim.says, claim.variant, claim.than, claim.metric, estimate, p, verdict, of_interest, seeds)
        )
    return found


def _test(claim: "Claim", difference: float, error: float, freedom: float) -> tuple[float, bool]:
    """(p, whether the claim is what it speaks for); 1 where there is too little to tell."""
    if not freedom or math.isnan(error) or error == 0:
        return 1.0, False
    from scipy.special import stdtr

    def above(value: float) -> float:
        """Of a t as large as this one or larger, the other way round."""
        return float(stdtr(freedom, -value / error))

    if claim.margin is None:
        good = difference > 0 if claim.higher else difference < 0
        return 2 * above(abs(difference)), good
    # The two nulls exclude each other, so that the smaller p errs no more often than each.
    inside, beyond = above(claim.margin - abs(difference)), above(abs(difference) - claim.margin)
    return min(inside, beyond), inside < beyond


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Scandinavian Journal of Statistics 6, 1979), in the given order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for done, position in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[position]))
        adjusted[position] = largest
    return adjusted


def needed_seeds(deviation: float, difference: float, comparisons: int, *, equivalence: bool = False) -> int | None:
    """Seeds of each of two variants with which a difference is settled with 80 % power, at 5 % over so many comparisons
    (Bonferroni); with `equivalence`, that there is none beyond it. None beyond 1,000, or where nothing is known.
    """
    if not deviation > 0:
        return None
    from scipy.special import stdtrit
    from scipy.stats import nct

    alpha = (1 - CONFIDENCE) / comparisons
    for n in range(2, 1001):
        error, freedom = deviation * math.sqrt(2 / n), 2 * (n - 1)
        if equivalence:
            limit = float(stdtrit(freedom, 1 - alpha))
            power = 2 * float(nct.cdf(-limit, freedom, -difference / error)) - 1  # at a true difference of nothing
        else:
            power = float(nct.sf(float(stdtrit(freedom, 1 - alpha / 2)), freedom, difference / error))
        if power >= POWER:
            return n
    return None


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
    rows = [(tuple(group), _seeds_interval([r["metrics"][metric] for r in group])) for group in groups.values()]
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


def _seeds_interval(values: Sequence[float]) -> Estimate:
    """The interval over seeds; two seeds that happen to agree to the last image do not make one of no width."""
    estimate = mean_interval(values)
    return Estimate(estimate.mean, math.nan, math.nan, estimate.n) if len(set(values)) == 1 else estimate


def configuration_name(record: Mapping[str, Any]) -> str:
    """What a person calls it: its variant, or the number of its sample."""
    if record["variant"]:
        return str(record["variant"])
    return "base" if record["index"] == 0 and not record["parameters"] else f"sample {record['index']}"


def winning_trial(ranked: Ranked, metric: str = "val_accuracy") -> Mapping[str, Any]:
    """Of the winning configuration the trial with the best validation: the one that is exported."""
    sign = -1 if metric == "val_accuracy" else 1
    return min(ranked.records, key=lambda r: sign * r["metrics"][metric])
