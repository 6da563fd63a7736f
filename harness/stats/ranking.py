"""The ranking of configurations, and the winning trial."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.run.provenance import trial_id
from harness.run.records import TrialRecord
from harness.stats.comparison import Comparison
from harness.stats.intervals import CONFIDENCE, Estimate, seeds_interval


@dataclass(frozen=True)
class Ranked:
    """One configuration over its seeds: `records` finished, `failed` did not.

    `p`: adjusted p value that it is worse than the best; NaN if unknown, or if another number of its seeds failed.
    `tied`: not shown to be worse than the best at 95 %.
    """

    name: str
    records: tuple[TrialRecord, ...]
    failed: tuple[TrialRecord, ...]
    estimate: Estimate
    p: float
    tied: bool


def rank(records: Sequence[TrialRecord], metric: str = "val_accuracy") -> list[Ranked]:
    """Configurations, best first; only the confirmed ones if there are any.

    Fewer failed seeds come first, whatever the others reached; then the mean on validation over the finished ones. The
    search's trials do not count for confirmed configurations: the best of many trials was selected for its luck, too.
    `metric`: val_accuracy or val_loss.
    """
    ended = [r for r in records if r.status == "finished" or r.is_failure]
    confirmed = [r for r in ended if r.stage == "confirm"]
    groups: dict[str, list[TrialRecord]] = {}
    for record in confirmed or ended:
        groups.setdefault(trial_id(record.config, 0, ""), []).append(record)
    sign = -1 if metric == "val_accuracy" else 1
    rows = []
    for group in groups.values():
        finished = [r for r in group if r.status == "finished"]
        if finished:
            failed = tuple(r for r in group if r.is_failure)
            rows.append((tuple(finished), failed, seeds_interval([r.metrics.of(metric) for r in finished])))
    rows.sort(key=lambda row: (len(row[1]), sign * row[2].mean, row[0][0].index))
    alike = [row for row in rows if len(row[1]) == len(rows[0][1])]  # a failed seed has no value to compare
    values = {str(i): {r.seed: r.metrics.of(metric) for r in row[0]} for i, row in enumerate(alike)}
    ps = [math.nan, *Comparison.of(values).worse_than("0", list(values)[1:])] if rows else []
    ps += [math.nan] * (len(rows) - len(ps))
    return [
        Ranked(
            name=finished[0].configuration_name,
            records=finished,
            failed=failed,
            estimate=estimate,
            p=p,
            tied=0 < position < len(alike) and not p < 1 - CONFIDENCE,
        )
        for position, ((finished, failed, estimate), p) in enumerate(zip(rows, ps, strict=True))
    ]


def winning_trial(ranked: Ranked, metric: str = "val_accuracy") -> TrialRecord:
    """The trial of the winning configuration with the best validation metric, which is exported."""
    sign = -1 if metric == "val_accuracy" else 1
    return min(ranked.records, key=lambda r: sign * r.metrics.of(metric))
