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


def effective_images(correct: Correct) -> float:
    """As many images of one network, each right or wrong, leave the mean accuracy over seeds as uncertain."""
    shares = correct.mean(0)
    accuracy, variance = float(shares.mean()), float(shares.var())
    return float(len(shares) * (accuracy * (1 - accuracy) / variance if variance else 1.0))


def image_margin(first: Correct, second: Correct) -> float:
    """How far other test images would move the difference of two mean accuracies, paired by image, at 95 %.

    A fraction; never less than for two networks that no image distinguishes (Tango's interval without lost or gained).
    """
    z, images = float(ndtri(0.5 + CONFIDENCE / 2)), first.shape[1]
    difference = first.mean(0) - second.mean(0)
    return float(max(z * math.sqrt(float(difference.var(ddof=1)) / images), z * z / (images + z * z)))
