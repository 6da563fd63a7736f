"""The report's figures of trials, drawn with seaborn: each function takes a table and returns a matplotlib Figure."""

import io
import textwrap
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from harness.training.timers import KINDS

sns.set_theme(style="whitegrid", context="notebook", palette="colorblind", font_scale=0.9)
matplotlib.rcParams["text.parse_math"] = False  # names of classes and variants are no formulas
warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of such names: a box takes its place


WIDTH = 7.5  # inches; the page shows them at most this wide
# One colour per kind of time, the same in every report.
COLOURS = dict(zip(KINDS, sns.color_palette("colorblind", len(KINDS)), strict=True))
MOST_LINES = 12  # more groups share a continuous palette without legend


def validation_curves(histories: pd.DataFrame) -> Figure:
    """`histories`: columns trial, group, epoch, val_accuracy, val_loss; a group is a variant or a sample."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    groups = histories["group"].nunique()
    many = groups > MOST_LINES
    histories = histories.assign(percent=100 * histories["val_accuracy"])
    for axis, column, label in (
        (axes[0], "percent", "validation accuracy, %"),
        (axes[1], "val_loss", "validation loss"),
    ):
        sns.lineplot(
            histories,
            x="epoch",
            y=column,
            hue="group",
            units="trial",
            estimator=None,
            palette="viridis" if many else sns.color_palette("colorblind", groups) if groups <= 10 else "husl",
            linewidth=1.4,
            alpha=0.85,
            marker="o" if histories["epoch"].nunique() < 3 else None,
            legend=axis is axes[1] and not many,
            ax=axis,
        )
        axis.set(xlabel="epoch", ylabel=label)
    if not many:
        sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1.02, 1), title=None, frameon=False)
    _limit_loss(axes[1], histories["val_loss"])
    return figure


def _limit_loss(axis: Axes, losses: pd.Series) -> None:
    """Limit the loss axis, so that one diverging trial does not flatten the other curves."""
    finite = losses[np.isfinite(losses)]
    if len(finite) and finite.max() > 4 * finite.quantile(0.9):
        axis.set_ylim(top=2 * finite.quantile(0.9))


def time_breakdown(table: pd.DataFrame) -> Figure:
    """Time of each trial by kind. `table`: columns trial, kind, seconds; many trials are averaged into one bar."""
    trials = table["trial"].nunique()
    if trials > 2 * MOST_LINES:
        means = table.groupby("kind", sort=False)["seconds"].sum() / trials
        table = pd.DataFrame({"trial": f"mean of {trials}", "kind": means.index, "seconds": means.to_numpy()})
        trials = 1
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.26 * trials), layout="constrained")
    kinds = list(dict.fromkeys(table["kind"]))
    sns.histplot(
        table,
        y="trial",
        weights="seconds",
        hue="kind",
        hue_order=kinds[::-1],  # seaborn stacks from the last
        multiple="stack",
        discrete=True,
        shrink=0.75,
        palette=[COLOURS[kind] for kind in kinds[::-1]],
        alpha=1,
        ax=axis,
    )
    axis.set(xlabel="seconds", ylabel="")
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.02, 1), title=None, frameon=False, reverse=True)
    return figure


def claim_differences(table: pd.DataFrame) -> Figure:
    """`table`: columns claim, settled, metric, mean, low, high (fractions); one line per claim, the first on top."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.42 * len(table)), layout="constrained")
    positions = np.arange(len(table))[::-1]
    colour = sns.color_palette("colorblind")[0]
    for place, row in zip(positions, table.to_dict("records"), strict=True):
        if np.isfinite(row["low"]):
            axis.hlines(place, 100 * row["low"], 100 * row["high"], linewidth=2, color=colour)
        face = colour if row["settled"] else "white"
        axis.plot(100 * row["mean"], place, "o", markersize=8, markerfacecolor=face, markeredgecolor=colour, zorder=3)
    axis.axvline(0, color="0.4", linewidth=1)
    labels = [
        textwrap.fill(c + (" [gap]" if m == "gap" else ""), 34)
        for c, m in zip(table["claim"], table["metric"], strict=True)
    ]
    axis.set_yticks(positions, labels)
    axis.set(xlabel="difference, points", ylabel="")
    axis.set_ylim(-0.6, len(table) - 0.4)
    return figure


