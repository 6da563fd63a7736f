"""python -m harness.report run=DIR: figures and report/index.html of a run.

Reads the run directory and nothing else; one self-contained page, and the figures as report/figures/*.png. Imports no
torch.
"""

import base64
import io
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import cli, results, stats
from harness.config import ReportConfig
from harness.ledger import KINDS

if TYPE_CHECKING:
    import pandas as pd

    from harness.progress import Progress

SHOWN_STATUS = ("finished", "stopped", "diverged", "oom", "failed")


def main(config: ReportConfig) -> int:
    from harness.progress import Progress

    run = results.RunDirectory.existing(config.run)
    progress = Progress(run.path / "run.log")
    with progress.live():
        write_report(run, progress)
    progress.line(f"report {run.path / 'report' / 'index.html'}")
    return 0


def write_report(run: results.RunDirectory, progress: "Progress") -> None:
    """Draw what the run directory holds; what a stage has not made yet is left out, and the page says so."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from harness import checkpoint

    progress.status("drawing the report")
    recorded = run.configuration()
    assert recorded is not None
    records = run.trials()
    metric = recorded["config"]["search"]["metric"]
    ranked = stats.ranking(records, metric)
    manifests = [checkpoint.read_json(path) for path in sorted((run.path / "exported").glob("*/manifest.json"))]
    winner = stats.winning_trial(ranked[0], metric)["id"] if ranked else None
    manifests.sort(key=lambda m: m["id"] != winner)
    summary, rounds = _table(run, "inference_summary.csv", winner), _table(run, "inference.csv", winner)
    effects = _effects(recorded, records)

    figures: dict[str, tuple[str, str]] = {}  # name -> (caption, PNG as base64)
    for name, caption, figure in _figures(run, recorded, records, effects, manifests, summary, rounds):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        checkpoint.write_atomically(run.path / "report" / "figures" / f"{name}.png", buffer.getvalue())
        figures[name] = (caption, base64.b64encode(buffer.getvalue()).decode())
        figure.clear()

    environment = Environment(
        loader=PackageLoader("harness", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "number": _number}
    page = environment.get_template("report.html.j2").render(
        title=f"{recorded['config']['space']} on {recorded['config']['data']['name']}",
        recorded=recorded,
        metric=metric,
        sentence=_sentence(ranked, metric),
        ranked=[(one, _test(one)) for one in ranked],
        records=sorted(records, key=lambda r: (r["stage"] != "search", SHOWN_STATUS.index(r["status"]), r["index"])),
        effects=effects,
        manifests=manifests,
        summary=[] if summary is None else summary.to_dict("records"),
        verdict=_verdict(run, winner),
        figures=figures,
        configurations={r["id"]: " ".join(f"{k}={_number(v)}" for k, v in r["parameters"].items()) for r in records},
        environment=results.flatten(recorded["environment"]),
    )
    checkpoint.write_atomically(run.path / "report" / "index.html", page)


def _figures(run, recorded, records, effects, manifests, summary, rounds):
    """(file name, caption, figure) of all that the run has data for."""
    import pandas as pd

    from harness import figures

    searched = [r for r in records if r["stage"] == "search"]
    histories = _histories(run, searched)
    if histories is not None:
        yield (
            "validation_curves",
            "Validation accuracy and loss of each trial of the search.",
            figures.validation_curves(histories),
        )
    booked = [
        {"trial": r["id"], "kind": kind, "seconds": r["timing"].get("ledger", {}).get(kind, 0.0)}
        for kind in KINDS
        for r in records
        if any(kind in other["timing"].get("ledger", {}) for other in records)
    ]
    if booked:
        caption = "Where the time of each trial went: " + "; ".join(
            f"{kind}: {meaning}" for kind, meaning in KINDS.items() if any(row["kind"] == kind for row in booked)
        )
        yield "ledger", f"{caption}.", figures.ledger(pd.DataFrame(booked))
    if effects is not None:
        reference = next(iter(recorded["variants"]))
        caption = f"What each variant changes, against {reference}, paired by seed where seeds are shared."
        yield "effects", caption, figures.effects(effects, reference)
    parameters = list(recorded["parameters"])
    rows = [r for r in searched if "val_accuracy" in r["metrics"] and r["status"] in ("finished", "stopped")]
    if parameters and len(rows) > 1:
        table = pd.DataFrame(
            [
                {name: r["parameters"].get(name, _base(r, name)) for name in parameters}
                | {"val_accuracy": r["metrics"]["val_accuracy"]}
                for r in rows
            ]
        )
        caption = (
            "Hyperparameters of each sample against its validation accuracy; stopped trials where they were stopped."
        )
        yield "parallel_parameters", caption, figures.parallel_parameters(table, "val_accuracy")
    if summary is not None and rounds is not None and manifests:
        verdict = _verdict(run, manifests[0]["id"])
        measured = summary.dropna(subset=["batch_size"])
        largest = int(max(measured["batch_size"]))
        asked, least = verdict["batch_size"] if verdict else largest, int(min(measured["batch_size"]))
        yield (
            "accuracy_throughput",
            f"Accuracy on the test images against throughput in batches of {asked}, host arrays in and out. On the "
            "line is what nothing else surpasses in both.",
            figures.accuracy_against(measured, "images_per_second", asked),
        )
        yield (
            "accuracy_latency",
            f"Accuracy against latency in batches of {least}: the median call.",
            figures.accuracy_against(measured, "latency_ms", least),
        )
        profiled = _table(run, "inference_operators.csv", manifests[0]["id"])
        if profiled is not None:
            of_size = measured[measured["batch_size"] == profiled["batch_size"].iloc[0]]
            yield (
                "operators",
                "Where a call's time goes: measured milliseconds, divided as each runtime's own profile has it. What "
                "compiled code fuses counts as other.",
                figures.operators(profiled, dict(zip(of_size["backend"], of_size["latency_ms"], strict=True))),
            )
        yield (
            "latency",
            "Latency by batch size: median of the rounds, band over all of them.",
            figures.latency_by_batch_size(rounds),
        )
    if manifests:
        yield (
            "accuracy_by_class",
            f"Test accuracy by class of the exported trial {manifests[0]['id']}.",
            figures.accuracy_by_class(manifests[0]["confusion"], manifests[0]["classes"]),
        )


def _histories(run: results.RunDirectory, records: list[dict[str, Any]]) -> "pd.DataFrame | None":
    import pandas as pd

    tables = []
    for record in sorted(records, key=lambda r: r["index"]):
        if (run.trial_folder(record["id"]) / results.HISTORY).is_file():
            history = run.history(record["id"])
            tables.append(history.assign(trial=record["id"], group=stats.configuration_name(record)))
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else None


def _effects(recorded: Mapping[str, Any], records: list[dict[str, Any]]) -> "pd.DataFrame | None":
    """Differences of each variant's validation accuracy from the first one's, with intervals; None without that one."""
    import pandas as pd

    values: dict[str, dict[int, float]] = {}
    for record in records:
        if record["status"] == "finished" and record["variant"]:
            values.setdefault(record["variant"], {})[record["seed"]] = record["metrics"]["val_accuracy"]
    names = [name for name in recorded["variants"] if name in values]
    if len(names) < 2 or names[0] != next(iter(recorded["variants"])):
        return None
    rows = []
    for name in names[1:]:
        difference = stats.difference_interval(values[name], values[names[0]])
        rows.append({"variant": name, **vars(difference)})
    return pd.DataFrame(rows)


def _base(record: Mapping[str, Any], name: str) -> Any:
    """The value that sample 0 has of a parameter: its configuration's; options left alone are the network's own."""
    value: Any = record["config"]
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return "default"
        value = value[part]
    return value


def _table(run: results.RunDirectory, name: str, winner: str | None) -> "pd.DataFrame | None":
    """A table of measurements, of the winner's files alone: a run may have measured earlier winners too."""
    import pandas as pd

    if winner is None or not (run.path / name).is_file():
        return None
    if not run.is_benchmark_whole(name):
        run.notice(f"{run.path / name}: is torn, or its benchmark has not ended; left out")
        return None
    table = pd.read_csv(run.path / name)
    table = table[table["artifact"].str.startswith(f"{winner}/")]
    return table if len(table) else None


