"""The report of a run: figures and report/index.html, from the run directory alone. Does not import torch."""

import base64
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from harness.config.keys import flatten
from harness.reporting import captions
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.records import Recommendation, RunRecord, TrialRecord
from harness.stats.claims import Finding, judge_claims
from harness.stats.intervals import Estimate, seeds_interval
from harness.stats.ranking import Ranked, rank, winning_trial
from harness.stats.sequential import looks_of
from tune_spaces import Claim

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Template
    from matplotlib.figure import Figure

    from harness.run.progress import Progress

SHOWN_STATUS = ("finished", "stopped", "diverged", "oom", "failed")


@dataclass(frozen=True)
class VariantRow:
    """A variant of an ablation over its seeds: test accuracy, published accuracy (fractions), gap, cost."""

    variant: str
    published: float | None
    test: Estimate
    values: list[float]
    gap: float
    epochs: float
    seconds: float
    parameters: int

    @classmethod
    def of(cls, name: str, records: Sequence[TrialRecord], published: float | None) -> "VariantRow":
        values = [r.metrics.of("test_accuracy") for r in records]
        return cls(
            variant=name,
            published=published,
            test=seeds_interval(values),
            values=values,
            gap=fmean(r.metrics.of("gap") for r in records),
            epochs=fmean(r.metrics.of("epochs") for r in records),
            seconds=fmean(r.timing.wall_seconds for r in records),
            parameters=records[0].metrics.parameters or 0,
        )


def write_report(run: RunDirectory, progress: "Progress") -> None:
    """Write the report of the run directory; the page states which stages have no results yet."""
    progress.status("drawing the report")
    recorded, records = run.recorded(), run.trials()
    ranked = rank(records, recorded.metric)
    winner = winning_trial(ranked[0], recorded.metric).id if ranked else None
    manifests = [Manifest.read(path) for path in sorted((run.path / "exported").glob("*/manifest.json"))]
    manifests.sort(key=lambda manifest: manifest.id != winner)
    summary, rounds = _table(run, "inference_summary.csv", winner), _table(run, "inference.csv", winner)
    findings, variants = findings_of(recorded, records), variants_of(recorded, records)
    recommended = _recommendation(run, winner)
    shown = [
        captions.of_trials(run, recorded, records),
        captions.of_ablation(run, recorded, records, findings, {row.variant: row.values for row in variants}),
    ]
    if manifests:
        shown.append(captions.of_export(run, manifests[0]))
    if summary is not None and rounds is not None:
        profiled = _table(run, "inference_operators.csv", winner)
        shown.append(captions.of_inference(summary, rounds, recommended, profiled))
    judged = {(one.says, one.variant, one.than, one.metric) for one in findings}
    page = _template().render(
        title=f"{recorded.config['space']} on {recorded.config['data']['name']}",
        recorded=recorded,
        metric=recorded.metric,
        sentence=_sentence(ranked, recorded.metric),
        ranked=[(one, accuracy_on_test(one)) for one in ranked],
        records=sorted(records, key=lambda r: (r.stage != "search", SHOWN_STATUS.index(r.status), r.index)),
        findings=findings,
        untested=[c.says for c in _claims(recorded) if (c.says, c.variant, c.than, c.metric) not in judged],
        variants=variants,
        manifests=manifests,
        summary=[] if summary is None else summary.to_dict("records"),
        verdict=recommended,
        figures=_written(run, itertools.chain(*shown)),
        configurations={r.id: " ".join(f"trial.{k}={_number(v)}" for k, v in r.parameters.items()) for r in records},
        environment=flatten(recorded.environment),
    )
    storage.write_atomically(run.path / "report" / "index.html", page)


def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("harness.reporting", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": _percent, "interval": _interval, "number": _number}
    return environment.get_template("report.html.j2")


def _written(run: RunDirectory, shown: Iterable[tuple[str, str, "Figure"]]) -> dict[str, tuple[str, str]]:
    """Write the figures as PNG files; returns (caption, PNG as base64) by name."""
    from harness.reporting.figures import png

    figures = {}
    for name, caption, figure in shown:
        picture = png(figure)
        storage.write_atomically(run.path / "report" / "figures" / f"{name}.png", picture)
        figures[name] = (caption, base64.b64encode(picture).decode())
    return figures


def _claims(recorded: RunRecord) -> list[Claim]:
    return [Claim(**claim) for claim in recorded.claims]


def findings_of(recorded: RunRecord, records: Sequence[TrialRecord]) -> list[Finding]:
    """The findings about the claims of an ablation."""
    return judge_claims(_claims(recorded), records, looks_of(recorded.config["search"].get("seeds", 3)))


def variants_of(recorded: RunRecord, records: Sequence[TrialRecord]) -> list[VariantRow]:
    """The variants of an ablation that have tested trials, in the space's order."""
    groups = {name: [r for r in records if r.variant == name and r.is_tested] for name in recorded.variants}
    return [VariantRow.of(name, group, recorded.published.get(name)) for name, group in groups.items() if group]


def _table(run: RunDirectory, name: str, winner: str | None) -> "pd.DataFrame | None":
    """The winner's rows of a benchmark table (a run may have measured earlier winners); None if absent or corrupt."""
    import pandas as pd

    if winner is None or not (run.path / name).is_file():
        return None
    if not run.is_benchmark_intact(name):
        run.notice(f"{run.path / name}: is corrupt, or its benchmark is unfinished; left out")
        return None
    table = pd.read_csv(run.path / name)
    table = table[table["artifact"].str.startswith(f"{winner}/")]
    return table if len(table) else None


def _recommendation(run: RunDirectory, winner: str | None) -> Recommendation | None:
    """The benchmark's recommendation, if it measured the winner."""
    if not run.is_benchmark_intact("verdict.json"):
        return None
    found = Recommendation.read(run.path / "verdict.json")
    return found if found.id == winner else None


def accuracy_on_test(one: Ranked) -> Estimate | None:
    """Test accuracy (fraction) of a configuration over its seeds; None if the test split was not read."""
    values = [r.metrics.of("test_accuracy") for r in one.records if r.metrics.test_accuracy is not None]
    return seeds_interval(values) if values else None


def _sentence(ranked: list[Ranked], metric: str) -> str:
    if not ranked:
        return "No trial has finished."
    best, test = ranked[0], accuracy_on_test(ranked[0])
    text = f"{best.name} is best: {metric} {_interval(best.estimate, metric)} over {best.estimate.n} seed(s)"
    text += f", test accuracy {_interval(test, 'test_accuracy')}." if test else "; the test set was not read."
    tied = [one.name for one in ranked if one.tied]
    if best.estimate.n > 1 and tied:
        text += f" Tied with it at 95 %: {', '.join(tied)}."
    elif tied:
        text += " One seed each: the ranking is not statistically supported."
    return text


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _interval(estimate: Estimate, metric: str) -> str:
    """Mean and interval, clipped to the metric's range, which a t-interval over few seeds may exceed."""
    if math.isnan(estimate.low):
        return f"{estimate.mean:.4f}"
    low, high = max(0.0, estimate.low), estimate.high
    if metric.endswith("accuracy"):
        high = min(1.0, high)
    return f"{estimate.mean:.4f} [{low:.4f}, {high:.4f}]"


def _number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