def variant_accuracies(table: pd.DataFrame, estimates: Mapping[str, Any], published: Mapping[str, float]) -> Figure:
    """`table`: columns variant, value (fraction), one row per trial; `estimates`: mean, low, high by variant."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.36 * len(estimates)), layout="constrained")
    places = {name: len(estimates) - 1 - i for i, name in enumerate(estimates)}
    dots, means, crosses = sns.color_palette("colorblind")[7], sns.color_palette("colorblind")[0], "#b2182b"
    axis.plot(100 * table["value"], table["variant"].map(places), "o", color=dots, markersize=4, label="a seed")
    for name, one in estimates.items():
        if np.isfinite(one.low):
            axis.hlines(places[name], 100 * one.low, 100 * one.high, color=means, linewidth=2)
        axis.plot(100 * one.mean, places[name], "|", color=means, markersize=14, markeredgewidth=2)
    shown = {name: value for name, value in published.items() if name in places}
    if shown:
        values = [100 * value for value in shown.values()]
        axis.plot(
            values,
            [places[name] for name in shown],
            "x",
            color=crosses,
            markersize=8,
            markeredgewidth=2,
            label="published",
        )
    axis.set_yticks(list(places.values()), list(places))
    axis.set(xlabel="test accuracy, %", ylabel="", ylim=(-0.6, len(places) - 0.4))
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return figure


def losses(histories: pd.DataFrame) -> Figure:
    """Training and validation loss of two variants, up to the epoch that all trials of each reached: beyond it, the
    mean would be over fewer trials. `histories` as for validation_curves, with train_loss."""
    ends = histories.groupby(["group", "trial"])["epoch"].max().groupby("group").min()
    histories = histories[histories["epoch"] <= histories["group"].map(ends)]
    long = histories.melt(["trial", "group", "epoch"], ["train_loss", "val_loss"], "part", "loss")
    long["part"] = long["part"].map({"train_loss": "training", "val_loss": "validation"})
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    long["epoch"] = long["epoch"].round(2)  # half an epoch may not be a whole number of steps
    sns.lineplot(long, x="epoch", y="loss", hue="group", style="part", errorbar=("pi", 100), ax=axis)
    axis.set(xlabel="epoch", ylabel="loss (band: all seeds)")
    _limit_loss(axis, long["loss"])
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.02, 1), title=None, frameon=False)
    return figure


def accuracy_over_training(histories: pd.DataFrame, published: float) -> Figure:
    """Validation accuracy of a variant's trials, with the published accuracy as a line."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    rows = histories.assign(percent=100 * histories["val_accuracy"])
    sns.lineplot(
        rows,
        x="epoch",
        y="percent",
        units="trial",
        estimator=None,
        hue="trial",
        legend=False,
        palette="colorblind",
        ax=axis,
    )
    axis.axhline(100 * published, color="0.3", linestyle="--", linewidth=1)
    axis.annotate(f" published {100 * published:g} %", (axis.get_xlim()[0], 100 * published), va="bottom", fontsize=9)
    axis.set(xlabel="epoch", ylabel="validation accuracy, %")
    return figure


def train_against_test(table: pd.DataFrame, order: Sequence[str]) -> Figure:
    """`table`: columns variant, part (train, test), accuracy (fraction); one row per trial and part."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    rows = table.assign(percent=100 * table["accuracy"], part=table["part"].map({"train": "training", "test": "test"}))
    sns.pointplot(
        rows,
        x="variant",
        y="percent",
        hue="part",
        order=order,
        errorbar=("pi", 100),
        linestyle="none",
        dodge=0.4,  # as stripplot places two hues
        ax=axis,
    )
    drawn = {"order": order, "dodge": True, "jitter": False}  # random jitter would differ between drawings
    sns.stripplot(rows, x="variant", y="percent", hue="part", alpha=0.6, legend=False, ax=axis, **drawn)
    axis.set(xlabel="", ylabel="accuracy, %")
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.02, 1), title=None, frameon=False)
    return figure


def parallel_parameters(table: pd.DataFrame, logarithmic: Collection[str]) -> Figure:
    """Parallel coordinates: one line per trial over its parameters, coloured by the metric, which is the last column.

    Numbers are placed on a linear scale (on a logarithmic one for the `logarithmic` columns), other values by category.
    """
    columns = [str(name) for name in table.columns]
    metric = columns[-1]
    figure, axis = plt.subplots(figsize=(max(WIDTH, 1.5 * len(columns)), 3.8), layout="constrained")
    places = np.empty((len(table), len(columns)))
    for position, name in enumerate(columns):
        places[:, position], ticks = _scale(table[name], logarithmic=name in logarithmic)
        axis.axvline(position, color="0.7", linewidth=1, zorder=0)
        for place, text in ticks:
            axis.annotate(
                text,
                (position, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                path_effects=[withStroke(linewidth=3, foreground="white")],  # lines must not strike it through
                zorder=5,
            )
    values = table[metric].to_numpy(dtype=float)
    colours = sns.color_palette("viridis", as_cmap=True)
    span = np.ptp(values) or 1.0
    for row in np.argsort(values):
        share = (values[row] - values.min()) / span
        axis.plot(range(len(columns)), places[row], color=colours(share), linewidth=1.8, alpha=0.9)
    axis.set_xticks(range(len(columns)), [c.replace(".", ".\n") for c in columns])
    axis.set(yticks=[], xlim=(-0.1, len(columns) - 1 + 0.45), ylim=(-0.06, 1.06))
    axis.grid(visible=False)
    sns.despine(ax=axis, left=True)
    return figure


def _scale(values: pd.Series, *, logarithmic: bool) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """(positions in [0, 1], ticks) of one axis. On a logarithmic one, zeros (of the base) lie below all others."""
    numeric = pd.to_numeric(values, errors="coerce")
    if numeric.notna().all() and not values.map(lambda v: isinstance(v, bool)).any():
        numbers = numeric.to_numpy(dtype=float)
        drawn = numbers > 0 if logarithmic else np.full(len(numbers), True)
        scaled = np.log(numbers[drawn]) if logarithmic else numbers
        if not len(scaled) or (scaled.min() == scaled.max() and drawn.all()):
            return np.full(len(numbers), 0.5), [(0.5, f"{numbers[0]:.3g}")]
        low, span, bottom = scaled.min(), np.ptp(scaled) or 1.0, 0.0 if drawn.all() else 0.15
        places = np.zeros(len(numbers))
        places[drawn] = bottom + (1 - bottom) * (scaled - low) / span
        ticks = [(float(bottom + (1 - bottom) * (t - low) / span), t) for t in np.linspace(low, scaled.max(), 4)]
        texts = [(place, f"{np.exp(t) if logarithmic else t:.3g}") for place, t in ticks]
        return places, texts if drawn.all() else [(0.0, "0"), *texts]
    names = sorted(values.astype(str).unique())
    step = 1 / max(len(names) - 1, 1)
    where = {name: (i * step if len(names) > 1 else 0.5) for i, name in enumerate(names)}
    return values.astype(str).map(where).to_numpy(dtype=float), [(place, name) for name, place in where.items()]


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file; clears and closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    figure.clear()
    plt.close(figure)
    return buffer.getvalue()
