"""The report's figures of exports and inference: each function takes data and returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from harness.reporting.figures import WIDTH


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """`counts`: test images by [true class][predicted class]; drawn as % of each true class, in the order given."""
    shares = 100 * np.asarray(counts) / np.maximum(1, np.asarray(counts).sum(1, keepdims=True))
    few = len(classes) <= 20
    figure, axis = plt.subplots(figsize=(WIDTH, 0.8 * WIDTH), layout="constrained")
    sns.heatmap(
        shares,
        annot=few,
        fmt=".0f",
        cmap="Blues",
        vmin=0,
        square=True,
        cbar_kws={"label": "% of the true class"},
        xticklabels=list(classes) if few else "auto",
        yticklabels=list(classes) if few else "auto",
        ax=axis,
    )
    axis.set(xlabel="predicted", ylabel="true")
    axis.tick_params(axis="x", rotation=45)
    axis.tick_params(axis="y", rotation=0)
    return figure


AXES = {"images_per_second": "images a second", "latency_ms": "milliseconds a call"}


def accuracy_against(summary: pd.DataFrame, cost: str, batch_size: int) -> Figure:
    """`summary`: measured rows of inference_summary.csv; `cost`: a key of AXES. A line joins the Pareto front."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    rows = summary[(summary["batch_size"] == batch_size) & (summary["backend"] != "torch_eager_again")].copy()
    rows["accuracy"] *= 100
    rows["runtime"] = rows["backend"] + " (" + rows["device"] + ")"
    better_first = rows.sort_values([cost, "accuracy"], ascending=[cost == "latency_ms", False])
    front = better_first[better_first["accuracy"] > better_first["accuracy"].cummax().shift(fill_value=-1.0)]
    axis.plot(front[cost], front["accuracy"], color="0.6", linewidth=1, zorder=0)
    sns.scatterplot(rows, x=cost, y="accuracy", s=110, ax=axis, **_by_runtime(rows))
    middle = float(rows["accuracy"].mean())
    reach = max(1.0, 1.5 * float(np.ptp(rows["accuracy"])))
    axis.set(
        xlabel=f"{AXES[cost]} at batch size {batch_size}",
        ylabel="test accuracy, %",
        xlim=(0, 1.1 * rows[cost].max()),
        ylim=(middle - reach, min(100.2, middle + reach)),
    )
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.02, 1), title=None, frameon=False)
    return figure


def _by_runtime(rows: pd.DataFrame) -> dict[str, object]:
    """The same colours and markers in every figure of the same arms."""
    order = sorted(rows["runtime"].unique())
    return {"hue": "runtime", "style": "runtime", "hue_order": order, "style_order": order}


def operators(table: pd.DataFrame, milliseconds: Mapping[str, float]) -> Figure:
    """`table`: rows of inference_operators.csv; `milliseconds`: measured per call, by backend, split by share."""
    shares = table.groupby(["backend", "kind"])["share"].sum().unstack().fillna(0.0)
    shares = shares.loc[[name for name in milliseconds if name in shares.index]]
    parts = shares.mul([milliseconds[name] for name in shares.index], axis=0)
    parts = parts[parts.max().sort_values(ascending=False).index]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.4 * len(parts)), layout="constrained")
    left = np.zeros(len(parts))
    for name, color in zip(parts.columns, sns.color_palette("colorblind", len(parts.columns)), strict=True):
        axis.barh(parts.index, parts[name], left=left, color=color, label=name)
        left += parts[name].to_numpy()
    axis.invert_yaxis()
    axis.set(xlabel=f"milliseconds a call of {int(table['batch_size'].iloc[0])} images", ylabel="")
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return figure


def latency_by_batch_size(rounds: pd.DataFrame) -> Figure:
    """`rounds`: rows of inference.csv; draws milliseconds per call, the median and range of the rounds."""
    rows = rounds[rounds["backend"] != "torch_eager_again"].copy()
    rows["latency_ms"] = 1000 * rows["seconds"] * rows["batch_size"] / rows["images"]
    rows["runtime"] = rows["backend"] + " (" + rows["device"] + ")"
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    sns.lineplot(
        rows,
        x="batch_size",
        y="latency_ms",
        **_by_runtime(rows),
        markers=True,
        dashes=False,
        estimator="median",
        errorbar=("pi", 100),
        ax=axis,
    )
    sizes = sorted(rows["batch_size"].unique())
    axis.set(xscale="log", yscale="log", xlabel="batch size, images a call", ylabel="milliseconds a call")
    axis.set_xticks(sizes, [str(s) for s in sizes])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    sns.move_legend(axis, "upper left", title=None, frameon=True)
    return figure


def accuracy_by_class(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """`confusion`: test images by [true class][predicted class]; of more than 30 classes, the best and worst 15."""
    counts = np.asarray(confusion)
    table = pd.DataFrame({"class": list(classes), "accuracy": 100 * counts.diagonal() / counts.sum(1)})
    table = table.sort_values("accuracy", ascending=False)
    if len(table) > 30:
        table = pd.concat([table.head(15), table.tail(15)])
    figure, axis = plt.subplots(figsize=(WIDTH, 1.0 + 0.28 * len(table)), layout="constrained")
    sns.barplot(table, x="accuracy", y="class", color=sns.color_palette("colorblind")[0], ax=axis)
    for row, value in enumerate(table["accuracy"]):
        axis.annotate(f"{value:.1f}", (1, row), va="center", fontsize=9, color="white" if value > 8 else "0.2")
    axis.axvline(100 * counts.trace() / counts.sum(), color="0.3", linewidth=1, linestyle="--")
    axis.set(xlabel="test accuracy, % (dashed: all classes)", ylabel="", xlim=(0, 100))
    return figure
