"""Which figures a run has data for, with their captions."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.recommendation import Recommendation
from harness.run.records import HISTORY_FILE, RunRecord, TrialRecord
from harness.stats.claims import Finding
from harness.stats.intervals import seeds_interval
from harness.training.timers import KINDS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


Shown = Iterator[tuple[str, str, "Figure"]]  # file name, caption, figure


def of_trials(run: RunDirectory, recorded: RunRecord, records: list[TrialRecord]) -> Shown:
    """Validation curves, breakdown of the time, and searched parameters."""
    import pandas as pd

    from harness.reporting import figures

    searched = [r for r in records if r.stage == "search"]
    histories = histories_of(run, searched)
    if histories is not None:
        yield (
            "validation_curves",
            "Validation accuracy and loss of each trial of the search.",
            figures.validation_curves(histories),
        )
    in_order = sorted(records, key=lambda r: (r.stage != "search", r.index, r.configuration_name, r.seed))
    booked = [
        {"trial": f"{r.configuration_name}, seed {r.seed}", "kind": kind, "seconds": r.timing.ledger.get(kind, 0.0)}
        for kind in KINDS
        for r in in_order
        if any(kind in other.timing.ledger for other in records)
    ]
    if booked:
        caption = "Where the time of each trial went: " + "; ".join(
            f"{kind}: {meaning}" for kind, meaning in KINDS.items() if any(row["kind"] == kind for row in booked)
        )
        yield "ledger", f"{caption}.", figures.time_breakdown(pd.DataFrame(booked))
    parameters = list(recorded.parameters)
    rows = [r for r in searched if r.metrics.val_accuracy is not None and r.status in ("finished", "stopped")]
    if parameters and len(rows) > 1:
        table = pd.DataFrame(
            [
                {name: r.parameters.get(name, _base(r, name)) for name in parameters}
                | {"validation accuracy, %": 100 * r.metrics.of("val_accuracy")}
                for r in rows
            ]
        )
        logarithmic = {name for name, domain in recorded.parameters.items() if domain.startswith("LogUniform")}
        caption = (
            "Hyperparameters of each sample against its validation accuracy; stopped trials where they were stopped."
        )
        yield "parallel_parameters", caption, figures.parallel_parameters(table, logarithmic)


def of_ablation(
    run: RunDirectory,
    recorded: RunRecord,
    records: list[TrialRecord],
    findings: list[Finding],
    accuracies: Mapping[str, list[float]],
) -> Shown:
    """The findings about the claims and the curves behind them; `accuracies`: test accuracy (fraction) by variant."""
    import pandas as pd

    from harness.reporting import figures

    histories = histories_of(run, [r for r in records if r.stage == "search" and r.variant])
    if findings:
        caption = (
            "Difference in points of each claim with the interval of its test; filled where settled after Holm's "
            "correction."
        )
        yield "effects", caption, figures.claim_differences(pd.DataFrame([_plain(one) for one in findings]))
    if accuracies:
        table = pd.DataFrame([{"variant": name, "value": x} for name, values in accuracies.items() for x in values])
        estimates = {name: seeds_interval(values) for name, values in accuracies.items()}
        cross = ", what was published (cross)" if recorded.published.keys() & accuracies.keys() else ""
        yield (
            "variants",
            f"Test accuracy of each variant: its seeds, their mean with its 95 % interval{cross}.",
            figures.variant_accuracies(table, estimates, recorded.published),
        )
    if histories is not None:
        compared = histories[histories["trial"].isin([r.id for r in records if r.is_tested])]
        for number, one in enumerate(findings):
            pair = compared[compared["group"].isin([one.variant, one.than])]
            yield (
                f"claim_{number + 1}_losses",
                f"{one.says}: training and validation loss of {one.variant} and {one.than}, mean over seeds "
                "as far as all of them went.",
                figures.losses(pair),
            )
        for name, published in recorded.published.items():
            own = histories[histories["group"] == name]
            if len(own):
                caption = f"Validation accuracy of {name}, each seed; the line is the published test accuracy."
                yield f"accuracy_{name}", caption, figures.accuracy_over_training(own, published)
    if gaps := [one for one in findings if one.metric == "gap"]:
        names = list(dict.fromkeys(name for one in gaps for name in (one.than, one.variant)))
        rows = [
            {"variant": r.variant, "part": part, "accuracy": r.metrics.of(f"{part}_accuracy")}
            for r in records
            if r.variant in names and r.is_tested
            for part in ("train", "test")
        ]
        yield (
            "gap",
            "Accuracy on training images (the last half epoch, as they were trained on) and on test images, by seed.",
            figures.train_against_test(pd.DataFrame(rows), names),
        )


def of_export(run: RunDirectory, manifest: Manifest) -> Shown:
    """Accuracy by class, confusion matrix and most confident mistakes of the exported network."""
    from harness.reporting import inference_figures, pictures
    from harness.run import storage

    yield (
        "accuracy_by_class",
        f"Test accuracy by class of the exported trial {manifest.id}.",
        inference_figures.accuracy_by_class(manifest.confusion, manifest.classes),
    )
    yield (
        "confusion",
        f"Test images of each class by what {manifest.id} takes them for.",
        inference_figures.confusion_matrix(manifest.confusion, manifest.classes),
    )
    images = run.exported_folder(manifest.id) / "mistakes.npy"
    wrong = manifest.mistakes
    if wrong and wrong.images and storage.is_intact(images, wrong.sha256):
        caption = (
            "Misclassified test images with the highest probability: predicted class, its probability, true class."
        )
        shape = (len(wrong.images), manifest.input_size, manifest.input_size, 3)
        try:
            pixels = storage.read_array(images, shape, "uint8")
        except storage.Corrupt:
            return
        yield "mistakes", caption, pictures.mistake_grid(pixels, wrong.images)


def of_inference(
    summary: "pd.DataFrame",
    rounds: "pd.DataFrame",
    recommended: Recommendation | None,
    profiled: "pd.DataFrame | None",
) -> Shown:
    """Accuracy against throughput and latency; from inference_summary.csv, inference.csv, inference_operators.csv."""
    from harness.reporting import inference_figures

    measured = summary.dropna(subset=["batch_size"])
    if "scope" in measured:  # only the scope that the recommendation targets, which comes first
        measured = measured[measured["scope"] == measured["scope"].iloc[0]]
        rounds = rounds[rounds["scope"] == measured["scope"].iloc[0]]
    timed = rounds["scope"].iloc[0]
    largest = int(max(measured["batch_size"]))
    asked, least = recommended.batch_size if recommended else largest, int(min(measured["batch_size"]))
    yield (
        "accuracy_throughput",
        f"Accuracy on the test images against throughput in batches of {asked}, {timed}. The line is the Pareto front.",
        inference_figures.accuracy_against(measured, "images_per_second", asked),
    )
    yield (
        "accuracy_latency",
        f"Accuracy against latency in batches of {least}: the median call.",
        inference_figures.accuracy_against(measured, "latency_ms", least),
    )
    if profiled is not None:
        of_size = measured[measured["batch_size"] == profiled["batch_size"].iloc[0]]
        yield (
            "operators",
            "Where a call's time goes: measured milliseconds, divided as each runtime's own profile has it. What "
            "compiled code fuses counts as other.",
            inference_figures.operators(profiled, dict(zip(of_size["backend"], of_size["latency_ms"], strict=True))),
        )
    yield (
        "latency",
        "Latency by batch size: median of the rounds, band over all of them.",
        inference_figures.latency_by_batch_size(rounds),
    )


def histories_of(run: RunDirectory, records: list[TrialRecord]) -> "pd.DataFrame | None":
    import pandas as pd

    tables = []
    for record in sorted(records, key=lambda r: r.index):
        if (run.trial_folder(record.id) / HISTORY_FILE).is_file():
            history = run.history(record.id)
            tables.append(history.assign(trial=record.id, group=record.configuration_name))
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else None


def _plain(finding: Finding) -> dict[str, object]:
    """The finding as a table row."""
    interval = {name: getattr(finding.difference, name) for name in ("mean", "low", "high")}
    return {"claim": finding.says, "settled": finding.verdict != "not settled", "metric": finding.metric, **interval}


def _base(record: TrialRecord, name: str) -> object:
    """A parameter's value in sample 0, from its configuration; "default" for an option that it does not set."""
    value: object = record.config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return "default"
        value = value[part]
    return value
