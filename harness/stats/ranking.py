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
    """One configuration over its seeds: `records` finished, `failed` did not, or stayed at chance level where other
    seeds did not.

    `p`: adjusted p value that it is worse than the best; NaN if unknown, or if another number of its seeds failed.
    `tied`: not shown to be worse than the best at 95 %.
    """

    name: str
    records: tuple[TrialRecord, ...]
    failed: tuple[TrialRecord, ...]
    estimate: Estimate
    p: float
    tied: bool

    @property
    def is_worse(self) -> bool:
        """Whether it is shown to be worse than the best."""
        return self.p < 1 - CONFIDENCE


def rank(records: Sequence[TrialRecord], metric: str = "val_accuracy") -> list[Ranked]:
    """Configurations with finished trials, best first; only the confirmed ones if any of them has finished.

    Fewer failed seeds come first, whatever the others reached; then the mean on validation over the finished ones, as
    the comparison model has it. The search's trials do not count for confirmed configurations: the best of many trials
    was selected for its luck, too. `metric`: val_accuracy or val_loss.
    """
    groups = _groups(records)
    finished, failed = {}, {}
    for key, group in groups.items():
        done = [r for r in group if r.status == "finished"]
        # A seed at chance level failed where another one of its configuration did not.
        learned = metric == "val_accuracy" and any(not r.is_at_chance for r in done)
        finished[key] = tuple(r for r in done if not (learned and r.is_at_chance))
        failed[key] = tuple(r for r in group if r.is_failure or (learned and r.is_at_chance))
    least = min((len(failed[key]) for key in groups if finished[key]), default=0)
    alike = [key for key in groups if finished[key] and len(failed[key]) == least]  # a failed seed has no value
    values = {key: {r.seed: r.metrics.of(metric) for r in finished[key]} for key in alike}
    sign = -1 if metric == "val_accuracy" else 1
    compared = Comparison.of(values)
    alike.sort(key=lambda key: (sign * compared.means[key], finished[key][0].index))
    ps = [math.nan, *compared.worse_than(alike[0], alike[1:])] if alike else []
    rest = [key for key in groups if finished[key] and key not in values]
    estimates = {key: seeds_interval([r.metrics.of(metric) for r in finished[key]]) for key in [*alike, *rest]}
    rest.sort(key=lambda key: (len(failed[key]), sign * estimates[key].mean, finished[key][0].index))
    return [
        Ranked(
            name=finished[key][0].configuration_name,
            records=finished[key],
            failed=failed[key],
            estimate=estimates[key],
            p=p,
            tied=0 < position < len(alike) and not p < 1 - CONFIDENCE,
        )
        for position, (key, p) in enumerate(zip([*alike, *rest], [*ps, *[math.nan] * len(rest)], strict=True))
    ]


def without_success(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Configurations of which every trial failed, by name: no ranking has them."""
    return {
        group[0].configuration_name: [r for r in group if r.is_failure]
        for group in _groups(records).values()
        if not any(r.status == "finished" for r in group)
    }


def _groups(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Ended trials by configuration: the confirmed ones if any of these has finished, otherwise the searched ones."""
    ended = [r for r in records if r.status == "finished" or r.is_failure]
    ended = [r for r in ended if r.is_failure or None not in (r.metrics.val_accuracy, r.metrics.val_loss)]
    confirmed = [r for r in ended if r.stage == "confirm"]
    if not any(r.status == "finished" for r in confirmed):
        confirmed = []
    groups: dict[str, list[TrialRecord]] = {}
    for record in confirmed or [r for r in ended if r.stage != "confirm"]:
        groups.setdefault(trial_id(record.config, 0, ""), []).append(record)
    return groups


def winning_trial(ranked: Ranked, metric: str = "val_accuracy") -> TrialRecord:
    """The trial of the winning configuration with the best validation metric, which is exported."""
    sign = -1 if metric == "val_accuracy" else 1
    return min(ranked.records, key=lambda r: sign * r.metrics.of(metric))
