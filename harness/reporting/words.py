"""Numbers and names as the report and the command line show them: accuracies in percent, names in words."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from harness.run.records import RunRecord, TrialRecord
from harness.stats.intervals import Estimate

METRIC_NAMES = {
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "test_accuracy": "test accuracy",
}


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals, without the sign; empty where there is none."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def measured(estimate: Estimate, metric: str) -> str:
    """A mean with its interval: an accuracy in percent, a loss as it is.

    The limits are clipped to the metric's range, which a t-interval over few seeds may exceed.
    """
    if not metric.endswith("accuracy"):
        interval = "" if math.isnan(estimate.low) else f" [{max(0.0, estimate.low):.4f}, {estimate.high:.4f}]"
        return f"{estimate.mean:.4f}{interval}"
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    interval = "" if math.isnan(estimate.low) else f" [{percent(low)}, {percent(high)}]"
    return f"{percent(estimate.mean)} %{interval}"


def number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def changes(record: TrialRecord) -> str:
    """The trial's changes to the base, as on the command line."""
    return trial_arguments(record.parameters, precise=False)


def trial_arguments(values: Mapping[str, object], *, precise: bool = True) -> str:
    """Values of `trial.` by dotted key as words of a command line; not `precise`: floats with four digits."""
    words = []
    for key, value in values.items():
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        if isinstance(value, list | tuple):
            text = json.dumps(value, separators=(",", ":")).replace('"', "")
        elif isinstance(value, float) and not precise:
            text = f"{value:.4g}"
        words.append(shlex.quote(f"trial.{key}={text}"))
    return " ".join(words)


def listed(names: list[str], most: int = 6) -> str:
    """Names with commas; of more than `most` the number of the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def data_name(recorded: RunRecord) -> str:
    """The data set by name: that of its folder, if it is a folder of images."""
    data = recorded.config["data"]
    root = data.get("root")
    return Path(root).name if data["name"] == "images" and root else Path(str(data["name"])).stem


def space_name(recorded: RunRecord) -> str:
    path = Path(str(recorded.config["space"]))
    return f"winner of {path.absolute().parent.name}" if path.suffix == ".json" else path.stem
