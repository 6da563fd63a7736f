"""What the test images say beyond accuracies: from which images each seed's network classifies correctly.

The images are one sample of many that might have been drawn. And seeds cannot agree better than chance allows: if each
image were decided independently with the probability that the seeds show, accuracies would still differ (Jordan,
"Calibrated Chaos: Variance Between Runs of Neural Network Training is Harmless and Inevitable", 2023).
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from harness.stats.intervals import CONFIDENCE

Correct = npt.NDArray[np.bool_]  # [seeds, images]


def deviation_floor(correct: Correct) -> float:
    """Standard deviation of the accuracy between seeds if each image were decided independently; NaN for one seed.

    p (1 - p) summed over images, without bias from the few seeds that estimate each p.
    """
    seeds, images = correct.shape
    if seeds < 2:
        return math.nan
    shares = correct.mean(0)
    return float(math.sqrt(float((shares * (1 - shares)).sum()) * seeds / (seeds - 1)) / images)


def image_margin(first: Correct, second: Correct | None = None) -> float:
    """How far other test images would move the mean accuracy over seeds (or its difference, paired by image), at 95 %.

    A fraction; 0 where all images are alike, NaN with fewer than two.
    """
    values = first.mean(0) if second is None else first.mean(0) - second.mean(0)
    if len(values) < 2:
        return math.nan
    return float(ndtri(0.5 + CONFIDENCE / 2) * np.std(values, ddof=1) / math.sqrt(len(values)))