def _verdict(run: results.RunDirectory, winner: str | None) -> dict[str, Any] | None:
    """What the benchmark recommends, if it measured the winner."""
    from harness import checkpoint

    if not run.is_benchmark_whole("verdict.json"):
        return None
    found = checkpoint.read_json(run.path / "verdict.json")
    return found if found.get("id") == winner else None


def _test(one: stats.Ranked) -> stats.Estimate | None:
    values = [r["metrics"]["test_accuracy"] for r in one.records if "test_accuracy" in r["metrics"]]
    return stats.mean_interval(values) if values else None


def _sentence(ranked: list[stats.Ranked], metric: str) -> str:
    if not ranked:
        return "No trial has finished."
    best, test = ranked[0], _test(ranked[0])
    text = f"{best.name} is best: {metric} {_interval(best.estimate, metric)} over {best.estimate.n} seed(s)"
    text += f", test accuracy {_interval(test, 'test_accuracy')}." if test else "; the test set was not read."
    tied = [one.name for one in ranked if one.tied]
    if best.estimate.n > 1 and tied:
        text += f" Not told apart from it: {', '.join(tied)}."
    elif tied:
        text += " One run each: which configuration is really best cannot be told."
    return text


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _interval(estimate: stats.Estimate, metric: str) -> str:
    """Mean and interval; that of an accuracy ends at 0 and 1, which a t-interval of few runs does not know."""
    if math.isnan(estimate.low):
        return f"{estimate.mean:.4f}"
    low, high = max(0.0, estimate.low), estimate.high
    if metric.endswith("accuracy"):
        high = min(1.0, high)
    return f"{estimate.mean:.4f} [{low:.4f}, {high:.4f}]"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(cli.run(ReportConfig, main, __doc__ or ""))
