"""The recommendation: which file to ship in which runtime, how sure that is, and what could not be shown."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.inference.summary import compare_arms
from harness.config import Benchmark
from harness.run.recommendation import Recommendation
from harness.run.storage import Json
from harness.stats.accuracy import Gate
from harness.stats.comparison import Comparison
from harness.stats.intervals import CONFIDENCE
from harness.stats.shares import share_interval

if TYPE_CHECKING:
    import pandas as pd

NOISY = 3.0  # an interval around 1 whose ends differ by more says nothing
OF_INTEREST = 1.05  # ratio of speeds: arms that differ by less are as good as each other


def decide(
    summary: "pd.DataFrame",
    rounds: "pd.DataFrame",
    settings: Benchmark,
    reference: str,
    again: str,
    alpha: float = 1 - CONFIDENCE,
) -> Recommendation:
    """The arm to ship under the settings' constraints, the arms tied with it, and a sentence.

    `summary`: of summarize_rounds; `rounds`: rows of inference.csv; `alpha`: error probability.
    `ship` is None where no arm meets the constraints. An arm that too few images or calls leave undecided may be
    shipped, with that reservation; of arms that are equally fast, one without reservation is.
    """
    batch_size, scope = settings.recommended_batch_size, next(iter(settings.scopes.values()))
    measured = summary[(summary["batch_size"] == batch_size) & (summary["scope"] == scope)]
    rounds = rounds[(rounds["batch_size"] == batch_size) & (rounds["scope"] == scope)]
    asked = f"{scope}, batch {batch_size}, accuracy at most {100 * settings.max_accuracy_drop:g} points lower"
    latency = ""
    if settings.latency_ms is not None:
        latency = f"p90 latency at most {settings.latency_ms:g} ms"
        asked += f", {latency}"
    rows: dict[str, Json] = {str(r["backend"]): {str(k): v for k, v in r.items()} for r in measured.to_dict("records")}
    noise, reservations = rows.pop(again), dict[str, str]()
    for name, row in rows.items():
        told = reservation(row, rounds[rounds["backend"] == name], settings)
        if told is not None:
            reservations[name] = told
    found = Recommendation(
        id=noise["artifact"].split("/")[0],
        batch_size=batch_size,
        scope=scope,
        latency=latency,
        asked=asked,
        noise=[noise["ratio_low"], noise["ratio_high"]],
        replicates=int(noise["replicates"]),
        alpha=alpha,
        ship=None,
        tied=[],
        sentence=f"no arm meets the constraints: {asked}",
        warnings=sorted({f"{name}: {r['note']}" for name, r in rows.items() if r["note"]}),
    )
    found.settled = not reservations
    if reservations:
        _choose(found, rows, reservations, compare_arms(rounds), reference)
    return found


def reservation(row: Json, rounds: "pd.DataFrame", settings: Benchmark) -> str | None:
    """What is not shown about an arm, empty if it meets all constraints; None if it fails one."""
    told = []
    if row["accuracy_gate"] != "exact":
        gate = Gate.of(int(row["lost"]), int(row["gained"]), int(row["images"]), settings.max_accuracy_drop)
        if gate.outcome == "fails":
            return None
        told += [gate.reservation] if gate.reservation else []
    if settings.latency_ms is not None:
        outcome = p90_outcome(rounds, settings.latency_ms)
        if outcome == "fails":
            return None
        if outcome == "too few calls":
            told.append(f"too few calls to say whether its p90 latency is at most {settings.latency_ms:g} ms")
    return "; ".join(told)


def p90_outcome(rounds: "pd.DataFrame", limit_ms: float) -> str:
    """Whether the p90 latency is within the limit, by the interval of the share of calls beyond it; a replicate is a
    cluster: "passes", "fails" or "too few calls"."""
    counts = []
    for _, own in rounds.groupby("replicate"):
        calls = [float(ms) for text in own["call_ms"] for ms in str(text).split()]
        counts.append((sum(ms > limit_ms for ms in calls), len(calls)))
    beyond = share_interval(counts)
    return "passes" if beyond.high <= 0.1 else "fails" if beyond.low > 0.1 else "too few calls"


def _choose(
    found: Recommendation, rows: dict[str, Json], reservations: dict[str, str], compared: Comparison, reference: str
) -> None:
    """Set the arm to ship, those tied with it and the sentence."""
    names = sorted(reservations, key=lambda name: -compared.means[name])
    equal = not_slower(compared, names, found.alpha)
    best = next((name for name in equal if not reservations[name]), equal[0])
    found.ship = {k: None if v != v else v for k, v in rows[best].items()}  # JSON knows no NaN
    found.tied = [name for name in equal if name != best]
    found.reservation = reservations[best]
    low, high = rows[best]["ratio_low"], rows[best]["ratio_high"]
    if best != reference and low < 1 < high and high > NOISY * low:
        found.ship, found.tied = None, []
        found.sentence = (
            f"nothing is recommended: the speed of {_fast(rows[best], reference)} is too uncertain; measure again on a "
            "machine that does nothing else, or with more benchmark.replicates"
        )
        return
    sure = [name for name in names if not reservations[name]]
    found.sentence = f"ship {_fast(rows[best], reference)}, {_accurate(rows[best])}"
    if found.tied:
        found.sentence += f"; {', '.join(found.tied)} cannot be distinguished from it in speed"
    if found.reservation:
        found.sentence += f"; reservation: {found.reservation}"
        found.sentence += f"; without reservation: {_fast(rows[sure[0]], reference)}" if sure else ""
    undecided = any("too few calls" in reservations[name] for name in equal)  # which more replicates may decide
    alpha = found.alpha / max(1, len(found.tied))
    found.settled = not undecided and all(_is_as_good(compared, names[0], name, alpha) for name in equal)


def not_slower(compared: Comparison, names: Sequence[str], alpha: float) -> list[str]:
    """The fastest of the arms `names`, in order of their speed, and those not shown to be slower."""
    ps = compared.worse_than(names[0], names[1:])
    return [names[0], *(name for name, p in zip(names[1:], ps, strict=True) if not p < alpha)]


def _is_as_good(compared: Comparison, best: str, other: str, alpha: float) -> bool:
    """Whether the two are shown to differ in speed by less than OF_INTEREST."""
    if other == best:
        return True
    interval = compared.difference(best, other).interval_at(1 - alpha)
    return max(-interval.low, interval.high) < math.log(OF_INTEREST)


def _fast(row: Json, reference: str) -> str:
    """An arm with its speed."""
    file, runtime = row["artifact"].split("/")[-1], row["backend"].split()[0]
    speed = "the reference itself"
    if row["backend"] != reference:
        speed = f"{row['ratio']:.2f}{_limits(row['ratio_low'], row['ratio_high'])} times {reference}"
    scope = f", from {row['scope']}" if str(row["scope"]).startswith("uint8") else ""
    return f"{file} with {runtime} on {row['device']}: {speed} at batch {row['batch_size']:g}{scope}"


def _accurate(row: Json) -> str:
    """An arm's accuracy, also against PyTorch's."""
    text = f"test accuracy {100 * row['accuracy']:.2f} % "
    text += f"[{100 * row['accuracy_low']:.2f}, {100 * row['accuracy_high']:.2f}], "
    if row["accuracy_gate"] == "exact":
        return text + "logits as PyTorch's"
    low, mean, high = (100 * row[f"accuracy_change_{k}"] for k in ("low", "mean", "high"))
    return text + f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] points from PyTorch's"


def _limits(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"


def verdict_lines(summary: "pd.DataFrame", recommended: Recommendation, reference: str, again: str) -> Sequence[str]:
    """Lines for the log: one per arm and batch size with the noise beside the ratio, warnings, last the sentence."""
    found = []
    measured = summary.dropna(subset=["batch_size"])
    for (scope, batch_size), rows in measured.groupby(["scope", "batch_size"], sort=False):
        (noise,) = rows[rows["backend"] == again].to_dict("records")
        for row in rows.to_dict("records"):
            where = f"{scope}, batch {batch_size:g}, {row['backend']} on {row['device']}"
            text = f"{where}: {row['images_per_second']:,.0f} images/s"
            if row["backend"] != reference:
                text += f", {row['ratio']:.2f}{_limits(row['ratio_low'], row['ratio_high'])} times {reference}"
                text += f" (noise{_limits(noise['ratio_low'], noise['ratio_high'])})"
            found.append(text + (f"; {row['note']}" if row["note"] else ""))
    if "rate" in measured:
        for row in measured.drop_duplicates("backend").to_dict("records"):
            rate = f"{row['rate']:,.0f} single images a second, arriving at random"
            found.append(f"{row['backend']}: {rate}, {recommended.latency}")
    return [*found, *recommended.warnings, recommended.sentence]
