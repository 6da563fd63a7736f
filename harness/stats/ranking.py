"""The ranking of configurations, and the winning trial."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.run.provenance import trial_id
from harness.run.records import TrialRecord
from harness.stats.intervals import Estimate, difference_interval, seeds_interval


@dataclass(frozen=True)
class Ranked:
    """One configuration over its seeds. `tied`: not distinguishable from the best one at 95 %."""

    name: str
    records: tuple[TrialRecord, ...]
    estimate: Estimate
    tied: bool


def rank(records: Sequence[TrialRecord], metric: str = "val_accuracy") -> list[Ranked]:
    """Configurations, best first, by their mean on validation; only the confirmed ones if there are any.

    Only finished trials count. The search's trials do not count for confirmed configurations: the best of many trials
    was selected for its luck, too. `metric`: val_accuracy or val_loss.
    """
    finished = [r for r in records if r.status == "finished"]
    confirmed = [r for r in finished if r.stage == "confirm"]
    groups: dict[str, list[TrialRecord]] = {}
    for record in confirmed or finished:
        groups.setdefault(trial_id(record.config, 0, ""), []).append(record)
    sign = -1 if metric == "val_accuracy" else 1
    rows = [(tuple(group), seeds_interval([r.metrics.of(metric) for r in group])) for group in groups.values()]
    rows.sort(key=lambda row: (sign * row[1].mean, row[0][0].index))
    if not rows:
        return []
    best = {r.seed: r.metrics.of(metric) for r in rows[0][0]}
    ranked = []
    for position, (group, estimate) in enumerate(rows):
        difference = difference_interval({r.seed: r.metrics.of(metric) for r in group}, best)
        apart = not math.isnan(difference.low) and not difference.low <= 0 <= difference.high
        ranked.append(Ranked(group[0].configuration_name, group, estimate, position > 0 and not apart))
    return ranked


def winning_trial(ranked: Ranked, metric: str = "val_accuracy") -> TrialRecord:
    """The trial of the winning configuration with the best validation metric, which is exported."""
    sign = -1 if metric == "val_accuracy" else 1
    return min(ranked.records, key=lambda r: sign * r.metrics.of(metric))
