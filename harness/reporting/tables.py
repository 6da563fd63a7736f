"""The tables of the report: their headers and cells, from records and CSV files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from harness.reporting.words import METRIC_NAMES, changes, measured, number, percent
from harness.run.manifest import FileEntry, Manifest
from harness.run.progress import counted
from harness.run.records import TrialRecord
from harness.stats.accuracy import Gate
from harness.stats.images import Correct, deviation_floor
from harness.stats.intervals import Estimate, seeds_interval
from harness.stats.ranking import Ranked

if TYPE_CHECKING:
    import pandas as pd

SHOWN_STATUS = ("finished", "stopped", "diverged", "oom", "failed")


class Cell(NamedTuple):
    """`style`: CSS classes; n for numbers, code for identifiers, wide for text that may wrap."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Cells by row; `headers` label them, also in the narrow layout, where each cell has a line of its own."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def filled(self) -> "Table":
        """Without the columns that are empty in every row."""
        kept = [i for i in range(len(self.headers)) if any(row[i].text for row in self.rows)]
        return Table([self.headers[i] for i in kept], [[row[i] for i in kept] for row in self.rows])


def number_cell(text: str) -> Cell:
    return Cell(text, "n")


@dataclass(frozen=True)
class VariantRow:
    """A variant of an ablation over its seeds: test accuracy, published accuracy (fractions), gap, cost.

    `floor`: the deviation between seeds that chance alone would leave (harness/stats/images.py), NaN if unknown.
    """

    variant: str
    published: float | None
    test: Estimate
    values: list[float]
    floor: float
    gap: float
    epochs: float
    seconds: float
    parameters: int

    @classmethod
    def of(
        cls, name: str, records: Sequence[TrialRecord], published: float | None, correct: Correct | None = None
    ) -> "VariantRow":
        """`correct`: the test images that each record's network classifies correctly."""
        values = [r.metrics.of("test_accuracy") for r in records]
        return cls(
            variant=name,
            published=published,
            test=seeds_interval(values),
            values=values,
            floor=math.nan if correct is None else deviation_floor(correct),
            gap=fmean(r.metrics.of("gap") for r in records),
            epochs=fmean(r.metrics.of("epochs") for r in records),
            seconds=fmean(r.timing.wall_seconds for r in records),
            parameters=records[0].metrics.parameters or 0,
        )


def ranking_table(ranked: Sequence[Ranked], metric: str) -> Table:
    rows = []
    for one in ranked:
        tests = [r.metrics.of("test_accuracy") for r in one.records if r.metrics.test_accuracy is not None]
        rows.append(
            [
                Cell(one.name),
                Cell(standing(one, ranked)),
                number_cell(str(one.estimate.n)),
                number_cell(measured(one.estimate, metric)),
                number_cell(measured(seeds_interval(tests), "test_accuracy") if tests else "not read"),
                Cell(changes(one.records[0]) or "none", "wide"),
            ]
        )
    return Table(
        ["configuration", "standing", "seeds", METRIC_NAMES[metric], "test accuracy", "changes to the base"], rows
    )


def standing(one: Ranked, ranked: Sequence[Ranked]) -> str:
    """Where a configuration stands against the best one."""
    failed = f"{counted(len(one.failed), 'seed')} failed" if one.failed else ""
    if one is ranked[0]:
        single = one.estimate.n == 1 and len(ranked) > 1
        shown = "best of single runs" if single else "highest mean" if any(r.tied for r in ranked) else "best"
        return failed or shown
    if one.tied:
        return "not shown to be worse"
    return f"worse (p = {one.p:.2g})" if one.is_worse else failed


def variants_table(variants: Sequence[VariantRow]) -> Table:
    headers = ["variant", "published, %", "test accuracy", "seeds", "deviation over seeds, points", "by chance, points"]
    headers += ["training minus test, points", "epochs"]
    rows = [
        [
            Cell(v.variant),
            number_cell(percent(v.published)),
            number_cell(measured(v.test, "test_accuracy")),
            number_cell(str(v.test.n)),
            number_cell(percent(stdev(v.values)) if len(v.values) > 1 else ""),
            number_cell(percent(v.floor)),
            number_cell(percent(v.gap)),
            number_cell(f"{v.epochs:.1f}"),
            number_cell(f"{v.seconds:.0f}"),
            number_cell(f"{v.parameters:,}"),
        ]
        for v in variants
    ]
    return Table([*headers, "seconds per trial", "parameters"], rows)


