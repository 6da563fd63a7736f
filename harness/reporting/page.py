"""The report of a run: figures and report/index.html, from the run directory alone. Does not import torch."""

import base64
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from harness.config.keys import flatten
from harness.reporting import captions, tables
from harness.reporting.headline import correct_images
from harness.reporting.results import Results, claims_of, variants_of
from harness.reporting.words import METRIC_NAMES, data_name, percent, space_name, trial_arguments
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.records import RunRecord, TrialRecord
from harness.run.tables import read_table
from harness.stats.accuracy import change_interval
from harness.stats.claims import Finding
from harness.stats.images import image_margin

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Template
    from matplotlib.figure import Figure

    from harness.run.progress import Progress


def write_report(run: RunDirectory, progress: "Progress") -> None:
    """Write the report of the run directory; the page states which stages have no results yet."""
    progress.status("drawing the report")
    results = Results.of(run)
    recorded, records, ranked, winner = results.recorded, results.records, results.ranked, results.winner
    manifest, recommended, findings = results.manifest, results.recommended, results.findings
    name = winner.id if winner else None
    summary, rounds = _table(run, "inference_summary.csv", name), _table(run, "inference.csv", name)
    variants = variants_of(recorded, records, run)
    shown = [
        captions.of_trials(run, recorded, records),
        captions.of_ablation(run, recorded, records, findings, {row.variant: row.values for row in variants}),
    ]
    if manifest:
        shown.append(captions.of_export(run, manifest))
    if summary is not None and rounds is not None:
        profiled = _table(run, "inference_operators.csv", name)
        shown.append(captions.of_inference(summary, rounds, recommended, profiled))
    judged = {(one.says, one.variant, one.than, one.metric) for one in findings}
    page = _template().render(
        title=f"{space_name(recorded)} on {data_name(recorded)}",
        recorded=recorded,
        metric=METRIC_NAMES[recorded.metric],
        headline=results.headline,
        winner=trial_arguments(flatten(winner.config, keep_lists=True)) if winner else "",
        longer=2 * winner.trial.epochs if winner and run.has_winner(winner) else None,
        winner_file=run.winner_file,
        confirmed=bool(ranked) and ranked[0].records[0].stage == "confirm",
        ranking=tables.ranking_table(ranked, recorded.metric),
        trials=tables.trials_table(records),
        findings=[(one, image_note(run, recorded, records, one)) for one in findings],
        untested=[c.says for c in claims_of(recorded) if (c.says, c.variant, c.than, c.metric) not in judged],
        variants=tables.variants_table(variants),
        manifest=manifest,
        files=tables.files_table(manifest) if manifest else None,
        inference=None if summary is None else tables.inference_table(summary),
        verdict=recommended,
        figures=_written(run, itertools.chain(*shown)),
        environment=flatten(recorded.environment),
    )
    storage.write_atomically(run.path / "report" / "index.html", page)


def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("harness.reporting", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html.j2")


def _written(run: RunDirectory, shown: Iterable[tuple[str, str, "Figure"]]) -> dict[str, tuple[str, str]]:
    """Write the figures as PNG files; returns (caption, PNG as base64) by name."""
    from harness.reporting.figures import png

    figures = {}
    for name, caption, figure in shown:
        picture = png(figure)
        file = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)  # a variant's name may hold anything
        storage.write_atomically(run.path / "report" / "figures" / f"{file}.png", picture)
        figures[name] = (caption, base64.b64encode(picture).decode())
    return figures


def image_note(run: RunDirectory, recorded: RunRecord, records: Sequence[TrialRecord], finding: Finding) -> str:
    """What the test images say about the two variants of a claim about accuracy; empty where it was not kept."""
    if finding.metric != "test_accuracy":
        return ""
    first, second = (
        correct_images(run, [r for r in records if r.variant == name and r.is_tested], recorded.data.test)
        for name in (finding.variant, finding.than)
    )
    if first is None or second is None:
        return ""
    if len(first) == len(second) == 1:
        lost, gained = int((second[0] & ~first[0]).sum()), int((first[0] & ~second[0]).sum())
        change = tables.points(change_interval(lost, gained, recorded.data.test))
        return f"of these two networks alone, paired by test image: {change} points"
    return f"other test images would move it by ±{percent(image_margin(first, second))} points"


def _table(run: RunDirectory, name: str, winner: str | None) -> "pd.DataFrame | None":
    """The winner's rows of a benchmark table (a run may have measured earlier winners); None if absent or corrupt."""
    if winner is None or not (run.path / name).is_file():
        return None
    if not run.is_benchmark_intact(name):
        run.notice(f"{run.path / name}: is corrupt, or its benchmark is unfinished; left out")
        return None
    table = read_table(run.path / name, ["artifact"])
    table = table[table["artifact"].str.startswith(f"{winner}/")]
    return table if len(table) else None
