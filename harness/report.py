"""python -m harness.report run=DIR: figures and report/index.html of a run.

Reads the run directory and nothing else; one self-contained page, and the figures as report/figures/*.png. Imports no
torch.
"""

import base64
import itertools
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import captions, cli, results, stats
from harness.config import ReportConfig
from tune_spaces import Claim

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
    progress.check_logged()
    return 0


def write_report(run: results.RunDirectory, progress: "Progress") -> None:
    """Draw what the run directory holds; what a stage has not made yet is left out, and the page says so."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from harness import checkpoint
    from harness.figures import png

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
    findings, variants = findings_of(recorded, records), variants_of(recorded, records)

    verdict = _verdict(run, winner)
    shown = [
        captions.of_trials(run, recorded, records),
        captions.of_ablation(run, recorded, records, findings, variants),
    ]
    if manifests:
        shown.append(captions.of_export(run, manifests[0]))
    if summary is not None and rounds is not None:
        profiled = _table(run, "inference_operators.csv", winner)
        shown.append(captions.of_inference(summary, rounds, verdict, profiled))
    figures: dict[str, tuple[str, str]] = {}  # name -> (caption, PNG as base64)
    for name, caption, figure in itertools.chain(*shown):
        picture = png(figure)
        checkpoint.write_atomically(run.path / "report" / "figures" / f"{name}.png", picture)
        figures[name] = (caption, base64.b64encode(picture).decode())

    environment = Environment(
        loader=PackageLoader("harness", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "number": _number}
    page = environment.get_template("report.html.j2").render(
        title=f"{recorded['config']['space']} on {recorded['config']['data']['name']}",
        recorded=recorded,
        metric=metric,
        sentence=_sentence(ranked, metric),
        ranked=[(one, test_of(one)) for one in ranked],
        records=sorted(records, key=lambda r: (r["stage"] != "search", SHOWN_STATUS.index(r["status"]), r["index"])),
        findings=findings,
        untested=[c["says"] for c in recorded.get("claims", []) if c["says"] not in {one.says for one in findings}],
        variants=variants,
        manifests=manifests,
        summary=[] if summary is None else summary.to_dict("records"),
        verdict=verdict,
        figures=figures,
        configurations={r["id"]: " ".join(f"{k}={_number(v)}" for k, v in r["parameters"].items()) for r in records},
        environment=results.flatten(recorded["environment"]),
    )
    checkpoint.write_atomically(run.path / "report" / "index.html", page)


def findings_of(recorded: Mapping[str, Any], records: list[dict[str, Any]]) -> list[stats.Finding]:
    """What became of the claims of an ablation."""
    return stats.findings([Claim(**claim) for claim in recorded.get("claims", [])], records)


def variants_of(recorded: Mapping[str, Any], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant of an ablation, in its order: test accuracy over seeds, what is published, cost."""
    rows = []
    groups = {
        name: [r for r in records if r["variant"] == name and captions.is_tested(r)] for name in recorded["variants"]
    }
    accuracies = {name: [r["metrics"]["test_accuracy"] for r in group] for name, group in groups.items() if group}
    for name, values in accuracies.items():
        group = groups[name]
        rows.append(
            {
                "variant": name,
                "published": recorded.get("published", {}).get(name),
                "test": stats.seeds_interval(values),
                "values": values,
                "gap": sum(stats.value_of(r, "gap") for r in group) / len(group),
                "epochs": sum(r["metrics"]["epochs"] for r in group) / len(group),
                "seconds": sum(r["timing"]["wall_seconds"] for r in group) / len(group),
                "parameters": group[0]["metrics"]["parameters"],
            }
        )
    return rows


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


def test_of(one: stats.Ranked) -> stats.Estimate | None:
    """Test accuracy of a configuration over its seeds, where it was read."""
    values = [r["metrics"]["test_accuracy"] for r in one.records if "test_accuracy" in r["metrics"]]
    return stats.seeds_interval(values) if values else None


def _sentence(ranked: list[stats.Ranked], metric: str) -> str:
    if not ranked:
        return "No trial has finished."
    best, test = ranked[0], test_of(ranked[0])
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
