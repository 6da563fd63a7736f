"""Summarises the measured rounds: speeds, ratios to the reference with intervals, accuracies, start-up costs.

A replicate (a fresh process of every arm) gives one value per arm, the median over its rounds of the logarithm of its
speed against all arms of that round: rounds within a process are not independent. The comparison model of all arms
(harness/stats/comparison.py, with replicates as blocks) gives the ratios; their intervals hold simultaneously, so also
for the arm that is chosen.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.inference.conditions import BUSY
from harness.run.storage import Json
from harness.stats.accuracy import Gate, accuracy_interval
from harness.stats.comparison import Comparison
from harness.stats.intervals import CONFIDENCE, Estimate

if TYPE_CHECKING:
    import pandas as pd

    from benchmarks.inference.sitting import Arm


# Quantile in % -> calls needed to report it: with these, the sample's largest bounds it with 95 % confidence.
CALLS_FOR = {50: 5, 90: 29, 99: 299}


def compare_arms(rounds: "pd.DataFrame") -> Comparison:
    """The comparison of arms by the logarithm of their speed, from the rows of one batch size and scope."""
    speeds = rounds.assign(speed=rounds["images"] / rounds["seconds"])
    logs = speeds.pivot(index=["replicate", "round"], columns="backend", values="speed").map(math.log)
    medians = logs.sub(logs.mean(axis=1), axis=0).groupby("replicate").median()
    values = {str(name): {int(str(k)): float(v) for k, v in medians[name].dropna().items()} for name in medians}
    return Comparison.of(values, paired=True)


def summarize_rounds(
    rows: Sequence[Json],
    cold: Sequence[Json],
    arms: "Sequence[Arm]",
    reference: str,
    again: str,
    allowed: float,
    alpha: float = 1 - CONFIDENCE,
) -> "pd.DataFrame":
    """One row per arm, batch size and scope, and one per arm that was not timed, whose `note` says why.

    `allowed`: drop in accuracy of the gate; `alpha`: error probability of all intervals of a batch size together.
    """
    import pandas as pd

    table = pd.DataFrame(rows)
    by_name = {arm.name: arm for arm in arms if not arm.note}
    by_name[again] = by_name[reference]
    costs = pd.DataFrame(cold).groupby("backend").median()
    summary: list[Json] = []
    cells = [(scope, size) for scope in table["scope"].unique() for size in sorted(table["batch_size"].unique())]
    for scope, batch_size in cells:
        cell = table[(table.scope == scope) & (table.batch_size == batch_size)]
        compared = compare_arms(cell)
        for name, arm in by_name.items():
            own = cell[cell.backend == name]
            if not len(own):
                left = _described(arm, name) | {"scope": scope, "note": "takes only host arrays"}
                summary += [] if left in summary else [left]
                continue
            summary.append(
                _described(arm, name)
                | {"scope": scope, "batch_size": int(batch_size)}
                | _speeds(own)
                | _ratio(compared, name, reference, alpha)
                | _accuracies(arm, allowed)
                | {str(k): v for k, v in costs.loc[name].to_dict().items()}
                | {"note": "; ".join(sorted(_notes(own, name == again)))}
            )
    for arm in arms:
        if arm.note:
            measured = {"accuracy": arm.accuracy.accuracy} if arm.accuracy else {}
            summary.append(_described(arm, arm.name) | measured | {"note": arm.note})
    return pd.DataFrame(summary)


def _described(arm: "Arm", name: str) -> Json:
    described = {"artifact": arm.check.artifact.label, "backend": name, "precision": arm.precision}
    return described | {"device": arm.check.device}


def _speeds(own: "pd.DataFrame") -> Json:
    """Speed columns of an arm at one batch size and scope."""
    calls, events = (
        np.array([float(ms) for text in own[clock] for ms in str(text).split()]) for clock in ("call_ms", "event_ms")
    )
    return {
        "images_per_second": float((own["images"] / own["seconds"]).median()),
        "latency_ms": float(np.median(calls)),
        **{
            f"latency_ms_p{q}": float(np.quantile(calls, q / 100)) if len(calls) >= least else math.nan
            for q, least in CALLS_FOR.items()
        },
        "event_ms": float(np.median(events)) if len(events) else math.nan,
        "calls": len(calls),
        "foreign_cores": float(own["foreign_cores"].median()),
    }


def _ratio(compared: Comparison, name: str, reference: str, alpha: float) -> Json:
    """The arm's speed over the reference's, with a simultaneous interval (Bonferroni)."""
    found = Estimate(0.0, 0.0, 0.0, len(compared.values[name]))
    if name != reference:
        found = compared.difference(name, reference).interval_at(1 - alpha / (len(compared.values) - 1))
    limits = {"ratio": found.mean, "ratio_low": found.low, "ratio_high": found.high}
    return {column: math.exp(value) for column, value in limits.items()} | {"replicates": found.n}


def _accuracies(arm: "Arm", allowed: float) -> Json:
    parity = arm.accuracy
    assert parity is not None
    gate = Gate.of(parity.lost, parity.gained, parity.images, allowed)
    own = accuracy_interval(parity.accuracy, parity.images)
    return {
        "accuracy": parity.accuracy,
        "accuracy_low": own.low,
        "accuracy_high": own.high,
        **{f"accuracy_change_{k}": getattr(gate.change, k) for k in ("mean", "low", "high")},
        # Logits within the tolerance are evidence of their own: no images are needed to show that the file is as good.
        "accuracy_gate": "exact" if arm.precision == "float32" else gate.outcome,
        "images": parity.images,
        "lost": parity.lost,
        "gained": parity.gained,
        "disagreeing": len(parity.disagreeing),
        "max_logit_difference": parity.max_logit_difference,
    }


def _notes(own: "pd.DataFrame", is_again: bool) -> set[str]:
    notes = {note for note in own["note"] if note}
    if is_again:
        notes.add("the reference again: the noise of this sitting")
    busy = float(own["foreign_cores"].median())
    if busy > BUSY:
        notes.add(f"other processes used {busy:.2f} cores during the measurement")
    return notes
