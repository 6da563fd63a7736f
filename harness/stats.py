"""When a difference is real: means with intervals, paired comparisons, the ranking of configurations.

Intervals are Student's t at 95 %: runs with different seeds are close to normal and few.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        groups.setdefault(json.dumps(record["config"], sort_keys=True), []).append(record)
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
