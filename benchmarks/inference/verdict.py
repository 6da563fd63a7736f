"""Summarises the measured rounds: speeds and ratios with intervals, and which file to ship in which runtime.

A ratio is an arm's images per second over the reference's, paired by round. A replicate (a fresh process) gives one
ratio, the median of its rounds; the interval is Student's t over the logarithms of the replicates' ratios, as rounds
within a process are not independent.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.inference.conditions import BUSY
from harness.config import Benchmark
from harness.run.records import Recommendation
from harness.run.storage import Json
from harness.stats.intervals import Estimate, mean_interval

if TYPE_CHECKING:
    import pandas as pd

    from benchmarks.inference.sitting import Arm


# Quantile in % -> calls needed to report it: with these, the sample's largest bounds it with 95 % confidence.
CALLS_FOR = {50: 5, 90: 29, 99: 299}


def summarize_rounds(
    rows: Sequence[Json], cold: Sequence[Json], arms: "Sequence[Arm]", reference: str, again: str
) -> "pd.DataFrame":
    """One row per arm, batch size and scope, and one per arm that was not timed, whose `note` says why."""
    import pandas as pd

    table = pd.DataFrame(rows)
    table["speed"] = table["images"] / table["seconds"]
    by_name = {arm.name: arm for arm in arms if not arm.note}
    by_name[again] = by_name[reference]
    costs = pd.DataFrame(cold).groupby("backend").median()
    summary: list[Json] = []
    cells = [(scope, size) for scope in table["scope"].unique() for size in sorted(table["batch_size"].unique())]
    for scope, batch_size in cells:
        cell = table[(table.scope == scope) & (table.batch_size == batch_size)]
        wide = cell.pivot(index=["replicate", "round"], columns="backend", values="speed")
        for name, arm in by_name.items():
            own = cell[cell.backend == name]
            if not len(own):
                left = _described(arm, name) | {"scope": scope, "note": "takes only host arrays"}
                summary += [] if left in summary else [left]
                continue
            logs = np.log(wide[name] / wide[reference]).groupby("replicate").median()
            summary.append(
                _described(arm, name)
                | {"scope": scope, "batch_size": int(batch_size)}
                | _speeds(own, mean_interval(logs.tolist()), name == reference)
                | _accuracies(arm)
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


def _speeds(own: "pd.DataFrame", ratio: Estimate, is_reference: bool) -> Json:
    """Speed columns of an arm at one batch size and scope; `ratio`: logarithm of the ratio to the reference."""
    calls, events = (
        np.array([float(ms) for text in own[clock] for ms in str(text).split()]) for clock in ("call_ms", "event_ms")
    )
    return {
        "images_per_second": float(own["speed"].median()),
        "latency_ms": float(np.median(calls)),
        **{
            f"latency_ms_p{q}": float(np.quantile(calls, q / 100)) if len(calls) >= least else math.nan
            for q, least in CALLS_FOR.items()
        },
        "event_ms": float(np.median(events)) if len(events) else math.nan,
        "ratio": math.exp(ratio.mean),
        "ratio_low": 1.0 if is_reference else math.exp(ratio.low),
        "ratio_high": 1.0 if is_reference else math.exp(ratio.high),
        "replicates": ratio.n,
        "calls": len(calls),
        "foreign_cores": float(own["foreign_cores"].median()),
    }


def _accuracies(arm: "Arm") -> Json:
    parity = arm.accuracy
    assert parity is not None
    return {
        "accuracy": parity.accuracy,
        **{f"accuracy_change_{k}": getattr(parity.accuracy_change, k) for k in ("mean", "low", "high")},
        "mcnemar_p": parity.mcnemar_p,
        "disagreeing": len(parity.disagreeing),
        "certain": parity.images - len(parity.uncertain),
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


def decide(summary: "pd.DataFrame", settings: Benchmark, reference: str, again: str) -> Recommendation:
    """The arm to ship under the settings' constraints, the arms tied with it, and a sentence.

    `ship` is None where no arm meets the constraints.
    """
    batch_size, scope = settings.recommended_batch_size, next(iter(settings.scopes.values()))
    measured = summary[(summary["batch_size"] == batch_size) & (summary["scope"] == scope)]
    rows = measured[measured["backend"] != again]
    allowed = rows[-rows["accuracy_change_low"] <= settings.max_accuracy_drop]
    asked = f"{scope}, batch {batch_size}, accuracy at most {100 * settings.max_accuracy_drop:g} points lower"
    latency = ""
    if settings.latency_ms is not None:
        allowed = allowed[allowed["latency_ms_p90"].fillna(math.inf) <= settings.latency_ms]
        latency = f"p90 latency at most {settings.latency_ms:g} ms"
        asked += f", {latency}"
    (noise,) = measured[measured["backend"] == again].to_dict("records")
    found = Recommendation(
        id=noise["artifact"].split("/")[0],
        batch_size=batch_size,
        scope=scope,
        latency=latency,
        asked=asked,
        noise=[noise["ratio_low"], noise["ratio_high"]],
        ship=None,
        tied=[],
        sentence=f"no arm meets the constraints: {asked}",
        warnings=sorted({f"{r['backend']}: {r['note']}" for r in rows.to_dict("records") if r["note"]}),
    )
    if len(allowed):
        best = {str(k): v for k, v in allowed.sort_values("ratio", ascending=False).iloc[0].to_dict().items()}
        # Two arms differ where their intervals do not overlap, each paired with the same reference.
        tied = allowed[(allowed["ratio_high"] >= best["ratio_low"]) & (allowed["backend"] != best["backend"])]
        found.ship = {k: None if v != v else v for k, v in best.items()}  # JSON knows no NaN
        found.tied = tied["backend"].tolist()
        found.sentence = _sentence(best, found.tied, settings, reference)
    return found


def _sentence(best: Json, tied: list[str], settings: Benchmark, reference: str) -> str:
    change = [100 * best[f"accuracy_change_{k}"] for k in ("mean", "low", "high")]
    speed = "the reference itself"
    if best["backend"] != reference:
        speed = f"{best['ratio']:.2f} [{best['ratio_low']:.2f}, {best['ratio_high']:.2f}] times {reference}"
    file, runtime = best["artifact"].split("/")[-1], best["backend"].split()[0]
    sentence = (
        f"ship {file} with {runtime} on {best['device']}: {speed} at batch {best['batch_size']:g}"
        f"{', from uint8 images to labels' if settings.uint8 else ''}, "
        f"accuracy {change[0]:+.2f} [{change[1]:+.2f}, {change[2]:+.2f}] points"
    )
    return f"{sentence}; {', '.join(tied)} cannot be distinguished from it" if tied else sentence


def verdict_lines(summary: "pd.DataFrame", recommended: Recommendation, reference: str, again: str) -> list[str]:
    """Lines for the log: one per arm and batch size with the noise beside the ratio, warnings, last the sentence."""
    found = []
    measured = summary.dropna(subset=["batch_size"])
    for (scope, batch_size), rows in measured.groupby(["scope", "batch_size"], sort=False):
        (noise,) = rows[rows["backend"] == again].to_dict("records")
        for row in rows.to_dict("records"):
            where = f"{scope}, batch {batch_size:g}, {row['backend']} on {row['device']}"
            text = f"{where}: {row['images_per_second']:,.0f} images/s"
            if row["backend"] != reference:
                text += f", {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] times {reference}"
                text += f" (noise [{noise['ratio_low']:.2f}, {noise['ratio_high']:.2f}])"
            found.append(text + (f"; {row['note']}" if row["note"] else ""))
    if "rate" in measured:
        for row in measured.drop_duplicates("backend").to_dict("records"):
            rate = f"{row['rate']:,.0f} single images a second, arriving at random"
            found.append(f"{row['backend']}: {rate}, {recommended.latency}")
    return [*found, *recommended.warnings, recommended.sentence]
