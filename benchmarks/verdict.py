"""What the measured rounds say: speeds and ratios with intervals, and which file to ship in which runtime.

A ratio is that of an arm's images a second to the reference's, paired by round; a replicate (a fresh process) gives
one, the median of its rounds, and the interval is Student's t over the logarithms of the replicates': rounds within a
process are not independent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.conditions import BUSY
from harness import stats
from harness.config import Benchmark

if TYPE_CHECKING:
    import pandas as pd

    from benchmarks.sitting import Arm

# A quantile is given from so many calls on: then the sample's largest bounds it with 95 % confidence.
CALLS_FOR = {50: 5, 90: 29, 99: 299}


def summarize(
    rows: Sequence[Mapping[str, Any]],
    cold: Sequence[Mapping[str, Any]],
    arms: "Sequence[Arm]",
    reference: str,
    again: str,
) -> "pd.DataFrame":
    """One row an arm, batch size and scope, and one for each arm that was not timed, whose `note` says why."""
    import pandas as pd

    table = pd.DataFrame(rows)
    table["speed"] = table["images"] / table["seconds"]
    by_name = {arm.name: arm for arm in arms if not arm.note}
    by_name[again] = by_name[reference]
    costs = pd.DataFrame(cold).groupby("backend").median()
    summary: list[dict[str, Any]] = []
    cells = [(scope, size) for scope in table["scope"].unique() for size in sorted(table["batch_size"].unique())]
    for scope, batch_size in cells:
        cell = table[(table.scope == scope) & (table.batch_size == batch_size)]
        wide = cell.pivot(index=["replicate", "round"], columns="backend", values="speed")
        for name, arm in by_name.items():
            own = cell[cell.backend == name]
            if not len(own):
                left = {"artifact": arm.check.artifact.label, "backend": name, "precision": arm.precision}
                left |= {"device": arm.check.device, "scope": scope, "note": "takes host arrays alone"}
                summary += [] if left in summary else [left]
                continue
            paired = np.log(wide[name] / wide[reference]).groupby("replicate").median()
            ratio = stats.mean_interval(paired.tolist())
            calls, events = (
                np.array([float(ms) for text in own[clock] for ms in str(text).split()])
                for clock in ("call_ms", "event_ms")
            )
            assert arm.accuracy is not None
            change = arm.accuracy["accuracy_change"]
            busy = float(own["foreign_cores"].median())
            notes = {note for note in own["note"] if note}
            if name == again:
                notes.add("the reference again: the noise of this sitting")
            if busy > BUSY:
                notes.add(f"others took {busy:.2f} cores meanwhile")
            summary.append(
                {
                    "artifact": arm.check.artifact.label,
                    "backend": name,
                    "precision": arm.precision,
                    "device": arm.check.device,
                    "scope": scope,
                    "batch_size": int(batch_size),
                    "images_per_second": float(own["speed"].median()),
                    "latency_ms": float(np.median(calls)),
                    **{
                        f"latency_ms_p{q}": float(np.quantile(calls, q / 100)) if len(calls) >= least else math.nan
                        for q, least in CALLS_FOR.items()
                    },
                    "event_ms": float(np.median(events)) if len(events) else math.nan,
                    "ratio": math.exp(ratio.mean),
                    "ratio_low": math.exp(ratio.low) if name != reference else 1.0,
                    "ratio_high": math.exp(ratio.high) if name != reference else 1.0,
                    "replicates": ratio.n,
                    "calls": len(calls),
                    "foreign_cores": busy,
                    "accuracy": arm.accuracy["accuracy"],
                    **{f"accuracy_change_{k}": change[k] for k in ("mean", "low", "high")},
                    "mcnemar_p": arm.accuracy["mcnemar_p"],
                    "disagreeing": len(arm.accuracy["disagreeing"]),
                    "certain": arm.accuracy["images"] - len(arm.accuracy["uncertain"]),
                    "max_logit_difference": arm.accuracy["max_logit_difference"],
                    **{str(k): v for k, v in costs.loc[name].to_dict().items()},
                    "note": "; ".join(sorted(notes)),
                }
            )
    for arm in arms:
        if arm.note:
            left = {"artifact": arm.check.artifact.label, "backend": arm.name, "precision": arm.precision}
            measured = {"accuracy": arm.accuracy["accuracy"]} if arm.accuracy else {}
            summary.append(left | measured | {"device": arm.check.device, "note": arm.note})
    return pd.DataFrame(summary)


def decide(summary: "pd.DataFrame", settings: Benchmark, reference: str, again: str) -> dict[str, Any]:
    """Which arm to ship under the settings' constraints, what cannot be told apart from it, and a sentence.

    `ship` is None where no arm meets them.
    """
    batch_size, scope = settings.recommended_batch_size, next(iter(settings.scopes.values()))
    measured = summary[(summary["batch_size"] == batch_size) & (summary["scope"] == scope)]
    rows = measured[measured["backend"] != again]
    allowed = rows[-rows["accuracy_change_low"] <= settings.max_accuracy_drop]
    if settings.latency_ms is not None:
        allowed = allowed[allowed["latency_ms_p90"].fillna(math.inf) <= settings.latency_ms]
    (noise,) = measured[measured["backend"] == again].to_dict("records")
    asked = f"{scope}, batch {batch_size}, accuracy at most {100 * settings.max_accuracy_drop:g} points lower"
    if settings.latency_ms is not None:
        asked += f", nine of ten calls within {settings.latency_ms:g} ms"
    told: dict[str, Any] = {
        "id": noise["artifact"].split("/")[0],
        "batch_size": batch_size,
        "scope": scope,
        "latency": "" if settings.latency_ms is None else f"nine of ten answered within {settings.latency_ms:g} ms",
        "asked": asked,
        "noise": [noise["ratio_low"], noise["ratio_high"]],
        "ship": None,
        "tied": [],
        "sentence": f"nothing meets what was asked: {asked}",
        "warnings": sorted({f"{r['backend']}: {r['note']}" for r in rows.to_dict("records") if r["note"]}),
    }
    if not len(allowed):
        return told
    best = allowed.sort_values("ratio", ascending=False).iloc[0].to_dict()
    # Two arms differ where their intervals do not meet, each paired with the same reference.
    tied = allowed[(allowed["ratio_high"] >= best["ratio_low"]) & (allowed["backend"] != best["backend"])]
    change = [100 * best[f"accuracy_change_{k}"] for k in ("mean", "low", "high")]
    speed = "the reference itself"
    if best["backend"] != reference:
        speed = f"{best['ratio']:.2f} [{best['ratio_low']:.2f}, {best['ratio_high']:.2f}] times {reference}"
    file, runtime = best["artifact"].split("/")[-1], best["backend"].split()[0]
    sentence = (
        f"ship {file} with {runtime} on {best['device']}: {speed} at batch {batch_size}"
        f"{', from uint8 images to labels' if settings.uint8 else ''}, "
        f"accuracy {change[0]:+.2f} [{change[1]:+.2f}, {change[2]:+.2f}] points"
    )
    if len(tied):
        sentence += f"; {', '.join(tied['backend'])} cannot be told apart from it"
    plain = {k: None if v != v else v for k, v in best.items()}  # JSON knows no NaN
    return told | {"ship": plain, "tied": tied["backend"].tolist(), "sentence": sentence}


def lines(summary: "pd.DataFrame", told: Mapping[str, Any], reference: str, again: str) -> list[str]:
    """For people: an arm and batch size a line, the noise beside every ratio, last the sentence."""
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
            found.append(f"{row['backend']}: {row['rate']:,.0f} single images a second, at random, {told['latency']}")
    return [*found, *told["warnings"], told["sentence"]]