def trials_table(records: Sequence[TrialRecord]) -> Table:
    headers = ["trial", "stage", "configuration", "seed", "status", "epochs", "validation accuracy, %"]
    rows = []
    for r in sorted(records, key=lambda r: (r.stage != "search", SHOWN_STATUS.index(r.status), r.index)):
        told = [changes(r), f"stopped by {r.stop_reason}" if r.stop_reason else "", r.error or ""]
        rows.append(
            [
                Cell(r.id, "code"),
                Cell(r.stage),
                Cell(r.configuration_name),
                number_cell(str(r.seed)),
                Cell(r.status, r.status),
                number_cell(number(r.metrics.epochs)),
                number_cell(percent(r.metrics.val_accuracy)),
                number_cell(percent(r.metrics.test_accuracy)),
                number_cell(f"{r.timing.wall_seconds:.0f}"),
                Cell("; ".join(filter(None, told)), "wide failed" if r.error else "wide"),
            ]
        )
    return Table([*headers, "test accuracy, %", "seconds", "changes to the base, reason"], rows)


def files_table(manifest: Manifest) -> Table:
    """The exported files with their parity."""
    headers = ["file", "input", "MB", "test accuracy, %", "change, points", "same class, %", "largest logit difference"]
    return Table([*headers, "check", "SHA-256"], [_file(name, entry) for name, entry in manifest.files.items()])


def _file(name: str, entry: FileEntry) -> list[Cell]:
    shape = " x ".join(str(side) for side in entry.input.shape)
    begin = [Cell(name, "code"), Cell(f"{entry.input.dtype} {shape}"), number_cell(f"{entry.bytes / 1e6:.1f}")]
    digest, parity = Cell(entry.sha256[:12], "code"), entry.parity
    if parity is None:
        return [*begin, *[Cell("")] * 4, Cell("the reference"), digest]
    exact = parity.allowed_drop is None
    gate = Gate.of(parity.lost, parity.gained, parity.images, parity.allowed_drop or 0.0)
    outcome = parity.outcome or ("passes" if parity.passed else "fails")
    return [
        *begin,
        number_cell(percent(parity.accuracy)),
        number_cell("none" if exact and parity.passed else points(gate.change)),
        number_cell(percent(parity.top1_agreement)),
        number_cell(f"{parity.max_logit_difference:.1e}"),
        Cell(outcome, {"passes": "finished", "fails": "failed"}.get(outcome, "stopped")),
        digest,
    ]


def points(change: Estimate) -> str:
    """A change in accuracy with its interval, in points (percent)."""
    return f"{100 * change.mean:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]"


def inference_table(summary: "pd.DataFrame") -> Table:
    """The measured arms, and those that are absent."""
    headers = ["batch", "runtime", "images/s", "p50, ms", "p90, ms", "p99, ms", "times the reference"]
    headers += ["test accuracy, %", "change, points", "load, s", "first call, s", "peak MiB", "note"]
    scopes = summary["scope"].nunique() if "scope" in summary else 1
    rows = []
    for row in summary.to_dict("records"):
        runtime = f"{row['backend']}, {row['precision']} on {row['device']}"
        note = Cell(_text(row["note"]), "wide note")
        if math.isnan(row["ratio"]):
            rows.append([Cell(""), Cell(runtime), Cell("absent", "stopped"), *[Cell("")] * 9, note])
            continue
        scope = f" ({row['scope']})" if scopes > 1 else ""
        interval = "" if math.isnan(row["ratio_low"]) else f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        limits = (row["accuracy_change_mean"], row["accuracy_change_low"], row["accuracy_change_high"])
        exact = row.get("accuracy_gate") == "exact"
        texts = [
            f"{row['images_per_second']:,.0f}",
            *(number(row[f"latency_ms_p{quantile}"]) for quantile in (50, 90, 99)),
            f"{row['ratio']:.2f}{interval}",
            percent(row["accuracy"]),
            "none" if exact else points(Estimate(*limits, 0)),
            number(row["load_seconds"]),
            number(row["first_call_seconds"]),
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        rows.append([number_cell(f"{row['batch_size']:.0f}"), Cell(runtime + scope), *map(number_cell, texts), note])
    return Table(headers, rows)


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)
