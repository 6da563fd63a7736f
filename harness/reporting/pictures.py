"""Grids of images, filters and activations: each function takes arrays and returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from harness.reporting.figures import WIDTH


def mistake_grid(images: np.ndarray, described: Sequence[Mapping[str, Any]]) -> Figure:
    """`images` uint8 [N, H, W, 3]; `described`: label, predicted class and probability (fraction) of each."""
    columns = min(6, len(images))
    lines = -(-len(images) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 1.75 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, one in zip(axes.flat, images, described, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"{one['predicted']} {100 * one['probability']:.0f} %\nis {one['label']}", fontsize=8)
    return figure


def filter_grid(weights: np.ndarray, name: str) -> Figure:
    """`weights` [K, C, R, R]: in colour where C is 3, else the mean over C; each is scaled to its own range."""
    images = weights.transpose(0, 2, 3, 1) if weights.shape[1] == 3 else weights.mean(1)
    low, high = (f(images.reshape(len(images), -1), 1).reshape(-1, *[1] * (images.ndim - 1)) for f in (np.min, np.max))
    title = f"{len(images)} filters of convolution {name}"
    return _tiles((images - low) / np.maximum(high - low, 1e-12), title, cmap="gray")


def activation_grid(image: np.ndarray, answers: np.ndarray, name: str) -> Figure:
    """`image` uint8 [H, W, 3]; `answers`: a convolution's output [K, H', W'], negative blue, positive red."""
    reach = float(np.quantile(np.abs(answers), 0.99)) or 1.0
    title = f"The image, and {len(answers)} channels of convolution {name} ({answers.shape[1]}x{answers.shape[2]})"
    return _tiles([image, *answers], title, cmap="RdBu_r", vmin=-reach, vmax=reach)


def _tiles(images: Sequence[np.ndarray], title: str, **shown: Any) -> Figure:
    columns = 8 if len(images) > 12 else 4
    lines = -(-len(images) // columns)
    side = WIDTH / columns
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, side * lines + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image, interpolation="nearest", **({} if image.ndim == 3 else shown))
    figure.suptitle(title, fontsize=10)
    return figure
